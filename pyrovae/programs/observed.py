"""What a model observes: the data as they are given, or values that it computes from them."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .sites import Layout, Program, data_plate, log_prob_of, per_datum, plate_nesting, plate_sizes, sites_of
from .support import bare, bounds_of, inside_of, support_of
from .tracing import Substitute, Trace, Traces, trace_pair, trace_program
from .wrappers import is_enumerable, is_factor, is_point, mask_of

__all__ = ["FACTOR_OF_DATA", "factors_of_data", "outside_by_a_latent", "squares_of_shifted"]

# What a log-likelihood is given if a pyro.factor of the model depends on no latent, such as the Jacobian of x.log().
FACTOR_OF_DATA = "a factor of the data alone"

# By this factor the data are scaled, to see how an observed value follows them. It keeps every sign, and values below one.
SCALE = 0.99
# How often the latents are drawn anew, or given another of their values, to see whether they change an observed value.
DRAWS = 8


def outside_by_a_latent(site: dict, model: Program, guide: Program, args: tuple, kwargs: dict) -> bool:
    """Whether observed values lie outside a support that depends on latents: their weight is zero, and the data are valid."""
    try:
        support = support_of(site["fn"])
    except NotImplementedError:  # raised by a distribution without a support
        return False
    bounds = [bound for bound in bounds_of(bare(support)) if isinstance(bound, Tensor)]
    if not bounds or bool(support.check(site["value"]).all()):
        return False
    other = trace_pair(model, guide, args, kwargs, 1, None).model.nodes[site["name"]]
    others = [bound for bound in bounds_of(bare(support_of(other["fn"]))) if isinstance(bound, Tensor)]
    moves = any(one.shape != two.shape or bool((one != two).any()) for one, two in zip(bounds, others, strict=True))
    safe = inside_of(support, site["value"])
    if not moves or safe is None:
        return False
    site["outside"], site["given"] = ~support.check(site["value"]), site["value"]
    site["value"] = torch.where(site["outside"][(..., *[None] * support.event_dim)], safe, site["value"])
    return True


def squares_of_shifted(model: Program, guide: Program, args: tuple, kwargs: dict, traces: Traces) -> dict[str, Tensor]:
    """The sums of squares of the data, shape (B,), that sites observe shifted, as in ``obs=x - z``.

    A shift changes no density, so such sites observe the data. Values of latents alone, a soft constraint, observe no data.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: the batch.
        kwargs: the keyword arguments of both.
        traces: the traces of one run.

    Returns:
        The sums by the names of these sites.

    Raises:
        ValueError: an observed value depends on the data and on a latent by more than a shift, as in ``obs=x / z``.
    """
    sites = [site for site in sites_of(traces.model) if _has_density(site) and not _shares_memory(site["value"], args)]
    if not sites:
        return {}
    data = data_plate([*sites_of(traces.model), *sites_of(traces.guide)])
    layout = Layout(1, data.size, plate_nesting(traces.model, traces.guide), data.dim)
    given = _numbers_of(args, data.size)
    latents = {site["name"]: site["value"] for site in sites_of(traces.model) if not site["is_observed"]}
    with pyro.validation_enabled(False), _Follow(latents.values()) as follow:
        again = trace_program(model, args, 1, None, Substitute(latents), kwargs=kwargs)
    # A value that a latent may change can be a datum by chance, as x * (1 + z) is where a count z is zero.
    sites = [
        site
        for site in sites
        if follow.read
        or again.nodes[site["name"]]["value"] in follow
        or not _are_among(_rows(layout, site, site["value"]), given, _kept(layout, site))
    ]
    # Random numbers of the program's own are another check's.
    sites = [site for site in sites if torch.equal(again.nodes[site["name"]]["value"], site["value"])]
    if not sites:
        return {}
    scaled = tuple(arg * SCALE if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
    runs = [again, *(_elsewhere(model, guide, args, kwargs, again, place) for place in range(DRAWS))]
    found: dict[str, Tensor] = {}
    for run in runs:
        drawn = {site["name"]: site["value"] for site in sites_of(run) if not site["is_observed"]}
        follows = trace_program(model, scaled, 1, None, Substitute(drawn), kwargs=kwargs)
        for site in sites:
            name, kept, first = site["name"], _kept(layout, site), _rows(layout, site, site["value"])
            value, followed = (_rows(layout, site, trace.nodes[name]["value"]) for trace in (run, follows))
            moved, step = bool((value != first).any()), followed - value
            shifted = _shifted_data(step, value, args, kept)
            if shifted is not None and (moved or bool((step != 0).any())):
                found.setdefault(name, shifted.square().sum(-1))
            elif moved:
                raise ValueError(
                    f"The value observed at site {name!r} depends on a latent by more than a shift, so p(x|z) lacks its "
                    f"Jacobian: observe the data themselves, and let the latent move their distribution, as Normal(0.0, z) for "
                    f"obs=x / z."
                )
    return found


def _elsewhere(model: Program, guide: Program, args: tuple, kwargs: dict, trace: Trace, place: int) -> Trace:
    """The model at other draws of the guide; a discrete latent takes its values in turn, as one may be too rare to be drawn."""
    other = trace_pair(model, guide, args, kwargs, 1, None).model
    values = {site["name"]: site["value"] for site in sites_of(other) if not site["is_observed"]}
    for site in sites_of(trace):
        if not site["is_observed"] and is_enumerable(site["fn"]):
            listed = site["fn"].enumerate_support(expand=False)
            values[site["name"]] = listed[place % len(listed)].expand_as(values[site["name"]])
    return trace_program(model, args, 1, None, Substitute(values), kwargs=kwargs)


def factors_of_data(model: Program, args: tuple, kwargs: dict, traces: Traces) -> Tensor | None:
    """The sum of the model's ``pyro.factor`` terms that no latent takes part in, shape (B,), or ``None`` without such terms.

    They multiply p(x) by a function of x, so that it has another base measure than that of a model without them.
    """
    if not any(is_factor(site) for site in sites_of(traces.model)):
        return None
    latents = {site["name"]: site["value"] for site in sites_of(traces.model) if not site["is_observed"]}
    with pyro.validation_enabled(False), _Follow(latents.values()) as follow:
        again = trace_program(model, args, 1, None, Substitute(latents), kwargs=kwargs)
    if follow.read:
        return None
    factors = [site for site in sites_of(again) if is_factor(site) and site["fn"].log_factor not in follow]
    if not factors:
        return None
    data, nesting = data_plate([*sites_of(traces.model), *sites_of(traces.guide)]), plate_nesting(traces.model, traces.guide)
    return torch.stack([per_datum(site, log_prob_of(site), data, 1, nesting)[0].double() for site in factors]).sum(0)


class _Follow(TorchFunctionMode):
    """Follow tensors through all functions of torch that a program calls.

    Attributes:
        read: whether a number that depends on one of them was read into Python, beyond which nothing is known.
    """

    def __init__(self, tensors: Any):
        super().__init__()
        # By storage, which is common to all views of a tensor. The references keep it alive, so that no other has its address.
        self._dependent: dict[int, Tensor] = {}
        self.read = False
        self._hold(list(tensors))

    def __contains__(self, value: Any) -> bool:
        """Whether a value depends on the tensors."""
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._dependent

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        values = (
            [args[1:], kwargs] if name in _SHAPES or name.endswith("_like") else [args[:1]] if name in _AS else [args, kwargs]
        )
        if any(leaf in self for leaf in _leaves(values)):
            self.read = self.read or name in _READS
            self._hold([*_leaves(out), *([args[0]] if _is_in_place(name) else [])])
        return out

    def _hold(self, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                self._dependent[value.untyped_storage().data_ptr()] = value


def _leaves(value: Any) -> list[Any]:
    """What containers within containers hold."""
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, list | tuple) else [value]


def _is_in_place(name: str) -> bool:
    return name == "__setitem__" or (name.startswith("__i") and name not in _READS) or (name[0] != "_" and name.endswith("_"))


# Functions that read the shape and the type alone: of their first argument, and of the others.
_SHAPES = ("new_empty", "new_full", "new_ones", "new_zeros")
_AS = ("expand_as", "reshape_as", "type_as", "view_as")
_READS = ("__bool__", "__complex__", "__float__", "__index__", "__int__", "__array__", "item", "numpy", "tolist")


def _has_density(site: dict) -> bool:
    if not site["is_observed"] or is_factor(site) or is_point(site) or not isinstance(site["value"], Tensor):
        return False
    try:
        return not support_of(site["fn"]).is_discrete
    except NotImplementedError:  # raised by a distribution without a support
        return True


def _shares_memory(value: Tensor, args: tuple) -> bool:
    """Whether a value is a view of an argument."""
    place = value.untyped_storage().data_ptr()
    return any(isinstance(arg, Tensor) and arg.untyped_storage().data_ptr() == place for arg in args)


def _numbers_of(args: tuple, num_data: int) -> Tensor | None:
    """The floating-point numbers of each datum, (B, m), or of all data, (1, m), if they are not along the first dimension."""
    arrays = [arg.detach().double() for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not arrays:
        return None
    by_datum = all(len(arg) == num_data for arg in arrays)
    return torch.cat([arg.reshape(num_data if by_datum else 1, -1) for arg in arrays], -1)


def _rows(layout: Layout, site: dict, value: Tensor) -> Tensor:
    return layout.from_site(value.detach().double(), plate_sizes(site, layout.nesting), site["fn"].event_shape)[0]


def _kept(layout: Layout, site: dict) -> Tensor:
    """Which of each datum's numbers no mask leaves out, (B, n)."""
    mask = torch.as_tensor(mask_of(site), device=site["value"].device)
    return layout.from_site(mask, plate_sizes(site, layout.nesting), site["fn"].event_shape)[0]


