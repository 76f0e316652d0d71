"""Commands that use a trained run: ``pyrovae sample | reconstruct | encode | interpolate | impute | export | report``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from .app import _described, app
from .output import Output

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.base import PairModule
    from ..models.vae import VAE

__all__ = ["encode", "export", "impute", "interpolate", "reconstruct", "report", "sample"]

Part = Literal["test", "train"]
Printed = Annotated[Output | None, Parameter(name="*")]


@app.command(sort_key=6)
def sample(run: Path, /, *, num_samples: int = 64, mean: bool = True, seed: int = 0, output: Printed = None) -> None:
    """Draw data from a trained model: samples.npy, and samples.png for images, in the run's folder.

    Example: pyrovae sample runs/digits-dreg-4 --num-samples 100

    Args:
        run: The run's folder.
        num_samples: How many.
        mean: Means of p(x|z) at draws of z; --no-mean draws x too, of models that can.
        seed: Seeds the draws.
        output: What is printed.
    """
    import torch

    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

    vae, _ = _model_and_data(run, None)
    if num_samples < 1:
        raise ValueError(f"--num-samples must be positive, got {num_samples}.")
    torch.manual_seed(seed)
    with torch.no_grad():
        if mean:
            drawn = vae.examples(num_samples)
        elif isinstance(vae, VAE | HierarchicalVAE):
            drawn = vae.sample(num_samples)
        else:
            raise ValueError(f"A {type(vae).__name__} draws means only: leave out --no-mean.")
    _write(run, "samples", drawn, output, pictures=drawn)


@app.command(sort_key=7)
def reconstruct(run: Path, /, *, part: Part = "test", limit: int | None = None, output: Printed = None) -> None:
    """Reconstruct data by a trained model: reconstructions.npy, and a picture for images, in the run's folder.

    Example: pyrovae reconstruct runs/digits-dreg-4 --limit 20

    Args:
        run: The run's folder.
        part: The held-out data or the training data.
        limit: Only the first so many.
        output: What is printed.
    """
    vae, inputs = _model_and_data(run, part, limit)
    means = vae.reconstruct(*inputs)
    _write(run, "reconstructions", means, output, pictures=means)


@app.command(sort_key=8)
def encode(run: Path, /, *, part: Part = "test", limit: int | None = None, output: Printed = None) -> None:
    """Encode data by a trained model: the mean of q(z|x) of each datum, as latents.npy in the run's folder.

    Example: pyrovae encode runs/digits-dreg-4 --part train

    Args:
        run: The run's folder.
        part: The held-out data or the training data.
        limit: Only the first so many.
        output: What is printed.
    """
    vae, inputs = _model_and_data(run, part, limit)
    _write(run, "latents", vae.embed(*inputs), output)


@app.command(sort_key=8)
def interpolate(
    run: Path, /, *, rows: list[int] | None = None, steps: int = 10, part: Part = "test", output: Printed = None
) -> None:
    """Decode the straight lines between encodings of data: interpolations.npy, and a picture for images, in the run's folder.

    Example: pyrovae interpolate runs/digits-dreg-4 --rows 0 1 5 9 --steps 12

    Args:
        run: The run's folder.
        rows: Numbers of data, from 0 on: two for each line; by default 0 to 7, which makes four lines.
        steps: Points on each line, both ends included.
        part: The held-out data or the training data.
        output: What is printed.
    """
    rows = list(range(8)) if rows is None else rows
    if len(rows) % 2 or not rows or steps < 2:
        raise ValueError(f"--rows must be pairs and --steps 2 or more, got {len(rows)} rows and {steps} steps.")
    vae, inputs = _model_and_data(run, part)
    size = len(inputs[0])
    if not 0 <= min(rows) <= max(rows) < size:
        raise ValueError(f"--rows must be from 0 to {size - 1}, the last of the {part} data, got {rows}.")
    if len(inputs) > 1:
        raise ValueError("Data with missing values or labels have no interpolation here: use vae.interpolate in Python.")
    ends = inputs[0][rows[::2]], inputs[0][rows[1::2]]
    lines = _must_be_vae(vae, "interpolated").interpolate(*ends, steps).transpose(0, 1)
    _write(run, "interpolations", lines, output, pictures=lines.flatten(0, 1), width=steps)


@app.command(sort_key=8)
def impute(
    run: Path,
    data: Path | None = None,
    /,
    *,
    num_samples: int = 1000,
    num_draws: int | None = None,
    seed: int = 0,
    output: Printed = None,
) -> None:
    """Fill in the missing values of data, given the others: imputed.npy, and imputed.csv of a table, in the run's folder.

    The rows stay in the order of the file. Observed values are kept.

    Example: pyrovae impute runs/counts-dreg-8 more_counts.csv

    Args:
        run: The folder of a run of kind vae.
        data: A file of the columns that the run was trained on, read as the run's own; by default the run's own.
        num_samples: Latents drawn for each datum.
        num_draws: Write this many draws of the missing values, in place of their means.
        seed: Seeds the draws.
        output: What is printed.
    """
    import warnings

    from .. import data as data_room
    from ..data.rows import Rows

    vae, described = _must_be_vae(_model_and_data(run, None)[0], "imputed"), _described(run)
    path = described.data.path if data is None else str(data)
    if path is None:
        raise ValueError(f"{described.data.name} has no missing values: give a file to impute.")
    if described.data.binarize is not None:
        raise ValueError(f'data.binarize = "{described.data.binarize}" changes the values of {run}: use vae.impute in Python.')
    table = data_room.read(path, **described.data.reading())
    if table.mask is None:
        raise ValueError(f"{path} has no missing values: there is nothing to impute.")
    if isinstance(table.x, Rows):
        raise ValueError(f"{path} is read from disk in batches: use vae.impute in Python, or set data.memory higher.")
    _check_columns(run, path, list(table.columns))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filled = vae.impute(table.x, table.mask, num_samples=num_samples, num_draws=num_draws, seed=seed)
    notes = [str(each.message) for each in caught]
    printed = output or Output()
    with printed.words():
        print(
            f"{int((~table.mask[:]).sum()):,} values of {path} filled in, {'draws' if num_draws else 'means'} given the others"
        )
        for note in notes:
            print(f"Note: {note}")
    names = list(table.columns) if num_draws is None else None
    _write(run, "imputed", filled, output, names=names or None, notes=notes)


@app.command(sort_key=9)
def export(run: Path, /, *, format: Literal["torch", "onnx"] = "torch", output: Printed = None) -> None:
    """Write a trained VAE's encoder and decoder as graphs that run without pyrovae, in the run's folder.

    Example: pyrovae export runs/digits-dreg-4 --format onnx

    Args:
        run: The run's folder.
        format: For torch.export.load (.pt2), or ONNX.
        output: What is printed.
    """
    vae = _must_be_vae(_model_and_data(run, None)[0], "exported")
    _say(vae.export(run, format=format), output)


@app.command(sort_key=9)
def report(run: Path, /, *, decompose: int | None = None, output: Printed = None) -> None:
    """Write the report of a run anew from the scores that it has: report.html in its folder.

    Scores, summary and model stay as they are; pyrovae evaluate scores again.

    Example: pyrovae report runs/digits-dreg-4

    Args:
        run: The run's folder.
        decompose: Split the gap and the rate of the first so many data; 0 leaves it out; by default as the run says.
        output: What is printed.
    """
    from .config import load_model, load_split, run_device
    from .scoring import remake_report

    described = _described(run, {} if decompose is None else {"evaluate": {"decompose": decompose}})
    vae = load_model(run).to(run_device(described))
    output = output or Output()
    with output.words():
        path = remake_report(run, described, load_split(described), vae, output.bars)
    _say([path], output)


def _model_and_data(run: Path, part: Part | None, limit: int | None = None) -> tuple[PairModule, tuple[Tensor, ...]]:
    """A run's model, and what it takes of the test or the training data."""
    import torch

    from .config import load_model, load_split, run_device

    described = _described(run)
    vae = load_model(run).to(run_device(described))
    vae.eval()
    if part is None:
        return vae, ()
    split = load_split(described)
    x, y = (split.test, split.test_labels) if part == "test" else (split.train, split.train_labels)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"The training data of {run} are read from disk in batches: use vae.embed(path) in Python.")
    return vae, tuple(each[:limit] for each in vae.score_inputs(x, y, **split.beside(part)))


