"""log p(x) without sampling: discrete latents summed, linear-Gaussian pairs in closed form, two dimensions by quadrature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from pyro.distributions import MultivariateNormal, Normal
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .._validation import unknown
from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.checks import refuse_masked
from ..programs.inspect import FIRST_ROWS, inspect_pair, prepare
from ..programs.sites import Layout, Program, data_plate, log_prob_of, per_datum, plate_nesting, plate_sizes, sites_of
from ..programs.state import in_own_scope
from ..programs.tracing import Substitute, Trace, evaluation_mode, explained, trace_from_prior, trace_program
from ..programs.unconstrained import UnconstrainedPair
from ..programs.wrappers import base_distribution, is_factor
from .measure import evidence_fields, scored_data
from .quadrature import integrate
from .results import Evidence

Method = Literal["auto", "enumerate", "quadrature", "linear_gaussian"]
METHODS = {
    "enumerate": "exact, by enumeration",
    "quadrature": "exact, by quadrature",
    "linear_gaussian": "exact, linear-Gaussian",
}
CHUNK_NUMBERS = 2**22
MOST_ASSIGNMENTS = 2**20
DRAWS = 1024  # of prior and of guide, that show the scale of the latents
SHIFTS = (0.0041, -0.0035, 0.0057, -0.0063)  # of the first cells of each further quadrature, in s
HIGHER = 2.0  # nats by which a draw may exceed all that the cells saw


@in_own_scope()
def exact(
    model: Program,
    guide: Program,
    x: Any,
    *,
    method: Method = "auto",
    tolerance: float = 1e-5,
    vectorize_particles: bool = True,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    r"""log p(x) of every datum without Monte Carlo error, where the latents are few or the pair is linear-Gaussian.

    .. math:: \log p(x) = \log \sum_z p(x, z) \qquad \text{or} \qquad \log p(x) = \log \int p(x, z) \, dz

    - ``"enumerate"``: all latents are discrete, and every assignment of theirs is summed;
    - ``"linear_gaussian"``: all sites are Normal with locations affine in earlier latents and scales that do not depend on
      them, so log p(x, z) is a quadratic in z, whose integral is known. That they are affine is read off every tensor
      operation that touches a latent, so a network that only looks affine where it is probed is refused;
    - ``"quadrature"``: one or two continuous numbers per datum, by cells that are split wherever they may hold more than is
      known of them: once over all that the prior allows, and again in the scale of the posterior that showed, until two such
      answers agree. A mode that shows in no point of either, nor in a draw of the prior or the guide, would be missed.

    An angle is integrated over one turn, and a mixture over all that any of its components allows.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); only quadrature uses it, to look for modes.
        x: data as for :func:`pyrovae.log_marginal`.
        method: one of the above, or ``"auto"`` for the first that fits.
        tolerance: the error at which quadrature stops, in nats.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: of the draws that place the grid; the global random stream is left untouched. ``None`` uses that stream.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats. ``se`` is what rounding may have moved it by, and for quadrature also what the cells leave in
        doubt and by how much two sets of them differ: where it is above 0.01, the answer is not ``reliable``.
        ``num_samples`` is the number of assignments or grid points per datum, one in closed form; ``khat`` is ``-inf``, as for
        constant weights; ``elbo`` equals ``log_px``, since nothing is bounded.

    Raises:
        ValueError: bad data, or latents that the method cannot integrate out; the message says why.

    References:
        `Tipping and Bishop, Probabilistic Principal Component Analysis, 1999
        <https://doi.org/10.1111/1467-9868.00196>`_. `Genz and Malik, An adaptive algorithm for numerical integration over an
        N-dimensional rectangular region, 1980 <https://doi.org/10.1016/0771-050X(80)90039-X>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16], activation="tanh")
        >>> evidence = pv.exact(vae.model, vae.guide, torch.zeros(3, 9))
        >>> evidence.method, bool(evidence.se.max() < 1e-4)
        ('exact, by quadrature', True)
    """
    if method not in ("auto", *METHODS):
        raise ValueError(unknown("method", method, ["auto", *METHODS]))
    if not tolerance > 0:
        raise ValueError(f"tolerance is a positive number of nats, not {tolerance!r}.")
    data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
    first = prepare(model, guide, data, vectorize_particles=vectorize_particles)
    data.to(first.dtype, first.device, first.floating)
    data.batch_size = first.whole or 16
    dims, nesting = max(first.info.num_dims, 256), first.info.max_plate_nesting
    parts: list[_Answer] = []
    notes: list[dict[str, np.ndarray]] = []
    devices = [first.device] if first.device.type == "cuda" else []
    chosen: str | None = None if method == "auto" else method
    with (
        evaluation_mode(model, guide),
        torch.random.fork_rng(devices, enabled=seed is not None),
        tqdm(data, total=data.num_batches, desc="exact log p(x)", unit="batch", disable=not progress) as bar,
    ):
        if seed is not None:
            torch.manual_seed(seed)
        for batch in bar:
            notes.append(scored_data(inspect_pair(model, guide, *batch), batch))
            # The data and the pair have been checked, and a grid reaches to where values round to the edge of a support.
            with pyro.validation_enabled(False), torch.no_grad():
                chosen = chosen or _choose(model, guide, batch)
                if chosen == "enumerate":
                    parts.append(_enumerate(model, batch, nesting, CHUNK_NUMBERS // dims, vectorize_particles))
                elif chosen == "linear_gaussian":
                    parts.append(
                        _linear_gaussian(UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize_particles))
                    )
                else:
                    pair = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize_particles)
                    parts.append(_quadrature(pair, tolerance, max(1, CHUNK_NUMBERS // (dims * pair.num_data))))
            bar.set_postfix_str(f"{np.mean(np.concatenate([part.log_px for part in parts])):.2f} nats/datum")
    assert chosen is not None
    log_px = np.concatenate([part.log_px for part in parts])
    points = max(part.num_points for part in parts)
    return Evidence(
        log_px=log_px,
        se=np.concatenate([part.error for part in parts]),
        ess=np.full(len(log_px), float(points)),
        khat=np.full(len(log_px), -np.inf),
        elbo=log_px.copy(),
        num_samples=points,
        **evidence_fields(notes, first.info.given),
        method=METHODS[chosen],
    )


class _Answer(NamedTuple):
    log_px: np.ndarray  # (B,)
    error: np.ndarray  # (B,)
    num_points: int


def _choose(model: Program, guide: Program, batch: Batch) -> str:
    trace = trace_from_prior(model, None, batch, 1, None).guide
    if all(site["fn"].has_enumerate_support for site in sites_of(trace)):
        return "enumerate"
    pair = UnconstrainedPair(model, guide, batch)
    why = _not_linear_gaussian(pair)
    if why is None:
        return "linear_gaussian"
    if pair.num_latents <= 2:
        return "quadrature"
    raise ValueError(
        f"There is no exact answer for {pair.num_latents} continuous latent numbers per datum, and {why}: use pyrovae.ais, or "
        f"log_marginal."
    )


def _enumerate(model: Program, batch: Batch, nesting: int, most: int, vectorize: bool) -> _Answer:
    """Sum the joint over every assignment of the latents of a datum."""
    first = trace_from_prior(model, None, batch, 1, None).model
    sites = [site for site in sites_of(first) if not site["is_observed"]]
    refuse_masked(sites)
    data = data_plate(list(sites_of(first)))
    nesting = max(nesting, plate_nesting(first))
    supports = [_support(site) for site in sites]
    numbers = [math.prod(plate_sizes(site, nesting)) // data.size for site in sites]
    each = [len(support) for support, number in zip(supports, numbers, strict=True) for _ in range(number)]
    total = math.prod(each)
    if total > MOST_ASSIGNMENTS:
        raise ValueError(
            f"The latents of one datum have {total:,} assignments, more than the {MOST_ASSIGNMENTS:,} that are summed: use "
            f"log_marginal."
        )

    def trace_at(index: Tensor) -> Trace:
        """The model's trace at assignments by their numbers (M, B, all numbers)."""
        layout, given, column = Layout(len(index), data.size, nesting, data.dim), {}, 0
        for site, support, number in zip(sites, supports, numbers, strict=True):
            values = support[index[..., column : column + number]]  # (M, B, n, *event)
            given[site["name"]] = layout.to_site(values, plate_sizes(site, nesting), site["fn"].event_shape)
            column += number
        with explained(len(index)):
            return trace_program(model, batch, len(index), nesting, Substitute(given))

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
    error = _rounding(trace_at(likeliest[None]), data, 1, nesting)[0]
    return _Answer(log_px.cpu().numpy(), error.cpu().numpy(), total)


def _support(site: dict) -> Tensor:
    """The values of one site's support, shape (C, *event)."""
    if not site["fn"].has_enumerate_support:
        raise ValueError(
            f"The latent site {site['name']!r} ({type(base_distribution(site)).__name__}) has no finite support to sum over: "
            f'choose method="quadrature", or use log_marginal.'
        )
    try:
        values = site["fn"].enumerate_support(expand=False)
    except NotImplementedError as error:  # as of a Binomial whose total_count differs between data
        raise ValueError(
            f"The support of the latent site {site['name']!r} cannot be listed ({error}): use log_marginal."
        ) from error
    return values.reshape(len(values), *site["fn"].event_shape)


def _chunks(codes: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    chunk = []
    for code in codes:
        chunk.append(code)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _linear_gaussian(pair: UnconstrainedPair) -> _Answer:
    r"""Least squares: log p(x, u) = c - |r(u)|^2 / 2, where r(u), all sites' residuals over their scales, is affine in u.

    The log-joint itself is a difference of numbers that float32 does not hold where the noise is small, so the program gives
    the locations only, the rest is float64, and the residuals are taken anew where they are small: at the posterior's mean.
    """
    why = _not_linear_gaussian(pair)
    if why is not None:
        raise ValueError(f'This pair is not linear-Gaussian, since {why}: choose method="auto", or use log_marginal.')
    size, unit = pair.num_latents, torch.eye(pair.num_latents, dtype=pair.dtype, device=pair.device)
    points = torch.cat([torch.zeros_like(unit[:1]), unit])[:, None].expand(size + 1, pair.num_data, size)
    residual, rounding, log_norm = _residuals(pair, points)
    slope = (residual[1:] - residual[0]).permute(1, 2, 0)  # (B, n, L)
    slope_rounding = (rounding[1:] + rounding[0]).permute(1, 2, 0)
    q, r = torch.linalg.qr(slope)
    inverse = torch.linalg.solve_triangular(r, q.mT, upper=True)  # (B, L, n)
    mean = -(inverse @ residual[0][..., None])[..., 0]
    for _ in range(2):
        mean = mean.to(pair.dtype).double()
        at_mean, at_rounding, _ = _residuals(pair, mean[None].to(pair.dtype))
        # What the program computes there, beside what its values elsewhere predict, shows how it rounds.
        predicted = residual[0] + (slope @ mean[..., None])[..., 0]
        expected = at_rounding[0] + rounding[0] + (slope_rounding @ mean.abs()[..., None])[..., 0]
        growth = torch.where(expected > 0, (at_mean[0] - predicted).abs() / expected, 0.0).amax().clamp(min=1.0)
        step = -(inverse @ at_mean[0][..., None])[..., 0]
        mean = mean + step
    left = at_mean[0] + (slope @ step[..., None])[..., 0]
    half_log_det = r.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
    log_px = log_norm - left.square().sum(-1) / 2 - half_log_det + size / 2 * math.log(2 * math.pi)
    squares = (left * at_rounding[0]).square().sum(-1) + (inverse.mT * slope_rounding).square().sum((-2, -1))
    scales = torch.finfo(pair.dtype).eps * (left.square().sum(-1) + left.shape[-1])
    return _Answer(log_px.cpu().numpy(), (growth * squares.sqrt() + scales).cpu().numpy(), 1)


def _residuals(pair: UnconstrainedPair, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All sites' residuals over their scales at ``flat``, what rounding adds to each, both (K, B, n), and c (B,)."""
    if not pair.vectorize and len(flat) > 1:
        parts = [_residuals(pair, row[None]) for row in flat]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts]), parts[0][2]
    layout = Layout(len(flat), pair.num_data, pair.nesting, pair.data.dim)
    residuals: list[Tensor] = []
    roundings: list[Tensor] = []
    norms: list[Tensor] = []
    with torch.no_grad():
        for site in sites_of(pair.model_trace(flat)[0]):
            distribution, value = base_distribution(site), site["value"].double()
            loc, eps = distribution.loc.double(), torch.finfo(distribution.loc.dtype).eps
            gap, size = value - loc, eps / 2 * (value.abs() + loc.abs())
            if isinstance(distribution, torch.distributions.Normal):
                gap, size, log_scale = gap / distribution.scale, size / distribution.scale, distribution.scale.double().log()
            else:
                inverse = torch.linalg.inv(distribution._unbroadcasted_scale_tril.double())
                gap, size = ((part @ size_of[..., None])[..., 0] for part, size_of in ((inverse, gap), (inverse.abs(), size)))
                log_scale = -inverse.diagonal(dim1=-2, dim2=-1).log()
            seen = _seen(site).expand(gap.shape)
            log_norm = -log_scale - math.log(2 * math.pi) / 2
            place = (plate_sizes(site, pair.nesting), site["fn"].event_shape)
            for kept, part in ((residuals, gap), (roundings, size), (norms, log_norm.expand(gap.shape))):
                kept.append(layout.from_site(torch.where(seen, part, 0.0), *place))
    return torch.cat(residuals, -1), torch.cat(roundings, -1), torch.cat(norms, -1)[0].sum(-1)


def _seen(site: dict) -> Tensor:
    """Which numbers of a Gaussian site no mask leaves out, to be broadcast to its value."""
    distribution, inner = site["fn"], base_distribution(site)
    total = len(inner.batch_shape) + len(inner.event_shape)
    seen = torch.ones((), dtype=torch.bool, device=site["value"].device)
    masks = [] if site["mask"] is None else [(site["mask"], distribution)]
    while distribution is not inner:
        if isinstance(distribution, pyro.distributions.MaskedDistribution):
            masks.append((distribution._mask, distribution))
        distribution = distribution.base_dist
    for mask, distribution in masks:
        mask = torch.as_tensor(mask, device=seen.device)
        seen = seen & mask.reshape(*mask.shape, *[1] * (total - len(distribution.batch_shape)))
    return seen


def _not_linear_gaussian(pair: UnconstrainedPair) -> str | None:
    """Why a pair is not linear-Gaussian, or ``None`` if it is."""
    flat = torch.zeros(1, pair.num_data, pair.num_latents, dtype=pair.dtype, device=pair.device)
    for site in sites_of(pair.model_trace(flat)[0]):
        if is_factor(site):
            return f"it has the pyro.factor {site['name']!r}"
        if type(base_distribution(site)) not in _GAUSSIAN:
            return f"its site {site['name']!r} is {type(base_distribution(site)).__name__}, not Normal"
    watch = _AffineOnly()
    try:
        trace = pair.follow(flat, watch)
    except _NotAffineError as error:
        return f"its model takes {error} of a latent, which is not affine"
    for site in sites_of(trace):
        distribution = base_distribution(site)
        scale = (
            distribution.scale
            if isinstance(distribution, torch.distributions.Normal)
            else distribution._unbroadcasted_scale_tril
        )
        for what, value in [("scale", scale), ("mask", site["mask"])]:
            if isinstance(value, Tensor) and watch.holds(value):
                return f"the {what} of its site {site['name']!r} depends on a latent"
    return None


_GAUSSIAN = (Normal, MultivariateNormal, torch.distributions.Normal, torch.distributions.MultivariateNormal)


class _NotAffineError(Exception):
    """The operation that is not affine."""


class _AffineOnly(TorchDispatchMode):
    """Follow latents through every tensor operation, and stop at one that is not affine in them.

    Looking at what a network gives at some points would take a ReLU that is never crossed for affine; looking at autograd's
    graph would miss a mask made from a latent. Below autograd every operation shows.
    """

    def __init__(self) -> None:
        super().__init__()
        # By storage, which all views of a tensor share; kept alive, so that no other takes its place.
        self._held: dict[int, Any] = {}

    def hold(self, tensor: Tensor) -> None:
        """A tensor depends on a latent."""
        storage = tensor.untyped_storage()
        self._held[storage._cdata] = storage

    def holds(self, value: Any) -> bool:
        """Whether it does."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._held

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        touched = [
            place
            for place, arg in enumerate(given)
            if self.holds(arg) or (isinstance(arg, list | tuple) and any(self.holds(item) for item in arg))
        ]
        out = func(*args, **kwargs)
        if not touched:
            return out
        name = func.overloadpacket.__name__
        one_of = _BILINEAR.get(name)
        if one_of is None and name not in _LINEAR:
            raise _NotAffineError(name.strip("_"))
        if one_of is not None and len(set(touched) & set(one_of)) > 1:
            raise _NotAffineError(f"a product ({name})")
        if name == "div" and (touched != [0] or kwargs.get("rounding_mode")):
            raise _NotAffineError("a quotient")
        if name == "index" and touched != [0]:
            raise _NotAffineError("an index")
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if not tensor.is_floating_point():
                raise _NotAffineError(f"an integer ({name})")
            self.hold(tensor)
        return out


_LINEAR = set(
    "view _unsafe_view reshape expand t transpose permute unsqueeze squeeze select slice split split_with_sizes unbind cat "
    "stack clone neg sum mean _to_copy alias add sub rsub div index index_select constant_pad_nd flip roll repeat cumsum "
    "diagonal diag_embed lift_fresh".split()
)
# Affine in either of two factors, but not in both at once; by the place of the factors among the arguments.
_BILINEAR = {
    "mul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addmv": (1, 2),
    "convolution": (0, 1),
}


def _quadrature(pair: UnconstrainedPair, tolerance: float, most: int) -> _Answer:
    """By cells in the prior's scale, and again in the posterior's that they show, until two such answers agree."""
    dims = pair.num_latents
    if dims > 2:
        raise ValueError(
            f"Quadrature takes one or two continuous latent numbers per datum, not {dims}: use pyrovae.ais, or log_marginal."
        )
    most = most if pair.vectorize else 1

    def log_f(flat: Tensor) -> Tensor:
        return torch.cat([_log_joint(pair, part) for part in flat.split(most)])

    prior, guide = (_draws(pair, most, start) for start in ("prior", "guide"))
    draws = torch.cat([prior, guide])
    heights = log_f(draws)
    likeliest = draws.gather(0, heights.argmax(0)[None, :, None].expand(1, -1, dims))
    rounding = _rounding(pair.model_trace(likeliest.to(pair.dtype))[0], pair.data, 1, pair.nesting)[0]
    target = rounding.clamp(min=tolerance)
    low, middle, high = torch.quantile(prior, torch.tensor([0.25, 0.5, 0.75], dtype=prior.dtype, device=prior.device), 0)
    before = integrate(log_f, middle, torch.diag_embed(((high - low) / 1.35).clamp(min=1e-6)), target / 2)
    slanted = torch.zeros_like(target, dtype=torch.bool)
    for shift in SHIFTS:
        # Along the axes, as the tails of latents mostly lie; where such cells did not resolve it, in its own directions.
        slanted = slanted | (before.error > target)
        along = torch.diag_embed(before.covariance.diagonal(dim1=-2, dim2=-1))
        factor = _factor(torch.where(slanted[:, None, None], before.covariance, along))
        last = integrate(log_f, before.mean, factor, target / 2, shift=shift)
        apart = torch.where(last.log_value == before.log_value, 0.0, (last.log_value - before.log_value).abs())
        error = torch.maximum(apart, last.error)
        if bool((error <= target).all()):
            break
        before = last
    # A draw far above all that the cells saw lies at a peak that they stepped over.
    error = torch.where(heights.amax(0) > log_f(last.mode[None])[0] + HIGHER, math.inf, error)
    return _Answer(last.log_value.cpu().numpy(), (error + rounding).cpu().numpy(), last.num_points)


def _log_joint(pair: UnconstrainedPair, flat: Tensor) -> Tensor:
    log_joint = pair.log_joint(flat.to(pair.dtype)).double()
    return torch.where(log_joint.isnan(), -math.inf, log_joint)  # where the model overflows, far out


def _draws(pair: UnconstrainedPair, most: int, start: Literal["prior", "guide"]) -> Tensor:
    size = max(1, min(most, DRAWS))
    return torch.cat([pair.draw(size, start, inside=True) for _ in range(math.ceil(DRAWS / size))]).double()


def _factor(covariance: Tensor) -> Tensor:
    """Its triangular factor, (B, L, L), also where a direction is thinner than rounding shows."""
    diagonal = covariance.diagonal(dim1=-2, dim2=-1)
    return torch.linalg.cholesky(covariance + torch.diag_embed(1e-12 * diagonal + 1e-100))


def _rounding(trace: Trace, data: Any, num: int, nesting: int) -> Tensor:
    """What rounding may have moved the log-joint by, shape (K, B), in nats.

    A sum has a relative error, each of its terms one of its own, and where a location was subtracted, its error times the
    slope there. Noise of 0.01 about locations near one costs thousands of times what the log-density alone would.
    """
    total = torch.zeros(num, data.size, dtype=torch.float64)
    for site in sites_of(trace):
        terms, eps = _terms(site)
        inner = tuple(range(terms.dim() - site["fn"].event_dim + base_distribution(site).event_dim, terms.dim()))
        squares = terms.square().sum(inner) if inner else terms.square()
        parts = (log_prob_of(site).double().abs(), squares)
        sums, squares = (per_datum(site, part, data, num, nesting) for part in parts)
        total = total.to(sums.device) + eps * (sums + 2 * squares.sqrt())
    return total


def _terms(site: dict) -> tuple[Tensor, float]:
    """The magnitudes that a site's log-probability is computed from, one for each draw, and the epsilon of their type."""
    distribution, value = base_distribution(site), site["value"]
    if isinstance(getattr(distribution, "loc", None), Tensor) and value.is_floating_point():
        with torch.enable_grad():
            at = value.detach().requires_grad_()
            log_prob = distribution.log_prob(at)
            (slope,) = torch.autograd.grad(log_prob.sum(), at)
        lever = (slope * value).double().abs()
        terms = log_prob.detach().double().abs() + (
            lever.flatten(-distribution.event_dim).sum(-1) if distribution.event_dim else lever
        )
    else:
        log_prob, size = distribution.log_prob(value), value.double().abs()
        powers = torch.xlogy(size, size + 1)  # as in factorials and powers, which nearly cancel
        terms = log_prob.double().abs() + (
            powers.flatten(-distribution.event_dim).sum(-1) if distribution.event_dim else powers
        )
    return torch.nan_to_num(terms, posinf=0.0), torch.finfo(log_prob.dtype).eps
