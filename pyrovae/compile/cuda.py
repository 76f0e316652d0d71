"""CUDA: whole training steps as graphs of kernels, and the precision of products on a GPU.

A small step runs some fifty kernels of a few microseconds each, and launching one takes the host longer than that. A CUDA graph
records whole steps, from the rows of a batch to the optimizer's kernel, and one call replays them. Values that differ between
steps are copied into fixed tensors before each launch, and losses stay on the device until they are read. torch registers its
generator with every graph, so that replays draw the numbers that single steps would draw. Pyro's handlers copy scalars from the
host, which a CUDA graph refuses: what is recorded here is a captured function (:mod:`pyrovae.compile.graph`), whose scalars are
on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "STEPS_AT_ONCE",
    "GraphedSteps",
    "NotCaptured",
    "as_before",
    "check_precision",
    "free_memory",
    "products_in",
    "record",
]

Tensors = tuple[Tensor, ...]
Run = Callable[[], object]
Waiting = tuple[Tensors, float, float | None]  # a step's inputs, learning rate and beta
# More steps in one launch gain nothing, and steps left over at the end of an epoch are launched one by one.
STEPS_AT_ONCE = 10
# Largest relative difference between a replay and the step that it recorded, of losses and of updates: atomic additions sum in
# any order, and Adam turns gradients that are only rounding into steps of full size.
CLOSE_LOSSES, CLOSE_CHANGES = 1e-3, 0.1


class NotCaptured(RuntimeError):  # noqa: N818
    """A step cannot be a CUDA graph; the message says why."""


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse TF32 without an NVIDIA GPU."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError('precision="tf32" must run on an NVIDIA GPU, got a pair on the CPU: move it, or leave this out.')


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """A context in which a GPU multiplies and convolves float32 in TF32 for ``"tf32"``, else in float32."""
    if device.type != "cuda":
        yield
        return

    def allow(products: str, convolutions: bool) -> None:
        with warnings.catch_warnings():  # torch announces a newer setting, which its compiler did not read at first
            warnings.simplefilter("ignore")
            if torch.get_float32_matmul_precision() != products:
                torch.set_float32_matmul_precision(products)
            torch.backends.cudnn.allow_tf32 = convolutions

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    allow("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        yield
    finally:
        allow(*before)


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, including those that torch has reserved and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def record(run: Run) -> Run:
    """A CUDA graph of what ``run`` launches, as a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


class _Slot(NamedTuple):
    """The tensors of one step in a launch: what it reads, filled before the launch, and loss and norm, which it writes."""

    moving: Tensors
    rate: Tensor
    beta: Tensor
    outcome: Tensor


