"""Rows that are read when they are needed: from a file, or out of a sparse matrix."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ArrayRows", "DataError", "Rows", "SparseRows", "available_memory", "number_array"]

# Numbers that are read at once where all rows are looked at in turn: 32 MB of float64.
NUMBERS_AT_ONCE = 1 << 22


class DataError(ValueError):
    """A refusal of data, in one sentence that names the file, the row or the column.

    Example:
        >>> import pandas as pd
        >>> from pyrovae.data import DataError, read
        >>> try:
        ...     read(pd.DataFrame({"a": [1.0, float("inf")]}))
        ... except DataError as error:
        ...     print("column 'a'" in str(error))
        True
    """


class Rows(ABC):
    """An array of shape (N, ...) that is not in memory. A batch of its rows is read, as a tensor, when it is indexed.

    Attributes:
        shape: the shape, with the number of rows first.
        dtype: the NumPy type of the numbers.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data.rows import ArrayRows
        >>> rows = ArrayRows(np.arange(12.0).reshape(4, 3))
        >>> rows[[2, 0]]
        tensor([[6., 7., 8.],
                [0., 1., 2.]], dtype=torch.float64)
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows with these numbers, in their order, as a dense array that the caller may write to."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Tensor:
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice | int) else np.asarray(rows)
        if numbers.ndim == 0:
            return torch.as_tensor(self.take(numbers[None])[0])
        return torch.as_tensor(self.take(np.flatnonzero(numbers) if numbers.dtype == bool else numbers))

    def select(self, rows: np.ndarray | Tensor) -> Rows:
        """Some of the rows, still unread."""
        return _Selected(self, np.asarray(rows))

    def map(self, change: Callable[[np.ndarray], np.ndarray]) -> Rows:
        """Rows of the same shape that a function of their numbers gives as they are read."""
        return _Mapped(self, change)

    def chunks(self) -> Iterator[np.ndarray]:
        """All rows in their order, a few at a time."""
        step = max(1, NUMBERS_AT_ONCE // max(1, math.prod(self.shape[1:])))
        for start in range(0, len(self), step):
            yield self.take(np.arange(start, min(start + step, len(self))))


class _Selected(Rows):
    def __init__(self, rows: Rows, numbers: np.ndarray):
        self.rows, self.numbers = rows, numbers
        self.shape, self.dtype = (len(numbers), *rows.shape[1:]), rows.dtype

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.rows.take(self.numbers[rows])


class _Mapped(Rows):
    def __init__(self, rows: Rows, change: Callable[[np.ndarray], np.ndarray]):
        self.rows, self.change = rows, change
        self.shape, self.dtype = rows.shape, change(np.zeros((1, *rows.shape[1:]), rows.dtype)).dtype

    def take(self, rows: np.ndarray) -> np.ndarray:
        return self.change(self.rows.take(rows))


class ArrayRows(Rows):
    """Rows of a memory map, or of an HDF5 data set.

    Args:
        array: indexed by rows; has a ``shape`` and a ``dtype``.
    """

    def __init__(self, array: Any):
        # A plain array over the map is indexed without the map's own bookkeeping.
        self.array, self.shape = np.asarray(array) if isinstance(array, np.ndarray) else array, tuple(array.shape)
        self.dtype = number_array(np.zeros(0, array.dtype)).dtype

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows, read in increasing order from HDF5."""
        if isinstance(self.array, np.ndarray):
            return number_array(self.array[rows])
        # HDF5 reads rows in increasing order, each once.
        distinct, places = np.unique(rows, return_inverse=True)
        return number_array(self.array[distinct][places])


class SparseRows(Rows):
    """Rows of a sparse matrix in compressed form, made dense a batch at a time.

    Args:
        starts: where each row's entries start, and the end of the last, shape (N + 1,).
        columns: the column of each entry.
        values: the value of each entry; entries in one place are added.
        num_columns: D.

    Raises:
        DataError: the three do not describe a matrix.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data.rows import SparseRows
        >>> SparseRows([0, 1, 1, 3], [1, 0, 2], [5.0, 7.0, 9.0], num_columns=3)[:].tolist()
        [[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, 9.0]]
    """

    def __init__(self, starts: Any, columns: Any, values: Any, num_columns: int):
        self.starts, self.columns = (np.asarray(each).astype(np.int64) for each in (starts, columns))
        self.values = number_array(np.asarray(values))
        self.shape, self.dtype = (len(self.starts) - 1, int(num_columns)), self.values.dtype
        ordered = len(self.starts) and self.starts[0] == 0 and bool((np.diff(self.starts) >= 0).all())
        if not ordered or not self.starts[-1] == len(self.columns) == len(self.values):
            raise DataError(
                f"The sparse matrix must have row starts from 0 to its number of entries, got {len(self.starts)} starts for "
                f"{len(self.columns)} columns and {len(self.values)} values: write it anew."
            )
        if len(self.columns) and not 0 <= self.columns.min() <= self.columns.max() < num_columns:
            raise DataError(
                f"The sparse matrix must have columns from 0 to {num_columns - 1}, got {self.columns.min()} to "
                f"{self.columns.max()}: write it anew."
            )

    @classmethod
    def of(cls, matrix: Any) -> SparseRows:
        """The rows of a sparse matrix of SciPy's or torch's.

        Raises:
            DataError: a sparse tensor that has not two dimensions.
        """
        if not isinstance(matrix, Tensor):
            rows = matrix.tocsr()
            return cls(rows.indptr, rows.indices, rows.data, rows.shape[1])
        if matrix.dim() != 2:
            raise DataError(
                f"A sparse tensor must have shape (N, D), got {tuple(matrix.shape)}: make it dense, by its to_dense()."
            )
        values = matrix.detach().cpu()
        if values.layout == torch.sparse_csr:
            starts, places = values.crow_indices().numpy(), values.col_indices().numpy()
            return cls(starts, places, values.values().numpy(), matrix.shape[1])
        entries = (values if values.layout == torch.sparse_coo else values.to_sparse_coo()).coalesce()
        row, column = entries.indices().numpy()
        return cls.from_entries(row, column, entries.values().numpy(), tuple(matrix.shape))

    @classmethod
    def from_entries(cls, rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, ...]) -> SparseRows:
        """The rows of a matrix that is given by the row, the column and the value of each entry."""
        order = np.argsort(rows, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
        return cls(starts, np.asarray(columns)[order], np.asarray(values)[order], shape[1])

    def take(self, rows: np.ndarray) -> np.ndarray:
        """The rows, dense."""
        first, counts = self.starts[rows], self.starts[rows + 1] - self.starts[rows]
        before = np.cumsum(counts) - counts
        places = np.arange(counts.sum()) + np.repeat(first - before, counts)
        dense = np.zeros((len(rows), self.shape[1]), self.dtype)
        np.add.at(dense, (np.repeat(np.arange(len(rows)), counts), self.columns[places]), self.values[places])
        return dense


def number_array(array: np.ndarray) -> np.ndarray:
    """The same numbers in a type that torch computes with: native byte order, and signed integers beyond eight bits."""
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        largest = int(array.max(initial=0))
        return array.astype(np.int64 if largest < 2**63 else np.float64)
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:
        return array.astype(np.float64)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def available_memory() -> int:
    """Half of the memory that is free, in bytes: what a data set may take before it is read from disk in each pass."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (ValueError, OSError, AttributeError):  # not a Unix system
        return 1 << 32
