"""Checks: what one run of both programs shows, site by site, before a number of theirs is believed."""

from __future__ import annotations

import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .sites import Measure, is_factor, is_masked_anywhere, is_point, law_of, mask_of, measure_of, same_mask
from .traces import (
    Program,
    Traces,
    check_batch,
    check_same_latents,
    data_plate,
    evaluation_mode,
    log_prob_of,
    plate_nesting,
    plate_sizes,
    plates_of,
    same_random_stream,
    sites_of,
    support_of,
    trace_pair,
)


def look_at(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """Check a pair that is to be weighed, by runs that leave no trace, and say how many plate dimensions it uses.

    Raises:
        ValueError: as :func:`check_sites`; also where the guide has no density.
    """
    with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide), poutine.block():
        traces = trace_pair(model, guide, args, kwargs, 1, None)
        check_sites(traces)
        refuse_no_weights(why_no_weights(model, guide, args, kwargs, traces))
    return plate_nesting(traces.model, traces.guide)


def check_sites(traces: Traces) -> None:
    """Refuse a pair whose latents are not of one kind in both programs, or whose observed values are broadcast.

    Raises:
        ValueError: the sites' names, plates, event shapes, measures or masks differ between model and guide, or an observed
            value has not the shape of its site.
    """
    model_sites, guide_sites = list(sites_of(traces.model)), list(sites_of(traces.guide))
    _check_observed_in_guide(traces, model_sites)
    check_same_latents(model_sites, guide_sites)
    data_plate(model_sites + guide_sites)
    nesting = plate_nesting(traces.model, traces.guide)
    in_guide = {site["name"]: site for site in guide_sites}
    for site in model_sites:
        if not site["is_observed"]:
            _check_latent(site, in_guide[site["name"]], nesting)
    for site in model_sites + guide_sites:
        check_batch(site, site["fn"].batch_shape, plate_sizes(site, nesting))
    for site in model_sites:
        if site["is_observed"] and not is_factor(site) and isinstance(site["value"], Tensor):
            _check_observed(site)


def _check_observed_in_guide(traces: Traces, model_sites: list[dict]) -> None:
    observed = {site["name"] for site in traces.guide_observed}
    for site in model_sites:
        if not site["is_observed"] and site["name"] in observed:
            raise ValueError(
                f"The guide observes site {site['name']!r}, which the model samples: give the model's site the same "
                f"obs, or sample it in the guide."
            )


def _check_latent(site: dict, drawn: dict, nesting: int) -> None:
    name = site["name"]
    shapes = [(tuple(plate_sizes(each, nesting)), tuple(each["fn"].event_shape)) for each in (site, drawn)]
    for what, model, guide in zip(("plates of sizes", "event shape"), *shapes, strict=True):
        if model != guide:
            raise ValueError(
                f"The latent site {name!r} has {what} {model} in the model and {guide} in the guide, so one would be broadcast "
                f"and counted several times: give it the same plates and the same event shape in both programs."
            )
    law, measures = type(law_of(site)).__name__, _measures(site, drawn)
    if measures is not None and not is_point(drawn) and not measures[1].divides(measures[0]):
        raise ValueError(
            f"The latent site {name!r} has {measures[0]} in the model ({law}) and {measures[1]} in the guide "
            f"({type(law_of(drawn)).__name__}), and a ratio of the two is no weight: sample it in the guide from a "
            f"distribution over the same values, such as {law}."
        )
    if not same_mask(site, drawn):
        raise ValueError(
            f"The latent site {name!r} is masked otherwise in the model than in the guide, so log p - log q would leave out "
            f"one of the two: put the same mask around it, or the same .mask() inside its distribution, in both programs."
        )


def _measures(site: dict, drawn: dict) -> tuple[Measure, Measure] | None:
    try:
        return measure_of(site, support_of(site["fn"])), measure_of(drawn, support_of(drawn["fn"]))
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return None


