"""What a fit finds out about a pair and its data before it trains, and of each batch as it passes."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Batches
from ..data.datasets import binarize, dequantize
from ..data.matching import Batch
from ..programs.checks import check_finite, check_support
from ..programs.inspect import inspect_pair
from ..programs.reachable import reachable
from ..programs.sites import Program, sites_of
from ..programs.tracing import evaluation_mode, inspection, same_random_stream, trace_pair
from ..programs.wrappers import base_distribution

# Rows whose support is checked at once.
ROWS_AT_ONCE = 8192
# A first loss beyond this many bits per dimension, on data beyond this size, means that the data want another scale.
ABSURD_BITS, LARGE_VALUE = 100.0, 20.0


def check_programs(model: Program, guide: Program) -> None:
    """Refuse what is no Pyro program.

    Raises:
        ValueError: one of them cannot be called, or is a module without a ``forward``.
    """
    for name, program in (("model", model), ("guide", guide)):
        # Pyro's effect guides are modules that are called, without a forward.
        calls = (type(program).__call__, type(program).forward) if isinstance(program, nn.Module) else ()
        missing = calls in {(nn.Module.__call__, nn.Module.forward), (PyroModule.__call__, nn.Module.forward)}
        if missing or not callable(program):
            kind = type(program).__name__
            parts = all(callable(getattr(program, part, None)) for part in ("model", "guide"))
            cure = "pass its .model and its .guide" if parts else "pass a function, a bound method or a module with a forward"
            raise ValueError(f"The {name} must be a Pyro program, got {kind}, which cannot be called on data: {cure}.")


def observed_sites(model: Program, guide: Program, args: Batch) -> list[dict]:
    """The observed sites of one run, which leaves no trace."""
    with inspection(model, guide, args):
        trace = trace_pair(model, guide, args, {}, 1, None).model
    factors = ("Unit", "Delta")
    return [site for site in sites_of(trace) if site["is_observed"] and type(site["fn"]).__name__ not in factors]


class SupportCheck:
    """Refuses batches with values outside the support of what observes them, where it can without running the pair.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: a first batch.

    Attributes:
        direct: whether the arguments themselves are observed, under supports that nothing moves; else each check runs the pair.
    """

    def __init__(self, model: Program, guide: Program, args: Batch):
        self.model, self.guide = model, guide
        sites = [site for site in observed_sites(model, guide, args) if isinstance(site["value"], Tensor)]
        places = [_place_of(site, args) for site in sites]
        self._sites = [(site, place) for site, place in zip(sites, places, strict=True) if place is not None]
        fixed = all((site["mask"] is None or site["mask"] is True) and _is_fixed(site["fn"]) for site in sites)
        self.direct = fixed and len(self._sites) == len(sites)

    def __call__(self, args: Batch, where: str, first_row: int = 0) -> None:
        """Check a batch.

        Args:
            args: the arguments of model and guide.
            where: what the batch is called, such as ``"batch 2 of epoch 1"``.
            first_row: the number of its first row there.

        Raises:
            ValueError: a value is NaN, infinite or outside its support; says where.
        """
        try:
            if not self.direct:
                inspect_pair(self.model, self.guide, *args)
                return
            self._check(args)
        except ValueError as error:
            row = None if not self.direct else next(row for row in range(len(args[0])) if self._is_bad(args, row))
            place = "" if row is None else f", row {first_row + row} (counted from 0)"
            raise ValueError(f"In {where}{place}: {error}") from error

    def _check(self, args: Batch) -> None:
        check_finite(args)
        for site, place in self._sites:
            check_support({**site, "value": args[place].reshape(-1, *site["value"].shape[1:])})

    def _is_bad(self, args: Batch, row: int) -> bool:
        try:
            self._check(tuple(arg[row : row + 1] for arg in args))
        except ValueError:
            return True
        return False

    def check_early(self, batches: Batches) -> bool:
        """Check whole arrays where that takes no run of the pair; whether that was so. Else each batch is checked as it passes.

        Raises:
            ValueError: as for a batch; says the row.
        """
        if not self.direct or batches.loader is not None or batches.transform not in (None, binarize, dequantize):
            return False
        for start in range(0, len(batches.arrays[0]), ROWS_AT_ONCE):
            rows = tuple(array[start : start + ROWS_AT_ONCE] for array in batches.arrays)
            if batches.transform is not None:
                with same_random_stream(rows):
                    rows = (batches.transform(rows[0]), *rows[1:])
            self(rows, "the data", start)
        return True


def _place_of(site: dict, args: Batch) -> int | None:
    """Which argument a site observes as it is, or in another shape of each datum."""
    value = site["value"]
    for place, arg in enumerate(args):
        same = value.data_ptr() == arg.data_ptr() and value.dtype == arg.dtype and value.numel() == arg.numel()
        if value is arg or (same and value.is_contiguous() and arg.is_contiguous() and value.shape[:1] == arg.shape[:1]):
            return place
    return None


def _is_fixed(distribution: Any) -> bool:
    """Whether a support is the same whatever the parameters, by having no tensor in it."""
    try:
        waiting = [distribution.support]
    except NotImplementedError:  # torch's word for a distribution that declares no support
        return True
    while waiting:
        constraint = waiting.pop()
        if not isinstance(constraint, constraints.Constraint):
            return False
        for part in vars(constraint).values():
            if isinstance(part, constraints.Constraint):
                waiting.append(part)
            elif not isinstance(part, bool | int | float):
                return False
    return True


def check_other_batches(
    elbo: Any, model: Program, guide: Program, args: Batch, parameters: list[Tensor], train: Batches
) -> None:
    """Refuse batches of other rows, order or size than the first one's, where the pair cannot take them.

    Raises:
        ValueError: a parameter belongs to each datum in its place; or the pair fails on the last, smaller batch.
    """
    size, total = len(args[0]), train.num_data
    moves = train.shuffle or train.loader is not None or train.num_batches != 1
    if size > 2 and moves and _failure(model, guide, tuple(arg[:-1] for arg in args)) is not None:
        own = _parameters_of_rows(elbo, model, guide, args, parameters)
        if own:
            cure = f"shuffle=False, batch_size={total}" + ("" if train.loader is None else " and arrays in place of a loader")
            raise ValueError(
                f"The pair keeps a parameter for each datum ({_listed(own, model, guide)}), so every batch must hold the same "
                f"data in the same order: make the pair anew, and pass {cure}."
            )
    left = _smallest_batch(train)
    if total is None or not 0 < left < size:
        return
    fewer = tuple(arg[:left] for arg in args)
    error = _failure(model, guide, fewer) or (_failure_in_training(elbo, model, guide, args, fewer) if left == 1 else None)
    if error is None:
        return
    cure = f"choose a batch_size that divides {total}"
    if left == 1:
        cure = f"choose a batch_size that leaves no single datum over, such as {_size_without_one(size, total)}"
    cure += "" if train.loader is None else ", or drop_last=True, in the DataLoader"
    reason = str(error).strip().splitlines()[0].rstrip(".")
    raise ValueError(f"The last batch of an epoch holds {left} of the {total} data, where the pair fails ({reason}): {cure}.")


def _size_without_one(size: int, total: int) -> int:
    return next((other for other in range(size - 1, 1, -1) if total % other != 1), total)


def _smallest_batch(train: Batches) -> int:
    """The size of the last batch where it is smaller than the others, else 0."""
    size = train.batch_size
    if train.loader is not None:
        if train.loader.batch_size is None or train.loader.drop_last:
            return 0
        size = train.loader.batch_size
    return 0 if train.num_data is None else train.num_data % size


def _failure(model: Program, guide: Program, args: Batch) -> Exception | None:
    """What a pair says of a batch on which it does not run, with batch normalisation at rest."""
    try:
        with _in_mode(_normalising(model, guide), training=False):
            inspect_pair(model, guide, *args)
    except Exception as error:  # whatever a program raises where its shapes do not fit
        return error
    return None


def _failure_in_training(elbo: Any, model: Program, guide: Program, whole: Batch, args: Batch) -> Exception | None:
    """The same where batch normalisation is in training, as it will be after whole batches; its statistics stay."""
    layers, elbo = _normalising(model, guide), copy.copy(elbo)
    kept = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    try:
        with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide):
            for batch, training in ((whole, False), (args, True)):  # of the first batch an estimator keeps the plates
                with _in_mode(layers, training=training):
                    elbo.loss(model, guide, *batch)
    except ValueError as error:  # what torch raises of one value per channel
        return error
    finally:
        for layer, values in zip(layers, kept, strict=True):
            for buffer, value in zip(layer.buffers(), values, strict=True):
                buffer.copy_(value)
    return None


def _normalising(model: Program, guide: Program) -> list[_BatchNorm]:
    return [each for _, each in reachable(model, guide) if isinstance(each, _BatchNorm) and each.training]


@contextmanager
def _in_mode(layers: Sequence[nn.Module], *, training: bool) -> Iterator[None]:
    before = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = training
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.training = mode


def _parameters_of_rows(elbo: Any, model: Program, guide: Program, args: Batch, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters of which each datum has its own part, by which of their gradients change with the first datum."""
    size = len(args[0])
    if not hasattr(elbo, "differentiable_loss"):
        elbo = pyro.infer.Trace_ELBO()
    other = tuple(torch.cat([arg[-1:], arg[1:]]) for arg in args)
    before, after = (_gradients(elbo, model, guide, batch, parameters) for batch in (args, other))
    own = []
    for parameter, one, two in zip(parameters, before, after, strict=True):
        if one is not None and two is not None and parameter.numel() % size == 0:
            moved = int((one != two).sum())
            if 0 < moved <= parameter.numel() // size:
                own.append(parameter)
    return own


