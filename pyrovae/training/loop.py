"""Training: one readable loop over any pair of Pyro programs."""

from __future__ import annotations

import math
import numbers
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._validation import positive_integer, unknown
from ..compile.cuda import check_precision, products_in
from ..compile.step import stage
from ..data.batches import Batches
from ..data.datasets import binarize, dequantize
from ..estimators.base import check_estimator, make_estimator, runs_together
from ..programs.inspect import PairInfo, check_steady_scale, inspect_pair, prepare
from ..programs.reachable import changed, outermost_modules, python_state
from ..programs.sites import Program
from ..programs.state import buffers_kept, in_own_scope
from ..programs.tracing import evaluation_mode, same_random_stream
from .preflight import (
    SupportCheck,
    cause_in_data,
    check_first_loss,
    check_other_batches,
    check_programs,
    checked_optimizer,
    rehearse,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, fused=True),
    "adamax": torch.optim.Adamax,
    "adamw": partial(torch.optim.AdamW, fused=True),
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
# Inductor takes 5 to 20 seconds, and saves 3 to 15 milliseconds a step on two cores.
STEPS_TO_COMPILE = 3000
# A GPU is told so many steps before it is asked what came of them; the bar and max_seconds are ahead of it by as many.
SYNC_EVERY = 100
# A captured step is compared with its program at an epoch's start once so many have been taken since: it costs as much as 10 to
# 20 of them, or 50 on a GPU, and the checks of a run together shall cost less than 3 %.
STEPS_BETWEEN_CHECKS, STEPS_BETWEEN_CHECKS_ON_GPU = 500, 2000


