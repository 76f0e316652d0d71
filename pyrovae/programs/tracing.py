"""Tracing: run a guide and a model on its samples, with the particles in a plate on the left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .reachable import modules_of
from .sites import PARTICLES, Layout, Program, _latents_and_observed, data_plate, plate_nesting, refuse_auxiliary, sites_of
from .support import _Inside, support_of
from .wrappers import is_factor

Gradients = Literal["total", "split", "score", "leaf"]


class PathGradientScaler:
    """Identities on a run's samples, as the model sees them, whose backward pass scales each particle's gradient.

    An objective whose gradient gives one weight to the model's parameters and another to the path through the samples
    then still needs one forward and one backward pass. The factor, shape (K, B), is set after the forward pass.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        self.layout: Layout | None = None

    def __call__(self, sample: Tensor, event_dim: int) -> Tensor:
        """The same values."""
        if not sample.requires_grad:
            return sample
        seen = sample.view_as(sample)
        seen.register_hook(lambda gradient: self._scale(gradient, event_dim))
        return seen

    def _scale(self, gradient: Tensor, event_dim: int) -> Tensor:
        if self.factor is None or self.layout is None:
            return gradient
        factor = self.layout.broadcast_to_site(self.factor, gradient, event_dim).to(gradient.dtype)
        return torch.where(factor == 0, 0.0, gradient * factor)


class Traces(NamedTuple):
    """What one run of the guide, and of the model on its samples, left behind."""

    model: Trace
    guide: Trace  # its latents: what it observes is no part of q(z|x)
    rescored: Trace | None = None  # the guide at the samples, cut off from their path
    gate: PathGradientScaler | None = None
    guide_observed: tuple[dict, ...] = ()

    @property
    def guide_factors(self) -> list[dict]:
        """The guide's own ``pyro.factor`` sites, which are terms of an objective and of no density.

        A guide that runs the model, as Pyro's effect guides do, passes the model's factors too.
        """
        return [site for site in self.guide_observed if is_factor(site) and site["name"] not in self.model]


def trace_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    num_particles: int,
    max_plate_nesting: int | None,
    gradients: Gradients = "total",
    rows: Trace | None = None,
) -> Traces:
    """Run the guide, then the model on its samples, with the particles in a plate on the left.

    ``rows`` keeps the subsampled rows of the first run it goes through, and gives them to later ones.
    """

    def particles(run: Program) -> Program:
        return in_particles(run, num_particles, max_plate_nesting)

    def trace(run: Program) -> Trace:
        return poutine.trace(run).get_trace(*args, **kwargs)

    if rows is not None:
        guide = poutine.replay(guide, trace=rows)

    rescored, gate = None, PathGradientScaler() if gradients == "split" else None
    with explained(num_particles):
        if gradients == "score":
            with _Detach():
                guide_trace = trace(particles(guide))
            guide_trace = _with_values(guide_trace, lambda site: site["value"].detach())
        else:
            guide_trace = trace(particles(guide))
        guide_trace, observed = _latents_and_observed(guide_trace)
        seen = guide_trace
        if gate is not None:
            seen = _with_values(guide_trace, lambda site: gate(site["value"], site["fn"].event_dim))
            rescored = _with_values(guide_trace, lambda site: site["value"].detach())
        elif gradients == "leaf":
            seen = rescored = _with_values(guide_trace, _as_leaf)
        inside = _Inside(guide_trace)
        model_trace = trace(inside(poutine.replay(particles(model), trace=seen)))
        for name, outside in inside.outside.items():
            model_trace.nodes[name]["outside"] = outside
        if rescored is not None and sum(1 for _ in sites_of(prune_subsample_sites(guide_trace))) > 1:
            # A later site's distribution depends on an earlier sample, which must be the one without a path.
            rescored, _ = _latents_and_observed(trace(poutine.replay(particles(guide), trace=rescored)))
    if rows is not None:
        for site in guide_trace.nodes.values():
            if site_is_subsample(site) and site["name"] not in rows:
                rows.add_node(site["name"], **site)
    rescored = None if rescored is None else prune_subsample_sites(rescored)
    return Traces(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), rescored, gate, observed)