def _must_be_vae(vae: PairModule, what: str) -> VAE:
    from ..models.vae import VAE

    if not isinstance(vae, VAE):
        raise ValueError(f"Models of kind vae can be {what}, and this is a {type(vae).__name__}.")
    return vae


def _check_columns(run: Path, path: str, columns: list[str]) -> None:
    """Refuse a table whose columns are not those that a run was trained on, in their order."""
    from ..files import read_json

    expected = read_json(run / "summary.json").get("names", {}).get("columns") if (run / "summary.json").is_file() else None
    if not expected or not columns or columns == expected:
        return
    missing = next((name for name in expected if name not in columns), None)
    surplus = next((name for name in columns if name not in expected), None)
    what = f"lacks {missing!r}" if missing else f"has {surplus!r}" if surplus else "has them in another order"
    raise ValueError(f"{path} must have the columns that {run} was trained on, and {what}: change it.")


def _write(
    run: Path,
    name: str,
    values: Tensor,
    output: Output | None,
    *,
    pictures: Tensor | None = None,
    width: int | None = None,
    names: list[str] | None = None,
    notes: list[str] | None = None,
) -> None:
    """Write an array into a run's folder, atomically.

    Args:
        run: the folder.
        name: of the files, without their endings.
        values: the array.
        output: what is printed.
        pictures: data of which the first hundred are written as a picture too, if they are images.
        width: of the picture, in images; by default it is a square.
        names: of the columns of a table, which is written as text too.
        notes: sentences for the findings.
    """
    import csv
    import io

    import numpy as np

    from ..files import write_bytes

    array = values.detach().cpu().numpy()
    file, contents = io.BytesIO(), dict[str, bytes]()
    np.save(file, array)
    contents["npy"] = file.getvalue()
    if names is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [names, *([f"{number:.9g}" for number in row] for row in array.tolist())]
        )
        contents["csv"] = text.getvalue().encode()
    picture = None if pictures is None else _picture(pictures.detach().cpu().numpy(), width)
    if picture is not None:
        contents["png"] = picture
    paths = [run / f"{name}.{ending}" for ending in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_bytes(path, content)
    _say(paths, output, {"shape": list(array.shape)} | ({"notes": notes} if notes else {}))


def _say(paths: list[Path], output: Output | None, more: dict[str, Any] | None = None) -> None:
    """Print what was written."""
    output, more = output or Output(), more or {}
    with output.words():
        for path in paths:
            size = f": {' x '.join(map(str, more['shape']))}" if path.suffix == ".npy" else ""
            print(f"Wrote {path}{size}")
    output.findings({"files": [str(path) for path in paths]} | more)


def _picture(array: Any, width: int | None) -> bytes | None:
    """The first hundred images in rows; ``None`` if the data are no images."""
    from .images import as_images, data_range, image_grid, png_bytes

    images = as_images(array[:100])
    if images is None:
        return None
    return png_bytes(image_grid(images, width or math.ceil(math.sqrt(len(images))), *data_range(array)))
