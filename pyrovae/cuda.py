"""CUDA: whole training steps as graphs of kernels, and the precision of products on a GPU.

A small step is some fifty kernels of a few microseconds, and the host takes longer to launch one. A CUDA graph records the
launches of whole steps: forward and backward pass, norm, NaN guard and the optimizer's kernel; one call replays them all. What
differs from step to step (rows or a batch, the learning rate, an annealed beta) lies in tensors that are filled before the
launch, and losses stay on the device until they are asked for. torch registers its generator with every graph, so that each
replay draws new numbers, the same that the steps would draw if they were run one by one.

Pyro's handlers copy scalars from the host, which a CUDA graph refuses; the captured and compiled function that this module is
given (:mod:`pyrovae.staging`) has them on the device.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Run = Callable[[], object]

# Steps in one launch: more gain nothing, and those left over at the end of an epoch are launched one by one.
STEPS_AT_ONCE = 10
# By how much a replay's losses, and what it changes, may differ from the step that it recorded, relatively: sums by atomic
# additions come in any order, and Adam makes whole steps of gradients that are nothing but rounding.
CLOSE_LOSSES, CLOSE_CHANGES = 1e-3, 0.1


class NotCaptured(RuntimeError):  # noqa: N818
    """Why a step is no CUDA graph."""


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse TF32 where there is none."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            'precision="tf32" must be for a pair on an NVIDIA GPU, got one on the CPU: leave it out, or move the pair there with '
            '.to("cuda").'
        )


@contextmanager
def products_in(precision: str, device: torch.device) -> Iterator[None]:
    """Multiply and convolve float32 numbers on a GPU in TF32 for ``"tf32"``, else in float32 whatever torch's settings are."""
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _allow_tf32("high" if precision == "tf32" else "highest", precision == "tf32")
    try:
        yield
    finally:
        _allow_tf32(*before)


def _allow_tf32(products: str, convolutions: bool) -> None:
    with warnings.catch_warnings():  # torch announces a newer way, which its own compiler did not read at first
        warnings.simplefilter("ignore")
        if torch.get_float32_matmul_precision() != products:
            torch.set_float32_matmul_precision(products)
        if torch.backends.cudnn.allow_tf32 != convolutions:
            torch.backends.cudnn.allow_tf32 = convolutions


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
    """What one of the steps of a launch reads and writes."""

    moving: Tensors  # those inputs that are filled before a launch
    rate: Tensor
    beta: Tensor
    outcome: Tensor  # loss and norm, (2,)


class Waiting(NamedTuple):
    """A step that waits for its launch."""

    inputs: Tensors
    rate: float
    beta: float | None