def _gradients(elbo: Any, model: Program, guide: Program, args: Batch, parameters: list[Tensor]) -> tuple[Tensor | None, ...]:
    with same_random_stream(args), evaluation_mode(model, guide), pyro.validation_enabled(False):
        loss = copy.copy(elbo).differentiable_loss(model, guide, *args)
        return torch.autograd.grad(loss, parameters, allow_unused=True)


def rehearse(elbo: Any, model: Program, guide: Program, args: Batch, parameters: list[Tensor]) -> float:
    """The loss of a batch in evaluation mode; warns of parameters that it reaches and the optimizer will lack.

    An estimator that counts its steps does not notice.
    """
    known = {id(tensor) for tensor in (*parameters, *args)}
    elbo = copy.copy(elbo)
    with same_random_stream(args), evaluation_mode(model, guide), pyro.validation_enabled(False):
        if hasattr(elbo, "differentiable_loss"):
            loss = elbo.differentiable_loss(model, guide, *args)
            # Some estimators make leaves of their samples, which no program holds.
            held = {id(value) for _, value in reachable(model, guide) if isinstance(value, Tensor)}
            leaves = [leaf for leaf in _leaves(loss) if isinstance(leaf, nn.Parameter) or id(leaf) in held]
            missed = [leaf for leaf in leaves if id(leaf) not in known]
        else:
            loss, missed = _loss_and_missed(elbo, model, guide, args, known)
    if missed:
        warnings.warn(
            f"The loss reaches {_listed(missed, model, guide)}, which the optimizer lacks, so they will not train: register "
            f"their module with pyro.module in the program, or freeze them with requires_grad_(False).",
            UserWarning,
            stacklevel=3,
        )
    return float(torch.as_tensor(loss).detach())


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that autograd would leave a gradient in."""
    found, seen, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return found[::-1]


def _loss_and_missed(elbo: Any, model: Program, guide: Program, args: Batch, known: set[int]) -> tuple[float, list[Tensor]]:
    """The same, beside the loss, of an estimator that leaves gradients and no loss; the gradients are taken away again."""
    others = [each for _, each in reachable(model, guide) if isinstance(each, Tensor) and each.requires_grad and each.is_leaf]
    others = [each for each in others if id(each) not in known]
    before = [each.grad for each in others]
    for each in others:
        each.grad = None
    store = pyro.get_param_store()
    kept = set(store.keys())
    loss = elbo.loss_and_grads(model, guide, *args)
    for name in set(store.keys()) - kept:  # a running mean that is some estimator's baseline
        del store[name]
    missed = [each for each in others if each.grad is not None]
    for each, gradient in zip(others, before, strict=True):
        each.grad = gradient
    return float(loss), missed


def _listed(tensors: list[Tensor], *programs: Program) -> str:
    """Tensors by name where the programs or Pyro's store have one, else by shape; a few of many."""
    names = {id(value): name for name, value in reachable(*programs) if isinstance(value, Tensor)}
    names |= {id(value): name for name, value in pyro.get_param_store().named_parameters()}
    places = {key: place for place, key in enumerate(names)}
    ordered = sorted(tensors, key=lambda each: places.get(id(each), len(places)))
    words = [f"{names.get(id(each), 'a tensor')} {tuple(each.shape)}" for each in ordered]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


