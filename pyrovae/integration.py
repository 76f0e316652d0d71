"""log p(x) without sampling: discrete latents summed, linear-Gaussian pairs in closed form, two dimensions by quadrature."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import MultivariateNormal, Normal
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from .data import Batch, arguments
from .evidence import Evidence
from .pairs import inspect_pair, prepare
from .registry import unknown
from .state import in_own_scope
from .traces import (
    FlatPair,
    Layout,
    Place,
    Program,
    data_plate,
    evaluation_mode,
    explained,
    in_particles,
    law_of,
    log_prob_of,
    per_datum,
    plate_nesting,
    plate_sizes,
    sites_of,
    trace_from_prior,
)

Method = Literal["auto", "enumerate", "quadrature", "linear_gaussian"]
METHODS = {
    "enumerate": "exact, by enumeration",
    "quadrature": "exact, by quadrature",
    "linear_gaussian": "exact, linear-Gaussian",
}
CHUNK_NUMBERS = 2**22
MOST_ASSIGNMENTS = 2**20
MOST_POINTS = 2**20  # of a grid, per datum
DRAWS = 1024  # of prior and of guide, that show where to look
COARSE = {1: 513, 2: 33}  # points along one axis of the grid that looks
FARTHEST = 40.0  # in s, where sinh is 10^17
NEGLIGIBLE = 40.0  # nats below the maximum, where e^-40 of it is left


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
    - ``"quadrature"``: one or two continuous numbers per datum, by the trapezoidal rule on a grid that is placed and
      scaled to the posterior of each datum, and doubled until the answer moves by no more than ``tolerance``. It is placed by
      draws of the prior and the guide and a coarse grid over them: a mode that all of these step over would be missed.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); only quadrature uses it, to find the posterior.
        x: data as for :func:`pyrovae.log_marginal`.
        method: one of the above, or ``"auto"`` for the first that fits.
        tolerance: the difference of two resolutions at which quadrature stops, in nats.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: of the draws that place the grid; the global random stream is left untouched. ``None`` uses that stream.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats. ``se`` is the difference between the last two resolutions for quadrature, else zero;
        ``num_samples`` is the number of assignments or grid points per datum, one in closed form; ``khat`` is ``-inf``, as for
        constant weights; ``elbo`` equals ``log_px``, since nothing is bounded.

    Raises:
        ValueError: bad data, or latents that the method cannot integrate out; the message says why.

    References:
        Trefethen and Weideman, The Exponentially Convergent Trapezoidal Rule, 2014. Tipping and Bishop, Probabilistic Principal
        Component Analysis, 1999.

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
    first = prepare(model, guide, x, vectorize_particles=vectorize_particles)
    data = first.batches(x, 16)
    dims, nesting = max(first.info.num_dims, 256), first.info.max_plate_nesting
    parts: list[_Answer] = []
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
            batch = arguments(model, batch)
            inspect_pair(model, guide, *batch)
            # The data and the pair have been checked, and a grid reaches to where values round to the edge of a support.
            with pyro.validation_enabled(False), torch.no_grad():
                chosen = chosen or _choose(model, guide, batch)
                if chosen == "enumerate":
                    parts.append(_enumerate(model, batch, nesting, CHUNK_NUMBERS // dims, vectorize_particles))
                elif chosen == "linear_gaussian":
                    parts.append(_linear_gaussian(FlatPair(model, guide, batch, vectorize_particles=vectorize_particles)))
                else:
                    pair = FlatPair(model, guide, batch, vectorize_particles=vectorize_particles)
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
        num_dims=first.info.num_dims,
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
    pair = FlatPair(model, guide, batch)
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
    data = data_plate(list(sites_of(first)))
    nesting = max(nesting, plate_nesting(first))
    supports, numbers = [], []
    for site in sites:
        if not site["fn"].has_enumerate_support:
            raise ValueError(
                f"The latent site {site['name']!r} ({type(law_of(site)).__name__}) has no finite support to sum over: choose "
                f'method="quadrature", or use log_marginal.'
            )
        supports.append(_support(site))
        numbers.append(math.prod(plate_sizes(site, nesting)) // data.size)
    each = [len(support) for support, number in zip(supports, numbers, strict=True) for _ in range(number)]
    total = math.prod(each)
    if total > MOST_ASSIGNMENTS:
        raise ValueError(
            f"The latents of one datum have {total:,} assignments, more than the {MOST_ASSIGNMENTS:,} that are summed: use "
            f"log_marginal."
        )
    log_px = torch.full((data.size,), -math.inf, dtype=torch.float64, device=batch[0].device)
    most = max(1, most // data.size) if vectorize else 1
    for codes in _chunks(product(*(range(size) for size in each)), most):
        index = torch.as_tensor(codes, device=batch[0].device).reshape(len(codes), -1)  # (M, all numbers)
        layout = Layout(len(codes), data.size, nesting, data.dim)
        given, column = {}, 0
        for site, support, number in zip(sites, supports, numbers, strict=True):
            values = support[index[:, None, column : column + number]]  # (M, 1, n, *event)
            values = values.expand(len(codes), data.size, *values.shape[2:])
            given[site["name"]] = layout.place(values, plate_sizes(site, nesting), site["fn"].event_shape)
            column += number
        with explained(len(codes)):
            placed = Place(given)(in_particles(model, len(codes), nesting))
            trace = prune_subsample_sites(poutine.trace(placed).get_trace(*batch))
        for site, support in zip(sites, supports, strict=True):
            if not torch.equal(_support(trace.nodes[site["name"]]), support):
                raise ValueError(
                    f"The support of the latent site {site['name']!r} depends on other latents, so its assignments cannot be "
                    f"listed beforehand: give it a fixed one, or use log_marginal."
                )
        terms = [per_datum(site, log_prob_of(site), data, len(codes), nesting).double() for site in sites_of(trace)]
        log_px = torch.logaddexp(log_px, torch.logsumexp(torch.stack(terms).sum(0), 0))
    answer = log_px.cpu().numpy()
    return _Answer(answer, np.zeros_like(answer), total)


def _support(site: dict) -> Tensor:
    """The values of one site's support, shape (C, *event)."""
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


