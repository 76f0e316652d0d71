"""Files of data: arrays, tables, tensors, HDF5 and folders of images, chosen by the end of the file's name."""

from __future__ import annotations

import math
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from .frames import from_frame, is_frame, read_csv, read_parquet
from .hdf5 import LARGEST_RATIO, from_anndata, read_h5, read_h5ad
from .images import is_image, read_images
from .rows import ArrayRows, DataError, Rows, SparseRows, available_memory, number_array
from .table import Table, as_numbers, from_arrays, without_nan

__all__ = ["FORMATS", "ReadKeywords", "read"]

_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
FORMATS = (".npy", ".npz", *_TABLES, ".h5", ".hdf5", ".h5ad", ".pt", ".pth", ".safetensors")


class ReadKeywords(TypedDict, total=False):
    """The keyword arguments of :func:`read`."""

    key: str | None
    labels: str | None
    covariates: Sequence[str]
    size_factors: str | None
    ignore: Sequence[str]
    missing: bool
    size: int | Sequence[int] | None
    colour: str | None
    memory: float | None


def read(
    source: Any,
    *,
    key: str | None = None,
    labels: str | None = None,
    covariates: Sequence[str] = (),
    size_factors: str | None = None,
    ignore: Sequence[str] = (),
    missing: bool = False,
    size: int | Sequence[int] | None = None,
    colour: str | None = None,
    memory: float | None = None,
) -> Table:
    """Read a file, a folder of images, a data frame or an ``AnnData``, with names, labels and what is missing.

    The formats are ``.npy``, ``.npz``, ``.csv`` and ``.tsv`` (also compressed, ``.csv.gz``), ``.parquet``, ``.h5``, ``.h5ad``,
    ``.pt``, ``.safetensors``, and folders of images. Nothing is unpickled, so that no file runs code. Arrays that are larger
    than ``memory`` are read from disk in batches.

    Args:
        source: a path, a data frame of pandas or polars, or an ``AnnData``.
        key: the array of a file that holds several, or the layer of a ``.h5ad`` file.
        labels: the column or array of classes; for ``.h5ad`` a column of ``obs``.
        covariates: columns that belong to the data without being modelled, of tables and of ``obs``; text gives indicators.
        size_factors: the column with the scale of each datum, of tables and of ``obs``.
        ignore: columns of a table that are left out.
        missing: take NaN in arrays as missing values; in tables they and empty cells always are.
        size: the height and width of images, or one number for both; by default their median, at most 64.
        colour: ``"rgb"`` or ``"grey"``; by default that of the images.
        memory: in bytes; by default half of what is free.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, or an option is not for its format; names the file, the row and the column.

    Example:
        >>> import pandas as pd, pyrovae as pv
        >>> frame = pd.DataFrame({"a": [1, 5, 2], "b": [0, None, 4], "kind": ["x", "y", "x"]})
        >>> pv.data.read(frame, labels="kind")
        Table(x (3, 2), mask (3, 2), labels (3,), 2 named columns, 2 classes)
    """
    memory = available_memory() if memory is None else memory
    beside: dict[str, Any] = {"labels": labels, "covariates": tuple(covariates), "size_factors": size_factors}
    if is_frame(source):
        _refuse("A data frame", key=key, size=size, colour=colour)
        return from_frame(source, ignore=ignore, **beside)
    if type(source).__module__.split(".")[0] == "anndata":
        _refuse("An AnnData", ignore=ignore, size=size, colour=colour)
        return from_anndata(source, key=key, **beside)
    if not isinstance(source, str | os.PathLike):
        raise DataError(f"The data must be a path, a data frame or an AnnData, got {type(source).__name__}.")
    path = Path(source)
    if path.is_dir():
        _refuse(f"{path}, a folder of images,", key=key, ignore=ignore, **beside)
        return read_images(path, _reading, size=size, colour=colour, memory=memory)
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}: give the path of an array, a table or a folder of images.")
    form = _format(path)
    _refuse(str(path), size=size, colour=colour)
    if form in _TABLES:
        _refuse(str(path), key=key)
        frame = (
            read_parquet(path, _reading) if form == ".parquet" else read_csv(path, "\t" if ".tsv" in form else None, _reading)
        )
        return from_frame(frame, str(path), ignore=ignore, **beside)
    _refuse(str(path), ignore=ignore)
    if form == ".h5ad":
        table = read_h5ad(path, _reading, key=key, memory=memory, **beside)
    else:
        _refuse(str(path), covariates=beside["covariates"], size_factors=size_factors)
        table = _arrays_of(path, form, key, labels, memory)
    return _checked(table, path, missing, memory)


