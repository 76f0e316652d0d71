"""Batches of tensors from arrays, tables, files, data sets and data loaders."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from .._validation import positive_integer
from .containers import Lazy, opened
from .matching import Batch, match
from .rows import Rows, number_array
from .streams import Stream, in_order, is_one_pass, of_one_shape

__all__ = ["Batch", "Batches", "arguments", "as_arrays", "content_hash", "fingerprints"]

# The likelihoods of files whose matrices are images.
_OF_IMAGES = ("discretized_logistic", "continuous_bernoulli", "dequantized")


class Batches:
    """Minibatches of any data, each a tuple of tensors for the arguments of model and guide.

    Arrays are whole tensors on the device, so a batch is one gather. Memory maps, sparse matrices and large files are read, and
    made dense, a batch at a time. A ``Dataset`` is read by a ``DataLoader``; a ``DataLoader`` keeps its own batch size and
    order. A masked array becomes two arrays: its values, with zeros for the masked ones, and a mask that is true for the
    others; so does a data frame with empty cells.

    Args:
        data: an array, a tensor, a masked array, a data frame, a sparse matrix, a :class:`pyrovae.data.Table`, a path that
            :func:`pyrovae.data.read` reads, or a tuple of them, one for each argument; a dictionary of them by the names of the
            arguments; a ``Dataset`` or a ``DataLoader``.
        batch_size: data per batch; the last one may be smaller.
        shuffle: use a new random order on each pass, from torch's random stream.
        dtype: the type of floating-point arrays; integers stay, since they may be labels or indices.
        device: the device of the batches.
        transform: a function of the first tensor of every batch, such as :func:`binarize`.
        program: keep only the arrays that this program takes, as :func:`arguments` does; by default all.
        ordered: give all data in the order of the data set, even if a ``DataLoader`` shuffles or drops its last batch.

    Raises:
        ValueError: the data are empty, ragged, of different lengths, not finite, or not numbers; the program does not take
            them; or they must be in order and a sampler draws them at random.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data import Batches
        >>> [x.shape[0] for (x,) in Batches(np.zeros((10, 3)), batch_size=4)]
        [4, 4, 2]
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        *,
        shuffle: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        program: Callable[..., Any] | None = None,
        ordered: bool = False,
    ):
        self.batch_size, self.shuffle, self.transform = positive_integer(batch_size, "batch_size"), shuffle, transform
        self.dtype, self.device, self.program = dtype, device, program
        self.floating: tuple[int, ...] = ()
        self.source: Dataset[Any] | DataLoader[Any] | None = None
        self.arrays: Batch = ()
        self._found_any = False
        self._stream: Stream | None = None
        self.rows: Lazy | None = None
        if isinstance(data, DataLoader):
            self.source = in_order(data) if ordered else data
            # Worker processes have their own copy of a data set in each pass.
            if isinstance(data.dataset, IterableDataset) and not data.num_workers:
                self._stream = Stream(self.source)
        elif isinstance(data, IterableDataset):
            self.source = self._stream = Stream(data)
        elif isinstance(data, Lazy):
            self.source = self.rows = data
        elif isinstance(data, Dataset) and not isinstance(data, TensorDataset):
            self.source = data
        else:
            labelled = isinstance(data, TensorDataset)
            items, names = opened(data.tensors if labelled else data, program)
            if any(isinstance(item, Rows) for item in items):
                self.source = self.rows = Lazy(items, names)
            else:
                arrays = self._moved(_checked(items, names, dtype, device, program=program, strict=not labelled))
                self.arrays = tuple(array.contiguous() for array in arrays)

    @property
    def loader(self) -> DataLoader[Any] | None:
        """The loader that reads the data, or ``None`` if they are in memory."""
        if self.source is None or isinstance(self.source, DataLoader):
            return self.source
        iterable = isinstance(self.source, IterableDataset)
        return DataLoader(self.source, batch_size=self.batch_size, shuffle=self.shuffle and not iterable)

    def to(self, dtype: torch.dtype, device: torch.device, floating: tuple[int, ...] = ()) -> None:
        """Convert floating-point arrays, and those at the places ``floating``, to a type, and move all to a device."""
        self.dtype, self.device, self.floating = dtype, device, floating
        if self.arrays:
            self.arrays = self._moved(self.arrays)

    @property
    def changes(self) -> bool:
        """Whether each pass may give different data, since a loader can draw or augment them."""
        return self.source is not None and self.rows is None

    @property
    def num_data(self) -> int | None:
        """The number of data, or ``None`` if a loader does not know it."""
        if self.loader is None:
            return len(self.arrays[0])
        try:
            return len(self.loader.dataset)  # type: ignore[arg-type]
        except TypeError:  # an iterable dataset without a length
            return None

    @property
    def num_batches(self) -> int | None:
        """The number of batches in one pass, or ``None`` if a loader does not know it."""
        if self.loader is None:
            return math.ceil(len(self.arrays[0]) / self.batch_size)
        try:
            return len(self.loader)
        except TypeError:  # an iterable dataset without a length
            return None

    def check_passes(self, passes: int) -> None:
        """Refuse several passes over a stream that can be read only once.

        Raises:
            ValueError: the data are such a stream.
        """
        if passes > 1 and self._stream is not None and is_one_pass(self.source.dataset):  # type: ignore[union-attr]
            raise ValueError(
                f"The data are a stream that can be read only once, so epochs must be 1, got {passes}: pass epochs=1, or a "
                f"dataset whose __iter__ starts anew."
            )

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the data."""
        return (self.load(*inputs) for inputs in self.inputs())

    def peek(self) -> Batch:
        """The first batch; the next pass over a stream gives it again."""
        if self._stream is None:
            return next(iter(self))
        by_rows = self._stream is self.source
        with of_one_shape():
            found = self._stream.take(self.batch_size if by_rows else 1)
            if not found:
                self._refuse_empty()
            first = default_collate(found) if by_rows else found[0]
        return self.load(*self._taken(first))

    def forget_peeked(self) -> None:
        """Let the next pass over a stream begin anew."""
        if self._stream is not None:
            self._stream.forget()

    def inputs(self) -> Iterator[Batch]:
        """One pass, as the inputs of :meth:`load`: row indices and the whole arrays, or the arrays of a batch."""
        if self.rows is not None:
            # The same order as for arrays, so that data give the same batches from disk as from memory.
            numbers = torch.randperm(len(self.rows), device="cpu") if self.shuffle else torch.arange(len(self.rows))
            for start in range(0, len(numbers), self.batch_size):
                yield self._read(numbers[start : start + self.batch_size])
            return
        loader = self.loader
        if loader is not None:
            empty = True
            with of_one_shape():
                for item in loader if self._stream in (None, self.source) else self._stream:
                    empty, self._found_any = False, True
                    yield self._taken(item)
            if empty:
                self._refuse_empty()
            return
        size, step = len(self.arrays[0]), self.batch_size
        if self.shuffle:
            order = torch.randperm(size, device="cpu").to(self.arrays[0].device)
            for start in range(0, size, step):
                yield (order[start : start + step], *self.arrays)
        else:
            for start in range(0, size, step):
                yield tuple(array[start : start + step] for array in self.arrays)

    def in_order(self, size: int) -> Iterator[Batch]:
        """All data that are in memory or can be read by rows, ``size`` at a time, in their order and without the transform."""
        for start in range(0, self.num_data or 0, size):
            if self.rows is not None:
                yield self._read(torch.arange(start, min(start + size, len(self.rows))))
            else:
                yield tuple(array[start : start + size] for array in self.arrays)

    def part(self, rows: Tensor, *, unread: bool = True) -> Any:
        """Some of the data, as data for other batches; without ``unread``, in memory."""
        if self.rows is None:
            return tuple(array[rows] for array in self.arrays)
        return self.rows.part(rows) if unread else self._read(rows)

    def load(self, *inputs: Tensor) -> Batch:
        """A batch, gathered and transformed by tensor operations only, so that a compiled step can include it."""
        batch = inputs
        if self.source is None and self.shuffle:
            rows, *arrays = inputs
            batch = tuple(array.index_select(0, rows) for array in arrays)
        return batch if self.transform is None else (self.transform(batch[0]), *batch[1:])

    def _taken(self, item: Any) -> Batch:
        """The arrays of a loader's batch that the program takes."""
        item = tuple(item) if self.source is not None and isinstance(item, list) else item
        return self._moved(as_arrays(item, self.dtype, self.device, program=self.program, strict=False))

    def _read(self, numbers: Tensor) -> Batch:
        """The rows with these numbers, read from disk or made dense."""
        assert self.rows is not None
        items, names = self.rows.take(numbers), self.rows.names
        return self._moved(_checked(items, names, self.dtype, self.device, program=self.program, strict=True, numbers=numbers))

    def _moved(self, arrays: Batch) -> Batch:
        moved = [_as_tensor(array, self.dtype, self.device) for array in arrays]
        for index in self.floating:
            moved[index] = moved[index].to(self.dtype)
        return tuple(moved)

    def _refuse_empty(self) -> None:
        if self._found_any:
            raise ValueError(
                "The data loader gave no batch in a second pass, since its dataset can be read only once. What the first "
                "pass trained is kept: pass epochs=1, or a dataset whose __iter__ starts again."
            )
        raise ValueError("The data loader gave no batch: the data are empty, or a stream that has been read already.")