def _linear_gaussian(pair: FlatPair) -> _Answer:
    """The integral of exp of a quadratic, c + b'u - u'Hu/2, whose coefficients are its gradients at the unit vectors."""
    why = _not_linear_gaussian(pair)
    if why is not None:
        raise ValueError(f'This pair is not linear-Gaussian, since {why}: choose method="auto", or use log_marginal.')
    size, unit = pair.num_latents, torch.eye(pair.num_latents, dtype=pair.dtype, device=pair.device)
    points = torch.cat([torch.zeros_like(unit[:1]), unit])[:, None].expand(size + 1, pair.num_data, size)
    points = points.clone().requires_grad_()
    with torch.enable_grad():
        log_joint = pair.log_joint(points)
        (slopes,) = torch.autograd.grad(log_joint.sum(), points)
    slope = slopes[0].double()  # (B, L)
    curvature = slope[:, None] - slopes[1:].double().movedim(0, 1)  # (B, L, L)
    factor = torch.linalg.cholesky((curvature + curvature.mT) / 2)
    solved = torch.linalg.solve_triangular(factor, slope[..., None], upper=False)[..., 0]
    half_log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    log_px = log_joint[0].detach().double() + solved.square().sum(-1) / 2 - half_log_det + size / 2 * math.log(2 * math.pi)
    answer = log_px.cpu().numpy()
    return _Answer(answer, np.zeros_like(answer), 1)


def _not_linear_gaussian(pair: FlatPair) -> str | None:
    """Why a pair is not linear-Gaussian, or ``None`` if it is."""
    flat = torch.zeros(1, pair.num_data, pair.num_latents, dtype=pair.dtype, device=pair.device)
    for site in sites_of(pair.model_trace(flat)[0]):
        if type(law_of(site)).__name__ == "Unit":
            return f"it has the pyro.factor {site['name']!r}"
        if type(law_of(site)) not in _GAUSSIAN:
            return f"its site {site['name']!r} is {type(law_of(site)).__name__}, not Normal"
    watch = _AffineOnly()
    try:
        trace = pair.follow(flat, watch)
    except _NotAffineError as error:
        return f"its model takes {error} of a latent, which is not affine"
    for site in sites_of(trace):
        law = law_of(site)
        scale = law.scale if isinstance(law, torch.distributions.Normal) else law._unbroadcasted_scale_tril
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


