"""The runs of a sweep: a grid of settings and seeds, kept as TOML, in which each run has a name."""

from __future__ import annotations

import hashlib
import itertools
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .arguments import literal
from .config import read_run, run_name, run_of, write_run
from .sections import Run

__all__ = ["PLAN", "Cell", "Grid", "base_of", "parse_axes", "read_plan", "write_plan"]

PLAN = "sweep.toml"
MOST_CELLS, LONGEST_NAME = 100_000, 120


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of a sweep.

    Attributes:
        name: that of its folder.
        model: its settings in words, without the seed; runs that share it are one model.
        run: its settings.
    """

    name: str
    model: str
    run: Run


@dataclass(frozen=True)
class Grid:
    """Every combination of values of some settings, with some seeds each.

    Attributes:
        base: what all runs share.
        axes: the values of each setting, such as ``{"train.lr": [1e-3, 3e-4]}``.
        seeds: the number of seeds, which go up from the base's.
        threads: the number of threads that each process of a run computes with, on which the rounding of its numbers depends.
    """

    base: dict[str, Any]
    axes: dict[str, list[Any]]
    seeds: int
    threads: int = 1

    def cells(self) -> list[Cell]:
        """The runs, in order: seeds change fastest, and then the last setting.

        Raises:
            ValueError: a run's settings are refused; the message names its place in the grid.

        Example:
            >>> from pyrovae.cli.grid import Grid
            >>> [cell.name for cell in Grid({}, {"train.lr": [0.1, 0.2]}, seeds=2).cells()]
            ['train.lr=0.1,seed=0', 'train.lr=0.1,seed=1', 'train.lr=0.2,seed=0', 'train.lr=0.2,seed=1']
        """
        found = []
        for values in itertools.product(*self.axes.values()):
            chosen = dict(zip(self.axes, values, strict=True))
            model = " ".join(f"{key}={_text(value)}" for key, value in chosen.items())
            try:
                run = run_of(dict(self.base), _nested(chosen), f"The run with {model}" if model else "The run")
            except ValueError as error:
                found_in = "" if str(error).startswith("The run") or not model else f"The run with {model}: "
                raise ValueError(f"{found_in}{error}") from error
            for seed in range(run.seed, run.seed + self.seeds):
                text = ",".join([*(f"{key}={_text(value)}" for key, value in chosen.items()), f"seed={seed}"])
                found.append(Cell(_folder_name(text), model or run_name(run), replace(run, seed=seed, name=None)))
        if len(found) > MOST_CELLS:
            raise ValueError(f"A sweep must have at most {MOST_CELLS:,} runs, got {len(found):,}: make the grid smaller.")
        return found


def parse_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each setting, from texts such as ``"train.lr=1e-3,3e-4"``.

    Raises:
        ValueError: a text is of another form, or a setting is named twice or has a value twice.

    Example:
        >>> from pyrovae.cli.grid import parse_axes
        >>> parse_axes(["model.hidden=[200,200],[100]", "estimator.kind=iwae,dreg"])
        {'model.hidden': [[200, 200], [100]], 'estimator.kind': ['iwae', 'dreg']}
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        key = key.strip().removeprefix("--").replace("-", "_")
        if not equals or not key or not values.strip():
            raise ValueError(f"--grid must be of the form KEY=VALUE,VALUE, got {text!r}: such as train.lr=1e-3,3e-4.")
        if key in axes:
            raise ValueError(f"--grid has {key} twice: give all its values at once.")
        if key in ("seed", "name"):
            cure = "--seeds" if key == "seed" else "--name, for the folder of the sweep"
            raise ValueError(f"--grid must be of settings other than {key}: use {cure}.")
        axes[key] = _values(values)
        if len({_text(value) for value in axes[key]}) < len(axes[key]):
            raise ValueError(f"--grid must have different values, got {text!r}.")
    return axes


def write_plan(folder: Path, grid: Grid) -> Grid:
    """Write what :func:`read_plan` reads, and return it: a sweep that goes on keeps its number of threads.

    Raises:
        ValueError: the folder has another sweep, whose runs differ in more than seeds and the values of the grid.
    """
    import tomli_w

    from .. import files

    if (folder / PLAN).exists():
        before = read_plan(folder)
        if before.base != grid.base:
            keys = ", ".join(sorted(_changed(before.base, grid.base)))
            raise ValueError(f"{folder} has another sweep, with other settings ({keys}): choose another --name.")
        if list(before.axes) != list(grid.axes):
            over = ", ".join(before.axes) or "seeds alone"
            raise ValueError(f"{folder} has another sweep, over {over}: choose another --name.")
        grid = replace(grid, threads=before.threads)
    tables = {"seeds": grid.seeds, "threads": grid.threads, "grid": grid.axes, "run": grid.base}
    files.write_text(folder / PLAN, tomli_w.dumps(tables))
    return grid


def read_plan(folder: Path) -> Grid:
    """The grid of a sweep's folder.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: its file is damaged.
    """
    path = folder / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"There is no sweep in {folder}: give a folder that pyrovae sweep wrote, with its {PLAN}.")
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        axes = {key: list(values) for key, values in tables["grid"].items()}
        return Grid(dict(tables["run"]), axes, int(tables["seeds"]), int(tables["threads"]))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): start the sweep again with its own options.") from error


def base_of(path: Path | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all runs of a sweep share, written out: a file may change before the sweep goes on."""
    return tomllib.loads(write_run(replace(read_run(path, dict(given)), name=None)))


def _values(text: str) -> list[Any]:
    """Values with commas between them; those within brackets or quotes are parts of a value."""
    try:
        return list(tomllib.loads(f"values = [{text}]")["values"])
    except tomllib.TOMLDecodeError:  # words without quotes
        parts, depth = [""], 0
        for character in text:
            depth += (character in "[{(") - (character in "]})")
            if character == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += character
        return [literal(part.strip()) for part in parts]


def _text(value: Any) -> str:
    """A value in a word."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}={_text(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _folder_name(text: str) -> str:
    """A text as the name of a folder, which is another one for another text."""
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "-", text)[:LONGEST_NAME]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _nested(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted names as nested tables."""
    tables: dict[str, Any] = {}
    for key, value in chosen.items():
        table, *path = tables, *key.split(".")
        for parent in path[:-1]:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise ValueError(f"--grid has {parent} and {key}: vary one of them.")
        if isinstance(table.get(path[-1]), dict):
            raise ValueError(f"--grid has {key} and a part of it: vary one of them.")
        table[path[-1]] = value
    return tables


def _changed(one: Mapping[str, Any], other: Mapping[str, Any], above: str = "") -> set[str]:
    """The dotted names of the settings that differ."""
    found: set[str] = set()
    for key in {*one, *other}:
        first, second = one.get(key), other.get(key)
        if isinstance(first, Mapping) and isinstance(second, Mapping):
            found |= _changed(first, second, f"{above}{key}.")
        elif first != second:
            found.add(f"{above}{key}")
    return found
