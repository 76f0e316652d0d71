"""A training step of a pair: draw, weigh, differentiate, clip, update."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.infer
import torch
from torch import Tensor

from .average import Average
from .cuda import STEPS_AT_ONCE, GraphedSteps, NotCaptured, check_precision, products_in, record
from .graph import MOST_GRAPHS, USES_BEFORE_CAPTURE, Staged
from .inductor import Tensors
from .optimizer import _Update

__all__ = ["Outcome", "Step", "stage"]


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
            which the steps leave out; the random stream does not move.
        clip_norm: the largest norm of the gradient of all parameters together.
        count: a function from a batch to the number of data that its loss stands for; by default the batch size.
        load: a function from the tensors that a step is called with, such as row indices and the whole data, to a batch, by
            tensor operations, which become part of the graph; by default the tensors are the batch.
        backend: ``"inductor"`` compiles; ``"aten"`` stops at the captured graph; ``"eager"`` captures nothing; ``"native"`` is
            for scoring, and leaves steps as ``"aten"`` does. The variable ``PYROVAE_COMPILE`` limits it.
        precision: of products, as in :func:`pyrovae.fit`.

    Returns:
        A step: a call with a batch's tensors updates the parameters and returns loss and gradient norm.

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

    If the loss is NaN or the gradient not finite, nothing is updated. Learning rates are read from the optimizer at each step,
    and an annealed beta from the estimator. Hooks on the optimizer's step run at each step.

    :func:`stage` makes it, and describes the arguments.

    Attributes:
        parameters: the optimizer's parameters.
        reached: those that the loss depends on, known after the first step.
        asynchronous: whether :meth:`step_async` returns before the step is over, as it does on a GPU.
        average: the moving average of the parameters, if one is to be kept; set before the first step.
        parts: the number of parts of a batch that are differentiated one after the other, to save memory; set likewise.
        combine: a function of loss and gradients that returns those of all processes; set likewise.
        waits: whether, after a step that is not finite, further ones update nothing until :meth:`drain` is called.
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
        self.waits, self.parts = True, 1
        self.average: Average | None = None
        self.combine: Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]] | None = None
        self.asynchronous = any(parameter.is_cuda for parameter in self.parameters)
        self._outcomes: list[Outcome] = []
        self._unread: list[Tensor] = []
        self._device = self.parameters[0].device
        self._found_inf = torch.zeros((), dtype=torch.float32, device=self._device)  # as the optimizer's kernel reads it
        self._graphs: dict[tuple, GraphedSteps] = {}
        self._uses: dict[tuple, int] = {}
        self._filling: GraphedSteps | None = None
        self._settings: tuple | None = None
        self._outside: str | None = None
        self.recorder = record if self.asynchronous else None
        self._annealed: Tensor | None = None
        self._annealed_to: float | None = None
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
        """Compare the graph with the program at the next step; see :meth:`Staged.recheck`."""
        self._staged.recheck(when)

    def __call__(self, *inputs: Tensor) -> Outcome:
        """Take the step."""
        if self.asynchronous:
            self.step_async(*inputs)
            *self._outcomes, outcome = self.drain()
            return outcome
        loss, norm, gradients = self._of_all(*self._staged(*self._with_beta(inputs, self._step_input())))
        outcome = Outcome(loss.item(), norm.item())
        if not math.isnan(outcome.loss) and math.isfinite(outcome.norm):
            self._update(self.reached, gradients)
            if self.average is not None:
                self.average.update()
        return outcome

    def step_async(self, *inputs: Tensor) -> None:
        """Take the step without waiting for a GPU; :meth:`drain` later returns its loss and norm.

        After a loss or gradient that is not finite, further steps update nothing until :meth:`drain` is called, unless
        :attr:`waits` is set to ``False`` before the first step: then only the step itself is skipped. Optimizers other than a
        fused Adam have to read that from the GPU at each step, and so wait.
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
            self._unread += graphed.step_async(inputs, float(self.optimizer.param_groups[0]["lr"]), beta)
            if graphed.update is None:
                self._update_on_device(list(graphed.gradients[2:]))
            return
        with products_in(self.precision, self._device):
            loss, norm, gradients = self._of_all(*self._staged(*self._with_beta(inputs, beta)))
        self._unread.append(self._noted(loss, norm)[None])
        self._update_on_device(gradients)

    def _update_on_device(self, gradients: list[Tensor], rate: Tensor | None = None) -> None:
        self._update(self.reached, gradients, self._found_inf, rate)
        if self.average is not None:
            self.average.update(self._found_inf)

    def drain(self) -> list[Outcome]:
        """Loss and norm of each step taken by :meth:`step_async` since the last call, in order."""
        if self._filling is not None:
            self._unread += self._filling.flush()
        if self._unread:
            self._outcomes += [Outcome(*pair) for pair in torch.cat(self._unread).tolist()]
            self._found_inf.zero_()
        outcomes, self._outcomes, self._unread = self._outcomes, [], []
        return outcomes

    def _noted(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Loss and norm as one tensor; ``_found_inf`` becomes 1 if either is not finite, and stays 1 if steps wait."""
        found_inf = (torch.isnan(loss) | ~torch.isfinite(norm)).to(self._found_inf.dtype)
        self._found_inf.copy_(torch.maximum(self._found_inf, found_inf) if self.waits else found_inf)
        return torch.stack([loss, norm]).double()

    def _graph_for(self, inputs: Tensors, beta: float | None) -> GraphedSteps | None:
        """The CUDA graphs for such a step; ``None`` if it is launched without."""
        settings, before = self._update.settings(), self._settings
        self._settings = settings
        if (
            self.recorder is None
            or self.combine is not None
            or before is None
            or not self._staged.captured
            or (self._graphs and self._staged.due)
        ):
            return None
        if self._graphs and not self._update.is_current():  # a checkpoint was loaded, for example
            self._graphs.clear()
        if settings != before:
            self._launch_singly("the optimizer's settings or hooks change, and not its learning rate alone")
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

        def compute(*step_inputs: Tensor) -> Tensors:
            outputs = staged(*step_inputs)
            if not staged.captured:
                raise NotCaptured("its captured function gives other numbers")
            return outputs

        def update(outputs: Tensors, rate: Tensor) -> None:
            self._update_on_device(list(outputs[2:]), rate)

        inside, rate = self._update.is_kernel(self.reached), self.optimizer.param_groups[0]["lr"]
        touched = [*self._staged.touched, *self._update.touched, self._found_inf]
        touched += [] if self.average is None else self.average.touched
        # A batch made outside the graph may depend on random numbers, which a delayed step would draw too late.
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
            cure = "remove its hooks" if self._update.has_hooks else "choose 'adam' or 'adamw'"
            self._outside = f"{name} runs outside the step's CUDA graph, which takes longer: {cure}."
            warnings.warn(self._outside, RuntimeWarning, stacklevel=5)

    def _launch_singly(self, why: str) -> None:
        self._graphs.clear()
        self.recorder = None
        self._outside = f"The kernels of this step are launched one by one, since {why}: pass compile=False to run it as it is."
        warnings.warn(self._outside, RuntimeWarning, stacklevel=5)

    def _differentiate_and_note(self, *inputs: Tensor) -> Tensors:
        """As :meth:`_differentiate`, and write loss and norm to the last input, without reading them on the host."""
        *rest, outcome = inputs
        loss, norm, *gradients = self._differentiate(*rest)
        outcome.copy_(self._noted(loss, norm))
        return (loss, norm, *gradients)

    def _with_beta(self, inputs: Tensors, beta: float | None) -> Tensors:
        if beta is None:
            return inputs
        if self._annealed is None:
            self._annealed = torch.zeros((), dtype=torch.float64, device=self._device)
        if beta != self._annealed_to:
            self._annealed_to = beta
            self._annealed.fill_(beta)
        return (*inputs, self._annealed)

    def _step_input(self) -> float | None:
        # Pyro's own estimators have none.
        beta = getattr(self.estimator, "current_beta", None)
        if beta is not None:
            self.estimator.advance()
        return beta

    def _differentiate(self, *inputs: Tensor) -> Tensors:
        """Loss, norm, and the gradient of each parameter that the loss reaches."""
        with pyro.validation_enabled(False):
            if self._annealed is None:
                loss, gradients = self._loss_and_gradients(self.load(*inputs))
            else:
                loss, gradients = self._loss_and_gradients(self.load(*inputs[:-1]), inputs[-1])
        pairs = [(par, grad) for par, grad in zip(self.parameters, gradients, strict=True) if grad is not None]
        if not pairs:
            raise ValueError("No gradient reached any parameter: register modules with pyro.module, or use pyro.param.")
        reached, found = [par for par, _ in pairs], tuple(grad for _, grad in pairs)
        if list(map(id, reached)) != list(map(id, self.reached)):  # the optimizer's kernel recognises the list itself
            self.reached = reached
        return (loss.detach(), *self._clipped(found, None if self.combine is not None else self.clip_norm))

    def _of_all(self, loss: Tensor, norm: Tensor, *gradients: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss, norm and gradients of all processes."""
        if self.combine is None:
            return loss, norm, list(gradients)
        loss, found = self.combine(loss, list(gradients))
        norm, *found = self._clipped(found, self.clip_norm)
        return loss, norm, found

    def _clipped(self, found: list[Tensor] | tuple[Tensor, ...], clip_norm: float | None) -> Tensors:
        """The norm of all gradients together, and the gradients, clipped unless ``clip_norm`` is ``None``."""
        if self._device.type == "cuda":  # four kernels in all; the sums below take two for each parameter
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(found)))
        else:  # get_total_norm would stay one call for each parameter in the compiled graph
            norm = torch.stack([gradient.square().sum() for gradient in found]).sum().sqrt()
        if clip_norm is not None:
            found = torch._foreach_mul(found, (clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return (norm, *found)

    def _loss_and_gradients(self, batch: Tensors, beta: Tensor | None = None) -> tuple[Tensor, Sequence[Tensor | None]]:
        pieces = [batch] if self.parts == 1 else list(zip(*(each.chunk(self.parts) for each in batch), strict=True))
        count = sum(self.count(piece) for piece in pieces)
        loss, gradients = self._of_piece(pieces[0], count, beta)
        for piece in pieces[1:]:
            more, others = self._of_piece(piece, count, beta)
            loss = loss.detach() + more
            gradients = [
                one if other is None else other if one is None else one + other
                for one, other in zip(gradients, others, strict=True)
            ]
        return loss, gradients

    def _of_piece(self, batch: Tensors, count: float, beta: Tensor | None) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The loss of a part of a batch, and its gradients divided by the count of the whole batch."""
        if hasattr(self.estimator, "differentiable_loss"):
            if beta is None:
                loss = self.estimator.differentiable_loss(self.model, self.guide, *batch)
            else:
                loss = self.estimator.loss_at(beta, self.model, self.guide, *batch)
            if not loss.requires_grad:
                return loss, [None] * len(self.parameters)
            return loss, torch.autograd.grad(loss / count, self.parameters, allow_unused=True)
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.as_tensor(self.estimator.loss_and_grads(self.model, self.guide, *batch), device=self.parameters[0].device)
        gradients = [None if par.grad is None else par.grad / count for par in self.parameters]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, gradients
