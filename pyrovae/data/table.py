"""Data with what belongs to them: masks, labels, covariates and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._validation import unknown
from .matching import MASK
from .rows import DataError, Rows, number_array

__all__ = ["Table", "as_numbers", "from_arrays", "label_codes", "without_nan"]

# Names of arrays beside each other in one file, in the order in which they are looked for.
DATA_NAMES = ("x", "X", "data", "images", "values")
LABEL_NAMES = ("y", "labels", "label", "targets", "target")


@dataclass(frozen=True)
class Table:
    """Data with what belongs to them, as :func:`pyrovae.data.read` makes it of a file or a data frame.

    Whatever takes data takes a table. The data and the labels go to the program's parameters by position, the mask to the
    parameter that is named so, and the others to the parameters of their own names.

    Attributes:
        x: the data, shape (N, ...), in memory or read from disk in batches.
        mask: true where a value was observed, shape of ``x``; ``None`` if all were.
        labels: classes, integers of shape (N,) with -1 where there is none, or ``None``.
        covariates: numbers of shape (N, C) that belong to the data without being modelled, or ``None``.
        size_factors: the scale of each datum, shape (N,), or ``None``.
        columns: names of the columns of ``x``, if they have names.
        classes: names of the classes.
        covariate_names: names of the columns of ``covariates``.
        others: further arrays of N rows by name; a program takes those that its parameters name.
        note: what was read and what was left out, in words.

    Example:
        >>> import pandas as pd
        >>> from pyrovae.data import read
        >>> table = read(pd.DataFrame({"a": [1.5, None], "b": [2.0, 3.0], "kind": ["x", "y"]}), labels="kind")
        >>> table.columns, table.mask.tolist(), table.labels.tolist()
        (('a', 'b'), [[True, True], [False, True]], [0, 1])
    """

    x: np.ndarray | Rows
    mask: np.ndarray | Rows | None = None
    labels: np.ndarray | None = None
    covariates: np.ndarray | None = None
    size_factors: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    covariate_names: tuple[str, ...] = ()
    others: Mapping[str, np.ndarray] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        """Shapes and names, not numbers."""
        parts = [f"x {tuple(self.x.shape)}"]
        for name in ("mask", "labels", "covariates", "size_factors"):
            parts += [f"{name} {tuple(getattr(self, name).shape)}"] if getattr(self, name) is not None else []
        parts += [f"{len(self.columns)} named columns"] if self.columns else []
        parts += [f"{len(self.classes)} classes"] if self.classes else []
        return f"Table({', '.join([*parts, *self.others])})"

    def arrays(self, parameters: Sequence[str]) -> tuple[list[Any], list[str | None]]:
        """The arrays of the table, and the name of the parameter that each is for, or ``None`` for a place.

        Args:
            parameters: names of the program's parameters; of ``others``, only those that are among them are given.
        """
        items: list[Any] = [self.x]
        names: list[str | None] = [None]
        if self.labels is not None:
            items, names = [*items, self.labels], [*names, None]
        named = {MASK: self.mask, "covariates": self.covariates, "size_factors": self.size_factors}
        given = {name: item for name, item in named.items() if item is not None}
        given |= {name: item for name, item in self.others.items() if name in parameters}
        return [*items, *given.values()], [*names, *given]


def from_arrays(
    arrays: Mapping[str, Any], where: str, *, key: str | None = None, labels: str | None = None, note: str = ""
) -> Table:
    """A table of named arrays, such as a ``.npz`` file has: the data, and beside them perhaps labels and a mask.

    Args:
        arrays: the arrays by name.
        where: the file, for errors.
        key: the name of the data; by default the only array, or the one that is called ``x`` or ``data``.
        labels: the name of the labels; by default whole numbers, one for each datum, that are called ``y`` or ``labels``.
        note: a remark on the file, for the report.

    Raises:
        DataError: there is no such array, or it is unclear which one has the data.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data.table import from_arrays
        >>> from_arrays({"x": np.zeros((4, 3)), "y": np.array([0, 1, 0, 1])}, "two.npz")
        Table(x (4, 3), labels (4,), 2 classes)
    """
    if not arrays:
        raise DataError(f"{where} must hold an array, got none: write one with one datum per row.")
    for name in (key, labels):
        if name is not None and name not in arrays:
            raise DataError(f"{where}: {unknown('array', name, arrays)}")
    found = next((name for name in DATA_NAMES if name in arrays), None)
    key = key or (next(iter(arrays)) if len(arrays) == 1 else found)
    if key is None:
        named = ", ".join(f"{name} {tuple(np.shape(each))}" for name, each in arrays.items())
        raise DataError(f"{where} holds {len(arrays)} arrays ({named}): say which has the data, by key (--data.key).")
    x = arrays[key]
    size = len(x) if len(np.shape(x)) else 0
    rest = {name: each for name, each in arrays.items() if name != key and np.shape(each)[:1] == (size,)}
    if labels is None:
        labels = next((name for name in LABEL_NAMES if name in rest and _is_classes(rest[name])), None)
    elif labels not in rest:
        raise DataError(f"{where}: the labels {labels!r} must have one entry for each of {size} data: choose other labels.")
    mask = rest.pop(MASK, None)
    mask = mask[:].numpy() if isinstance(mask, Rows) else mask
    if mask is not None and (tuple(mask.shape) != tuple(x.shape) or not bool(((mask == 0) | (mask == 1)).all())):
        raise DataError(
            f"{where}: the mask must have the shape of the data, {tuple(x.shape)}, with 1 where a value was observed and 0 "
            f"elsewhere, got {mask.dtype} of shape {tuple(mask.shape)}: rename it, or mend it."
        )
    codes, classes = (None, ()) if labels is None else label_codes(rest.pop(labels), where)
    return Table(
        x,
        None if mask is None else np.asarray(mask).astype(bool),
        codes,
        classes=classes,
        others={name: each for name, each in rest.items() if each.dtype.kind in "biuf"},
        note=note,
    )


def _is_classes(array: Any) -> bool:
    return len(np.shape(array)) == 1 and np.asarray(array).dtype.kind in "biuUSO"


def label_codes(values: Any, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes 0, 1, ... and their names, of labels of any kind; -1 where there is none (an empty cell, or NaN).

    Raises:
        DataError: numbers that are no classes.

    Example:
        >>> from pyrovae.data.table import label_codes
        >>> label_codes(["b", "a", None, "b"], "pets.csv")
        (array([ 1,  0, -1,  1]), ('a', 'b'))
    """
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"{where}: labels must have one entry for each datum, got shape {array.shape}: choose other labels.")
    if array.dtype.kind == "f":
        known = ~np.isnan(array)
        if bool((array[known] != np.floor(array[known])).any()):
            raise DataError(f"{where}: labels must be classes, got numbers such as {array[known][0]:g}: name them a covariate.")
    else:
        known = np.array([each is not None and each == each for each in array.tolist()], bool)
    codes = np.full(len(array), -1)
    kept = array[known]
    if kept.dtype.kind == "f":
        kept = kept.astype(np.int64)
    kept = np.array([str(each) for each in kept.tolist()]) if kept.dtype.kind not in "iub" else kept.astype(np.int64)
    names, codes[known] = np.unique(kept, return_inverse=True)
    # Classes that are numbered keep their numbers, and -1 means that there is none.
    if names.dtype.kind == "i" and len(names) and names[0] in (-1, 0) and names[-1] < max(2 * len(names), 10):
        codes[known] = kept
        return codes, tuple(str(each) for each in range(int(names[-1]) + 1))
    return codes, tuple(str(each) for each in names)


def without_nan(array: np.ndarray | Rows) -> tuple[np.ndarray | Rows, np.ndarray | Rows | None]:
    """The numbers with zeros in place of NaN, and a mask that is false there, or ``None`` if nothing is missing."""
    if np.dtype(array.dtype).kind != "f":
        return array, None
    if isinstance(array, Rows):
        return array.map(lambda rows: np.where(np.isnan(rows), 0, rows)), array.map(lambda rows: ~np.isnan(rows))
    missing = np.isnan(array)
    return (np.where(missing, 0, array), ~missing) if missing.any() else (array, None)


def as_numbers(item: Any) -> Any:
    """A tensor's numbers as an array that shares its memory; an array in a type that torch knows."""
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) and item.dtype != torch.bfloat16 else item
    array = item.float().numpy() if isinstance(array, Tensor) else array
    return number_array(array) if isinstance(array, np.ndarray) else array
