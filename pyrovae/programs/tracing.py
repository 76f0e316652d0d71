"""Tracing: run a guide and a model on its samples, with the particles in a plate on the left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

from .edges import to_value
from .reachable import modules_of
from .sites import PARTICLES, Layout, Program, _latents_and_observed, data_plate, plate_nesting, refuse_auxiliary, sites_of
from .state import one_thread
from .support import _Inside, support_of
from .wrappers import is_factor

__all__ = [
    "Gradients", "PathGradientScaler", "ReadError", "Recorder", "Substitute", "Trace", "Traces", "evaluation_mode", "explained",
    "find_nesting", "in_particles", "inspection", "same_random_stream", "scoring_context", "trace_from_prior", "trace_pair",
    "trace_program",
]  # fmt: skip


class Gradients(StrEnum):
    """How gradients reach the samples of a run.

    Attributes:
        TOTAL: through reparameterised samples.
        SPLIT: through reparameterised samples, with the guide scored once more at detached samples, so that model, path and
            score can have their own weights.
        SCORE: not at all: samples are detached, for latents without a path.
        LEAF: up to the samples, which are leaves of the graph.
    """

    TOTAL = "total"
    SPLIT = "split"
    SCORE = "score"
    LEAF = "leaf"


class PathGradientScaler:
    """Identities on a run's samples, as the model sees them, whose backward pass scales each particle's gradient.

    With it, an objective whose gradient weighs the model's parameters and the path through the samples differently needs
    only one forward and one backward pass. The factor, shape (K, B), is set after the forward pass.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        self.layout: Layout | None = None

    def __call__(self, sample: Tensor, event_dim: int) -> Tensor:
        """The same values."""
        if not sample.requires_grad:
            return sample
        copy = sample.view_as(sample)
        copy.register_hook(lambda gradient: self._scale(gradient, event_dim))
        return copy

    def _scale(self, gradient: Tensor, event_dim: int) -> Tensor:
        if self.factor is None or self.layout is None:
            return gradient
        factor = self.layout.broadcast_to_site(self.factor, gradient, event_dim).to(gradient.dtype)
        return torch.where(factor == 0, 0.0, gradient * factor)


class Traces(NamedTuple):
    """The traces of one run of the guide, and of the model on its samples."""

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
    gradients: Gradients = Gradients.TOTAL,
    rows: Trace | None = None,
) -> Traces:
    """Run the guide, then the model on its samples, with the particles in a plate on the left.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: the arguments of both.
        kwargs: the keyword arguments of both.
        num_particles: K.
        max_plate_nesting: plate dimensions that the pair uses; not needed for one particle.
        gradients: how gradients reach the samples; see :func:`pyrovae.log_weights`.
        rows: a trace in which the first run stores the rows of its subsampled plates; later runs use the same rows.
    """

    def particles(run: Program) -> Program:
        return in_particles(run, num_particles, max_plate_nesting)

    def trace(run: Program) -> Trace:
        return poutine.trace(run).get_trace(*args, **kwargs)

    if rows is not None:
        guide = poutine.replay(guide, trace=rows)
    with explained(num_particles):
        guide_trace, observed = _latents_and_observed(_trace_guide(trace, particles(guide), gradients))
        samples = _samples_for_model(guide_trace, gradients)
        inside = _Inside(guide_trace)
        model_trace = trace(inside(poutine.replay(particles(model), trace=samples.in_model)))
        for name, outside in inside.outside.items():
            model_trace.nodes[name]["outside"] = outside
        rescored = samples.in_guide
        if rescored is not None:
            if sum(1 for _ in sites_of(prune_subsample_sites(guide_trace))) > 1:
                # A later site's distribution depends on an earlier sample, which must be the one without a path.
                rescored, _ = _latents_and_observed(trace(poutine.replay(particles(guide), trace=rescored)))
            rescored = prune_subsample_sites(rescored)
    if rows is not None:
        _store_rows(rows, guide_trace)
    model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
    return Traces(model_trace, guide_trace, rescored, samples.gate, observed)


