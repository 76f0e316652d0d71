"""The arrays in a user's data of any kind, each with the parameter of the program that it is for."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .frames import is_frame, series_classes, series_values
from .matching import MASK
from .readers import read
from .rows import ArrayRows, DataError, Rows, SparseRows
from .table import Table, as_numbers

__all__ = ["Lazy", "opened"]


class Lazy(Dataset):
    """Arrays of which some are read when they are needed.

    Args:
        items: the arrays, each with one entry per datum.
        names: the parameter that each is for, or ``None``.

    Raises:
        ValueError: the arrays have different lengths, or are empty.
    """

    def __init__(self, items: Sequence[Any], names: Sequence[str | None]):
        self.items, self.names = tuple(items), list(names)
        lengths = [len(item) for item in self.items]
        if len(set(lengths)) > 1:
            raise DataError(
                f"The arrays must have one length, got different lengths {lengths}: give each argument one entry per datum."
            )
        if any(0 in item.shape for item in self.items):
            raise DataError("The data are empty: give at least one datum, with data along the first dimension.")

    def __len__(self) -> int:
        return len(self.items[0])

    def __getitem__(self, row: int) -> tuple[Any, ...]:
        return tuple(item[0] for item in self.take(torch.tensor([row])))

    def take(self, rows: Tensor) -> tuple[Any, ...]:
        """The entries of some data, in memory."""
        numbers = rows.numpy()
        return tuple(item.take(numbers) if isinstance(item, Rows) else item[numbers] for item in self.items)

    def part(self, rows: Tensor) -> Lazy:
        """Some of the data, still unread."""
        numbers = rows.numpy()
        return Lazy([item.select(numbers) if isinstance(item, Rows) else item[numbers] for item in self.items], self.names)


def opened(data: Any, program: Callable[..., Any] | None = None) -> tuple[tuple[Any, ...], list[str | None]]:
    """The arrays in any data, masks last, and the name of the parameter that each is for; ``None`` where its position decides.

    Args:
        data: an array, a table, a data frame, a path, a sparse matrix, a tuple of them, or a dictionary of them by the names of
            the program's parameters.
        program: the model; a table gives it those of its further arrays that the parameters name.

    Raises:
        ValueError: several masks; or a file or a frame cannot be read.
    """
    parameters = _parameters(program)
    named = list(data.items()) if isinstance(data, Mapping) else [(None, item) for item in _each(data)]
    items: list[Any] = []
    names: list[str | None] = []
    masks: list[Any] = []
    for name, item in named:
        parts, part_names = _open(item, parameters)
        part_names = [name if name is not None else part_names[0], *part_names[1:]]
        masks += [part for part, part_name in zip(parts, part_names, strict=True) if part_name == MASK]
        kept = [(part, part_name) for part, part_name in zip(parts, part_names, strict=True) if part_name != MASK]
        items, names = items + [part for part, _ in kept], names + [part_name for _, part_name in kept]
    if len(masks) > 1:
        raise DataError(
            f"The data hold {len(masks)} masked arrays, and a mask beside the data belongs to one: pass the others filled, "
            f"with their masks as arrays."
        )
    return (*items, *masks), [*names, *[MASK] * len(masks)]


def _each(data: Any) -> tuple[Any, ...]:
    return data if isinstance(data, tuple) else (data,)


def _parameters(program: Callable[..., Any] | None) -> list[str]:
    if program is None:
        return []
    return list(inspect.signature(program.forward if isinstance(program, torch.nn.Module) else program).parameters)


def _open(item: Any, parameters: Sequence[str]) -> tuple[list[Any], list[str | None]]:
    """The arrays of one item: the first is the item itself, the others have names."""
    if isinstance(item, Tensor):
        return [item if item.layout == torch.strided else SparseRows.of(item)], [None]
    if isinstance(item, str | os.PathLike) or is_frame(item) or _library(item) == "anndata":
        item = read(item)
    if isinstance(item, Table):
        return item.arrays(parameters)
    if _library(item) in ("pandas", "polars") and hasattr(item, "to_numpy"):
        return _open_column(item)
    if _library(item) == "scipy" and hasattr(item, "tocsr"):
        return [SparseRows.of(item)], [None]
    if (isinstance(item, np.memmap) and item.ndim > 1) or _library(item) == "h5py":
        return [ArrayRows(item)], [None]
    if isinstance(item, list) and any(isinstance(row, np.ma.MaskedArray) for row in item):
        # A plain array of these rows would lose their masks.
        item = np.ma.stack([np.ma.asarray(row) for row in item])
    if isinstance(item, np.ma.MaskedArray):
        return [item.filled(0), ~np.ma.getmaskarray(item)], [None, MASK]
    return [as_numbers(item) if isinstance(item, np.ndarray) else item], [None]


def _open_column(series: Any) -> tuple[list[Any], list[str | None]]:
    """One column: numbers, or classes if it has categories."""
    cells = series_values(series)
    known = [cell for cell in cells if cell is not None]
    if str(series.dtype).lower().startswith(("category", "enum")):
        return [series_classes(series, "The column")[0]], [None]
    if any(isinstance(cell, str) for cell in known):
        raise DataError(
            "A column of labels must have numbers or categories, got text, whose numbers would depend on which labels occur: "
            "write column.astype('category')."
        )
    values = series.to_numpy()
    return [values if values.dtype.kind in "biuf" and len(known) == len(cells) else np.array(cells.tolist(), float)], [None]


def _library(item: Any) -> str:
    return type(item).__module__.split(".")[0]
