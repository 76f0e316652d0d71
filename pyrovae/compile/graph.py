"""Graphs: a function of tensors, captured once, compiled, and run without Pyro's handlers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..programs.reachable import changed_numbers, python_state
from ..programs.tracing import same_random_stream
from .capture import trace
from .captured import Captured, State, random_state, set_random_state
from .inductor import Tensors, _inductor, computed_values
from .kept import put, take
from .kernels import SeededNormals, seeded
from .rewrites import join_decoders
from .settings import BACKENDS, limit_backend

__all__ = ["MOST_GRAPHS", "USES_BEFORE_CAPTURE", "Staged", "largest_value", "rolled"]

# At most this many input shapes get a graph each; further shapes run uncaptured, since each graph takes seconds to compile.
MOST_GRAPHS = 4
# A second shape, such as that of a smaller last batch, repays its own graph only after this many uses.
USES_BEFORE_CAPTURE = 50


class Staged:
    """A function of tensors that returns a tuple of tensors, captured on its first call and compiled on its second.

    One graph serves one set of shapes. The function must do the same for all values: one that reads values into Python
    (``.item()``, ``if x.sum() > 0``) cannot be captured, and runs as it is.

    Args:
        function: what to run; it may read live parameters and buffers, and draw from torch's random stream.
        backend: ``"inductor"`` compiles; ``"native"`` puts our own operations in place of decoders (on a CPU), which needs no
            compiler once they are built; ``"aten"`` stops at the captured graph; ``"eager"`` captures nothing. The variable
            ``PYROVAE_COMPILE`` limits it.
        precision: ``"float32"`` and ``"tf32"`` leave products as they are (see :func:`pyrovae.compile.cuda.products_in`);
            ``"bfloat16"`` rounds the factors of float32 products in a compiled graph.
        threads: number of :meth:`submit` calls that run concurrently, on one CPU thread each (``"inductor"`` and ``"native"``).
        programs: the objects whose Python state a run must not change; by default the function.
        keep: what distinguishes this function among those of its programs. :meth:`close` then keeps the graphs for the next
            object of the same programs and name, which compares them with the function before it uses them.

    Attributes:
        reason: why it runs slower than asked, in one sentence, or ``None``.

    Raises:
        ValueError: an option is unknown, or ``precision="bfloat16"`` without compilation.

    Example:
        >>> import torch
        >>> from pyrovae.compile.graph import Staged
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
        keep: Hashable | None = None,
    ):
        if backend not in BACKENDS:
            raise ValueError(f'backend must be "inductor", "native", "aten" or "eager", got {backend!r}.')
        if precision not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f'precision must be "float32", "tf32" or "bfloat16", got {precision!r}.')
        limited = limit_backend(backend)
        if precision == "bfloat16" and limited != "inductor":
            asked = backend != "inductor"
            got = f"backend={backend!r}: pass compile=True" if asked else f"PYROVAE_COMPILE={limited}: unset it"
            raise ValueError(f'precision="bfloat16" must have a compiled step, got {got}, or leave precision out.')
        self.function, self.backend, self.precision, self.threads = function, limited, precision, threads
        self.programs = (function,) if programs is None else programs
        self.reason = (
            None if limited == backend else f"This step runs slower than asked, since PYROVAE_COMPILE={limited} is set."
        )
        self._agreed = ""
        self._pool: _SideBySide | None = None
        self._name = None if keep is None or limited == "eager" else (keep, limited, precision, threads)
        self._graphs: dict[tuple, Captured] = {}
        self._earlier = {} if self._name is None else take(self.programs, self._name)
        self._uses: dict[tuple, int] = {}

    @property
    def captured(self) -> bool:
        """Whether it runs from a graph, compiled or not."""
        return self.backend != "eager" and bool(self._graphs)

    @property
    def touched(self) -> Tensors:
        """The tensors that the captured function reads and may change: parameters, buffers and constants."""
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
        """Whether the next call runs the function as well as its graph, and compares them."""
        return any(graph.due for graph in self._graphs.values())

    def leave_uncompiled(self) -> None:
        """Compile no further graphs: a CUDA graph runs the steps, and captured graphs are only compared with it."""
        self.backend = "eager" if self.backend == "eager" else "aten"

    def recheck(self, when: str) -> None:
        """Compare function and graph at the next call; if they differ, later calls run the function as it is.

        Args:
            when: how the warning names this moment, such as ``"at the start of epoch 3"``.
        """
        for graph in self._graphs.values():
            graph.due = graph.due or when

    def submit(self, *inputs: Tensor) -> Callable[[], Tensors]:
        """A function that returns the value; with several threads it is computed in the background, until :meth:`close`.

        Random numbers, or a seed if they are many, are drawn now, so that they do not depend on what else runs.
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
            # Capture and compile without moving the random stream, so that no number depends on what was computed before.
            with same_random_stream(inputs):
                if graph is None:
                    self._first(key, inputs)
                else:  # on the inputs of its capture, a graph that froze a value of theirs still agrees
                    self(*(rolled(inputs) if graph.captured_on is not None else inputs))
            return self.submit(*inputs)
        inputs = tuple([tensor.detach().contiguous() for tensor in inputs])
        if not graph.draws:
            value = graph(inputs, ())
            return lambda: value
        if self._pool is None:
            self._pool = _SideBySide(self.threads)
        drawn = [seeded(draw) for draw in graph.draws]
        return self._pool.submit(lambda: graph(inputs, tuple([numbers() for numbers in drawn]))).result

    @contextlib.contextmanager
    def all_threads(self) -> Iterator[None]:
        """Let the caller's operations run on all threads, while nothing is computed in the background."""
        number = torch.get_num_threads()
        torch.set_num_threads(number if self._pool is None else self._pool.before)
        try:
            yield
        finally:
            torch.set_num_threads(number)

    def close(self) -> None:
        """Cancel what has not begun, release the threads, and keep the graphs if they are to be kept."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        if self._name is not None and self.reason is None:
            put(self.programs, self._name, dict([*self._earlier.items(), *self._graphs.items()][-MOST_GRAPHS:]))

    def _captures(self, key: tuple) -> bool:
        """Count a use of a shape without a graph; whether it is worth one."""
        uses = self._uses[key] = self._uses.get(key, 0) + 1
        return not self._graphs or (uses >= USES_BEFORE_CAPTURE and len(self._graphs) < MOST_GRAPHS)

    def _first(self, key: tuple, inputs: Tensors) -> Tensors:
        """The value of a shape's first use that is worth a graph: the graph of an earlier call, or a new one."""
        if key in self._earlier:
            self._graphs[key] = self._earlier.pop(key)
            return self._checked(self._graphs[key], inputs)
        random = random_state(inputs)
        try:
            self._graphs[key], outputs = _capture(self.function, _distinct(inputs))
            self._graphs[key].captured_on = inputs
        except Exception as error:  # whatever stops the tracer: run as it is, the program says what is wrong
            set_random_state(random)
            self._fall_back("eager", f"it cannot be captured ({_first_line(error)})")
            return self.function(*inputs)
        return outputs

    def _checked(self, graph: Captured, inputs: Tensors) -> Tensors:
        """Run the function and its graph on the same inputs and random numbers, and compare; return the function's value."""
        when, graph.due = graph.due, ""
        state = State(graph, inputs)
        captured = graph.value_of(graph.module, inputs)
        state.put_back()
        before = python_state(*self.programs)
        value = self.function(*inputs)
        counted = changed_numbers(before, python_state(*self.programs))
        agrees = graph.close(captured, value, inputs, exactly=True)
        # On the inputs of the capture, a graph that froze a value of theirs still agrees: permute their rows and compare again.
        if agrees and not counted and graph.captured_on is not None and all(map(torch.equal, graph.captured_on, inputs)):
            agrees = self._agrees_on(graph, rolled(inputs))
        graph.captured_on, graph.kept = None, graph.kept and not agrees
        if counted:
            self._fall_back("eager", f"it keeps a state in Python, which a graph does not: {', '.join(counted)}")
        elif not agrees and graph.kept:
            # Of programs as they were in an earlier call. The next use captures anew.
            self._graphs = {key: other for key, other in self._graphs.items() if other is not graph}
            self._earlier.clear()
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

    def _agrees_on(self, graph: Captured, inputs: Tensors) -> bool:
        """Whether graph and function agree on other inputs; all that they change is restored."""
        state = State(graph, inputs)
        captured = graph.value_of(graph.module, inputs)
        state.put_back()
        value = tuple(tensor.detach().clone() for tensor in self.function(*inputs))
        state.put_back()
        return graph.close(captured, value, inputs, exactly=True)

    def _compile(self, graph: Captured, inputs: Tensors, state: State, value: Tensors) -> None:
        """Compile a graph that agrees with its function, and compare the result with ``value``, computed from ``state``."""
        graph.run, inputs = graph.module, _distinct(inputs)
        if self.backend == "aten" or (self.backend == "native" and any(tensor.is_cuda for tensor in inputs)):
            return
        rounded, after = self.precision == "bfloat16", State(graph, inputs)
        try:
            single_threaded = self.threads > 1 and graph.draw_first()
            state.put_back()
            if self.backend == "native":
                graph.run = join_decoders(graph.module)
            else:
                example = (*inputs, *graph.outside, *graph.drawn())
                state.put_back()
                graph.run = _inductor(graph.module, example, rounded, single_threaded)
            compiled = graph.value_of(graph.run, inputs)
        except Exception as error:  # no C++ compiler, say; the graph is right without
            graph.run = graph.module
            self._fall_back("aten", f"the compiler failed ({_first_line(error)})")
            return
        finally:
            after.put_back()
        # Rounded products differ on purpose.
        if not (rounded or graph.close(compiled, value, inputs, exactly=False)):
            self._fall_back("eager", "its compiled graph gives other numbers, which is the compiler's fault")

    def _fall_back(self, backend: str, why: str) -> None:
        self.backend = backend
        slower = "with Pyro's handlers at every step" if backend == "eager" else "captured, but not compiled"
        self.reason = f"This step runs {slower}, since {why}: pass compile=False to run it as it is."
        warnings.warn(self.reason, RuntimeWarning, stacklevel=5)


