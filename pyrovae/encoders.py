"""Encoders: ``encoder(x)`` returns q(z|x), batch shape ``[...]`` and event shape ``(latent_dim,)``.

A body turns a datum into features; the encoder adds the linear heads that turn features into the parameters of q.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .nn import as_shape, positive_integer
from .registry import register


class Encoder(nn.Module):
    """A module that returns q(z|x); concrete encoders make their heads and implement ``forward``.

    Args:
        body: the network from a datum to features.
        latent_dim: L, the number of latent dimensions.
        num_features: how many features the body gives; read off ``body.out_shape`` where the body says it.
        in_scale: the data are multiplied by it on their way into the body; 1/16 for counts up to 16, say.

    Raises:
        ValueError: neither says how many features there are, they disagree, or a number is not positive.
    """

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__()
        shape: Any = getattr(body, "out_shape", num_features)
        if shape is None:
            raise ValueError(
                f"{type(body).__name__} does not say its out_shape: pass num_features=... to {type(self).__name__}."
            )
        self.feature_shape = as_shape(shape)
        self.num_features = math.prod(self.feature_shape)
        if num_features is not None and num_features != self.num_features:
            raise ValueError(
                f"{type(body).__name__} gives {self.num_features} features, not {num_features}: leave num_features out."
            )
        self.body, self.latent_dim = body, positive_integer(latent_dim, "latent_dim")
        if not isinstance(in_scale, Real) or not 0 < in_scale < math.inf:
            raise ValueError(f"in_scale is a positive number, not {in_scale!r}.")
        self.in_scale: float = float(in_scale)

    def features(self, x: Tensor) -> Tensor:
        """The body's output for data ``x``, shape ``[..., num_features]``."""
        return self.body(x * self.in_scale).flatten(-len(self.feature_shape))

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        raise TypeError(f"{type(self).__name__} must implement forward(x) and return a distribution.")


@register("encoder")
class DiagonalNormal(Encoder):
    r"""A Gaussian with independent dimensions (Kingma and Welling 2014).

    .. math:: q(z \mid x) = \prod_l N(z_l \mid \mu_l(x), \sigma_l(x)^2), \quad \sigma = \exp(s(x))

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body does not say it.
        in_scale: multiplies the data on their way into the body.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import DiagonalNormal
        >>> from pyrovae.nn import MLP
        >>> DiagonalNormal(MLP(784, [200, 200]), 50)(torch.zeros(3, 784)).event_shape
        torch.Size([50])
    """

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.loc = _head(self.num_features, self.latent_dim)
        self.log_scale = _flat_head(self.num_features, self.latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h = self.features(x)
        return dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1)


@register("encoder")
class FullCovarianceNormal(Encoder):
    r"""A Gaussian with a full covariance, by its Cholesky factor.

    .. math:: q(z \mid x) = N(z \mid \mu(x), L(x) L(x)^\top), \quad L_{ii} = \exp(s_i(x)), \quad L_{ij} = c_{ij}(x), \; i > j

    The posterior of a linear-Gaussian model is of this form, so there the bound can be exact
    (Tipping and Bishop 1999; Lucas et al. 2019).

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body does not say it.
        in_scale: multiplies the data on their way into the body.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import FullCovarianceNormal
        >>> from pyrovae.nn import MLP
        >>> FullCovarianceNormal(MLP(6, []), 2)(torch.zeros(3, 6)).scale_tril.shape
        torch.Size([3, 2, 2])
    """

    rows: Tensor
    columns: Tensor

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.loc = _head(self.num_features, self.latent_dim)
        self.log_diagonal = _flat_head(self.num_features, self.latent_dim)
        if self.latent_dim > 1:
            self.below = _flat_head(self.num_features, self.latent_dim * (self.latent_dim - 1) // 2)
        rows, columns = torch.tril_indices(self.latent_dim, self.latent_dim, -1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h = self.features(x)
        scale_tril = torch.diag_embed(self.log_diagonal(h).exp())
        if self.latent_dim > 1:
            scale_tril[..., self.rows, self.columns] = self.below(h)
        return dist.MultivariateNormal(self.loc(h), scale_tril=scale_tril)


def _head(num_features: int, latent_dim: int) -> nn.Linear:
    head = nn.Linear(num_features, latent_dim)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _flat_head(num_features: int, size: int) -> nn.Linear:
    # Scales are exponentials: from random weights the first bound can be -1e16, so they start at one for every datum.
    head = nn.Linear(num_features, size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
