"""Staging: a training or scoring step captured once as one graph, compiled, and run without Pyro in between.

Pyro's handlers work in Python, once for every statement of every step, and they do the same each time. ``make_fx`` records the
tensor operations of one run: the pair, the log-weights, the objective and its gradients. Every tensor that the run met from
outside (parameters, buffers, constants) becomes an input of the graph, so later runs see what an optimizer has done to it.
Inductor then compiles the graph. Random numbers stay torch's own, so a staged step draws what an eager one would.

The run that is recorded is itself the first step: capture has no side effect of its own, and refuses a program that reads the
values of its data or parameters. The second step runs as it is, beside the graph on the same inputs and random numbers; so does
one after :meth:`Staged.recheck`, whenever something may have changed. A program that then says something else than its graph,
or counts in Python, is given up as a graph. What cannot be captured or compiled runs as it is, and says once why.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import pyro
import pyro.infer
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, has_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode

from .cuda import STEPS_AT_ONCE, GraphedSteps, NotCaptured, check_precision, products_in, record
from .kernels import SHIMS, SeededNormals, seeded
from .reachable import changed_numbers, python_state
from .rewrites import draws_as_inputs, fastest_products, join_decoders, rewrite, round_products

Tensors = tuple[Tensor, ...]

# A graph for every shape that batches come in would be a recompile storm; the shapes past these run uncaptured.
MOST_GRAPHS = 4
# A second shape, such as a ragged last batch, repays its own graph only if it keeps coming.
USES_BEFORE_CAPTURE = 50
# Bytes of the largest value of a graph whose values share one allocation.
MOST_POOLED = 2**22


class Staged:
    """A function of tensors that returns a tuple of tensors, captured on its first call and compiled on its second.

    One graph serves one set of shapes. The function must do the same whatever the values are: what it reads into Python
    (``.item()``, ``if x.sum() > 0``) cannot be captured, and then it runs as it is.

    Args:
        function: what to run; it may read live parameters and buffers, and draw from torch's random stream.
        backend: ``"inductor"`` compiles; ``"aten"`` stops at the captured graph; ``"eager"`` captures nothing.
        precision: ``"float32"`` and ``"tf32"`` leave products as they are (:func:`pyrovae.cuda.products_in` is for those);
            ``"bfloat16"`` rounds the factors of float32 ones, where compiled.
        threads: of a CPU, on which as many calls of :meth:`later` run side by side, each on one of them, where compiled.
        programs: whose Python state is watched for what a run changes in it; by default the function's own.

    Attributes:
        reason: why it runs slower than asked, one sentence, or ``None``.

    Example:
        >>> import torch
        >>> from pyrovae.staging import Staged
        >>> scale = torch.tensor(2.0)
        >>> double = Staged(lambda x: (scale * x,), backend="aten")
        >>> first = double(torch.ones(1))
        >>> _ = scale.fill_(3.0)
        >>> double(torch.ones(1))
        (tensor([3.]),)
    """

    def __init__(
        self,
        function: Callable[..., Tensors],
        backend: str = "inductor",
        precision: str = "float32",
        threads: int = 1,
        programs: tuple[Any, ...] | None = None,
    ):
        if backend not in ("inductor", "aten", "eager"):
            raise ValueError(f'backend is "inductor", "aten" or "eager", not {backend!r}.')
        if precision not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f'precision is "float32", "tf32" or "bfloat16", not {precision!r}.')
        if precision == "bfloat16" and backend != "inductor":
            raise ValueError("Products in bfloat16 belong to a compiled step: pass compile=True, or leave precision out.")
        self.function, self.backend, self.precision, self.threads = function, backend, precision, threads
        self.programs = (function,) if programs is None else programs
        self.reason: str | None = None
        self._agreed = ""
        self._pool: _SideBySide | None = None
        self._graphs: dict[tuple, _Graph] = {}
        self._uses: dict[tuple, int] = {}

    @property
    def captured(self) -> bool:
        """Whether it runs from a graph, compiled or not."""
        return self.backend != "eager" and bool(self._graphs)

    @property
    def touched(self) -> Tensors:
        """What the captured function reads and may change: parameters, buffers and constants."""
        return tuple(tensor for graph in self._graphs.values() for tensor in graph.outside)

    def __call__(self, *inputs: Tensor) -> Tensors:
        """The function's value."""
        if self.backend == "eager":
            return self.function(*inputs)
        key = tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs])
        graph = self._graphs.get(key)
        if graph is None:
            return self._first(key, inputs) if self._captures(key) else self.function(*inputs)
        inputs = tuple([tensor.detach().contiguous() for tensor in inputs])
        return self._checked(graph, inputs) if graph.due else graph(inputs, graph.drawn())

    @property
    def due(self) -> bool:
        """Whether the next call runs as it is, beside its graph."""
        return any(graph.due for graph in self._graphs.values())

    def leave_uncompiled(self) -> None:
        """Stop at captured graphs from now on, which are there to be compared with."""
        self.backend = "aten" if self.backend == "inductor" else self.backend

    def recheck(self, when: str) -> None:
        """Let the next call run as it is, beside its graph: where they differ, every later call runs as it is.

        Args:
            when: what the warning then calls this moment, such as ``"at the start of epoch 3"``.
        """
        for graph in self._graphs.values():
            graph.due = graph.due or when

    def later(self, *inputs: Tensor) -> Callable[[], Tensors]:
        """What to call for the function's value; with several threads it may be computed meanwhile, until :meth:`close`.

        Its random numbers, or the seed of them where they are many, are drawn now: they do not depend on what else runs.
        """
        if self.backend == "eager":
            value = self.function(*inputs)
            return lambda: value
        key = tuple([(tensor.shape, tensor.dtype, tensor.device) for tensor in inputs])
        if key not in self._graphs and not self._captures(key):
            with SeededNormals() if any(graph.draws for graph in self._graphs.values()) else contextlib.nullcontext():
                value = self.function(*inputs)
            return lambda: value
        graph = self._graphs.get(key)
        if graph is None or graph.due:
            # Captured and compiled aside, so that no number depends on what was computed before.
            random = _random_state(inputs)
            self(*inputs) if graph else self._first(key, inputs)
            _set_random_state(random)
            return self.later(*inputs)
        inputs = tuple([tensor.detach().contiguous() for tensor in inputs])
        if not graph.draws:
            value = graph(inputs, ())
            return lambda: value
        if self._pool is None:
            self._pool = _SideBySide(self.threads)
        drawn = [seeded(draw) for draw in graph.draws]
        return self._pool.submit(lambda: graph(inputs, tuple([numbers() for numbers in drawn]))).result

    def close(self) -> None:
        """Drop what has not begun, and give the threads back."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _captures(self, key: tuple) -> bool:
        """Whether another call with such inputs is worth a graph."""
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        return not self._graphs or (uses >= USES_BEFORE_CAPTURE and len(self._graphs) < MOST_GRAPHS)

    def _first(self, key: tuple, inputs: Tensors) -> Tensors:
        random = _random_state(inputs)
        try:
            self._graphs[key], outputs = _capture(self.function, _distinct(inputs))
            self._graphs[key].captured_on = inputs
        except Exception as error:  # whatever stops the tracer: run as it is, the program says what is wrong
            _set_random_state(random)
            self._fall_back("eager", f"it cannot be captured ({_first_line(error)})")
            return self.function(*inputs)
        return outputs

    def _checked(self, graph: _Graph, inputs: Tensors) -> Tensors:
        """One call as it is, whose value is returned, beside what the graph makes of the same inputs and random numbers."""
        when, graph.due = graph.due, ""
        state = _State(graph, inputs)
        captured = graph.value_of(graph.module, inputs)
        state.put_back()
        before = python_state(*self.programs)
        value = self.function(*inputs)
        counted = changed_numbers(before, python_state(*self.programs))
        agrees = graph.close(captured, value, inputs, exactly=True)
        # Inputs that are the captured ones show nothing of a value that was read from them: their rows in another order do.
        if agrees and not counted and graph.captured_on is not None and all(map(torch.equal, graph.captured_on, inputs)):
            agrees = self._agrees_on(graph, tuple(each.roll(1, 0) if each.dim() else each for each in inputs))
        graph.captured_on = None
        if counted:
            self._fall_back("eager", f"it keeps a state in Python, which a graph does not: {', '.join(counted)}")
        elif not agrees:
            since = f" {when}; {self._agreed}" if self._agreed else ""
            self._fall_back(
                "eager",
                f"its captured graph gives other numbers{since}: it reads a tensor's value into Python, or keeps a state there",
            )
        elif graph.run is None:
            self._compile(graph, inputs, state, value)
        if agrees:
            self._agreed = f"they agreed {when}, so what was computed in between may belong to an older state"
        return value

    def _agrees_on(self, graph: _Graph, inputs: Tensors) -> bool:
        """Whether graph and function agree on other inputs; nothing is left of either."""
        state = _State(graph, inputs)
        captured = graph.value_of(graph.module, inputs)
        state.put_back()
        value = tuple(tensor.detach().clone() for tensor in self.function(*inputs))
        state.put_back()
        return graph.close(captured, value, inputs, exactly=True)

    def _compile(self, graph: _Graph, inputs: Tensors, state: _State, value: Tensors) -> None:
        """Compile a graph that agrees with its function, whose value on the inputs and from the state is known."""
        graph.run, inputs = graph.module, _distinct(inputs)
        if self.backend != "inductor":
            return
        rounded, after = self.precision == "bfloat16", _State(graph, inputs)
        try:
            apart = self.threads > 1 and graph.draw_first()
            state.put_back()
            example = (*inputs, *graph.outside, *graph.drawn())
            state.put_back()
            graph.run = _inductor(graph.module, example, rounded, apart)
            compiled = graph.value_of(graph.run, inputs)
        except Exception as error:  # no C++ compiler, say; the graph is right without
            self._fall_back("aten", f"the compiler failed ({_first_line(error)})")
            return
        finally:
            after.put_back()
        # Rounded products give other numbers by design.
        if not (rounded or graph.close(compiled, value, inputs, exactly=False)):
            self._fall_back("eager", "its compiled graph gives other numbers, which is the compiler's fault")

    def _fall_back(self, backend: str, why: str) -> None:
        self.backend = backend
        slower = "with Pyro's handlers at every step" if backend == "eager" else "captured, but not compiled"
        self.reason = f"This step runs {slower}, since {why}: pass compile=False to run it as it is."
        warnings.warn(self.reason, RuntimeWarning, stacklevel=5)


def _distinct(inputs: Tensors) -> Tensors:
    """The inputs as tensors of their own: a graph captured from one that came twice would read one place alone ever after."""
    places = {id(tensor): place for place, tensor in reversed(list(enumerate(inputs)))}
    return tuple(tensor if places[id(tensor)] == place else tensor.clone() for place, tensor in enumerate(inputs))


class _SideBySide(ThreadPoolExecutor):
    """Threads whose operations stay on them; while they are there the caller's do too, as idle ones of its own would spin."""

    def __init__(self, number: int):
        super().__init__(number, initializer=torch.set_num_threads, initargs=(1,))
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        torch.set_num_threads(self.before)


