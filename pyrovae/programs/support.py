"""Supports of distributions, as they are: one turn of an angle, the union of a mixture's components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform

from .wrappers import base_distribution, is_factor, is_point, layers_of


class _Inside(Messenger):
    """A sample outside the prior's support weighs nothing: the model sees a point inside in its place, and it is noted here.

    Where both supports say that there is none, as for most pairs, nothing is looked at.
    """

    def __init__(self, guide: Trace):
        super().__init__()
        self.guide = guide
        self.outside: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        drawn = self.guide.nodes.get(msg["name"])
        if drawn is None or drawn["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg):
            return
        try:
            support = support_of(msg["fn"])
        except NotImplementedError:  # torch's word for a distribution that declares no support
            return
        try:
            beyond = reaches_beyond(support_of(drawn["fn"]), support)
        except NotImplementedError:
            beyond = reaches_beyond(None, support)
        if not beyond or not isinstance(msg["value"], Tensor):
            return
        value = msg["value"]
        outside = ~support.check(value)
        accept_any_component(msg["fn"])
        safe = inside_of(support, value)
        if safe is not None:
            msg["value"] = torch.where(outside[(..., *[None] * support.event_dim)], safe, value)
        self.outside[msg["name"]] = outside


def _outside(site: dict, plate: str, write: str) -> str:
    """Why a site outside the data plate cannot be read."""
    if site["infer"].get("is_auxiliary") and not is_factor(site):
        return (
            f"The guide's auxiliary site {site['name']!r} lies outside the data plate {plate!r}, as in autoguides that draw "
            f"the latents of all data as one vector, so q has no factor for each datum: use pyro.infer.autoguide.AutoNormal, "
            f"or a guide that samples inside the plate."
        )
    return (
        f"Site {site['name']!r} lies outside the data plate {plate!r}, so it belongs to no datum: {write[:-1]}; what all data "
        f"share is a pyro.param here, not a latent."
    )


_ONE_TURN = constraints.interval(-math.pi, math.pi)
_CIRCULAR = ("VonMises", "SineBivariateVonMises", "SineSkewed")


def support_of(distribution: Any) -> Any:
    """The set over which a distribution's density integrates to one.

    It differs from what the distribution declares for angles, whose density repeats with every turn; for mixtures, which may
    lie where any component does; and for a flow of zuko, which declares none: what its transform takes.
    """
    kind = type(distribution).__name__
    if kind == "Independent":
        return constraints.independent(support_of(distribution.base_dist), distribution.reinterpreted_batch_ndims)
    if kind in ("MaskedDistribution", "ExpandedDistribution"):
        return support_of(distribution.base_dist)
    if kind in _CIRCULAR:
        return constraints.independent(_ONE_TURN, distribution.event_dim) if distribution.event_dim else _ONE_TURN
    if isinstance(distribution, torch.distributions.MixtureSameFamily):
        component = support_of(distribution.component_distribution)
        uniform = isinstance(base_distribution({"fn": distribution.component_distribution}), _Uniform)
        return _Union(component) if uniform or component.is_discrete else component
    transformed = isinstance(distribution, torch.distributions.TransformedDistribution)
    if transformed and type(base_distribution({"fn": distribution.base_dist})).__name__ in _CIRCULAR:
        return _Image(support_of(distribution.base_dist), distribution.transforms)
    try:
        return distribution.support
    except NotImplementedError:
        transform = getattr(getattr(distribution, "dist", None), "transform", None)
        if transform is None:
            raise
        return transform.domain


_Uniform = torch.distributions.Uniform  # the one distribution whose density is zero, and not wrong, outside its bounds


class _Union(constraints.Constraint):
    """What lies in the support of any component, where these stand along the last batch dimension."""

    def __init__(self, component: Any):
        self.component = component
        super().__init__()

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.component.is_discrete

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self.component.event_dim

    def check(self, value: Tensor) -> Tensor:
        return self.component.check(value.unsqueeze(-1 - self.event_dim)).any(-1)


@biject_to.register(_Union)
def _over_all_components(union: _Union) -> Any:
    """Onto the interval that spans those of the components."""
    interval, axis = union.component, -1 - union.event_dim
    while isinstance(interval, constraints.independent):
        interval = interval.base_constraint
    low, high = interval.lower_bound, interval.upper_bound  # a bound that all components share may be a plain number
    low, high = (low.amin(axis) if isinstance(low, Tensor) else low), (high.amax(axis) if isinstance(high, Tensor) else high)
    span = constraints.interval(low, high)
    return biject_to(constraints.independent(span, union.event_dim) if union.event_dim else span)


class _Image(constraints.Constraint):
    """What transforms make of a support."""

    def __init__(self, base: Any, transforms: list[Any]):
        self.base, self.transform = base, ComposeTransform(transforms)
        super().__init__()

    @property
    def event_dim(self) -> int:  # type: ignore[override]
        return self.base.event_dim

    def check(self, value: Tensor) -> Tensor:
        return self.base.check(self.transform.inv(value))


@biject_to.register(_Image)
def _onto_image(image: _Image) -> Any:
    return ComposeTransform([biject_to(image.base), image.transform])


class Measure(NamedTuple):
    """What a site's log-probability is with respect to."""

    kind: str  # "mass" on countably many values, "density", or "point" for a Delta
    dims: int | None = None  # of a density: over how many free numbers; None where nothing says so

    def __str__(self) -> str:
        if self.kind == "density":
            return "a density" if self.dims is None else f"a density over {self.dims} free number(s)"
        return {"mass": "a probability mass", "point": "a point mass (Delta)"}[self.kind]

    def divides(self, other: Measure) -> bool:
        """Whether a ratio of one of each means anything."""
        return self.kind == other.kind and (self.dims == other.dims or None in (self.dims, other.dims))


