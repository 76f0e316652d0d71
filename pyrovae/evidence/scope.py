"""Where pairs are scored: in evaluation mode, with a random stream of the seed's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..programs.sites import Program
from ..programs.tracing import evaluation_mode

__all__ = ["seeded_evaluation"]


@contextmanager
def seeded_evaluation(model: Program, guide: Program, device: torch.device, seed: int | None) -> Iterator[None]:
    """Evaluation mode, and if there is a seed a random stream of its own, so that the global one stays as it is.

    Example:
        >>> import torch
        >>> from pyrovae.evidence.scope import seeded_evaluation
        >>> draws = []
        >>> for _ in range(2):
        ...     with seeded_evaluation(lambda x: None, lambda x: None, torch.device("cpu"), seed=0):
        ...         draws.append(torch.rand(()).item())
        >>> draws[0] == draws[1]
        True
    """
    devices = [device] if device.type == "cuda" else []
    with evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
