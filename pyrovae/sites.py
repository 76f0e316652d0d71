"""Sites: what one sample statement of a trace is, whatever Pyro wraps around its distribution."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import biject_to

Mask = Tensor | bool


def is_factor(site: dict) -> bool:
    """Whether a site is a ``pyro.factor``, which observes nothing."""
    return type(site["fn"]).__name__ == "Unit"


def layers_of(law: Any) -> Iterator[Any]:
    """A distribution, and what Pyro wraps in it: independent dimensions, masks and expansions, from the outside in."""
    yield law
    while type(law).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        law = law.base_dist
        yield law


def law_of(site: dict) -> Any:
    """A site's distribution without what Pyro wraps around it."""
    *_, law = layers_of(site["fn"])
    return law


def is_point(site: dict) -> bool:
    """Whether a site is a ``Delta``."""
    return isinstance(law_of(site), Delta)


def is_reparameterized(site: dict) -> bool:
    """Whether the gradient of an expectation over a site is that of its samples alone, without a score.

    A rejection sampler has ``has_rsample``, and a score of what it accepted besides.
    """
    law = law_of(site)
    own = getattr(type(law), "score_parts", None)
    return bool(site["fn"].has_rsample) and own in (None, Distribution.score_parts, TorchDistributionMixin.score_parts)


def masks_of(site: dict) -> list[tuple[Mask, int]]:
    """The masks around a site and inside its distribution, each with the number of event dimensions to its right."""
    found = [(site["mask"], site["fn"].event_dim)]
    found += [(law._mask, law.event_dim) for law in layers_of(site["fn"]) if isinstance(law, MaskedDistribution)]
    return [(mask, event_dim) for mask, event_dim in found if mask is not None and mask is not True]


def mask_of(site: dict) -> Mask:
    """Where the numbers of a site count, all masks together: a bool, or a tensor that broadcasts to the site's value."""
    whole: Mask = True
    for mask, event_dim in masks_of(site):
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * event_dim)
        whole = mask if whole is True else torch.as_tensor(whole) & mask if mask is not False else False
    return whole


def is_masked_anywhere(site: dict) -> bool:
    """Whether some number of a site does not count; read eagerly, since it looks at the mask's values."""
    mask = mask_of(site)
    return not bool(mask.all()) if isinstance(mask, Tensor) else not mask


def same_mask(site: dict, other: dict) -> bool:
    """Whether the same numbers of a latent count in both programs; read eagerly."""
    if not masks_of(site) and not masks_of(other):
        return True
    masks = [torch.as_tensor(mask_of(each), device=each["value"].device) for each in (site, other)]
    shape = torch.broadcast_shapes(*(mask.shape for mask in masks))
    return torch.equal(masks[0].expand(shape), masks[1].expand(shape))


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


_MIXTURES = ("MixtureSameFamilyConstraint", "_Union")  # torch's, and that of :func:`pyrovae.traces.support_of`


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


def accept_any_component(law: Any) -> None:
    """Have a mixture score values that only some of its components allow, which torch's validation refuses."""
    for mixture in layers_of(law):
        if isinstance(mixture, torch.distributions.MixtureSameFamily):
            for part in (mixture, *layers_of(mixture.component_distribution)):
                part._validate_args = False


def inside_of(support: Any, value: Tensor) -> Tensor | None:
    """Numbers well inside a support, of the shape of ``value``; ``None`` where its bounds are not known."""
    constraint = bare(support)
    low, high = bounds_of(constraint)
    if any(type(each).__name__ in _MIXTURES for each in _constraints_of(support)):
        # The last dimension of its bounds is that of its components.
        low, high = (bound[..., 0] if isinstance(bound, Tensor) and bound.dim() else bound for bound in (low, high))
    if not any(isinstance(bound, Tensor) for bound in (low, high)) and (low, high) == (-math.inf, math.inf):
        return None
    low, high = (torch.as_tensor(bound, dtype=value.dtype, device=value.device) for bound in (low, high))
    if constraint.is_discrete:
        return torch.where(low.isfinite(), low, high).expand(value.shape)
    finite = torch.where(low.isfinite(), low + 1, high - 1)
    return torch.where(low.isfinite() & high.isfinite(), (low + high) / 2, finite).expand(value.shape)
