"""Traces: the only reader of what Pyro recorded of a pair of programs.

Particles stand in a plate to the left of all the pair's own; the data plate is the one that holds every site. What a pair may
not do is refused here, in a sentence that says what to write.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ComposeTransform

from .sites import (
    accept_any_component,
    inside_of,
    is_factor,
    is_masked_anywhere,
    is_point,
    law_of,
    mask_of,
    reaches_beyond,
)

Program = Callable[..., Any]
Gradients = Literal["total", "split", "score", "leaf"]

PARTICLES = "_pyrovae_particles"


class Layout(NamedTuple):
    """Where the particles and the data of one traced run stand in its tensors."""

    num_particles: int
    num_data: int
    nesting: int  # plate dimensions of the pair; particles stand to their left
    data_dim: int

    def spread(self, values: Tensor, like: Tensor, event_dim: int) -> Tensor:
        """``values`` (K, B), to be multiplied with a site's value."""
        shape = [self.num_particles] + [1] * self.nesting
        shape[self.data_dim] = self.num_data
        shape += [1] * event_dim
        return values.reshape(shape[max(len(shape) - like.dim(), 0) :])

    def gather(self, values: Tensor, event_dim: int) -> Tensor:
        """A site's values, summed over all that belongs to one datum: (K, B)."""
        values = values.sum(tuple(range(-event_dim, 0))) if event_dim else values
        values = values.reshape((1,) * (self.nesting + 1 - values.dim()) + values.shape)
        inner = [dim for dim in range(-self.nesting, 0) if dim != self.data_dim]
        return (values.sum(inner) if inner else values).reshape(self.num_particles, self.num_data)

    def place(self, numbers: Tensor, sizes: list[int], event_shape: torch.Size) -> Tensor:
        """Each datum's numbers (K, B, n) as the value of a site whose plates have these sizes."""
        inner = [size for dim, size in zip(range(-self.nesting, 0), sizes, strict=True) if dim != self.data_dim]
        value = numbers.reshape(self.num_particles, self.num_data, *inner, *event_shape)
        value = value.movedim(1, 1 + self.nesting + self.data_dim)
        return value[0] if self.num_particles == 1 else value

    def collect(self, value: Tensor, sizes: list[int], event_shape: torch.Size) -> Tensor:
        """The inverse of :meth:`place`: (K, B, n)."""
        value = value.expand(self.num_particles, *sizes, *event_shape)
        return value.movedim(1 + self.nesting + self.data_dim, 1).reshape(self.num_particles, self.num_data, -1)