class GraphedSteps:
    """Training steps of one shape as CUDA graphs, several of them in one launch.

    Made at a step that is about to be taken: everything is left as it was. The first call of ``compute`` may capture and the
    second compile. The graph of one step is replayed and compared with the step run without it.

    Args:
        compute: gradients of a step's inputs, of beta where there is one, and of a tensor (2,) to which it writes loss and
            norm; it may return other tensors before the gradients.
        update: takes the optimizer's step with those, at a learning rate that is a tensor. ``None`` where that has to be done
            from the host after each launch of a single step; then :attr:`gradients` has them.
        inputs: of the step that is about to be taken.
        moving: how many of the inputs, the first ones, are other tensors at each step; the rest are read where they are.
        rate: its learning rate.
        beta: its beta, or ``None``.
        touched: all tensors that a step changes.
        at_once: how many steps one launch takes.
        recorder: what makes a graph of a function; another one lets the rest be tested where there is no GPU.

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
        self._filled: dict[str, list[float]] = {"rates": [], "betas": []}
        self._slots = [
            _Slot(
                tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs[:moving]),
                self._rates[place],
                self._betas[place, 0],
                self._outcomes[place],
            )
            for place in range(at_once)
        ]
        self._waiting: list[Waiting] = []
        self._fill([Waiting(inputs[:moving], rate, beta)] * at_once)
        self._one, self._several = self._recorded(recorder, touched)

    def ahead(self, inputs: Tensors, rate: float, beta: float | None) -> list[Tensor]:
        """Take a step, now or with those that follow; the outcomes (n, 2) of those that were launched, if any."""
        self._waiting.append(Waiting(inputs[: self.moving], rate, beta))
        return [self._launch(len(self._slots))] if len(self._waiting) == len(self._slots) else []

    def flush(self) -> list[Tensor]:
        """Launch the steps that wait; their outcomes."""
        return [self._launch(1) for _ in range(len(self._waiting))]

    def _launch(self, number: int) -> Tensor:
        steps, self._waiting = self._waiting[:number], self._waiting[number:]
        self._fill(steps)
        (self._one if number == 1 else self._several)()
        return self._outcomes[:number].clone()

    def _fill(self, steps: list[Waiting]) -> None:
        """Put what the steps read where the graph reads it."""
        places = [tensor for slot in self._slots[: len(steps)] for tensor in slot.moving]
        if places:
            torch._foreach_copy_(places, [tensor for step in steps for tensor in step.inputs])
        self._keep("rates", self._rates, [step.rate for step in steps])
        if self.annealed:
            betas = [float(step.beta or 0.0) for step in steps]
            self._keep("betas", self._betas, betas)

    def _keep(self, name: str, place: Tensor, values: list[float]) -> None:
        held = self._filled[name]
        if held[: len(values)] == values:
            return
        held[: len(values)] = values
        # From memory that is not pinned: it is copied at once to where the device will fetch it, and nothing waits.
        numbers = torch.tensor(values, dtype=place.dtype)
        numbers = numbers if place.dim() == 1 else torch.stack([numbers, numbers], 1)
        place[: len(values)].copy_(numbers, non_blocking=True)

    def _step(self, slot: _Slot) -> None:
        beta = (slot.beta,) if self.annealed else ()
        outputs = self.compute(*slot.moving, *self.kept, *beta, slot.outcome)
        if self.update is None:
            self.gradients = outputs
        else:
            self.update(outputs, slot.rate)

    def _recorded(self, recorder: Callable[[Run], Run], touched: Sequence[Tensor]) -> tuple[Run, Run]:
        """The graphs of one step and of all, each compared with what it recorded."""

        def steps(number: int) -> Run:
            return lambda: [self._step(slot) for slot in self._slots[:number]]

        touched = list({id(tensor): tensor for tensor in touched}.values())
        found: list[Run] = []
        try:
            with as_before(touched, self.device) as go_back:
                self._warm_up(steps(1))
                for run in [steps(number) for number in sorted({1, len(self._slots)})]:
                    go_back()
                    wanted = self._change(run, touched, go_back)
                    found.append(recorder(run))
                    go_back()
                    self._compare(self._change(found[-1], touched, go_back), wanted)
        except NotCaptured:
            raise
        except RuntimeError as error:  # CUDA's own words
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise NotCaptured(f"CUDA refuses to capture it ({lines[0].rstrip('.')[:200]})") from error
        return found[0], found[-1]

    def _warm_up(self, run: Run) -> None:
        """Three runs, the last on a side stream: what libraries set up at their first call is no part of a graph."""
        run(), run()
        if self.device.type != "cuda":
            run()
            return
        side, here = torch.cuda.Stream(self.device), torch.cuda.current_stream(self.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            run()
        here.wait_stream(side)
        torch.cuda.synchronize(self.device)

    def _change(self, run: Run, touched: Sequence[Tensor], go_back: Run) -> tuple[Tensor, list[Tensor]]:
        """The outcomes of a run and what it adds to the tensors that it touches, which are put back."""
        before = [tensor.double() for tensor in touched]
        self._outcomes.zero_()
        run()
        added = [tensor.double() - old for tensor, old in zip(touched, before, strict=True)]
        outcomes = self._outcomes.clone()
        go_back()
        return outcomes, added

    def _compare(self, have: tuple[Tensor, list[Tensor]], want: tuple[Tensor, list[Tensor]]) -> None:
        losses, changes = _difference([have[0]], [want[0]]), _difference(have[1], want[1])
        if not (losses <= CLOSE_LOSSES and changes <= CLOSE_CHANGES):
            raise NotCaptured(f"a replay differs from the step: its losses by {losses:.1g}, what it changes by {changes:.1g}")


@contextmanager
def as_before(tensors: Sequence[Tensor], device: torch.device) -> Iterator[Run]:
    """Tensors and random numbers go back to what they are now, at the end and whenever the function that is given is called."""
    on_gpu = device.type == "cuda"
    held, random = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if on_gpu else None

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
    """The norm of the difference of two lists of tensors relative to their size; what is no number must be so in both."""
    error, size = 0.0, 0.0
    for one, other in zip(have, want, strict=True):
        finite = torch.isfinite(other)
        if not torch.equal(torch.isfinite(one), finite):
            return math.inf
        error += float((one - other)[finite].square().sum())
        size += float(other[finite].square().sum())
    return math.sqrt(error / size) if error else 0.0
