"""HDF5 files as tables, among them the AnnData files (``.h5ad``) of single-cell biology."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._validation import unknown
from .frames import beside_columns
from .rows import ArrayRows, DataError, Rows, SparseRows, number_array
from .table import Table, from_arrays

__all__ = ["from_anndata", "read_h5", "read_h5ad"]

# Attributes and all small arrays; what Python refuses here, it refuses again in the first process, in words.
_PROBE = """
import sys, h5py

def look(name, item):
    try:
        dict(item.attrs)
        if hasattr(item, "dtype"):
            item[...] if item.size * item.dtype.itemsize < 1 << 26 else (item[:1], item[-1:])
    except Exception:
        pass

with h5py.File(sys.argv[1], "r") as file:
    dict(file.attrs)
    file.visititems(look)
"""
# How many times smaller than its numbers a file can be: what gzip makes of zeros.
LARGEST_RATIO = 1100


def read_h5(path: Path, reading: Callable[..., Any], *, key: str | None, labels: str | None, memory: float) -> Table:
    """The arrays of an HDF5 file, which has one of data and perhaps others beside it.

    Args:
        path: the file.
        reading: makes a sentence of a reader's own errors.
        key: the data set of the data, as ``"group/name"``.
        labels: the data set of the labels.
        memory: larger data, in bytes, are read in batches.
    """
    file = _opened(path, reading)
    with reading(path, "HDF5", "write it anew with h5py"):
        arrays: dict[str, Any] = {}

        def keep(name: str, item: Any) -> None:
            # Names start where the data's array does, and only arrays of numbers or of text are data.
            if hasattr(item, "dtype") and item.dtype.kind in "biufSO" and len(item.shape) > 0:
                arrays[name] = item

        file.visititems(keep)
        key = key.strip("/") if key is not None else None
        read: dict[str, Any] = {}
        for name, item in arrays.items():
            _check_size(item, f"{path}: the data set {name!r}", path)
            large = _float_bytes(item) > memory and item.dtype.kind in "biuf" and len(item.shape) > 1
            read[name] = ArrayRows(item) if large else _values(item)
    if not any(isinstance(each, Rows) for each in read.values()):
        file.close()
    return from_arrays(read, str(path), key=key, labels=labels)


def read_h5ad(
    path: Path,
    reading: Callable[..., Any],
    *,
    key: str | None,
    labels: str | None,
    covariates: Sequence[str],
    size_factors: str | None,
    memory: float,
) -> Table:
    """The counts of an AnnData file with columns of its ``obs``; anndata need not be installed.

    Args:
        path: the file.
        reading: makes a sentence of a reader's own errors.
        key: a layer, or ``"raw/X"``; by default ``X``.
        labels: the column of ``obs`` with classes.
        covariates: columns of ``obs`` that belong to the data without being modelled.
        size_factors: the column of ``obs`` with the scale of each datum.
        memory: larger data, in bytes, are read in batches.
    """
    import pandas as pd

    file = _opened(path, reading)
    with reading(path, "AnnData", "write it anew with AnnData.write_h5ad"):
        layers = list(file.get("layers", {}))
        known = ["X", *layers, *(["raw/X"] if "raw" in file and "X" in file["raw"] else [])]
        if key is not None and key not in known:
            raise DataError(f"{path}: {unknown('layer', key, known)}")
        place = f"layers/{key}" if key in layers else key or "X"
        if place not in file:
            raise DataError(f"{path} must hold the matrix {place}, got {', '.join(file) or 'nothing'}: name a layer by key.")
        x = _matrix(file[place], f"{path}: {place}", path, memory)
        var = file.get("raw/var" if place == "raw/X" else "var")
        columns = () if var is None else tuple(_strings(_index_of(var)))
        obs = file.get("obs")
        wanted = [name for name in (labels, *covariates, size_factors) if name is not None]
        there = [] if obs is None else _columns_of(obs)
        for name in wanted:
            if name not in there:
                raise DataError(f"{path}: {unknown('column of obs', name, there)}")
        frame = pd.DataFrame({name: _cells(obs, name) for name in wanted})
        if wanted and len(frame) != len(x):
            raise DataError(f"{path}: obs must have one row for each of {len(x)} data, got {len(frame)}: write the file anew.")
    if not isinstance(x, ArrayRows):
        file.close()
    if columns and len(columns) != x.shape[1]:
        raise DataError(f"{path}: var must name {x.shape[1]} columns, got {len(columns)} names: write the file anew.")
    beside = beside_columns(frame, f"{path}: obs", labels, covariates, size_factors)
    return Table(x, columns=columns, note="" if place == "X" else f"the layer {key}", **beside)


def from_anndata(
    data: Any,
    *,
    key: str | None = None,
    labels: str | None = None,
    covariates: Sequence[str] = (),
    size_factors: str | None = None,
) -> Table:
    """A table of an ``AnnData`` object; the arguments are those of :func:`read_h5ad`.

    Raises:
        DataError: there is no such layer or column.
    """
    where = "The AnnData"
    if key is not None and key not in data.layers:
        raise DataError(f"{where}: {unknown('layer', key, list(data.layers))}")
    matrix = data.X if key is None else data.layers[key]
    if hasattr(matrix, "tocsr"):
        x: Any = SparseRows.of(matrix)
    elif isinstance(matrix, np.ndarray):
        x = number_array(np.asarray(matrix))
    else:
        raise DataError(f"{where} must hold its matrix in memory, got a {type(matrix).__name__}: call its to_memory().")
    beside = beside_columns(data.obs, f"{where}'s obs", labels, covariates, size_factors)
    return Table(x, columns=tuple(map(str, data.var_names)), **beside)


def _opened(path: Path, reading: Callable[..., Any]) -> Any:
    try:
        import h5py
    except ImportError as error:
        raise DataError(f'{path} is read by h5py, which is not installed: pip install "pyrovae[data]".') from error
    _probe(path)
    with reading(path, "HDF5", "write it anew"):
        return h5py.File(path, "r")


def _probe(path: Path) -> None:
    """Read the file in another process first, since the HDF5 library can loop for ever, or end the process, on a damaged one.

    Raises:
        DataError: it did.
    """
    seconds = 10 + path.stat().st_size / 20e6
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE, str(path)], timeout=seconds, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{path} cannot be read as HDF5 in {seconds:.0f} s: it is damaged, write it anew.") from error
    if done.returncode < 0:
        raise DataError(f"{path} cannot be read as HDF5 (the library crashed): it is damaged, write it anew.")


def _matrix(item: Any, where: str, path: Path, memory: float) -> np.ndarray | Rows:
    """A dense or sparse matrix, dense ones unread if they are large."""
    if hasattr(item, "dtype"):
        _check_size(item, where, path)
        if item.dtype.kind not in "biuf" or len(item.shape) != 2:
            raise DataError(f"{where} must be a matrix of numbers, got {item.dtype} of shape {item.shape}: choose a layer.")
        return ArrayRows(item) if _float_bytes(item) > memory else _values(item)
    attributes = dict(item.attrs)
    form = str(attributes.get("encoding-type", attributes.get("h5sparse_format", ""))).removesuffix("_matrix")
    sizes: Any = attributes.get("shape", attributes.get("h5sparse_shape", ()))
    shape = tuple(int(each) for each in np.ravel(sizes))
    if form not in ("csr", "csc") or len(shape) != 2 or not {"data", "indices", "indptr"} <= set(item):
        raise DataError(f"{where} must be a dense or sparse matrix, got {form or 'an unknown group'}: choose a layer.")
    for name in ("data", "indices", "indptr"):
        _check_size(item[name], f"{where}/{name}", path)
    starts, places, values = (item[name][...] for name in ("indptr", "indices", "data"))
    if form == "csr":
        if len(starts) != shape[0] + 1:
            raise DataError(f"{where} must have {shape[0] + 1} row starts, got {len(starts)}: write the file anew.")
        return SparseRows(starts, places, values, shape[1])
    # Columns in compressed form are the rows of the transpose, and are checked so.
    turned = SparseRows(starts, places, values, shape[0])
    if len(turned) != shape[1]:
        raise DataError(f"{where} must have {shape[1] + 1} column starts, got {len(starts)}: write the file anew.")
    return SparseRows.from_entries(turned.columns, np.repeat(np.arange(shape[1]), np.diff(turned.starts)), values, shape)


def _check_size(item: Any, where: str, path: Path) -> None:
    """Refuse a data set whose shape is out of all proportion to its file: a damaged one would fill the memory with zeros."""
    size, stored = item.size * item.dtype.itemsize, path.stat().st_size
    if size > LARGEST_RATIO * stored:
        raise DataError(f"{where} must hold no more than the file, got shape {item.shape} in {stored:,} bytes: it is damaged.")


def _float_bytes(item: Any) -> int:
    return 4 * math.prod(item.shape)


def _values(item: Any) -> np.ndarray:
    return np.array(_strings(item), object) if item.dtype.kind in "SO" else number_array(item[...])


def _strings(item: Any) -> list[str]:
    """The text of a data set; numbers are written out."""
    values = item[...] if hasattr(item, "dtype") else item["values"][...]
    return [each.decode("utf-8", "replace") if isinstance(each, bytes) else str(each) for each in np.ravel(values).tolist()]


def _index_of(group: Any) -> Any:
    """The names of rows or columns: the data set that the group's attribute names."""
    if hasattr(group, "dtype"):  # AnnData before 0.7 wrote a table of records
        names = group.dtype.names or ()
        return group[...][next(iter(names))] if names else np.zeros(0, "S1")
    return group[str(group.attrs.get("_index", "_index"))]