def _are_among(value: Tensor, given: Tensor | None, kept: Tensor) -> bool:
    """Whether all numbers of each datum are among those given, up to float32's rounding."""
    if given is None:
        return not bool(kept.any())
    ordered = given.expand(len(value), -1).sort(-1).values.contiguous()
    place, among = torch.searchsorted(ordered, value.contiguous()), ~kept
    for neighbour in (place - 1, place):
        found = ordered.gather(-1, neighbour.clamp(0, ordered.shape[-1] - 1))
        among = among | torch.isclose(found, value, rtol=1e-6, atol=0.0)
    return bool(among.all())


def _shifted_data(step: Tensor, value: Tensor, args: tuple, kept: Tensor) -> Tensor | None:
    """The data whose scaling moved values by such a step, with zeros for values that stayed; ``None`` if no argument did."""
    if bool(((step == 0) | ~kept).all()):
        return torch.zeros_like(step)
    for arg in args:
        if isinstance(arg, Tensor) and arg.is_floating_point() and arg.numel() == step.numel():
            numbers = arg.detach().double().reshape(step.shape)
            # Latents may be larger than the data, whose rounding the step then has; a stretch by so little can be neglected.
            rounding = 1e-5 * float(numbers.abs().max()) + 16 * torch.finfo(arg.dtype).eps * value.abs()
            same = torch.isclose(step.abs(), numbers.abs() * (1 - SCALE), rtol=1e-3, atol=0.0)
            same |= (step.abs() - numbers.abs() * (1 - SCALE)).abs() <= rounding
            if bool((same | (step == 0) | ~kept).all()):
                return torch.where((step == 0) | ~kept, 0.0, numbers)
    return None
