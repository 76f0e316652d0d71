"""A folder of images as an array of pixels, with a class for each subfolder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .rows import DataError, Rows
from .table import Table, label_codes

__all__ = ["is_image", "read_images"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
COLOURS = {"rgb": "RGB", "grey": "L"}
# Modes of Pillow with eight bits in a channel, by whether they are grey.
GREY, COLOURED = ("1", "L", "LA"), ("P", "RGB", "RGBA", "CMYK", "YCbCr", "PA", "HSV", "LAB", "RGBX", "RGBa", "La")
# The largest side that is chosen by default: a run on larger images takes minutes.
LARGEST_SIDE = 64


def is_image(path: Path) -> bool:
    """Whether a file's name ends as that of an image."""
    return path.suffix.lower() in SUFFIXES


def read_images(
    folder: Path, reading: Callable[..., Any], *, size: int | Sequence[int] | None, colour: str | None, memory: float
) -> Table:
    """The images in a folder and below it, in the order of their paths, shape (N, C, H, W), as bytes.

    An image of another size is scaled until it covers the size, and its middle is cut out.

    Args:
        folder: its subfolders, if all images lie in subfolders, are the classes.
        reading: a context that turns Pillow's errors into one sentence.
        size: height and width, or one number for both; by default that of the images, or their median if they differ.
        colour: ``"rgb"`` or ``"grey"``; by default ``"grey"`` if all images are.
        memory: more pixels than this, in bytes of float32, are read in batches.
    """
    if colour not in (None, *COLOURS):
        raise DataError(f'colour must be "rgb" or "grey", got {colour!r}.')
    within = ((path, path.relative_to(folder).parts) for path in folder.rglob("*"))
    shown = (path for path, parts in within if is_image(path) and not any(part.startswith(".") for part in parts))
    paths = sorted(path for path in shown if path.is_file())
    if not paths:
        raise DataError(f"{folder} must hold images ({', '.join(SUFFIXES)}), got none: give the folder that has them.")
    modes, sizes = Counter[str](), []
    for path in paths:
        mode, shape = _look_at(path, reading)
        modes[mode] += 1
        sizes.append(shape)
    colour = colour or ("grey" if set(modes) <= set(GREY) else "rgb")
    wanted, how = _wanted(size, sizes)
    rows = _ImageRows(paths, reading, wanted, colour)
    large = 4 * np.prod(rows.shape, dtype=float) > memory
    classes = [path.relative_to(folder).parts[0] for path in paths if len(path.relative_to(folder).parts) > 1]
    codes, names = label_codes(classes, str(folder)) if len(classes) == len(paths) and len(set(classes)) > 1 else (None, ())
    note = f"{colour} images of {wanted[0]} x {wanted[1]}{how}"
    return Table(rows if large else np.concatenate(list(rows.chunks())), labels=codes, classes=names, note=note)


class _ImageRows(Rows):
    def __init__(self, paths: list[Path], reading: Callable[..., Any], size: tuple[int, int], colour: str):
        self.paths, self.reading, self.size, self.mode = paths, reading, size, COLOURS[colour]
        self.shape, self.dtype = (len(paths), 3 if colour == "rgb" else 1, *size), np.dtype(np.uint8)

    def take(self, rows: np.ndarray) -> np.ndarray:
        images = [self._pixels(self.paths[row]) for row in rows.tolist()]
        return np.stack(images) if images else np.zeros((0, *self.shape[1:]), np.uint8)

    def _pixels(self, path: Path) -> np.ndarray:
        from PIL import Image, ImageOps

        height, width = self.size
        with self.reading(path, "an image", "repair it, or take it out of the folder"), Image.open(path) as image:
            whole = ImageOps.exif_transpose(image).convert(self.mode)
            if whole.size != (width, height):
                whole = ImageOps.fit(whole, (width, height), Image.Resampling.BILINEAR)
            pixels = np.asarray(whole)
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _look_at(path: Path, reading: Callable[..., Any]) -> tuple[str, tuple[int, int]]:
    """An image's mode, and its height and width as it is shown, without its pixels."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f'{path} is read by Pillow, which is not installed: pip install "pyrovae[data]".') from error
    with reading(path, "an image", "repair it, or take it out of the folder"), Image.open(path) as image:
        mode, (width, height) = image.mode, image.size
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    if mode not in (*GREY, *COLOURED):
        raise DataError(f"{path} must have eight bits in a channel, got the mode {mode}: convert it, or write an array.")
    return mode, (width, height) if turned else (height, width)


def _wanted(size: int | Sequence[int] | None, sizes: list[tuple[int, int]]) -> tuple[tuple[int, int], str]:
    """Height and width, and where they come from."""
    smallest, largest = min(sizes), max(sizes)
    if size is not None:
        sides = [size, size] if isinstance(size, int) else [*size, *size][:2]
        if len(sides) != 2 or (not isinstance(size, int) and len(size) > 2) or any(int(side) < 1 for side in sides):
            raise DataError(f"size must be a height and a width, or one number for both, got {size!r}.")
        wanted = int(sides[0]), int(sides[1])
        return wanted, "" if {wanted} == set(sizes) else ", scaled and cut to that size"
    if smallest == largest and max(smallest) <= LARGEST_SIDE:
        return smallest, ""
    middle = np.median(np.array(sizes), 0)
    middle = np.maximum(1, np.round(middle * min(1.0, LARGEST_SIDE / middle.max())))
    wanted = int(middle[0]), int(middle[1])
    ranged = "" if smallest == largest else f" to {largest[0]} x {largest[1]}"
    return wanted, f", scaled and cut from {smallest[0]} x {smallest[1]}{ranged}; data.size sets another size"
