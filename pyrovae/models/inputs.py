"""Data of any form given to a model's networks: in batches and without gradients, or all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from .._validation import positive_integer
from ..data.batches import Batches
from ..programs.sites import Program

__all__ = ["BATCH_SIZE", "all_at_once", "in_batches", "opened"]

# Data that are encoded at once.
BATCH_SIZE = 1024
Result = TypeVar("Result")


def in_batches(model: Program, compute: Callable[..., Tensor], *data: Any, batch_size: int, device: torch.device) -> Tensor:
    """What ``compute`` makes of batches of data, joined, without gradients.

    Args:
        model: a Pyro program, by whose parameters arrays are chosen.
        compute: takes the tensors of a batch.
        data: data as :class:`pyrovae.data.Batches` takes them, and what stands beside them, or ``None``.
        batch_size: data at once.
        device: of the batches.

    Raises:
        ValueError: the data do not fit the model.
    """
    batch_size = positive_integer(batch_size, "batch_size")
    given = tuple(each for each in data if each is not None)
    with torch.no_grad():
        if not _are_tensors(given):
            batches = Batches(_together(given), batch_size, program=model, ordered=True, device=device)
            return torch.cat([compute(*batch) for batch in batches])
        lengths = {len(each) if each.dim() else 0 for each in given}
        if len(lengths) > 1:  # refused in the model's own words
            return compute(*given)
        return torch.cat([compute(*batch) for batch in zip(*(each.split(batch_size) for each in given), strict=True)])


def all_at_once(model: Program, compute: Callable[..., Result], *data: Any) -> Result:
    """What ``compute`` makes of all data; with gradients if they are tensors, and without if they are anything else."""
    given = tuple(each for each in data if each is not None)
    if _are_tensors(given):
        return compute(*given)
    with torch.no_grad():
        return compute(*opened(model, *given))


def opened(model: Program, *data: Any) -> tuple[Tensor, ...]:
    """Data as the tensors that ``model`` takes, in memory; tensors stay as they are."""
    given = tuple(each for each in data if each is not None)
    if _are_tensors(given):
        return given
    batches = list(Batches(_together(given), BATCH_SIZE, program=model, ordered=True))
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _are_tensors(data: tuple[Any, ...]) -> bool:
    return all(isinstance(each, Tensor) and each.layout == torch.strided for each in data)


def _together(data: tuple[Any, ...]) -> Any:
    """Data for batches; what an array holds where a mask beside it is false does not matter, NaN included."""
    if len(data) == 2 and all(isinstance(each, np.ndarray) for each in data) and data[1].dtype == bool:
        x, mask = data
        return np.ma.masked_array(x, ~mask) if x.shape == mask.shape else data
    return data[0] if len(data) == 1 else data
