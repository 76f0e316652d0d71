"""The structure of a pair, from one run of model and guide before it is trained or scored."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from pyro.distributions import DirichletMultinomial
from torch import Tensor

from ..data.batches import Batches
from ..data.matching import Batch
from .checks import check_finite, check_sites, check_support, improper_latents, refuse_improper, why_no_weights
from .independence import PROBED_ROWS, check_independence
from .log_weights import read_weights
from .observed import FACTOR_OF_DATA, factors_of_data, outside_by_a_latent, squares_of_shifted
from .parameters import all_parameters, own_parameters, refuse_uninitialized
from .rounding import log_weight_rounding
from .sites import Program, data_plate, num_known_of, num_observed_of, observed_squares, plate_nesting, sites_of
from .state import own_scope
from .support import support_of
from .tracing import evaluation_mode, inspection, trace_pair
from .wrappers import base_distribution, is_one_hot

__all__ = [
    "FIRST_ROWS", "FirstBatch", "PairInfo", "check_steady_scale", "inspect_first_batch", "inspect_pair", "open_pair", "prepare",
]  # fmt: skip

# The size of the first batch on which a pair that will be scored is inspected.
FIRST_ROWS = 256


@dataclass(frozen=True)
class PairInfo:
    """The structure of a pair.

    Attributes:
        max_plate_nesting: the number of plate dimensions that it uses.
        num_data: data in the batch.
        scale: N/B of a subsampled data plate, else 1.0.
        num_dims: numbers per datum, observed or masked.
        common_scale: the factor of a ``poutine.scale`` around all sites, else 1.0.
        no_weights: why p(x, z) / q(z|x) is not an importance weight, or ``None``; see
            :func:`pyrovae.programs.checks.why_no_weights`.
        num_observed: numbers observed in this batch; with a mask fewer than ``num_dims * num_data``.
        improper: latent sites with an improper prior.
        tied_to_data: whether the pair runs on all its data in their order only, as with a parameter for each datum.
        plate: the name of the data plate.
        latents: names of the latent sites.
        not_reparameterized: those of them without a reparameterised sampler.
        enumerated: latent sites of the model that the guide leaves to Pyro's enumeration.
        discrete: latent sites with a discrete support.
        num_densities: those of the numbers observed that have a density.
        num_probabilities: those that have a probability; a one-hot vector is one.
        given: the parts of a datum that the likelihood conditions on, from its distribution's ``conditional_on``, and whether a
            ``pyro.factor`` depends on the data alone.
        squares: the sum of squares of each datum's observed values, shape (B,), or of the data if they are observed shifted.
        rounding: the rounding error of each datum's log-weight, shape (B,), in nats.
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
    squares: Tensor | None = None
    rounding: Tensor | None = None
    improper: tuple[str, ...] = ()
    tied_to_data: bool = False
    plate: str = "data"

    @property
    def layout(self) -> dict[str, Any]:
        """The keyword arguments of :func:`pyrovae.programs.coverage.covered_data`."""
        return {"plate": self.plate, "nesting": self.max_plate_nesting, "num_dims": self.num_dims}

    def count(self, batch: tuple) -> float:
        """The number of data that the loss of a batch sums over."""
        # A subsampled plate scales the loss by N/B, so that it stands for all N data.
        return (len(batch[0]) if self.scale == 1.0 else self.num_data * self.scale) * self.common_scale


