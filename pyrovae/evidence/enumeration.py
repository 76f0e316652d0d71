"""log p(x) of discrete latents, by a sum over all of their assignments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Independent

from ..data.matching import Batch
from ..programs.checks import refuse_masked
from ..programs.rounding import log_joint_rounding
from ..programs.sites import Layout, Program, data_plate, log_prob_of, per_datum, plate_nesting, plate_sizes, sites_of
from ..programs.support import support_of
from ..programs.tracing import Substitute, Trace, explained, trace_from_prior, trace_program
from ..programs.wrappers import base_distribution
from .answer import Answer

__all__ = ["MOST_ASSIGNMENTS", "enumerate_latents"]

# The most assignments of one datum's latents that are summed.
MOST_ASSIGNMENTS = 2**20


def enumerate_latents(
    model: Program, batch: Batch, nesting: int, most: int, vectorize: bool, limit: int = MOST_ASSIGNMENTS
) -> Answer:
    """Sum the joint over every assignment of the latents of a datum, of which there may be no more than the limit."""
    first = trace_from_prior(model, None, batch, 1, None).model
    sites = [site for site in sites_of(first) if not site["is_observed"]]
    refuse_masked(sites)
    data = data_plate(list(sites_of(first)))
    nesting = max(nesting, plate_nesting(first))
    supports = [_support(site) for site in sites]
    numbers = [math.prod(plate_sizes(site, nesting)) // data.size * _independent(site)[1] for site in sites]
    each = [len(support) for support, number in zip(supports, numbers, strict=True) for _ in range(number)]
    total = math.prod(each)
    if total > limit:
        raise ValueError(
            f"The latents of one datum have {total:,} assignments, more than the {limit:,} that are summed: use log_marginal."
        )

    def trace_at(index: Tensor) -> Trace:
        """The model's trace at assignments by their numbers (M, B, all numbers)."""
        layout, assigned, column = Layout(len(index), data.size, nesting, data.dim), {}, 0
        for site, support, number in zip(sites, supports, numbers, strict=True):
            values = support[index[..., column : column + number]]  # of a vector of independent numbers each one by itself
            values = values.reshape(*index.shape[:2], -1, *site["fn"].event_shape)  # (M, B, n, *event)
            assigned[site["name"]] = layout.to_site(values, plate_sizes(site, nesting), site["fn"].event_shape)
            column += number
        with explained(len(index)):
            return trace_program(model, batch, len(index), nesting, Substitute(assigned))

    log_px = torch.full((data.size,), -math.inf, dtype=torch.float64, device=batch[0].device)
    highest, likeliest = log_px.clone(), torch.zeros(data.size, len(each), dtype=torch.long, device=log_px.device)
    most = max(1, most // data.size) if vectorize else 1
    for codes in _chunks(product(*(range(size) for size in each)), most):
        index = torch.as_tensor(codes, device=batch[0].device).reshape(len(codes), 1, -1).expand(-1, data.size, -1)
        trace = trace_at(index)
        for site, support in zip(sites, supports, strict=True):
            if not torch.equal(_support(trace.nodes[site["name"]]), support):
                raise ValueError(
                    f"The support of the latent site {site['name']!r} depends on other latents, so its assignments cannot be "
                    f"listed beforehand: give it a fixed one, or use log_marginal."
                )
        terms = [per_datum(site, log_prob_of(site), data, len(codes), nesting).double() for site in sites_of(trace)]
        joint = torch.stack(terms).sum(0)
        log_px = torch.logaddexp(log_px, torch.logsumexp(joint, 0))
        top, which = joint.max(0)
        likeliest = torch.where((top > highest)[:, None], index[which, 0], likeliest)
        highest = torch.maximum(top, highest)
    error = log_joint_rounding(trace_at(likeliest[None]), data, 1, nesting)[0]
    return Answer(log_px.cpu().numpy(), error.cpu().numpy(), total)


def _support(site: dict) -> Tensor:
    """The values of one site's support, or of each of its independent numbers, shape (C, *event)."""
    one, _ = _independent(site)
    if not one.has_enumerate_support:
        cure = "" if _is_discrete(site) else 'choose method="quadrature", or '
        raise ValueError(
            f"The latent site {site['name']!r} ({type(base_distribution(site)).__name__}) has no finite support to sum over: "
            f"{cure}use log_marginal."
        )
    try:
        values = one.enumerate_support(expand=False)
    except NotImplementedError as error:  # as of a Binomial whose total_count differs between data
        raise ValueError(
            f"The support of the latent site {site['name']!r} cannot be listed ({error}): use log_marginal."
        ) from error
    return values.reshape(len(values), *one.event_shape)


def _independent(site: dict) -> tuple[Any, int]:
    """The distribution of one of a site's independent numbers, and how many of them an event has."""
    one = site["fn"]
    while isinstance(one, Independent):
        one = one.base_dist
    return one, math.prod(site["fn"].event_shape) // max(1, math.prod(one.event_shape))


def _is_discrete(site: dict) -> bool:
    try:
        return bool(support_of(site["fn"]).is_discrete)
    except NotImplementedError:  # raised by a distribution without a support
        return False


def _chunks(codes: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    chunk = []
    for code in codes:
        chunk.append(code)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