class Gate:
    """Identities on a run's samples, as the model sees them, whose backward pass scales each particle's gradient.

    An objective whose gradient gives one weight to the model's parameters and another to the path through the samples
    then still needs one forward and one backward pass. The factor, shape (K, B), is set after the forward pass.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None
        self.layout: Layout | None = None

    def __call__(self, sample: Tensor, event_dim: int) -> Tensor:
        """The same values."""
        if not sample.requires_grad:
            return sample
        seen = sample.view_as(sample)
        seen.register_hook(lambda gradient: self._scale(gradient, event_dim))
        return seen

    def _scale(self, gradient: Tensor, event_dim: int) -> Tensor:
        if self.factor is None or self.layout is None:
            return gradient
        factor = self.layout.spread(self.factor, gradient, event_dim).to(gradient.dtype)
        return torch.where(factor == 0, 0.0, gradient * factor)


class Traces(NamedTuple):
    """What one run of the guide, and of the model on its samples, left behind."""

    model: Trace
    guide: Trace  # its latents: what it observes is no part of q(z|x)
    rescored: Trace | None = None  # the guide at the samples, cut off from their path
    gate: Gate | None = None
    guide_observed: tuple[dict, ...] = ()

    @property
    def guide_factors(self) -> list[dict]:
        """The guide's own ``pyro.factor`` sites, which are terms of an objective and of no density.

        A guide that runs the model, as Pyro's effect guides do, passes the model's factors too.
        """
        return [site for site in self.guide_observed if is_factor(site) and site["name"] not in self.model]


def trace_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    num_particles: int,
    max_plate_nesting: int | None,
    gradients: Gradients = "total",
    rows: Trace | None = None,
) -> Traces:
    """Run the guide, then the model on its samples, with the particles in a plate on the left.

    ``rows`` keeps the subsampled rows of the first run it goes through, and gives them to later ones.
    """

    def particles(run: Program) -> Program:
        return in_particles(run, num_particles, max_plate_nesting)

    def trace(run: Program) -> Trace:
        return poutine.trace(run).get_trace(*args, **kwargs)

    if rows is not None:
        guide = poutine.replay(guide, trace=rows)

    rescored, gate = None, Gate() if gradients == "split" else None
    with explained(num_particles):
        if gradients == "score":
            with _Detach():
                guide_trace = trace(particles(guide))
            guide_trace = _with_values(guide_trace, lambda site: site["value"].detach())
        else:
            guide_trace = trace(particles(guide))
        guide_trace, observed = _latents_and_observed(guide_trace)
        seen = guide_trace
        if gate is not None:
            seen = _with_values(guide_trace, lambda site: gate(site["value"], site["fn"].event_dim))
            rescored = _with_values(guide_trace, lambda site: site["value"].detach())
        elif gradients == "leaf":
            seen = rescored = _with_values(guide_trace, _as_leaf)
        inside = _Inside(guide_trace)
        model_trace = trace(inside(poutine.replay(particles(model), trace=seen)))
        for name, outside in inside.outside.items():
            model_trace.nodes[name]["outside"] = outside
        if rescored is not None and sum(1 for _ in sites_of(prune_subsample_sites(guide_trace))) > 1:
            # A later site's distribution depends on an earlier sample, which must be the one without a path.
            rescored, _ = _latents_and_observed(trace(poutine.replay(particles(guide), trace=rescored)))
    if rows is not None:
        for site in guide_trace.nodes.values():
            if site_is_subsample(site) and site["name"] not in rows:
                rows.add_node(site["name"], **site)
    rescored = None if rescored is None else prune_subsample_sites(rescored)
    return Traces(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), rescored, gate, observed)


def _latents_and_observed(guide_trace: Trace) -> tuple[Trace, tuple[dict, ...]]:
    """A guide's trace without the sites that it observes, and those."""
    observed = tuple(site for site in sites_of(guide_trace) if site["is_observed"] and not site_is_subsample(site))
    if observed:
        guide_trace = guide_trace.copy()
        for site in observed:
            guide_trace.remove_node(site["name"])
    return guide_trace, observed


def latents_of(trace: Trace) -> list[dict]:
    """The sites of a guide's trace that make up q(z|x)."""
    return [site for site in sites_of(trace) if not site["is_observed"]]


def in_particles(run: Program, num_particles: int, max_plate_nesting: int | None) -> Program:
    """A program that runs once for all particles, in a plate to the left of all its own."""
    # One plate object for each run: a plate is entered once.
    if num_particles == 1:
        return run
    assert max_plate_nesting is not None
    return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run)


@contextmanager
def explained(num_particles: int) -> Iterator[None]:
    """What torch and Pyro raise when a pair does not fit its plates, in a sentence that says what to write."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        if num_particles > 1:
            raise ValueError(
                f"The pair runs with one particle but not with {num_particles} on the left of its batch ({said}): let its "
                f"networks accept leading dimensions, and reshape by z.shape[:-1] and not by the batch, or pass "
                f"vectorize_particles=False."
            ) from error
        if "Shape mismatch inside plate" in said:
            raise ValueError(
                f"{said}: declare the dimensions within a datum with .to_event(n), and size the plate by x.shape[0]."
            ) from error
        if isinstance(error, IndexError | TypeError):
            raise ValueError(
                f"The pair cannot be run on its arguments ({type(error).__name__}: {said}): let model and guide take the same "
                f"arguments, and use no dimension that the data or the latents do not have."
            ) from error
        raise error.__cause__ or error from None  # without the trace shapes that Pyro appends to the sentence


def _with_values(trace: Trace, change: Callable[[dict], Tensor]) -> Trace:
    changed = trace.copy()
    for site in sites_of(trace):
        if not site["is_observed"] and not site_is_subsample(site):
            changed.nodes[site["name"]] = {**site, "value": change(site)}
    return changed


def _as_leaf(site: dict) -> Tensor:
    value = site["value"].detach()
    return value.requires_grad_() if value.is_floating_point() else value


class _Inside(Messenger):
    """A sample outside the prior's support weighs nothing: the model sees a point inside in its place, and it is noted here.

    Where both supports say that there is none, as for most pairs, nothing is looked at.
    """

    def __init__(self, guide: Trace):
        super().__init__()
        self.guide = guide
        self.outside: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        drawn = self.guide.nodes.get(msg["name"])
        if drawn is None or drawn["type"] != "sample" or msg["is_observed"] or site_is_subsample(msg):
            return
        try:
            support = support_of(msg["fn"])
        except NotImplementedError:  # torch's word for a distribution that declares no support
            return
        try:
            beyond = reaches_beyond(support_of(drawn["fn"]), support)
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


class _Detach(Messenger):
    """Later sites see detached samples of earlier ones."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