def _trace_guide(trace: Callable[[Program], Trace], guide: Program, gradients: Gradients) -> Trace:
    """The guide's trace; for scores, with samples that are detached in the guide and after it."""
    if gradients != Gradients.SCORE:
        return trace(guide)
    with _Detach():
        guide_trace = trace(guide)
    return _with_values(guide_trace, lambda site: site["value"].detach())


class _Samples(NamedTuple):
    """The guide's samples as the model gets them, and as the guide is scored at them a second time."""

    in_model: Trace
    in_guide: Trace | None = None
    gate: PathGradientScaler | None = None


def _samples_for_model(guide_trace: Trace, gradients: Gradients) -> _Samples:
    """The samples on which the model runs, by how gradients are to reach them."""
    if (
        gradients == Gradients.SPLIT
    ):  # the model's gradients are scaled on their way to the samples, and log q is cut off from them
        gate = PathGradientScaler()
        scaled = _with_values(guide_trace, lambda site: gate(site["value"], site["fn"].event_dim))
        return _Samples(scaled, _with_values(guide_trace, lambda site: site["value"].detach()), gate)
    if gradients == Gradients.LEAF:  # model and guide share leaves of the graph
        leaves = _with_values(guide_trace, _as_leaf)
        return _Samples(leaves, leaves)
    return _Samples(guide_trace)


def _store_rows(rows: Trace, guide_trace: Trace) -> None:
    """Keep the rows of subsampled plates that a run drew."""
    for site in guide_trace.nodes.values():
        if site_is_subsample(site) and site["name"] not in rows:
            rows.add_node(site["name"], **site)


def trace_program(
    program: Program,
    args: tuple,
    num_particles: int = 1,
    max_plate_nesting: int | None = None,
    *around: Messenger,
    kwargs: dict[str, Any] | None = None,
) -> Trace:
    """The trace of one program with the particles in a plate on the left, under the given messengers."""
    run = in_particles(program, num_particles, max_plate_nesting)
    for messenger in around:
        run = messenger(run)
    return prune_subsample_sites(poutine.trace(run).get_trace(*args, **(kwargs or {})))


def in_particles(run: Program, num_particles: int, max_plate_nesting: int | None) -> Program:
    """A program that runs once for all particles, in a plate to the left of all its own."""
    # One plate object for each run: a plate is entered once.
    if num_particles == 1:
        return run
    assert max_plate_nesting is not None
    return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run)


class ReadError(RuntimeError):
    """A program reads a tensor's values into Python while it is captured as a graph."""


# What torch says of a distribution's parameter.
_INVALID_PARAMETER = re.compile(
    r"Expected parameter (\w+) .* of distribution (\w+)\(.* to satisfy the constraint (.+), but found invalid values"
)


