"""torchvision's data sets of images, read from its folders without torchvision and without unpickling foreign classes."""

from __future__ import annotations

import gzip
import importlib
import io
import math
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .rows import DataError

__all__ = ["VISION", "download", "read_vision"]

Images = tuple[np.ndarray, np.ndarray]

# The name in torchvision.datasets, and the sentence on each.
VISION = {
    "mnist": ("MNIST", "handwritten digits of 28 x 28"),
    "fashion_mnist": ("FashionMNIST", "pieces of clothing of 28 x 28"),
    "kmnist": ("KMNIST", "cursive Japanese characters of 28 x 28"),
    "emnist": ("EMNIST", "handwritten letters and digits of 28 x 28, the balanced split"),
    "omniglot": ("Omniglot", "handwritten characters of 105 x 105, background alphabets to train and others to test"),
    "cifar10": ("CIFAR10", "colour photographs of 32 x 32"),
    "svhn": ("SVHN", "house numbers in colour of 32 x 32"),
}


def read_vision(name: str, root: str) -> tuple[Images, Images]:
    """Images, as bytes of shape (N, C, H, W), and classes, to train with and to test with.

    Args:
        name: one of ``VISION``.
        root: the folder that torchvision calls ``root``.

    Raises:
        FileNotFoundError: the files are not there; says which.
        DataError: a file is damaged.
    """
    train, test = (_READERS.get(name, _idx_set)(Path(root), name, part) for part in (True, False))
    for part, (images, labels) in zip(("training", "test"), (train, test), strict=True):
        if len(images) != len(labels) or not len(images):
            raise DataError(
                f"The {part} files of {VISION[name][0]} under {root!r} must hold a class for each image, got {len(labels)} for "
                f"{len(images)}: fetch them again."
            )
    return train, test


def _file(root: Path, name: str, *parts: str) -> Path:
    """The path of a file, or of the same compressed by gzip."""
    path = root.joinpath(*parts)
    for found in (path, path.with_name(f"{path.name}.gz")):
        if found.exists():
            return found
    title = VISION[name][0]
    raise FileNotFoundError(
        f"{title} is not under {str(root)!r}: point --data.root at the folder that holds {Path(*parts)}, or pass "
        f"--data.download."
    )


