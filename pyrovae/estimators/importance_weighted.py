"""Bounds that average the weights of several particles inside the logarithm, and related objectives."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from .._validation import positive_integer
from ..programs.tracing import Gradients
from ..programs.weights import LogWeights
from ..registry import register
from .base import Coefficients, ManyParticles, elbo, iwae, log_mean_exp

__all__ = ["CIWAE", "IWAE", "JVI", "MIWAE", "PIWAE", "Renyi", "VRMax"]


class _Grouped(ManyParticles):
    """Particles in M groups of equal size."""

    def __init__(self, num_particles: int = 8, *, num_groups: int = 2, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if positive_integer(num_groups, "num_groups") > self.num_particles or self.num_particles % num_groups:
            raise ValueError(f"num_groups must divide num_particles = {num_particles}, got {num_groups!r}.")
        self.num_groups = int(num_groups)


@register("estimator")
class IWAE(ManyParticles):
    r"""The importance-weighted bound.

    .. math:: L_K = E_q \Big[ \log \frac1K \sum_k w_k \Big] \le \log p(x)

    It increases with K towards log p(x); at K = 1 it is the ELBO. The bound itself is differentiated, which weighs each
    particle's gradient by the normalised weight :math:`\tilde w_k`. The signal-to-noise ratio of the guide's gradient falls as
    K grows; that of :class:`DReG` does not. The estimator needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.IWAE(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight, shape (B,)."""
        return iwae(weights)


@register("estimator")
class MIWAE(_Grouped):
    r"""The mean of M importance-weighted bounds of K particles each.

    .. math:: L_{M,K} = E_q \Big[ \frac1M \sum_m \log \frac1K \sum_k w_{mk} \Big] \le \log p(x)

    MIWAE(M, 1) is the :class:`ELBO` and MIWAE(1, K) the :class:`IWAE`. The bound itself is differentiated. The estimator needs
    reparameterised sites.

    Args:
        num_particles: M K, all draws per datum.
        num_groups: M, a divisor of ``num_particles``.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_particles``, or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, https://arxiv.org/abs/1802.04537.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> miwae = pv.estimators.MIWAE(num_particles=8, num_groups=4)
        >>> miwae.bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The mean over groups of the log of the mean weight, shape (B,)."""
        return log_mean_exp(weights.log_weights.unflatten(0, (self.num_groups, -1)), 1).mean(0)


@register("estimator")
class PIWAE(_Grouped):
    r"""IWAE for the model, MIWAE for the guide.

    The reported bound is :class:`IWAE`'s with all M K particles, a lower bound. The model's parameters get its gradient and
    the guide's that of :class:`MIWAE`:

    .. math:: a_{mk} = \frac{w_{mk}}{\sum_{nj} w_{nj}}, \qquad b_{mk} = c_{mk} = \frac1M \frac{w_{mk}}{\sum_j w_{mj}}

    PIWAE with one group is IWAE. The estimator needs reparameterised sites.

    Args:
        num_particles: M K, all draws per datum.
        num_groups: M, a divisor of ``num_particles``.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: ``num_groups`` does not divide ``num_particles``, or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, https://arxiv.org/abs/1802.04537.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> piwae = pv.estimators.PIWAE(num_particles=8, num_groups=4)
        >>> piwae.bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    gradients = Gradients.SPLIT

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the mean weight of all particles, shape (B,)."""
        return iwae(weights)

    def coefficients(self, log_w: Tensor) -> Coefficients:
        """Weights normalised over all particles for the model, within each group for the guide."""
        grouped = torch.softmax(log_w.unflatten(0, (self.num_groups, -1)), 1).flatten(0, 1) / self.num_groups
        grouped = torch.where(log_w == -torch.inf, 0.0, grouped)  # all weights of a group may be zero
        return Coefficients(torch.softmax(log_w, 0), grouped, grouped)


@register("estimator")
class CIWAE(ManyParticles):
    r"""A mixture of the ELBO and the importance-weighted bound.

    .. math:: L = \beta L_{ELBO} + (1 - \beta) L_{IWAE} \le \log p(x)

    beta = 1 is the :class:`ELBO` of K particles, beta = 0 the :class:`IWAE`. The bound itself is differentiated. The estimator
    needs reparameterised sites.

    Args:
        num_particles: K.
        beta: the weight of the ELBO, in [0, 1].
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: beta lies outside [0, 1], or a site is not reparameterised.

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, https://arxiv.org/abs/1802.04537.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.CIWAE(num_particles=8, beta=0.2).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, beta: float = 0.5, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must be between 0 and 1, got {beta!r}.")
        self.beta = beta

    def reduce(self, weights: LogWeights) -> Tensor:
        """The weighted mean of both bounds, shape (B,)."""
        return self.beta * elbo(weights) + (1 - self.beta) * iwae(weights)


@register("estimator")
class Renyi(ManyParticles):
    r"""The variational Renyi bound of order alpha.

    .. math:: L_\alpha = E_q \Big[ \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha} \Big]

    It is a lower bound on log p(x) for alpha >= 0, and decreases as alpha increases; for alpha < 0 it may be below or above.
    alpha = 1 is the :class:`ELBO`, alpha = 0 the :class:`IWAE`, and the limit at minus infinity :class:`VRMax`. The bound
    itself is differentiated. The estimator needs reparameterised sites.

    Args:
        num_particles: K.
        alpha: the order, any finite number.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: alpha is not finite, or a site is not reparameterised.

    References:
        Li and Turner, Renyi Divergence Variational Inference, 2016, https://arxiv.org/abs/1602.02311.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.Renyi(num_particles=5, alpha=0.5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, alpha: float = 0.5, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if not math.isfinite(alpha):
            raise ValueError(f"alpha must be finite, got {alpha!r}: choose 'vr_max' for minus infinity.")
        self.alpha = alpha

    def reduce(self, weights: LogWeights) -> Tensor:
        """The log of the power mean of the weights, shape (B,)."""
        if self.alpha == 1.0:
            return elbo(weights)
        power = 1.0 - self.alpha
        # In float64: near alpha = 1 the division amplifies float32's rounding error.
        mean = log_mean_exp(power * weights.log_weights.double()) / power
        return mean.to(weights.log_weights.dtype)


@register("estimator", "vr_max")
class VRMax(ManyParticles):
    r"""The largest log-weight alone: the variational Renyi objective as alpha goes to minus infinity.

    .. math:: L = E_q \big[ \max_k \log w_k \big]

    It is not a bound: it exceeds the :class:`IWAE` of the same particles by at most log K, and may exceed log p(x). At K = 1 it
    is the ELBO. The objective itself is differentiated, so only the particle of the largest weight has a gradient. The
    estimator needs reparameterised sites.

    Args:
        num_particles: K.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: a site is not reparameterised.

    References:
        Li and Turner, Renyi Divergence Variational Inference, 2016, https://arxiv.org/abs/1602.02311.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.VRMax(num_particles=5).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def reduce(self, weights: LogWeights) -> Tensor:
        """The largest log-weight, shape (B,)."""
        return weights.log_weights.max(0).values


@register("estimator")
class JVI(ManyParticles):
    r"""The importance-weighted bound with its bias in 1/K removed to a given order by the jackknife.

    .. math:: L = \sum_{j=0}^m c_j \, \bar L_{K-j}, \qquad c_j = (-1)^j \frac{(K - j)^m}{(m - j)! \, j!}

    with :math:`\bar L_{K-j}` the mean :class:`IWAE` bound over all subsets that leave out j of the K particles. Its bias is
    :math:`O(K^{-(m+1)})`, and it is not a bound for m > 0; m = 0 is the IWAE. The objective itself is differentiated. Its cost
    per datum is proportional to K times K choose m. The estimator needs reparameterised sites and K > m.

    Args:
        num_particles: K.
        order: m.
        vectorize_particles: see :class:`Estimator`.

    Raises:
        ValueError: the order is negative or not below K, or a site is not reparameterised.

    References:
        Nowozin, Debiasing Evidence Approximations: On Importance-Weighted Autoencoders and Jackknife Variational Inference,
        2018, https://openreview.net/forum?id=HyZoi-WRb.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> pv.estimators.JVI(num_particles=5, order=1).bound(vae.model, vae.guide, torch.zeros(5, 9)).shape
        torch.Size([5])
    """

    def __init__(self, num_particles: int = 5, *, order: int = 1, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        if order != 0:
            order = positive_integer(order, "order")
        if order >= self.num_particles:
            raise ValueError(f"order must be below num_particles = {num_particles}, got {order!r}: raise num_particles.")
        self.order = order

    def reduce(self, weights: LogWeights) -> Tensor:
        """The jackknife combination of the log of mean weights, shape (B,)."""
        log_w, K, m = weights.log_weights, self.num_particles, self.order
        total = torch.zeros_like(log_w[0])
        for j in range(m + 1):
            kept = torch.tensor(list(itertools.combinations(range(K), K - j)), device=log_w.device)  # (K choose j, K - j)
            c = (-1) ** j * (K - j) ** m / (math.factorial(m - j) * math.factorial(j))
            total = total + c * log_mean_exp(log_w[kept], 1).mean(0)
        return torch.where((log_w == -torch.inf).all(0), -torch.inf, total)