def check_first_loss(loss: float, num_dims: int, model: Program, guide: Program, args: Batch) -> None:
    """Say of a first loss, in nats per datum, what its data have to do with it.

    Raises:
        ValueError: it is infinite or NaN by values at the edge of a support.
    """
    if not math.isfinite(loss):
        found = values_at_the_edge(observed_sites(model, guide, args))
        if found:
            raise ValueError(found)
        return
    bits = loss / max(num_dims, 1) / math.log(2)
    large = large_values(observed_sites(model, guide, args)) if bits > ABSURD_BITS else None
    if large:
        warnings.warn(f"The first bound is {-loss:,.0f} nats per datum, {bits:,.0f} bits per dimension: {large}", stacklevel=3)


def cause_in_data(model: Program, guide: Program, args: Batch) -> str | None:
    """What in a batch makes a loss or gradient infinite, in one sentence, or ``None`` where it is not the data."""
    try:
        with pyro.validation_enabled(False):
            sites = observed_sites(model, guide, args)
    except (RuntimeError, ValueError):  # parameters gone astray may let no program run
        return None
    for site in sites:
        if isinstance(site["value"], Tensor) and not bool(torch.isfinite(site["value"]).all()):
            return f"site {site['name']!r} observes infinite or NaN values: drop or repair what makes them."
    return values_at_the_edge(sites) or large_values(sites)