def _idx_set(root: Path, name: str, train: bool) -> Images:
    title = VISION[name][0]
    start = "train" if train else "t10k"
    start = f"emnist-balanced-{'train' if train else 'test'}" if name == "emnist" else start
    images, labels = (_idx(_file(root, name, title, "raw", f"{start}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1:
        raise DataError(f"The files of {title} under {str(root)!r} must hold images and classes: fetch them again.")
    # EMNIST's images are stored with rows and columns exchanged.
    return np.ascontiguousarray(images.transpose(0, 2, 1) if name == "emnist" else images)[:, None], labels.astype(np.int64)


def _idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST: two zeros, the type 8, the number of axes, their lengths, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} must be a file compressed by gzip, and cannot be read ({error}): fetch it again.") from error
    num_axes = content[3] if len(content) > 3 and content[:3] == b"\0\0\x08" else 0
    start = 4 + 4 * num_axes
    shape = struct.unpack(f">{num_axes}I", content[4:start]) if len(content) >= start else ()
    if not shape or math.prod(shape) != len(content) - start:
        raise DataError(f"{path} must hold an array of bytes in MNIST's format, got {len(content):,} bytes: fetch it again.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _cifar10(root: Path, name: str, train: bool) -> Images:
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    parts = [_plain_pickle(_file(root, name, "cifar-10-batches-py", each)) for each in names]
    images, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    return images.reshape(-1, 3, 32, 32), labels


def _plain_pickle(path: Path) -> Images:
    """The arrays of one file of CIFAR-10, which is a pickle: of all that a pickle can name, only NumPy arrays are made."""
    try:
        held = _Unpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        images, labels = np.asarray(held["data"]), np.asarray(held["labels"], np.int64)
    except DataError as error:
        raise DataError(f"{path} {error}") from error
    except Exception as error:  # a damaged pickle raises errors of any kind
        raise DataError(f"{path} must be a file of CIFAR-10, and cannot be read ({error}): fetch it again.") from error
    if images.dtype != np.uint8 or images.shape != (len(labels), 3072):
        raise DataError(f"{path} must hold bytes of shape (N, 3072), got {images.dtype} {images.shape}: fetch it again.")
    return images, labels


class _Unpickler(pickle.Unpickler):
    """Makes NumPy arrays, and nothing else that a file names."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.allowed or module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"):
            raise DataError(f"must hold arrays only, got {module}.{name}: it is not the original file of CIFAR-10.")
        return getattr(importlib.import_module(module.replace("numpy.core", "numpy._core")), name)


def _svhn(root: Path, name: str, train: bool) -> Images:
    path = _file(root, name, f"{'train' if train else 'test'}_32x32.mat")
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise DataError(f'{path} is read by SciPy, which is not installed: pip install "pyrovae[data]".') from error
    try:
        held = loadmat(str(path), variable_names=["X", "y"])
        images, labels = np.asarray(held["X"]).transpose(3, 2, 0, 1), np.ravel(held["y"]).astype(np.int64)
    except Exception as error:  # a damaged file raises errors of any kind
        raise DataError(f"{path} must be a file of SVHN, and cannot be read ({error}): fetch it again.") from error
    if images.dtype != np.uint8 or images.shape[1:] != (3, 32, 32):
        raise DataError(f"{path} must hold bytes of shape (32, 32, 3, N), got {images.dtype}: fetch it again.")
    return np.ascontiguousarray(images), labels % 10  # the digit 0 is called 10


def _omniglot(root: Path, name: str, train: bool) -> Images:
    from PIL import Image

    folder = _file(root, name, "omniglot-py", "images_background" if train else "images_evaluation")
    images, labels = [], []
    for label, character in enumerate(sorted(path for path in folder.glob("*/*") if path.is_dir())):
        for path in sorted(character.glob("*.png")):
            try:
                with Image.open(path) as image:
                    images.append(np.asarray(image.convert("L")))
            except (OSError, ValueError, SyntaxError) as error:
                raise DataError(f"{path} must be an image, and cannot be read ({error}): fetch it again.") from error
            labels.append(label)
    if len({image.shape for image in images}) != 1:
        raise DataError(f"{folder} must hold images of one size in ALPHABET/CHARACTER/*.png, got {len(images)}.")
    return np.stack(images)[:, None], np.array(labels)


_READERS: dict[str, Callable[[Path, str, bool], Images]] = {"cifar10": _cifar10, "svhn": _svhn, "omniglot": _omniglot}


def download(name: str, root: str) -> None:
    """Let torchvision fetch a data set into its folder.

    Raises:
        DataError: torchvision is not installed, or cannot fetch it.
    """
    family = getattr(_torchvision_datasets(), VISION[name][0])
    kinds: dict[str, tuple[str, Any, Any]] = {"omniglot": ("background", True, False), "svhn": ("split", "train", "test")}
    option, train, test = kinds.get(name, ("train", True, False))
    try:
        for part in (train, test):
            family(root, **{option: part}, **({"split": "balanced"} if name == "emnist" else {}), download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"torchvision cannot fetch {VISION[name][0]} ({error}): put its files under {root!r}.") from error


def _torchvision_datasets() -> Any:
    """Import torchvision's datasets, also beside a torch without CUDA.

    PyPI's torchvision is built for CUDA, and its extension does not load beside a CPU-only torch. The operators that its Python
    code names at import then have no schema. Fetching data needs none of them, so it is enough to declare the schemas. Trying
    to load the extension first is not possible: loading it twice aborts the process.
    """
    global _schemas
    try:
        return importlib.import_module("torchvision.datasets")
    except ModuleNotFoundError as error:
        raise DataError("Data sets are fetched by torchvision, which is not installed: pip install torchvision.") from error
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
