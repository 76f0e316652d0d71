"""Traces: the only reader of what Pyro recorded of a pair of programs.

Particles stand in a plate to the left of all the pair's own; the data plate is the one that holds every site. What a pair may
not do is refused here, in a sentence that says what to write.
"""

from __future__ import annotations

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
    guide: Trace
    rescored: Trace | None = None  # the guide at the samples, cut off from their path
    gate: Gate | None = None


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
        # One plate object for each run: a plate is entered once.
        if num_particles == 1:
            return run
        assert max_plate_nesting is not None
        return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run)

    def trace(run: Program) -> Trace:
        return poutine.trace(run).get_trace(*args, **kwargs)

    if rows is not None:
        guide = poutine.replay(guide, trace=rows)

    rescored, gate = None, Gate() if gradients == "split" else None
    try:
        if gradients == "score":
            with _Detach():
                guide_trace = trace(particles(guide))
            guide_trace = _with_values(guide_trace, lambda site: site["value"].detach())
        else:
            guide_trace = trace(particles(guide))
        seen = guide_trace
        if gate is not None:
            seen = _with_values(guide_trace, lambda site: gate(site["value"], site["fn"].event_dim))
            rescored = _with_values(guide_trace, lambda site: site["value"].detach())
        elif gradients == "leaf":
            seen = rescored = _with_values(guide_trace, _as_leaf)
        model_trace = trace(poutine.replay(particles(model), trace=seen))
        if rescored is not None and sum(1 for _ in sites_of(prune_subsample_sites(guide_trace))) > 1:
            # A later site's distribution depends on an earlier sample, which must be the one without a path.
            rescored = trace(poutine.replay(particles(guide), trace=rescored))
    except (RuntimeError, ValueError) as error:
        if "Shape mismatch inside plate" in str(error):
            raise ValueError(
                f"{str(error).splitlines()[0].rstrip('.')}: declare the dimensions within a datum with .to_event(n), and "
                f"size the plate by x.shape[0]."
            ) from error
        if num_particles == 1:
            raise error.__cause__ or error from None  # without the trace shapes that Pyro appends to the sentence
        raise ValueError(
            f"The pair runs with one particle but not with {num_particles} on the left of its batch "
            f"({str(error).splitlines()[0]}): let its networks accept leading dimensions, or pass vectorize_particles=False."
        ) from error
    if rows is not None:
        for site in guide_trace.nodes.values():
            if site_is_subsample(site) and site["name"] not in rows:
                rows.add_node(site["name"], **site)
    rescored = None if rescored is None else prune_subsample_sites(rescored)
    return Traces(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), rescored, gate)


def _with_values(trace: Trace, change: Callable[[dict], Tensor]) -> Trace:
    changed = trace.copy()
    for site in sites_of(trace):
        if not site["is_observed"] and not site_is_subsample(site):
            changed.nodes[site["name"]] = {**site, "value": change(site)}
    return changed


def _as_leaf(site: dict) -> Tensor:
    value = site["value"].detach()
    return value.requires_grad_() if value.is_floating_point() else value


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
    """The plates of a site but the particles'."""
    return [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]


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
            if (held.size, held.full_size) != (frame.size, frame.full_size):
                raise ValueError(
                    f"Plate {frame.name!r} has size {held.size} of {held.full_size} at one site and {frame.size} of "
                    f"{frame.full_size} at site {site['name']!r}: give it one size in model and guide."
                )
    if not frames:
        raise ValueError(f"The pair has no data plate, so its log-weights cannot be told apart by datum: {write}")
    shared = set(frames).intersection(*({frame.name for frame in plates_of(site)} for site in sites))
    if not shared:
        plate = "data" if "data" in frames else next(iter(frames))
        outside = next(site["name"] for site in sites if plate not in {frame.name for frame in plates_of(site)})
        raise ValueError(
            f"Site {outside!r} lies outside the data plate {plate!r}, so it belongs to no datum: {write[:-1]}; what all data "
            f"share is a pyro.param here, not a latent."
        )
    if len(shared) > 1 and "data" not in shared:
        raise ValueError(f"Plates {sorted(shared)} all hold every site: call the one over data pyro.plate('data', ...).")
    frame = frames["data" if len(shared) > 1 else shared.pop()]
    if not frame.vectorized:
        raise ValueError(f"The data plate {frame.name!r} is a sequential loop: {write}")
    if frame.size == -1:
        raise ValueError(
            f"The data plate {frame.name!r} has no size, so all data would share one latent draw: "
            f'write pyro.plate("{frame.name}", x.shape[0]).'
        )
    if frame.size == 0:
        raise ValueError(f"The data plate {frame.name!r} is empty: give at least one datum.")
    return frame


