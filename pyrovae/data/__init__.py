"""Batches of tensors from any data, and data sets by name and from files."""

from .batches import Batch, Batches, arguments, as_arrays
from .datasets import Split, binarize, dequantize, load
from .readers import read
from .rows import DataError, Rows
from .table import Table

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Rows",
    "Split",
    "Table",
    "arguments",
    "as_arrays",
    "binarize",
    "dequantize",
    "load",
    "read",
]
