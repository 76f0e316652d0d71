"""What Pyro wraps around a distribution: events, masks, expansions, factors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pyro.distributions import Delta, Distribution, MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

Mask = Tensor | bool


def is_factor(site: dict) -> bool:
    """Whether a site is a ``pyro.factor``, which observes nothing."""
    return type(site["fn"]).__name__ == "Unit"


def layers_of(distribution: Any) -> Iterator[Any]:
    """A distribution, and what Pyro wraps in it: independent dimensions, masks and expansions, from the outside in."""
    yield distribution
    while type(distribution).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        distribution = distribution.base_dist
        yield distribution


def base_distribution(site: dict) -> Any:
    """A site's distribution without what Pyro wraps around it."""
    *_, distribution = layers_of(site["fn"])
    return distribution


def is_point(site: dict) -> bool:
    """Whether a site is a ``Delta``."""
    return isinstance(base_distribution(site), Delta)


def is_reparameterized(site: dict) -> bool:
    """Whether the gradient of an expectation over a site is that of its samples alone, without a score.

    A rejection sampler has ``has_rsample``, and a score of what it accepted besides.
    """
    distribution = base_distribution(site)
    own = getattr(type(distribution), "score_parts", None)
    return bool(site["fn"].has_rsample) and own in (None, Distribution.score_parts, TorchDistributionMixin.score_parts)


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