def inspect_pair(model: Program, guide: Program, *args: Any, **kwargs: Any) -> PairInfo:
    """Run a pair once, without moving the random stream, and return its structure.

    Raises:
        ValueError: as :func:`pyrovae.log_weights`; or an observed value lies outside its distribution's support.
    """
    check_finite((*args, *kwargs.values()))
    with inspection(model, guide, args):
        traces = trace_pair(model, guide, args, kwargs, 1, None)
        model_trace, guide_trace = traces.model, traces.guide
        for site in sites_of(model_trace):
            if site["is_observed"] and not outside_by_a_latent(site, model, guide, args, kwargs):
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
        rounding = log_weight_rounding(traces)
        shifted = squares_of_shifted(model, guide, args, kwargs, traces)
        factors = factors_of_data(model, args, kwargs, traces)
    observed = [site for site in sites_of(model_trace) if site["is_observed"]]
    data = data_plate([*sites_of(model_trace), *sites_of(guide_trace)])
    latent_sites = [site for site in sites_of(guide_trace) if not site["is_observed"]]
    # A label that does not count as a dimension of the data is still part of their probability.
    counted = [site | {"infer": {}} for site in observed]
    numbers = [(num_known_of(site, data) / _redundant(site), _fraction_discrete(site)) for site in counted]
    nesting = plate_nesting(model_trace, guide_trace)
    squares = [shifted[s["name"]] if s["name"] in shifted else observed_squares(s, data, nesting) for s in observed]
    given = {what for site in observed for what in _conditions(site)}
    if factors is not None:
        squares, given = [*squares, factors.square()], given | {FACTOR_OF_DATA}
    return PairInfo(
        max_plate_nesting=nesting,
        num_data=weights.num_data,
        scale=weights.scale,
        num_dims=weights.num_dims,
        latents=tuple(site["name"] for site in latent_sites),
        not_reparameterized=weights.not_reparameterized,
        enumerated=enumerated,
        num_observed=sum(num_observed_of(site, data) for site in observed),
        common_scale=weights.common_scale,
        no_weights=no_weights,
        plate=data.name,
        discrete=tuple(site["name"] for site in latent_sites if _is_discrete(site)),
        num_densities=sum(number * (1 - discrete) for number, discrete in numbers),
        num_probabilities=sum(number * discrete for number, discrete in numbers),
        given=tuple(sorted(given)),
        squares=torch.stack(squares).sum(0) if squares else None,
        rounding=rounding,
        improper=improper_latents(model_trace),
    )


def _is_discrete(site: dict) -> bool:
    try:
        return bool(support_of(site["fn"]).is_discrete)
    except NotImplementedError:  # raised by a distribution without a support
        return False


def _fraction_discrete(site: dict) -> float:
    """The fraction of a site's numbers that have a probability and no density."""
    return float(getattr(base_distribution(site), "fraction_discrete", _is_discrete(site)))


def _redundant(site: dict) -> int:
    """The number of values that represent one: the length of a one-hot vector, else 1."""
    return int(site["fn"].event_shape[-1]) if is_one_hot(site) else 1


def _conditions(site: dict) -> tuple[str, ...]:
    """The parts of a datum that a likelihood conditions on: those that it names, and the total of a multinomial."""
    distribution = site["fn"]
    while not hasattr(distribution, "conditional_on") and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    if isinstance(base_distribution(site), torch.distributions.Multinomial | DirichletMultinomial):
        return ("the total",)
    return tuple(getattr(distribution, "conditional_on", ()))


def check_steady_scale(model: Program, guide: Program, args: tuple[Tensor, ...], info: PairInfo) -> None:
    """Refuse one poutine.scale around all sites that depends on the size of the batch, where batches are of several sizes."""
    fewer = inspect_pair(model, guide, *(arg[:-1] for arg in args)) if info.common_scale != 1.0 else info
    if abs(fewer.common_scale - info.common_scale) > 1e-6 * abs(info.common_scale):
        raise ValueError(
            f"The scale around all sites is {info.common_scale:g} for {len(args[0])} data and {fewer.common_scale:g} for one "
            f"less, so the smaller last batch would have another weight: leave the scale out, since each step follows the mean "
            f"per datum."
        )


@dataclass(frozen=True)
class FirstBatch:
    """The results of the first run of a pair on a batch.

    Attributes:
        parameters: the unconstrained leaf parameters.
        info: what the pair is made of.
        dtype: the floating-point type of its data.
        device: the device of its parameters.
        floating: the places of integer arguments that its networks take as floating-point numbers.
        args: the batch, in this type and on this device.
        whole: the number of data that must run together, if the programs are tied to one set of data; else ``None``.
    """

    parameters: list[Tensor]
    info: PairInfo
    dtype: torch.dtype
    device: torch.device
    floating: tuple[int, ...] = ()
    args: Batch = ()
    whole: int | None = None


