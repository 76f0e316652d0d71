"""What annealing is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .._validation import positive_integer, unknown

__all__ = ["LARGEST_STEP", "SMALLEST_STEP", "AnnealingOptions", "Schedule", "Start", "inverse_temperatures"]

Start = Literal["prior", "guide"]
Schedule = Literal["sigmoid", "linear"]
# A leapfrog step keeps a graph of all that the decoder computed, so chunks hold fewer numbers than those that are only scored.
CHUNK_NUMBERS = 2**20
# The range of step sizes, in standard deviations of the start.
SMALLEST_STEP, LARGEST_STEP = 1e-4, 0.5
# How much steeper the sigmoid schedule is than a line in the middle.
STEEPNESS = 4.0
# Gradients that repay compilation.
GRADIENTS_TO_COMPILE = 20_000


@dataclass(frozen=True)
class AnnealingOptions:
    """The options that :func:`pyrovae.ais` and :func:`pyrovae.bdmc` share, checked.

    Raises:
        ValueError: an option is none that it can be; the message says what it must be.

    Example:
        >>> from pyrovae.evidence.annealing_options import AnnealingOptions
        >>> AnnealingOptions(num_temperatures=4, schedule="linear").betas
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """

    num_chains: int = 16
    num_temperatures: int = 1000
    schedule: Schedule = "sigmoid"
    start: Start = "prior"
    leapfrog_steps: int = 10
    step_size: float = 0.01
    target_acceptance: float = 0.65
    chunk_size: int | None = None
    vectorize_particles: bool = True
    compile: bool | Literal["auto"] = "auto"
    seed: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        """Refuse what an option cannot be."""
        for name in ("num_chains", "num_temperatures", "leapfrog_steps"):
            object.__setattr__(self, name, positive_integer(getattr(self, name), name))
        if self.chunk_size is not None:
            object.__setattr__(self, "chunk_size", positive_integer(self.chunk_size, "chunk_size"))
        if self.compile not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto", got {self.compile!r}.')
        if self.start not in ("prior", "guide"):
            raise ValueError(unknown("start", self.start, ["prior", "guide"]))
        if self.schedule not in ("linear", "sigmoid"):
            raise ValueError(unknown("schedule", self.schedule, ["linear", "sigmoid"]))
        if not SMALLEST_STEP <= self.step_size <= LARGEST_STEP:
            raise ValueError(f"step_size must be between {SMALLEST_STEP} and {LARGEST_STEP}, got {self.step_size!r}.")
        if not 0 < self.target_acceptance < 1:
            raise ValueError(f"target_acceptance must be between 0 and 1, got {self.target_acceptance!r}.")

    @property
    def betas(self) -> list[float]:
        """The T + 1 inverse temperatures from 0 to 1."""
        return inverse_temperatures(self.schedule, self.num_temperatures)

    def rows(self, num_dims: float) -> int:
        """How many data's chains move together."""
        return max(1, int((self.chunk_size or CHUNK_NUMBERS // max(num_dims, 256)) // self.num_chains))

    def backend(self, num_batches: int | None, directions: int) -> str:
        """What captures the gradient.

        Args:
            num_batches: how many batches there are, if that is known.
            directions: one for chains to the joint, two if others go back.
        """
        gradients = (num_batches or 1) * (directions + 1) * (self.num_temperatures + 1) * (self.leapfrog_steps + 1)
        if self.compile == "auto":
            return "inductor" if gradients >= GRADIENTS_TO_COMPILE else "aten"
        return "inductor" if self.compile else "eager"


def inverse_temperatures(schedule: Schedule, num_temperatures: int) -> list[float]:
    """T + 1 numbers from 0 to 1, evenly spaced or closer together at both ends."""
    even = np.linspace(0, 1, num_temperatures + 1)
    if schedule == "linear":
        return even.tolist()
    curve = np.tanh(STEEPNESS * (2 * even - 1) / 2)  # a sigmoid, shifted so that it is odd around the middle
    return ((curve / curve[-1] + 1) / 2).tolist()
