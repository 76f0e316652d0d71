r"""Log-weights of a pair of Pyro programs: the only reader of Pyro traces.

A *pair* is a ``model`` and a ``guide`` that take the same arguments and hold every latent and observed site in one data
plate. For K particles and B data,

.. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b), \quad z_{kb} \sim q(\cdot \mid x_b).

Every bound and every estimate in this package is a reduction of these numbers. The plate's subsampling scale N/B is kept
apart, because it belongs outside a logsumexp; particles stand in a plate to the left of all the pair's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

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


class SiteTerms(NamedTuple):
    """What one site of the guide adds: log p and log q at the samples, (K, B), and KL(q || p) where it has a closed form."""

    name: str
    log_prior: Tensor
    log_guide: Tensor
    kl: Tensor | None


class Leaf(NamedTuple):
    """One latent cut off from the guide: the model saw ``value``, a leaf of the graph that equals ``sample``."""

    name: str
    sample: Tensor
    value: Tensor
    event_dim: int
    prior: Any  # p(z | its parents) as the model declared it; None where the guide alone has the site
    is_point: bool  # the guide puts a Delta here, whose density at z lies in other sites
    log_prior: Tensor
    rows: slice  # its particles, among the K
    layout: Layout


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights per particle and datum, in nats, each part apart.

    Attributes:
        log_likelihood: log p(x|z), shape (K, B).
        log_prior: log p(z), shape (K, B).
        log_guide: log q(z|x), shape (K, B).
        scale: N/B of a subsampled data plate, else 1.0; it multiplies an objective, never a weight.
        num_dims: how many observed numbers one datum has.
        not_reparameterized: guide sites through which no gradient flows.
        gradients: how they were drawn; see :func:`log_weights`.
        log_guide_score: log q of the detached samples, shape (K, B), where gradients are split.
        log_dream: log q of a pair that the model dreamt per datum, shape (B,), where an estimator asked for it.
        sites: the terms of each site of the guide.
        gates: for each run of the pair, where gradients are split.
        leaves: the latents, where they are leaves of the graph.
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    scale: float = 1.0
    num_dims: int = 0
    not_reparameterized: tuple[str, ...] = ()
    gradients: Gradients = "total"
    log_guide_score: Tensor | None = None
    log_dream: Tensor | None = None
    sites: tuple[SiteTerms, ...] = ()
    gates: tuple[Gate, ...] = ()
    leaves: tuple[Leaf, ...] = ()

    @property
    def log_weights(self) -> Tensor:
        """Their sum, log p(x, z) - log q(z|x), shape (K, B)."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_guide.shape[0]

    @property
    def num_data(self) -> int:
        """B, the data in this batch."""
        return self.log_guide.shape[1]

    def surrogate(self, model: Tensor, path: Tensor, score: Tensor) -> Tensor:
        r"""A tensor (B,) with a chosen gradient; its value means nothing.

        .. math:: \sum_k a_k \, \partial_\theta \log p_\theta(x, z_k) + b_k \, \frac{\partial \log w_k}{\partial z_k}
            \frac{d z_k}{d\phi} - c_k \, \partial_\phi \log q_\phi(z_k \mid x)

        Weights drawn with total gradients have one coefficient, ``model``; detached samples have no path. A particle of
        weight zero gets none of a and b, and a datum all of whose weights are zero gets nothing at all.

        Args:
            model: a, shape (K, B), detached, as all three.
            path: b.
            score: c.
        """
        log_joint = self.log_likelihood + self.log_prior
        dead = (log_joint - self.log_guide).detach() == -torch.inf
        lost = dead.all(0)

        def times(coefficient: Tensor, term: Tensor, out: Tensor) -> Tensor:
            # Both are cleared: zero times infinity is no number, here and in the backward pass.
            return (torch.where(out, 0.0, coefficient) * torch.where(out, 0.0, term)).sum(0)

        if self.gradients == "total":
            return times(model, log_joint - self.log_guide, dead)
        if self.gradients == "score":
            return times(model, log_joint, dead) - times(score, self.log_guide, lost)
        assert self.log_guide_score is not None
        # The path's gradient is the model's times a factor, so the model needs a coefficient where the path has one.
        model = torch.maximum(model, torch.finfo(model.dtype).eps * path)
        factor = torch.where(dead | (model == 0), 0.0, path / model)
        for gate, rows in zip(self.gates, factor.split(self.num_particles // len(self.gates)), strict=True):
            gate.factor = rows
        pathwise = times(path, self.log_guide - self.log_guide_score, dead)
        return times(model, log_joint, dead) - pathwise - times(score, self.log_guide_score, lost)


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
    gradients: Gradients = "total",
    analytic_kl: bool = False,
    **kwargs: Any,
) -> LogWeights:
    r"""Draw particles from the guide and weigh them, for any pair of Pyro programs.

    .. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b)

    Several latent sites, any site names, nested plates, masks and ``pyro.factor`` are read as Pyro reads them. Gradients flow
    through reparameterised samples; wrap the call in ``torch.no_grad()`` to only score.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        *args: the arguments of both, usually the batch ``x`` of shape ``(B, ...)``.
        num_particles: K.
        vectorize_particles: run once with K particles in a plate on the left, or K times. Programs whose networks accept
            leading dimensions want ``True``.
        max_plate_nesting: how many plate dimensions the pair uses; found by one extra run when not given.
        gradients: ``"total"`` as reparameterised samples give them; ``"split"`` also the part of log q that reaches the guide's
            parameters at fixed samples, so that :meth:`LogWeights.surrogate` can weigh model, path and score apart;
            ``"score"`` samples detached, for latents without a path; ``"leaf"`` samples as leaves of the graph. A guide
            with several sites runs once more for ``"split"`` and ``"leaf"``, so it must not draw dropout masks of its own.
        analytic_kl: fill in the closed-form KL of each site that has one.
        **kwargs: keyword arguments of both programs.

    Returns:
        The parts, each of shape (K, B), in nats.

    Raises:
        ValueError: there is no data plate, a site lies outside it, plates and shapes disagree, a latent of one program is
            missing from the other, or only some sites are scaled. The message says what to write.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.log_weights(vae.model, vae.guide, torch.zeros(5, 9), num_particles=3).log_weights.shape
        torch.Size([3, 5])
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is a positive integer, not {num_particles!r}.")
    if not torch.is_grad_enabled():
        gradients = "total"
    together = num_particles if vectorize_particles else 1
    if max_plate_nesting is None and together > 1:
        max_plate_nesting = inspect_pair(model, guide, *args, **kwargs).max_plate_nesting

    def draw() -> LogWeights:
        traces = _trace_pair(model, guide, args, kwargs, together, max_plate_nesting, gradients)
        return _read(traces, together, gradients, analytic_kl)

    return draw() if together == num_particles else _concatenate([draw() for _ in range(num_particles)])


@dataclass(frozen=True)
class PairInfo:
    """What one run of a pair tells about it.

    Attributes:
        max_plate_nesting: how many plate dimensions it uses.
        num_data: data in the batch.
        scale: N/B of a subsampled data plate, else 1.0.
        num_dims: observed numbers per datum.
        latents: names of the latent sites.
        not_reparameterized: those of them without a reparameterised sampler.
    """

    max_plate_nesting: int
    num_data: int
    scale: float
    num_dims: int
    latents: tuple[str, ...]
    not_reparameterized: tuple[str, ...]


def inspect_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> PairInfo:
    """Run a pair once, without touching the random stream, and say what it is made of.

    Raises:
        ValueError: as :func:`log_weights`; also where an observed value lies outside its distribution's support.
    """
    _check_finite(args)
    with torch.no_grad(), _same_random_stream(args), poutine.block():
        traces = _trace_pair(model, guide, args, kwargs, 1, None)
        model_trace, guide_trace = traces.model, traces.guide
        for site in _sites(model_trace):
            if site["is_observed"]:
                _check_support(site)
        weights = _read(traces, 1)
    latents = tuple(site["name"] for site in _sites(guide_trace) if not site["is_observed"])
    return PairInfo(
        max_plate_nesting=_nesting(model_trace, guide_trace),
        num_data=weights.num_data,
        scale=weights.scale,
        num_dims=weights.num_dims,
        latents=latents,
        not_reparameterized=weights.not_reparameterized,
    )


def find_parameters(model: Program, guide: Program, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The unconstrained leaf parameters of a pair, as Pyro's SVI finds them, each once.

    Parameters of an ``nn.Module`` whose bound method a program is come along, whether or not it calls ``pyro.module``.

    Raises:
        ValueError: a module's parameter is hidden by another one of the same name in Pyro's store, so that it would never
            train.
    """
    with torch.no_grad(), _same_random_stream(args), poutine.trace(param_only=True) as capture:
        _trace_pair(model, guide, args, kwargs, 1, None)
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


def dreamt_log_guide(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """Dream one pair (z, x) per datum from the model itself, and return its log q(z|x), shape (B,), in nats.

    Raises:
        ValueError: an observed site's ``obs`` is not one of the programs' arguments, so the guide cannot be shown a dream.
    """
    with torch.no_grad():
        dream = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    swaps: dict[int, Tensor] = {}
    for site in _sites(dream):
        if "was_observed" not in site["infer"] or type(site["fn"]).__name__ == "Unit":
            continue
        obs = site["infer"]["obs"]
        if not any(arg is obs for arg in (*args, *kwargs.values())):
            raise ValueError(
                f"Sleep shows the guide a dream of site {site['name']!r}, but its obs is not one of the programs' arguments as "
                f"they were given: observe the argument itself, or choose the wake phase."
            )
        swaps[id(obs)] = site["value"]
    dreamt_args = [swaps.get(id(arg), arg) for arg in args]
    dreamt_kwargs = {key: swaps.get(id(arg), arg) for key, arg in kwargs.items()}
    trace = poutine.trace(poutine.replay(guide, trace=dream)).get_trace(*dreamt_args, **dreamt_kwargs)
    sites = list(_sites(prune_subsample_sites(trace)))
    data, nesting = _data_plate(sites), _nesting(trace)
    return torch.cat([_per_datum(site, _log_prob(site), data, 1, nesting) for site in sites]).sum(0)


class _Detach(Messenger):
    """Later sites see detached samples of earlier ones."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


class _Traces(NamedTuple):
    model: Trace
    guide: Trace
    rescored: Trace | None = None  # the guide at the samples, cut off from their path
    gate: Gate | None = None


def _trace_pair(
    model: Program,
    guide: Program,
    args: tuple,
    kwargs: dict,
    num_particles: int,
    max_plate_nesting: int | None,
    gradients: Gradients = "total",
) -> _Traces:
    def particles(run: Program) -> Program:
        # One plate object for each run: a plate is entered once.
        if num_particles == 1:
            return run
        assert max_plate_nesting is not None
        return pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run)

    def trace(run: Program) -> Trace:
        return poutine.trace(run).get_trace(*args, **kwargs)

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
        if rescored is not None and sum(1 for _ in _sites(prune_subsample_sites(guide_trace))) > 1:
            # A later site's distribution depends on an earlier sample, which must be the one without a path.
            rescored = trace(poutine.replay(particles(guide), trace=rescored))
    except (RuntimeError, ValueError) as error:
        if num_particles == 1:
            raise error.__cause__ or error from None  # without the trace shapes that Pyro appends to the sentence
        raise ValueError(
            f"The pair runs with one particle but not with {num_particles} on the left of its batch "
            f"({str(error).splitlines()[0]}): let its networks accept leading dimensions, or pass vectorize_particles=False."
        ) from error
    rescored = None if rescored is None else prune_subsample_sites(rescored)
    return _Traces(prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace), rescored, gate)


def _with_values(trace: Trace, change: Callable[[dict], Tensor]) -> Trace:
    changed = trace.copy()
    for site in _sites(trace):
        if not site["is_observed"] and not site_is_subsample(site):
            changed.nodes[site["name"]] = {**site, "value": change(site)}
    return changed


def _as_leaf(site: dict) -> Tensor:
    value = site["value"].detach()
    return value.requires_grad_() if value.is_floating_point() else value


def _concatenate(draws: list[LogWeights]) -> LogWeights:
    """Runs of one particle each as one set of weights."""
    first = draws[0]

    def join(part: Callable[[LogWeights], Tensor | None]) -> Any:
        parts = [part(draw) for draw in draws]
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

    def join_site(index: int) -> SiteTerms:
        return SiteTerms(
            first.sites[index].name,
            join(lambda draw: draw.sites[index].log_prior),
            join(lambda draw: draw.sites[index].log_guide),
            join(lambda draw: draw.sites[index].kl),
        )

    return replace(
        first,
        log_likelihood=join(lambda draw: draw.log_likelihood),
        log_prior=join(lambda draw: draw.log_prior),
        log_guide=join(lambda draw: draw.log_guide),
        log_guide_score=join(lambda draw: draw.log_guide_score),
        sites=tuple(join_site(index) for index in range(len(first.sites))),
        gates=tuple(gate for draw in draws for gate in draw.gates),
        leaves=tuple(leaf._replace(rows=slice(row, row + 1)) for row, draw in enumerate(draws) for leaf in draw.leaves),
    )


def _read(traces: _Traces, num_particles: int, gradients: Gradients = "total", analytic_kl: bool = False) -> LogWeights:
    model_sites, guide_sites = list(_sites(traces.model)), list(_sites(traces.guide))
    _check_same_latents(model_sites, guide_sites)
    sites = model_sites + guide_sites
    data = _data_plate(sites)
    scale = data.full_size / data.size
    _check_scale(sites, scale, data.name)
    nesting = _nesting(traces.model, traces.guide)
    zeros = _log_prob(sites[0]).new_zeros(num_particles, data.size)

    def read(site: dict) -> Tensor:
        return _per_datum(site, _log_prob(site), data, num_particles, nesting)

    observed = [site for site in model_sites if site["is_observed"]]
    priors = {site["name"]: site for site in model_sites if not site["is_observed"]}
    # Sampled before detached: a flow remembers the inverse of its last value only.
    if gradients == "score":
        _check_scores(guide_sites)
    try:
        log_guide = {site["name"]: read(site) for site in guide_sites}
        rescored = None if traces.rescored is None else sum((read(site) for site in _sites(traces.rescored)), zeros)
    except (NotImplementedError, KeyError) as error:
        if gradients == "total":
            raise
        raise ValueError(
            f"The guide's flow cannot be inverted ({str(error) or type(error).__name__}), so its score cannot be told from its "
            f"path: choose an estimator that needs the total gradient only, such as elbo or iwae."
        ) from error
    log_prior = {name: read(site) for name, site in priors.items()}
    kls = _analytic_kls(priors, guide_sites) if analytic_kl else {}
    leaves, layout = [], Layout(num_particles, data.size, nesting, data.dim)
    if traces.gate is not None:
        traces.gate.layout = layout
    if gradients == "leaf" and traces.rescored is not None:
        for site in (site for site in guide_sites if not site["is_observed"]):
            name, value = site["name"], traces.rescored.nodes[site["name"]]["value"]
            prior = priors[name]["fn"] if name in priors else None
            is_point = isinstance(_law(site), pyro.distributions.Delta)
            terms = (site["value"], value, site["fn"].event_dim, prior, is_point, log_prior.get(name, zeros))
            leaves.append(Leaf(name, *terms, slice(0, num_particles), layout))
    return LogWeights(
        log_likelihood=sum((read(site) for site in observed), zeros),
        log_prior=sum(log_prior.values(), zeros),
        log_guide=rescored if rescored is not None and gradients == "leaf" else sum(log_guide.values(), zeros),
        scale=scale,
        num_dims=sum(_num_dims(site, data, num_particles) for site in observed),
        not_reparameterized=tuple(
            site["name"] for site in guide_sites if not site["is_observed"] and not site["fn"].has_rsample
        ),
        gradients=gradients,
        log_guide_score=rescored if gradients == "split" else None,
        sites=tuple(
            SiteTerms(
                name,
                log_prior.get(name, zeros),
                log_guide[name],
                _per_datum(priors[name], kls[name], data, num_particles, nesting) if name in kls else None,
            )
            for name in log_guide
        ),
        gates=() if traces.gate is None else (traces.gate,),
        leaves=tuple(leaves),
    )


def _analytic_kls(priors: dict[str, dict], guide_sites: list[dict]) -> dict[str, Tensor]:
    """KL(q || p) of each site that has a closed form, given its parents.

    The sample of a site can be integrated out of its own term only if p(z|parents) does not depend on it through a parent:
    what precedes the site in the model must precede it in the guide.
    """
    found: dict[str, Tensor] = {}
    before: set[str] = set()
    order = list(priors)
    for site in guide_sites:
        name, prior = site["name"], priors.get(site["name"])
        if prior is not None and site["mask"] is prior["mask"] and before.issuperset(order[: order.index(name)]):
            with suppress(NotImplementedError):  # torch's word for a pair of families without a closed form
                found[name] = scale_and_mask(kl_divergence(site["fn"], prior["fn"]), 1.0, site["mask"])
        before.add(name)
    return found


def _sites(trace: Trace) -> Iterator[dict]:
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            yield site


def _plates(site: dict) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.name != PARTICLES]


def _nesting(*traces: Trace) -> int:
    dims = [frame.dim for trace in traces for site in _sites(trace) for frame in _plates(site) if frame.vectorized]
    return -min(dims, default=0)


def _check_same_latents(model_sites: list[dict], guide_sites: list[dict]) -> None:
    in_model = {site["name"] for site in model_sites if not site["is_observed"]}
    observed = {site["name"] for site in model_sites if site["is_observed"]}
    in_guide = {
        site["name"] for site in guide_sites if not site["is_observed"] and not site["infer"].get("is_auxiliary")
    }
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


def _data_plate(sites: list[dict]) -> Any:
    write = 'write "with pyro.plate("data", x.shape[0]):" around all its sample statements, in model and guide.'
    frames = {frame.name: frame for site in sites for frame in _plates(site)}
    if not frames:
        raise ValueError(f"The pair has no data plate, so its log-weights cannot be told apart by datum: {write}")
    shared = set(frames).intersection(*({frame.name for frame in _plates(site)} for site in sites))
    if not shared:
        plate = "data" if "data" in frames else next(iter(frames))
        outside = next(site["name"] for site in sites if plate not in {frame.name for frame in _plates(site)})
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
    return frame


def _check_scale(sites: list[dict], scale: float, plate: str) -> None:
    for site in sites:
        if isinstance(site["scale"], Tensor) or abs(site["scale"] - scale) > 1e-9 * scale:
            raise ValueError(
                f"Site {site['name']!r} is scaled apart from the data plate {plate!r} (by poutine.scale, or by subsampling "
                f"inside a datum), which is no weight of p(x, z): remove the scale, and use an estimator's beta to anneal."
            )


def _law(site: dict) -> Any:
    """A site's distribution without what Pyro wraps around it."""
    law = site["fn"]
    while type(law).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        law = law.base_dist
    return law


def _check_scores(guide_sites: list[dict]) -> None:
    for site in guide_sites:
        law = _law(site)
        if isinstance(law, pyro.distributions.Delta) and law.v.requires_grad:
            raise ValueError(
                f"The guide's site {site['name']!r} is a learned Delta, which has no score, so this estimator would never move "
                f"it: choose one that follows its path, such as elbo."
            )


def _log_prob(site: dict) -> Tensor:
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, 1.0, site["mask"])


def _per_datum(site: dict, log_prob: Tensor, data: Any, num_particles: int, nesting: int) -> Tensor:
    """A site's log-probability as (K, B), summed over the plates inside a datum."""
    size = {frame.dim: frame.size for frame in _plates(site) if frame.vectorized} | {-nesting - 1: num_particles}
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


def _num_dims(site: dict, data: Any, num_particles: int) -> int:
    if type(site["fn"]).__name__ == "Unit":  # pyro.factor observes nothing
        return 0
    event = site["fn"].event_shape.numel()
    for frame in _plates(site):
        event *= frame.size if frame.vectorized and frame.name != data.name else 1
    return event


def _check_finite(args: tuple) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and not bool(torch.isfinite(arg).all()):
            bad = (~torch.isfinite(arg)).flatten(1).any(1) if arg.dim() > 1 else ~torch.isfinite(arg)
            raise ValueError(
                f"The data hold NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first row "
                f"{int(bad.nonzero()[0])}: drop or repair them; where values are missing, pass a mask beside zeros."
            )


def _check_support(site: dict) -> None:
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
    law = type(_law(site)).__name__
    low, high = site["value"].min().item(), site["value"].max().item()
    raise ValueError(
        f"The data have values outside the support of {law} at site {site['name']!r}, in {len(outside)} of the "
        f"{inside.numel()} it was given (they range from {low:g} to {high:g}): "
        f"{'binarise' if law == 'Bernoulli' else 'rescale'} them, or choose another likelihood."
    )


@dataclass(frozen=True)
class FirstRun:
    """What the first run of a pair on a batch settles for all later ones.

    Attributes:
        parameters: the unconstrained leaf parameters.
        info: what the pair is made of.
        dtype: the floating type that its data must have.
        device: where its parameters live.
    """

    parameters: list[Tensor]
    info: PairInfo
    dtype: torch.dtype
    device: torch.device


def first_run(model: Program, guide: Program, *args: Tensor) -> FirstRun:
    """Find a pair's parameters, structure, floating type and device from one batch.

    NumPy's arrays are float64 where most networks are float32. Which a program wants shows only when it runs, so a batch
    that fails as it is runs once more in torch's default type.

    Raises:
        ValueError: as :func:`inspect_pair` and :func:`find_parameters`.
        RuntimeError: the pair fails in both types; the message is torch's.
    """
    default = torch.get_default_dtype()
    try:
        parameters = find_parameters(model, guide, *args)
    except RuntimeError:
        args = tuple(arg.to(default) if arg.is_floating_point() else arg for arg in args)
        try:
            parameters = find_parameters(model, guide, *args)
        except RuntimeError as second:
            raise second from None
    like = next((parameter for parameter in parameters if parameter.is_floating_point()), None)
    dtype, device = (default, args[0].device) if like is None else (like.dtype, like.device)
    args = tuple(arg.to(device=device, dtype=dtype if arg.is_floating_point() else None) for arg in args)
    return FirstRun(parameters, inspect_pair(model, guide, *args), dtype, device)


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
def _same_random_stream(args: tuple) -> Iterator[None]:
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