def prepare(
    model: Program,
    guide: Program,
    data: Any,
    *,
    vectorize_particles: bool = True,
    particles: bool = True,
    each: bool = True,
) -> FirstBatch:
    """Inspect a pair on its first batch before it is trained or scored, which creates its parameters.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        data: data, as :class:`Batches` takes them, or batches.
        vectorize_particles: whether particles will run at once.
        particles: whether there will be several particles.
        each: whether each datum is scored separately. In training, layers such as batch norm may mix data.

    Raises:
        ValueError: as :func:`inspect_pair`; or data or particles depend on each other; or a prior is improper; or a layer has
            no size yet; or the pair needs all data at once and a loader gives them in parts.
        RuntimeError: the pair does not run; the message is torch's.
    """
    refuse_uninitialized(model, guide)
    batches = data if isinstance(data, Batches) else Batches(data, FIRST_ROWS, program=model)
    batch = batches.peek()
    first, whole = _inspect_first(model, guide, batch, batches) if each else (inspect_first_batch(model, guide, *batch), None)
    info, rows = first.info, len(first.args[0])
    if each:
        refuse_improper(info.improper)
    if info.num_data != rows or info.scale != 1.0 or info.enumerated:
        return first
    in_place, particles = False, particles and vectorize_particles
    if each or particles:
        args, others = first.args, None
        if whole is None and (each or _runs(model, guide, first.args, min(rows, PROBED_ROWS))):
            places = torch.arange(2 * PROBED_ROWS, device=first.device) % rows
            args, others = (tuple(arg[part] for arg in first.args) for part in places.split(PROBED_ROWS))
        with evaluation_mode(model, guide):
            in_place = check_independence(
                model, guide, args, info.max_plate_nesting, particles=particles, each=each, others=others
            )
    if in_place:
        whole = batch if batches.loader is not None else _all_of(batches)
        first = inspect_first_batch(model, guide, *whole)
    if whole is None:
        return first
    if batches.loader is not None and batches.num_data != len(whole[0]):
        raise ValueError(
            "The pair is tied to one set of data, as with a parameter for each datum, and a data loader gives them in parts: "
            "give them as arrays."
        )
    # A pair whose plate has a constant size runs on that number of data only, but on any of them.
    tied = in_place or any(length % len(whole[0]) == 0 for parameter in first.parameters for length in parameter.shape)
    return replace(first, info=replace(first.info, tied_to_data=tied), whole=len(whole[0]))


def open_pair(model: Program, guide: Program, x: Any, *, vectorize_particles: bool = True) -> tuple[Batches, FirstBatch]:
    """Data in their order, in the pair's type and on its device, and what a first run found: to score each datum.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: data, as :class:`pyrovae.data.Batches` takes them.
        vectorize_particles: whether particles will run at once.

    Raises:
        ValueError: as :func:`prepare`; or the data plate is subsampled.
    """
    data = Batches(x, batch_size=FIRST_ROWS, program=model, ordered=True)
    first = prepare(model, guide, data, vectorize_particles=vectorize_particles)
    data.to(first.dtype, first.device, first.floating)
    if first.info.scale != 1.0:
        raise ValueError("The data plate must have the size of the data, got a subsampled one: size it by x.shape[0].")
    return data, first


class _TiedError(Exception):
    """The pair does not run on a part of its data as it does on all."""


