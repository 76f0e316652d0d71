"""What a training run needs before its first step: data, a checked pair, an optimizer and a step."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..compile.average import Average, ScheduleFree
from ..compile.cuda import check_precision
from ..compile.step import Step, stage
from ..data.batches import Batches
from ..data.containers import Lazy
from ..data.datasets import binarize, dequantize
from ..estimators.base import check_estimator, make_estimator, runs_together
from ..programs.inspect import FirstBatch, check_steady_scale, inspect_pair, prepare
from ..programs.sites import Program
from ..programs.state import buffers_kept
from .options import FitOptions
from .preflight import check_other_batches, check_programs, checked_optimizer, rehearse
from .schedules import Schedule, is_schedule_free, named_optimizer, named_schedule
from .values import SupportCheck, check_first_loss

__all__ = ["Setup", "set_up", "split"]


@dataclass(frozen=True)
class Setup:
    """What :func:`set_up` made.

    Attributes:
        model: p(x, z).
        guide: q(z|x).
        estimator: the objective.
        train: the training data.
        held_out: the validation data, or ``None``.
        first: what the first batch showed of the pair.
        check: refuses batches with values outside their supports.
        checked_train: whether all training data have been checked, so that no batch needs to be.
        checked_held_out: whether all validation data have been.
        optimizer: holds the parameters.
        scheduler: is stepped after each step, or ``None``.
        step: takes a training step.
        loads: whether the step makes its batches itself, from rows and the whole data.
        total_steps: how many steps the run takes at most, or ``None`` if the data do not know their length.
        depends_on_length: whether what a step computes depends on ``total_steps``, as under a cosine schedule.
        rows: where the training data stand in the data that were given; ``None`` if they are all of them.
    """

    model: Program
    guide: Program
    estimator: Any
    train: Batches
    held_out: Batches | None
    first: FirstBatch
    check: SupportCheck
    checked_train: bool
    checked_held_out: bool
    optimizer: torch.optim.Optimizer
    scheduler: Any
    step: Step
    loads: bool
    total_steps: int | None
    depends_on_length: bool
    rows: torch.Tensor | None


def set_up(model: Program, guide: Program, data: Any, options: FitOptions) -> Setup:
    """Check a pair, its data and its estimator on a first batch, then make the optimizer and the step.

    Raises:
        ValueError: as :func:`pyrovae.fit`; nothing has been trained then.
    """
    check_programs(model, guide)
    if options.seed is not None:
        torch.manual_seed(options.seed)
    estimator = make_estimator(options.estimator)
    train, held_out, rows = split(model, data, options)
    for batches in (train, held_out):
        if batches is not None:
            batches.check_passes(options.epochs)
    first = prepare(model, guide, train, particles=runs_together(estimator), each=False)
    if not first.parameters:
        raise ValueError("The pair has no parameters to train: register modules with pyro.module, or use pyro.param.")
    train.to(first.dtype, first.device, first.floating)
    check_estimator(estimator, first.info)
    check_precision(options.precision, first.device)
    with torch.random.fork_rng():
        example = train.peek()
    check = SupportCheck(model, guide, example)
    checked_train, checked_held_out = check.check_early(train), False
    if held_out is not None:
        held_out.to(first.dtype, first.device, first.floating)
        with torch.random.fork_rng():
            inspect_pair(model, guide, *held_out.peek())
        checked_held_out = check.check_early(held_out)
    check_other_batches(estimator, model, guide, example, first.parameters, train)
    if train.num_data is None or train.num_data % len(example[0]):
        check_steady_scale(model, guide, example, first.info)
    loss = rehearse(estimator, model, guide, example, first.parameters)
    check_first_loss(loss / first.info.count(example), first.info.num_dims, model, guide, example)

    # Gradients that another loop, or a run that failed, left behind would enter the first step.
    for parameter in first.parameters:
        parameter.grad = None
    total_steps = options.total_steps(train.num_batches)
    optimizer, scheduler = _make_optimizer(first, options, total_steps, train.num_batches)
    compiles = options.compiles(total_steps)
    # Data in memory are gathered and drawn within a compiled step, unless by a program that need not be tensor operations.
    loads = compiles and options.shuffle and train.loader is None and options.transform in (None, binarize, dequantize)
    with buffers_kept(model, guide):
        step = stage(
            estimator,
            model,
            guide,
            optimizer,
            example,
            clip_norm=options.clip_norm,
            count=first.info.count,
            load=train.load if loads else None,
            backend="inductor" if compiles else "eager",
            precision=options.precision,
        )
    step.waits, step.parts = False, options.accumulate
    step.average = None if options.ema is None else Average(first.parameters, options.ema)
    if is_schedule_free(optimizer):
        step.average = ScheduleFree(optimizer)
    return Setup(
        model, guide, estimator, train, held_out, first, check, checked_train, checked_held_out,
        optimizer, scheduler, step, loads, total_steps, options.depends_on_length(), rows,
    )  # fmt: skip


def split(model: Program, data: Any, options: FitOptions) -> tuple[Batches, Batches | None, torch.Tensor | None]:
    """Batches of the training data and of the validation data, and the rows of the former if they are a part.

    Raises:
        ValueError: a fraction that leaves one of them empty, or data of which no fraction can be held out.
    """
    batch_size, shuffle, transform, validation = options.batch_size, options.shuffle, options.transform, options.validation
    train = Batches(data, batch_size, shuffle=shuffle, transform=transform, program=model)
    if validation is None:
        return train, None, None
    if not isinstance(validation, numbers.Real):
        return train, Batches(validation, batch_size, program=model), None
    fraction = float(validation)
    if not 0 < fraction < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, or data, got {validation!r}.")
    if not train.arrays and train.rows is None:
        raise ValueError("A fraction cannot be held out of a Dataset or DataLoader: pass validation=another one.")
    size = int(train.num_data or 0)
    num_held_out = round(size * fraction)
    if not 0 < num_held_out < size:
        raise ValueError(f"validation={validation} of {size} data leaves one part empty: give more data.")
    order = torch.randperm(size)
    kept, held_out = train.part(order[num_held_out:]), train.part(order[:num_held_out], unread=transform is None)
    if transform is not None:
        # Once, so that epochs are compared on the same numbers.
        held_out = (transform(held_out[0]), *held_out[1:])
    # What is unread has not been matched to the program's parameters.
    parts = [Batches(part, batch_size, program=model if isinstance(part, Lazy) else None) for part in (kept, held_out)]
    parts[0].shuffle, parts[0].transform = shuffle, transform
    return parts[0], parts[1], order[num_held_out:]


def _make_optimizer(
    first: FirstBatch, options: FitOptions, total_steps: int | None, epoch: int | None
) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = checked_optimizer(named_optimizer(options.optimizer), first.parameters, options.lr)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer must evaluate the loss once for each step, got LBFGS, which does so several times: choose 'adam'."
        )
    if is_schedule_free(optimizer):
        optimizer.train()  # type: ignore[attr-defined]  # its steps begin at y
        if options.ema is not None or options.depends_on_length():
            raise ValueError(
                "A schedule-free optimizer averages the parameters itself, in place of a falling rate and of ema: pass "
                "schedule='constant' (--train.schedule constant) and leave ema out."
            )
    scheduler = named_schedule(options.schedule, total_steps, epoch)(optimizer)
    follows = isinstance(scheduler, ReduceLROnPlateau) or (isinstance(scheduler, Schedule) and scheduler.patience is not None)
    if follows and options.validation is None:
        raise ValueError("A schedule that follows the validation bound needs one: pass validation=0.1, for example.")
    return optimizer, scheduler