def find_nesting(model: Program, guide: Program, args: tuple, kwargs: dict) -> int:
    """How many plate dimensions a pair uses, by one run that leaves no trace."""
    with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide), poutine.block():
        traces = trace_pair(model, guide, args, kwargs, 1, None)
    data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
    return plate_nesting(traces.model, traces.guide)


def sites_of(trace: Trace) -> Iterator[dict]:
    """The sample sites that have a density."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield site


def plates_of(site: dict) -> list[Any]:
    """The plates of a site but the particles'; one without a size has that of the site's own batch there."""
    return [_sized(frame, site["fn"]) for frame in site["cond_indep_stack"] if frame.name != PARTICLES]


def _sized(frame: Any, law: Any) -> Any:
    if frame.size != -1 or not frame.vectorized or len(law.batch_shape) < -frame.dim:
        return frame
    size = law.batch_shape[frame.dim]
    return frame._replace(size=size, full_size=size)


def plate_nesting(*traces: Trace) -> int:
    """How many plate dimensions the sites use."""
    dims = [frame.dim for trace in traces for site in sites_of(trace) for frame in plates_of(site) if frame.vectorized]
    return -min(dims, default=0)


def data_plate(sites: list[dict]) -> Any:
    """The plate that holds every site, one index a datum."""
    write = 'write "with pyro.plate("data", x.shape[0]):" around all its sample statements, in model and guide.'
    frames: dict[str, Any] = {}
    for site in sites:
        for frame in plates_of(site):
            held = frames.setdefault(frame.name, frame)
            if -1 in (held.size, frame.size):  # a site of a plate without a size that has no batch of its own
                frames[frame.name] = held if held.size == -1 else frame
            elif (held.size, held.full_size) != (frame.size, frame.full_size):
                raise ValueError(
                    f"Plate {frame.name!r} has size {held.size} of {held.full_size} at one site and {frame.size} of "
                    f"{frame.full_size} at site {site['name']!r}: give it one size in model and guide."
                )
    if not frames:
        raise ValueError(f"The pair has no data plate, so its log-weights cannot be told apart by datum: {write}")
    names = [{frame.name for frame in plates_of(site)} for site in sites]
    shared = set(frames).intersection(*names)
    if not shared:
        plate = "data" if "data" in frames else max(frames, key=lambda name: sum(name in held for held in names))
        outside = next(site for site, held in zip(sites, names, strict=True) if plate not in held)
        raise ValueError(_outside(outside, plate, write))
    if len(shared) > 1 and "data" not in shared:
        raise ValueError(f"Plates {sorted(shared)} all hold every site: call the one over data pyro.plate('data', ...).")
    frame = frames["data" if len(shared) > 1 else shared.pop()]
    if not frame.vectorized:
        raise ValueError(f"The data plate {frame.name!r} is a sequential loop: {write}")
    if frame.size == -1:
        raise ValueError(
            f"The data plate {frame.name!r} has no size, so all data would share one draw at a site whose distribution has no "
            f'batch of its own: write pyro.plate("{frame.name}", x.shape[0]).'
        )
    if frame.size == 0:
        raise ValueError(f"The data plate {frame.name!r} is empty: give at least one datum.")
    return frame


def _outside(site: dict, plate: str, write: str) -> str:
    """Why a site outside the data plate cannot be read."""
    if site["infer"].get("is_auxiliary") and not is_factor(site):
        return (
            f"The guide's auxiliary site {site['name']!r} lies outside the data plate {plate!r}, as in autoguides that draw "
            f"the latents of all data as one vector, so q has no factor for each datum: use pyro.infer.autoguide.AutoNormal, "
            f"or a guide that samples inside the plate."
        )
    return (
        f"Site {site['name']!r} lies outside the data plate {plate!r}, so it belongs to no datum: {write[:-1]}; what all data "
        f"share is a pyro.param here, not a latent."
    )


# So many terms have a sum of which float32 leaves hundredths of a nat uncertain: at four million, half a nat.
MANY_TERMS = 2**16


def log_prob_of(site: dict) -> Tensor:
    """A site's log-probability, masked but not scaled, in nats; in float64 where it sums very many terms."""
    law, value, inner = site["fn"], site["value"], 0
    if type(law).__name__ == "Independent" and law.event_shape.numel() >= MANY_TERMS:
        law, inner = law.base_dist, law.reinterpreted_batch_ndims
        if isinstance(getattr(law, "loc", None), Tensor):  # then constants, rounded alike in every term, are float64 too
            value = value.double()
    value = law.log_prob(value, *site["args"], **site["kwargs"])
    value = _summed(value, tuple(range(-inner, 0)))
    if "outside" in site:
        value = torch.where(site["outside"], -torch.inf, value)
    return scale_and_mask(value, 1.0, site["mask"])


