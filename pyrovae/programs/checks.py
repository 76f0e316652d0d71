"""Checks of a pair, site by site, by one run of both programs."""

from __future__ import annotations

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from .sites import Program, check_batch, data_plate, log_prob_of, plate_nesting, plate_sizes, plates_of, sites_of
from .support import ReferenceMeasure, measure_of, support_of
from .tracing import Traces, inspection, trace_pair
from .wrappers import base_distribution, is_factor, is_masked_anywhere, is_point, mask_of, same_mask

__all__ = [
    "check_finite", "check_same_latents", "check_scores", "check_sites", "check_support", "improper_latents", "look_at",
    "refuse_improper", "refuse_masked", "refuse_no_weights", "why_no_weights",
]  # fmt: skip


def check_same_latents(model_sites: list[dict], guide_sites: list[dict]) -> None:
    """Refuse programs whose latent sites differ."""
    in_model = {site["name"] for site in model_sites if not site["is_observed"]}
    observed = {site["name"] for site in model_sites if site["is_observed"]}
    in_guide = {site["name"] for site in guide_sites if not site["is_observed"] and not site["infer"].get("is_auxiliary")}
    for name in sorted(in_model - in_guide):
        if not observed:
            raise ValueError(
                f"The model observes nothing, and its site {name!r} is not in the guide: give the site of the data obs=x, and "
                f"sample every other one in the guide under the same name."
            )
        raise ValueError(
            f"The model's latent site {name!r} is not in the guide: sample it there under the same name, or sum it out with "
            f"pyro.infer.TraceEnum_ELBO."
        )
    for name in sorted(in_guide - in_model):
        why = "is observed in the model" if name in observed else "is not in the model"
        raise ValueError(f"The guide's site {name!r} {why}: give both programs the same latent sites.")
    if not observed:
        raise ValueError("The model observes nothing: give its data site obs=x, and pass x to both programs.")


def check_scores(guide_sites: list[dict]) -> None:
    """Refuse guide sites that have no score."""
    for site in guide_sites:
        distribution = base_distribution(site)
        if isinstance(distribution, pyro.distributions.Delta) and distribution.v.requires_grad:
            raise ValueError(
                f"The guide's site {site['name']!r} is a learned Delta, which has no score, so this estimator would never move "
                f"it: choose one that follows its path, such as elbo."
            )


def check_finite(args: tuple) -> None:
    """Refuse NaN and infinity in the arguments."""
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and not bool(torch.isfinite(arg).all()):
            bad = (~torch.isfinite(arg)).flatten(1).any(1) if arg.dim() > 1 else ~torch.isfinite(arg)
            raise ValueError(
                f"The data must be finite, got NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first row "
                f"{int(bad.nonzero()[0])}: drop or repair them; where values are missing, pass a mask beside zeros."
            )


def check_support(site: dict) -> None:
    """Refuse observed values outside their distribution's support."""
    if is_factor(site) or is_point(site) or not isinstance(site["value"], Tensor):
        return
    try:
        inside = site["fn"].support.check(site["value"])
    except NotImplementedError:  # raised by a distribution without a support
        return
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"])
    outside = (~inside & mask).nonzero()
    if not len(outside):
        return
    distribution = base_distribution(site)
    name = type(distribution).__name__
    low, high = site["value"].min().item(), site["value"].max().item()
    usual = "binarise" if isinstance(distribution, torch.distributions.Bernoulli) else "rescale"
    if isinstance(distribution, torch.distributions.Categorical):
        usual = f"number the classes from 0 to {distribution.probs.shape[-1] - 1} in"
    cure = getattr(distribution, "support_cure", usual)
    if hasattr(distribution, "columns"):  # a table: say which columns
        wrong = (~distribution.support.check(site["value"])).flatten(0, -2).any(0).nonzero().flatten().tolist()
        name = f"column(s) {wrong} of {name}"
    raise ValueError(
        f"The data have values outside the support of {name} at site {site['name']!r}, in {len(outside)} of the "
        f"{inside.numel()} it was given (they range from {low:g} to {high:g}): {cure} them, or choose another likelihood."
    )


def refuse_masked(sites: list[dict]) -> None:
    """Refuse latents that a mask, around the site or inside its distribution, leaves out in part. It reads the mask."""
    for site in sites:
        if not site["is_observed"] and is_masked_anywhere(site):
            raise ValueError(
                f"The latent site {site['name']!r} is masked, so its density does not integrate to one over its values: "
                f"mask the observed sites only, or use log_marginal with the guide's draws."
            )