def values_at_the_edge(sites: list[dict]) -> str | None:
    """A sentence on values where a density is zero or infinite, such as 0 under a Beta."""
    for site, distribution, value in _densities(sites):
        log_prob = distribution.log_prob(value)
        bad = ~torch.isfinite(log_prob)
        edges = _edges(distribution)
        if bad.shape != value.shape:
            bad = bad.reshape(*bad.shape, *[1] * (value.dim() - bad.dim())).expand(value.shape)
            edges, bad = [0.0], bad & (value == 0)
        at_edge = torch.stack([value == edge for edge in edges]).any(0) if edges else torch.zeros_like(bad)
        if bool(bad.any()) and bool((at_edge | ~bad).all()):
            edge = value[bad][0].item()
            return (
                f"{type(distribution).__name__} at site {site['name']!r} has no finite log-density at {edge:g}, which "
                f"{int(bad.sum())} of the {value.numel()} observed values are: drop them, or clamp the data into the open "
                f"interval."
            )
    return None


def large_values(sites: list[dict]) -> str | None:
    """A sentence on values far from the scale of one, such as pixels from 0 to 255 under a Normal."""
    for site, distribution, value in _densities(sites):
        low, high = value.min().item(), value.max().item()
        if max(-low, high) > LARGE_VALUE:
            whole = bool((value == value.round()).all()) and low >= 0
            pixels = "divide them (data / 255), or for whole levels choose a discretized_logistic or dequantized likelihood"
            return (
                f"{type(distribution).__name__} at site {site['name']!r} observes values from {low:g} to {high:g}: "
                f"{pixels if whole else 'bring them to a scale near 1, such as zero mean and unit variance'}."
            )
    return None


def _densities(sites: list[dict]) -> Iterator[tuple[dict, Any, Tensor]]:
    """The observed sites with a density, each with its elementwise distribution and its values."""
    for site in sites:
        distribution, value = base_distribution(site), site["value"]
        try:
            discrete = distribution.support.is_discrete
        except NotImplementedError:  # it declares no support
            continue
        if isinstance(value, Tensor) and value.is_floating_point() and not discrete:
            yield site, distribution, value


def _edges(distribution: Any) -> list[float]:
    bounds = [getattr(distribution.support, name, None) for name in ("lower_bound", "upper_bound")]
    return [float(bound) for bound in bounds if isinstance(bound, int | float)]


def checked_optimizer(make: Callable[..., Any], parameters: list[Tensor], lr: float) -> torch.optim.Optimizer:
    """Make an optimizer, or say what to pass in place of one that Pyro would wrap or that has its parameters already.

    Raises:
        ValueError: not a callable ``(parameters, lr=...)``.
    """
    if isinstance(make, pyro.optim.PyroOptim | torch.optim.Optimizer) or not callable(make):
        raise ValueError(
            f"optimizer must be a name such as 'adam' or a callable (parameters, lr=...) such as torch.optim.Adam, got an "
            f"instance of {type(make).__module__}.{type(make).__name__}: pass optimizer='adam', lr=1e-3, say."
        )
    return make(parameters, lr=lr)
