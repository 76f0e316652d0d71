"""A moving average of parameters, which a step updates by tensor operations, within a CUDA graph too."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Average", "ScheduleFree"]


class Average:
    r"""The exponential moving average of parameters.

    .. math:: \bar\theta_n = d_n \bar\theta_{n-1} + (1 - d_n) \theta_n, \qquad d_n = \min\Bigl(d, \frac{1 + n}{10 + n}\Bigr)

    The smaller weight of the first steps lets the average forget the initial parameters.

    Args:
        parameters: what is averaged.
        decay: d, between 0 and 1.
    """

    def __init__(self, parameters: list[Tensor], decay: float):
        self.parameters, self.decay = [parameter.detach() for parameter in parameters], decay
        self.values = [parameter.clone() for parameter in self.parameters]
        self.count = torch.zeros((), dtype=torch.float64, device=self.parameters[0].device)

    @property
    def touched(self) -> list[Tensor]:
        """The tensors that an update changes."""
        return [self.count, *self.values]

    @torch.no_grad()
    def update(self, found_inf: Tensor | None = None) -> None:
        """Take the parameters after a step into account, unless ``found_inf`` is 1, after which they have not changed."""
        taken = 1.0 if found_inf is None else 1.0 - found_inf
        self.count.add_(taken)
        share = (1.0 - torch.clamp((1.0 + self.count) / (10.0 + self.count), max=self.decay)) * taken
        differences = torch._foreach_sub(self.parameters, self.values)
        torch._foreach_mul_(differences, share)
        torch._foreach_add_(self.values, differences)

    @torch.no_grad()
    def load(self, count: float, values: list[Tensor]) -> None:
        """Go to other values, in place."""
        self.count.fill_(count)
        torch._foreach_copy_(self.values, [value.to(old.device) for value, old in zip(values, self.values, strict=True)])

    def load_into_parameters(self) -> None:
        """Give the parameters their averaged values."""
        self.restore(self.values)

    @torch.no_grad()
    def restore(self, values: list[Tensor]) -> None:
        """Give the parameters these values, in place."""
        torch._foreach_copy_(self.parameters, values)


class ScheduleFree(Average):
    r"""The average that a schedule-free optimizer keeps itself.

    It takes gradients at y, and its average x lies between y and the iterate z that it keeps:

    .. math:: x = y + (1 - 1 / \beta) (z - y)

    Args:
        optimizer: one of the library ``schedulefree``, whose parameters are at y while it trains.

    References:
        `Defazio, Yang, Mehta, Mishchenko, Khaled and Cutkosky, The road less scheduled, 2024
        <https://arxiv.org/abs/2405.15682>`_.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self.parameters = [each.detach() for group in optimizer.param_groups for each in group["params"]]
        self.count = torch.zeros((), dtype=torch.float64)

    @property
    def values(self) -> list[Tensor]:  # type: ignore[override]
        """Nothing that the optimizer's own state does not have."""
        return []

    @property
    def touched(self) -> list[Tensor]:
        """None: the optimizer changes its own tensors."""
        return []

    def update(self, found_inf: Tensor | None = None) -> None:
        """Nothing: the optimizer's step has done so."""

    def load(self, count: float, values: list[Tensor]) -> None:
        """Nothing: the optimizer's state is loaded by itself."""

    @torch.no_grad()
    def load_into_parameters(self) -> None:
        """Give the parameters their averaged values."""
        for group in self.optimizer.param_groups:
            beta = group["betas"][0] if "betas" in group else group["momentum"]
            for parameter in group["params"]:
                iterate = self.optimizer.state.get(parameter, {}).get("z")
                if iterate is not None:  # the parameter has been in a step
                    parameter.lerp_(iterate, 1 - 1 / beta)