class Outcome(NamedTuple):
    """What one training step returns.

    Attributes:
        loss: minus the objective's bound, summed over the batch, in nats.
        norm: the norm of the mean gradient, before clipping.
    """

    loss: float
    norm: float


def stage(
    estimator: pyro.infer.ELBO,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    example: Tensor | Tensors,
    *,
    clip_norm: float | None = None,
    count: Callable[[Tensors], float] | None = None,
    load: Callable[..., Tensors] | None = None,
    backend: str = "inductor",
    precision: str = "float32",
) -> Step:
    """A training step for a loop of your own; :func:`pyrovae.fit` makes its own.

    Args:
        estimator: any ``pyro.infer.ELBO``; one without a differentiable loss runs uncaptured.
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        optimizer: holds the pair's parameters; Adam and AdamW made with ``fused=True`` go straight to their kernel.
        example: a batch, or a tuple of tensors for programs of several arguments. It is scored once with Pyro's validation,
            which the steps leave out; the random stream does not notice.
        clip_norm: the largest norm that the gradient of all parameters together may have.
        count: from a batch to the number of data that its loss stands for; by default their number.
        load: makes a batch of the tensors that a step is called with, such as rows and the whole data, by tensor operations
            that then belong to the graph; by default they are the batch.
        backend: ``"inductor"`` compiles; ``"aten"`` stops at the captured graph; ``"eager"`` captures nothing.
        precision: of products, as in :func:`pyrovae.fit`.

    Returns:
        A step: called with a batch's tensors it updates the parameters and returns loss and gradient norm.

    Raises:
        ValueError: the pair or the estimator refuses the example.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> x, adam = torch.ones(50, 9), torch.optim.Adam(vae.parameters(), lr=1e-3, fused=True)
        >>> step = pv.stage(pv.estimators.IWAE(5), vae.model, vae.guide, adam, x, backend="aten")
        >>> first, second = step(x), step(x)
        >>> first.loss > 0, first.norm > 0
        (True, True)
    """
    batch = example if isinstance(example, tuple) else (example,)
    devices = [tensor.device for tensor in batch if tensor.is_cuda]
    with torch.random.fork_rng(devices), torch.no_grad():
        estimator.loss(model, guide, *batch)
    return Step(
        estimator, model, guide, optimizer, clip_norm=clip_norm, count=count, load=load, backend=backend, precision=precision
    )


