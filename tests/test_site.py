"""The documentation site: its notebooks and scripts run, and each public name has a docstring and a place in the reference."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyrovae

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
NOTEBOOKS = [page for page in PAGES if "file_format: mystnb" in page.read_text(encoding="utf-8")]
CELL = re.compile(r"^```\{code-cell\} python\n(?:---\n(.*?)---\n|(?::[^\n]*\n)*)(.*?)^```$", re.S | re.M)
BLOCK = re.compile(r"^```(python|bash|toml)\n(.*?)^```$", re.S | re.M)
# "torchrun --nproc-per-node 2 SCRIPT" without torch's launcher, a third process that takes as long to start as each of the two.
TORCHRUN = """torchrun() {
    test "$1 $2" = "--nproc-per-node 2"
    export WORLD_SIZE=2 MASTER_ADDR=localhost
    RANK=1 PYTHON "$3" & RANK=0 PYTHON "$3"
    wait $!
}
"""


def _cells(page: Path) -> list[tuple[str, str]]:
    """The options and the code of each cell of a notebook."""
    return [(options or "", code) for options, code in CELL.findall(page.read_text(encoding="utf-8"))]


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.slow  # the gate runs them when it builds the site
@pytest.mark.parametrize("page", NOTEBOOKS, ids=_name)
def test_notebooks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plt, "rcParams", plt.rcParams.copy())
    plt.switch_backend("agg")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells = _cells(page)
    assert len(cells) == page.read_text(encoding="utf-8").count("{code-cell}"), "a cell is not of the form that CELL reads"
    for _, code in cells:
        exec(compile(code, _name(page), "exec"), namespace)
    plt.close("all")


@pytest.mark.parametrize("page", NOTEBOOKS, ids=_name)
def test_figures_of_notebooks_have_descriptions(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(_cells(page)) == text.count("{code-cell}"), "a cell is not of the form that the tests read"
    for options, code in _cells(page):
        draws = re.search(r"subplots\(|\.plot\(|^show\(", code, re.M) and "def show" not in code.split("show(")[0]
        if draws:
            assert re.search(r"alt: \S.{20}", options), f"{_name(page)} needs an alt text for the figure of\n{code}"


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))], ids=_name)
def test_scripts_and_tables_of_pages_run(page: Path, tmp_path: Path) -> None:
    """Blocks that are no doctests: Python as a script of its own, ``# name.py`` saved for the commands, TOML read."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_PORT": str(_free_port())}
    for language, code in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "toml":
            _check_run_file(code, tmp_path)
            continue
        if language == "python" and ">>>" in code:
            continue  # a doctest
        named = re.match(r"# (\w+\.py)\n", code)
        if named:
            (tmp_path / named[1]).write_text(code, encoding="utf-8")
            continue
        if language == "python":
            command = [sys.executable, "-c", code]
        else:
            command = ["bash", "-ec", TORCHRUN.replace("PYTHON", sys.executable) + code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{_name(page)}: {code}\n{done.stdout}{done.stderr}"


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def _check_run_file(text: str, folder: Path) -> None:
    """Refuse a table that is neither a run file nor one of entry points."""
    from pyrovae.cli.config import read_run

    tables = tomllib.loads(text)
    if "project" in tables:
        return
    (folder / "run.toml").write_text(text, encoding="utf-8")
    read_run(folder / "run.toml")


def _public() -> Iterator[tuple[str, Any]]:
    """Every public name of the package's modules, and its object."""
    for path in sorted(Path(pyrovae.__file__).parent.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name.endswith("__main__"):
            continue
        module = importlib.import_module(name)
        yield name, module
        if name == "pyrovae":
            continue  # its names are those of the others
        for public in getattr(module, "__all__", ()):
            thing = getattr(module, public)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == name:
                yield f"{name}.{public}", thing


def test_public_names_have_docstrings() -> None:
    bare = [name for name, thing in _public() if not (thing.__doc__ or "").strip()]
    for name, thing in _public():
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                value = getattr(value, "__func__", getattr(value, "fget", value))
                # A method that overrides one with a docstring has that one's.
                if not member.startswith("_") and inspect.isfunction(value) and not inspect.getdoc(getattr(thing, member)):
                    bare.append(f"{name}.{member}")
    assert not bare


def _reference() -> str:
    return "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))


def test_the_reference_has_every_public_name() -> None:
    index = (ROOT / "pyrovae" / "__init__.pyi").read_text(encoding="utf-8")
    # Names by the room they come from, ``from .evidence.results import Evidence as Evidence``; the others are modules.
    rooms = set(re.findall(r"^from \.(\w+)[\w.]* import", index, re.M))
    modules = set(re.findall(r"^from \. import (\w+)", index, re.M))
    shown = set(re.findall(r"^\.\. public:: (\w+)$", _reference(), re.M))
    assert rooms == shown, "docs/reference has no page that says `.. public:: room`"
    members = set(re.findall(r"^\.\. automodule:: pyrovae\.(\w+)\n   :members:$", _reference(), re.M))
    assert modules <= shown | members, "docs/reference has no page of these modules"
    for name in re.findall(r"^\.\. automodule:: ([\w.]+)\n   :members:$", _reference(), re.M):
        assert importlib.import_module(name).__all__, f"{name} has no __all__, by which its members are chosen"


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = set()
    for page in (DOCS / "index.md", DOCS / "reference" / "index.md"):
        for tree in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            names = [line for line in tree.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / name).relative_to(DOCS).as_posix() for name in names}
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert listed == pages - {"index"}


def test_commands_of_pages_parse() -> None:
    from pyrovae.cli.app import app

    commands = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        commands += re.findall(r"^    (?:pip install .* && )?pyrovae ([^#\n]*?) *(?:#.*)?$", text, re.M)
    assert len(commands) > 10
    for command in commands:
        tokens = [token.replace("NAME", "name") for token in command.split()]
        app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_python_blocks_compile() -> None:
    cells = [code for page in NOTEBOOKS for _, code in _cells(page)]
    assert len(cells) > 10
    for code in cells:
        ast.parse(code)
