"""Batches of tensors from any data, and data sets by name and from files."""

from .batches import Batch, Batches, arguments, as_arrays
from .datasets import Split, binarize, dequantize, load

__all__ = ["Batch", "Batches", "Split", "arguments", "as_arrays", "binarize", "dequantize", "load"]
