"""The sample sites of a traced run, and the dimensions of particles and data in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .support import _outside
from .wrappers import is_factor, is_one_hot, mask_of

__all__ = [
    "PARTICLES", "Layout", "Program", "check_batch", "common_scale", "data_plate", "latents_of", "log_prob_of", "num_dims_of",
    "num_known_of", "num_observed_of", "observed_squares", "per_datum", "plate_nesting", "plate_sizes", "plates_of",
    "refuse_auxiliary", "sites_of", "sum_last",
]  # fmt: skip

Program = Callable[..., Any]
PARTICLES = "_pyrovae_particles"


class Layout(NamedTuple):
    """The dimensions of particles and data in the tensors of one traced run."""

    num_particles: int
    num_data: int
    nesting: int  # plate dimensions of the pair; particles stand to their left
    data_dim: int

    def broadcast_to_site(self, values: Tensor, like: Tensor, event_dim: int) -> Tensor:
        """``values`` (K, B), to be multiplied with a site's value."""
        shape = [self.num_particles] + [1] * self.nesting
        shape[self.data_dim] = self.num_data
        shape += [1] * event_dim
        return values.reshape(shape[max(len(shape) - like.dim(), 0) :])

    def sum_per_datum(self, values: Tensor, event_dim: int) -> Tensor:
        """The sum of a site's values over each datum: (K, B)."""
        values = values.sum(tuple(range(-event_dim, 0))) if event_dim else values
        values = values.reshape((1,) * (self.nesting + 1 - values.dim()) + values.shape)
        inner = [dim for dim in range(-self.nesting, 0) if dim != self.data_dim]
        return (values.sum(inner) if inner else values).reshape(self.num_particles, self.num_data)

    def to_site(self, numbers: Tensor, sizes: list[int], event_shape: torch.Size) -> Tensor:
        """Each datum's numbers (K, B, n) as the value of a site whose plates have these sizes."""
        value = numbers.reshape(self.num_particles, self.num_data, *self._inner(sizes), *event_shape)
        value = value.movedim(1, 1 + self.nesting + self.data_dim)
        return value[0] if self.num_particles == 1 else value

    def rows(self, site: dict, value: Tensor) -> Tensor:
        """A site's value as (K, B, ...): by particle and datum, then the plates inside a datum, then the event."""
        sizes, event_shape = plate_sizes(site, self.nesting), site["fn"].event_shape
        return self.from_site(value, sizes, event_shape).reshape(
            self.num_particles, self.num_data, *(size for size in self._inner(sizes) if size != 1), *event_shape
        )

    def value(self, site: dict, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`: a value in the site's own shape."""
        numbers = rows.reshape(self.num_particles, self.num_data, -1)
        return self.to_site(numbers, plate_sizes(site, self.nesting), site["fn"].event_shape)

    def _inner(self, sizes: list[int]) -> list[int]:
        """The sizes of the plates inside a datum."""
        return [size for dim, size in zip(range(-self.nesting, 0), sizes, strict=True) if dim != self.data_dim]

    def from_site(self, value: Tensor, sizes: list[int], event_shape: torch.Size) -> Tensor:
        """The inverse of :meth:`to_site`: (K, B, n)."""
        value = value.expand(self.num_particles, *sizes, *event_shape)
        return value.movedim(1 + self.nesting + self.data_dim, 1).reshape(self.num_particles, self.num_data, -1)


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


def sites_of(trace: Trace) -> Iterator[dict]:
    """The sample sites that have a density."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site["infer"].get("_deterministic"):
            if site["is_observed"]:
                _give_all_numbers(site)
            yield site


def _give_all_numbers(site: dict) -> None:
    """Expand an observed site's events of independent numbers that are alike, such as of shape (1,), to those of its value."""
    distribution, value = site["fn"], site["value"]
    if not isinstance(distribution, torch.distributions.Independent) or not isinstance(value, Tensor):
        return
    event_dim, base = distribution.reinterpreted_batch_ndims, distribution.base_dist
    own, seen = distribution.event_shape, value.shape[-event_dim:]
    if own == seen or len(own) != event_dim or len(own) != len(seen):
        return
    if all(size == 1 or size == wanted for size, wanted in zip(own, seen, strict=True)):
        site["fn"] = base.expand(distribution.batch_shape + seen).to_event(event_dim)


def plates_of(site: dict) -> list[Any]:
    """The plates of a site except the particles'. A plate without a size gets that of the site's batch."""
    return [_sized(frame, site["fn"]) for frame in site["cond_indep_stack"] if frame.name != PARTICLES]


def _sized(frame: Any, distribution: Any) -> Any:
    if frame.size != -1 or not frame.vectorized or len(distribution.batch_shape) < -frame.dim:
        return frame
    size = distribution.batch_shape[frame.dim]
    return frame._replace(size=size, full_size=size)


def plate_nesting(*traces: Trace) -> int:
    """The number of plate dimensions that the sites use."""
    dims = [frame.dim for trace in traces for site in sites_of(trace) for frame in plates_of(site) if frame.vectorized]
    return -min(dims, default=0)


def data_plate(sites: list[dict]) -> Any:
    """The plate over data, which contains every site."""
    write = 'write "with pyro.plate("data", x.shape[0]):" around all its sample statements, in model and guide.'
    frames: dict[str, Any] = {}
    for site in sites:
        for frame in plates_of(site):
            first = frames.setdefault(frame.name, frame)
            if -1 in (first.size, frame.size):  # a plate without a size, at a site without a batch
                frames[frame.name] = first if first.size == -1 else frame
            elif (first.size, first.full_size) != (frame.size, frame.full_size):
                raise ValueError(
                    f"Plate {frame.name!r} has size {first.size} of {first.full_size} at one site and {frame.size} of "
                    f"{frame.full_size} at site {site['name']!r}: give it one size in model and guide."
                )
    if not frames:
        raise ValueError(f"The pair has no data plate, so its log-weights cannot be told apart by datum: {write}")
    names = [{frame.name for frame in plates_of(site)} for site in sites]
    shared = set(frames).intersection(*names)
    if not shared:
        plate = "data" if "data" in frames else max(frames, key=lambda name: sum(name in plates for plates in names))
        outside = next(site for site, plates in zip(sites, names, strict=True) if plate not in plates)
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


# The sum of this many float32 terms has a rounding error of hundredths of a nat; at four million, of half a nat.
MANY_TERMS = 2**16


def log_prob_of(site: dict) -> Tensor:
    """A site's log-probability, masked but not scaled, in nats; in float64 if it sums at least ``MANY_TERMS`` terms."""
    distribution, value, inner = site["fn"], site["value"], 0
    if isinstance(distribution, torch.distributions.Independent) and distribution.event_shape.numel() >= MANY_TERMS:
        distribution, inner = distribution.base_dist, distribution.reinterpreted_batch_ndims
        if isinstance(
            getattr(distribution, "loc", None), Tensor
        ):  # then constants, rounded alike in every term, are float64 too
            value = value.double()
    value = distribution.log_prob(value, *site["args"], **site["kwargs"])
    value = sum_last(value, inner)
    if "outside" in site:
        value = torch.where(site["outside"], -torch.inf, value)
    return scale_and_mask(value, 1.0, site["mask"])


def sum_last(terms: Tensor, dims: int) -> Tensor:
    """The sum over the last dimensions, in float64 if it has very many terms."""
    return _summed(terms, tuple(range(-dims, 0)))


def _summed(terms: Tensor, dims: tuple[int, ...] | list[int]) -> Tensor:
    """The sum over some dimensions, in float64 if it has at least ``MANY_TERMS`` terms."""
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
    """The number of values that a site observes of one datum; zero with ``infer={"num_dims": 0}``, as for a label."""
    return 0 if site["infer"].get("num_dims") == 0 else _num_numbers(site, data)


def num_observed_of(site: dict, data: Any) -> int:
    """The number of these values of all data together that no mask leaves out. It reads the mask's values."""
    return num_known_of(site, data) if num_dims_of(site, data) else 0


def num_known_of(site: dict, data: Any) -> int:
    """The number of values of all data that a site scores, known labels included, and no mask leaves out."""
    number = _num_numbers(site, data)
    mask = mask_of(site)
    if not number or not isinstance(mask, Tensor):
        return number * data.size if mask else 0
    return int(mask.expand(site["fn"].batch_shape + site["fn"].event_shape).sum())


def observed_squares(site: dict, data: Any, nesting: int) -> Tensor:
    """The sum of squares of what a site observes of each datum and no mask leaves out, shape (B,), in float64.

    A one-hot vector counts as its index. It is the same for ``x`` in any shape and order, and another for ``x.log()``.
    """
    distribution, value, event_dim = site["fn"], site["value"], site["fn"].event_dim
    if is_factor(site):
        return torch.zeros(data.size, dtype=torch.float64, device=site["value"].device)
    shape = distribution.batch_shape + distribution.event_shape
    squares = site.get("given", value).expand(shape).double().square()
    mask = mask_of(site)
    if mask is not True:
        squares = torch.where(torch.as_tensor(mask, device=value.device).expand(shape), squares, 0.0)
    if is_one_hot(site):
        places = torch.arange(shape[-1], dtype=torch.float64, device=value.device).square()
        squares = squares * places
    return Layout(1, data.size, nesting, data.dim).sum_per_datum(squares, event_dim)[0]


def _num_numbers(site: dict, data: Any) -> int:
    if is_factor(site):
        return 0
    event = site["fn"].event_shape.numel()
    for frame in plates_of(site):
        event *= frame.size if frame.vectorized and frame.name != data.name else 1
    return event


def common_scale(sites: list[dict], plate: Any) -> float:
    """The factor of a ``poutine.scale`` around all sites, besides the N/B of a subsampled data plate.

    Raises:
        ValueError: only some sites are scaled, or data are scaled differently.
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
    """A site's scale; NaN if it differs between data, since NaN is not close to any other scale."""
    return float(scale) if not isinstance(scale, Tensor) or scale.numel() == 1 else math.nan


def refuse_auxiliary(guide_sites: Iterator[dict] | list[dict]) -> None:
    """Refuse latents that only the guide has."""
    for site in guide_sites:
        if site["infer"].get("is_auxiliary"):
            raise ValueError(
                f"The guide's auxiliary site {site['name']!r} has no place in p(x, z), so the density q(z|x) is not known: use "
                f'proposal="guide", which needs no density at other draws.'
            )


def plate_sizes(site: dict, nesting: int) -> list[int]:
    """The sizes of a site's plates at the dimensions -nesting to -1; one where it has none."""
    size = {frame.dim: frame.size for frame in plates_of(site) if frame.vectorized}
    return [size.get(dim, 1) for dim in range(-nesting, 0)]
