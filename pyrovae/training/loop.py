"""Training: one readable loop over any pair of Pyro programs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import pyro
import torch
from torch import Tensor, nn

from ..compile.cuda import products_in
from ..data.batches import Batches
from ..data.matching import Batch
from ..programs.inspect import PairInfo
from ..programs.reachable import changed, outermost_modules, python_state
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.tracing import evaluation_mode, same_random_stream
from .history import History
from .options import FitOptions
from .progress import Progress
from .setup import Setup, set_up
from .values import SupportCheck, cause_in_data

__all__ = ["fit"]

# Steps queued on a GPU before it is synchronised. The progress bar and max_seconds may run ahead of it by as many.
SYNC_EVERY = 100
# Steps between two comparisons of a captured step with its program, which happen at the start of an epoch. One costs as much as
# 10 to 20 steps, or 50 on a GPU, so that all of a run cost less than 3 % of it.
STEPS_BETWEEN_CHECKS, STEPS_BETWEEN_CHECKS_ON_GPU = 500, 2000


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
            to rounding. On a GPU whole steps become CUDA graphs, with the kernel of Adam and AdamW in them.
            A pair that cannot be captured trains as it is, and a warning says why: one that reads values
            of tensors into Python, or keeps a count there. The graph is compared with the pair in the second step, after an
            ``on_epoch`` that changed an object which the pair can reach, and at the start of an epoch once 500 steps (on a GPU
            2,000) have been taken since; where they differ, training goes on without the graph and a warning says since when.
        precision: of matrix products and convolutions. ``"float32"`` is that on a GPU too, whatever torch's settings are;
            ``"tf32"`` takes an NVIDIA GPU's faster units, which round factors to 10 bits, and is refused on a CPU.
            ``"bfloat16"`` rounds factors to 7 bits, and compiles; parameters, sums and log-weights stay in float32. It is
            for processors with units for it; docs/performance.md has what it does to the numbers.
        transform: applied to the first tensor of each training batch, such as :func:`pyrovae.data.binarize`.
        progress: show a bar with the bound in nats per datum.
        seed: seeds torch's random stream, for the order, the draws and the transform. A run is repeated to the last bit by the
            same seed on the same machine with as many threads: the order of sums depends on these, and training amplifies it.
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
    options = FitOptions(
        estimator=estimator,
        epochs=epochs,
        batch_size=batch_size,
        shuffle=shuffle,
        lr=lr,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=clip_norm,
        validation=validation,
        patience=patience,
        max_seconds=max_seconds,
        compile=compile,
        precision=precision,
        transform=transform,
        progress=progress,
        seed=seed,
        on_epoch=on_epoch,
    ).checked()
    return _Loop(set_up(model, guide, data, options), options).run()


class _Loop:
    """The loop of one run: epochs of steps, and the state that they share.

    Args:
        setup: the pair, its data and its step.
        options: how long to train, and what to do after an epoch.
    """

    def __init__(self, setup: Setup, options: FitOptions):
        self.setup, self.options = setup, options
        estimator = setup.estimator
        self.history = History(type(estimator).__name__, estimator.num_particles, precision=options.precision)
        self.num_steps, self.compared_at = 0, 0
        self.warned_of_infinite_loss = False
        self.checks_held_out = not setup.checked_held_out
        self.best = _Best(setup.first.parameters, outermost_modules(setup.model, setup.guide).values())
        self.began = time.perf_counter()

    def run(self) -> History:
        """Train; the history of the run."""
        setup, options = self.setup, self.options
        # The data have been checked, so the validation that Pyro would repeat at each step is off; NaN is still caught.
        with (
            pyro.validation_enabled(False),
            products_in(options.precision, setup.first.device),
            Progress(setup.total_steps, options.epochs, enabled=options.progress) as progress,
        ):
            for epoch in range(1, options.epochs + 1):
                record = self._record(epoch, self._train(epoch, progress))
                self.history.records.append(record)
                progress.epoch(record)
                self._call_on_epoch(record)
                if options.patience is not None and not self.best.update(record, options.patience):
                    self.history.stopped = f"no better validation bound for {options.patience} epochs"
                    break
                if self._out_of_time():
                    self.history.stopped = f"{options.max_seconds} seconds are over"
                    break
        self.best.restore()
        return self.history

    def _train(self, epoch: int, progress: Progress) -> float:
        """Take the steps of an epoch; their mean bound, in nats per datum."""
        setup, step = self.setup, self.setup.step
        # Supports are checked in each batch of a loader, which may change its data, but by runs of the pair once.
        checks = not setup.checked_train and (epoch == 1 or (setup.check.direct and setup.train.changes))
        if self.num_steps - self.compared_at >= (STEPS_BETWEEN_CHECKS_ON_GPU if step.asynchronous else STEPS_BETWEEN_CHECKS):
            step.recheck(f"at the start of epoch {epoch}")
            self.compared_at = self.num_steps
        total, num_data = 0.0, 0.0
        inputs: Batch
        for number, inputs in enumerate(setup.train.inputs() if setup.loads else setup.train, 1):
            if checks:
                setup.check(self._batch(inputs), f"batch {number} of epoch {epoch}")
            step.step_async(*inputs)
            if setup.scheduler is not None:
                setup.scheduler.step()
            self.num_steps += 1
            num_data += setup.first.info.count(inputs)
            progress.step()
            if not step.asynchronous or self.num_steps % SYNC_EVERY == 0:
                total += self._read_bounds(epoch, inputs)
            if self._out_of_time():
                break
        total += self._read_bounds(epoch, inputs)
        return total / num_data

    def _read_bounds(self, epoch: int, inputs: Batch) -> float:
        """The bounds of the steps since the last call, summed.

        Raises:
            FloatingPointError: a loss was NaN, or a gradient NaN or infinite.
        """
        outcomes = self.setup.step.drain()
        for number, (loss, norm) in enumerate(outcomes, self.num_steps - len(outcomes) + 1):
            # An infinite loss is a datum of weight zero, whose gradient our estimators leave out.
            if math.isnan(loss) or not math.isfinite(norm):
                what, value = ("loss", loss) if math.isnan(loss) else ("gradient", norm)
                clip = "set clip_norm" if self.options.clip_norm is None else "clip_norm"
                cure = self._cause(inputs) or f"lower the learning rate ({self.options.lr:g}), or {clip}."
                raise FloatingPointError(f"The {what} became {value} in epoch {epoch}, step {number}: {cure}")
            if math.isinf(loss) and not self.warned_of_infinite_loss:
                self.warned_of_infinite_loss = True
                cause = self._cause(inputs)
                if cause is not None:
                    warnings.warn(f"The loss is infinite in epoch {epoch}, step {number}: {cause}", stacklevel=6)
        return -sum(loss for loss, _ in outcomes)

    def _cause(self, inputs: Batch) -> str | None:
        return cause_in_data(self.setup.model, self.setup.guide, self._batch(inputs))

    def _batch(self, inputs: Batch) -> Batch:
        """The batch that a step makes of its inputs; the random stream does not notice."""
        with same_random_stream(inputs):
            return self.setup.train.load(*inputs) if self.setup.loads else inputs

    def _record(self, epoch: int, bound: float) -> dict[str, Any]:
        setup = self.setup
        validation = None
        if setup.held_out is not None:
            check = setup.check if self.checks_held_out else None
            validation = _bound(setup.estimator, setup.model, setup.guide, setup.held_out, setup.first.info, check)
        # By runs of the pair, the validation data are checked once.
        self.checks_held_out = self.checks_held_out and setup.check.direct
        return {
            "epoch": epoch,
            "step": self.num_steps,
            "bound": bound,
            "validation": validation,
            "lr": setup.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - self.began,
        }

    def _call_on_epoch(self, record: dict[str, Any]) -> None:
        if self.options.on_epoch is None:
            return
        setup, captured = self.setup, self.setup.step.captured
        programs = (setup.model, setup.guide, setup.estimator)
        before = python_state(*programs) if captured else {}
        self.options.on_epoch(record)
        if captured and changed(before, python_state(*programs)):
            setup.step.recheck(f"after on_epoch of epoch {record['epoch']}")

    def _out_of_time(self) -> bool:
        return self.options.max_seconds is not None and time.perf_counter() - self.began > self.options.max_seconds


class _Best:
    """The parameters and buffers of the epoch with the best validation bound.

    Args:
        parameters: what the optimizer moves.
        modules: those whose buffers training moves.
    """

    def __init__(self, parameters: list[Tensor], modules: Iterable[nn.Module]):
        self.parameters, self.modules = parameters, list(modules)
        self.bound, self.epoch = -math.inf, 0
        self.state: list[tuple[Callable[[], Tensor], Tensor]] = []

    def update(self, record: dict[str, Any], patience: int) -> bool:
        """Take an epoch into account; whether training goes on."""
        if record["validation"] > self.bound:
            self.bound, self.epoch = record["validation"], record["epoch"]
            self._save()
            return True
        return record["epoch"] - self.epoch < patience

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the best state, if there is one."""
        for live, value in self.state:
            live().copy_(value)

    def _save(self) -> None:
        # Each as what gives the live tensor and its value now, since a buffer may be another tensor by then.
        self.state = [(partial(_itself, each), each.detach().clone()) for each in self.parameters]
        for module in self.modules:
            for name, buffer in module.named_buffers():
                self.state.append((partial(module.get_buffer, name), buffer.detach().clone()))


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@torch.no_grad()
def _bound(
    estimator: Any, model: Program, guide: Program, batches: Batches, info: PairInfo, check: SupportCheck | None = None
) -> float:
    """The mean bound of data, in nats per datum."""
    with evaluation_mode(model, guide):
        total, num_data = 0.0, 0.0
        for number, batch in enumerate(batches, 1):
            if check is not None:
                check(batch, f"batch {number} of the validation data")
            total, num_data = total - estimator.loss(model, guide, *batch), num_data + info.count(batch)
    return total / num_data
