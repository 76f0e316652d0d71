"""Training on many processes: each takes its share of every batch, and all take the same steps."""

from __future__ import annotations

import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as distributed
from torch import Tensor

from ..data.batches import Batches, content_hash
from ..data.matching import Batch
from .options import FitOptions
from .state import RunState
from .tensors import random_states, set_random_states

__all__ = ["Ranks", "is_first", "join", "leave", "told"]

# A step waits so long for another rank. Compilers, validation, callbacks and checkpoints may take longer.
LOST_AFTER, PATIENCE = timedelta(seconds=45), timedelta(minutes=30)
# Steps at the start of a run in which compilers work.
STEPS_OF_COMPILERS = 3


def join() -> bool:
    """Initialise ``torch.distributed`` if ``torchrun`` started this process; whether it did.

    Each rank takes the GPU of its number on the machine, if there is one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ or distributed.is_initialized():
        return False
    gpus = torch.cuda.device_count()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    with _lost("at the start", int(os.environ["RANK"])):
        distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    return True


def is_first() -> bool:
    """Whether this process is the one that writes; true if it is the only one."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def told(value: Any) -> Any:
    """What the first process passes; the value itself if there is only one."""
    if not distributed.is_initialized():
        return value
    said = [value]
    with _lost("at the start", distributed.get_rank()):
        distributed.broadcast_object_list(said)
    return said[0]


def leave() -> bool:
    """End the work of several processes, if there are; whether this one has nothing left to do."""
    if not distributed.is_initialized():
        return False
    rank = distributed.get_rank()
    distributed.destroy_process_group()
    return rank > 0


