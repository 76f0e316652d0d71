"""Data: what the commands train on, and one way to walk over whatever a user brings."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from .matching import MASK, Batch, match
from .registry import positive_integer, unknown
from .streams import Stream, in_order, is_one_pass
from .support import choose_likelihood, is_whole

# Likelihoods that a file of plain matrices is given where these are images.
_OF_IMAGES = ("discretized_logistic", "continuous_bernoulli", "dequantized")
# Data that share the random bits which few of their pixels need.
SHARING = 16


class Batches:
    """Minibatches of any data, each a tuple of tensors for the arguments of model and guide.

    Arrays live on the device as whole tensors, so a batch is one gather. A ``Dataset`` goes through a ``DataLoader``; a
    ``DataLoader`` is taken as it is, with its own batch size and order. A masked array becomes two arrays: its values, zero
    where they are hidden, and a mask that is true where they are not.

    Args:
        data: an array, a tensor, a masked array, a tuple of them (one for each argument), a ``Dataset`` or a ``DataLoader``.
        batch_size: data per batch; the last one may be smaller.
        shuffle: a new order on each pass, from torch's random stream.
        dtype: floating arrays are brought to it; integers stay, since they may be labels or indices.
        device: where the batches go.
        transform: applied to the first tensor of every batch, such as :func:`binarize`.
        program: give the arrays that this program takes, as :func:`arguments` does; by default all.
        ordered: give all data in the order of the data set, also where a ``DataLoader`` shuffles or drops its last batch.

    Raises:
        ValueError: the data are empty, ragged, of mixed length, hold NaN or infinity, or are no numbers; the program does not
            take what they hold; or a sampler draws them at random, and they must be in order.

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
        if isinstance(data, DataLoader):
            self.source = in_order(data) if ordered else data
            # Processes that read a data set have their own copy of it in each pass.
            if isinstance(data.dataset, IterableDataset) and not data.num_workers:
                self._stream = Stream(self.source)
        elif isinstance(data, IterableDataset):
            self.source = self._stream = Stream(data)
        elif isinstance(data, Dataset) and not isinstance(data, TensorDataset):
            self.source = data
        else:
            labelled = isinstance(data, TensorDataset)
            self.arrays = self._taken(data.tensors if labelled else data, strict=not labelled)
            self.arrays = tuple(array.contiguous() for array in self.arrays)

    @property
    def loader(self) -> DataLoader[Any] | None:
        """What reads the data, or ``None`` where they are in memory."""
        if self.source is None or isinstance(self.source, DataLoader):
            return self.source
        iterable = isinstance(self.source, IterableDataset)
        return DataLoader(self.source, batch_size=self.batch_size, shuffle=self.shuffle and not iterable)

    def to(self, dtype: torch.dtype, device: torch.device, floating: tuple[int, ...] = ()) -> None:
        """Bring floating arrays and those named to a type, and everything to a device, now and in later batches."""
        self.dtype, self.device, self.floating = dtype, device, floating
        if self.arrays:
            self.arrays = self._moved(self.arrays)

    @property
    def num_data(self) -> int | None:
        """How many data there are, or ``None`` where a loader cannot say."""
        if self.loader is None:
            return len(self.arrays[0])
        try:
            return len(self.loader.dataset)  # type: ignore[arg-type]
        except TypeError:  # an iterable dataset without a length
            return None

    @property
    def num_batches(self) -> int | None:
        """How many batches one pass has, or ``None`` where a loader cannot say."""
        if self.loader is None:
            return math.ceil(len(self.arrays[0]) / self.batch_size)
        try:
            return len(self.loader)
        except TypeError:  # an iterable dataset without a length
            return None

    def check_passes(self, passes: int) -> None:
        """Refuse several passes over a stream that gives its data once.

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
        found = self._stream.take(self.batch_size if by_rows else 1)
        if not found:
            self._refuse_empty()
        return self.load(*self._taken(default_collate(found) if by_rows else found[0]))

    def inputs(self) -> Iterator[Batch]:
        """One pass, as what :meth:`load` makes batches of: rows and the whole arrays, or a part of the data as it is."""
        loader = self.loader
        if loader is not None:
            empty = True
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

    def load(self, *inputs: Tensor) -> Batch:
        """A batch, gathered and transformed by nothing but tensor operations, so that a compiled step can do it."""
        batch = inputs
        if self.source is None and self.shuffle:
            rows, *arrays = inputs
            batch = tuple(array.index_select(0, rows) for array in arrays)
        return batch if self.transform is None else (self.transform(batch[0]), *batch[1:])

    def _taken(self, item: Any, *, strict: bool = False) -> Batch:
        """The arrays of the data, or of a part of them, that the program takes."""
        item = tuple(item) if self.source is not None and isinstance(item, list) else item
        return self._moved(as_arrays(item, self.dtype, self.device, program=self.program, strict=strict))

    def _moved(self, arrays: Batch) -> Batch:
        moved = [_as_tensor(array, self.dtype, self.device) for array in arrays]
        for index in self.floating:
            moved[index] = moved[index].to(self.dtype)
        return tuple(moved)

    def _refuse_empty(self) -> None:
        if self._found_any:
            raise ValueError(
                "The data loader gave no batch in a second pass, since its dataset can be read only once; what the first pass "
                "trained is kept: pass epochs=1, or a dataset whose __iter__ starts anew."
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
    """Arrays or tensors as a tuple of tensors, checked; a masked array as its values and, last, a mask of what it shows.

    Args:
        data: an array, a tensor, a masked array, or a tuple of them.
        dtype: floating arrays are brought to it.
        device: where they go.
        program: give only the arrays that this program takes, in its order.
        strict: refuse arrays beside labels that the program does not take.

    Raises:
        ValueError: empty, ragged, of mixed length, NaN or infinite, or no numbers; or not what the program takes.

    Example:
        >>> import numpy as np
        >>> from pyrovae.data import as_arrays
        >>> as_arrays(np.ma.masked_array([1.0, 1e3], mask=[False, True]))
        (tensor([1., 0.], dtype=torch.float64), tensor([ True, False]))
    """
    items, names = _unmasked(data if isinstance(data, tuple) else (data,))
    arrays = tuple(_as_tensor(item, dtype, device) for item in items)
    if not arrays or any(array.dim() == 0 or array.numel() == 0 for array in arrays):
        raise ValueError("The data are empty: give at least one datum, with data along the first dimension.")
    lengths = [len(array) for array in arrays]
    if len(set(lengths)) > 1:
        raise ValueError(f"The arrays have different lengths {lengths}: give each argument one entry per datum.")
    for array in arrays:
        bad = ~torch.isfinite(array).flatten(1).all(1) if array.dim() > 1 else ~torch.isfinite(array)
        if bool(bad.any()):
            raise ValueError(
                f"The data hold NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first row "
                f"{int(bad.nonzero()[0])}: drop or repair them; where values are missing, pass a mask beside zeros."
            )
    return arrays if program is None else match(program, arrays, names, strict=strict)


def arguments(program: Callable[..., Any], batch: Batch) -> Batch:
    """The tensors of a batch that a program takes; labels that it does not ask for are left out.

    Required parameters are filled in order. A parameter whose default is ``None`` takes one of the tensors that are left, one
    with "mask" in its name a mask only; any other default, such as ``temperature=1.0``, stays.

    Raises:
        ValueError: the program needs more arguments than the batch has, or takes no mask where the batch has one.

    Example:
        >>> import torch
        >>> from pyrovae.data import arguments
        >>> len(arguments(lambda x: None, (torch.zeros(3, 2), torch.zeros(3))))
        1
    """
    return match(program, batch)


def fingerprints(batch: Batch) -> np.ndarray:
    """A 64-bit hash of each datum's first array, shape (B,): the same in float32 and float64, and whatever its event's shape.

    Example:
        >>> import torch
        >>> from pyrovae.data import fingerprints
        >>> x = torch.eye(3)
        >>> bool((fingerprints((x.double().reshape(3, 3, 1),)) == fingerprints((x,))).all())
        True
    """
    # Zero is added, as minus zero is equal to zero but of other bits.
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


def binarize(x: Tensor) -> Tensor:
    """Draw 0 or 1 with the grey value as probability, afresh at each call (Burda et al. 2016).

    Example:
        >>> import torch
        >>> from pyrovae.data import binarize
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    # Eight random bits decide all but one pixel in 256. Sixteen more decide those, and serve sixteen data, so that two pixels
    # have the same once in 65,536. As fine as float32's own random numbers in a fifth of the time, which a small step feels.
    size, dtype = x.numel(), torch.promote_types(x.dtype, torch.float32)
    rows = max(1, len(x)) if x.dim() else 1
    groups, width = -(-rows // SHARING), size // rows
    words = torch.randint(-(2**63), 2**63 - 1, ((size + groups * width) // 8 + 1,), device=x.device)
    parts = words.view(torch.uint8)

    def shared(start: int) -> Tensor:
        each = parts[start : start + groups * width].view(groups, 1, width).expand(groups, SHARING, width)
        return each.reshape(groups * SHARING, width)[:rows].view(x.shape).to(dtype)

    first, second, third = parts[:size].view(x.shape).to(dtype), shared(size), shared(size + 1)
    return first.mul_(2**8).sub_(x, alpha=2**16).add_(second).add_(third, alpha=2**-8).lt_(0).to(x.dtype)


def dequantize(x: Tensor) -> Tensor:
    """Add uniform noise to integer levels, afresh at each call, for a ``dequantized`` likelihood (Theis et al. 2016).

    Level k becomes a number inside (k, k + 1), in torch's default type if it was an integer.

    Example:
        >>> import torch
        >>> from pyrovae.data import dequantize
        >>> dequantize(torch.tensor([0, 255], dtype=torch.uint8)).floor()
        tensor([  0., 255.])
    """
    levels = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    # Neither end of the bin: zero may be outside a support, and rounding must not reach the next level.
    noisy = levels + torch.rand_like(levels).clamp(min=2**-25)
    return torch.minimum(noisy, torch.nextafter(levels + 1, levels))


@dataclass(frozen=True)
class Split:
    """A data set, split once and for all.

    Attributes:
        name: what it is called.
        train: training data, shape (N, *data_shape).
        test: held-out data, shape (M, *data_shape), binarised once if at all.
        test_labels: classes of the held-out data, shape (M,), or ``None``.
        likelihood: the likelihood that fits these numbers, as a registry table.
        transform: applied to every training batch, or ``None``.
        note: one sentence on where the data come from and what was done to them.
        reason: why that likelihood fits.
    """

    name: str
    train: Tensor
    test: Tensor
    test_labels: Tensor | None
    likelihood: dict[str, Any]
    transform: Callable[[Tensor], Tensor] | None
    note: str
    reason: str = ""

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.shape[1:])

    @property
    def unit(self) -> str:
        """What to call one datum."""
        matrix_of_pixels = len(self.data_shape) == 2 and self.likelihood["kind"] in _OF_IMAGES
        return "image" if len(self.data_shape) == 3 or matrix_of_pixels else "datum"


def load(
    name: str = "digits",
    *,
    path: str | None = None,
    root: str = "data",
    binarize: str | None = None,
    download: bool = False,
    test_fraction: float = 0.2,
) -> Split:
    """A data set by name, or an array file.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 images of 8 x 8 counts 0..16, which ship with it) or ``"mnist"``.
        path: a ``.npy`` file of shape (N, ...) instead; its rows are split by a fixed permutation, and the likelihood is one
            whose support holds its values (:func:`pyrovae.support.choose_likelihood`).
        root: the folder that torchvision keeps MNIST in.
        binarize: for MNIST, and for files of 8-bit levels or of grey values in [0, 1]: ``"dynamic"`` draws training pixels
            afresh at each batch, ``"static"`` draws them once, ``"none"`` keeps grey values in [0, 1], ``"levels"`` keeps the
            levels 0..255, and ``"dequantized"`` adds uniform noise to those, afresh at each batch. The test set is drawn once
            in all cases, from a fixed seed. By default MNIST is ``"dynamic"``, and a file stays as it is.
        download: let torchvision fetch MNIST; never without this.
        test_fraction: the held-out part of a ``.npy`` file.

    Raises:
        ValueError: an unknown name or option, or a file that is no array of numbers.
        FileNotFoundError: the files are not there.

    Example:
        >>> from pyrovae.data import load
        >>> split = load("digits")
        >>> len(split.train), len(split.test), split.data_shape
        (1437, 360, (1, 8, 8))
    """
    if binarize is not None and binarize not in WAYS:
        raise ValueError(unknown("binarisation", binarize, WAYS))
    if path is not None:
        return _from_file(Path(path), test_fraction, binarize)
    loaders = {"digits": _digits, "mnist": lambda: _mnist(root, binarize or "dynamic", download)}
    if name not in loaders:
        raise ValueError(unknown("data set", name, loaders))
    if name == "digits" and binarize is not None:
        raise ValueError(f"binarize={binarize!r} is for MNIST and for files, and the digits are counts 0..16: leave it out.")
    return loaders[name]()


def _digits() -> Split:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.as_tensor(bunch.images, dtype=torch.get_default_dtype())[:, None]
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(images)))
    train, test = order[:1437], order[1437:]
    return Split(
        name="digits",
        train=images[train],
        test=images[test],
        test_labels=torch.as_tensor(bunch.target)[test],
        likelihood={"kind": "binomial", "total_count": 16},
        transform=None,
        note="scikit-learn's handwritten digits, 8 x 8 counts 0..16; 1,437 train, 360 test, by a fixed permutation",
        reason="the pixels are counts 0..16",
    )