def in_particles(run: Program, num_particles: int, max_plate_nesting: int | None) -> Program:
    """A program that runs once for all particles, in a plate to the left of all its own."""
    # One plate object for each run: a plate is entered once.
    if num_particles == 1:
        return run
    assert max_plate_nesting is not None
    return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run)


@contextmanager
def explained(num_particles: int) -> Iterator[None]:
    """What torch and Pyro raise when a pair does not fit its plates, in a sentence that says what to write."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        if num_particles > 1:
            raise ValueError(
                f"The pair runs with one particle but not with {num_particles} on the left of its batch ({said}): let its "
                f"networks accept leading dimensions, and reshape by z.shape[:-1] and not by the batch, or pass "
                f"vectorize_particles=False."
            ) from error
        if "Shape mismatch inside plate" in said:
            raise ValueError(
                f"{said}: declare the dimensions within a datum with .to_event(n), and size the plate by x.shape[0]."
            ) from error
        if isinstance(error, IndexError | TypeError):
            raise ValueError(
                f"The pair cannot be run on its arguments ({type(error).__name__}: {said}): let model and guide take the same "
                f"arguments, and use no dimension that the data or the latents do not have."
            ) from error
        raise error.__cause__ or error from None  # without the trace shapes that Pyro appends to the sentence


def _with_values(trace: Trace, change: Callable[[dict], Tensor]) -> Trace:
    changed = trace.copy()
    for site in sites_of(trace):
        if not site["is_observed"] and not site_is_subsample(site):
            changed.nodes[site["name"]] = {**site, "value": change(site)}
    return changed


def _as_leaf(site: dict) -> Tensor:
    value = site["value"].detach()
    return value.requires_grad_() if value.is_floating_point() else value


class _Detach(Messenger):
    """Later sites see detached samples of earlier ones."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def find_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """How many plate dimensions a pair uses, by one run that leaves no trace."""
    with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide), poutine.block():
        traces = trace_pair(model, guide, args, kwargs, 1, None)
    data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
    return plate_nesting(traces.model, traces.guide)


class Substitute(Messenger):
    """The latents of a run take given values; or unconstrained ones, through the support that their sites declare."""

    def __init__(self, given: dict[str, Tensor], *, unconstrained: bool = False):
        super().__init__()
        self.given, self.unconstrained = given, unconstrained
        self.log_jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.given.get(msg["name"])
        if value is None:
            return
        if self.unconstrained:
            transform = biject_to(support_of(msg["fn"]))
            flat, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(flat, value)
            inner = msg["fn"].event_dim - transform.codomain.event_dim
            self.log_jacobian[msg["name"]] = jacobian.sum(tuple(range(-inner, 0))) if inner else jacobian
        msg["value"], msg["done"] = value, True


def trace_from_prior(
    model: Program, guide: Program | None, args: tuple, num_particles: int, max_plate_nesting: int | None
) -> Traces:
    """Run the model on draws of its own prior, and the guide on the same values; without one, the prior stands in for it."""

    def trace(run: Program, *around: Messenger) -> Trace:
        run = in_particles(run, num_particles, max_plate_nesting)
        for messenger in around:
            run = messenger(run)
        return prune_subsample_sites(poutine.trace(run).get_trace(*args))

    with explained(num_particles):
        model_trace = trace(model)
        latents = {site["name"]: site for site in sites_of(model_trace) if not site["is_observed"]}
        if guide is None:
            guide_trace = Trace()
            for site in latents.values():
                guide_trace.add_node(site["name"], **site)
            return Traces(model_trace, guide_trace)
        guide_trace, _ = _latents_and_observed(
            trace(guide, Substitute({name: site["value"] for name, site in latents.items()}))
        )
    refuse_auxiliary(sites_of(guide_trace))
    return Traces(model_trace, guide_trace)


@contextmanager
def evaluation_mode(model: Program, guide: Program) -> Iterator[None]:
    """Dropout off and running statistics still, for the modules that the programs use; restored after."""
    training = [module for module in modules_of(model, guide) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def same_random_stream(args: tuple) -> Iterator[None]:
    """Leave the random stream as it was."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