def _arrays_of(path: Path, form: str, key: str | None, labels: str | None, memory: float) -> Table:
    """The table in a file of arrays."""
    if form == ".npy":
        _refuse(str(path), key=key, labels=labels)
        return Table(_npy(path, memory))
    if form in (".h5", ".hdf5"):
        return read_h5(path, _reading, key=key, labels=labels, memory=memory)
    if form == ".npz":
        return _npz(path, key, labels)
    tensors = _safetensors(path) if form == ".safetensors" else _pt(path)
    return from_arrays(tensors, str(path), key=key, labels=labels)


def _checked(table: Table, path: Path, missing: bool, memory: float) -> Table:
    """The table with a mask for NaN, if they are missing values; or a refusal of what is no array of numbers."""
    x = table.x
    if isinstance(x, SparseRows) and 4 * math.prod(x.shape) <= memory:
        x = x.take(np.arange(len(x)))
        table = replace(table, x=x)
    if isinstance(x, np.ndarray) and x.dtype.kind not in "biuf":
        raise DataError(f"{path} must hold real numbers, got {x.dtype}: write it as an array of numbers.")
    if len(x.shape) < 2 or 0 in x.shape:
        what = "an empty array" if 0 in x.shape else "an array"
        raise DataError(f"{path} must hold one datum per row, shape (N, ...), got {what} of shape {tuple(x.shape)}.")
    if missing and table.mask is None:
        x, mask = without_nan(x)
        return replace(table, x=x, mask=mask)
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        seen = np.isfinite(x) if table.mask is None else np.isfinite(x) | ~np.asarray(table.mask)
        if not seen.all():
            place = tuple(int(each) for each in np.argwhere(~seen)[0])
            column = ", ".join(map(str, place[1:]))
            column = repr(table.columns[place[1]]) if table.columns and len(place) == 2 else column
            rows = int((~seen).reshape(len(x), -1).any(1).sum())
            cure = (
                "read it with missing=True (--data.missing) if such values are missing" if np.isnan(x[place]) else "repair it"
            )
            raise DataError(
                f"{path} must hold finite numbers, got NaN or infinite values in {rows} of {len(x)} rows, the first "
                f"{x[place]:g} in row {place[0]}, column {column} (counted from 0): {cure}."
            )
        if table.mask is not None:
            return replace(table, x=np.where(np.asarray(table.mask), x, x.dtype.type(0)))
    return table


def _format(path: Path) -> str:
    name = path.name.lower()
    form = next((form for form in sorted(FORMATS, key=len, reverse=True) if name.endswith(form)), None)
    if form is not None:
        return form
    if is_image(path):
        raise DataError(f"{path} is one image, and data are many: give the folder that holds them.")
    raise DataError(f"{path} must end in {', '.join(FORMATS)}, got {path.suffix or 'no ending'}: convert it, or rename it.")


def _refuse(where: str, **options: Any) -> None:
    """Refuse options that mean nothing for a format."""
    for name, value in options.items():
        if value not in (None, ()):
            raise DataError(f"{where} takes no option {name!r}, got {value!r}: leave it out.")


