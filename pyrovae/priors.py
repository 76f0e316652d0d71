"""Priors: ``prior()`` returns p(z), a distribution with an empty batch and event shape ``(latent_dim,)``."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from .nn import positive_integer
from .registry import register


class Prior(nn.Module):
    """A module that returns p(z); concrete priors set ``latent_dim`` and implement ``forward``."""

    latent_dim: int

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = positive_integer(latent_dim, "latent_dim")

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        raise TypeError(f"{type(self).__name__} must implement forward() and return a distribution.")


@register("prior")
class StandardNormal(Prior):
    r"""The standard normal prior.

    .. math:: p(z) = \prod_{l=1}^{L} N(z_l \mid 0, 1)

    Args:
        latent_dim: L, the number of latent dimensions.

    Raises:
        ValueError: ``latent_dim`` is not positive.

    Example:
        >>> from pyrovae.priors import StandardNormal
        >>> StandardNormal(50)().event_shape
        torch.Size([50])
    """

    loc: torch.Tensor
    scale: torch.Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        # Buffers, so that .to(device) and .double() move the prior too; not persistent, since they never change.
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        """N(0, I): batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Normal(self.loc, self.scale).to_event(1)