def as_arrays(
    data: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    program: Callable[..., Any] | None = None,
    strict: bool = True,
) -> Batch:
    """Data as a tuple of checked tensors. A masked array gives its values and, at the end, its inverted mask.

    Args:
        data: as for :class:`Batches`, but no ``Dataset`` or ``DataLoader``. All is read into memory.
        dtype: the type of floating-point arrays.
        device: the device of the tensors.
        program: keep only the arrays that this program takes, in its order.
        strict: refuse arrays other than labels that the program does not take.

    Raises:
        ValueError: the data are empty, ragged, of different lengths, not finite, or not numbers; or the program does not take
            them.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data import as_arrays
        >>> as_arrays(np.ma.masked_array([1.0, 1e3], mask=[False, True]))
        (tensor([1., 0.], dtype=torch.float64), tensor([ True, False]))
    """
    items, names = opened(data, program)
    items = tuple(item[:] if isinstance(item, Rows) else item for item in items)
    return _checked(items, names, dtype, device, program=program, strict=strict)


def _checked(
    items: tuple[Any, ...],
    names: list[str | None],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    *,
    program: Callable[..., Any] | None,
    strict: bool,
    numbers: Tensor | None = None,
) -> Batch:
    """Arrays as checked tensors; ``numbers`` are those of their rows, if they are some of the data."""
    arrays = tuple(_as_tensor(item, dtype, device) for item in items)
    if any(array.dim() == 0 for array in arrays):
        raise ValueError(
            "The data must have one entry per datum along their first dimension, got a single number: pass an array, or a "
            "DataLoader with a batch_size."
        )
    if not arrays or any(array.numel() == 0 for array in arrays):
        raise ValueError("The data are empty: give at least one datum, with data along the first dimension.")
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The arrays must have one length, got different lengths {lengths}: give each argument one entry per datum."
        )
    for array in (array for array in arrays if array.is_floating_point()):
        bad = ~torch.isfinite(array).flatten(1).all(1) if array.dim() > 1 else ~torch.isfinite(array)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(
                f"The data must be finite, got NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first row "
                f"{first if numbers is None else int(numbers[first])}: drop or repair them; where "
                f"values are missing, pass a mask beside zeros."
            )
    return arrays if program is None else match(program, arrays, names, strict=strict)


