"""Supports of distributions, corrected: one turn of an angle, the union of a mixture's components, a flow's domain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pyro.distributions
import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, SineBivariateVonMises, SineSkewed
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.mixture_same_family import MixtureSameFamilyConstraint
from torch.distributions.transforms import ComposeTransform

from .wrappers import base_distribution, is_factor, is_point, layers_of

__all__ = [
    "ReferenceMeasure", "accept_any_component", "bare", "bounds_of", "free_numbers", "inside_of", "is_mixture", "measure_of",
    "reaches_beyond", "support_of",
]  # fmt: skip


class _Inside(Messenger):
    """Replace samples outside the prior's support by a point inside it, and record where they were: their weight is zero.

    No value is checked if the two supports show that no sample can lie outside, as for most pairs.
    """

    def __init__(self, guide: Trace):
        super().__init__()
        self.guide = guide
        self.outside: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        guide_site = self.guide.nodes.get(msg["name"])
        if guide_site is None or guide_site["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg):
            return
        try:
            support = support_of(msg["fn"])
        except NotImplementedError:  # raised by a distribution without a support
            return
        try:
            beyond = reaches_beyond(support_of(guide_site["fn"]), support)
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
        f"Site {site['name']!r} lies outside the data plate {plate!r}, so it belongs to no datum: {write[:-1]}; a "
        f"quantity that all data share must be a pyro.param here, not a latent."
    )


_ONE_TURN = constraints.interval(-math.pi, math.pi)
_CIRCULAR: tuple[Any, ...] = (torch.distributions.VonMises, SineBivariateVonMises, SineSkewed)


def support_of(distribution: Any) -> Any:
    """The set over which a distribution's density integrates to one.

    It differs from the support that the distribution declares for angles, whose density repeats with every turn; for mixtures,
    whose support is the union of the components'; and for zuko's flows, which declare none: it is their transform's domain.
    """
    if isinstance(distribution, torch.distributions.Independent):
        return constraints.independent(support_of(distribution.base_dist), distribution.reinterpreted_batch_ndims)
    if isinstance(distribution, MaskedDistribution | ExpandedDistribution):
        return support_of(distribution.base_dist)
    if isinstance(distribution, _CIRCULAR):
        return constraints.independent(_ONE_TURN, distribution.event_dim) if distribution.event_dim else _ONE_TURN
    if isinstance(distribution, torch.distributions.MixtureSameFamily):
        component = support_of(distribution.component_distribution)
        uniform = isinstance(base_distribution({"fn": distribution.component_distribution}), _Uniform)
        return _Union(component) if uniform or component.is_discrete else component
    transformed = isinstance(distribution, torch.distributions.TransformedDistribution)
    if transformed and isinstance(base_distribution({"fn": distribution.base_dist}), _CIRCULAR):
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
    """The union of the supports of components that stand along the last batch dimension."""

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
    """A bijection to the interval that spans those of the components."""
    interval, axis = union.component, -1 - union.event_dim
    while isinstance(interval, constraints.independent):
        interval = interval.base_constraint
    low, high = interval.lower_bound, interval.upper_bound  # a bound that all components share may be a plain number
    low, high = (low.amin(axis) if isinstance(low, Tensor) else low), (high.amax(axis) if isinstance(high, Tensor) else high)
    span = constraints.interval(low, high)
    return biject_to(constraints.independent(span, union.event_dim) if union.event_dim else span)


class _Image(constraints.Constraint):
    """The image of a support under transforms."""

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


class ReferenceMeasure(NamedTuple):
    """The measure with respect to which a site's log-probability is taken."""

    kind: str  # "mass" on countably many values, "density", or "point" for a Delta
    dims: int | None = None  # of a density: the number of free numbers, or None if it is not known

    def __str__(self) -> str:
        if self.kind == "density":
            return "a density" if self.dims is None else f"a density over {self.dims} free number(s)"
        return {"mass": "a probability mass", "point": "a point mass (Delta)"}[self.kind]

    def divides(self, other: ReferenceMeasure) -> bool:
        """Whether the ratio of a density with respect to each is an importance weight."""
        return self.kind == other.kind and (self.dims == other.dims or None in (self.dims, other.dims))


