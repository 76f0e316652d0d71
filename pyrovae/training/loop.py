"""Training: one readable loop over any pair of Pyro programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyro
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ..compile.cuda import products_in
from ..programs.reachable import changed, python_state
from ..programs.sites import Program
from ..programs.state import in_own_scope
from .callbacks import Callback, Training
from .history import History
from .interrupts import Interrupted, Signals
from .keeper import Keeper
from .options import FitOptions
from .processes import Ranks
from .progress import Progress
from .schedules import MakeOptimizer, MakeSchedule
from .setup import set_up
from .skips import Skips, Taken, batch_of
from .state import RunState
from .tensors import random_states
from .validation import validate

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
    optimizer: str | Mapping[str, Any] | MakeOptimizer = "adam",
    schedule: str | Mapping[str, Any] | MakeSchedule = "constant",
    clip_norm: float | None = None,
    accumulate: int = 1,
    ema: float | None = None,
    validation: Any = None,
    validation_samples: int | None = None,
    validate_every: int = 1,
    patience: int | None = None,
    max_seconds: float | None = None,
    max_steps: int | None = None,
    max_skips: int = 10,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    transform: Callable[[Tensor], Tensor] | None = None,
    progress: bool = True,
    seed: int | None = None,
    on_epoch: Callable[[dict[str, Any]], None] | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    every: int | Literal["auto", "epoch"] = "auto",
    resume: str | Path | None = None,
) -> History:
    r"""Train a pair of Pyro programs by stochastic gradients of an estimator.

    Parameters are found as Pyro's ``SVI`` finds them: modules registered with ``pyro.module``, ``PyroModule``\ s, bare
    ``pyro.param``\ s, and the module whose bound method a program is. Each step follows the mean objective per datum.

    If ``torch.distributed`` is initialised, pass all data to each process: they divide each batch, and get the same parameters.

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
        optimizer: ``"adam"``, another name, a table ``{"kind": "sgd", "momentum": 0.9}``, or a callable of parameters and
            ``lr``, such as a torch optimizer class.
        schedule: ``"constant"``, ``"cosine"`` (to zero over all steps), ``{"kind": "step", "every": 30}`` (a tenth after each
            30 epochs) or ``"plateau"`` (half after epochs without a better validation bound), with the options of
            ``pyrovae.training.schedules``, such as ``"warm_up": 500`` steps; or a callable that makes a torch scheduler,
            which is stepped after every step, or with the validation bound if it is a ``ReduceLROnPlateau``.
        clip_norm: the largest norm that the gradient of all parameters together may have.
        accumulate: the number of parts of each batch whose gradients are computed one after the other and added, which takes
            less memory; ``batch_size`` is still the number of data per step.
        ema: the decay of a moving average of the parameters, such as 0.999; validation uses the average, and the trained
            parameters are the average.
        validation: a fraction of the data to hold out, or data of their own; scored by the same estimator.
        validation_samples: score the validation data by importance sampling with so many draws, in place of the bound.
        validate_every: epochs between two scores of the validation data.
        patience: stop after this many epochs without a better validation bound, and go back to the best parameters and
            buffers, such as the statistics of batch normalisation.
        max_seconds: stop after the step that crosses this time, counted from the first step.
        max_steps: stop after so many steps.
        max_skips: a step whose loss is NaN, or whose gradient is NaN or infinite, is skipped and counted in
            ``history.skipped``. A warning names the data that caused the first one. So many in a row end the run.
        compile: capture the step as one graph and compile it (:mod:`pyrovae.compile`); ``"auto"`` does so for runs of 3,000
            steps or more, which repay the compiler's seconds. The random numbers are the same either way, and the losses agree
            to rounding. On a GPU whole steps become CUDA graphs, with the kernel of Adam and AdamW in them. A pair that cannot
            be captured trains as it is, and a warning says why: one that reads values of tensors into Python, or keeps a count
            there. The graph is compared with the pair in the second step, after an ``on_epoch`` that changed an object which
            the pair can reach, and at the start of an epoch once 500 steps (on a GPU 2,000) have been taken since; where they
            differ, training goes on without the graph and a warning says since when.
        precision: of matrix products and convolutions. ``"float32"`` is that on a GPU too, whatever torch's settings are;
            ``"tf32"`` takes an NVIDIA GPU's faster units, which round factors to 10 bits, and is refused on a CPU.
            ``"bfloat16"`` rounds factors to 7 bits, and compiles; parameters, sums and log-weights stay in float32. It is
            for processors with units for it; docs/performance.md has what it does to the numbers.
        transform: applied to the first tensor of each training batch, such as :func:`pyrovae.data.binarize`.
        progress: show a bar with the bound in nats per datum.
        seed: seeds torch's random stream, for the order, the draws and the transform. A run is repeated to the last bit by the
            same seed on the same machine with as many threads: the order of sums depends on these, and training amplifies it.
        on_epoch: called with each epoch's record.
        callbacks: objects of :class:`pyrovae.Callback`, which are called at the start, after steps and epochs, and at the end,
            and may end the run.
        checkpoint: a folder where the run is kept: its last state, and the parameters of the best validation bound, as
            safetensors and JSON with checksums (:func:`pyrovae.load_checkpoint`). A run that is killed loses what came after
            the last checkpoint. Ctrl-C and SIGTERM finish the step and write one, and so do errors between steps.
        every: steps between checkpoints, or ``"epoch"``; ``"auto"`` writes them at the ends of epochs as long as that takes
            less than 1 % of the time, and in the middle of an epoch after ten minutes. The last state is always written.
        resume: ``"auto"`` goes on from the checkpoint in the folder if there is one; or the path of a checkpoint. With the
            same pair, data, options and number of threads, the run ends with the bits that it would have had without the
            interruption. State that programs, data sets or callbacks of your own keep in Python is not restored.

    Returns:
        The history of the bound.

    Raises:
        ValueError: bad data or options, or a pair or estimator that do not fit; nothing has been trained then. Batches that
            only show as they pass, of a loader, a transform of your own, or values that the model computes, are refused when
            they come, with their number; the steps before them stand.
        FloatingPointError: the loss was NaN, or a gradient NaN or infinite, in ``max_skips`` steps in a row; the last
            parameters before it are kept.
        KeyboardInterrupt: Ctrl-C; with a checkpoint, SIGTERM too. This and every other exception that ends training has the
            records as its attribute ``history``.
        OSError: a checkpoint cannot be written; the one before is whole. Or another process was lost (``ConnectionError``).

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> history = pv.fit(vae.model, vae.guide, torch.ones(50, 9), epochs=5, lr=0.01, progress=False, seed=0)
        >>> history.bound[-1] > history.bound[0]
        True
    """
    arguments = dict(locals())
    keywords = {name: arguments[name] for name in FitOptions.__dataclass_fields__}
    with Ranks() as ranks, Keeper(FitOptions(**keywords).checked(), ranks) as keeper:
        start = keeper.start()
        with ranks.together():
            setup = set_up(model, guide, data, keeper.options)
        return _Loop(keeper.begin(setup, start), keeper).run()


class _Loop:
    """The loop of one run: epochs of steps.

    Args:
        state: what the run changes.
        keeper: writes its checkpoints.
    """

    def __init__(self, state: RunState, keeper: Keeper):
        self.state, self.setup, self.keeper, self.options = state, state.setup, keeper, keeper.options
        self.at, self.history, self.ranks = state.position, state.history, keeper.ranks
        self.skips = Skips(self.setup, self.options, self.at)
        plain = {name: value for name, value in vars(self.options).items() if isinstance(value, bool | int | float | str)}
        optimizer = self.setup.optimizer
        self.training = Training(self.setup.model, self.setup.guide, optimizer, self.history, plain, step=self.at.step)
        self.on_step = [each for each in self.options.callbacks if type(each).step is not Callback.step]
        self.steps_schedule = self.setup.scheduler is not None and not isinstance(self.setup.scheduler, ReduceLROnPlateau)
        self.signals = Signals(terminate=keeper.keeps)
        self.unread: list[Taken] = []
        self.reads = self.setup.train.source is not None  # batches that are read, rather than gathered in memory
        self.cut = False  # whether a budget ended the run within an epoch
        # Random states from which the run could go on if it ended now; None within a step.
        self.between: dict[str, Any] | None = None

    def run(self) -> History:
        """Train; the history of the run."""
        setup, options, at = self.setup, self.options, self.at
        self.state.start_clock()
        # The data have been checked, so the validation that Pyro would repeat at each step is off; NaN is still caught.
        with (
            pyro.validation_enabled(False),
            products_in(options.precision, setup.first.device),
            Progress(setup.total_steps, options.epochs, enabled=options.progress, done=at.step) as progress,
            self.signals,
        ):
            try:
                for callback in options.callbacks:
                    callback.start(self.training)
                if self._goes_on():
                    at.ended, self.cut = None, at.batch > 0 and self._budget() is not None
                    self._epochs(progress)
                self.history.stopped = at.ended or self.history.stopped
                if not self.cut:
                    self.keeper.write(self.state, self.state.random)
                if self.signals.received is not None:  # after the last step
                    self._interrupt(self.signals.received)
            except BaseException as error:
                self._rescue(error)
                raise
            finally:
                if setup.step.average is not None:
                    setup.step.average.load_into_parameters()
                if options.patience is not None:
                    self.state.tensors.load(self.state.best.values)
                for callback in options.callbacks:
                    callback.end(self.training)
        return self.history

    def _goes_on(self) -> bool:
        """Whether there is anything left to do; a run that ended can be resumed with a larger budget."""
        at, patience = self.at, self.options.patience
        if at.ended is None:
            return True
        impatient = patience is not None and at.epoch - 1 - self.state.best.epoch >= patience
        return at.epoch <= self.options.epochs and not impatient and self._budget() is None

    def _epochs(self, progress: Progress) -> None:
        at, keeper = self.at, self.keeper
        while at.epoch <= self.options.epochs:
            bound = self._train(progress)
            if keeper.keeps:
                self.between = random_states(self.state.device)
            record = self._record(bound)
            self.history.records.append(record)
            progress.epoch(record)
            self._call_on_epoch(record)
            self.ranks.check_same(self.state.tensors.now(), f"after epoch {at.epoch}")
            self.between = None
            at.begin_epoch(at.epoch + 1)
            at.ended = self._reason_to_stop(record)
            if at.ended is not None:
                return
            if self.ranks.say(keeper.due(self.state, epoch_over=True)):
                keeper.write(self.state)
        at.ended = "all epochs done"

    def _train(self, progress: Progress) -> float:
        """Take the steps of an epoch that are still to come; the mean bound of its steps, in nats per datum."""
        state, setup, step, at = self.state, self.setup, self.setup.step, self.at
        # Supports are checked in each batch of a loader, which may change its data, but by runs of the pair once.
        checks = not setup.checked_train and (at.epoch == 1 or (setup.check.direct and setup.train.changes))
        between = STEPS_BETWEEN_CHECKS_ON_GPU if step.asynchronous else STEPS_BETWEEN_CHECKS
        if at.batch == 0 and at.step - at.compared_at >= between:
            step.recheck(f"at the start of epoch {at.epoch}")
            at.compared_at = at.step
        for inputs in () if self.cut else self.ranks.shares(state.inputs(), setup.train):
            self.between = None
            batch = inputs if setup.loads else setup.train.load(*inputs)
            if checks:
                seen = batch_of(setup, inputs) if setup.loads else batch
                setup.check(seen, f"batch {at.batch + 1} of epoch {at.epoch}")
            step.step_async(*batch)
            if self.steps_schedule:
                setup.scheduler.step()
            at.step, at.batch = at.step + 1, at.batch + 1
            self._remember(inputs, batch)
            progress.step()
            if not step.asynchronous or at.step % SYNC_EVERY == 0:
                self._read_bounds()
            if self.on_step:
                self._call_on_step()
            over = self._own_budget() is not None
            over, signal, due = self.ranks.agree(over, self.signals.received or 0, self.keeper.due(state))
            if signal:
                self._interrupt(signal)
            # A run that is resumed with a larger budget goes on within the epoch.
            self.cut = over and at.batch != setup.train.num_batches
            if self.cut or due:
                self._read_bounds()
                self.keeper.write(state)
            if over:
                break
            if self.reads and self.keeper.keeps:  # reading the next batch may fail
                self.between = random_states(state.device)
        self._read_bounds()
        return at.total / at.num_data if at.num_data else math.nan

    def _remember(self, inputs: tuple[Tensor, ...], batch: tuple[Tensor, ...]) -> None:
        """Note a step whose loss is read later, and its inputs unless they are a loader's and no longer needed."""
        if self.unread and self.reads:
            self.unread[-1] = self.unread[-1]._replace(inputs=None)
        self.unread.append(Taken(self.at.step, self.at.batch, self.ranks.count(self.setup.first.info.count(batch)), inputs))

    def _read_bounds(self) -> None:
        """Add the bounds of the steps since the last call.

        Raises:
            FloatingPointError: too many in a row were skipped.
        """
        at, unread = self.at, self.unread
        self.unread = []
        for (loss, norm), step in zip(self.setup.step.drain(), unread, strict=True):
            # An infinite loss is a datum of weight zero, whose gradient our estimators leave out.
            if math.isnan(loss) or not math.isfinite(norm):
                self.between = random_states(self.state.device)
                self.history.skipped = at.skipped + 1
                self.skips.note(loss, norm, step)
                continue
            at.in_a_row, at.total, at.num_data = 0, at.total - loss, at.num_data + step.num_data
            if math.isinf(loss) and not at.warned_of_infinite_loss:
                self.skips.warn_of_infinite_loss(step, unread[-1].inputs if step.inputs is None else step.inputs)

    def _interrupt(self, number: int) -> None:
        """End the run by a signal that came.

        Raises:
            KeyboardInterrupt: always.
        """
        self._read_bounds()
        self.between = random_states(self.state.device)
        path, at = self.options.checkpoint or "the folder of rank 0", self.at
        kept = f"{path} has a checkpoint, from which resume='auto' goes on"
        cure = kept if self.keeper.keeps else "nothing is kept without checkpoint="
        raise Interrupted(f"Training was interrupted after step {at.step}, in epoch {at.epoch}: {cure}.", number, self.history)

    def _rescue(self, error: BaseException) -> None:
        """Write a last checkpoint if the run ended between two steps, and hand over the history."""
        error.history = self.history  # type: ignore[attr-defined]
        # Other ranks may not know of other errors.
        together = self.ranks.size == 1 or isinstance(error, Interrupted | FloatingPointError)
        if not (self.keeper.keeps and together) or self.between is None or self.keeper.failed:
            return
        records, random = self.history.records, self.between
        self.history.records = records[: self.at.epoch - 1]  # the end of an epoch that failed is tried again
        try:
            self._read_bounds()
            self.keeper.write(self.state, random)
        except (OSError, FloatingPointError) as second:
            error.add_note(str(second))
        finally:
            self.history.records = records

    def _record(self, bound: float) -> dict[str, Any]:
        return {
            "epoch": self.at.epoch,
            "step": self.at.step,
            "bound": bound,
            "validation": validate(self.state, self.options, self.ranks),
            "lr": self.setup.optimizer.param_groups[0]["lr"],
            "seconds": self.state.seconds,
        }

    def _call_on_step(self) -> None:
        self.training.step, self.training.epoch = self.at.step, self.at.epoch
        for callback in self.on_step:
            callback.step(self.training)

    def _call_on_epoch(self, record: dict[str, Any]) -> None:
        if self.options.on_epoch is None and not self.options.callbacks:
            return
        self.training.step, self.training.epoch = self.at.step, self.at.epoch
        setup, captured = self.setup, self.setup.step.captured
        programs = (setup.model, setup.guide, setup.estimator)
        before = python_state(*programs) if captured else {}
        if self.options.on_epoch is not None:
            self.options.on_epoch(record)
        for callback in self.options.callbacks:
            callback.epoch(self.training, record)
        if captured and changed(before, python_state(*programs)):
            setup.step.recheck(f"after on_epoch of epoch {record['epoch']}")

    def _reason_to_stop(self, record: dict[str, Any]) -> str | None:
        """Why training ends after an epoch, or ``None``."""
        patience = self.options.patience
        if patience is not None and record["epoch"] - self.state.best.epoch >= patience:
            return f"no better validation bound for {patience} epochs"
        return self._budget()

    def _budget(self) -> str | None:
        """Which budget is used up, or ``None``; the same on all ranks."""
        return self.ranks.say(self._own_budget())

    def _own_budget(self) -> str | None:
        options = self.options
        if options.max_seconds is not None and self.state.seconds > options.max_seconds:
            return f"{options.max_seconds} seconds are over"
        if options.max_steps is not None and self.at.step >= options.max_steps:
            return f"{options.max_steps} steps are done"
        return self.training.stopped