def _summed(terms: Tensor, dims: tuple[int, ...] | list[int]) -> Tensor:
    """The sum over some dimensions, in float64 where they hold very many terms."""
    if not dims:
        return terms
    many = math.prod(terms.shape[dim] for dim in dims) >= MANY_TERMS
    return terms.sum(tuple(dims), dtype=torch.float64 if many else None)


def per_datum(site: dict, log_prob: Tensor, data: Any, num_particles: int, nesting: int) -> Tensor:
    """A site's log-probability as (K, B), summed over the plates inside a datum."""
    size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized} | {-nesting - 1: num_particles}
    plates = [size.get(dim, 1) for dim in range(-nesting - 1, 0)]
    check_batch(site, log_prob.shape, plates[1:] if num_particles == 1 else plates)
    log_prob = log_prob.expand(plates)
    inner = [dim for dim in range(-nesting, 0) if dim != data.dim]
    return _summed(log_prob, inner).reshape(num_particles, data.size)


def check_batch(site: dict, shape: torch.Size, plates: list[int]) -> None:
    """Refuse a site whose batch dimensions are not its plates'."""
    padded = [1] * (len(plates) - len(shape)) + list(shape)
    if len(shape) > len(plates) or any(have not in (1, want) for have, want in zip(padded, plates, strict=True)):
        raise ValueError(
            f"Site {site['name']!r} has log-probabilities of shape {tuple(shape)}, but its plates have {tuple(plates)}: "
            f"declare the dimensions within a datum with .to_event(n)."
        )


def num_dims_of(site: dict, data: Any) -> int:
    """How many numbers a site observes of one datum; none at a site of ``infer={"num_dims": 0}``, such as a label's."""
    if is_factor(site) or site["infer"].get("num_dims") == 0:
        return 0
    event = site["fn"].event_shape.numel()
    for frame in plates_of(site):
        event *= frame.size if frame.vectorized and frame.name != data.name else 1
    return event


def num_observed_of(site: dict, data: Any) -> int:
    """How many numbers a site observes of all data together, without what a mask leaves out; read eagerly."""
    if not num_dims_of(site, data):
        return 0
    mask = mask_of(site)
    if not isinstance(mask, Tensor):
        return num_dims_of(site, data) * data.size if mask else 0
    return int(mask.expand(site["fn"].batch_shape + site["fn"].event_shape).sum())


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


def common_scale(sites: list[dict], plate: Any) -> float:
    """The factor that poutine.scale puts around all sites alike, besides the N/B of a subsampled data plate.

    Raises:
        ValueError: only some sites are scaled, or each datum apart.
    """
    own, scales = plate.full_size / plate.size, [_number(site["scale"]) for site in sites]
    together = all(math.isclose(scale, scales[0], rel_tol=1e-6) for scale in scales)
    for site, scale in zip(sites, scales, strict=True):
        if not together and not math.isclose(scale, own, rel_tol=1e-6):
            raise ValueError(
                f"Site {site['name']!r} is scaled apart from the data plate {plate.name!r} (by poutine.scale, or by "
                f"subsampling inside a datum), which is no weight of p(x, z): remove the scale or put one around all "
                f"sites of model and guide, and use an estimator's beta to anneal."
            )
        for frame in plates_of(site):
            if frame.name != plate.name and frame.full_size not in (None, frame.size):
                raise ValueError(
                    f"Site {site['name']!r} lies in the plate {frame.name!r}, which subsamples what belongs to one datum, so "
                    f"its weight is of other data each time: leave subsample_size out within a datum."
                )
    return 1.0 if math.isclose(scales[0], own, rel_tol=1e-6) else scales[0] / own


