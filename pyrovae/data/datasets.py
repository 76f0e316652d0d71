"""Data sets by name and from files."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._validation import unknown
from .batches import _OF_IMAGES, as_arrays
from .support import choose_likelihood, is_whole

__all__ = ["WAYS", "Split", "binarize", "dequantize", "load"]

# The number of images that share the random bits of ties.
SHARING = 16


def binarize(x: Tensor) -> Tensor:
    """Draw 0 or 1 with the grey value as probability, anew at each call.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> import torch
        >>> from pyrovae.data import binarize
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    if x.is_cuda:  # random numbers are cheap there, and the bytes below were compiled to other numbers than in eager mode
        return torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)).lt(x).to(x.dtype)
    # Compare each pixel with 8 random bits. Ties (1 in 256) are broken by 16 further bits, which are shared by 16 images to
    # save random numbers. That is as fine as float32's random numbers, in a fifth of the time.
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
    """Add uniform noise to integer levels, anew at each call, for a ``dequantized`` likelihood.

    Level k becomes a number in the open interval (k, k + 1), in torch's default type if it was an integer.

    References:
        Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, https://arxiv.org/abs/1511.01844.

    Example:
        >>> import torch
        >>> from pyrovae.data import dequantize
        >>> dequantize(torch.tensor([0, 255], dtype=torch.uint8)).floor()
        tensor([  0., 255.])
    """
    levels = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    # The ends of the bin are excluded: zero may be outside a support, and rounding must not reach the next level.
    noisy = levels + torch.rand_like(levels).clamp(min=2**-25)
    return torch.minimum(noisy, torch.nextafter(levels + 1, levels))


@dataclass(frozen=True)
class Split:
    """A data set with a fixed split.

    Attributes:
        name: the name of the data set.
        train: training data, shape ``(N, *data_shape)``.
        test: held-out data, shape ``(M, *data_shape)``; if they are binarised, then once.
        test_labels: classes of the held-out data, shape (M,), or ``None``.
        train_labels: classes of the training data, shape (N,), with -1 for unlabelled data, or ``None``.
        likelihood: a likelihood for these numbers, as a registry table.
        transform: a function that is applied to every training batch, or ``None``.
        note: one sentence on the source of the data and their treatment.
        reason: the reason for the likelihood.
    """

    name: str
    train: Tensor
    test: Tensor
    test_labels: Tensor | None
    likelihood: dict[str, Any]
    transform: Callable[[Tensor], Tensor] | None
    note: str
    reason: str = ""
    train_labels: Tensor | None = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.shape[1:])

    @property
    def num_classes(self) -> int | None:
        """How many classes the labels have, or ``None`` without labels."""
        return None if self.train_labels is None else int(self.train_labels.max()) + 1

    def with_labels_of(self, fraction: float) -> Split:
        """The split with the labels of a random part of each class of the training data; -1 for the others.

        Raises:
            ValueError: the data set has no labels.
        """
        if self.train_labels is None:
            raise ValueError(f"The data set {self.name!r} has no labels to keep: leave data.labelled out.")
        order = torch.as_tensor(np.random.default_rng(0).permutation(len(self.train)))
        labels = torch.full_like(self.train_labels, -1)
        for label in self.train_labels.unique():
            rows = order[self.train_labels[order] == label]
            labels[rows[: max(1, round(fraction * len(rows)))]] = label
        return replace(self, train_labels=labels)

    @property
    def unit(self) -> str:
        """The noun for one datum: ``"image"`` or ``"datum"``."""
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
        path: a ``.npy`` file of shape (N, ...), in place of a name. A fixed permutation splits its rows, and
            :func:`pyrovae.data.support.choose_likelihood` chooses a likelihood whose support contains its values.
        root: torchvision's folder for MNIST.
        binarize: for MNIST, and for files of 8-bit levels or of grey values in [0, 1]: ``"dynamic"`` draws training pixels
            anew at each batch, ``"static"`` draws them once, ``"none"`` keeps grey values in [0, 1], ``"levels"`` keeps the
            levels 0..255, and ``"dequantized"`` adds uniform noise to the levels, anew at each batch. The test set is always
            drawn once, from a fixed seed. The default is ``"dynamic"`` for MNIST, and no change for a file.
        download: let torchvision download MNIST if it is missing.
        test_fraction: the held-out part of a ``.npy`` file.

    Raises:
        ValueError: an unknown name or option, or a file that is not an array of numbers.
        FileNotFoundError: the files do not exist.

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
        train_labels=torch.as_tensor(bunch.target)[train],
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
        train_labels=parts[0].targets,
        likelihood={},
        transform=None,
        note="MNIST, 60,000 train and 10,000 test images of 28 x 28",
    )
    return _treated(split, how, 255)


def _treated(split: Split, how: str, largest: int) -> Split:
    """A split of grey values from zero to ``largest``, treated as ``how`` says, with its likelihood and transform."""
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
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction!r}.")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a .npy array of numbers ({error}): write it with numpy.save.") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2:
        raise ValueError(f"{path} must contain one array of shape (N, ...), with one datum per row.")
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
    """The largest grey value of a file: 255 for 8-bit levels, else 1."""
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

    PyPI's torchvision is built for CUDA, and its extension does not load beside a CPU-only torch. The operators that its Python
    code names at import then have no schema. Reading MNIST needs none of them, so it is enough to declare the schemas. Trying
    to load the extension first is not possible: loading it twice aborts the process.
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