def improper_latents(model: Trace) -> tuple[str, ...]:
    """The latent sites whose prior does not integrate to one."""
    latents = [site for site in sites_of(model) if not site["is_observed"]]
    return tuple(site["name"] for site in latents if isinstance(base_distribution(site), pyro.distributions.ImproperUniform))


def refuse_improper(names: tuple[str, ...]) -> None:
    """Refuse to score a pair with improper priors."""
    if names:
        raise ValueError(
            f"The prior of the latent site {names[0]!r} is improper (ImproperUniform), so p(x) is no density: give the site a "
            f"prior that integrates to one before scoring; training takes it as it is."
        )


def look_at(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """Check a pair that is to be weighed, by runs without side effects, and return its number of plate dimensions.

    Raises:
        ValueError: as :func:`check_sites`; or the guide has no density.
    """
    with inspection(model, guide, args):
        traces = trace_pair(model, guide, args, kwargs, 1, None)
        check_sites(traces)
        refuse_improper(improper_latents(traces.model))
        refuse_no_weights(why_no_weights(model, guide, args, kwargs, traces))
    return plate_nesting(traces.model, traces.guide)


def check_sites(traces: Traces) -> None:
    """Refuse a pair whose latents differ in kind between the programs, or whose observed values are broadcast.

    Raises:
        ValueError: the names, plates, event shapes, reference measures or masks of latents differ between model and guide, or
            an observed value does not have the shape of its site.
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


def _check_latent(site: dict, guide_site: dict, nesting: int) -> None:
    name = site["name"]
    shapes = [(tuple(plate_sizes(each, nesting)), tuple(each["fn"].event_shape)) for each in (site, guide_site)]
    for what, model, guide in zip(("plates of sizes", "event shape"), *shapes, strict=True):
        if model != guide:
            raise ValueError(
                f"The latent site {name!r} has {what} {model} in the model and {guide} in the guide, so one would be broadcast "
                f"and counted several times: give it the same plates and the same event shape in both programs."
            )
    distribution, measures = type(base_distribution(site)).__name__, _measures(site, guide_site)
    if measures is not None and not is_point(guide_site) and not measures[1].divides(measures[0]):
        raise ValueError(
            f"The latent site {name!r} has {measures[0]} in the model ({distribution}) and {measures[1]} in the guide "
            f"({type(base_distribution(guide_site)).__name__}), and their ratio is not a weight: sample it in the guide from a "
            f"distribution over the same values, such as {distribution}."
        )
    if not same_mask(site, guide_site):
        raise ValueError(
            f"The latent site {name!r} is masked otherwise in the model than in the guide, so log p - log q would leave out "
            f"one of the two: put the same mask around it, or the same .mask() inside its distribution, in both programs."
        )


def _measures(site: dict, guide_site: dict) -> tuple[ReferenceMeasure, ReferenceMeasure] | None:
    try:
        return measure_of(site, support_of(site["fn"])), measure_of(guide_site, support_of(guide_site["fn"]))
    except NotImplementedError:  # raised by a distribution without a support
        return None


def _check_observed(site: dict) -> None:
    name, distribution, value = site["name"], site["fn"], site["value"]
    event_dim = distribution.event_dim
    if event_dim and value.shape[-event_dim:] != distribution.event_shape:
        raise ValueError(
            f"The value observed at site {name!r} has shape {tuple(value.shape)}, but its distribution has events of shape "
            f"{tuple(distribution.event_shape)}, so it would be broadcast and scored several times: give it data of that shape."
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
    """Why p(x, z) / q(z|x) is not an importance weight for a pair, from this run and others; ``None`` if it is.

    Such a pair can still be trained, for example to a point estimate (MAP).
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
    """Refuse to weigh draws of the guide for the reason that :func:`why_no_weights` gives."""
    if why is not None:
        raise ValueError(why)


def _model_ignores(masked: list[dict], model: Program, args: tuple, kwargs: dict, traces: Traces, again: Trace) -> bool:
    """Whether other values in the masked places leave every log-probability of the model unchanged."""
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

    They are the ``Delta`` sites with the same value in both runs, which depend on no auxiliary site. If there are none, but the
    auxiliary sites and the ``Delta`` sites differ in dimension, they are all of these.
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
