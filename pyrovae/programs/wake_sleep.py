"""Simulated data: draw (z, x) from the model, and score the guide at them."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .sites import Program, data_plate, latents_of, log_prob_of, per_datum, plate_nesting, sites_of
from .support import support_of
from .tracing import Trace, trace_program
from .wrappers import is_factor

__all__ = ["simulated_args", "simulated_log_guide", "unconditioned", "was_observed"]


def unconditioned(model: Program) -> Program:
    """The model with its observed sites drawn instead of observed."""
    return poutine.uncondition(model)


def was_observed(site: dict) -> bool:
    """Whether an :func:`unconditioned` model drew a site that the model itself observes; false for ``pyro.factor``."""
    return "was_observed" in site["infer"] and not is_factor(site)


def simulated_log_guide(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """Simulate one pair (z, x) per datum from the model, and return its log q(z|x), shape (B,), in nats.

    Raises:
        ValueError: an observed site's ``obs`` is not one of the programs' arguments, so the guide cannot run on simulated data.
    """
    with torch.no_grad():
        simulated = poutine.trace(unconditioned(model)).get_trace(*args, **kwargs)
    replaced = simulated_args(simulated, (*args, *kwargs.values()))
    positional, named = replaced[: len(args)], dict(zip(kwargs, replaced[len(args) :], strict=True))
    trace = trace_program(poutine.replay(guide, trace=simulated), positional, kwargs=named)
    sites = latents_of(trace)
    data, nesting = data_plate(sites), plate_nesting(trace)
    return torch.cat([per_datum(site, log_prob_of(site), data, 1, nesting) for site in sites]).sum(0)


def simulated_args(simulated: Trace, args: tuple) -> tuple:
    """The programs' arguments, with simulated values in place of what the model observes of them.

    Raises:
        ValueError: an observed site's ``obs`` is not one of the arguments.
    """
    replacements: dict[int, Tensor] = {}
    for site in sites_of(simulated):
        if not was_observed(site):
            continue
        obs = site["infer"]["obs"]
        matching = [arg for arg in args if arg is obs] or [arg for arg in args if _same_values(arg, obs)][:1]
        if not matching:
            raise ValueError(
                f"The model observes at site {site['name']!r} a value that is not one of the programs' arguments, so the guide "
                f"cannot run on simulated data: observe the argument itself, or use the wake phase."
            )
        replacements |= {id(arg): _in_type_of(arg, site) for arg in matching}
    return tuple(replacements.get(id(arg), arg) for arg in args)


def _in_type_of(argument: Tensor, site: dict) -> Tensor:
    """A site's simulated value in the type of an argument, or in a type that can hold it: counts exceed 255, fractions stay."""
    value, dtype = site["value"], argument.dtype
    if not dtype.is_floating_point and dtype != torch.bool:
        if not value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, dtype))
        try:
            dtype = torch.int64 if support_of(site["fn"]).is_discrete else value.dtype
        except NotImplementedError:  # raised by a distribution without a support
            dtype = value.dtype
    return value.to(dtype)


def _same_values(argument: Any, obs: Tensor) -> bool:
    # A program may convert its argument to another type before it observes it, such as counts to floats.
    return isinstance(argument, Tensor) and argument.shape == obs.shape and torch.equal(argument.to(obs), obs)
