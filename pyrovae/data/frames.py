"""Data frames of pandas and polars as tables, and the text and Parquet files that hold them."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._validation import unknown
from .rows import DataError
from .table import Table, label_codes

__all__ = ["beside_columns", "from_frame", "is_frame", "read_csv", "read_parquet", "series_classes", "series_values"]

# The longest text of a cell that an error quotes.
QUOTED = 30


def is_frame(item: Any) -> bool:
    """Whether an object is a data frame of pandas or polars."""
    return type(item).__module__.split(".")[0] in ("pandas", "polars") and hasattr(item, "columns")


def from_frame(
    frame: Any,
    where: str = "The data frame",
    *,
    labels: str | None = None,
    covariates: Sequence[str] = (),
    size_factors: str | None = None,
    ignore: Sequence[str] = (),
) -> Table:
    """A table of a data frame. Empty cells and NaN are missing values, which the mask names.

    Args:
        frame: of pandas or polars, with a datum in each row.
        where: the file, for errors.
        labels: the column of classes.
        covariates: columns that belong to the data without being modelled; of text, one indicator for each value.
        size_factors: the column with the scale of each datum.
        ignore: columns that are left out.

    Raises:
        DataError: there is no such column, or a cell is no number.

    Example:
        >>> import pandas as pd
        >>> from pyrovae.data.frames import from_frame
        >>> table = from_frame(pd.DataFrame({"height": [1.7, None], "kind": ["a", "b"]}), labels="kind")
        >>> table.columns, table.classes, table.mask.tolist()
        (('height',), ('a', 'b'), [[True], [False]])
    """
    columns = [str(name) for name in frame.columns]
    for name in (labels, *covariates, size_factors, *ignore):
        if name is not None and name not in columns:
            raise DataError(f"{where}: {unknown('column', name, columns)}")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise DataError(f"{where}: each column must have a name of its own, got {twice!r} twice: rename one.")

    if not len(frame):
        raise DataError(f"{where} must have a row for each datum, got none.")

    def column(name: str) -> Any:
        place = columns.index(name)
        return frame.iloc[:, place] if hasattr(frame, "iloc") else frame.get_columns()[place]

    beside = {labels, *covariates, size_factors, *ignore}
    names = [name for name in columns if name not in beside]
    left_out = [f"left out: {', '.join(ignore)}"] if ignore else []
    # Row names, as barcodes of cells or identifiers of patients, are text with a value of its own in each row.
    if names and len(names) > 1 and _is_text(column(names[0])) and _all_differ(column(names[0])):
        left_out.append(f"the column {names.pop(0)!r} names the rows")
    if not names:
        raise DataError(f"{where} must have a column of data, got {', '.join(columns) or 'none'}: leave fewer out.")
    parts = [_numbers(column(name), name, where) for name in names]
    x, observed = np.column_stack([values for values, _ in parts]), np.column_stack([known for _, known in parts])
    return Table(
        x,
        None if observed.all() else observed,
        columns=tuple(names),
        note="; ".join(left_out),
        **beside_columns({name: column(name) for name in columns if name in beside}, where, labels, covariates, size_factors),
    )


def beside_columns(
    columns: Any, where: str, labels: str | None, covariates: Sequence[str], size_factors: str | None
) -> dict[str, Any]:
    """The fields of a :class:`Table` that columns of a frame give beside the data.

    Args:
        columns: a data frame, or columns by name.
        where: the file, for errors.
        labels: the column of classes.
        covariates: columns of numbers, or of text.
        size_factors: the column with the scale of each datum.

    Raises:
        DataError: there is no such column, or a cell is empty or no number.
    """
    known = [str(name) for name in (columns.columns if hasattr(columns, "columns") else columns)]
    for name in (labels, *covariates, size_factors):
        if name is not None and name not in known:
            raise DataError(f"{where}: {unknown('column', name, known)}")
    fields: dict[str, Any] = {}
    if labels is not None:
        fields["labels"], fields["classes"] = series_classes(columns[labels], f"{where}: column {labels!r}")
    if covariates:
        parts = [part for name in covariates for part in _covariate(columns[name], name, where)]
        fields["covariates"] = np.column_stack([values for _, values in parts])
        fields["covariate_names"] = tuple(name for name, _ in parts)
    if size_factors is not None:
        sizes = _complete(columns[size_factors], size_factors, where).astype(np.float64)
        if (sizes <= 0).any():
            row = int(np.flatnonzero(sizes <= 0)[0])
            raise DataError(
                f"{where}: size factors must be positive, got {sizes[row]:g} in row {row} (counted from 0) of column "
                f"{size_factors!r}: leave such data out."
            )
        fields["size_factors"] = sizes
    return fields


def series_values(series: Any) -> np.ndarray:
    """The cells of a column as objects, with ``None`` where one is empty."""
    if hasattr(series, "isna"):
        return np.array([None if empty else cell for cell, empty in zip(series, series.isna(), strict=True)], object)
    return np.array(series.to_list(), object)


def series_classes(series: Any, where: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes 0, 1, ... of a column's cells, and their names: those of the column's categories if it has some."""
    if hasattr(series, "cat") and hasattr(series.cat, "codes"):
        return series.cat.codes.to_numpy().astype(np.int64), tuple(map(str, series.cat.categories))
    if getattr(series.dtype, "categories", None) is not None:  # an Enum of polars
        return label_codes(series.to_physical().to_list(), where)[0], tuple(series.dtype.categories)
    return label_codes(series_values(series), where)


def _is_text(series: Any) -> bool:
    kind = str(series.dtype).lower()
    first = next((cell for cell in series_values(series[:100]) if cell is not None), None)
    return kind.startswith(("str", "string", "object", "category", "categorical", "enum")) and isinstance(first, str)


