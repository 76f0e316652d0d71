"""Wrappers that Pyro puts around a distribution: independent dimensions, masks and expansions; factors and deltas."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions import Delta, Distribution, ExpandedDistribution, MaskedDistribution, Unit
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

__all__ = [
    "base_distribution", "is_enumerable", "is_factor", "is_masked_anywhere", "is_one_hot", "is_point", "is_reparameterized",
    "layers_of", "mask_of", "masks_of", "same_mask", "with_tensors",
]  # fmt: skip

Mask = Tensor | bool
# A discrete latent with at most this many values is enumerated.
MOST_VALUES = 64
WRAPPERS = (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution)


def is_factor(site: dict) -> bool:
    """Whether a site is a ``pyro.factor``, which has a log-probability and no value."""
    return isinstance(site["fn"], Unit)


def layers_of(distribution: Any) -> Iterator[Any]:
    """A distribution and the ones that it wraps (``Independent``, masked, expanded), from the outside in."""
    yield distribution
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
        yield distribution


def base_distribution(site: dict) -> Any:
    """A site's distribution without the wrappers around it."""
    *_, distribution = layers_of(site["fn"])
    return distribution


def is_enumerable(distribution: Any) -> bool:
    """Whether a distribution lists its values, and they are at most ``MOST_VALUES``."""
    try:
        return bool(distribution.has_enumerate_support) and len(distribution.enumerate_support(expand=False)) <= MOST_VALUES
    except NotImplementedError:  # as of a Binomial whose total_count differs between data
        return False


def is_point(site: dict) -> bool:
    """Whether a site is a ``Delta``."""
    return isinstance(base_distribution(site), Delta)


def is_one_hot(site: dict) -> bool:
    """Whether the values of a site are one-hot vectors."""
    return isinstance(base_distribution(site), torch.distributions.OneHotCategorical)


def is_reparameterized(site: dict) -> bool:
    """Whether the gradient of an expectation over a site flows through its samples alone, without a score.

    A rejection sampler has ``has_rsample``, and needs the score of the accepted draws too.
    """
    distribution = base_distribution(site)
    own = getattr(type(distribution), "score_parts", None)
    return bool(site["fn"].has_rsample) and own in (None, Distribution.score_parts, TorchDistributionMixin.score_parts)


def with_tensors(distribution: Any, change: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> Any:
    """A distribution whose parameters of one floating type are changed, also those of the distributions inside it.

    Transforms keep theirs.
    """
    other = copy.copy(distribution)
    other._validate_args = False
    for name, part in vars(distribution).items():
        if isinstance(part, Tensor) and part.dtype == dtype:
            other.__dict__[name] = change(part)
        elif isinstance(part, torch.distributions.Distribution):
            other.__dict__[name] = with_tensors(part, change, dtype)
    return other


def masks_of(site: dict) -> list[tuple[Mask, int]]:
    """The masks around a site and inside its distribution, each with the number of event dimensions to its right."""
    found = [(site["mask"], site["fn"].event_dim)]
    found += [
        (distribution._mask, distribution.event_dim)
        for distribution in layers_of(site["fn"])
        if isinstance(distribution, MaskedDistribution)
    ]
    return [(mask, event_dim) for mask, event_dim in found if mask is not None and mask is not True]


def mask_of(site: dict) -> Mask:
    """The conjunction of a site's masks, true where its numbers count: a bool, or a tensor that broadcasts to its value."""
    joint: Mask = True
    for mask, event_dim in masks_of(site):
        if isinstance(mask, Tensor):
            mask = mask.reshape(mask.shape + (1,) * event_dim)
        joint = mask if joint is True else torch.as_tensor(joint) & mask if mask is not False else False
    return joint


def is_masked_anywhere(site: dict) -> bool:
    """Whether a mask leaves out some number of a site. It reads the mask's values, so it cannot be captured in a graph."""
    mask = mask_of(site)
    return not bool(mask.all()) if isinstance(mask, Tensor) else not mask


def same_mask(site: dict, other: dict) -> bool:
    """Whether both programs mask the same numbers of a latent. It reads the masks' values."""
    if not masks_of(site) and not masks_of(other):
        return True
    masks = [torch.as_tensor(mask_of(each), device=each["value"].device) for each in (site, other)]
    shape = torch.broadcast_shapes(*(mask.shape for mask in masks))
    return torch.equal(masks[0].expand(shape), masks[1].expand(shape))