def law_of(site: dict) -> Any:
    """A site's distribution without what Pyro wraps around it."""
    law = site["fn"]
    while type(law).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        law = law.base_dist
    return law


def log_prob_of(site: dict) -> Tensor:
    """A site's log-probability, masked but not scaled, in nats."""
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, 1.0, site["mask"])


def per_datum(site: dict, log_prob: Tensor, data: Any, num_particles: int, nesting: int) -> Tensor:
    """A site's log-probability as (K, B), summed over the plates inside a datum."""
    size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized} | {-nesting - 1: num_particles}
    plates = [size.get(dim, 1) for dim in range(-nesting - 1, 0)]
    shape = [1] * (len(plates) - log_prob.dim()) + list(log_prob.shape)
    if len(shape) > len(plates) or any(have not in (1, want) for have, want in zip(shape, plates, strict=True)):
        raise ValueError(
            f"Site {site['name']!r} has log-probabilities of shape {tuple(log_prob.shape)}, but its plates have "
            f"{tuple(plates[1:] if num_particles == 1 else plates)}: declare the dimensions within a datum with .to_event(n)."
        )
    log_prob = log_prob.expand(plates)
    inner = [dim for dim in range(-nesting, 0) if dim != data.dim]
    return (log_prob.sum(inner) if inner else log_prob).reshape(num_particles, data.size)


def num_dims_of(site: dict, data: Any) -> int:
    """How many numbers a site observes of one datum."""
    if type(site["fn"]).__name__ == "Unit":  # pyro.factor observes nothing
        return 0
    event = site["fn"].event_shape.numel()
    for frame in plates_of(site):
        event *= frame.size if frame.vectorized and frame.name != data.name else 1
    return event


def num_observed_of(site: dict, data: Any) -> int:
    """How many numbers a site observes of all data together, without what a mask leaves out; read eagerly."""
    law = site["fn"]
    while hasattr(law, "base_dist") and not isinstance(law, pyro.distributions.MaskedDistribution):
        law = law.base_dist
    inside = getattr(law, "_mask", True)
    if not isinstance(inside, Tensor) and not isinstance(site["mask"], Tensor):
        return 0 if inside is False or site["mask"] is False else num_dims_of(site, data) * data.size
    seen = torch.as_tensor(inside).expand(law.batch_shape)
    if site["mask"] is not None:
        outer = torch.as_tensor(site["mask"]).expand(site["fn"].batch_shape)
        seen = seen & outer.reshape(*outer.shape, *[1] * (seen.dim() - outer.dim())).to(seen.device)
    return int(seen.sum()) * law.event_shape.numel()


def check_same_latents(model_sites: list[dict], guide_sites: list[dict]) -> None:
    """Refuse programs whose latent sites differ."""
    in_model = {site["name"] for site in model_sites if not site["is_observed"]}
    observed = {site["name"] for site in model_sites if site["is_observed"]}
    in_guide = {site["name"] for site in guide_sites if not site["is_observed"] and not site["infer"].get("is_auxiliary")}
    for name in sorted(in_model - in_guide):
        raise ValueError(
            f"The model's latent site {name!r} is not in the guide: sample it there under the same name, or sum it out with "
            f"pyro.infer.TraceEnum_ELBO."
        )
    for name in sorted(in_guide - in_model):
        why = "is observed in the model" if name in observed else "is not in the model"
        raise ValueError(f"The guide's site {name!r} {why}: give both programs the same latent sites.")
    if not observed:
        raise ValueError("The model observes nothing: give its data site obs=x, and pass x to both programs.")


def check_scale(sites: list[dict], scale: float, plate: str) -> None:
    """Refuse a scale on some sites only."""
    for site in sites:
        if isinstance(site["scale"], Tensor) or abs(site["scale"] - scale) > 1e-9 * scale:
            raise ValueError(
                f"Site {site['name']!r} is scaled apart from the data plate {plate!r} (by poutine.scale, or by subsampling "
                f"inside a datum), which is no weight of p(x, z): remove the scale, and use an estimator's beta to anneal."
            )


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
    if type(site["fn"]).__name__ in ("Unit", "Delta") or not isinstance(site["value"], Tensor):
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