def measure_of(site: dict, support: Any) -> Measure:
    """The measure of a site with this support."""
    if is_point(site):
        return Measure("point")
    return Measure("mass") if support.is_discrete else Measure("density", free_numbers(support, site["fn"].event_shape))


def bare(support: Any) -> Any:
    """A support's constraint on one value, without independent dimensions and without what wraps those of mixtures."""
    return list(_constraints_of(support))[-1]


def _constraints_of(support: Any) -> Iterator[Any]:
    yield support
    while type(support).__name__ in ("_IndependentConstraint", *_MIXTURES):
        support = getattr(support, "base_constraint", None) or support.component
        yield support


_MIXTURES = ("MixtureSameFamilyConstraint", "_Union")  # torch's, and that of :func:`pyrovae.programs.support.support_of`


def free_numbers(support: Any, event_shape: torch.Size) -> int | None:
    """The dimension of the manifold that a support is; ``None`` where torch knows no bijection to it."""
    constraint = bare(support)
    if constraint.event_dim == 0:
        return event_shape.numel()
    cut = len(event_shape) - constraint.event_dim
    if type(constraint).__name__ == "_Sphere":
        return event_shape[:cut].numel() * (event_shape[cut:].numel() - 1)
    try:
        return event_shape[:cut].numel() * biject_to(constraint).inverse_shape(event_shape[cut:]).numel()
    except NotImplementedError:  # torch's word for a support without one
        return None


def bounds_of(constraint: Any) -> tuple[Any, Any]:
    """The least and the largest number that a constraint on single numbers allows."""
    if type(constraint).__name__ == "_Boolean":
        return 0, 1
    return getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)


def reaches_beyond(inner: Any, outer: Any) -> bool:
    """Whether values of one support may lie outside another one, as far as their constraints say.

    Constraints on vectors and matrices are left out: they hold up to rounding, and their manifolds are compared by dimension.
    """
    inner, outer = bare(inner), bare(outer)
    if type(outer).__name__ == "_Real" or outer.event_dim > 0:
        return False
    (low, high), (least, most) = bounds_of(inner), bounds_of(outer)
    if type(inner) is not type(outer) or any(isinstance(bound, Tensor) for bound in (low, high, least, most)):
        return True
    return low < least or high > most or (least, most) == (-math.inf, math.inf)


def accept_any_component(distribution: Any) -> None:
    """Have a mixture score values that only some of its components allow, which torch's validation refuses."""
    for mixture in layers_of(distribution):
        if isinstance(mixture, torch.distributions.MixtureSameFamily):
            for part in (mixture, *layers_of(mixture.component_distribution)):
                part._validate_args = False


def inside_of(support: Any, value: Tensor) -> Tensor | None:
    """Numbers well inside a support, of the shape of ``value`` and its bounds; ``None`` where those are not known."""
    constraint = bare(support)
    low, high = bounds_of(constraint)
    if any(type(each).__name__ in _MIXTURES for each in _constraints_of(support)):
        # The last dimension of its bounds is that of its components.
        low, high = (bound[..., 0] if isinstance(bound, Tensor) and bound.dim() else bound for bound in (low, high))
    if not any(isinstance(bound, Tensor) for bound in (low, high)) and (low, high) == (-math.inf, math.inf):
        return None
    low, high = (torch.as_tensor(bound, dtype=value.dtype, device=value.device) for bound in (low, high))
    # The guide may leave out a leading plate dimension of size one, over which the bounds are laid.
    shape = torch.broadcast_shapes(value.shape, low.shape, high.shape)
    if constraint.is_discrete:
        return torch.where(low.isfinite(), low, high).expand(shape)
    finite = torch.where(low.isfinite(), low + 1, high - 1)
    return torch.where(low.isfinite() & high.isfinite(), (low + high) / 2, finite).expand(shape)