def _inspect_first(model: Program, guide: Program, batch: Batch, batches: Batches) -> tuple[FirstBatch, Batch | None]:
    """The first run on a batch, or on all data if the pair runs on those only; then it returns them too."""
    size = len(batch[0])
    total = size if batches.loader is not None else len(batches.arrays[0])
    first: FirstBatch | None = None
    try:
        with own_scope(model, guide, keep=True, undo=(Exception,)):
            first = inspect_first_batch(model, guide, *batch)
            if size == 1 or first.info.num_data != size or first.info.scale != 1.0:
                return first, None
            if _runs(model, guide, first.args, (size + 1) // 2):
                return first, None
            raise _TiedError
    except (ValueError, RuntimeError, IndexError, _TiedError) as error:
        # Only for an error that suggests it: all data at once may need much memory.
        lengths = [length for parameter in all_parameters(model, guide) for length in parameter.shape]
        if first is None and (total == size or not (str(total) in str(error) or any(n % total == 0 for n in lengths))):
            raise
        whole = _all_of(batches) if total > size else batch
        try:
            with own_scope(model, guide, keep=True, undo=(Exception,)):
                again = inspect_first_batch(model, guide, *whole)
                if again.info.num_data != total:
                    raise _TiedError
            return again, whole
        except (ValueError, RuntimeError, IndexError, _TiedError):
            if first is None:
                raise error from None
    return inspect_first_batch(model, guide, *batch), None


def _runs(model: Program, guide: Program, args: Batch, rows: int) -> bool:
    """Whether a pair runs on the first rows. The pair does not change."""
    try:
        with own_scope(model, guide):
            return inspect_pair(model, guide, *(arg[:rows] for arg in args)).num_data == rows
    except (ValueError, RuntimeError, IndexError):
        return False


def _all_of(batches: Batches) -> Batch:
    """All data as one batch, from arrays."""
    with torch.random.fork_rng():
        return batches.arrays if batches.transform is None else (batches.transform(batches.arrays[0]), *batches.arrays[1:])


def inspect_first_batch(model: Program, guide: Program, *args: Tensor) -> FirstBatch:
    """Find a pair's parameters, structure, floating type and device from one batch.

    NumPy's arrays are float64 on the CPU, but most networks are float32, and some are on a GPU. The type that a program needs
    is known only when it runs, so a batch that fails runs again in the type of the pair's parameters, in torch's default type,
    with integers converted too (first those of the first argument), and on the GPU.

    Raises:
        ValueError: as :func:`inspect_pair`.
        RuntimeError: the pair fails each time; the message is torch's.
    """
    default = torch.get_default_dtype()
    integers = tuple(i for i, arg in enumerate(args) if not arg.is_floating_point() and arg.dtype != torch.bool)
    devices = [None, torch.device("cuda")] if torch.cuda.is_available() else [None]
    first = () if args[0].is_floating_point() else (0,)  # black and white images may come as booleans, and masks stay such
    casts = dict.fromkeys([(), first, integers, tuple({*first, *integers})])
    own = {each.dtype for each in all_parameters(model, guide) if each.is_floating_point()}
    types = [*sorted(own - {default}, key=str), default]
    attempts = [(None, None, ()), *((dtype, device, cast) for device in devices for dtype in types for cast in casts)]
    for dtype, device, cast in attempts:
        attempt = args if dtype is None else _moved(args, dtype, device, cast)
        try:
            with own_scope(model, guide, keep=True, undo=(Exception,)):
                first_batch = _first_batch(own_parameters(model, guide, attempt), model, guide, args, attempt, cast)
            break
        except RuntimeError:
            if (dtype, device, cast) == attempts[-1]:
                raise
    for index in first_batch.floating:
        warnings.warn(
            f"The pair takes floating-point numbers, so array {index + 1} of the data, of {args[index].dtype}, is cast to "
            f"{first_batch.dtype}: pass floats to say so yourself.",
            stacklevel=3,
        )
    return first_batch


def _first_batch(
    parameters: list[Tensor], model: Program, guide: Program, args: Batch, attempt: Batch, floating: tuple[int, ...]
) -> FirstBatch:
    """What a batch shows, in the type and on the device in which it ran."""
    argument = next((arg for arg in attempt if arg.is_floating_point()), None)
    like = next((parameter for parameter in parameters if parameter.is_floating_point()), argument)
    dtype, device = (torch.get_default_dtype(), attempt[0].device) if like is None else (like.dtype, like.device)
    moved = _moved(args, dtype, device, floating)
    return FirstBatch(parameters, inspect_pair(model, guide, *moved), dtype, device, floating, moved)


def _moved(
    args: tuple[Tensor, ...], dtype: torch.dtype, device: torch.device | None, floating: tuple[int, ...] = ()
) -> tuple[Tensor, ...]:
    """Arguments on a device, with floating-point ones, and those at the places ``floating``, in a type."""
    cast = [arg.is_floating_point() or index in floating for index, arg in enumerate(args)]
    return tuple(arg.to(device=device, dtype=dtype if each else None) for arg, each in zip(args, cast, strict=True))
