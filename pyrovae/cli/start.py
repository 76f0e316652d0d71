"""Commands for a start: ``pyrovae list | init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from .app import app
from .output import Output

__all__ = ["init", "list_names"]


@app.command(name="list", sort_key=4)
def list_names(name: str | None = None, /, *, output: Annotated[Output | None, Parameter(name="*")] = None) -> None:
    """List models, priors, likelihoods, encoders, bodies, guides and estimators by name, with a line each.

    Example: pyrovae list dreg

    Args:
        name: One of the names: its options, their defaults, and the paper; or one of the kinds, such as priors.
        output: What is printed.
    """
    from .printing import described_names, print_name, print_names

    output = output or Output()
    with output.words():
        if name is None:
            print_names()
        else:
            print_name(name)
    output.findings(described_names(name))


@app.command(sort_key=10)
def init(
    data: str | None = None,
    /,
    *,
    output: Path | None = None,
    printed: Annotated[Output | None, Parameter(name="*")] = None,
) -> None:
    """Write a TOML file for data, with a comment on every setting: pyrovae train reads it.

    Example: pyrovae init counts.csv

    Args:
        data: A file, a folder of images, or the name of a data set; by default the digits.
        output: The TOML file, which must not exist; by default named after the data.
        printed: What is printed.
    """
    from .. import files
    from .config import load_split, read_run, with_data
    from .template import template

    is_path = data is not None and Path(data).exists()
    overrides = {} if data is None else {"data": {"path" if is_path else "name": data}}
    run = read_run(overrides=overrides)
    path = Path(f"{Path(run.data.path or run.data.name).stem}.toml") if output is None else output
    if path.suffix != ".toml":
        raise ValueError(f"--output must end in .toml, got {path}: pyrovae train takes other files for data.")
    if path.exists():
        raise ValueError(f"{path} exists already: choose another --output, or remove it first.")
    split = load_split(run)
    files.write_text(path, template(with_data(run, split), split))
    printed = printed or Output()
    with printed.words():
        print(f"Data: {split.note}.\nWrote {path}: change what you like, then pyrovae train {path}")
    printed.findings({"data": split.note, "files": [str(path)]})
