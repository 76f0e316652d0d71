"""An optimizer's step; of a plain fused Adam its kernel alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Update:
    """The optimizer's step; of a plain fused Adam its kernel alone, as the bookkeeping costs a small step a fifth."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._parameters: list[Tensor] = []
        self._state: tuple[Any, int] | None = None

    def __call__(
        self, parameters: list[Tensor], gradients: list[Tensor], found_inf: Tensor | None = None, rate: Tensor | None = None
    ) -> None:
        """Take it; or not, where ``spoiled`` is 1: the kernel finds that out on its device, for others it is read here.

        ``rate`` is for a CUDA graph, which cannot have the optimizer's own learning rate, a number of the host.
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
        if self._counted is None:  # a GPU's kernel wants the parameters' own strides, which a product's transpose has not
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
