"""Data sets whose distribution is known, so that estimates of log p(x) can be compared with the truth."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SYNTHETIC", "synthetic"]

# Training and test data.
SIZES = (4000, 1000)


def synthetic(name: str, num_data: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    r"""Draws from a known distribution, and its log p(x) of each, in float64 and in nats.

    - ``"linear_gaussian"``: 10 dimensions, :math:`x = W z + b + \epsilon` with 3 latent ones, so
      :math:`x \sim N(b, W W^\top + 0.25 I)`.
    - ``"ring"``: 2 dimensions, eight Gaussians of standard deviation 0.3 on a circle of radius 3.
    - ``"bernoulli_mixture"``: 16 binary dimensions, four classes with probabilities of their own.
    - ``"poisson_mixture"``: 10 counts, three classes with rates of their own.

    Args:
        name: which.
        num_data: N.
        seed: of the draws; the distribution itself is always the same.

    Returns:
        Data, shape (N, D), and log p(x), shape (N,).

    Raises:
        KeyError: there is no such distribution.

    Example:
        >>> from pyrovae.data.synthetic import synthetic
        >>> x, log_px = synthetic("ring", 5)
        >>> x.shape, log_px.shape
        (torch.Size([5, 2]), torch.Size([5]))
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        distribution = SYNTHETIC[name]()
        torch.manual_seed(seed + 1)
        x = distribution.sample((num_data,))
    return x, distribution.log_prob(x)


def _linear_gaussian() -> torch.distributions.Distribution:
    weight = torch.randn(10, 3, dtype=torch.float64)
    covariance = weight @ weight.T + 0.25 * torch.eye(10, dtype=torch.float64)
    return torch.distributions.MultivariateNormal(torch.randn(10, dtype=torch.float64), covariance)


def _ring() -> torch.distributions.Distribution:
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    centres = 3 * torch.stack([angle.cos(), angle.sin()], -1)
    return _mixture(torch.distributions.Normal(centres, 0.3))


def _bernoulli_mixture() -> torch.distributions.Distribution:
    return _mixture(torch.distributions.Bernoulli(torch.rand(4, 16, dtype=torch.float64) * 0.9 + 0.05))


def _poisson_mixture() -> torch.distributions.Distribution:
    return _mixture(torch.distributions.Poisson(torch.rand(3, 10, dtype=torch.float64) * 12 + 0.5))


def _mixture(components: torch.distributions.Distribution) -> torch.distributions.Distribution:
    """Equal parts of distributions of vectors, of shape (classes, D)."""
    classes = torch.distributions.Categorical(torch.ones(components.batch_shape[0], dtype=torch.float64))
    return torch.distributions.MixtureSameFamily(classes, torch.distributions.Independent(components, 1))


SYNTHETIC: dict[str, Callable[[], torch.distributions.Distribution]] = {
    "linear_gaussian": _linear_gaussian,
    "ring": _ring,
    "bernoulli_mixture": _bernoulli_mixture,
    "poisson_mixture": _poisson_mixture,
}
