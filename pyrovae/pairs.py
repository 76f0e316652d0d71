"""Pairs: what one run of a model and a guide tells about them before they are trained or scored."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from .checks import check_sites, why_no_weights
from .data import Batch, fingerprints
from .evidence import Measure
from .traces import (
    Program,
    Traces,
    check_finite,
    check_support,
    data_plate,
    evaluation_mode,
    law_of,
    log_prob_of,
    num_observed_of,
    per_datum,
    plate_nesting,
    same_random_stream,
    sites_of,
    support_of,
    trace_pair,
)
from .weights import read_weights


@dataclass(frozen=True)
class PairInfo:
    """What one run of a pair tells about it.

    Attributes:
        max_plate_nesting: how many plate dimensions it uses.
        num_data: data in the batch.
        scale: N/B of a subsampled data plate, else 1.0.
        num_dims: numbers per datum, observed or masked.
        common_scale: what one poutine.scale around all sites says, else 1.0.
        no_weights: why p(x, z) / q(z|x) is no importance weight, where it is none; see :func:`pyrovae.checks.why_no_weights`.
        num_observed: numbers observed in this batch; with a mask fewer than ``num_dims * num_data``.
        latents: names of the latent sites.
        not_reparameterized: those of them without a reparameterised sampler.
        enumerated: latent sites of the model that the guide leaves to Pyro's enumeration.
        discrete: latent sites with a discrete support.
        num_densities: those of the numbers observed that have a density.
        num_probabilities: those that have a probability; a one-hot vector is one.
        given: what of a datum the likelihood conditions on, as its distribution's ``conditional_on`` says.
        rounding: what one rounding of a datum's largest term comes to, shape (B,), in nats.
    """

    max_plate_nesting: int
    num_data: int
    scale: float
    num_dims: int
    latents: tuple[str, ...]
    not_reparameterized: tuple[str, ...]
    enumerated: tuple[str, ...] = ()
    num_observed: int = 0
    common_scale: float = 1.0
    no_weights: str | None = None
    discrete: tuple[str, ...] = ()
    num_densities: float = 0
    num_probabilities: float = 0
    given: tuple[str, ...] = ()
    rounding: Tensor | None = None

    def count(self, batch: tuple) -> float:
        """How many data the loss of a batch of such a pair is a sum over."""
        # A subsampled plate scales the loss by N/B, so it stands for all N data whatever the batch.
        return (len(batch[0]) if self.scale == 1.0 else self.num_data * self.scale) * self.common_scale


def inspect_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> PairInfo:
    """Run a pair once, without touching the random stream, and say what it is made of.

    Raises:
        ValueError: as :func:`log_weights`; also where an observed value lies outside its distribution's support.
    """
    check_finite((*args, *kwargs.values()))
    with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide), poutine.block():
        traces = trace_pair(model, guide, args, kwargs, 1, None)
        model_trace, guide_trace = traces.model, traces.guide
        for site in sites_of(model_trace):
            if site["is_observed"]:
                check_support(site)
        enumerated = tuple(
            site["name"]
            for site in sites_of(model_trace)
            if site["infer"].get("enumerate") and not site["is_observed"] and site["name"] not in guide_trace
        )
        for name in enumerated:
            model_trace.remove_node(name)
        check_sites(traces)
        weights = read_weights(traces, 1)
        no_weights = why_no_weights(model, guide, args, kwargs, traces)
        rounding = _rounding(traces)
    observed = [site for site in sites_of(model_trace) if site["is_observed"]]
    data = data_plate([*sites_of(model_trace), *sites_of(guide_trace)])
    latent_sites = [site for site in sites_of(guide_trace) if not site["is_observed"]]
    # A label that is no dimension of the data is a part of their probability all the same.
    counted = [site | {"infer": {}} for site in observed]
    numbers = [(num_observed_of(site, data) / _redundant(site), _fraction_discrete(site)) for site in counted]
    return PairInfo(
        max_plate_nesting=plate_nesting(model_trace, guide_trace),
        num_data=weights.num_data,
        scale=weights.scale,
        num_dims=weights.num_dims,
        latents=tuple(site["name"] for site in latent_sites),
        not_reparameterized=weights.not_reparameterized,
        enumerated=enumerated,
        num_observed=sum(num_observed_of(site, data) for site in observed),
        common_scale=weights.common_scale,
        no_weights=no_weights,
        discrete=tuple(site["name"] for site in latent_sites if _is_discrete(site)),
        num_densities=sum(number * (1 - discrete) for number, discrete in numbers),
        num_probabilities=sum(number * discrete for number, discrete in numbers),
        given=tuple(sorted({what for site in observed for what in _conditions(site)})),
        rounding=rounding,
    )


def _rounding(traces: Traces) -> Tensor:
    """What one rounding of a datum's largest site comes to, before sites cancel, shape (B,), in nats."""
    sites = [*sites_of(traces.model), *sites_of(traces.guide)]
    data, nesting = data_plate(sites), plate_nesting(traces.model, traces.guide)
    terms = [per_datum(site, log_prob_of(site), data, 1, nesting)[0] for site in sites]
    largest = torch.stack([term.double().abs() for term in terms]).nan_to_num(posinf=0.0).amax(0)
    return largest * max(torch.finfo(term.dtype).eps for term in terms)


