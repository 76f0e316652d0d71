r"""Log-weights of a pair of Pyro programs: the only reader of Pyro traces.

A *pair* is a ``model`` and a ``guide`` that take the same arguments and hold every latent and observed site in one data
plate. For K particles and B data,

.. math:: \log w_{kb} = \log p(x_b \mid z_{kb}) + \log p(z_{kb}) - \log q(z_{kb} \mid x_b), \qquad z_{kb} \sim q(\cdot \mid x_b).

Every bound and every estimate in this package is a reduction of these numbers. The plate's subsampling scale N/B is kept
apart, because it belongs outside a logsumexp; particles stand in a plate to the left of all the pair's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

Program = Callable[..., Any]

PARTICLES = "_pyrovae_particles"


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
    """

    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    scale: float = 1.0
    num_dims: int = 0
    not_reparameterized: tuple[str, ...] = field(default=())

    @property
    def log_weights(self) -> Tensor:
        """log p(x, z) - log q(z|x), shape (K, B)."""
        return self.log_likelihood + self.log_prior - self.log_guide

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_guide.shape[0]

    @property
    def num_data(self) -> int:
        """B, the data in this batch."""
        return self.log_guide.shape[1]


def log_weights(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int,
    vectorize_particles: bool = True,
    max_plate_nesting: int | None = None,
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
    if not vectorize_particles and num_particles > 1:
        draws = [log_weights(model, guide, *args, num_particles=1, **kwargs) for _ in range(num_particles)]
        return LogWeights(
            *(torch.cat([getattr(draw, part) for draw in draws]) for part in ("log_likelihood", "log_prior", "log_guide")),
            draws[0].scale,
            draws[0].num_dims,
            draws[0].not_reparameterized,
        )
    if max_plate_nesting is None and num_particles > 1:
        max_plate_nesting = inspect_pair(model, guide, *args, **kwargs).max_plate_nesting
    traces = _trace_pair(model, guide, args, kwargs, num_particles, max_plate_nesting)
    return _read(*traces, num_particles)


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
        model_trace, guide_trace = _trace_pair(model, guide, args, kwargs, 1, None)
        for site in _sites(model_trace):
            if site["is_observed"]:
                _check_support(site)
        weights = _read(model_trace, guide_trace, 1)
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


def _trace_pair(
    model: Program, guide: Program, args: tuple, kwargs: dict, num_particles: int, max_plate_nesting: int | None
) -> tuple[Trace, Trace]:
    if num_particles > 1:
        assert max_plate_nesting is not None
        # One plate object for each program: a plate is entered once per run.
        model, guide = (pyro.plate(PARTICLES, num_particles, dim=-max_plate_nesting - 1)(run) for run in (model, guide))
    try:
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        if num_particles == 1:
            raise error.__cause__ or error from None  # without the trace shapes that Pyro appends to the sentence
        raise ValueError(
            f"The pair runs with one particle but not with {num_particles} on the left of its batch "
            f"({str(error).splitlines()[0]}): let its networks accept leading dimensions, or pass vectorize_particles=False."
        ) from error
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def _read(model_trace: Trace, guide_trace: Trace, num_particles: int) -> LogWeights:
    model_sites, guide_sites = list(_sites(model_trace)), list(_sites(guide_trace))
    _check_same_latents(model_sites, guide_sites)
    sites = model_sites + guide_sites
    data = _data_plate(sites)
    scale = data.full_size / data.size
    _check_scale(sites, scale, data.name)
    nesting = _nesting(model_trace, guide_trace)

    def total(terms: Iterable[dict]) -> Tensor:
        return sum((_per_datum(site, data, num_particles, nesting) for site in terms), zeros)

    zeros = _log_prob(sites[0]).new_zeros(num_particles, data.size)
    observed = [site for site in model_sites if site["is_observed"]]
    return LogWeights(
        log_likelihood=total(observed),
        log_prior=total(site for site in model_sites if not site["is_observed"]),
        log_guide=total(guide_sites),
        scale=scale,
        num_dims=sum(_num_dims(site, data, num_particles) for site in observed),
        not_reparameterized=tuple(
            site["name"] for site in guide_sites if not site["is_observed"] and not site["fn"].has_rsample
        ),
    )


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


def _log_prob(site: dict) -> Tensor:
    value = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(value, 1.0, site["mask"])


def _per_datum(site: dict, data: Any, num_particles: int, nesting: int) -> Tensor:
    """A site's log-probability as (K, B), summed over the plates inside a datum."""
    log_prob = _log_prob(site)
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
    law = site["fn"]
    while type(law).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        law = law.base_dist
    law = type(law).__name__
    low, high = site["value"].min().item(), site["value"].max().item()
    raise ValueError(
        f"The data have values outside the support of {law} at site {site['name']!r}, in {len(outside)} of the "
        f"{inside.numel()} it was given (they range from {low:g} to {high:g}): "
        f"{'binarise' if law == 'Bernoulli' else 'rescale'} them, or choose another likelihood."
    )


@contextmanager
def _same_random_stream(args: tuple) -> Iterator[None]:
    devices = {arg.device for arg in args if isinstance(arg, Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