class Step:
    """One training step of a pair: draw, weigh, differentiate, clip, update.

    Nothing moves where the loss is NaN or the gradient NaN or infinite. Learning rates are read from the optimizer at each
    step, and an annealed beta from the estimator.

    Made by :func:`stage`, whose arguments it has.

    Attributes:
        parameters: those that the optimizer holds.
        reached: those of them that the loss reaches, known after the first step.
        asynchronous: whether :meth:`ahead` returns before the step is over, as it does on a GPU.
        reason: why it runs slower than asked, or ``None``.
    """

    def __init__(
        self,
        estimator: pyro.infer.ELBO,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        count: Callable[[Tensors], float] | None = None,
        load: Callable[..., Tensors] | None = None,
        backend: str = "inductor",
        precision: str = "float32",
    ):
        self.estimator, self.model, self.guide, self.optimizer = estimator, model, guide, optimizer
        self.clip_norm, self.count = clip_norm, count or (lambda batch: len(batch[0]))
        self.load = load or (lambda *batch: batch)
        self.precision, self._moving = precision, None if load is None else 1
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        check_precision(precision, self.parameters[0].device)
        self.reached: list[Tensor] = []
        self.asynchronous = any(parameter.is_cuda for parameter in self.parameters)
        self._outcomes: list[Outcome] = []
        self._unread: list[Tensor] = []
        self._device = self.parameters[0].device
        self._spoiled = torch.zeros((), dtype=torch.float32, device=self._device)  # as the optimizer's kernel reads it
        self._graphs: dict[tuple, GraphedSteps] = {}
        self._uses: dict[tuple, int] = {}
        self._filling: GraphedSteps | None = None
        self._settings: tuple | None = None
        self._outside: str | None = None
        self.recorder = record if self.asynchronous else None
        self._annealed: Tensor | None = None
        self._held: float | None = None
        self._update = _Update(optimizer)
        if not hasattr(estimator, "differentiable_loss"):
            backend = "eager"
        self._backend = backend
        self._staged = Staged(self._differentiate, backend, precision, programs=(model, guide, estimator))

    @property
    def reason(self) -> str | None:
        """Why it runs slower than asked, or ``None``."""
        return self._staged.reason or self._outside

    @property
    def captured(self) -> bool:
        """Whether it runs from a graph, compiled or not."""
        return self._staged.captured

    def recheck(self, when: str) -> None:
        """Let the next step run as it is, beside its graph, as :meth:`Staged.recheck` says."""
        self._staged.recheck(when)

    def __call__(self, *inputs: Tensor) -> Outcome:
        """Take the step."""
        if self.asynchronous:
            self.ahead(*inputs)
            *self._outcomes, outcome = self.outcomes()
            return outcome
        loss, norm, *gradients = self._staged(*self._with_beta(inputs, self._step_input()))
        outcome = Outcome(loss.item(), norm.item())
        if not math.isnan(outcome.loss) and math.isfinite(outcome.norm):
            self._update(self.reached, gradients)
        return outcome

    def ahead(self, *inputs: Tensor) -> None:
        """Take the step without waiting for a GPU; :meth:`outcomes` says later what came of it.

        Where a loss or a gradient is no number, the steps taken ahead after it move nothing either, until :meth:`outcomes` has
        said so. Optimizers other than a fused Adam ask that of each step, and so wait.
        """
        if not self.asynchronous:
            self._outcomes.append(self(*inputs))
            return
        beta = self._step_input()
        graphed = self._graph_for(inputs, beta)
        if self._filling is not None and self._filling is not graphed:
            self._unread += self._filling.flush()
        self._filling = graphed
        if graphed is not None:
            self._unread += graphed.ahead(inputs, float(self.optimizer.param_groups[0]["lr"]), beta)
            if graphed.update is None:
                self._update(self.reached, list(graphed.gradients[2:]), self._spoiled)
            return
        with products_in(self.precision, self._device):
            loss, norm, *gradients = self._staged(*self._with_beta(inputs, beta))
        self._unread.append(self._noted(loss, norm)[None])
        self._update(self.reached, gradients, self._spoiled)

    def outcomes(self) -> list[Outcome]:
        """What came of the steps taken :meth:`ahead` since the last call, in order."""
        if self._filling is not None:
            self._unread += self._filling.flush()
        if self._unread:
            self._outcomes += [Outcome(*pair) for pair in torch.cat(self._unread).tolist()]
            self._spoiled.zero_()
        outcomes, self._outcomes, self._unread = self._outcomes, [], []
        return outcomes

    def _noted(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Loss and norm side by side; from the first on that is no number, ``_spoiled`` is 1."""
        spoiled = (torch.isnan(loss) | ~torch.isfinite(norm)).to(self._spoiled.dtype)
        self._spoiled.copy_(torch.maximum(self._spoiled, spoiled))
        return torch.stack([loss, norm]).double()

    def _graph_for(self, inputs: Tensors, beta: float | None) -> GraphedSteps | None:
        """The CUDA graphs that take such a step; ``None`` where it is taken without."""
        settings, before = self._update.settings(), self._settings
        self._settings = settings
        if self.recorder is None or before is None or not self._staged.captured or (self._graphs and self._staged.due):
            return None
        if self._graphs and not self._update.is_current():  # as after a checkpoint was loaded
            self._graphs.clear()
        if settings != before:
            self._launch_singly("the optimizer's settings change, and not its learning rate alone")
            return None
        moving = len(inputs) if self._moving is None else self._moving
        key = (tuple([(each.shape, each.dtype, each.device) for each in inputs[:moving]]), tuple(map(id, inputs[moving:])))
        if key not in self._graphs:
            uses = self._uses[key[0]] = self._uses.get(key[0], 0) + 1
            if (not self._graphs or uses >= USES_BEFORE_CAPTURE) and len(self._graphs) < MOST_GRAPHS:
                self._graph(key, inputs, moving, beta)
        return self._graphs.get(key)

    def _graph(self, key: tuple, inputs: Tensors, moving: int, beta: float | None) -> None:
        assert self.recorder is not None
        programs = (self.model, self.guide, self.estimator)
        staged = Staged(self._differentiate_and_note, self._backend, self.precision, programs=programs)

        def compute(*given: Tensor) -> Tensors:
            outputs = staged(*given)
            if not staged.captured:
                raise NotCaptured("its captured function gives other numbers")
            return outputs

        def update(outputs: Tensors, rate: Tensor) -> None:
            self._update(self.reached, list(outputs[2:]), self._spoiled, rate)

        inside, rate = self._update.is_kernel(self.reached), self.optimizer.param_groups[0]["lr"]
        touched = [*self._staged.touched, *self._update.touched, self._spoiled]
        # A batch made outside may have come of random numbers, which a step that waits would draw too late.
        at_once = STEPS_AT_ONCE if inside and self._moving is not None else 1
        try:
            with products_in(self.precision, self._device):
                self._graphs[key] = GraphedSteps(
                    compute, update if inside else None, inputs, moving, float(rate), beta, touched, at_once, self.recorder
                )
            self._staged.leave_uncompiled()
        except NotCaptured as error:
            self._launch_singly(str(error))
        if not inside and self._outside is None:
            name = type(self.optimizer).__name__
            self._outside = f"{name} runs outside the step's CUDA graph, which takes longer: choose 'adam' or 'adamw'."
            warnings.warn(self._outside, RuntimeWarning, stacklevel=5)

    def _launch_singly(self, why: str) -> None:
        self._graphs.clear()
        self.recorder = None
        self._outside = f"The kernels of this step are launched one by one, since {why}: pass compile=False to run it as it is."
        warnings.warn(self._outside, RuntimeWarning, stacklevel=5)

    def _differentiate_and_note(self, *inputs: Tensor) -> Tensors:
        """As :meth:`_differentiate`, and loss and norm are written to the last input: it asks nothing of the host."""
        *given, outcome = inputs
        loss, norm, *gradients = self._differentiate(*given)
        outcome.copy_(self._noted(loss, norm))
        return (loss, norm, *gradients)

    def _with_beta(self, inputs: Tensors, beta: float | None) -> Tensors:
        if beta is None:
            return inputs
        if self._annealed is None:
            self._annealed = torch.zeros((), dtype=torch.float64, device=self._device)
        if beta != self._held:
            self._held = beta
            self._annealed.fill_(beta)
        return (*inputs, self._annealed)

    def _step_input(self) -> float | None:
        # Pyro's own estimators have none.
        return self.estimator.step_input() if hasattr(self.estimator, "step_input") else None

    def _differentiate(self, *inputs: Tensor) -> Tensors:
        """Loss, norm, and the gradient of each parameter that the loss reaches."""
        with pyro.validation_enabled(False):
            if self._annealed is None:
                loss, gradients = self._loss_and_gradients(self.load(*inputs))
            else:
                self.estimator.held = inputs[-1]
                try:
                    loss, gradients = self._loss_and_gradients(self.load(*inputs[:-1]))
                finally:
                    self.estimator.held = None
        pairs = [(par, grad) for par, grad in zip(self.parameters, gradients, strict=True) if grad is not None]
        if not pairs:
            raise ValueError("No gradient reached any parameter: register modules with pyro.module, or use pyro.param.")
        reached, found = [par for par, _ in pairs], tuple(grad for _, grad in pairs)
        if list(map(id, reached)) != list(map(id, self.reached)):  # else the list by which the optimizer's kernel knows them
            self.reached = reached
        if self._device.type == "cuda":  # four kernels, where the sums below are two for each parameter
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
        else:  # not get_total_norm, which a compiler leaves as it is: one call for each parameter
            norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        if self.clip_norm is not None:
            found = torch._foreach_mul(found, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return (loss.detach(), norm, *found)

    def _loss_and_gradients(self, batch: Tensors) -> tuple[Tensor, Sequence[Tensor | None]]:
        count = self.count(batch)
        if hasattr(self.estimator, "differentiable_loss"):
            loss = self.estimator.differentiable_loss(self.model, self.guide, *batch)
            if not loss.requires_grad:
                return loss, [None] * len(self.parameters)
            return loss, torch.autograd.grad(loss / count, self.parameters, allow_unused=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.as_tensor(self.estimator.loss_and_grads(self.model, self.guide, *batch), device=self.parameters[0].device)
        gradients = [None if par.grad is None else par.grad / count for par in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, gradients


class _Update:
    """The optimizer's step; of a plain fused Adam its kernel alone, as the bookkeeping costs a small step a fifth."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._state: tuple[Any, int] | None = None

    def __call__(
        self, parameters: list[Tensor], gradients: list[Tensor], spoiled: Tensor | None = None, rate: Tensor | None = None
    ) -> None:
        """Take it; or not, where ``spoiled`` is 1: the kernel finds that out on its device, for others it is read here.

        ``rate`` is for a CUDA graph, which cannot have the optimizer's own learning rate, a number of the host.
        """
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        if not self.is_kernel(parameters):
            if spoiled is not None and spoiled.item():
                return
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return
        if self._counted is None:  # a GPU's kernel wants the parameters' own strides, which a product's transpose has not
            gradients = [
                gradient if gradient.stride() == value.stride() else torch.empty_like(value).copy_(gradient)
                for gradient, value in zip(gradients, self._values, strict=True)
            ]
        if spoiled is not None or self._counted is None:
            self._count.add_(1 if spoiled is None else 1 - spoiled)
        else:
            self._counted += 1
        (torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_)(
            self._values,
            gradients,
            self._means,
            self._squares,
            self._largest if group["amsgrad"] else [],
            self._steps,
            lr=group["lr"] if rate is None else rate,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            found_inf=spoiled,
        )

    def is_kernel(self, parameters: list[Tensor]) -> bool:
        """Whether it is a kernel's call and nothing else."""
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and len(optimizer.param_groups) == 1
        return bool(plain and group["fused"] and self._know(parameters))

    def settings(self) -> tuple:
        """What its kernel is called with, but for the learning rate."""
        group = self.optimizer.param_groups[0]
        return tuple([group.get(name) for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize")])

    @property
    def touched(self) -> list[Tensor]:
        """The optimizer's tensors that its kernel changes."""
        return [self._count, *self._means, *self._squares, *self._largest] if self._state is not None else []

    def is_current(self) -> bool:
        """Whether the optimizer's moments are those at hand, or it never had any at hand."""
        # Loading a checkpoint puts another state in its place, and clearing it leaves none.
        state = self.optimizer.state
        return self._state is None or (self._state[0] is state and len(state) == self._state[1])

    def _know(self, parameters: list[Tensor]) -> bool:
        """Whether the optimizer keeps its moments of all these parameters, which are then at hand."""
        state = self.optimizer.state
        if self._parameters is parameters and self._state is not None and self.is_current():
            return True
        self._state = None
        if not all(parameter in state for parameter in parameters):
            return False
        states = [state[parameter] for parameter in parameters]
        self._values = [parameter.detach() for parameter in parameters]  # of the same storage, so no gradient mode need change
        # The counts of steps become parts of one tensor, so that one addition serves them all.
        self._count = torch.stack([each["step"] for each in states])
        self._steps = [self._count[place] for place in range(len(states))]
        # NumPy adds in a microsecond where torch's dispatch, met cold, takes ten.
        self._counted = self._count.numpy() if self._count.device.type == "cpu" else None
        for each, step in zip(states, self._steps, strict=True):
            each["step"] = step
        self._means, self._squares = [each["exp_avg"] for each in states], [each["exp_avg_sq"] for each in states]
        self._largest = [each["max_exp_avg_sq"] for each in states if "max_exp_avg_sq" in each]
        self._parameters, self._state = parameters, (state, len(state))
        return True


def _capture(function: Callable[..., Tensors], inputs: Tensors) -> tuple[_Graph, Tensors]:
    """Record one run; return the graph, and what that run itself returned."""
    returned: list[Tensors] = []

    def run(*given: Tensor) -> Tensors:
        outputs = function(*given)
        returned.append(tuple(tensor.detach() for tensor in outputs))
        return outputs

    with _values_stay_tensors(), _NoValuesRead():
        module = make_fx(run)(*inputs)
    return _Graph(module), returned[-1]


class _NoValuesRead(TorchFunctionMode):
    """Refuse to read values that follow from inputs or parameters: a graph would keep the first ones for ever.

    The tracer itself refuses what goes through its operations, and never sees ``.numpy()``, ``.tolist()`` and their kin.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _READS and args and isinstance(args[0], Tensor):
            tracing, tensor = get_proxy_mode(), args[0]
            if tensor.requires_grad or (tracing is not None and has_proxy_slot(tensor, tracing.tracer)):
                raise RuntimeError(f"it reads a tensor's values into Python, by {func.__name__}")
        return func(*args, **(kwargs or {}))


_READS = {"numpy", "tolist", "item", "__array__", "__dlpack__", "__float__", "__int__", "__index__", "__bool__", "__complex__"}


def largest_value(function: Callable[..., Tensors], *inputs: Tensor) -> int | None:
    """How many numbers a compiled graph's largest value has; ``None`` of a function that cannot be captured."""
    random = _random_state(inputs)
    try:
        graph, _ = _capture(function, _distinct(inputs))
    except Exception:  # whatever stops the tracer: the function's own call will say it
        return None
    finally:
        _set_random_state(random)
    return max((value.numel() for value in _computed(join_decoders(graph.module))), default=0)


def _computed(module: fx.GraphModule) -> list[Tensor]:
    """The values that take memory: not those that view another."""
    values = []
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)  # which picking one of several values has not
        if node.op == "call_function" and (schema is None or all(value.alias_info is None for value in schema.returns)):
            values.append(node.meta.get("val"))
    return [value for value in values if isinstance(value, Tensor)]


class _Graph:
    """A captured function: a module over its inputs and then over all it met from outside, and what to call for it.

    What it met from outside are inputs too, so that no compiler takes a parameter for a constant.
    """

    def __init__(self, module: fx.GraphModule):
        graph = module.graph
        self.outside: list[Tensor] = []
        self.draws: list[partial[Tensor]] = []
        self.run: Callable[..., Any] | None = None
        self.due = "at its second call"  # when to run as it is beside the graph: a moment's name, or nothing
        self.captured_on: Tensors | None = None
        placed: dict[int, fx.Node] = {}
        last = list(graph.find_nodes(op="placeholder"))[-1]
        for node in list(graph.find_nodes(op="get_attr")):
            tensor = getattr(module, node.target)
            if id(tensor) not in placed:
                with graph.inserting_after(last):
                    last = placed[id(tensor)] = graph.placeholder(f"outside_{len(self.outside)}")
                self.outside.append(tensor.detach())  # shares the storage, so it follows an optimizer's updates
                last.meta["val"] = self.outside[-1]
            node.replace_all_uses_with(placed[id(tensor)])
            graph.erase_node(node)
        self.module = fx.GraphModule(nn.Module(), graph)

    def __call__(self, inputs: Tensors, drawn: Tensors) -> Tensors:
        """The function's value, from random numbers drawn before."""
        assert self.run is not None
        return tuple(self.run(*inputs, *self.outside, *drawn))

    def draw_first(self) -> bool:
        """Make random numbers inputs of the graph, where it draws any and all can be drawn before the rest."""
        self.draws = draws_as_inputs(self.module)
        return bool(self.draws)

    def drawn(self) -> Tensors:
        """The random numbers that are inputs."""
        return tuple(draw() for draw in self.draws)

    def value_of(self, run: Callable[..., Any], inputs: Tensors) -> Tensors:
        """What a form of the graph makes of the inputs, kept from what may change later."""
        with torch.no_grad():
            return tuple(tensor.clone() for tensor in run(*inputs, *self.outside, *self.drawn()))

    def close(self, staged: Tensors, eager: Tensors, inputs: Tensors, *, exactly: bool) -> bool:
        """Whether the values agree: as the same kernels' do, or as a compiler's own do with them."""
        tensors = [tensor for tensor in (*self.outside, *inputs, *eager) if tensor.is_floating_point()]
        coarsest = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
        return _close(staged, eager, tolerance=min(3 * coarsest ** (0.75 if exactly else 0.5), 0.1))


class _State:
    """The random stream and all tensors that a graph met from outside, to be put back: a run draws, and moves buffers."""

    def __init__(self, graph: _Graph, inputs: Tensors):
        self.outside, self.random = graph.outside, _random_state(inputs)
        self.values = [tensor.clone() for tensor in graph.outside]

    @torch.no_grad()
    def put_back(self) -> None:
        _set_random_state(self.random)
        for tensor, value in zip(self.outside, self.values, strict=True):
            tensor.copy_(value)


def _close(staged: Tensors, eager: Tensors, tolerance: float) -> bool:
    if len(staged) != len(eager):
        return False
    largest = max(float(torch.nan_to_num(tensor, 0.0, 0.0, 0.0).double().norm()) for tensor in eager)
    for have, want in zip(staged, eager, strict=True):
        if have.shape != want.shape or not torch.equal(torch.isfinite(have), torch.isfinite(want)):
            return False
        finite = torch.isfinite(want)
        error = float((have[finite].double() - want[finite].double()).norm())
        if error > tolerance * (float(want[finite].double().norm()) + 1e-2 * largest) + 1e-12:
            return False
    return True


def _inductor(module: fx.GraphModule, inputs: Tensors, rounded: bool, apart: bool) -> Callable[..., Any]:
    """Compile; with rounded products, and for one thread each time where calls run side by side."""
    from torch import _inductor
    from torch._guards import TracingContext, tracing
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    on_gpu = any(tensor.is_cuda for tensor in inputs)
    # Not torch.compile: its guards read every parameter at each call, a tenth of a small step, and shapes are all they find.
    # Nor its own checks of sizes and strides, a twentieth: graphs are kept by shape, and their inputs made contiguous.
    options: dict[str, Any] = {"fallback_random": True, "size_asserts": False, "alignment_asserts": False}
    # Not Inductor's own CUDA graphs, which copy all parameters at each call: see pyrovae.cuda.
    options |= {"cpp.threads": 1} if apart else {}
    if not on_gpu:
        module = join_decoders(module, rounded)
    threads = 1 if apart else torch.get_num_threads()
    if rounded:
        module = round_products(module, None if on_gpu else threads)
    if not on_gpu:
        module = fastest_products(rewrite(module), threads)
    # One allocation where there were fifty, as long as it stays below the 32 MB from which each is a fresh mapping.
    pooled = max((value.numel() * value.element_size() for value in _computed(module)), default=0) <= MOST_POOLED
    for node in module.graph.nodes:
        node.meta.clear()  # the shapes that the tracer noted are in its own terms, which the C++ wrapper refuses

    def compiled(wrapper: dict[str, Any]) -> Callable[..., Any]:
        # Inductor keeps what it made on disk for the next process, but only of graphs whose sizes could have been symbols.
        sizes = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        with tracing(TracingContext(sizes)):
            return _inductor.compile(module, list(inputs), options=options | wrapper)

    with torch.no_grad(), warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # torch's own, about torch
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # precision="tf32" asks for them
        if not on_gpu:
            # Kernels that call each other in C++ save a tenth of a small step; some operations have no such form.
            with contextlib.suppress(Exception):
                pools = {"memory_planning": True, "memory_pool": "outputs"} if pooled else {}
                return _unwrapped(compiled({"cpp_wrapper": True} | pools | _past_the_dispatcher(module)))
        return compiled({})


def _past_the_dispatcher(module: fx.GraphModule) -> dict[str, Any]:
    """The option by which a graph calls our products straight, where it has any and this torch knows how."""
    from torch._inductor import config

    known = hasattr(config.aot_inductor, "custom_ops_to_c_shims") and any(node.target in SHIMS for node in module.graph.nodes)
    return {"aot_inductor.custom_ops_to_c_shims": SHIMS} if known else {}


def _unwrapped(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled graph without what torch has around it in Python, where that does nothing.

    Between two small steps the processor's caches forget Python's code, so a hundred lines of it cost a tenth of a step. On the
    first call it shows what the wrappers do: nothing, if the graph within gets the very tensors that they got, and returns the
    very ones that they return.
    """
    from torch._inductor.output_code import CompiledFxGraph

    within: Callable[[list[Tensor]], Sequence[Tensor]] | None = None
    called = False

    def run(*args: Tensor) -> Sequence[Tensor]:
        nonlocal within, called
        if within is not None:
            return within(list(args))
        if called:
            return compiled(*args)
        called = True
        seen: list[tuple[CompiledFxGraph, list[Any], Any]] = []

        def watch(graph: CompiledFxGraph, inputs: Sequence[Any]) -> Any:
            given = list(inputs)  # which the graph empties
            outputs = original(graph, inputs)
            seen.append((graph, given, outputs))
            return outputs

        original = CompiledFxGraph.__call__
        with mock.patch.object(CompiledFxGraph, "__call__", watch):
            outputs = compiled(*args)
        if len(seen) == 1:
            graph, given, returned = seen[0]
            if _same(given, args) and _same(returned, outputs):
                within = graph.current_callable
        return outputs

    return run


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


@contextlib.contextmanager
def _values_stay_tensors() -> Iterator[None]:
    """Let Pyro's own losses be captured: they read values to report and to warn, not to decide anything."""
    from pyro.infer import trace_elbo, trace_mean_field_elbo

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    with contextlib.ExitStack() as stack:
        for module in (trace_elbo, trace_mean_field_elbo):
            for name, stand_in in [("torch_item", detached), ("warn_if_nan", lambda value, *args, **kwargs: value)]:
                if hasattr(module, name):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
        yield


def _random_state(inputs: Tensors) -> list[tuple[torch.device, Tensor]]:
    gpus = {tensor.device for tensor in inputs if tensor.is_cuda}
    return [(torch.device("cpu"), torch.get_rng_state())] + [(gpu, torch.cuda.get_rng_state(gpu)) for gpu in gpus]


def _set_random_state(states: list[tuple[torch.device, Tensor]]) -> None:
    for device, state in states:
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.cuda.set_rng_state(state, device)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