def _is_discrete(site: dict) -> bool:
    try:
        return bool(support_of(site["fn"]).is_discrete)
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return False


def _fraction_discrete(site: dict) -> float:
    """The fraction of a site's numbers that have a probability and no density."""
    return float(getattr(law_of(site), "fraction_discrete", _is_discrete(site)))


def _redundant(site: dict) -> int:
    """How many numbers stand for one: all of a one-hot vector."""
    law = law_of(site)
    return law.event_shape[-1] if _is_discrete(site) and "OneHot" in type(law).__name__ else 1


def _conditions(site: dict) -> tuple[str, ...]:
    """What of the datum a likelihood conditions on: what it says, and the total of a multinomial."""
    law = site["fn"]
    while not hasattr(law, "conditional_on") and hasattr(law, "base_dist"):
        law = law.base_dist
    if type(law_of(site)).__name__ in ("Multinomial", "DirichletMultinomial"):
        return ("the total",)
    return tuple(getattr(law, "conditional_on", ()))


def scored_data(info: PairInfo, batch: Batch) -> dict[str, np.ndarray]:
    """What :func:`evidence_fields` needs of one batch, as arrays over its data."""
    size, rounding = info.num_data, info.rounding
    counts = {"observed": info.num_observed, "density": info.num_densities, "mass": info.num_probabilities}
    arrays = {name: np.full(size, number / size) for name, number in counts.items()}
    arrays["rounding"] = np.zeros(size) if rounding is None else rounding.cpu().numpy()
    # Data along another dimension than the first have no rows to tell apart.
    return arrays | {"fingerprint": fingerprints(batch) if len(batch[0]) == size else np.zeros(size, np.int64)}


SCORED_DATA = ("observed", "density", "mass", "rounding", "fingerprint")


def evidence_fields(parts: list[dict[str, np.ndarray]], given: tuple[str, ...]) -> dict[str, Any]:
    """What evidence says of the data that it is of, from :func:`scored_data` of consecutive batches."""
    whole = {name: np.concatenate([part[name] for part in parts]) for name in SCORED_DATA}
    num_dims, density, mass = (_whole(float(whole[name].mean())) for name in ("observed", "density", "mass"))
    known = whole["fingerprint"] if whole["fingerprint"].any() else None
    return {
        "num_dims": num_dims,
        "measure": Measure(density, mass, given),
        "rounding": whole["rounding"],
        "fingerprint": known,
    }


def _whole(number: float) -> float:
    return round(number) if math.isclose(number, round(number), rel_tol=1e-12) else number


def check_steady_scale(model: Program, guide: Program, args: tuple[Tensor, ...], info: PairInfo) -> None:
    """Refuse one poutine.scale around all sites that depends on the size of the batch, where batches are of several sizes."""
    fewer = inspect_pair(model, guide, *(arg[:-1] for arg in args)) if info.common_scale != 1.0 else info
    if abs(fewer.common_scale - info.common_scale) > 1e-6 * abs(info.common_scale):
        raise ValueError(
            f"The scale around all sites is {info.common_scale:g} for {len(args[0])} data and {fewer.common_scale:g} for one "
            f"less, so the last and smaller batch would weigh otherwise: leave the scale out, since each step follows the mean "
            f"per datum."
        )


