"""Likelihoods: ``likelihood(z)`` returns p(x|z), a distribution whose event is one datum.

A likelihood owns its decoder: a network from ``[..., L]`` to the distribution's parameters. One that takes several
parameters per dimension expects them in front: ``out_shape = (num_parameters, *event_shape)``. Everything is in nats, and a
log-probability has no constant left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .nn import Shape, as_shape, positive_integer
from .registry import register


class Likelihood(nn.Module):
    """A module that returns p(x|z); concrete likelihoods implement ``forward``.

    Args:
        decoder: the network from the latent to the parameters.
        event_shape: the shape of one datum; read off ``decoder.out_shape`` where the decoder says it.
        num_parameters: how many parameters per dimension the decoder gives.

    Raises:
        ValueError: neither says the shape of a datum, or the decoder's output does not fit the parameters.
    """

    def __init__(self, decoder: nn.Module, event_shape: Shape | None = None, num_parameters: int = 1):
        super().__init__()
        self.decoder = decoder
        self.num_parameters = num_parameters
        said = getattr(decoder, "out_shape", None)
        out_shape = None if said is None else as_shape(said)
        leading = (self.num_parameters,) if self.num_parameters > 1 else ()
        if event_shape is not None:
            self.event_shape = as_shape(event_shape)
        elif out_shape is not None:
            self.event_shape = out_shape[len(leading) :]
        else:
            raise ValueError(
                f"{type(decoder).__name__} does not say its out_shape: pass event_shape=... to {type(self).__name__}."
            )
        if not self.event_shape or (out_shape is not None and out_shape != (*leading, *self.event_shape)):
            wanted = str((*leading, *(self.event_shape or ("...",)))).replace("'", "")
            raise ValueError(
                f"{type(self).__name__} takes {self.num_parameters} parameter(s) per dimension, so its decoder's out_shape "
                f"must be {wanted}, not {out_shape}."
            )

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """How many parameters per dimension the decoder must give, under these options of ``__init__``."""
        return 1

    @property
    def in_scale(self) -> float:
        """What brings the data to about unit size for an encoder."""
        return 1.0

    @property
    def event_dim(self) -> int:
        """How many dimensions one datum has."""
        return len(self.event_shape)

    def parameters_of(self, z: Tensor) -> tuple[Tensor, ...]:
        """The decoder's output as ``num_parameters`` tensors of shape ``[..., *event_shape]``.

        Raises:
            ValueError: the decoder gave another shape, as one that does not say its ``out_shape`` can.
        """
        out = self.decoder(z)
        wanted = (*((self.num_parameters,) if self.num_parameters > 1 else ()), *self.event_shape)
        if tuple(out.shape[-len(wanted) :]) != wanted:
            raise ValueError(
                f"The decoder of {type(self).__name__} gave a tensor of shape {tuple(out.shape)}, which must end in {wanted}: "
                f"reshape its output, or change event_shape."
            )
        return (out,) if self.num_parameters == 1 else out.unbind(-self.event_dim - 1)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        raise TypeError(f"{type(self).__name__} must implement forward(z) and return a distribution.")


@register("likelihood")
class Bernoulli(Likelihood):
    r"""Binary data; the decoder gives logits.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \sigma(\ell_d(z)) + (1 - x_d) \log \sigma(-\ell_d(z)), \quad x_d \in \{0, 1\}

    Grey values between 0 and 1 are refused, because the formula is no density over them: binarise them.

    Args:
        decoder: maps ``[..., L]`` to logits ``[..., *event_shape]``.
        event_shape: the shape of one datum, if the decoder does not say it.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Bernoulli
        >>> from pyrovae.nn import MLP
        >>> p = Bernoulli(MLP(2, [8], (1, 4, 4)))(torch.zeros(5, 3, 2))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5, 3]), torch.Size([1, 4, 4]))
    """

    def __init__(self, decoder: nn.Module, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        (logits,) = self.parameters_of(z)
        return dist.Bernoulli(logits=logits).to_event(self.event_dim)


@register("likelihood")
class Binomial(Likelihood):
    r"""Counts out of a known total; the decoder gives logits.

    .. math:: \log p(x \mid z) = \sum_d \log \binom{n}{x_d} + x_d \log \sigma(\ell_d(z)) + (n - x_d) \log \sigma(-\ell_d(z))

    Args:
        decoder: maps ``[..., L]`` to logits ``[..., *event_shape]``.
        total_count: n, the largest count; 16 for scikit-learn's digits, 255 for 8-bit pixels.
        event_shape: the shape of one datum, if the decoder does not say it.

    Raises:
        ValueError: ``total_count`` is not a positive integer.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Binomial
        >>> from pyrovae.nn import MLP
        >>> bool(Binomial(MLP(2, [8], 64), total_count=16)(torch.zeros(2)).sample().max() <= 16)
        True
    """

    def __init__(self, decoder: nn.Module, total_count: int, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape)
        self.total_count = positive_integer(total_count, "total_count")

    @property
    def in_scale(self) -> float:
        """One over the largest count."""
        return 1.0 / self.total_count

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        (logits,) = self.parameters_of(z)
        return dist.Binomial(total_count=self.total_count, logits=logits).to_event(self.event_dim)


@register("likelihood")
class Normal(Likelihood):
    r"""Real data with Gaussian noise.

    .. math:: \log p(x \mid z) = -\sum_d \tfrac12 \log 2\pi + \log \sigma_d + \tfrac{(x_d - \mu_d(z))^2}{2 \sigma_d^2}

    Args:
        decoder: maps ``[..., L]`` to the mean ``[..., *event_shape]``; with ``scale="decoder"`` to ``[..., 2, *event_shape]``,
            the mean and the logarithm of the scale.
        scale: what sigma is. A number keeps it fixed (1.0 by default); ``"shared"`` learns one; ``"per_dimension"`` learns
            one for each dimension; ``"decoder"`` has it given by the decoder for each datum (Kingma and Welling 2014). The
            learned ones start at 1.
        event_shape: the shape of one datum, if the decoder does not say it.

    Raises:
        ValueError: ``scale`` is neither a positive number nor one of the three words, or the decoder does not fit it.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Normal
        >>> from pyrovae.nn import MLP
        >>> Normal(MLP(2, [8], (2, 5)), scale="decoder")(torch.zeros(7, 2)).event_shape
        torch.Size([5])
    """

    def __init__(self, decoder: nn.Module, scale: float | str = 1.0, event_shape: Shape | None = None):
        if isinstance(scale, str) and scale not in ("shared", "per_dimension", "decoder"):
            raise ValueError(f'scale is a positive number, "shared", "per_dimension" or "decoder", not {scale!r}.')
        if not isinstance(scale, str) and not (isinstance(scale, Real) and 0 < scale < math.inf):
            raise ValueError(f"A fixed scale is a positive number, not {scale!r}.")
        super().__init__(decoder, event_shape, self.count_parameters({"scale": scale}))
        self.scale = scale if isinstance(scale, str) else float(scale)
        if scale == "shared":
            self.log_scale = nn.Parameter(torch.zeros(()))
        elif scale == "per_dimension":
            self.log_scale = nn.Parameter(torch.zeros(self.event_shape))

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Two where the decoder gives the scale, else one."""
        return 2 if options.get("scale") == "decoder" else 1

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        if self.scale == "decoder":
            loc, log_scale = self.parameters_of(z)
            return dist.Normal(loc, log_scale.exp()).to_event(self.event_dim)
        (loc,) = self.parameters_of(z)
        scale = self.log_scale.exp() if isinstance(self.scale, str) else self.scale
        return dist.Normal(loc, scale).to_event(self.event_dim)
