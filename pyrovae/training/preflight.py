"""Checks of a pair and its batches before training: smaller batches, parameters of single data, parameters left out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.inspect import inspect_pair
from ..programs.reachable import reachable
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode, same_random_stream

__all__ = ["check_other_batches", "check_programs", "checked_optimizer", "rehearse"]


def check_programs(model: Program, guide: Program) -> None:
    """Refuse a model or a guide that is no Pyro program.

    Raises:
        ValueError: one of them cannot be called, or is a module without a ``forward``.
    """
    for name, program in (("model", model), ("guide", guide)):
        # Pyro's effect guides are modules that are called, without a forward.
        calls = (type(program).__call__, type(program).forward) if isinstance(program, nn.Module) else ()
        missing = calls in {(nn.Module.__call__, nn.Module.forward), (PyroModule.__call__, nn.Module.forward)}
        parts = all(callable(getattr(program, part, None)) for part in ("model", "guide"))
        missing |= parts and calls[1:] == (nn.Module.forward,)  # our pairs, whose own __call__ refuses
        if missing or not callable(program):
            kind = type(program).__name__
            cure = "pass its .model and its .guide" if parts else "pass a function, a bound method or a module with a forward"
            raise ValueError(f"The {name} must be a Pyro program, got {kind}, which cannot be called on data: {cure}.")


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
    """The error of a pair that does not run on a batch, with batch normalisation in evaluation mode; else ``None``."""
    try:
        with _in_mode(_normalising(model, guide), training=False):
            inspect_pair(model, guide, *args)
    except Exception as error:  # whatever a program raises where its shapes do not fit
        return error
    return None


def _failure_in_training(elbo: Any, model: Program, guide: Program, whole: Batch, args: Batch) -> Exception | None:
    """The same with batch normalisation in training mode, after a whole batch; its statistics are restored."""
    layers, elbo = _normalising(model, guide), copy.copy(elbo)
    buffers = [[buffer.clone() for buffer in layer.buffers()] for layer in layers]
    try:
        with torch.no_grad(), same_random_stream(args), evaluation_mode(model, guide):
            for batch, training in ((whole, False), (args, True)):  # of the first batch an estimator keeps the plates
                with _in_mode(layers, training=training):
                    elbo.loss(model, guide, *batch)
    except ValueError as error:  # what torch raises of one value per channel
        return error
    finally:
        for layer, values in zip(layers, buffers, strict=True):
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
    """Parameters with a part for each datum: if the first datum changes, no more than one part of their gradient does."""
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
    """The loss of a batch in evaluation mode; warns of parameters that the loss depends on and the optimizer lacks.

    The estimator is copied, so that it does not count this as a step.
    """
    known = {id(tensor) for tensor in (*parameters, *args)}
    elbo = copy.copy(elbo)
    with same_random_stream(args), evaluation_mode(model, guide), pyro.validation_enabled(False):
        if hasattr(elbo, "differentiable_loss"):
            loss = elbo.differentiable_loss(model, guide, *args)
            # Some estimators make leaves of their samples, which no program holds.
            of_programs = {id(value) for _, value in reachable(model, guide) if isinstance(value, Tensor)}
            leaves = [leaf for leaf in _leaves(loss) if isinstance(leaf, nn.Parameter) or id(leaf) in of_programs]
            missed = [leaf for leaf in leaves if id(leaf) not in known]
        else:
            loss, missed = _loss_and_missed(elbo, model, guide, args, known)
    if missed:
        warnings.warn(
            f"The loss reaches {_listed(missed, model, guide)}, which the optimizer lacks, so they will not train: register "
            f"their module with pyro.module in the program, or freeze them with requires_grad_(False).",
            UserWarning,
            stacklevel=5,
        )
    return float(torch.as_tensor(loss).detach())


def _leaves(loss: Tensor) -> list[Tensor]:
    """The tensors that autograd would leave a gradient in."""
    leaves, visited, waiting = [], set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves[::-1]


def _loss_and_missed(elbo: Any, model: Program, guide: Program, args: Batch, known: set[int]) -> tuple[float, list[Tensor]]:
    """The loss, and the parameters that the optimizer lacks, for an estimator without a differentiable loss.

    Such an estimator leaves gradients, which are removed again.
    """
    others = [each for _, each in reachable(model, guide) if isinstance(each, Tensor) and each.requires_grad and each.is_leaf]
    others = [each for each in others if id(each) not in known]
    before = [each.grad for each in others]
    for each in others:
        each.grad = None
    store = pyro.get_param_store()
    names = set(store.keys())
    loss = elbo.loss_and_grads(model, guide, *args)
    for name in set(store.keys()) - names:  # a running mean, the baseline of some estimators
        del store[name]
    missed = [each for each in others if each.grad is not None]
    for each, gradient in zip(others, before, strict=True):
        each.grad = gradient
    return float(loss), missed


def _listed(tensors: list[Tensor], *programs: Program) -> str:
    """The first four tensors, by their names in the programs or Pyro's store, with their shapes."""
    names = {id(value): name for name, value in reachable(*programs) if isinstance(value, Tensor)}
    names |= {id(value): name for name, value in pyro.get_param_store().named_parameters()}
    places = {key: place for place, key in enumerate(names)}
    ordered = sorted(tensors, key=lambda each: places.get(id(each), len(places)))
    words = [f"{names.get(id(each), 'a tensor')} {tuple(each.shape)}" for each in ordered]
    return ", ".join(words[:4]) + (f" and {len(words) - 4} more" if len(words) > 4 else "")


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
