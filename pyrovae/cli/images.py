"""Data as pictures: grids of images, as PNG inside the page."""

from __future__ import annotations

import base64
import io
import math

import numpy as np

__all__ = ["as_images", "data_range", "image_grid", "png", "png_bytes"]


def image_grid(images: np.ndarray, columns: int, low: float = 0.0, high: float = 1.0) -> np.ndarray:
    """Set images side by side, with transparent gaps between them.

    Args:
        images: shape (n, H, W) for grey or (n, H, W, 3) for colour.
        columns: how many stand in a row.
        low: the value drawn black.
        high: the value drawn white.

    Returns:
        RGBA bytes, shape (height, width, 4); small images are enlarged by a whole factor, so that pixels stay sharp.
    """
    scaled = np.clip((np.nan_to_num(images.astype(float), nan=low) - low) / ((high - low) or 1.0), 0, 1)
    bytes_ = np.round(255 * scaled).astype(np.uint8)
    if bytes_.ndim == 3:
        bytes_ = np.repeat(bytes_[..., None], 3, axis=-1)
    factor = max(1, 96 // max(bytes_.shape[1:3]))
    bytes_ = bytes_.repeat(factor, axis=1).repeat(factor, axis=2)
    number, height, width, _ = bytes_.shape
    gap = max(2, width // 14)
    rows = math.ceil(number / columns)
    grid = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), dtype=np.uint8)
    for index, image in enumerate(bytes_):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        grid[top : top + height, left : left + width, :3] = image
        grid[top : top + height, left : left + width, 3] = 255
    return grid


def as_images(data: np.ndarray) -> np.ndarray | None:
    """Data (n, *data_shape) as (n, H, W) or (n, H, W, 3), or None if they are no images."""
    shape = data.shape[1:]
    if len(shape) == 3 and shape[0] == 1:
        data, shape = data[:, 0], shape[1:]
    if len(shape) == 3 and shape[0] == 3:
        return np.moveaxis(data, 1, -1)
    if len(shape) == 2 and min(shape) > 1:
        return data
    side = math.isqrt(math.prod(shape))
    # A flat datum of 4 or 9 numbers is a row of a table rather than a picture.
    if len(shape) == 1 and side >= 4 and side * side == shape[0]:
        return data.reshape(-1, side, side)
    return None


def data_range(data: np.ndarray | None) -> tuple[float, float]:
    """The smallest and the largest finite value, which are drawn black and white."""
    finite = np.asarray([]) if data is None else data[np.isfinite(data)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)


def png(image: np.ndarray) -> str:
    """RGBA bytes as the address of a picture that stands in the page itself."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")


def png_bytes(image: np.ndarray) -> bytes:
    """RGBA bytes as the content of a PNG file."""
    from matplotlib.image import imsave

    file = io.BytesIO()
    imsave(file, image, format="png")
    return file.getvalue()
