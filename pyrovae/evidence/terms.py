"""The log-density of a pair over its unconstrained latents and its gradient, from captured graphs, with a count of calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..compile.graph import Staged
from ..data.matching import Batch
from ..programs.sites import Program
from ..programs.unconstrained import UnconstrainedPair

__all__ = ["PairTerms"]

# A gradient runs the decoder forwards and backwards.
CALLS_OF_A_GRADIENT = 2
# So many times fewer points than a graph takes have a graph of their own.
FEW_POINTS = 8


class PairTerms:
    """log p(u) and log p(x|u) of many data, and the gradient of their sum; captured once, for data of any number.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        vectorize: whether particles run at once.
        backend: how scores and gradients are staged.
        precision: as in :func:`pyrovae.log_marginal`, of scoring alone.
        gradients: (point, datum) pairs whose gradients are computed at once.
    """

    def __init__(self, model: Program, guide: Program, vectorize: bool, backend: str, precision: str, gradients: int):
        self.model, self.guide, self.vectorize = model, guide, vectorize
        self.gradients = max(1, gradients)
        options: Any = {"programs": (model, guide)}
        self._score = Staged(self._run_score, backend, precision, **options)
        self._slope = Staged(self._run_slope, backend, **options)
        # These repay no compilation; and a graph of the prior's draws does not run the decoder.
        captured = "eager" if backend == "eager" else "aten"
        self._few = Staged(self._run_slope, captured, **options)
        self._prior = Staged(self._run_prior, captured, **options)
        self._pairs: dict[Any, UnconstrainedPair] = {}

    def pair(self, args: Batch) -> UnconstrainedPair:
        """The pair on some data.

        Raises:
            ValueError: a latent is not continuous, or has no known unconstrained form.
        """
        key = tuple((tuple(array.shape), array.dtype) for array in args)
        if key not in self._pairs:
            self._pairs[key] = UnconstrainedPair(self.model, self.guide, args, vectorize_particles=self.vectorize)
        return self._pairs[key].on(args)

    def score(self, args: Batch, flat: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x|u) at points (K, B, L), each (K, B), in float64; a graph serves one K and B."""
        return self._score(flat.to(self.pair(args).dtype), *args)  # type: ignore[return-value]

    def slope(self, args: Batch, flat: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, u) at points (K, B, L) and its gradient, in float64."""
        size, num_data, _ = flat.shape
        points, number = flat.flatten(0, 1), size * num_data
        which = torch.arange(num_data, device=flat.device).repeat(size)
        few = max(1, self.gradients // FEW_POINTS)
        each, staged = (few, self._few) if number <= few else (self.gradients, self._slope)
        parts = []
        for start in range(0, number, each):
            # Point by point, each with its own copy of its datum, and always as many: one graph serves every call.
            chosen = torch.arange(start, start + each, device=flat.device).clamp(max=number - 1)
            batch = tuple(array[which[chosen]] for array in args)
            rows = points[chosen].to(self.pair(batch).dtype)[None]
            parts.append([part[0, : number - start] for part in staged(rows, *batch)])
        log_joint, slope = (torch.cat(columns) for columns in zip(*parts, strict=True))
        return log_joint.reshape(size, num_data), slope.double().reshape(flat.shape)

    def prior(self, args: Batch, num: int) -> Tensor:
        """Draws of the prior, (num, B, L), in float64."""
        self.pair(args)
        (flat,) = self._prior(torch.empty(num, 0, device=args[0].device), *args)
        return flat.double()

    def recheck(self, when: str) -> None:
        """Compare the graphs with the programs at the next calls."""
        for staged in (self._score, self._slope, self._few, self._prior):
            staged.recheck(when)

    def _run_score(self, flat: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            terms = self.pair(args).terms(flat)
        return terms.log_prior.double(), terms.log_likelihood.double()

    def _run_slope(self, flat: Tensor, *args: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            flat = flat.detach().requires_grad_()
            terms = self.pair(args).terms(flat)
            log_joint = terms.log_prior.double() + terms.log_likelihood.double()
            (slope,) = torch.autograd.grad(log_joint.sum(), flat)
        return log_joint.detach(), slope

    def _run_prior(self, length: Tensor, *args: Tensor) -> tuple[Tensor]:
        with torch.no_grad():
            return (self.pair(args).prior_draws(len(length)),)