def _all_differ(series: Any) -> bool:
    cells = series_values(series)
    return len({str(cell) for cell in cells}) == len(cells)


def _numbers(series: Any, name: str, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A column's numbers, with zeros in place of what is missing, and where they are observed.

    Raises:
        DataError: a cell is no number.
    """
    dtype = getattr(series, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "biuf":
        values = series.to_numpy()
        known = ~np.isnan(values) if dtype.kind == "f" else np.ones(len(values), bool)
    else:
        cells = series_values(series)
        known = np.array([_is_known(cell) for cell in cells], bool)
        wrong = [row for row in np.flatnonzero(known) if not _is_number(cells[row])]
        if wrong:
            # A single cell of text makes a whole column of a text file text: name that cell.
            row = next((row for row in wrong if not _reads_as_number(cells[row])), wrong[0])
            shown = repr(cells[row])
            raise DataError(
                f"{where}: column {name!r} must hold numbers, got {shown if len(shown) <= QUOTED else shown[:QUOTED] + '...'} "
                f"in row {row} (counted from 0): correct it, leave the column out (ignore, --data.ignore), or read it as "
                f"labels (labels, --data.labels)."
            )
        whole = all(isinstance(cell, int | np.integer | np.bool_) for cell in cells[known])
        values = np.zeros(len(cells), np.int64 if whole else np.float64)
        try:
            values[known] = cells[known].astype(values.dtype)
        except OverflowError:
            values = np.where(known, cells, 0).astype(np.float64)
    infinite = np.flatnonzero(np.isinf(values)) if values.dtype.kind == "f" else np.zeros(0, np.int64)
    if len(infinite):
        raise DataError(
            f"{where}: column {name!r} must hold finite numbers, got {values[infinite[0]]:g} in row {infinite[0]} (counted "
            f"from 0): correct it, or empty the cell if the value is missing."
        )
    return np.where(known, values, values.dtype.type(0)), known


def _is_known(cell: Any) -> bool:
    return cell is not None and not (isinstance(cell, float | np.floating) and np.isnan(cell))


def _is_number(cell: Any) -> bool:
    return isinstance(cell, int | float | np.number | np.bool_) and not isinstance(cell, complex | np.complexfloating)


def _reads_as_number(cell: Any) -> bool:
    try:
        float(str(cell))
    except ValueError:
        return False
    return True


def _complete(series: Any, name: str, where: str) -> np.ndarray:
    values, known = _numbers(series, name, where)
    if not known.all():
        raise DataError(
            f"{where}: column {name!r} must have no empty cell, got one in row {int(np.flatnonzero(~known)[0])} (counted from "
            f"0): fill it in, since what the data are given beside them cannot be missing."
        )
    return values


def _covariate(series: Any, name: str, where: str) -> list[tuple[str, np.ndarray]]:
    """Named columns of numbers: the column itself, or of text an indicator for each value."""
    if not _is_text(series):
        return [(name, _complete(series, name, where).astype(np.float64))]
    codes, classes = series_classes(series, where)
    if (codes < 0).any():
        raise DataError(f"{where}: column {name!r} must have no empty cell, got one in row {int(codes.argmin())}: fill it in.")
    return [(f"{name}={each}", (codes == code).astype(np.float64)) for code, each in enumerate(classes)]


def read_csv(path: Path, separator: str | None, reading: Callable[..., Any]) -> Any:
    """The data frame in a text file, whose first row may have the names of the columns.

    Args:
        path: the file, which may be compressed by gzip.
        separator: what stands between cells; by default a comma, a semicolon or a tab, whichever the first line has.
        reading: makes a sentence of a reader's own errors.
    """
    with reading(path, "a text file", "write it with DataFrame.to_csv"):
        opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            start = list(itertools.islice(file, 2))
        first = start[0] if start else ""
        # A line without separators is a single column.
        separator = separator or max(",;\t", key=first.count)
        decimal = "," if separator == ";" and "," in "".join(start[1:]) else "."
        cells = next(csv.reader([first], delimiter=separator), [])
    if not cells:
        raise DataError(f"{path} must be a text file with a datum in each line, got an empty one: write it with to_csv.")
    with reading(path, "a text file", "give every line as many cells as the first"):
        import pandas as pd

        frame = pd.read_csv(
            path,
            sep=separator,
            decimal=decimal,
            header=0 if _are_names(cells) else None,
            encoding="utf-8-sig",
            low_memory=False,
            index_col=False,
        )
    if not _are_names(cells):
        frame.columns = [f"column {number}" for number in range(frame.shape[1])]
    elif not cells[0]:  # DataFrame.to_csv writes the index so
        frame = frame.iloc[:, 1:]
    return frame


def _are_names(cells: Sequence[str]) -> bool:
    """Whether the first row has names: text, or 0, 1, 2, ..., which pandas writes for columns without names."""
    try:
        numbers = [float(cell.replace(",", ".")) for cell in cells if cell]
    except ValueError:
        return True
    return not cells[0] or (len(cells) > 1 and numbers == list(range(len(cells))))


def read_parquet(path: Path, reading: Callable[..., Any]) -> Any:
    """The data frame in a Parquet file, read by pyarrow or by polars."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        try:
            import polars
        except ImportError as error:
            raise DataError(
                f'{path} is read by pyarrow or polars, of which neither is installed: pip install "pyrovae[data]".'
            ) from error
        with reading(path, "Parquet", "write it with DataFrame.to_parquet"):
            return polars.read_parquet(path)
    with reading(path, "Parquet", "write it with DataFrame.to_parquet"):
        return parquet.read_table(path).to_pandas()
