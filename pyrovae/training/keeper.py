"""When a run writes a checkpoint, and how one is taken up again."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch

from ..compile.again import graphs_of
from .checkpoint import Checkpoint, CheckpointFolder, load_checkpoint, unpack
from .configuration import configuration, differences, machine
from .options import FitOptions
from .processes import Ranks
from .setup import Setup
from .state import RunState
from .tensors import random_states, set_random_states

__all__ = ["Keeper"]

# every="auto" writes at the end of an epoch if that has taken less than this part of the time so far, and within an epoch
# after so many seconds without a checkpoint.
PART_OF_TIME, MOST_SECONDS = 0.01, 600.0


class Keeper:
    """Writes the checkpoints of a run, and takes one up; without a folder it does neither.

    Args:
        options: of the run.
        ranks: the processes that train it, of which the first one writes.

    Attributes:
        keeps: whether checkpoints are written, by this process or by the first.
        failed: whether the last checkpoint could not be written.

    Raises:
        FileNotFoundError: there is no checkpoint to resume from.
        OSError: the folder cannot be written.
        ValueError: the folder is in use, or holds a checkpoint that is not to be resumed; or a checkpoint is damaged.
    """

    def __init__(self, options: FitOptions, ranks: Ranks):
        self.options, self.every, self.ranks = ranks.options(options), options.every, ranks
        self.folder: CheckpointFolder | None = None
        with ranks.together():
            self.folder = None if self.options.checkpoint is None else CheckpointFolder(self.options.checkpoint)
            try:
                self.found = self._found()
            except BaseException:
                self.close()
                raise
        self.keeps = bool(ranks.say(self.folder is not None))
        path = ranks.say(None if self.found is None else str(self.found.path))
        with ranks.together():
            if self.found is None and path is not None:
                self.found = load_checkpoint(path)
        ranks.start_alike()
        if self.found is not None and options.compile == "auto":
            # The choice depends on the number of steps of the whole run, not of what is left of it.
            self.options = replace(options, compile=self.found.notes["compile"])
        self.failed = False
        self._configuration: dict[str, Any] = {}
        self._written: tuple[int, int, str | None] | None = None
        self._best_written: int | None = None
        self._spent, self._began, self._last = 0.0, time.perf_counter(), time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other runs use the folder."""
        if self.folder is not None:
            self.folder.close()

    @property
    def path(self) -> Path | None:
        """The last checkpoint."""
        return None if self.folder is None else self.folder.last

    def start(self) -> dict[str, Any]:
        """The random states with which the setup begins: as they are, or as they were where the resumed run began."""
        here = torch.device("cpu")
        if self.found is None:
            return random_states(here) if self.folder is not None else {}
        states = unpack(self.found.notes["kept"]["start"], self.found.state)
        set_random_states(states, here)
        return states

    def begin(self, setup: Setup, start: dict[str, Any]) -> RunState:
        """The state of a new run, or of the one that is resumed.

        Raises:
            ValueError: the checkpoint is one of another configuration; the message has the keys that differ.
        """
        state = RunState(setup, self.options.precision, start)
        ranks = self.ranks
        if self.keeps or self.found is not None or ranks.size > 1:
            self._configuration = configuration(setup, self.options, state.tensors) | {"processes": ranks.size}
        ranks.compare(self._configuration, state, self.options)
        ranks.part_ways()
        # Before graphs are captured again: a step whose gradients are combined clips them afterwards, outside of its graph.
        setup.step.combine = ranks.combine(state) if ranks.size > 1 else None
        if self.found is not None:
            self._check(self.found)
            state.restore(self.found, ranks.rank)
        self._began = self._last = time.perf_counter()
        return state

    def due(self, state: RunState, *, epoch_over: bool = False) -> bool:
        """Whether a checkpoint is to be written after this step, or at the end of this epoch."""
        if self.folder is None:
            return False
        if self.every == "epoch":
            return epoch_over
        if self.every != "auto":
            return not epoch_over and state.position.step % int(self.every) == 0
        now = time.perf_counter()
        return self._spent <= PART_OF_TIME * (now - self._began) if epoch_over else now - self._last > MOST_SECONDS

    def write(self, state: RunState, random: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of the state between two steps, unless it is on disk already.

        Args:
            state: of the run.
            random: the random states to go on with, by default the present ones.

        Raises:
            OSError: the disk is full, say; the checkpoint before is whole.
        """
        at, began = state.position, time.perf_counter()
        what = (at.epoch, at.batch, at.ended)
        if not self.keeps or self._written == what:
            return
        random = random_states(state.device) if random is None else random
        own, *others = self.ranks.gather({"random": random, "graphs": graphs_of(state.setup.step)})
        with self.ranks.together():
            if self.folder is not None:
                self._write(self.folder, state, own, others)
        self._written = what
        self._last = time.perf_counter()
        self._spent += self._last - began

    def _write(self, folder: CheckpointFolder, state: RunState, own: Mapping[str, Any], others: list[Any]) -> None:
        run, arrays = state.gather(own["random"], others)
        same = None
        if not state.best.values:
            del arrays["best"]
        elif self._best_written == state.best.epoch:
            del arrays["best"]
            same = "best"
        compiles = self.options.compiles(state.setup.total_steps)
        run |= {"configuration": self._configuration, "machine": machine(), "compile": compiles}
        self.failed = True
        folder.write(state.position.step, state.history, run, arrays, same)
        self.failed = False
        self._best_written = state.best.epoch

    def _found(self) -> Checkpoint | None:
        """The checkpoint that is resumed."""
        resume, last = self.options.resume, self.path
        if resume is not None and resume != "auto":
            found = load_checkpoint(resume)
            if last is not None and last.resolve() != found.path.resolve():
                raise ValueError(f"{last} is another checkpoint than {found.path}, and would be lost: choose another folder.")
            return found
        if last is None:
            return None
        if resume is None:
            raise ValueError(f"{last} is a checkpoint already: pass resume='auto' to go on from it, or choose another folder.")
        return load_checkpoint(last)

    def _check(self, found: Checkpoint) -> None:
        wrong = differences(found.notes["configuration"], self._configuration)
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError(
                f"{found.path} is a checkpoint of another run ({'; '.join(wrong[:4])}{more}): restore these, or choose another "
                f"folder."
            )
        changed = differences(found.notes["machine"], machine())
        if changed:
            warnings.warn(
                f"The run goes on from its checkpoint, but not to the same bit, since {', '.join(changed)}.", stacklevel=5
            )