WAYS = {
    "dynamic": "training pixels binarised afresh at each batch, test pixels once",
    "static": "all pixels binarised once",
    "none": "grey values in [0, 1]",
    "levels": "grey levels 0..255",
    "dequantized": "grey levels 0..255 plus uniform noise, in training afresh at each batch, in the test set once",
}
_FITTING: dict[str, dict[str, Any]] = {
    "none": {"kind": "continuous_bernoulli"},
    "levels": {"kind": "discretized_logistic"},
    "dequantized": {"kind": "dequantized", "likelihood": {"kind": "normal", "scale": "shared"}},
}


def _mnist(root: str, how: str, download: bool) -> Split:
    datasets = _torchvision_datasets()
    try:
        parts = [datasets.MNIST(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"MNIST is not under {root!r}: point --data.root at the folder that holds MNIST/raw, or pass --data.download."
        ) from error
    split = Split(
        name="mnist",
        train=parts[0].data[:, None],
        test=parts[1].data[:, None],
        test_labels=parts[1].targets,
        likelihood={},
        transform=None,
        note="MNIST, 60,000 train and 10,000 test images of 28 x 28",
    )
    return _treated(split, how, 255)


def _treated(split: Split, how: str, largest: int) -> Split:
    """Images of grey values from zero to ``largest``, binarised or not, and what fits them."""
    unit = 1 if how in ("levels", "dequantized") else largest
    train, test = ((part / unit).to(torch.get_default_dtype()) for part in (split.train, split.test))
    generator = torch.Generator().manual_seed(0)
    if how in ("dynamic", "static"):
        test = torch.bernoulli(test, generator=generator)
    if how == "static":
        train = torch.bernoulli(train, generator=generator)
    if how == "dequantized":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            test = dequantize(test)
    return replace(
        split,
        train=train,
        test=test,
        likelihood=_FITTING.get(how, {"kind": "bernoulli"}),
        transform={"dynamic": binarize, "dequantized": dequantize}.get(how),
        note=f"{split.note}; {WAYS[how]}",
        reason="the pixels are binarised" if how in ("dynamic", "static") else f"the pixels are {WAYS[how]}",
    )


def _from_file(path: Path, test_fraction: float, how: str | None) -> Split:
    if not path.is_file():
        raise FileNotFoundError(f"There is no data file {path}: give the path of a .npy array.")
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction lies between 0 and 1, not {test_fraction!r}.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array of numbers ({error}): write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2:
        raise ValueError(f"{path} must hold one array of shape (N, ...), one datum a row.")
    (data,) = as_arrays(array, torch.get_default_dtype())
    data = data.to(torch.get_default_dtype())
    order = torch.as_tensor(np.random.default_rng(0).permutation(len(data)))
    held_out = round(len(data) * test_fraction)
    if not 0 < held_out < len(data):
        raise ValueError(f"{len(data)} data cannot be split with test_fraction {test_fraction}: give more data.")
    likelihood, reason = choose_likelihood(array)
    split = Split(
        name=path.stem,
        train=data[order[:-held_out]],
        test=data[order[-held_out:]],
        test_labels=None,
        likelihood=likelihood,
        transform=None,
        note=f"{path}, {len(data) - held_out:,} train and {held_out:,} test rows, by a fixed permutation",
        reason=reason,
    )
    return split if how is None else _treated(split, how, _largest(path, array, how))


def _largest(path: Path, array: np.ndarray, how: str) -> int:
    """White in a file of grey values: 255 of 8-bit levels, or 1."""
    low, high = array.min(), array.max()
    if low >= 0 and high <= 255 and is_whole(array) and (high > 1 or how in ("levels", "dequantized")):
        return 255
    if low >= 0 and high <= 1 and how not in ("levels", "dequantized"):
        return 1
    wanted = "" if how in ("levels", "dequantized") else ", or grey values in [0, 1]"
    raise ValueError(
        f"binarize={how!r} must be given 8-bit levels 0..255{wanted}, and {path} holds values from {low:g} to {high:g}: leave "
        f"binarize out."
    )


def _torchvision_datasets() -> Any:
    """Import torchvision's datasets, also beside a torch without CUDA.

    The registry's torchvision is built for CUDA and its extension does not load beside a CPU-only torch; then the operators
    that its Python code names at import have no schema. Reading MNIST needs none of them, so declaring the schemas is enough.
    Loading the extension first, to see whether it loads, is no way: loaded twice it aborts the process.
    """
    global _schemas
    try:
        return importlib.import_module("torchvision.datasets")
    except ModuleNotFoundError as error:
        raise ValueError("MNIST is read through torchvision, which is not installed: pip install torchvision.") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _schemas is not None:
            raise
    for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[module]  # half imported
    _schemas = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: schemas die with it
    for operator in ("nms", "qnms"):
        _schemas.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.datasets")


_schemas: torch.library.Library | None = None


def _as_tensor(item: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    try:
        tensor = item if isinstance(item, Tensor) else torch.as_tensor(_plain(np.asarray(item)))
    except (TypeError, ValueError) as error:
        what = f"dtype {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
        raise ValueError(
            f"The data are no array of numbers ({what}): give an array, a tensor, a tuple of them, a Dataset or a DataLoader."
        ) from error
    if tensor.is_complex():
        raise ValueError("The data are complex: give real numbers, for example real and imaginary parts side by side.")
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)


def _unmasked(items: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[str | None]]:
    """A masked array as its values, zero where they are hidden, and at the end a mask of what it shows; and the mask's name."""
    masked = [item for item in items if isinstance(item, np.ma.MaskedArray)]
    if len(masked) > 1:
        raise ValueError(
            f"The data hold {len(masked)} masked arrays, and a mask beside the data belongs to one: pass the others filled, "
            f"with their masks as arrays."
        )
    plain = tuple(item.filled(0) if isinstance(item, np.ma.MaskedArray) else item for item in items)
    shown = tuple(~np.ma.getmaskarray(item) for item in masked)
    return (*plain, *shown), [*[None] * len(plain), *[MASK] * len(shown)]


def _plain(array: np.ndarray) -> np.ndarray:
    """The same numbers in an order of bytes and strides that torch takes, and writable."""
    native = array.dtype.isnative and array.flags.writeable and all(stride >= 0 for stride in array.strides)
    return array if native else np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