class GraphedSteps:
    """Training steps of one shape as CUDA graphs, several of them in one launch.

    Recording runs the step that is about to be taken, compares the graphs with it, and restores everything. The first call of
    ``compute`` may capture, and the second compile.

    Args:
        compute: takes a step's inputs, beta if there is one, and a tensor (2,) to which it writes loss and norm.
        update: takes the optimizer's step, from what ``compute`` returned and a learning rate that is a tensor. ``None`` if the
            host takes it after each launch of a single step, from :attr:`gradients`.
        inputs: the inputs of the step that is about to be taken.
        moving: number of inputs, from the first on, that are new tensors at each step; the others are read in place.
        rate: the learning rate of that step.
        beta: the beta of that step, or ``None``.
        touched: all tensors that a step changes.
        at_once: number of steps in one launch.
        recorder: makes a graph of a function; tests without a GPU pass another one.

    Raises:
        NotCaptured: the GPU refuses the capture, or a replay differs from the step.
    """

    def __init__(
        self,
        compute: Callable[..., Tensors],
        update: Callable[[Tensors, Tensor], None] | None,
        inputs: Tensors,
        moving: int,
        rate: float,
        beta: float | None,
        touched: Sequence[Tensor],
        at_once: int = STEPS_AT_ONCE,
        recorder: Callable[[Run], Run] = record,
    ):
        self.compute, self.update, self.moving, self.kept = compute, update, moving, inputs[moving:]
        self.annealed, self.device = beta is not None, touched[0].device
        self.gradients: Tensors = ()
        # Compiled kernels require inputs at multiples of 16 bytes: two float64 numbers for each step.
        self._betas = torch.zeros(at_once, 2, dtype=torch.float64, device=self.device)
        self._outcomes = torch.zeros(at_once, 2, dtype=torch.float64, device=self.device)
        self._rates = torch.zeros(at_once, dtype=torch.float32, device=self.device)  # as the optimizer's kernel reads it
        self._filled: dict[int, list[Any]] = {}
        self._slots = []
        for place in range(at_once):
            places = tuple([torch.empty_like(each, memory_format=torch.contiguous_format) for each in inputs[:moving]])
            self._slots.append(_Slot(places, self._rates[place], self._betas[place, 0], self._outcomes[place]))
        self._waiting: list[Waiting] = []
        self._fill([(inputs[:moving], rate, beta)] * at_once)
        self._one, self._several = self._recorded(recorder, touched)

    def step_async(self, inputs: Tensors, rate: float, beta: float | None) -> list[Tensor]:
        """Take a step, now or with later ones; returns loss and norm, (n, 2), of the steps launched now, if any."""
        self._waiting.append((inputs[: self.moving], rate, beta))
        return [self._launch(len(self._slots))] if len(self._waiting) == len(self._slots) else []

    def flush(self) -> list[Tensor]:
        """Launch the waiting steps; returns loss and norm of each."""
        return [self._launch(1) for _ in range(len(self._waiting))]

    def _launch(self, number: int) -> Tensor:
        self._fill(self._waiting[:number])
        del self._waiting[:number]
        (self._one if number == 1 else self._several)()
        return self._outcomes[:number].clone()

    def _fill(self, steps: list[Waiting]) -> None:
        """Copy the inputs of steps into the tensors that the graph reads."""
        places = [tensor for slot in self._slots[: len(steps)] for tensor in slot.moving]
        if places:
            torch._foreach_copy_(places, [tensor for inputs, _, _ in steps for tensor in inputs])
        self._keep(self._rates, [rate for _, rate, _ in steps])
        if self.annealed:
            self._keep(self._betas, [(beta or 0.0, 0.0) for _, _, beta in steps])

    def _keep(self, place: Tensor, values: list[Any]) -> None:
        current = self._filled.setdefault(id(place), [])
        if current[: len(values)] != values:
            current[: len(values)] = values
            # Memory that is not pinned is staged at once, so that the copy need not wait and the tensor may go.
            place[: len(values)].copy_(torch.tensor(values, dtype=place.dtype), non_blocking=True)

    def _steps(self, number: int) -> None:
        for slot in self._slots[:number]:
            beta = (slot.beta,) if self.annealed else ()
            self.gradients = self.compute(*slot.moving, *self.kept, *beta, slot.outcome)
            if self.update is not None:
                self.update(self.gradients, slot.rate)
                self.gradients = ()

    def _recorded(self, recorder: Callable[[Run], Run], touched: Sequence[Tensor]) -> tuple[Run, Run]:
        """Record graphs of one step and of ``at_once`` steps, and compare each with what it recorded."""
        touched = list({id(tensor): tensor for tensor in touched}.values())
        found: list[Run] = []
        try:
            with as_before(touched, self.device) as go_back:
                self._warm_up(partial(self._steps, 1))
                go_back()
                for run in [partial(self._steps, number) for number in sorted({1, len(self._slots)})]:
                    wanted = self._change(run, touched, go_back)
                    found.append(recorder(run))
                    go_back()
                    have = self._change(found[-1], touched, go_back)
                    losses, changes = _difference([have[0]], [wanted[0]]), _difference(have[1], wanted[1])
                    if not (losses <= CLOSE_LOSSES and changes <= CLOSE_CHANGES):
                        why = f"a replay differs from the step: its losses by {losses:.1g}, what it changes by {changes:.1g}"
                        raise NotCaptured(why)
        except NotCaptured:
            raise
        except Exception as error:  # whatever CUDA or one of its libraries raises
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise NotCaptured(f"CUDA refuses to capture it ({line.rstrip('.')[:200]})") from error
        return found[0], found[-1]

    def _warm_up(self, run: Run) -> None:
        """Run three times, the last on a side stream: libraries initialise at their first call, which must not be recorded."""
        run(), run()
        if self.device.type == "cuda":
            side, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                run()
            here.wait_stream(side)

    def _change(self, run: Run, touched: Sequence[Tensor], go_back: Run) -> tuple[Tensor, list[Tensor]]:
        """Loss and norm of a run, and what it adds to the tensors that it changes, which are then restored."""
        before = [tensor.to(torch.float64, copy=True) for tensor in touched]
        self._outcomes.zero_()
        run()
        found = self._outcomes.clone(), [tensor.double() - old for tensor, old in zip(touched, before, strict=True)]
        go_back()
        return found


@contextmanager
def as_before(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Run]:
    """A context that restores tensors and random streams at its end, and whenever the function that it yields is called."""
    values, random = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def go_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    try:
        yield go_back
    finally:
        go_back()


def _difference(have: list[Tensor], want: list[Tensor]) -> float:
    """The relative norm of the difference of two lists of tensors; infinite if not finite in different places."""
    error, size = 0.0, 0.0
    for one, other in zip(have, want, strict=True):
        finite = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), finite):
            return math.inf
        error += float((one - other)[finite].square().sum())
        size += float(other[finite].square().sum())
    return math.sqrt(error / max(size, 1e-300))
