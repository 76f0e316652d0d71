"""Checks that the proposal can draw every value that the prior allows."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from .independence import COSTLY_DRAWS, COVERAGE_DRAWS, Latents, _frame, _probing
from .sites import Layout, Program, latents_of, log_prob_of, sites_of
from .support import bare, support_of
from .tracing import Substitute, in_particles, trace_program
from .wrappers import base_distribution, is_enumerable, is_factor

__all__ = ["covered_data", "joined_flags"]

# Unconstrained numbers that reach the ends of a prior's support, which draws need not come near.
FAR = (-10.0, -6.0, -3.0, -1.5, -0.7, -0.3, -0.1, -0.01, 0.01, 0.1, 0.3, 0.7, 1.5, 3.0, 6.0, 10.0)
# A guide of these reaches all numbers whatever its parameters, so that its density at a few draws of the prior is enough.
POSITIVE_EVERYWHERE = (
    torch.distributions.Cauchy,
    torch.distributions.Laplace,
    torch.distributions.MultivariateNormal,
    torch.distributions.Normal,
    torch.distributions.StudentT,
)
# The number of observed values that are scored at once, to find the draws that the model allows.
CHUNK_NUMBERS = 2**22


def covered_data(
    model: Program,
    guide: Program,
    args: tuple[Tensor, ...],
    *,
    plate: str,
    nesting: int,
    num_dims: int,
    vectorize: bool = True,
) -> Tensor | None:
    """Whether the guide can draw every value that p(x, z) allows, for each datum, by a test at some points, shape (B,).

    The points reach the ends of the prior's support, or are draws of the prior. A datum is not covered if p(x, z) is positive
    at a point that lies outside the guide's support, or at which the guide's density is zero or NaN.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: the batch.
        plate: the name of the data plate.
        nesting: the number of plate dimensions that the pair uses.
        num_dims: the number of observed values per datum.
        vectorize: whether several points can be scored at once.

    Returns:
        ``None`` if the guide's density is known at its own draws only, or the programs fail at all points.
    """
    with _probing(args):
        sites = latents_of(trace_program(guide, args))
        if not sites or any(site["infer"].get("is_auxiliary") for site in sites):
            return None
        coverage = _Coverage(model, guide, args, nesting, tuple(site["name"] for site in sites), plate)
        draws = COSTLY_DRAWS if any(_is_costly(base_distribution(site)) for site in sites) else COVERAGE_DRAWS
        covered, judged = torch.ones(len(args[0]), dtype=torch.bool, device=args[0].device), False
        draws = draws if vectorize else min(draws, len(FAR))
        rounds = [(len(FAR), True), (draws, False)]
        if all(isinstance(base_distribution(site), POSITIVE_EVERYWHERE) for site in sites):
            # No number is far enough to lie outside the reals.
            rounds[1] = (min(draws, COSTLY_DRAWS), False)
            rounds = rounds[1:] if all(_is_real(site["fn"]) for site in sites) else rounds
        for number, far in rounds:
            together = number if vectorize else 1
            for start in range(0, number, together):
                try:
                    points = coverage.points(together, start if far else None)
                    missed = coverage.missed(points, together, density=not far)
                    if missed is None:
                        return None
                    if bool(missed.any()):
                        covered &= ~(missed & coverage.allowed(points, together, num_dims)).any(0)
                    judged = True
                except (ValueError, RuntimeError, IndexError):
                    # A program may fail at values that the guide never draws, such as a matrix without a Cholesky factor.
                    continue
    return covered if judged else None


def joined_flags(parts: list[Tensor | None]) -> np.ndarray | None:
    """The flags of all data from those of consecutive batches; ``None`` if some are unknown."""
    known = [part for part in parts if part is not None]
    return torch.cat(known).cpu().numpy() if known and len(known) == len(parts) else None


class _Coverage:
    """Test points of a batch's latents, and whether the guide can draw them."""

    def __init__(
        self, model: Program, guide: Program, args: tuple[Tensor, ...], nesting: int, names: tuple[str, ...], plate: str
    ):
        self.model, self.guide, self.args, self.nesting, self.names, self.plate = model, guide, args, nesting, names, plate

    def points(self, num: int, far: int | None) -> dict[str, dict]:
        """The model's latent sites at draws of the prior, or at the far points from ``far`` on, without the likelihood."""
        collect = _Collect(self.names, None if far is None else (far, num))
        with contextlib.suppress(_EnoughError):
            collect(in_particles(self.model, num, self.nesting))(*self.args)
        if far is None and num > 1:
            # Move a little towards another draw: a number can round to the edge of its support, such as 0 for (0, 1).
            for site in collect.sites.values():
                if site["value"].is_floating_point():
                    site["value"] = site["value"].lerp(site["value"].roll(1, 0), 1e-3)
        return collect.sites

    def missed(self, points: dict[str, dict], num: int, *, density: bool) -> Tensor | None:
        """Whether the guide cannot draw the points, (K, B); ``None`` if that is unknown."""
        sites = self._run(self.guide, {name: site["value"] for name, site in points.items()}, num)
        data = _frame(sites, self.plate)
        layout = Layout(num, data.size, self.nesting, data.dim)
        missed = torch.zeros(num, data.size, dtype=torch.bool, device=self.args[0].device)
        for site in sites:
            if site["name"] not in self.names:
                continue
            beyond = _beyond(site["fn"], site["value"])
            if beyond is not None:
                ours = _unmasked(site, beyond) & ~_outside(points[site["name"]]["fn"], site["value"])
                missed |= _any_of_datum(layout, site, beyond & ours)
            if density or is_enumerable(site["fn"]):
                try:
                    log_prob = log_prob_of(site)
                except (NotImplementedError, KeyError):  # a flow that cannot be inverted
                    return None
                missed |= _any_of_datum(layout, site, (log_prob == -torch.inf) | log_prob.isnan() | _is_never_drawn(site))
        return missed

    def allowed(self, points: dict[str, dict], num: int, num_dims: int) -> Tensor:
        """Whether p(x, z) is positive at the points, (K, B)."""
        size = max(1, CHUNK_NUMBERS // (max(num_dims, 256) * len(self.args[0])))
        parts = []
        for start in range(0, num, size):
            some = min(size, num - start)
            values = {name: site["value"] for name, site in points.items()}
            if some < num:
                values = {name: value[start : start + some] for name, value in values.items()}
                values = {name: value[0] if some == 1 else value for name, value in values.items()}
            sites = self._run(self.model, values, some)
            data = _frame(sites, self.plate)
            layout = Layout(some, data.size, self.nesting, data.dim)
            allowed = torch.ones(some, data.size, dtype=torch.bool, device=self.args[0].device)
            for site in sites:
                log_prob = log_prob_of(site)
                never = (log_prob == -torch.inf) | log_prob.isnan()
                if not is_factor(site):
                    never = never | (_outside(site["fn"], site["value"]) & _unmasked(site, log_prob))
                allowed &= ~_any_of_datum(layout, site, never)
            parts.append(allowed)
        return torch.cat(parts)

    def _run(self, program: Program, values: Latents, num: int) -> list[dict]:
        return list(sites_of(trace_program(program, self.args, num, self.nesting, Substitute(values))))


class _EnoughError(Exception):
    """Raised when all latents are recorded."""


class _Collect(Messenger):
    """Record a run's latents, drawn from the prior or set far out in its support, and end the run after the last one."""

    def __init__(self, names: tuple[str, ...], far: tuple[int, int] | None):
        super().__init__()
        self.names, self.far = names, far
        self.sites: dict[str, dict] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if self.far is None or msg["name"] not in self.names:
            return
        value = _far_value(msg["fn"], *self.far)
        if value is not None:
            msg["value"], msg["done"] = value, True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            self.sites[msg["name"]] = msg.copy()
            if len(self.sites) == len(self.names):
                raise _EnoughError


def _far_value(distribution: Any, start: int, num: int) -> Tensor | None:
    """A value of a distribution at the far points, or each of its values in turn if it can be enumerated."""
    batch = distribution.batch_shape
    index = torch.arange(start, start + num)
    index = index.reshape(num, *[1] * (len(batch) - 1)) if num > 1 else index[0]
    try:
        if is_enumerable(distribution):
            values = distribution.enumerate_support(expand=False)
            values = values.reshape(len(values), *distribution.event_shape)
            return values[(index % len(values)).to(values.device)].expand(*batch, *distribution.event_shape)
        support = support_of(distribution)
        if support.is_discrete:
            return None
        transform = biject_to(support)
        shape = transform.inverse_shape(batch + distribution.event_shape)
        like = distribution.sample()
        points = torch.tensor(FAR, dtype=like.dtype)[index % len(FAR)].to(like.device)
        return transform(points.reshape(*points.shape, *[1] * (len(shape) - points.dim())).expand(shape))
    except NotImplementedError:  # raised by a distribution without a support, or a support without a bijection
        return None


def _is_costly(distribution: Any) -> bool:
    """Whether the density at other draws may need a flow's inverse, number by number."""
    transforms = getattr(distribution, "transforms", ())
    return hasattr(distribution, "dist") or any(not type(t).__module__.startswith("torch.distributions") for t in transforms)


def _is_real(distribution: Any) -> bool:
    """Whether a support is all real numbers, vectors or arrays."""
    try:
        return isinstance(bare(support_of(distribution)), type(constraints.real))
    except NotImplementedError:  # raised by a distribution without a support
        return False


def _beyond(distribution: Any, value: Tensor) -> Tensor | None:
    """Whether a value lies outside a support, in the shape of its log-probability; ``None`` if there is no support."""
    try:
        return ~support_of(distribution).check(value)
    except NotImplementedError:  # raised by a distribution without a support
        return None


def _is_never_drawn(site: dict) -> Tensor:
    """Whether a discrete value has probability zero; torch clamps it to the rounding error in the logarithm."""
    distribution, value = base_distribution(site), site["value"]
    probs = vars(getattr(distribution, "_categorical", distribution)).get("probs")
    if probs is None or not is_enumerable(distribution):
        return torch.zeros((), dtype=torch.bool, device=value.device)
    if distribution.event_shape:
        never = (probs * value).sum(-1) == 0
    elif probs.dim() > len(distribution.batch_shape):
        never = probs.expand(*value.shape, probs.shape[-1]).gather(-1, value.long()[..., None])[..., 0] == 0
    else:
        never = torch.where(value == 1, probs, 1 - probs) == 0
    inner = site["fn"].event_dim - distribution.event_dim
    never = never.flatten(-inner).any(-1) if inner else never
    return never & _unmasked(site, never)


def _outside(distribution: Any, value: Tensor) -> Tensor:
    beyond = _beyond(distribution, value)
    return torch.zeros((), dtype=torch.bool, device=value.device) if beyond is None else beyond


def _unmasked(site: dict, like: Tensor) -> Tensor:
    mask = True if site["mask"] is None else site["mask"]
    return torch.as_tensor(mask, device=like.device)


def _any_of_datum(layout: Layout, site: dict, flags: Tensor) -> Tensor:
    """Whether any flag of a datum is set, (K, B), from flags in the shape of a site's log-probability."""
    shape = torch.broadcast_shapes(flags.shape, site["fn"].batch_shape)
    return layout.sum_per_datum(flags.expand(shape).double(), 0) > 0