def _number(scale: Any) -> float:
    """A site's scale; of one for each datum, which is none of the objective, NaN, which is close to nothing."""
    return float(scale) if not isinstance(scale, Tensor) or scale.numel() == 1 else math.nan


def check_scores(guide_sites: list[dict]) -> None:
    """Refuse guide sites without a score."""
    for site in guide_sites:
        law = law_of(site)
        if isinstance(law, pyro.distributions.Delta) and law.v.requires_grad:
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
                f"The data hold NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first row "
                f"{int(bad.nonzero()[0])}: drop or repair them; where values are missing, pass a mask beside zeros."
            )


def check_support(site: dict) -> None:
    """Refuse observed values outside their distribution's support."""
    if is_factor(site) or is_point(site) or not isinstance(site["value"], Tensor):
        return
    try:
        inside = site["fn"].support.check(site["value"])
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return
    mask = torch.as_tensor(True if site["mask"] is None else site["mask"])
    outside = (~inside & mask).nonzero()
    if not len(outside):
        return
    law = law_of(site)
    name = type(law).__name__
    low, high = site["value"].min().item(), site["value"].max().item()
    cure = {"Bernoulli": "binarise", "Dequantized": "add noise with pyrovae.data.dequantize to"}.get(name, "rescale")
    if hasattr(law, "columns"):  # a table: say which columns
        wrong = (~law.support.check(site["value"])).flatten(0, -2).any(0).nonzero().flatten().tolist()
        name = f"column(s) {wrong} of {name}"
    raise ValueError(
        f"The data have values outside the support of {name} at site {site['name']!r}, in {len(outside)} of the "
        f"{inside.numel()} it was given (they range from {low:g} to {high:g}): {cure} them, or choose another likelihood."
    )


class Place(Messenger):
    """The latents of a run take given values; or unconstrained ones, through the support that their sites declare."""

    def __init__(self, given: dict[str, Tensor], *, unconstrained: bool = False):
        super().__init__()
        self.given, self.unconstrained = given, unconstrained
        self.log_jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        value = self.given.get(msg["name"])
        if value is None:
            return
        if self.unconstrained:
            transform = biject_to(support_of(msg["fn"]))
            flat, value = value, transform(value)
            jacobian = transform.log_abs_det_jacobian(flat, value)
            inner = msg["fn"].event_dim - transform.codomain.event_dim
            self.log_jacobian[msg["name"]] = jacobian.sum(tuple(range(-inner, 0))) if inner else jacobian
        msg["value"], msg["done"] = value, True


def trace_from_prior(
    model: Program, guide: Program | None, args: tuple, num_particles: int, max_plate_nesting: int | None
) -> Traces:
    """Run the model on draws of its own prior, and the guide on the same values; without one, the prior stands in for it."""

    def trace(run: Program, *around: Messenger) -> Trace:
        run = in_particles(run, num_particles, max_plate_nesting)
        for messenger in around:
            run = messenger(run)
        return prune_subsample_sites(poutine.trace(run).get_trace(*args))

    with explained(num_particles):
        model_trace = trace(model)
        latents = {site["name"]: site for site in sites_of(model_trace) if not site["is_observed"]}
        if guide is None:
            guide_trace = Trace()
            for site in latents.values():
                guide_trace.add_node(site["name"], **site)
            return Traces(model_trace, guide_trace)
        guide_trace, _ = _latents_and_observed(trace(guide, Place({name: site["value"] for name, site in latents.items()})))
    refuse_auxiliary(sites_of(guide_trace))
    return Traces(model_trace, guide_trace)


def refuse_masked(sites: list[dict]) -> None:
    """Refuse latents of which a mask, around the site or inside its distribution, leaves something out; read eagerly."""
    for site in sites:
        if not site["is_observed"] and is_masked_anywhere(site):
            raise ValueError(
                f"The latent site {site['name']!r} is masked, so its density does not integrate to one over its values: "
                f"mask the observed sites only, or use log_marginal with the guide's draws."
            )


def refuse_auxiliary(guide_sites: Iterator[dict] | list[dict]) -> None:
    """Refuse latents that the guide has and the model has not."""
    for site in guide_sites:
        if site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"The guide's auxiliary site {site['name']!r} has no place in p(x, z), so the density q(z|x) is not known: use "
                f'proposal="guide", which needs no density at other draws.'
            )


