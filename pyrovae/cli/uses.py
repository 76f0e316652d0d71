"""Commands that use a trained run: ``pyrovae sample | reconstruct | encode | export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .app import _described, app

if TYPE_CHECKING:
    from torch import Tensor

    from ..models.base import PairModule

__all__ = ["encode", "export", "reconstruct", "sample"]

Part = Literal["test", "train"]


@app.command(sort_key=6)
def sample(run: Path, /, *, num_samples: int = 64, mean: bool = True, seed: int = 0) -> None:
    """Draw data from a trained model: samples.npy, and samples.png for images, in the run's folder.

    Example: pyrovae sample runs/digits-dreg-4 --num-samples 100

    Args:
        run: The run's folder.
        num_samples: How many.
        mean: Means of p(x|z) at draws of z; --no-mean draws x too, of models that can.
        seed: Seeds the draws.
    """
    import torch

    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

    vae, _ = _model_and_data(run, None)
    if num_samples < 1:
        raise ValueError(f"--num-samples must be positive, got {num_samples}.")
    torch.manual_seed(seed)
    with torch.no_grad():
        if mean:
            drawn = vae.examples(num_samples)
        elif isinstance(vae, VAE | HierarchicalVAE):
            drawn = vae.sample(num_samples)
        else:
            raise ValueError(f"A {type(vae).__name__} draws means only: leave out --no-mean.")
    _write(run, "samples", drawn, pictures=True)


@app.command(sort_key=7)
def reconstruct(run: Path, /, *, part: Part = "test", limit: int | None = None) -> None:
    """Reconstruct data by a trained model: reconstructions.npy, and a picture for images, in the run's folder.

    Example: pyrovae reconstruct runs/digits-dreg-4 --limit 20

    Args:
        run: The run's folder.
        part: The held-out data or the training data.
        limit: Only the first so many.
    """
    vae, inputs = _model_and_data(run, part, limit)
    _write(run, "reconstructions", vae.reconstruct(*inputs), pictures=True)


@app.command(sort_key=8)
def encode(run: Path, /, *, part: Part = "test", limit: int | None = None) -> None:
    """Encode data by a trained model: the mean of q(z|x) of each datum, as latents.npy in the run's folder.

    Example: pyrovae encode runs/digits-dreg-4 --part train

    Args:
        run: The run's folder.
        part: The held-out data or the training data.
        limit: Only the first so many.
    """
    vae, inputs = _model_and_data(run, part, limit)
    _write(run, "latents", vae.embed(*inputs))


@app.command(sort_key=9)
def export(run: Path, /, *, format: Literal["torch", "onnx"] = "torch") -> None:
    """Write a trained VAE's encoder and decoder as graphs that run without pyrovae, in the run's folder.

    Example: pyrovae export runs/digits-dreg-4 --format onnx

    Args:
        run: The run's folder.
        format: For torch.export.load (.pt2), or ONNX.
    """
    vae, _ = _model_and_data(run, None)
    from ..models.vae import VAE

    if not isinstance(vae, VAE):
        raise ValueError(f"Models of kind vae can be exported, and this is a {type(vae).__name__}.")
    for path in vae.export(run, format=format):
        print(f"Wrote {path}")


def _model_and_data(run: Path, part: Part | None, limit: int | None = None) -> tuple[PairModule, tuple[Tensor, ...]]:
    """A run's model, and what it takes of the test or the training data."""
    import torch

    from .config import load_model, load_split, run_device

    described = _described(run)
    vae = load_model(run).to(run_device(described))
    vae.eval()
    if part is None:
        return vae, ()
    split = load_split(described)
    x, y = (split.test, split.test_labels) if part == "test" else (split.train, split.train_labels)
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"The training data of {run} are read from disk in batches: use vae.embed(path) in Python.")
    return vae, tuple(each[:limit] for each in vae.score_inputs(x, y, **split.beside(part)))


def _write(run: Path, name: str, values: Tensor, pictures: bool = False) -> None:
    """Write an array into a run's folder, atomically, and images as a picture too."""
    import io

    import numpy as np

    from ..files import write_bytes

    array = values.detach().cpu().numpy()
    file = io.BytesIO()
    np.save(file, array)
    write_bytes(run / f"{name}.npy", file.getvalue())
    print(f"Wrote {run / f'{name}.npy'}: {' x '.join(map(str, array.shape))}")
    image = _picture(array) if pictures else None
    if image is not None:
        write_bytes(run / f"{name}.png", image)
        print(f"Wrote {run / f'{name}.png'}")


def _picture(array: Any) -> bytes | None:
    """The first hundred images in a square; ``None`` if the data are no images."""
    import math

    from .images import as_images, data_range, image_grid, png_bytes

    images = as_images(array[:100])
    if images is None:
        return None
    return png_bytes(image_grid(images, math.ceil(math.sqrt(len(images))), *data_range(array)))
