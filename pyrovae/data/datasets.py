"""Data sets by name and from files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from .._validation import unknown
from .batches import _OF_IMAGES
from .readers import ReadKeywords, read
from .rows import Rows, SparseRows
from .support import Values, choose_likelihood, summarize
from .synthetic import SIZES, SYNTHETIC, synthetic
from .vision import VISION, download, read_vision

__all__ = ["WAYS", "Split", "binarize", "dequantize", "load"]

# The number of images that share the random bits of ties.
SHARING = 16


def binarize(x: Tensor) -> Tensor:
    r"""Draw 0 or 1 with the grey value as probability, anew at each call.

    .. math:: b_d \sim \mathrm{Bernoulli}(x_d), \qquad 0 \le x_d \le 1

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> import torch
        >>> from pyrovae.data import binarize
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    if x.is_cuda:  # random numbers are cheap there, and Inductor compiled the code below to wrong numbers
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
    r"""Add uniform noise to integer levels, anew at each call, for a ``dequantized`` likelihood.

    .. math:: y_d = x_d + u_d, \qquad u_d \sim \mathrm{Uniform}(0, 1)

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
        train: training data, shape ``(N, *data_shape)``, in memory or read from disk in batches.
        test: held-out data, shape ``(M, *data_shape)``; if they are binarised, then once.
        test_labels: classes of the held-out data, shape (M,), or ``None``.
        train_labels: classes of the training data, shape (N,), with -1 for unlabelled data, or ``None``.
        likelihood: a likelihood for these numbers, as a registry table.
        transform: a function that is applied to every training batch, or ``None``.
        note: one sentence on the source of the data and their treatment.
        reason: the reason for the likelihood.
        train_mask: true where a training value was observed, shape of ``train``; ``None`` if all were.
        test_mask: the same of the held-out data.
        train_covariates: numbers that belong to the training data without being modelled, shape (N, C), or ``None``.
        test_covariates: the same of the held-out data.
        columns: names of the columns, if they have names.
        classes: names of the classes, if they have names.
        covariate_names: names of the columns of the covariates.
        test_log_px: the true log p(x) of the held-out data in nats, shape (M,), if the distribution is known.

    Example:
        >>> from pyrovae.data import load
        >>> digits = load("digits")
        >>> digits.train.shape, digits.data_shape, digits.likelihood
        (torch.Size([1437, 1, 8, 8]), (1, 8, 8), {'kind': 'beta_binomial', 'total_count': 16})
    """

    name: str
    train: Tensor | Rows
    test: Tensor
    test_labels: Tensor | None
    likelihood: dict[str, Any]
    transform: Callable[[Tensor], Tensor] | None
    note: str
    reason: str = ""
    train_labels: Tensor | None = None
    train_mask: Tensor | Rows | None = None
    test_mask: Tensor | None = None
    train_covariates: Tensor | None = None
    test_covariates: Tensor | None = None
    columns: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    covariate_names: tuple[str, ...] = ()
    test_log_px: Tensor | None = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return tuple(self.train.shape[1:])

    @property
    def num_classes(self) -> int | None:
        """The size of what a datum is given: a number for each class and each covariate; ``None`` if there are neither."""
        if self.train_labels is None and self.train_covariates is None:
            return None
        known = [labels for labels in (self.train_labels, self.test_labels) if labels is not None]
        named = max(len(self.classes), *(int(labels.max()) + 1 for labels in known)) if known else 0
        return named + len(self.covariate_names)

    def beside(self, part: str) -> dict[str, Any]:
        """The mask and the covariates of a part, ``"train"`` or ``"test"``, that has them."""
        found = {name: getattr(self, f"{part}_{name}") for name in ("mask", "covariates")}
        return {name: each for name, each in found.items() if each is not None}

    def names(self) -> dict[str, list[str]]:
        """The names that the data came with: of columns, classes and covariates."""
        found = {"columns": self.columns, "classes": self.classes, "covariates": self.covariate_names}
        return {name: list(each) for name, each in found.items() if each}

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
    path: str | Path | None = None,
    root: str = "data",
    binarize: str | None = None,
    download: bool = False,
    test_fraction: float = 0.2,
    **options: Unpack[ReadKeywords],
) -> Split:
    """A data set by name, or of a file or a folder, split into training and test data.

    By name there are ``"digits"`` (scikit-learn's 1,797 images of 8 x 8 counts 0..16, which ship with it), torchvision's
    ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"``, ``"emnist"``, ``"omniglot"``, ``"cifar10"`` and ``"svhn"``, and sets whose
    log p(x) is known: ``"linear_gaussian"``, ``"ring"``, ``"bernoulli_mixture"`` and ``"poisson_mixture"``.

    Args:
        name: the data set.
        path: a file or a folder that :func:`pyrovae.data.read` reads, in place of a name. A fixed permutation splits its rows,
            and :func:`pyrovae.data.support.choose_likelihood` chooses a likelihood whose support contains its values.
        root: torchvision's folder.
        binarize: for grey images by name, and for files of 8-bit levels or of grey values in [0, 1]: ``"dynamic"`` draws
            training pixels anew at each batch, ``"static"`` draws them once, ``"none"`` keeps grey values in [0, 1],
            ``"levels"`` keeps the levels 0..255, and ``"dequantized"`` adds uniform noise to the levels, anew at each batch.
            The test set is always drawn once, from a fixed seed. The default is ``"dynamic"`` for grey images by name,
            ``"levels"`` for those in colour, and no change for a file.
        download: let torchvision fetch its data set if it is missing.
        test_fraction: the held-out part of a file.
        **options: of a file, those of :func:`pyrovae.data.read`.

    Raises:
        ValueError: an unknown name or option, or a file that does not hold numbers.
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
        return _from_table(Path(path), test_fraction, binarize, options)
    if options:
        raise ValueError(f"{next(iter(options))!r} is for data of a file, and {name!r} is a data set by name: leave it out.")
    if name in VISION:
        return _vision(name, root, binarize, download)
    if name not in ("digits", *SYNTHETIC):
        raise ValueError(unknown("data set", name, ["digits", *VISION, *SYNTHETIC]))
    if binarize is not None:
        what = "the digits are counts 0..16" if name == "digits" else f"{name!r} has no grey values"
        raise ValueError(f"binarize={binarize!r} is for grey images and files, and {what}: leave it out.")
    return _digits() if name == "digits" else _synthetic(name)


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
        likelihood={"kind": "beta_binomial", "total_count": 16},
        transform=None,
        note="scikit-learn's handwritten digits, 8 x 8 counts 0..16; 1,437 train, 360 test, by a fixed permutation",
        reason="the pixels are counts 0..16 that vary more than a binomial's",
    )


def _synthetic(name: str) -> Split:
    (train, _), (test, log_px) = (synthetic(name, size, seed) for seed, size in enumerate(SIZES))
    likelihood, reason = choose_likelihood(train.numpy())
    return Split(
        name=name,
        train=train.to(torch.get_default_dtype()),
        test=test.to(torch.get_default_dtype()),
        test_labels=None,
        likelihood=likelihood,
        transform=None,
        note=f"{len(train):,} train and {len(test):,} test draws of the known distribution {name!r}, whose log p(x) is "
        f"{log_px.mean():.2f} nats on average on the test draws",
        reason=reason,
        test_log_px=log_px,
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


def _vision(name: str, root: str, how: str | None, fetch: bool) -> Split:
    if fetch:
        download(name, root)
    (train, train_labels), (test, test_labels) = read_vision(name, root)
    title, what = VISION[name]
    split = Split(
        name=name,
        train=torch.as_tensor(np.array(train)),
        test=torch.as_tensor(np.array(test)),
        test_labels=torch.as_tensor(test_labels),
        train_labels=torch.as_tensor(train_labels),
        likelihood={},
        transform=None,
        note=f"{title}, {what}, {len(train):,} train and {len(test):,} test images",
    )
    return _treated(split, how or ("dynamic" if train.shape[1] == 1 else "levels"), 255)


def _treated(split: Split, how: str, largest: int) -> Split:
    """A split of grey values from zero to ``largest``, treated as ``how`` says, with its likelihood and transform."""
    unit = 1 if how in ("levels", "dequantized") else largest
    test = (split.test / unit).to(torch.get_default_dtype())
    train = split.train
    train = train.map(lambda x: x / np.float32(unit)) if isinstance(train, Rows) else (train / unit).to(test.dtype)
    generator = torch.Generator().manual_seed(0)
    if how in ("dynamic", "static"):
        test = torch.bernoulli(test, generator=generator)
    if how == "static" and isinstance(train, Rows):
        raise ValueError(
            f'binarize="static" draws all pixels once, and the data of {split.name!r} are read from disk in batches: set '
            f'"dynamic".'
        )
    if how == "static" and not isinstance(train, Rows):
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


def _from_table(path: Path, test_fraction: float, how: str | None, options: ReadKeywords) -> Split:
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction!r}.")
    table = read(path, **options)
    if table.size_factors is not None:
        raise ValueError(
            f'{path}: no model by name takes size factors; set likelihood = {{kind = "negative_binomial", library = "total"}}, '
            f"or pass them to a program of your own in Python."
        )
    held_out = round(len(table) * test_fraction)
    if not 0 < held_out < len(table):
        raise ValueError(f"{len(table)} data cannot be split with test_fraction {test_fraction}: give more data.")
    values = summarize(table.x, table.mask)
    likelihood, reason = values.likelihood()
    order = np.random.default_rng(0).permutation(len(table))
    parts = {"train": order[:-held_out], "test": order[-held_out:]}
    fields: dict[str, Any] = {}
    for part, rows in parts.items():
        fields[part] = _rows_of(table.x, rows, part == "test")
        for name in ("mask", "labels", "covariates"):
            beside = getattr(table, name)
            if beside is not None:
                fields[f"{part}_{name}"] = _rows_of(beside, rows, part == "test", cast=name == "covariates")
    missing = f"{values.num_missing:,} of {values.size:,} values missing" if values.num_missing else ""
    note = [f"{path}, {len(parts['train']):,} train and {held_out:,} test rows, by a fixed permutation", table.note, missing]
    note += [f"{len(table.classes)} classes ({_listed(table.classes)})"] if table.classes else []
    note += [f"columns {_listed(table.columns)}"] if table.columns else []
    note += ["read from disk in batches"] if isinstance(table.x, Rows) and not isinstance(table.x, SparseRows) else []
    split = Split(
        name=path.name.split(".")[0] or path.name,
        likelihood=likelihood,
        transform=None,
        note="; ".join(part for part in note if part),
        reason=reason,
        columns=table.columns,
        classes=table.classes,
        covariate_names=table.covariate_names,
        **{"test_labels": None} | fields,
    )
    return split if how is None else _treated(split, how, _largest(path, values, how))


def _rows_of(array: Any, rows: np.ndarray, now: bool, *, cast: bool = True) -> Tensor | Rows:
    """Some rows of an array; numbers as floats, and those that are unread stay so unless they are needed now."""
    if isinstance(array, Rows) and not now:
        return array.select(rows).map(lambda x: x if x.dtype == bool else x.astype(np.float32))
    part = array[rows] if isinstance(array, Rows) else torch.as_tensor(array[rows])
    return part.to(torch.get_default_dtype()) if part.is_floating_point() or (cast and part.dtype != torch.bool) else part


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... {names[-1]}"


def _largest(path: Path, values: Values, how: str) -> int:
    """The largest grey value of a file: 255 for 8-bit levels, else 1."""
    low, high = values.low, values.high
    if low >= 0 and high <= 255 and values.whole and (high > 1 or how in ("levels", "dequantized")):
        return 255
    if low >= 0 and high <= 1 and how not in ("levels", "dequantized"):
        return 1
    wanted = "" if how in ("levels", "dequantized") else ", or grey values in [0, 1]"
    raise ValueError(
        f"binarize={how!r} must be given 8-bit levels 0..255{wanted}, and {path} holds values from {low:g} to {high:g}: leave "
        f"binarize out."
    )
