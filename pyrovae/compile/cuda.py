"""CUDA: whole training steps as graphs of kernels, and the precision of products on a GPU.

A small step is some fifty kernels of a few microseconds, and the host takes longer to launch one. A CUDA graph records whole
steps, from the rows of a batch to the optimizer's kernel, and one call replays them. What differs between steps lies in tensors
that are filled before, and losses stay on the device until they are asked for. torch registers its generator with every graph,
so that each replay draws new numbers: those that the steps would draw one by one. Pyro's handlers copy scalars from the host,
which a CUDA graph refuses; the captured function that this module is given (:mod:`pyrovae.compile`) has them on the device.
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

Tensors = tuple[Tensor, ...]
Run = Callable[[], object]
Waiting = tuple[Tensors, float, float | None]  # a step's inputs, learning rate and beta
# More gain nothing, and those left over at the end of an epoch are launched one by one.
STEPS_AT_ONCE = 10
# By how much a replay's losses, and what it changes, may differ from the step that it recorded, relatively: sums by atomic
# additions come in any order, and Adam makes whole steps of gradients that are nothing but rounding.
CLOSE_LOSSES, CLOSE_CHANGES = 1e-3, 0.1


class NotCaptured(RuntimeError):  # noqa: N818
    """Why a step is no CUDA graph."""


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse TF32 where there is none."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError('precision="tf32" must run on an NVIDIA GPU, got a pair on the CPU: move it, or leave this out.')


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Multiply and convolve float32 numbers on a GPU in TF32 for ``"tf32"``, else in float32 whatever torch's settings are."""
    if device.type != "cuda":
        yield
        return

    def allow(products: str, convolutions: bool) -> None:
        with warnings.catch_warnings():  # torch announces a newer way, which its own compiler did not read at first
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
    """Bytes of a GPU that are free, those that torch holds and does not use among them."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def record(run: Run) -> Run:
    """A CUDA graph of what ``run`` launches, as a function that replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


class _Slot(NamedTuple):
    """What one of the steps of a launch reads, which is filled before, and writes: loss and norm."""

    moving: Tensors
    rate: Tensor
    beta: Tensor
    outcome: Tensor


class GraphedSteps:
    """Training steps of one shape as CUDA graphs, several of them in one launch.

    Made at a step that is about to be taken, and compared with it: everything is left as it was. The first call of ``compute``
    may capture and the second compile.

    Args:
        compute: of a step's inputs, beta where there is one, and a tensor (2,) to which it writes loss and norm.
        update: takes the optimizer's step with what that returned, at a learning rate that is a tensor. ``None`` where the host
            has to do so after each launch of a single step; then :attr:`gradients` has it.
        inputs: of the step that is about to be taken.
        moving: how many of the inputs, the first ones, are other tensors at each step; the rest are read where they are.
        rate: its learning rate.
        beta: its beta, or ``None``.
        touched: all tensors that a step changes.
        at_once: how many steps one launch takes.
        recorder: makes a graph of a function; with another one the rest can be tested without a GPU.

    Raises:
        NotCaptured: the GPU refuses the capture, or a replay does something else than the step.
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
        # Compiled kernels want their inputs at multiples of 16 bytes: two numbers of float64 for each step.
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
        """Take a step, now or with those that follow; the outcomes (n, 2) of those that were launched, if any."""
        self._waiting.append((inputs[: self.moving], rate, beta))
        return [self._launch(len(self._slots))] if len(self._waiting) == len(self._slots) else []

    def flush(self) -> list[Tensor]:
        """Launch the steps that wait; their outcomes."""
        return [self._launch(1) for _ in range(len(self._waiting))]

    def _launch(self, number: int) -> Tensor:
        self._fill(self._waiting[:number])
        del self._waiting[:number]
        (self._one if number == 1 else self._several)()
        return self._outcomes[:number].clone()

    def _fill(self, steps: list[Waiting]) -> None:
        """Put what the steps read where the graph reads it."""
        places = [tensor for slot in self._slots[: len(steps)] for tensor in slot.moving]
        if places:
            torch._foreach_copy_(places, [tensor for inputs, _, _ in steps for tensor in inputs])
        self._keep(self._rates, [rate for _, rate, _ in steps])
        if self.annealed:
            self._keep(self._betas, [(beta or 0.0, 0.0) for _, _, beta in steps])

    def _keep(self, place: Tensor, values: list[Any]) -> None:
        held = self._filled.setdefault(id(place), [])
        if held[: len(values)] != values:
            held[: len(values)] = values
            # From memory that is not pinned: it is copied at once to where the device will fetch it, and nothing waits.
            place[: len(values)].copy_(torch.tensor(values, dtype=place.dtype), non_blocking=True)

    def _steps(self, number: int) -> None:
        for slot in self._slots[:number]:
            beta = (slot.beta,) if self.annealed else ()
            self.gradients = self.compute(*slot.moving, *self.kept, *beta, slot.outcome)
            if self.update is not None:
                self.update(self.gradients, slot.rate)
                self.gradients = ()

    def _recorded(self, recorder: Callable[[Run], Run], touched: Sequence[Tensor]) -> tuple[Run, Run]:
        """The graphs of one step and of all, each compared with what it recorded."""
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
        except Exception as error:  # whatever CUDA or a library of its says
            line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise NotCaptured(f"CUDA refuses to capture it ({line.rstrip('.')[:200]})") from error
        return found[0], found[-1]

    def _warm_up(self, run: Run) -> None:
        """Three runs, the last on a side stream: what libraries set up at their first call is no part of a graph."""
        run(), run()
        if self.device.type == "cuda":
            side, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
            side.wait_stream(here)
            with torch.cuda.stream(side):
                run()
            here.wait_stream(side)

    def _change(self, run: Run, touched: Sequence[Tensor], go_back: Run) -> tuple[Tensor, list[Tensor]]:
        """The outcomes of a run and what it adds to the tensors that it touches, which are put back."""
        before = [tensor.to(torch.float64, copy=True) for tensor in touched]
        self._outcomes.zero_()
        run()
        found = self._outcomes.clone(), [tensor.double() - old for tensor, old in zip(touched, before, strict=True)]
        go_back()
        return found


@contextmanager
def as_before(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Run]:
    """Tensors and random numbers go back to what they are now, at the end and whenever the function that is given is called."""
    held, random = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def go_back() -> None:
        with torch.no_grad():
            for tensor, value in zip(tensors, held, strict=True):
                tensor.copy_(value)
        torch.set_rng_state(random)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)

    try:
        yield go_back
    finally:
        go_back()


def _difference(have: list[Tensor], want: list[Tensor]) -> float:
    """The relative norm of the difference of two lists of tensors; what is no number must be so in both."""
    error, size = 0.0, 0.0
    for one, other in zip(have, want, strict=True):
        finite = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), finite):
            return math.inf
        error += float((one - other)[finite].square().sum())
        size += float(other[finite].square().sum())
    return math.sqrt(error / max(size, 1e-300))