def _columns_of(group: Any) -> list[str]:
    if hasattr(group, "dtype"):
        return list(group.dtype.names or ())
    return [name for name in group if not name.startswith("__")]


def _cells(obs: Any, name: str) -> Any:
    """One column of ``obs``: numbers, text, categories, or numbers of which some are missing."""
    if hasattr(obs, "dtype"):
        values = obs[name]
        return _strings(values) if values.dtype.kind in "SO" else values
    item = obs[name]
    if hasattr(item, "dtype"):
        categories = obs.get(f"__categories/{name}")
        if categories is not None:
            return _of_categories(item[...], _strings(categories))
        return _strings(item) if item.dtype.kind in "SO" else item[...]
    if "categories" in item and "codes" in item:
        return _of_categories(item["codes"][...], _strings(item["categories"]))
    if "values" in item and "mask" in item:
        values, missing = item["values"], item["mask"][...]
        cells = _strings(values) if values.dtype.kind in "SO" else values[...].tolist()
        return [None if empty else cell for cell, empty in zip(cells, missing, strict=True)]
    raise DataError(f"The column {name!r} of obs must hold numbers, text or categories, got {', '.join(item)}: leave it out.")


def _of_categories(codes: np.ndarray, names: list[str]) -> Any:
    import pandas as pd

    if len(codes) and not -1 <= codes.min() <= codes.max() < len(names):
        raise DataError(f"A column of obs must have categories 0 to {len(names) - 1}, got {codes.max()}: write the file anew.")
    if len(set(names)) < len(names):
        raise DataError("A column of obs must have categories of different names: write the file anew.")
    return pd.Categorical.from_codes(codes, names)