def find_parameters(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The unconstrained leaf parameters of a pair, as Pyro's SVI finds them, each once.

    Parameters of an ``nn.Module`` whose bound method a program is come along, whether or not it calls ``pyro.module``.

    Raises:
        ValueError: a module's parameter is hidden by another one of the same name in Pyro's store, so that it would never
            train.
    """
    with (
        torch.no_grad(),
        same_random_stream(args),
        evaluation_mode(model, guide),
        poutine.trace(param_only=True) as capture,
    ):
        trace_pair(model, guide, args, kwargs, 1, None)
    found: dict[int, Tensor] = {}
    for name, site in capture.trace.nodes.items():
        if site["type"] != "param":
            continue
        given = site["args"][1] if len(site["args"]) > 1 else None
        live = site["value"].unconstrained() if hasattr(site["value"], "unconstrained") else site["value"]
        if isinstance(given, nn.Parameter) and given is not live:
            raise ValueError(
                f"Pyro's parameter store already holds {name!r} from another module, so this one would never train: "
                f"call pyro.clear_param_store() before building it, or register it under another name."
            )
        found.setdefault(id(live), live)
    for program in (model, guide):
        owner = getattr(program, "__self__", program)
        if isinstance(owner, nn.Module):
            for parameter in owner.parameters():
                found.setdefault(id(parameter), parameter)
    return [parameter for parameter in found.values() if parameter.requires_grad and parameter.is_leaf]


@dataclass(frozen=True)
class FirstRun:
    """What the first run of a pair on a batch settles for all later ones.

    Attributes:
        parameters: the unconstrained leaf parameters.
        info: what the pair is made of.
        dtype: the floating type that its data must have.
        device: where its parameters live.
        floating: places of the integer arguments that its networks take as floating-point numbers.
    """

    parameters: list[Tensor]
    info: PairInfo
    dtype: torch.dtype
    device: torch.device
    floating: tuple[int, ...] = ()


def first_run(model: Program, guide: Program, *args: Tensor) -> FirstRun:
    """Find a pair's parameters, structure, floating type and device from one batch.

    NumPy's arrays are float64 on the CPU, where most networks are float32 and some are on a GPU. Which a program wants shows
    only when it runs, so a batch that fails as it is runs once more in torch's default type, then with integers (first those of
    the first argument) in it too, then on the GPU.

    Raises:
        ValueError: as :func:`inspect_pair` and :func:`find_parameters`.
        RuntimeError: the pair fails in all of them; the message is torch's.
    """
    default = torch.get_default_dtype()
    integers = tuple(i for i, arg in enumerate(args) if not arg.is_floating_point() and arg.dtype != torch.bool)
    devices = [None, torch.device("cuda")] if torch.cuda.is_available() else [None]
    casts = dict.fromkeys([(), integers[:1], integers])
    attempts = [(args, ()), *((_moved(args, default, device, cast), cast) for device in devices for cast in casts)]
    for attempt, cast in attempts:
        try:
            parameters, floating = find_parameters(model, guide, *attempt), cast
            break
        except RuntimeError:
            if attempt is attempts[-1][0]:
                raise
    given = next((arg for arg in attempt if arg.is_floating_point()), None)
    like = next((parameter for parameter in parameters if parameter.is_floating_point()), given)
    dtype, device = (default, attempt[0].device) if like is None else (like.dtype, like.device)
    for index in floating:
        warnings.warn(
            f"The pair takes floating-point numbers, so array {index + 1} of the data, of {args[index].dtype}, is cast to "
            f"{dtype}: pass floats to say so yourself.",
            stacklevel=3,
        )
    moved = _moved(args, dtype, device, floating)
    return FirstRun(parameters, inspect_pair(model, guide, *moved), dtype, device, floating)


def _moved(
    args: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device | None, floating: tuple[int, ...] = ()
) -> tuple[Tensor, ...]:
    """Arguments with those that float, or are to, in a type, and all on a device."""
    cast = [arg.is_floating_point() or index in floating for index, arg in enumerate(args)]
    return tuple(arg.to(device=device, dtype=dtype if each else None) for arg, each in zip(args, cast, strict=True))