@dataclass
class History:
    """What happened in training, one record an epoch.

    Attributes:
        estimator: the name of the objective's class.
        num_particles: K.
        records: dictionaries with ``epoch``, ``step``, ``bound`` and ``validation`` (nats per datum; ``None`` without
            validation data), ``lr`` and ``seconds`` since the start.
        stopped: why training ended.
        precision: of matrix products and convolutions.
    """

    estimator: str
    num_particles: int
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "all epochs done"
    precision: str = "float32"

    @property
    def bound(self) -> list[float]:
        """The training bound of each epoch, averaged while the parameters moved, in nats per datum."""
        return [record["bound"] for record in self.records]

    @property
    def validation(self) -> list[float]:
        """The validation bound of each epoch, in nats per datum; empty without validation data."""
        return [record["validation"] for record in self.records if record["validation"] is not None]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the learning curve, on new axes unless given some."""
        from ..plots import learning_curve

        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        return learning_curve(self.records, ax)


@in_own_scope(keep=True)
def fit(
    model: Program,
    guide: Program,
    data: Any,
    *,
    estimator: Any = "elbo",
    epochs: int = 100,
    batch_size: int = 100,
    shuffle: bool = True,
    lr: float = 1e-3,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adam",
    schedule: str | Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] = "constant",
    clip_norm: float | None = None,
    validation: Any = None,
    patience: int | None = None,
    max_seconds: float | None = None,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
    seed: int | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    r"""Train a pair of Pyro programs by stochastic gradients of an estimator.

    Parameters are found as Pyro's ``SVI`` finds them: modules registered with ``pyro.module``, ``PyroModule``\ s, bare
    ``pyro.param``\ s, and the module whose bound method a program is. Each step follows the mean objective per datum.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        data: an array or tensor (N, ...), a tuple of them for programs of several arguments, a masked array for those with a
            parameter ``mask``, a Dataset or a DataLoader (which keeps its own batch size and order). A stream that can be read
            only once takes ``epochs=1``.
        estimator: a name (``"elbo"``, ``"iwae"``, ``"trace_elbo"``, ...), a table ``{"kind": "iwae", "num_particles": 50}``,
            one of :mod:`pyrovae.estimators`, or any ``pyro.infer.ELBO``.
        epochs: passes over the data, at most.
        batch_size: data per step.
        shuffle: a new order in each epoch; must be ``False`` for a guide that keeps a parameter for each datum in its place,
            such as ``AutoNormal``, ``AutoDelta`` or ``AutoNormalMessenger``, with all data in one batch. Autoguides that draw
            one vector for all data, such as ``AutoMultivariateNormal``, have no factor for each datum and are refused.
        lr: the learning rate.
        optimizer: ``"adam"``, another name, or a callable ``(parameters, lr=...)`` such as a torch optimizer class.
        schedule: ``"constant"``, ``"cosine"`` (to zero over all steps), or a callable that makes a torch scheduler, which is
            stepped after every optimizer step.
        clip_norm: the largest norm that the gradient of all parameters together may have.
        validation: a fraction of the data to hold out, or data of their own; scored by the same estimator each epoch.
        patience: stop after this many epochs without a better validation bound, and go back to the best parameters and
            buffers, such as the statistics of batch normalisation.
        max_seconds: stop after the step that crosses this time, counted from the first step.
        compile: capture the step as one graph and compile it (:mod:`pyrovae.compile`); ``"auto"`` does so for runs of 3,000
            steps or more, which repay the compiler's seconds. The random numbers are the same either way, and the losses agree
            to rounding. On a GPU whole steps become CUDA graphs, with the kernel of Adam and AdamW in them
            (:mod:`pyrovae.cuda`). A pair that cannot be captured trains as it is, and a warning says why: one that reads values
            of tensors into Python, or keeps a count there. The graph is compared with the pair in the second step, after an
            ``on_epoch`` that changed an object which the pair can reach, and at the start of an epoch once 500 steps (on a GPU
            2,000) have been taken since; where they differ, training goes on without the graph and a warning says since when.
        precision: of matrix products and convolutions. ``"float32"`` is that on a GPU too, whatever torch's settings are;
            ``"tf32"`` takes an NVIDIA GPU's faster units, which round factors to 10 bits, and is refused on a CPU.
            ``"bfloat16"`` rounds factors to 7 bits, and compiles; parameters, sums and log-weights stay in float32. It is
            for processors with units for it; the README has what it does to the numbers.
        transform: applied to the first tensor of each training batch, such as :func:`pyrovae.data.binarize`.
        progress: show a bar with the bound in nats per datum.
        seed: seeds torch's random stream, for the order, the draws and the transform.
        on_epoch: called with each epoch's record.

    Returns:
        The history of the bound.

    Raises:
        ValueError: bad data or options, or a pair or estimator that do not fit; nothing has been trained then. Batches that
            only show as they pass, of a loader, a transform of your own, or values that the model computes, are refused when
            they come, with their number; the steps before them stand.
        FloatingPointError: the loss became NaN, or a gradient NaN or infinite; the last parameters before it are kept.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> history = pv.fit(vae.model, vae.guide, torch.ones(50, 9), epochs=5, lr=0.01, progress=False, seed=0)
        >>> history.bound[-1] > history.bound[0]
        True
    """
    epochs = positive_integer(epochs, "epochs")
    if not (isinstance(lr, numbers.Real) and 0 < lr < math.inf):
        raise ValueError(f"lr must be a positive number, got {lr!r}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be a positive number, got {clip_norm!r}.")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile is True, False or "auto", not {compile!r}.')
    if patience is not None and validation is None:
        raise ValueError("patience watches the validation bound: pass validation=0.1, say.")
    check_programs(model, guide)
    if seed is not None:
        torch.manual_seed(seed)
    elbo = make_estimator(estimator)
    train, held_out = _split(model, data, validation, batch_size, shuffle, transform)
    for batches in (train, held_out):
        if batches is not None:
            batches.check_passes(epochs)
    start = prepare(model, guide, train, particles=runs_together(elbo), each=False)
    if not start.parameters:
        raise ValueError("The pair has no parameters to train: register modules with pyro.module, or use pyro.param.")
    train.to(start.dtype, start.device, start.floating)
    check_estimator(elbo, start.info)
    check_precision(precision, start.device)
    with torch.random.fork_rng():
        example = train.peek()
    check_batch = SupportCheck(model, guide, example)
    checked, check_held = check_batch.check_early(train), None
    if held_out is not None:
        held_out.to(start.dtype, start.device, start.floating)
        with torch.random.fork_rng():
            inspect_pair(model, guide, *held_out.peek())
        check_held = None if check_batch.check_early(held_out) else check_batch
    check_other_batches(elbo, model, guide, example, start.parameters, train)
    if train.num_data is None or train.num_data % len(example[0]):
        check_steady_scale(model, guide, example, start.info)
    loss = rehearse(elbo, model, guide, example, start.parameters)
    check_first_loss(loss / start.info.count(example), start.info.num_dims, model, guide, example)

    batches_each = train.num_batches
    # Gradients that another loop, or a run that failed, left behind would enter the first step.
    for parameter in start.parameters:
        parameter.grad = None
    steps = None if batches_each is None else epochs * batches_each
    optimize = checked_optimizer(_named(optimizer, "optimizer", OPTIMIZERS), start.parameters, lr)
    scheduler = _named(schedule, "schedule", _schedules(steps))(optimize)
    if isinstance(optimize, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss several times a step, which a stochastic one cannot be: choose 'adam'.")
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError("ReduceLROnPlateau waits for a metric, and a schedule here follows the step: choose 'cosine'.")
    if compile == "auto":
        compile = precision == "bfloat16" or (steps is not None and steps >= STEPS_TO_COMPILE)
    # Data in memory are gathered and drawn within a compiled step, unless by a program that need not be tensor operations.
    inside = compile and shuffle and train.loader is None and transform in (None, binarize, dequantize)
    with buffers_kept(model, guide):
        take_step = stage(
            elbo,
            model,
            guide,
            optimize,
            example,
            clip_norm=clip_norm,
            count=start.info.count,
            load=train.load if inside else None,
            backend="inductor" if compile else "eager",
            precision=precision,
        )
    history = History(type(elbo).__name__, elbo.num_particles, precision=precision)
    best, best_epoch, best_state = -math.inf, 0, None
    modules, infinite = outermost_modules(model, guide).values(), list[int]()
    began, step, compared = time.perf_counter(), 0, 0

    def batch_of(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with same_random_stream(inputs):
            return train.load(*inputs) if inside else inputs

    def look() -> float:
        """The bounds of the steps since the last look, summed."""
        outcomes = take_step.drain()
        for at, (loss, norm) in enumerate(outcomes, step - len(outcomes) + 1):
            # An infinite loss is a datum of weight zero, whose gradient our estimators leave out.
            if math.isnan(loss) or not math.isfinite(norm):
                what, value = ("loss", loss) if math.isnan(loss) else ("gradient", norm)
                cure = f"lower the learning rate ({lr:g}), or {'set clip_norm' if clip_norm is None else 'clip_norm'}."
                cause = cause_in_data(model, guide, batch_of(inputs))
                raise FloatingPointError(f"The {what} became {value} in epoch {epoch}, step {at}: {cause or cure}")
            if math.isinf(loss) and not infinite:
                infinite.append(at)
                cause = cause_in_data(model, guide, batch_of(inputs))
                if cause is not None:
                    warnings.warn(f"The loss is infinite in epoch {epoch}, step {at}: {cause}", stacklevel=3)
        return -sum(loss for loss, _ in outcomes)

    def out_of_time() -> bool:
        return max_seconds is not None and time.perf_counter() - began > max_seconds

    # The data have been checked, so the per-call validation that Pyro would repeat at each step is off; NaN is still caught.
    with (
        pyro.validation_enabled(False),
        products_in(precision, start.device),
        tqdm(total=steps, unit="step", disable=not progress) as bar,
    ):
        for epoch in range(1, epochs + 1):
            total, seen = 0.0, 0.0
            if step - compared >= (STEPS_BETWEEN_CHECKS_ON_GPU if take_step.asynchronous else STEPS_BETWEEN_CHECKS):
                take_step.recheck(f"at the start of epoch {epoch}")
                compared = step
            for number, inputs in enumerate(train.inputs() if inside else train, 1):
                # Supports are checked in each batch of a loader, which may change its data, but by runs of the pair once.
                if not checked and (epoch == 1 or (check_batch.direct and train.loader is not None)):
                    check_batch(batch_of(inputs), f"batch {number} of epoch {epoch}")
                take_step.step_async(*inputs)
                if scheduler is not None:
                    scheduler.step()
                step += 1
                seen += start.info.count(inputs)
                bar.update()
                if not take_step.asynchronous or step % SYNC_EVERY == 0:
                    total += look()
                if out_of_time():
                    break
            total += look()
            record = {
                "epoch": epoch,
                "step": step,
                "bound": total / seen,
                "validation": None if held_out is None else _bound(elbo, model, guide, held_out, start.info, check_held),
                "lr": optimize.param_groups[0]["lr"],
                "seconds": time.perf_counter() - began,
            }
            history.records.append(record)
            check_held = check_held if check_batch.direct else None
            bar.set_postfix_str(_said(record))
            if on_epoch is not None:
                before = python_state(model, guide, elbo) if take_step.captured else {}
                on_epoch(record)
                if take_step.captured and changed(before, python_state(model, guide, elbo)):
                    take_step.recheck(f"after on_epoch of epoch {epoch}")
            if patience is not None:
                if record["validation"] > best:
                    best, best_epoch = record["validation"], epoch
                    best_state = _state_of(start.parameters, modules)
                elif epoch - best_epoch >= patience:
                    history.stopped = f"no better validation bound for {patience} epochs"
                    break
            if out_of_time():
                history.stopped = f"{max_seconds} seconds are over"
                break
    if best_state is not None:
        with torch.no_grad():
            for live, value in best_state:
                live().copy_(value)
    return history


def _split(
    model: Program, data: Any, validation: Any, batch_size: int, shuffle: bool, transform: Callable[[Tensor], Tensor] | None
) -> tuple[Batches, Batches | None]:
    train = Batches(data, batch_size, shuffle=shuffle, transform=transform, program=model)
    if validation is None:
        return train, None
    if not isinstance(validation, numbers.Real):
        return train, Batches(validation, batch_size, program=model)
    fraction = float(validation)
    if not 0 < fraction < 1:
        raise ValueError(f"validation is a fraction between 0 and 1, or data, not {validation!r}.")
    if not train.arrays:
        raise ValueError("A fraction cannot be held out of a Dataset or DataLoader: pass validation=another one.")
    size = len(train.arrays[0])
    held = round(size * fraction)
    if not 0 < held < size:
        raise ValueError(f"validation={validation} of {size} data leaves one part empty: give more data.")
    order = torch.randperm(size)
    kept, held_out = (tuple(array[part] for array in train.arrays) for part in (order[held:], order[:held]))
    if transform is not None:
        # Once, so that epochs are compared on the same numbers.
        held_out = (transform(held_out[0]), *held_out[1:])
    return Batches(kept, batch_size, shuffle=shuffle, transform=transform), Batches(held_out, batch_size)


def _state_of(parameters: list[Tensor], modules: Iterable[nn.Module]) -> list[tuple[Callable[[], Tensor], Tensor]]:
    """All that training moves, each as what gives the live tensor and its value now; a buffer may be another tensor by then."""
    state: list[tuple[Callable[[], Tensor], Tensor]] = [(partial(_same, each), each.detach().clone()) for each in parameters]
    for module in modules:
        for name, buffer in module.named_buffers():
            state.append((partial(module.get_buffer, name), buffer.detach().clone()))
    return state


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def _bound(
    elbo: Any, model: Program, guide: Program, batches: Batches, info: PairInfo, check: SupportCheck | None = None
) -> float:
    with evaluation_mode(model, guide):
        total, seen = 0.0, 0.0
        for number, batch in enumerate(batches, 1):
            if check is not None:
                check(batch, f"batch {number} of the validation data")
            total, seen = total - elbo.loss(model, guide, *batch), seen + info.count(batch)
    return total / seen


def _named(choice: Any, what: str, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if not isinstance(choice, str):
        return choice
    if choice not in known:
        raise ValueError(unknown(what, choice, known))
    return known[choice]


def _schedules(steps: int | None) -> dict[str, Callable[..., Any]]:
    schedulers = torch.optim.lr_scheduler
    return {
        "constant": lambda optimizer: None,
        "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=_known(steps)),
    }


def _known(steps: int | None) -> int:
    if steps is None:
        raise ValueError("A cosine schedule needs data that know their length: choose schedule='constant'.")
    return steps


def _said(record: dict[str, Any]) -> str:
    validation = "" if record["validation"] is None else f", validation {record['validation']:.2f}"
    return f"bound {record['bound']:.2f}{validation} nats/datum"