class Ranks:
    """The processes that train together; a single one where ``torch.distributed`` is not initialised.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
    """

    def __init__(self) -> None:
        joined = distributed.is_available() and distributed.is_initialized()
        self.rank, self.size = (distributed.get_rank(), distributed.get_world_size()) if joined else (0, 1)
        self._own_rows, self._rows = 1, 1
        self._patient_steps = STEPS_OF_COMPILERS
        self._groups: list[Any] = []
        if self.size > 1:
            with self._lost("at the start"):
                self._groups = [distributed.new_group(backend="gloo", timeout=time) for time in (LOST_AFTER, PATIENCE)]
                # Gradients travel as the job's own processes do, by NCCL between GPUs.
                self._groups.append(distributed.new_group(timeout=LOST_AFTER))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes, prints and calls callbacks."""
        return self.rank == 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Give back the connections."""
        for group in self._groups:
            distributed.destroy_process_group(group)
        self._groups = []

    def options(self, options: FitOptions) -> FitOptions:
        """The options of this rank: the first one alone writes, shows progress, calls callbacks and reads the clock."""
        if self.first:
            return options
        return replace(options, checkpoint=None, resume=None, progress=False, on_epoch=None, callbacks=(), max_seconds=None)

    def say(self, value: Any) -> Any:
        """What the first rank passes."""
        if self.size == 1:
            return value
        said = [value]
        with self._lost("between two steps"):
            distributed.broadcast_object_list(said, group=self._groups[1])
        return said[0]

    def gather(self, value: Any) -> list[Any]:
        """What each rank passes."""
        found: list[Any] = [value] * self.size
        if self.size > 1:
            with self._lost("between two steps"):
                distributed.all_gather_object(found, value, group=self._groups[1])
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that fails on all ranks if it fails on one.

        Raises:
            ValueError: it failed on another rank; the message has that of the other.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Exception as error:
            self.gather(str(error))
            raise
        for rank, message in enumerate(self.gather(None)):
            if message is not None:
                raise ValueError(f"Rank {rank} failed: {message}")

    def start_alike(self) -> None:
        """Take the random states of the first rank, from which the order of the data is drawn."""
        if self.size > 1:
            cpu = torch.device("cpu")
            set_random_states(self.say(random_states(cpu)), cpu)

    def part_ways(self) -> None:
        """Give each rank random streams of its own; those of the first rank stay as they are."""
        if self.size == 1:
            return
        with torch.random.fork_rng([]):
            seed = int(torch.randint(2**62, ())) + self.rank
        if not self.first:
            torch.manual_seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002  (transforms and data sets draw from it)
            random.seed(seed)

    def compare(self, configuration: Mapping[str, Any], state: RunState, options: FitOptions) -> None:
        """Refuse to train unless all ranks have the same pair, data and options.

        Raises:
            ValueError: they differ, and the message has in what; or the pair's loss is not a sum over data, as under a
                subsampled plate.
        """
        if self.size == 1:
            return
        info = state.setup.first.info
        if info.tied_to_data or info.scale != 1.0 or info.common_scale != 1.0:
            raise ValueError(
                f"A pair that is trained on {self.size} processes must score each datum by itself and once, got one with a "
                f"subsampled or scaled plate, or a parameter for each datum: train it in one process."
            )
        others: dict[str, Any] = {"parameters": content_hash(state.tensors.now().values()), "torch": torch.__version__}
        others |= {name: getattr(options, name) for name in ("epochs", "max_steps", "max_skips", "validate_every")}
        everyone = self.gather({**configuration, **others})
        for rank, found in enumerate(everyone):
            wrong = [
                f"{key}: {everyone[0].get(key)} and {found.get(key)}"
                for key in {**everyone[0], **found}
                if everyone[0].get(key) != found.get(key)
            ]
            if wrong:
                more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
                raise ValueError(
                    f"Ranks 0 and {rank} must train the same model on the same data with the same options, but they differ "
                    f"({'; '.join(wrong[:3])}{more}): pass all data to each rank, and seed torch before the model is made."
                )

    def check_same(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Compare tensors that should be the same on all ranks.

        Raises:
            RuntimeError: it is not.
        """
        if self.size == 1:
            return
        found = self.gather(content_hash(tensors.values()))
        self._patient_steps = max(self._patient_steps, 1)
        if len(set(found)) > 1:
            other = next(rank for rank, each in enumerate(found) if each != found[0])
            raise RuntimeError(
                f"The parameters of ranks 0 and {other} differ {when}: on_epoch and callbacks run on rank 0 alone, and must "
                f"not change the pair; and all ranks need the same kind of processor."
            )

    def shares(self, inputs: Iterable[Batch], of: Batches) -> Iterator[Batch]:
        """This rank's share of each batch, whose order is the same on all ranks.

        A rank for which a batch has no datum takes the first one, and its gradient does not count.

        Args:
            inputs: of ``Batches.load``.
            of: the data. Inputs that are row numbers and all data have only the numbers divided.
        """
        if self.size == 1:
            yield from inputs
            return
        batches, by_rows = iter(inputs), of.source is None and of.shuffle
        # The order is drawn as the first batch is asked for.
        own, shared = random_states(torch.device("cpu")), self.say(random_states(torch.device("cpu")))
        if not self.first:
            set_random_states(shared, torch.device("cpu"))
        found = next(batches, None)
        if not self.first:
            set_random_states(own, torch.device("cpu"))
        while found is not None:
            self._rows = len(found[0])
            start, stop = (self._rows * rank // self.size for rank in (self.rank, self.rank + 1))
            self._own_rows = stop - start
            stop = max(stop, start + 1)
            divided = 1 if by_rows else len(found)
            yield (*(each[start:stop] for each in found[:divided]), *found[divided:])
            found = next(batches, None)

    @property
    def idle(self) -> bool:
        """Whether this rank's share of the batch is empty."""
        return self._own_rows == 0

    def count(self, own: float) -> float:
        """The number of data in the whole batch, where ``own`` are those of the share."""
        return own if self.size == 1 else float(self._rows)

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sums over ranks, the same to the bit on all."""
        return tuple(math.fsum(each) for each in zip(*self.gather(values), strict=True))

    def combine(self, state: RunState) -> Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]:
        """A function that makes the loss and the gradients of this rank's share those of the whole batch.

        Results are the same to the bit on all ranks. Buffers of the pair, such as the statistics of batch normalisation, become
        those of the first rank.
        """
        trained = {id(parameter) for parameter in state.setup.first.parameters}

        def combined(loss: Tensor, gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            others = [each for each in state.tensors.now().values() if id(each) not in trained]
            return self._average(loss, gradients, [each for each in others if each.is_floating_point()])

        return combined

    def _average(self, loss: Tensor, gradients: list[Tensor], kept: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        weight, size = self._own_rows / self._rows, sum(each.numel() for each in gradients)
        flat = torch.cat([loss.detach().reshape(1), *(each.reshape(-1) for each in (*gradients, *kept))])
        if weight == 0:
            flat[: size + 1] = 0
        flat[1 : size + 1] *= weight
        if not self.first:
            flat[size + 1 :] = 0
        if self._patient_steps:
            self._patient_steps -= 1
            self.say(None)
        with self._lost("in a step"):
            distributed.all_reduce(flat, group=self._groups[2])
        parts = iter(flat[1:].split([each.numel() for each in (*gradients, *kept)]))
        averaged = [torch.empty_like(each).copy_(next(parts).view(each.shape)) for each in gradients]
        with torch.no_grad():
            for buffer in kept:
                buffer.copy_(next(parts).view(buffer.shape))
        return flat[0], averaged

    def agree(self, over: bool, signal: int, due: bool) -> tuple[bool, int, bool]:
        """Whether any rank is to stop after this step, has received a signal, or is to write a checkpoint."""
        if self.size == 1:
            return over, signal, due
        flags = torch.tensor([int(over), signal, int(due)])
        with self._lost("after a step"):
            distributed.all_reduce(flags, distributed.ReduceOp.MAX, group=self._groups[0])
        over, signal, due = flags.tolist()
        return bool(over), signal, bool(due)

    def _lost(self, when: str) -> Any:
        return _lost(when, self.rank)


@contextmanager
def _lost(when: str, rank: int) -> Iterator[None]:
    """What torch.distributed raises, as one sentence."""
    try:
        yield
    except RuntimeError as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        reason = re.sub(r"^(\[\S*\] *)+", "", line.strip()).partition(". ")[0].rstrip(".")  # without places in gloo's source
        raise ConnectionError(
            f"Rank {rank} lost another rank {when} ({reason}): that rank's message says why; start the job again, and go "
            f"on from its checkpoint with resume."
        ) from error
