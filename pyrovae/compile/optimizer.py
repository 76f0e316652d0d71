"""An optimizer's step; for a plain fused Adam or AdamW, its kernel alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

__all__: list[str] = []


class _Update:
    """The step of any optimizer. That of a plain fused Adam calls its kernel: torch's bookkeeping costs a small step a fifth.

    An optimizer with hooks, of its own or for all optimizers, always takes its own ``step()``, so that they run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._state: tuple[Any, int] | None = None
        # Dictionaries of hooks, which torch fills and empties in place.
        self._hooks = (
            optimizer._optimizer_step_pre_hooks,
            optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )

    def __call__(
        self, parameters: list[Tensor], gradients: list[Tensor], found_inf: Tensor | None = None, rate: Tensor | None = None
    ) -> None:
        """Update the parameters, unless ``found_inf`` is 1: the kernel reads it on its device, other optimizers wait for it.

        Args:
            parameters: those that the loss reaches.
            gradients: of each, of its shape.
            found_inf: whether a loss or gradient is not finite, 0 or 1.
            rate: the learning rate as a tensor, for a CUDA graph, which cannot read the optimizer's own number on the host.
        """
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        if not self.is_kernel(parameters):
            if found_inf is not None and found_inf.item():
                return
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return
        if self._counted is None:  # a GPU's kernel requires the parameters' strides, which a transposed product does not have
            gradients = [
                gradient if gradient.stride() == value.stride() else torch.empty_like(value).copy_(gradient)
                for gradient, value in zip(gradients, self._values, strict=True)
            ]
        if found_inf is not None or self._counted is None:
            self._count.add_(1 if found_inf is None else 1 - found_inf)
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
            found_inf=found_inf,
        )

    def is_kernel(self, parameters: list[Tensor]) -> bool:
        """Whether the step is one call of a kernel."""
        optimizer, group = self.optimizer, self.optimizer.param_groups[0]
        plain = type(optimizer) in (torch.optim.Adam, torch.optim.AdamW) and len(optimizer.param_groups) == 1
        return bool(plain and group["fused"] and not any(self._hooks) and self._read_state(parameters))

    def settings(self) -> tuple:
        """What a CUDA graph depends on: the kernel's arguments except the learning rate, and whether there are hooks."""
        group = self.optimizer.param_groups[0]
        return (*[group.get(name) for name in ("betas", "eps", "weight_decay", "amsgrad", "maximize")], any(self._hooks))

    @property
    def touched(self) -> list[Tensor]:
        """The tensors of the optimizer that its kernel changes."""
        return [self._count, *self._means, *self._squares, *self._largest] if self._state is not None else []

    def is_current(self) -> bool:
        """Whether the moments read last are still the optimizer's, or none were read."""
        # Loading a checkpoint replaces the state, and clearing it empties it.
        state = self.optimizer.state
        return self._state is None or (self._state[0] is state and len(state) == self._state[1])

    def _read_state(self, parameters: list[Tensor]) -> bool:
        """Read the optimizer's moments of the parameters, if it has those of all; whether it has."""
        state = self.optimizer.state
        if self._parameters is parameters and self._state is not None and self.is_current():
            return True
        self._state = None
        if not all(parameter in state for parameter in parameters):
            return False
        states = [state[parameter] for parameter in parameters]
        self._values = [parameter.detach() for parameter in parameters]  # sharing storage, so that no_grad is not needed
        # The step counts become views of one tensor, so that one addition updates all.
        self._count = torch.stack([each["step"] for each in states])
        self._steps = [self._count[place] for place in range(len(states))]
        # NumPy adds in a microsecond; torch's dispatch, not in the processor's caches, takes ten.
        self._counted = self._count.numpy() if self._count.device.type == "cpu" else None
        for each, step in zip(states, self._steps, strict=True):
            each["step"] = step
        self._means, self._squares = [each["exp_avg"] for each in states], [each["exp_avg_sq"] for each in states]
        self._largest = [each["max_exp_avg_sq"] for each in states if "max_exp_avg_sq" in each]
        self._parameters, self._state = parameters, (state, len(state))
        return True