@contextmanager
def explained(num_particles: int) -> Iterator[None]:
    """Raise the errors of a pair that does not fit its plates as a ``ValueError`` with a cure."""
    try:
        yield
    except ReadError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
        cause = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        invalid = _INVALID_PARAMETER.match(cause)
        if invalid is not None:
            name, distribution, constraint = invalid.groups()
            if distribution == "Unit":
                raise ValueError(
                    "A pyro.factor of the programs is NaN, so no datum has a log-weight: repair what makes it, such as the "
                    "logarithm of a negative number."
                ) from error
            raise ValueError(
                f"The parameter {name} of {distribution} must satisfy {constraint}, and a program gives it other values, as "
                f"exp does of a network's large outputs: bring the data to a scale near 1, such as pixels / 255, or bound the "
                f"parameter, as softplus(output) + 1e-4 does."
            ) from error
        if isinstance(error, torch.linalg.LinAlgError):
            raise ValueError(
                f"A matrix of the programs has no factorization at some values of the latents ({cause}): add a small multiple "
                f"of the identity to it, or run the pair in float64."
            ) from error
        if num_particles > 1:
            raise ValueError(
                f"The pair runs with one particle but not with {num_particles} on the left of its batch ({cause}): let its "
                f"networks accept leading dimensions, and reshape by z.shape[:-1] and not by the batch, or pass "
                f"vectorize_particles=False."
            ) from error
        if "Shape mismatch inside plate" in cause:
            raise ValueError(
                f"{cause}: declare the dimensions within a datum with .to_event(n), and size the plate by x.shape[0]."
            ) from error
        if isinstance(error, IndexError | TypeError | AssertionError):
            raise ValueError(
                f"The pair cannot be run on its arguments ({type(error).__name__}: {cause}): let model and guide take the same "
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
    """The number of plate dimensions that a pair uses, by one run without side effects."""
    with inspection(model, guide, args):
        traces = trace_pair(model, guide, args, kwargs, 1, None)
    data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
    return plate_nesting(traces.model, traces.guide)


class Substitute(Messenger):
    """Give the latents of a run these values, or map unconstrained numbers to the supports that their sites declare."""

    def __init__(self, values: dict[str, Tensor], *, unconstrained: bool = False):
        super().__init__()
        self.values, self.unconstrained = values, unconstrained
        self.placed: dict[str, tuple[Any, Tensor]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is None:
            return
        if self.unconstrained:
            support = support_of(msg["fn"])
            self.placed[msg["name"]] = (support, value)
            value = to_value(support, value)
        msg["value"], msg["done"] = value, True


class Recorder(Messenger):
    """Record the distribution and the value of each sample site of the programs that run inside it, the last run's.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> with pv.programs.tracing.Recorder() as recorder:
        ...     vae.model(torch.zeros(5, 9))
        >>> recorder.values["z"].shape
        torch.Size([5, 2])
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}
        self.distributions: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.values[msg["name"]], self.distributions[msg["name"]] = msg["value"], msg["fn"]


def trace_from_prior(
    model: Program, guide: Program | None, args: tuple, num_particles: int, max_plate_nesting: int | None
) -> Traces:
    """Run the model on draws of its own prior, and the guide on the same values. Without a guide, the prior takes its part."""
    with explained(num_particles):
        model_trace = trace_program(model, args, num_particles, max_plate_nesting)
        latents = {site["name"]: site for site in sites_of(model_trace) if not site["is_observed"]}
        if guide is None:
            guide_trace = Trace()
            for site in latents.values():
                guide_trace.add_node(site["name"], **site)
            return Traces(model_trace, guide_trace)
        substitute = Substitute({name: site["value"] for name, site in latents.items()})
        guide_trace, _ = _latents_and_observed(trace_program(guide, args, num_particles, max_plate_nesting, substitute))
    refuse_auxiliary(sites_of(guide_trace))
    return Traces(model_trace, guide_trace)


@contextmanager
def evaluation_mode(model: Program, guide: Program) -> Iterator[None]:
    """Set the modules that the programs use to evaluation mode, and restore their modes afterwards."""
    training = [module for module in modules_of(model, guide) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def inspection(model: Program, guide: Program, args: tuple) -> Iterator[None]:
    """Run programs only to read their sites: in evaluation mode, without gradients, and without an effect on anything outside.

    The random stream stays where it was, and Pyro's outer handlers do not see the sites.
    """
    with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide), poutine.block():
        yield


@contextmanager
def scoring_context(model: Program, guide: Program, seed: int | None, device: torch.device) -> Iterator[None]:
    """Score a pair: in evaluation mode, and with a seed, if given, that leaves the global random stream untouched.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        seed: a seed for torch, or ``None`` to draw from the global random stream.
        device: where the pair's numbers are drawn.
    """
    devices = [device] if device.type == "cuda" else []
    with one_thread(), evaluation_mode(model, guide), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield


@contextmanager
def same_random_stream(args: tuple) -> Iterator[None]:
    """Leave the random stream as it was."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
