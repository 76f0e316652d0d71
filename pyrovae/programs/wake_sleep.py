"""Simulated data: draw (z, x) from the model, and score the guide at them."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from .log_weights import _in_type_of
from .sites import Program, data_plate, latents_of, log_prob_of, per_datum, plate_nesting, sites_of
from .wrappers import is_factor


def simulated_log_guide(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """Dream one pair (z, x) per datum from the model itself, and return its log q(z|x), shape (B,), in nats.

    Raises:
        ValueError: an observed site's ``obs`` is not one of the programs' arguments, so the guide cannot be shown a dream.
    """
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    values = tuple(kwargs.values())
    shown = simulated_args(dream, (*args, *values))
    dreamt, dreamt_kwargs = shown[: len(args)], dict(zip(kwargs, shown[len(args) :], strict=True))
    trace = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*dreamt, **dreamt_kwargs)
    sites = latents_of(prune_subsample_sites(trace))
    data, nesting = data_plate(sites), plate_nesting(trace)
    return torch.cat([per_datum(site, log_prob_of(site), data, 1, nesting) for site in sites]).sum(0)


def simulated_args(dream: Trace, args: tuple) -> tuple:
    """The programs' arguments with what the model observed of them replaced by what it dreamt.

    Raises:
        ValueError: an observed site's ``obs`` is not one of the arguments.
    """
    swaps: dict[int, Tensor] = {}
    for site in sites_of(dream):
        if "was_observed" not in site["infer"] or is_factor(site):
            continue
        obs = site["infer"]["obs"]
        shown = [arg for arg in args if arg is obs] or [arg for arg in args if _same_values(arg, obs)][:1]
        if not shown:
            raise ValueError(
                f"The model dreams site {site['name']!r}, but its obs is not one of the programs' arguments as they were "
                f"given, so the guide cannot be shown the dream: observe the argument itself (the wake phase needs no dream)."
            )
        swaps |= {id(arg): _in_type_of(arg, site) for arg in shown}
    return tuple(swaps.get(id(arg), arg) for arg in args)


def _same_values(argument: Any, obs: Tensor) -> bool:
    # A program may bring its argument to another type, as counts to floats, before it observes them.
    return isinstance(argument, Tensor) and argument.shape == obs.shape and torch.equal(argument.to(obs), obs)