def arguments(program: Callable[..., Any], batch: Batch) -> Batch:
    """The tensors of a batch that a program takes, without labels that it does not take.

    Required parameters are filled in order. A parameter whose default is ``None`` takes one of the remaining tensors; if its
    name contains "mask", only a mask. A parameter with another default, such as ``temperature=1.0``, keeps it.

    Raises:
        ValueError: the program needs more arguments than the batch has, or the batch has a mask and the program takes none.

    Example:
        >>> import torch
        >>> from pyrovae.data import arguments
        >>> len(arguments(lambda x: None, (torch.zeros(3, 2), torch.zeros(3))))
        1
    """
    return match(program, batch)


def fingerprints(batch: Batch) -> np.ndarray:
    """A 64-bit hash of each datum's first array, shape (B,), which does not depend on float32 or float64 or the event's shape.

    Example:
        >>> import torch
        >>> from pyrovae.data.batches import fingerprints
        >>> x = torch.eye(3)
        >>> bool((fingerprints((x.double().reshape(3, 3, 1),)) == fingerprints((x,))).all())
        True
    """
    # Adding zero turns minus zero, which has other bits, into zero.
    rows = batch[0].detach().to("cpu", torch.float32).reshape(len(batch[0]), -1).numpy() + np.float32(0)
    hashes = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(hashes, np.int64).copy()


def content_hash(arrays: Iterable[Tensor]) -> str:
    """A hash of tensors' shapes, types and values, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        values = array.detach().cpu().contiguous()
        digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_tensor(item: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    try:
        tensor = item if isinstance(item, Tensor) else torch.as_tensor(_plain(np.asarray(item)))
    except (TypeError, ValueError) as error:
        what = f"dtype {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
        raise ValueError(
            f"The data must be an array of numbers, got {what}: give an array, a tensor, a tuple, a Dataset or a DataLoader."
        ) from error
    if tensor.is_complex():
        raise ValueError(
            "The data must be real, got complex numbers: give their real and imaginary parts side by side, for example."
        )
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers as a writable array with native byte order and non-negative strides, as torch needs."""
    array = number_array(array)
    native = array.dtype.isnative and array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return array if native else np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