def _check_observed(site: dict) -> None:
    name, law, value = site["name"], site["fn"], site["value"]
    event_dim = law.event_dim
    if event_dim and value.shape[-event_dim:] != law.event_shape:
        raise ValueError(
            f"The value observed at site {name!r} has shape {tuple(value.shape)}, but its distribution has events of shape "
            f"{tuple(law.event_shape)}, so it would be broadcast and scored several times: give it data of that shape."
        )
    batch = value.shape[: value.dim() - event_dim]
    for dim, size in [(frame.dim, frame.size) for frame in plates_of(site) if frame.vectorized]:
        if len(batch) >= -dim and batch[dim] == 1 != size:
            raise ValueError(
                f"The value observed at site {name!r} has shape {tuple(value.shape)}, but a plate of size {size} at "
                f"dimension {dim}, so it would be broadcast and scored {size} times: give it data of that size, or "
                f".expand() it where that is meant."
            )


def why_no_weights(model: Program, guide: Program, args: tuple, kwargs: dict, traces: Traces) -> str | None:
    """Why p(x, z) / q(z|x) is no importance weight of a pair, from this run of it and others; ``None`` where it is one.

    Such a pair may be trained all the same, as to a point (MAP).
    """
    latents = list(sites_of(traces.guide))
    auxiliary = [site for site in latents if site["infer"].get("is_auxiliary")]
    masked = [site for site in latents if is_masked_anywhere(site)]
    if not auxiliary and not masked and not any(is_point(site) for site in latents):
        return None
    again = trace_pair(model, guide, args, kwargs, 1, None).guide
    points = _points(traces, auxiliary, again)
    if points:
        return (
            f"The guide has no density q(z|x), since {', '.join(map(repr, points))} is a Delta that no auxiliary site of the "
            f"same dimension feeds (or such an auxiliary site), so a weight p(x, z) / q(z|x) means nothing: train with it "
            f"where a point is meant (MAP), and score with a guide that has a density, or with pyrovae.exact or pyrovae.ais."
        )
    if masked and not _model_ignores(masked, model, args, kwargs, traces, again):
        return (
            f"The latent site {masked[0]['name']!r} is masked where the model's other sites depend on it, so the answer would "
            f"be another one for each guide: mask what depends on it too, or leave out the mask."
        )
    return None


def refuse_no_weights(why: str | None) -> None:
    """Refuse to weigh draws of the guide, for the reason that :func:`why_no_weights` found."""
    if why is not None:
        raise ValueError(why)


def _model_ignores(masked: list[dict], model: Program, args: tuple, kwargs: dict, traces: Traces, again: Trace) -> bool:
    """Whether other values in the masked places leave every log-probability of the model as it is."""
    other = traces.guide.copy()
    for site in masked:
        kept = torch.as_tensor(mask_of(site), device=site["value"].device)
        value = torch.where(kept, site["value"], again.nodes[site["name"]]["value"])
        other.nodes[site["name"]] = {**site, "value": value}
    moved = poutine.trace(poutine.replay(model, trace=other)).get_trace(*args, **kwargs)
    return all(
        torch.allclose(log_prob_of(site), log_prob_of(moved.nodes[site["name"]]), rtol=1e-4, equal_nan=True)
        for site in sites_of(traces.model)
    )


def _points(traces: Traces, auxiliary: list[dict], again: Trace) -> tuple[str, ...]:
    """The guide's sites that leave q(z|x) without a density.

    They are each ``Delta`` that no auxiliary site feeds, since it is the same in both runs, and all of them, auxiliary sites
    too, where these are of another dimension than the latents that they feed.
    """
    priors = {site["name"]: site for site in sites_of(traces.model) if not site["is_observed"]}
    deltas = [site for site in sites_of(traces.guide) if is_point(site) and not _is_a_point_in_both(site, priors)]
    fixed = tuple(site["name"] for site in deltas if torch.equal(site["value"], again.nodes[site["name"]]["value"]))
    if fixed:
        return fixed
    sizes = [_free_numbers(priors[site["name"]]) for site in deltas], [_free_numbers(site) for site in auxiliary]
    if None in sizes[0] + sizes[1] or sum(map(int, sizes[0])) == sum(map(int, sizes[1])):  # type: ignore[arg-type]
        return ()
    return tuple(site["name"] for site in auxiliary + deltas)


def _is_a_point_in_both(site: dict, priors: dict[str, dict]) -> bool:
    return site["name"] in priors and is_point(priors[site["name"]])


def _free_numbers(site: dict) -> int | None:
    try:
        measure = measure_of(site, support_of(site["fn"]))
    except NotImplementedError:
        return None
    each = measure.dims if measure.kind == "density" else site["fn"].event_shape.numel()
    return None if each is None else each * site["fn"].batch_shape.numel()
