"""The state of a training run between two steps, as it goes into a checkpoint and comes out of one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compile.again import capture_again, graphs_of, record_again
from ..data.matching import Batch
from .checkpoint import Checkpoint, pack, unpack
from .history import History
from .setup import Setup
from .tensors import Best, PairTensors, generators_of, random_states, set_random_states

__all__ = ["Position", "RunState"]


@dataclass
class Position:
    """Where a run is.

    Attributes:
        epoch: the epoch that is under way, from 1 on.
        batch: the batches of it that have been taken.
        step: steps taken in all, with those that were skipped.
        compared_at: the step of the last comparison of a captured step with its program.
        total: the sum of the bounds of this epoch's steps, in nats.
        num_data: the number of data that it stands for.
        skipped: steps skipped in all, since their loss or gradient was not finite.
        in_a_row: those since the last step that was not skipped.
        warned_of_infinite_loss: whether a warning of an infinite loss has been given.
        checks_held_out: whether the next validation checks the supports of its data.
        ended: why training ended, or ``None``.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    compared_at: int = 0
    total: float = 0.0
    num_data: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    warned_of_infinite_loss: bool = False
    checks_held_out: bool = False
    ended: str | None = None

    def begin_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch."""
        self.epoch, self.batch, self.total, self.num_data = epoch, 0, 0.0, 0.0


class RunState:
    """Everything that a run changes.

    Args:
        setup: the pair, its data and its step.
        precision: of products, for the history.
        start: the random states before the setup.

    Attributes:
        position: where the run is.
        history: the records so far.
        tensors: the pair's.
        best: the tensors of the best validation bound.
        epoch_random: the random states at the start of the epoch.
        random: the random states to go on with, after a checkpoint was read.
    """

    def __init__(self, setup: Setup, precision: str, start: dict[str, Any]):
        self.setup, self.start = setup, start
        self.device = setup.first.device
        self.position = Position(checks_held_out=not setup.checked_held_out)
        self.history = History(type(setup.estimator).__name__, setup.estimator.num_particles, precision=precision)
        self.tensors = PairTensors(setup.model, setup.guide, setup.first.parameters)
        self.best = Best()
        self.generators = generators_of(setup.train.loader)
        self.epoch_random: dict[str, Any] = {}
        self.epoch_generators: list[Tensor] = []
        self.random: dict[str, Any] | None = None
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds of training, with those before an interruption."""
        return time.perf_counter() - self._began

    def start_clock(self) -> None:
        """Count seconds from now on, unless a checkpoint has set the clock."""
        if self.random is None:
            self._began = time.perf_counter()

    def inputs(self) -> Any:
        """The batches of the epoch that are still to come, as the inputs of ``Batches.load``."""
        at = self.position
        if self.random is None:
            if at.batch == 0:
                self.epoch_random = random_states(self.device)
                self.epoch_generators = [each.get_state() for each in self.generators]
            return iter(self.setup.train.inputs())
        set_random_states(self.epoch_random if at.batch else self.random, self.device)
        for generator, state in zip(self.generators, self.epoch_generators, strict=True):
            generator.set_state(state)
        if at.batch == 0:
            self.epoch_random = self.random
            batches = iter(self.setup.train.inputs())
        else:  # the order of the epoch is drawn again, and the batches before are passed over
            batches = iter(self.setup.train.inputs())
            for _ in range(at.batch):
                next(batches)
            set_random_states(self.random, self.device)
        self.random = None
        return batches

    def gather(self, random: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
        """What JSON can hold, and the tensors of each file.

        Args:
            random: the random states to go on with.
        """
        setup, arrays = self.setup, dict[str, Tensor]()
        at_start = self.position.batch == 0
        kept = {
            "start": self.start,
            "random": random,
            "epoch_random": {} if at_start else self.epoch_random,
            "generators": [each.get_state() for each in self.generators] if at_start else self.epoch_generators,
            "optimizer": setup.optimizer.state_dict(),
            "scheduler": None if setup.scheduler is None else setup.scheduler.state_dict(),
            "estimator": _plain_attributes(setup.estimator),
            "store": self.tensors.others(),
            "average": None if setup.step.average is None else [setup.step.average.count.item(), setup.step.average.values],
        }
        run = {
            "position": dict(vars(self.position)),
            "seconds": self.seconds,
            "graphs": graphs_of(setup.step),
            "best": [self.best.bound, self.best.epoch],
            "kept": {name: pack(value, arrays, name) for name, value in kept.items()},
        }
        return run, {"weights": self.tensors.now(), "best": self.best.values, "state": arrays}

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go to the state of a checkpoint of the same configuration."""
        setup, run = self.setup, checkpoint.notes
        kept = {name: unpack(value, checkpoint.state) for name, value in run["kept"].items()}
        example = self._example()
        capture_again(setup.step, run["graphs"], example)
        self.tensors.load(checkpoint.weights)
        self.tensors.load_others(kept["store"])
        setup.optimizer.load_state_dict(kept["optimizer"])
        _lay_out_as_parameters(setup.optimizer)
        if setup.scheduler is not None:
            setup.scheduler.load_state_dict(kept["scheduler"])
        for name, value in kept["estimator"].items():
            setattr(setup.estimator, name, value)
        if setup.step.average is not None:
            setup.step.average.load(*kept["average"])
        record_again(setup.step, run["graphs"], example)
        self.best.bound, self.best.epoch = run["best"]
        self.best.values = checkpoint.best
        self.position = Position(**run["position"])
        if self.position.epoch > 1:
            setup.train.forget_peeked()
        self.history = checkpoint.history
        self.start, self.random = kept["start"], kept["random"]
        self.epoch_random, self.epoch_generators = kept["epoch_random"], kept["generators"]
        self._began = time.perf_counter() - run["seconds"]

    def _example(self) -> Batch:
        """Inputs of a step."""
        train = self.setup.train
        if not self.setup.loads:
            return train.peek()
        rows = torch.arange(min(train.batch_size, len(train.arrays[0])), device=train.arrays[0].device)
        return (rows, *train.arrays)


def _plain_attributes(estimator: Any) -> dict[str, Any]:
    """The numbers and tensors of an estimator, such as the step of its warm-up."""
    kinds = (bool, int, float, str, Tensor)
    return {name: value for name, value in vars(estimator).items() if isinstance(value, kinds)}


@torch.no_grad()
def _lay_out_as_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's tensors the strides of their parameters, which a file does not keep."""
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
