"""The keyword arguments of :func:`pyrovae.log_marginal`, for functions that pass them on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from .proposals import Kind, Refinement

__all__ = ["LogMarginalKeywords"]


class LogMarginalKeywords(TypedDict, total=False):
    """The keyword arguments of :func:`pyrovae.log_marginal`; ``tests/test_vae.py`` holds them to its signature."""

    num_samples: int
    target_se: float | None
    proposal: Kind | Refinement
    prior_share: float
    chunk_size: int | None
    max_memory: float | None
    vectorize_particles: bool
    compile: bool | Literal["auto"]
    precision: Literal["float32", "tf32", "bfloat16"]
    seed: int | None
    resume: str | Path | None
    second: int
    progress: bool