class FlatTerms(NamedTuple):
    """The parts of log p(x, u) for unconstrained latents u, each (K, B), in nats; densities are with respect to u."""

    log_prior: Tensor
    log_likelihood: Tensor
    log_guide: Tensor | None

    @property
    def log_joint(self) -> Tensor:
        """log p(x, u), shape (K, B)."""
        return self.log_prior + self.log_likelihood


class FlatPair:
    r"""The continuous latents of each datum of a batch as one vector u of L unconstrained numbers, for any pair.

    .. math:: z = T(u), \qquad \log p(x, u) = \log p(x, T(u)) + \log \left| \det \frac{\partial T}{\partial u} \right|

    T is what ``torch.distributions.biject_to`` gives for the support of each latent site in the model, which may depend on
    earlier latents. Latents in plates within a datum are part of its vector. The integral of p(x, u) over u is p(x).

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        args: one batch of arguments.
        vectorize_particles: as in :func:`pyrovae.log_weights`.

    Attributes:
        num_latents: L.
        num_data: B.
        latents: the model's latent sites, in the order of their numbers.

    Raises:
        ValueError: a latent is discrete, masked, in the guide only, or of a support that no bijection is known for; or the
            pair is one that :func:`pyrovae.log_weights` refuses.
    """

    def __init__(self, model: Program, guide: Program, args: tuple, *, vectorize_particles: bool = True):
        self.model, self.guide, self.args, self.vectorize = model, guide, args, vectorize_particles
        with torch.no_grad(), same_random_stream(args), poutine.block():
            traces = trace_pair(model, guide, args, {}, 1, None)
        model_sites, guide_sites = list(sites_of(traces.model)), list(sites_of(traces.guide))
        check_same_latents(model_sites, guide_sites)
        refuse_auxiliary(guide_sites)
        self.data = data_plate(model_sites + guide_sites)
        common_scale(model_sites + guide_sites, self.data)
        refuse_masked(model_sites + guide_sites)
        if self.data.full_size != self.data.size:
            raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
        self.nesting, self.num_data = plate_nesting(traces.model, traces.guide), self.data.size
        self.latents: tuple[str, ...] = ()
        self._sizes: dict[str, list[int]] = {}
        self._shapes: dict[str, torch.Size] = {}
        self._columns: dict[str, slice] = {}
        start = 0
        for site in model_sites:
            if site["is_observed"]:
                continue
            name, sizes = site["name"], plate_sizes(site, self.nesting)
            shape = _unconstrained_shape(site)
            width = shape.numel() * torch.Size(sizes).numel() // self.num_data
            self.latents += (name,)
            self._sizes[name], self._shapes[name], self._columns[name] = sizes, shape, slice(start, start + width)
            start += width
        self.num_latents = start
        self.dtype = next((site["value"].dtype for site in model_sites if not site["is_observed"]), torch.get_default_dtype())
        self.device = args[0].device

    def terms(self, flat: Tensor, *, guide: bool = False) -> FlatTerms:
        """The parts of log p(x, u) at ``flat`` (K, B, L), and with ``guide`` log q(u|x)."""
        return self._in_turn(flat, lambda rows: self._terms(rows, guide))

    def log_joint(self, flat: Tensor) -> Tensor:
        """log p(x, u), shape (K, B), in nats, at ``flat`` (K, B, L); differentiable."""
        return self.terms(flat).log_joint

    def draw(self, num: int, start: Literal["prior", "guide"], *, inside: bool = False) -> Tensor:
        """Draws of the prior or the guide, shape (num, B, L).

        A guide may put draws where the model allows none. With ``inside`` draws of the prior stand in for those.

        Raises:
            ValueError: a draw lies outside the model's support, without ``inside``.
        """
        together = num if self.vectorize else 1
        with torch.no_grad():
            return torch.cat([self._draw(together, start, inside) for _ in range(num // together)])

    def model_trace(self, flat: Tensor) -> tuple[Trace, Place]:
        """The model's trace at ``flat`` (K, B, L), and what placed it there."""
        return self._run(self.model, self._given(flat), len(flat), unconstrained=True)

    def on(self, args: tuple) -> FlatPair:
        """The same pair on another batch of the same shape."""
        other = copy.copy(self)
        other.args = args
        return other

    def follow(self, flat: Tensor, watch: Any) -> Trace:
        """The model's trace at ``flat`` under a dispatch mode that holds the latents; they must be unconstrained themselves."""
        given = self._given(flat)
        for value in given.values():
            watch.hold(value)
        with watch:
            return self._run(self.model, given, len(flat))[0]

    def dream(self) -> tuple[Trace, Tensor]:
        """One draw of p(x, z) per datum: the trace of the model, unconditioned, and u (1, B, L)."""
        with torch.no_grad(), poutine.block():
            trace = prune_subsample_sites(poutine.trace(poutine.uncondition(self.model)).get_trace(*self.args))
        for site in sites_of(trace):
            if is_factor(site):
                raise ValueError(f"The model's pyro.factor {site['name']!r} cannot be simulated: remove it.")
        return trace, self._flatten(trace, {name: trace.nodes[name]["value"] for name in self.latents}, 1)

    def _terms(self, flat: Tensor, with_guide: bool) -> FlatTerms:
        size = len(flat)
        layout = self._layout(size)
        trace, place = self.model_trace(flat)
        prior = likelihood = flat.new_zeros(size, self.num_data)
        for site in sites_of(trace):
            term = per_datum(site, log_prob_of(site), self.data, size, self.nesting)
            if site["is_observed"]:
                likelihood = likelihood + term
            else:
                prior = prior + term
        jacobian = sum((layout.gather(term, 0) for term in place.log_jacobian.values()), torch.zeros_like(prior))
        log_guide = None
        if with_guide:
            values = {name: trace.nodes[name]["value"] for name in self.latents}
            guide_trace, _ = self._run(self.guide, values, size)
            try:
                terms = [per_datum(site, log_prob_of(site), self.data, size, self.nesting) for site in latents_of(guide_trace)]
            except (NotImplementedError, KeyError) as error:
                raise ValueError(
                    f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its density is not "
                    f"known at draws that are not its own: start from the prior."
                ) from error
            log_guide = sum(terms, jacobian)
        return FlatTerms(prior + jacobian, likelihood, log_guide)

    def _draw(self, num: int, start: str, inside: bool) -> Tensor:
        if start == "prior":
            model_trace = trace_from_prior(self.model, None, self.args, num, self.nesting).model
            return self._flatten(model_trace, {name: model_trace.nodes[name]["value"] for name in self.latents}, num)
        traces = trace_pair(self.model, self.guide, self.args, {}, num, self.nesting)
        values = {name: traces.guide.nodes[name]["value"] for name in self.latents}
        if not inside:
            return self._flatten(traces.model, values, num)
        parts = [self._flat_site(traces.model.nodes[name], values[name], num) for name in self.latents]
        kept = torch.stack([within.all(-1) for _, within in parts]).all(0)[..., None]
        flat = torch.cat([part for part, _ in parts], -1)
        return flat if bool(kept.all()) else torch.where(kept, flat, self._draw(num, "prior", True))

    def _flatten(self, model_trace: Trace, values: dict[str, Tensor], num: int) -> Tensor:
        parts = []
        for name in self.latents:
            flat, within = self._flat_site(model_trace.nodes[name], values[name], num)
            if not bool(within.all()):
                raise ValueError(
                    f"A draw of the latent site {name!r} lies outside the support that the model declares for it: start from "
                    f"the prior, or give the guide a distribution with that support."
                )
            parts.append(flat)
        return torch.cat(parts, -1)

    def _flat_site(self, site: dict, value: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """One site's unconstrained numbers, (num, B, n), and which of them stand for a value of its support."""
        support = support_of(site["fn"])
        flat = biject_to(support).inv(value)
        within = torch.isfinite(flat)
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if isinstance(support, constraints.interval | constraints.half_open_interval | _Union | _Image):
            within = within & support.check(value)  # the inverse of a sigmoid takes what lies outside for an edge
        name = site["name"]
        flat, within = (self._layout(num).collect(part, self._sizes[name], self._shapes[name]) for part in (flat, within))
        return flat, within

    def _given(self, flat: Tensor) -> dict[str, Tensor]:
        layout = self._layout(len(flat))
        return {
            name: layout.place(flat[..., self._columns[name]], self._sizes[name], self._shapes[name]) for name in self.latents
        }

    def _run(self, program: Program, given: dict[str, Tensor], num: int, *, unconstrained: bool = False) -> tuple[Trace, Place]:
        place = Place(given, unconstrained=unconstrained)
        with explained(num):
            trace = poutine.trace(place(in_particles(program, num, self.nesting))).get_trace(*self.args)
        return prune_subsample_sites(trace), place

    def _layout(self, num: int) -> Layout:
        return Layout(num, self.num_data, self.nesting, self.data.dim)

    def _in_turn(self, flat: Tensor, score: Callable[[Tensor], FlatTerms]) -> FlatTerms:
        if self.vectorize or len(flat) == 1:
            return score(flat)
        parts = [score(flat[k : k + 1]) for k in range(len(flat))]
        guides = [terms.log_guide for terms in parts if terms.log_guide is not None]
        return FlatTerms(
            torch.cat([terms.log_prior for terms in parts]),
            torch.cat([terms.log_likelihood for terms in parts]),
            torch.cat(guides) if guides else None,
        )


def plate_sizes(site: dict, nesting: int) -> list[int]:
    """The sizes of a site's plates at the dimensions -nesting to -1; one where it has none."""
    size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized}
    return [size.get(dim, 1) for dim in range(-nesting, 0)]


_ONE_TURN = constraints.interval(-math.pi, math.pi)
_CIRCULAR = ("VonMises", "SineBivariateVonMises", "SineSkewed")


def support_of(law: Any) -> Any:
    """The set over which a distribution's density integrates to one.

    It differs from what the distribution declares for angles, whose density repeats with every turn; for mixtures, which may
    lie where any component does; and for a flow of zuko, which declares none: what its transform takes.
    """
    kind = type(law).__name__
    if kind == "Independent":
        return constraints.independent(support_of(law.base_dist), law.reinterpreted_batch_ndims)
    if kind in ("MaskedDistribution", "ExpandedDistribution"):
        return support_of(law.base_dist)
    if kind in _CIRCULAR:
        return constraints.independent(_ONE_TURN, law.event_dim) if law.event_dim else _ONE_TURN
    if isinstance(law, torch.distributions.MixtureSameFamily):
        component = support_of(law.component_distribution)
        uniform = isinstance(law_of({"fn": law.component_distribution}), _Uniform)
        return _Union(component) if uniform or component.is_discrete else component
    transformed = isinstance(law, torch.distributions.TransformedDistribution)
    if transformed and type(law_of({"fn": law.base_dist})).__name__ in _CIRCULAR:
        return _Image(support_of(law.base_dist), law.transforms)
    try:
        return law.support
    except NotImplementedError:
        transform = getattr(getattr(law, "dist", None), "transform", None)
        if transform is None:
            raise
        return transform.domain


_Uniform = torch.distributions.Uniform  # the one distribution whose density is zero, and not wrong, outside its bounds


class _Union(constraints.Constraint):
    """What lies in the support of any component, where these stand along the last batch dimension."""

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
    """Onto the interval that spans those of the components."""
    interval, axis = union.component, -1 - union.event_dim
    while isinstance(interval, constraints.independent):
        interval = interval.base_constraint
    span = constraints.interval(interval.lower_bound.amin(axis), interval.upper_bound.amax(axis))
    return biject_to(constraints.independent(span, union.event_dim) if union.event_dim else span)


class _Image(constraints.Constraint):
    """What transforms make of a support."""

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


def _unconstrained_shape(site: dict) -> torch.Size:
    """The shape of one draw's unconstrained numbers."""
    name, law = site["name"], type(law_of(site)).__name__
    try:
        support = support_of(site["fn"])
        if support.is_discrete:
            raise ValueError(
                f"The latent site {name!r} ({law}) is discrete, and this needs continuous latents: use "
                f'log_marginal, or pyrovae.exact(..., method="enumerate") where all are discrete.'
            )
        transform = biject_to(support)
        # By a value and not by inverse_shape, which takes bounds that differ between data for dimensions of the draw.
        batch_dim = site["value"].dim() - site["fn"].event_dim
        return transform.inv(site["value"]).shape[batch_dim:]
    except NotImplementedError as error:
        raise ValueError(
            f"No bijection from unconstrained numbers is known for the support of the latent site {name!r} ({law}): register "
            f"one with torch.distributions.biject_to, or use log_marginal."
        ) from error


@contextmanager
def evaluation_mode(model: Program, guide: Program) -> Iterator[None]:
    """Dropout off and running statistics still, for modules whose bound methods the programs are; restored after."""
    owners = [getattr(program, "__self__", program) for program in (model, guide)]
    training = [module for owner in owners if isinstance(owner, nn.Module) for module in owner.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def same_random_stream(args: tuple) -> Iterator[None]:
    """Leave the random stream as it was."""
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