def measure_of(site: dict, support: Any) -> ReferenceMeasure:
    """The reference measure of a site with this support."""
    if is_point(site):
        return ReferenceMeasure("point")
    if support.is_discrete:
        return ReferenceMeasure("mass")
    return ReferenceMeasure("density", free_numbers(support, site["fn"].event_shape))


def bare(support: Any) -> Any:
    """A support's innermost constraint, without independent dimensions and mixtures."""
    return list(_constraints_of(support))[-1]


def _constraints_of(support: Any) -> Iterator[Any]:
    yield support
    while isinstance(support, (constraints.independent, *_MIXTURES)):
        support = support.component if isinstance(support, _Union) else support.base_constraint
        yield support


_MIXTURES = (MixtureSameFamilyConstraint, _Union)


def is_mixture(support: Any) -> bool:
    """Whether a support is that of a mixture, whose bounds have a dimension for its components."""
    return any(isinstance(each, _MIXTURES) for each in _constraints_of(support))


def free_numbers(support: Any, event_shape: torch.Size) -> int | None:
    """The dimension of the manifold that a support is; ``None`` where torch knows no bijection to it."""
    constraint, event_shape = bare(support), torch.Size(event_shape)  # an ImproperUniform may have a plain tuple
    if constraint.event_dim == 0:
        return event_shape.numel()
    cut = len(event_shape) - constraint.event_dim
    if isinstance(constraint, type(pyro.distributions.constraints.sphere)):
        return event_shape[:cut].numel() * (event_shape[cut:].numel() - 1)
    try:
        return event_shape[:cut].numel() * biject_to(constraint).inverse_shape(event_shape[cut:]).numel()
    except NotImplementedError:  # raised for a support without a bijection
        return None


def bounds_of(constraint: Any) -> tuple[Any, Any]:
    """The least and the largest number that a constraint on single numbers allows."""
    if isinstance(constraint, type(constraints.boolean)):
        return 0, 1
    return getattr(constraint, "lower_bound", -math.inf), getattr(constraint, "upper_bound", math.inf)


def reaches_beyond(inner: Any, outer: Any) -> bool:
    """Whether values of one support may lie outside another one, as far as their constraints tell.

    It is false for constraints on real vectors and matrices, which hold up to rounding. :func:`measure_of` compares their
    dimensions.
    """
    inner, outer = bare(inner), bare(outer)
    if outer.event_dim > 0:  # discrete vectors hold exactly
        return outer.is_discrete and type(inner) is not type(outer)
    if isinstance(outer, type(constraints.real)):
        return False
    (low, high), (least, most) = bounds_of(inner), bounds_of(outer)
    if type(inner) is not type(outer) or any(isinstance(bound, Tensor) for bound in (low, high, least, most)):
        return True
    return low < least or high > most or (least, most) == (-math.inf, math.inf)


def accept_any_component(distribution: Any) -> None:
    """Let a mixture score values that only some of its components allow, which torch's validation refuses."""
    for mixture in layers_of(distribution):
        if isinstance(mixture, torch.distributions.MixtureSameFamily):
            for part in (mixture, *layers_of(mixture.component_distribution)):
                part._validate_args = False


def inside_of(support: Any, value: Tensor) -> Tensor | None:
    """Numbers well inside a support, in the shape of ``value`` and its bounds; ``None`` if the bounds are not known."""
    constraint = bare(support)
    if isinstance(constraint, type(constraints.one_hot) | constraints.multinomial):
        first = torch.zeros_like(value).index_fill(-1, torch.zeros((), dtype=torch.long, device=value.device), 1)
        return first * getattr(constraint, "upper_bound", 1)
    low, high = bounds_of(constraint)
    if is_mixture(support):
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