@contextmanager
def _reading(path: Path, kind: str, cure: str) -> Iterator[None]:
    """Turn whatever another library's reader raises, or warns of, into one sentence."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except (DataError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # readers of damaged files raise errors of any kind
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = (lines[0] if lines else type(error).__name__).rstrip(".:")
        raise DataError(f"{path} cannot be read as {kind} ({why[:200]}): {cure}.") from error


def _header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of an array in NumPy's format; an array of Python objects is pickled, and refused."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise DataError(f"{where} must be an array of numbers, got a table of records: write its columns as one array.")
    parse = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = parse(file)
    if dtype.hasobject:
        raise DataError(
            f"{where} must be an array of numbers, got pickled Python objects, which are not read, since they can run code: "
            f"write it as numbers."
        )
    if any(each < 0 for each in shape):
        raise DataError(f"{where} must have a shape, got {shape}: it is damaged, write it anew.")
    return shape, fortran, dtype


def _npy(path: Path, memory: float) -> np.ndarray | Rows:
    with _reading(path, ".npy", "write it with numpy.save"), path.open("rb") as file:
        shape, fortran, dtype = _header(file, str(path))
        start, end = file.tell(), path.stat().st_size
        expected = math.prod(shape) * dtype.itemsize
        if end - start != expected:
            raise DataError(f"{path} must have {expected:,} bytes of numbers, got {end - start:,}: it is damaged.")
        if dtype.kind not in "biuf":
            raise DataError(f"{path} must be an array of numbers, got dtype {dtype}: write it as real numbers.")
        if not expected:
            return np.zeros(shape, dtype)
        array = np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
        return ArrayRows(array) if 4 * array.size > memory and array.ndim > 1 else number_array(np.array(array))


def _npz(path: Path, key: str | None, labels: str | None) -> Table:
    arrays: dict[str, Any] = {}
    with _reading(path, ".npz", "write it with numpy.savez"), zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name, where = member.filename.removesuffix(".npy"), f"{path}: the array {member.filename.removesuffix('.npy')!r}"
            if member.file_size > LARGEST_RATIO * path.stat().st_size:
                raise DataError(f"{where} claims {member.file_size:,} bytes: the file is damaged, write it anew.")
            with archive.open(member) as file:
                shape, fortran, dtype = _header(file, where)
                size = math.prod(shape) * dtype.itemsize
                content = file.read(min(size, member.file_size) + 1)
            if len(content) != size:
                raise DataError(f"{where} must have {size:,} bytes, got {len(content):,}: it is damaged, write it anew.")
            array = np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
            arrays[name] = number_array(array) if dtype.kind in "biuf" else array
    if {"format", "indptr", "indices", "data", "shape"} <= set(arrays):  # scipy.sparse.save_npz
        return Table(_scipy_rows(path, arrays))
    return from_arrays(arrays, str(path), key=key, labels=labels)


def _scipy_rows(path: Path, arrays: dict[str, np.ndarray]) -> SparseRows:
    form = bytes(arrays["format"].item()).decode("ascii", "replace") if arrays["format"].dtype.kind == "S" else None
    shape = tuple(int(each) for each in np.ravel(arrays["shape"]))
    if form != "csr" or len(shape) != 2:
        raise DataError(f"{path} must hold a matrix in CSR form, got {form}: write its tocsr() with scipy.sparse.save_npz.")
    rows = SparseRows(arrays["indptr"], arrays["indices"], arrays["data"], shape[1])
    if len(rows) != shape[0]:
        raise DataError(f"{path} must have {shape[0] + 1} row starts, got {len(rows) + 1}: it is damaged, write it anew.")
    return rows


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    with _reading(path, ".safetensors", "write it with safetensors.torch.save_file"):
        return {name: as_numbers(tensor) for name, tensor in load_file(path).items()}


def _pt(path: Path) -> dict[str, Any]:
    """The tensors of a file of ``torch.save``, read without unpickling anything else."""
    with _reading(path, ".pt", "save tensors, or a dictionary of them, with torch.save; other objects can run code"):
        held = torch.load(path, map_location="cpu", weights_only=True)
    # A tuple is data, then labels.
    items = held if isinstance(held, dict) else {"x": held}
    if isinstance(held, list | tuple):
        items = dict(zip(("x", "y", *map(str, range(2, len(held)))), held, strict=False))
    tensors = {str(name): item for name, item in items.items() if isinstance(item, Tensor)}
    if not tensors:
        raise DataError(f"{path} must hold tensors, got {type(held).__name__}: save a tensor, or a dictionary of them.")
    with _reading(path, ".pt", "save dense tensors with torch.save"):
        return {name: _dense(item, path) for name, item in tensors.items()}


def _dense(item: Tensor, path: Path) -> Any:
    if item.layout != torch.strided:
        return SparseRows.of(item)
    stored = item.untyped_storage().nbytes()
    if item.numel() * item.element_size() > stored or stored > LARGEST_RATIO * path.stat().st_size:
        raise DataError(
            f"{path} must hold whole tensors, got one of shape {tuple(item.shape)} in fewer bytes: save its clone()."
        )
    return as_numbers(item)