def rolled(inputs: Tensors) -> Tensors:
    """The inputs with their rows moved by one place."""
    return tuple(each.roll(1, 0) if each.dim() else each for each in inputs)


def _distinct(inputs: Tensors) -> Tensors:
    """The inputs, with a copy of any that comes twice: a graph captured from one tensor would have one input for both."""
    places = {id(tensor): place for place, tensor in reversed(list(enumerate(inputs)))}
    return tuple(tensor if places[id(tensor)] == place else tensor.clone() for place, tensor in enumerate(inputs))


class _SideBySide(ThreadPoolExecutor):
    """Threads that each compute on one core; meanwhile the caller does too, since idle threads of its own would spin."""

    def __init__(self, number: int):
        super().__init__(number, initializer=torch.set_num_threads, initargs=(1,))
        self.before = torch.get_num_threads()
        torch.set_num_threads(1)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        torch.set_num_threads(self.before)


def _capture(function: Callable[..., Tensors], inputs: Tensors) -> tuple[Captured, Tensors]:
    """Record one run; return the graph, and what that run itself returned."""
    module, returned = trace(function, inputs)
    return Captured(module), returned


def largest_value(function: Callable[..., Tensors], *inputs: Tensor) -> int | None:
    """The number of elements of a compiled graph's largest value; ``None`` for a function that cannot be captured."""
    try:
        with same_random_stream(inputs):
            graph, _ = _capture(function, _distinct(inputs))
    except Exception:  # whatever stops the tracer: the caller's own call warns with the reason
        return None
    return max((value.numel() for value in computed_values(join_decoders(graph.module))), default=0)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:200]