def _quadrature(pair: FlatPair, tolerance: float, most: int) -> _Answer:
    """The trapezoidal rule in s, where u = centre + factor sinh(s): it reaches wide tails, and fits Gaussian ones."""
    dims = pair.num_latents
    if dims > 2:
        raise ValueError(
            f"Quadrature takes one or two continuous latent numbers per datum, not {dims}: use pyrovae.ais, or log_marginal."
        )
    most = most if pair.vectorize else 1
    centre, factor, low, high = _locate(pair, most)
    number, before = 65, None
    while True:
        log_f, s = _on_grid(pair, centre, factor, low, high, number, most)
        cell = ((high - low) / (number - 1)).log().sum(-1)
        log_px = torch.logsumexp(log_f, 0) + cell
        del log_f, s
        if before is not None:
            error = (log_px - before).abs()
            if bool((error <= tolerance).all()) or (2 * number - 1) ** dims > MOST_POINTS:
                return _Answer(log_px.cpu().numpy(), error.cpu().numpy(), number**dims)
        before, number = log_px, 2 * number - 1


def _on_grid(
    pair: FlatPair, centre: Tensor, factor: Tensor, low: Tensor, high: Tensor, number: int, most: int
) -> tuple[Tensor, Tensor]:
    """Log of the integrand in s, (P, B), at the P points of a grid, and the points, (P, B, L)."""
    steps = torch.linspace(0, 1, number, dtype=torch.float64, device=pair.device)
    share = torch.cartesian_prod(*[steps] * pair.num_latents).reshape(-1, 1, pair.num_latents)
    s = low + share * (high - low)
    volume = _volume(factor)
    parts = []
    for points in s.split(most):
        log_f = _log_joint(pair, centre + (factor @ points.sinh()[..., None])[..., 0])
        parts.append(log_f + points.cosh().log().sum(-1) + volume)
    return torch.cat(parts), s


def _log_joint(pair: FlatPair, flat: Tensor) -> Tensor:
    log_joint = pair.log_joint(flat.to(pair.dtype)).double()
    return torch.where(log_joint.isnan(), -math.inf, log_joint)  # where the model overflows, far out


def _locate(pair: FlatPair, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centre and triangular factor of each datum's posterior, and the box in s that holds all but a negligible part of it."""
    size = max(1, min(most, DRAWS))
    draws = torch.cat([pair.draw(size, start) for start in ("prior", "guide") for _ in range(math.ceil(DRAWS / size))]).double()
    heights = torch.cat([_log_joint(pair, part) for part in draws.split(size)])
    lowest, highest = draws.amin(0), draws.amax(0)  # (B, L)
    centre, factor = (lowest + highest) / 2, torch.diag_embed((highest - lowest) / 2 + 1e-6)
    reach, coarse = torch.full_like(centre, math.asinh(1.0)), COARSE[pair.num_latents]
    # The grid finds the posterior within the reach of prior and guide, then its own finer self; a cell is the least it sees.
    for _ in range(8):
        log_f, s = _on_grid(pair, centre, factor, -reach, reach, coarse, most)
        weights = torch.softmax(log_f, 0)[..., None]
        t = s.sinh()
        mean = (weights * t).sum(0)
        covariance = torch.einsum("pbi,pbj->bij", weights * (t - mean), t - mean)
        covariance = covariance + torch.diag_embed((2 * reach / (coarse - 1)).square())
        centre = centre + (factor @ mean[..., None])[..., 0]
        factor = factor @ torch.linalg.cholesky(covariance)
        reach = torch.full_like(centre, math.asinh(10.0))
    # What counts is what the grid or the draws, which may hit a mode that the grid stepped over, show within reach of the top.
    at_draws = torch.linalg.solve_triangular(factor, (draws - centre)[..., None], upper=False)[..., 0].asinh()
    low, high = -reach, reach
    for _ in range(8):
        log_f, s = _on_grid(pair, centre, factor, low, high, coarse, most)
        top = torch.maximum((log_f - s.cosh().log().sum(-1)).amax(0), heights.amax(0) + _volume(factor))
        inside = (log_f > top - NEGLIGIBLE)[..., None]
        found = (heights + _volume(factor) > top - NEGLIGIBLE / 4)[..., None]
        lowest = torch.minimum(torch.where(inside, s, math.inf).amin(0), torch.where(found, at_draws, math.inf).amin(0))
        highest = torch.maximum(torch.where(inside, s, -math.inf).amax(0), torch.where(found, at_draws, -math.inf).amax(0))
        step, width = (high - low) / (coarse - 1), highest - lowest
        # Where it reaches the edge it goes on beyond; elsewhere a step of margin is enough.
        new_low = torch.where(lowest < low + step / 2, lowest - width / 2, lowest) - step
        new_high = torch.where(highest > high - step / 2, highest + width / 2, highest) + step
        low, high = new_low.clamp(min=-FARTHEST), new_high.clamp(max=FARTHEST)
    return centre, factor, low, high


def _volume(factor: Tensor) -> Tensor:
    return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
