"""Distributions and transforms that torch, Pyro and zuko lack, or compute less exactly in float32."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import constraints
from torch import Size, Tensor, nn
from torch.distributions import AffineTransform
from torch.distributions.kl import register_kl

from ._validation import unknown

__all__ = [
    "Beta", "BetaBinomial", "ContinuousBernoulli", "Dequantized", "DiagonalNormalMixture", "DiscretizedLogistic", "FlowDistribution",
    "HeterogeneousIndependent", "HypersphereUniform", "NormalMixture", "OneHot", "OrdinalCategorical", "PowerSpherical",
    "RelaxedOneHot", "ZeroInflatedNegativeBinomial", "centre", "check_sphere", "conditioned", "flow_transform", "log_area",
    "mixture", "normalizing_flow", "same_support",
]  # fmt: skip


def centre(distribution: Any) -> Tensor:
    """The ``centre`` of a distribution if it has one, else its mean; of its batch and event shape.

    Distributions have a ``centre`` if their mean has no closed form or lies outside their support.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import PowerSpherical, centre
        >>> centre(dist.Normal(torch.ones(2), 1.0))
        tensor([1., 1.])
        >>> centre(PowerSpherical(torch.tensor([0.0, 1.0]), torch.tensor(3.0)))
        tensor([0., 1.])
    """
    return distribution.centre if hasattr(distribution, "centre") else distribution.mean


def same_support(first: Any, second: Any) -> bool:
    """Whether two supports are the same set: constraints of one class, with equal bounds and parts.

    Example:
        >>> from pyro.distributions import constraints
        >>> from pyrovae.distributions import same_support
        >>> same_support(constraints.real_vector, constraints.independent(constraints.real, 1))
        True
        >>> same_support(constraints.real_vector, constraints.simplex)
        False
    """
    if type(first) is not type(second):
        return False
    one, other = vars(first), vars(second)
    return one.keys() == other.keys() and all(_same_part(one[name], other[name]) for name in one)


def _same_part(first: Any, second: Any) -> bool:
    if isinstance(first, constraints.Constraint):
        return same_support(first, second)
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return bool(torch.equal(torch.as_tensor(first), torch.as_tensor(second)))
    return bool(first == second)


class HypersphereUniform(dist.TorchDistribution):
    r"""The uniform distribution on the unit sphere of R^L.

    .. math:: p(z) = \frac{\Gamma(L/2)}{2 \pi^{L/2}}, \quad \|z\| = 1

    Densities on the sphere are with respect to its surface measure.

    Args:
        like: a tensor of shape ``[..., L]``; the distribution has its batch shape, type and device.

    Raises:
        ValueError: L is below 2.

    Example:
        >>> import math, torch
        >>> from pyrovae.distributions import HypersphereUniform
        >>> circle = HypersphereUniform(torch.zeros(2))
        >>> math.isclose(circle.log_prob(circle.sample()), -math.log(2 * math.pi), rel_tol=1e-6)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, like: Tensor, validate_args: bool | None = None):
        check_sphere(like.shape[-1])
        self.like = like.detach()
        super().__init__(like.shape[:-1], like.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> HypersphereUniform:
        """The same distribution over a larger batch."""
        return HypersphereUniform(self.like.expand(Size(batch_shape) + self.event_shape), validate_args=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (L,)``; they depend on no parameter."""
        return _unit(self.like.new_empty(self._extended_shape(Size(sample_shape))).normal_())

    def log_prob(self, value: Tensor) -> Tensor:
        """Minus the logarithm of the sphere's area, in nats."""
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -log_area(self.event_shape[0]))

    @property
    def mean(self) -> Tensor:
        """Zero, which is not on the sphere."""
        return torch.zeros_like(self.like)


class PowerSpherical(dist.TorchDistribution):
    r"""The power spherical distribution on the unit sphere of R^L: like von Mises-Fisher, but sampled without rejection.

    .. math:: q(z) = \frac{(1 + \mu^\top z)^\kappa}{N(\kappa)}, \quad
        N(\kappa) = 2^{\alpha + \beta} \pi^\beta \frac{\Gamma(\alpha)}{\Gamma(\alpha + \beta)}, \quad
        \alpha = \tfrac{L-1}2 + \kappa, \; \beta = \tfrac{L-1}2

    A draw is :math:`t \mu + \sqrt{1 - t^2}\, \xi` with :math:`(1 + t)/2 \sim Beta(\alpha, \beta)` and :math:`\xi` uniform among
    the unit vectors orthogonal to :math:`\mu`. Draws have gradients for both parameters. The KL to :class:`HypersphereUniform`
    has a closed form, which ``torch.distributions.kl_divergence`` uses.

    Args:
        loc: mu, unit vectors of shape ``[..., L]``.
        concentration: kappa, positive, shape ``[...]``.

    Raises:
        ValueError: L is below 2.

    References:
        De Cao and Aziz, The Power Spherical Distribution, 2020, https://arxiv.org/abs/2006.04437.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import PowerSpherical
        >>> distribution = PowerSpherical(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(50.0))
        >>> bool(distribution.sample((100,)).mean(0)[2] > 0.9)
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor, validate_args: bool | None = None):
        check_sphere(loc.shape[-1])
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        self.loc = loc.expand(batch_shape + loc.shape[-1:])
        self.concentration = concentration.expand(batch_shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> PowerSpherical:
        """The same distribution over a larger batch."""
        shape = Size(batch_shape)
        return PowerSpherical(self.loc.expand(shape + self.event_shape), self.concentration.expand(shape), validate_args=False)

    @property
    def _beta(self) -> tuple[Tensor, Tensor]:
        half = torch.full_like(self.concentration, (self.event_shape[0] - 1) / 2)
        return half + self.concentration, half

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (L,)``."""
        shape = self._extended_shape(Size(sample_shape))
        eps = torch.finfo(self.loc.dtype).eps
        # The square root below has no derivative at 0 and 1, and float32 rounds draws of a concentrated distribution to 1.
        b = torch.distributions.Beta(*self._beta, validate_args=False).rsample(Size(sample_shape)).clamp(eps, 1 - eps)
        noise = self.loc.new_empty(shape).normal_()
        # The paper's Householder reflection is undefined if mu is the first axis, so noise is projected instead.
        across = _unit(noise - (noise * self.loc).sum(-1, keepdim=True) * self.loc)
        b = b.unsqueeze(-1)
        return _unit((2 * b - 1) * self.loc + 2 * (b * (1 - b)).sqrt() * across)

    @property
    def log_normalizer(self) -> Tensor:
        """log N(kappa), shape ``batch_shape``, in nats."""
        a, b = self._beta
        return (a + b) * math.log(2) + b * math.log(math.pi) + torch.lgamma(a) - torch.lgamma(a + b)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density with respect to the surface measure, shape ``[...]``, in nats."""
        # By rounding, a scalar product of unit vectors can be below -1, where the logarithm is undefined.
        along = (self.loc * value).sum(-1).clamp(min=-1 + torch.finfo(value.dtype).eps)
        return self.concentration * along.log1p() - self.log_normalizer

    def entropy(self) -> Tensor:
        """The differential entropy, shape ``batch_shape``, in nats."""
        a, b = self._beta
        return self.log_normalizer - self.concentration * (math.log(2) + torch.digamma(a) - torch.digamma(a + b))

    @property
    def mean(self) -> Tensor:
        """The mean, a vector inside the sphere, shape ``[..., L]``."""
        a, b = self._beta
        return self.loc * ((a - b) / (a + b)).unsqueeze(-1)

    @property
    def centre(self) -> Tensor:
        """The mode mu, the direction of the mean."""
        return self.loc


def log_area(dim: int) -> float:
    """The logarithm of the area of the unit sphere of R^dim.

    Example:
        >>> import math
        >>> from pyrovae.distributions import log_area
        >>> math.isclose(log_area(3), math.log(4 * math.pi))
        True
    """
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


def check_sphere(dim: int) -> None:
    """Raise an error if a sphere has less than two dimensions.

    Raises:
        ValueError: ``dim`` is below 2.
    """
    if dim < 2:
        raise ValueError(f"latent_dim must be at least 2 for a sphere, got {dim}: raise it.")


@register_kl(PowerSpherical, HypersphereUniform)
def _kl_power_spherical_uniform(q: PowerSpherical, p: HypersphereUniform) -> Tensor:
    return log_area(q.event_shape[0]) - q.entropy()


class DiagonalNormalMixture(dist.MixtureSameFamily):
    r"""A mixture of diagonal normals whose draws have gradients.

    .. math:: q(z) = \sum_c \pi_c \prod_l N(z_l \mid \mu_{cl}, \sigma_{cl}^2)

    A draw comes from one component. Differentiating it through the parameters of that component alone would miss the gradients
    of the weights and of the other components. Instead, a draw z solves :math:`F_l(z_l \mid z_{<l}; \phi) = u_l` for fixed
    uniform numbers u, where F are the conditional distribution functions, so that its derivative is
    :math:`dz = -(\partial_z F)^{-1} \partial_\phi F \, d\phi`. The Jacobian is lower triangular and has L^2 entries for each
    draw. (Pyro's ``MixtureOfDiagNormals`` divides by densities that float32 rounds to zero in 50 dimensions, and by the
    distance between means, which may be zero.)

    Args:
        mixture_distribution: a Categorical over components, batch shape ``[...]``.
        component_distribution: ``Normal(...).to_event(1)``, batch shape ``[..., C]`` and event shape ``(L,)``.

    References:
        Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018, https://arxiv.org/abs/1805.08498.
        Graves, Stochastic Backpropagation through Mixture Density Distributions, 2016, https://arxiv.org/abs/1607.05690.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> from pyrovae.distributions import DiagonalNormalMixture
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> parts = dist.Normal(torch.randn(3, 2), 1.0).to_event(1)
        >>> DiagonalNormalMixture(dist.Categorical(logits=logits), parts).rsample((5,)).requires_grad
        True
    """

    has_rsample = True

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (L,)``."""
        z = self.sample(Size(sample_shape))
        if not torch.is_grad_enabled():
            return z
        normal = self.component_distribution.base_dist
        away = (z.unsqueeze(-2) - normal.loc) / normal.scale  # [..., C, L]
        log_density = -0.5 * away**2 - normal.scale.log() - 0.5 * math.log(2 * math.pi)
        # The weight of each component given the preceding dimensions only.
        before = log_density.cumsum(-1) - log_density
        weight = torch.softmax(self.mixture_distribution.logits.unsqueeze(-1) + before, -2)
        below = torch.special.ndtr(away)
        transform = (weight * below).sum(-2)  # [..., L], the uniform numbers u
        with torch.no_grad():
            slope = -away / normal.scale  # d log N / dz
            jacobian = torch.einsum("...cl,...cj->...lj", weight * below, slope) - torch.einsum(
                "...l,...cl,...cj->...lj", transform, weight, slope
            )
            density = (weight * log_density.exp()).sum(-2).clamp(min=torch.finfo(z.dtype).tiny)
            jacobian = jacobian.tril(-1) + torch.diag_embed(density)
        moved = (transform - transform.detach()).unsqueeze(-1)  # zero, with a gradient
        return z - torch.linalg.solve_triangular(jacobian, moved, upper=False).squeeze(-1)


def mixture(logits: Tensor, components: Any) -> dist.MixtureSameFamily:
    """The mixture of C components, batch shape ``(C,)``, with weights ``softmax(logits)``; its draws have no gradients.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import mixture
        >>> type(mixture(torch.zeros(3), dist.Normal(torch.randn(3, 2), 1.0).to_event(1))).__name__
        'NormalMixture'
    """
    independent = isinstance(components, torch.distributions.Independent) and components.reinterpreted_batch_ndims == 1
    family = NormalMixture if independent and isinstance(components.base_dist, dist.Normal) else dist.MixtureSameFamily
    return family(dist.Categorical(logits=logits), components)


class NormalMixture(dist.MixtureSameFamily):
    r"""A mixture of diagonal normals whose log-density takes memory for C numbers per draw, not for C L.

    .. math:: \log N(z \mid \mu_c, \sigma_c^2) = \sum_l \Big( \frac{z_l \mu_{cl}}{\sigma_{cl}^2} - \frac{z_l^2}{2 \sigma_{cl}^2}
        \Big) - \sum_l \Big( \frac{\mu_{cl}^2}{2 \sigma_{cl}^2} + \log \sigma_{cl} + \tfrac12 \log 2 \pi \Big)

    is a product of matrices. Its terms are as large as :math:`(z / \sigma)^2` and cancel, so it is computed in float64, which
    is more exact than the sum of squared distances in float32. If z is float64 already, or the device has no float64, the sum
    of squared distances is used.

    Args:
        mixture_distribution: a Categorical over components, batch shape ``()``.
        component_distribution: ``Normal(...).to_event(1)``, batch shape ``(C,)`` and event shape ``(L,)``.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import NormalMixture
        >>> parts = dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)
        >>> NormalMixture(dist.Categorical(logits=torch.zeros(2)), parts).log_prob(torch.zeros(1))
        tensor(-2.2258)
    """

    def __init__(self, mixture_distribution: Any, component_distribution: Any, validate_args: bool | None = None):
        super().__init__(mixture_distribution, component_distribution, validate_args)
        # Kept as they are before a plate expands them over data and particles.
        self._logits, self._normal = mixture_distribution.logits, component_distribution.base_dist

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> NormalMixture:
        """The same distribution over a larger batch."""
        new = super().expand(batch_shape, type(self).__new__(type(self)) if _instance is None else _instance)
        new._logits, new._normal = self._logits, self._normal
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log p(z), in nats; shape of ``value`` without its last dimension."""
        loc, scale = self._normal.loc, self._normal.scale
        if value.dtype == torch.float64 or value.device.type == "mps" or loc.dim() > 2:
            return super().log_prob(value)
        if self._validate_args:
            self._validate_sample(value)
        z, loc, scale = value.double(), loc.double(), scale.double()
        precision = scale.square().reciprocal()  # (C, L)
        constant = -(0.5 * loc.square() * precision + scale.log()).sum(-1) - 0.5 * loc.shape[-1] * math.log(2 * math.pi)
        products = torch.cat([z.square(), z], -1) @ torch.cat([-0.5 * precision, loc * precision], -1).mT  # (..., C)
        log_weight = torch.log_softmax(self._logits.double(), -1)
        log_prob = torch.logsumexp(products + (constant + log_weight), -1).to(value.dtype)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


class OneHot(dist.OneHotCategorical):
    r"""A categorical distribution over one-hot vectors, whose draws can be captured in a graph.

    .. math:: p(z) = \prod_l \pi_l^{z_l}

    Args:
        logits: log pi up to a constant, shape ``[..., L]``.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import OneHot
        >>> OneHot(logits=torch.tensor([0.0, 200.0])).sample((2,))
        tensor([[0., 1.],
                [0., 1.]])
    """

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (L,)``."""
        which = self._categorical.sample(Size(sample_shape)).unsqueeze(-1)
        return self.logits.new_zeros(self._extended_shape(Size(sample_shape))).scatter(-1, which, 1.0)


class RelaxedOneHot(dist.RelaxedOneHotCategorical):
    r"""The concrete distribution on the simplex (a relaxed one-hot vector), whose draws float32 does not round to zero.

    .. math:: q(z) = \Gamma(L) \, \tau^{L-1} \Big( \sum_l \pi_l z_l^{-\tau} \Big)^{-L} \prod_l \pi_l z_l^{-\tau - 1}

    This is the density with respect to Lebesgue measure on the first L - 1 coordinates.

    Args:
        temperature: tau, a scalar tensor.
        logits: log pi up to a constant, shape ``[..., L]``.

    References:
        Maddison, Mnih and Teh, The Concrete Distribution, 2017, https://arxiv.org/abs/1611.00712.
        Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, https://arxiv.org/abs/1611.01144.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import RelaxedOneHot
        >>> distribution = RelaxedOneHot(torch.tensor(0.1), logits=torch.tensor([0.0, 50.0]))
        >>> bool(distribution.log_prob(distribution.sample((100,))).isfinite().all())
        True
    """

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + (L,)``."""
        return self._off_the_edge(super().rsample(Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """As :meth:`rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    @staticmethod
    def _off_the_edge(z: Tensor) -> Tensor:
        return z.clamp(min=torch.finfo(z.dtype).tiny)

    @property
    def centre(self) -> Tensor:
        """The probabilities of the categories; the mean has no closed form."""
        return self.probs


class FlowDistribution(ZukoToPyro):
    """A zuko flow as a Pyro distribution, with ``sample``, ``rsample`` and a support.

    The log-density of a draw is kept from sampling, so that an inverse flow need not be inverted. Any other tensor is inverted,
    even a detached copy of a draw.

    Args:
        dist: a ``zuko.distributions.NormalizingFlow``.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> from pyrovae.distributions import FlowDistribution, flow_transform, normalizing_flow
        >>> base = dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)
        >>> distribution = FlowDistribution(normalizing_flow(flow_transform("maf", 3)(), base))
        >>> bool(torch.allclose(distribution.log_prob(torch.zeros(3)), base.log_prob(torch.zeros(3))))
        True
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, shape ``sample_shape + batch_shape + event_shape``."""
        return self(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, shape ``[...]``, in nats."""
        known = self.cache.get(value)
        # The density of a draw that was made without gradients has none either.
        if known is not None and (known.requires_grad or not torch.is_grad_enabled()):
            return known
        return self.dist.log_prob(value)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        """The same distribution over a larger batch."""
        return FlowDistribution(self.dist.expand(Size(batch_shape)))

    @property
    def mean(self) -> Tensor:
        """A flow's mean has no closed form.

        Raises:
            NotImplementedError: always; average draws, or take the ``centre``.
        """
        raise NotImplementedError("A flow's mean has no closed form: average draws, or take its centre.")

    @property
    def centre(self) -> Tensor:
        """The base's centre, transformed by the flow."""
        return self.dist.transform.inv(centre(self.dist.base))


FLOWS = ("coupling", "maf", "nsf")


def flow_transform(family: str, dim: int, *, context: int = 0, depth: int = 3, hidden: Sequence[int] = (64, 64)) -> nn.Module:
    r"""A stack of autoregressive transforms of R^dim, starting as the identity.

    .. math:: y_l = \exp(a_l(x_{<l}, c)) \, x_l + b_l(x_{<l}, c) \quad \text{or a monotone rational-quadratic spline}

    Every second layer reverses the order of the dimensions. A layer takes one pass of its network, and its inverse takes dim
    passes, or two for a coupling.

    Args:
        family: ``"coupling"``, affine in two groups; ``"maf"``, affine one by one; ``"nsf"``, splines on [-5, 5] one by one.
        dim: the dimension.
        context: the number of features of the context c. ``module(c)`` returns the transform, ``module()`` if there are none.
        depth: the number of layers.
        hidden: widths of each layer's masked network.

    Raises:
        ValueError: the family is none of the three.

    References:
        Dinh, Krueger and Bengio, NICE, 2014, https://arxiv.org/abs/1410.8516.
        Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, 2016, https://arxiv.org/abs/1605.08803.
        Germain, Gregor, Murray and Larochelle, MADE, 2015, https://arxiv.org/abs/1502.03509.
        Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, 2017,
        https://arxiv.org/abs/1705.07057.
        Durkan, Bekasov, Murray and Papamakarios, Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import flow_transform
        >>> flow_transform("coupling", 4, context=2)(torch.randn(7, 2))(torch.ones(7, 4)).shape
        torch.Size([7, 4])
    """
    zuko = _zuko()
    if family not in FLOWS:
        raise ValueError(unknown("family", family, FLOWS))
    options: dict[str, Any] = {}
    if family == "nsf":
        bins = 8
        options = {"univariate": zuko.transforms.MonotonicRQSTransform, "shapes": [(bins,), (bins,), (bins - 1,)]}
    order, layers = torch.arange(dim), []
    for _ in range(depth):
        layer = zuko.flows.MaskedAutoregressiveTransform(
            dim,
            context,
            # zuko's own coupling computes the indices of its groups in each pass, which cannot be captured in a graph.
            passes=2 if family == "coupling" else dim,
            order=order,
            hidden_features=hidden,
            activation=nn.ELU,
            **options,
        )
        _prepare(layer)
        layers.append(layer)
        order = order.flip(0)
    return zuko.lazy.LazyComposedTransform(*layers)


def normalizing_flow(transform: Any, base: Any) -> Any:
    """The distribution of x if ``transform(x)`` follows ``base``: the transform gives densities, and its inverse samples."""
    return _zuko().distributions.NormalizingFlow(transform, base)


def _prepare(layer: nn.Module) -> None:
    """Make a layer the identity, and leave only its parameters in its state."""
    for module in layer.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer, persistent=False)  # orders and masks follow from the arguments
    last = [module for module in layer.modules() if isinstance(module, nn.Linear)][-1:]
    # In one dimension without a context there is no network, and the parameters are the transform's own.
    for parameter in (last[0] if last else layer).parameters():
        nn.init.zeros_(parameter)


def _zuko() -> Any:
    # Importing zuko switches off the validation of all distributions, so the setting is restored.
    validate = torch.distributions.Distribution._validate_args
    try:
        import zuko
    finally:
        torch.distributions.Distribution._validate_args = validate
    return zuko


def _unit(v: Tensor) -> Tensor:
    return v / torch.linalg.vector_norm(v, dim=-1, keepdim=True)


class ContinuousBernoulli(dist.ContinuousBernoulli):
    r"""The continuous Bernoulli distribution from logits, accurate to rounding at any logit.

    .. math:: p(x) = \frac{\ell}{e^\ell - 1} e^{\ell x}, \qquad x \in [0, 1], \quad \ell \in \mathbb{R}

    torch computes its constant from the probability, which saturates: in float32 its density at a logit of 50 integrates to
    0.3, and its mean near a logit of 0 is wrong in the fourth digit.

    Args:
        logits: :math:`\ell`, of the batch shape.

    References:
        Loaiza-Ganem and Cunningham, The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders, 2019,
        https://arxiv.org/abs/1907.06845.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import ContinuousBernoulli
        >>> ContinuousBernoulli(logits=torch.tensor([0.0, 50.0])).mean
        tensor([0.5000, 0.9800])
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ContinuousBernoulli:
        """The same distribution over a larger batch."""
        return ContinuousBernoulli(self.logits.expand(torch.Size(batch_shape)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        # With t = |l|/2 the constant is 2 t coth t; its logarithm's gradient cancels near zero, where the series takes over.
        half = self.logits.abs() / 2
        small = half < 0.03
        t = torch.where(small, 1.0, half)
        square = torch.where(small, half, 0.0).square()
        series = square * (1 / 3 - square * (7 / 90 - square * (62 / 2835)))
        log_constant = math.log(2) + torch.where(small, series, (t / torch.tanh(t)).log())
        return self.logits * value - F.softplus(self.logits) + log_constant

    @property
    def mean(self) -> Tensor:
        """The mean, of the batch shape."""
        small = self.logits.abs() < 0.06
        safe = torch.where(small, 1.0, self.logits)
        series = self.logits / 12 - self.logits**3 / 720 + self.logits**5 / 30240
        return 0.5 + torch.where(small, series, 0.5 / torch.tanh(safe / 2) - 1 / safe)

    @property
    def variance(self) -> Tensor:
        """The variance, of the batch shape."""
        small = self.logits.abs() < 0.2
        safe = torch.where(small, 1.0, self.logits.abs().clamp(max=60.0))  # past 60 the second term is lost in rounding
        series = 1 / 12 - self.logits**2 / 240 + self.logits**4 / 6048 - self.logits**6 / 172800
        return torch.where(small, series, torch.where(small, 1.0, self.logits).pow(-2) - 0.25 / torch.sinh(safe / 2) ** 2)

    def icdf(self, value: Tensor) -> Tensor:
        """The quantile at ``value``."""
        # Computed at -|l|, where the exponential is below one; the other sign is its mirror image. abs() has no gradient at 0.
        size = torch.where(self.logits > 0, self.logits, -self.logits)
        safe = torch.where(size < 1e-4, 1.0, size)
        level = torch.where(self.logits > 0, 1 - value, value)
        # The quantile at level one is one for any logit. If expm1 rounds to -1, the logarithm would be infinite there.
        last = level == 1
        exact = torch.log1p(torch.where(last, 0.0, level) * torch.expm1(-safe)) / -safe
        low = torch.where(size < 1e-4, level - level * (1 - level) * size / 2, torch.where(last, 1.0, exact)).clamp(0.0, 1.0)
        return torch.where(self.logits > 0, 1 - low, low)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with a gradient, by the inverse of the distribution function."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.icdf(torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws."""
        with torch.no_grad():
            return self.rsample(sample_shape)


class _OpenUnitInterval(constraints.Constraint):
    def check(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)


class Beta(dist.Beta):
    """torch's beta distribution on the open interval (0, 1).

    At 0 and 1 the density is zero or infinite, so data there are refused. torch's support includes both.

    Args:
        concentration1: alpha, of any shape.
        concentration0: beta.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import Beta
        >>> Beta(torch.tensor(2.0), torch.tensor(3.0)).support.check(torch.tensor([0.0, 0.5, 1.0]))
        tensor([False,  True, False])
    """

    support = _OpenUnitInterval()

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Beta:
        """The same distribution over a larger batch."""
        return super().expand(torch.Size(batch_shape), self._get_checked_instance(Beta, _instance))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with a gradient, clamped to the open interval."""
        value = super().rsample(torch.Size(sample_shape))
        limits = torch.finfo(value.dtype)
        return value.clamp(limits.tiny, 1 - limits.eps)


class BetaBinomial(dist.BetaBinomial):
    r"""Pyro's beta-binomial with a log-probability that is computed in float64, and returned in the parameters' type.

    .. math:: \log p(x) = \log \binom{n}{x} + \log \frac{B(x + \alpha, n - x + \beta)}{B(\alpha, \beta)}

    Near a binomial the concentrations are in the thousands, and the difference of logarithms of the gamma function loses a tenth
    of a nat in float32.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import BetaBinomial
        >>> near = BetaBinomial(torch.tensor(2e6), torch.tensor(1e6), total_count=16)
        >>> binomial = torch.distributions.Binomial(16, torch.tensor(2 / 3))
        >>> bool((near.log_prob(torch.tensor(9.0)) - binomial.log_prob(torch.tensor(9.0))).abs() < 1e-4)
        True
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of counts, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        a, b, counts, number = (each.double() for each in (self.concentration1, self.concentration0, value, self.total_count))
        if not any(self.total_count.stride()):  # one count for all, which need not be looked at for each particle
            number = self.total_count[(0,) * self.total_count.dim()].double()
        left = number - counts
        log_prob = (number + 1).lgamma() - (counts + 1).lgamma() - (left + 1).lgamma()
        log_prob = log_prob + (a + counts).lgamma() - a.lgamma() + (b + left).lgamma() - b.lgamma()
        return (log_prob + (a + b).lgamma() - (a + b + number).lgamma()).to(self.concentration1.dtype)


class OrdinalCategorical(dist.Categorical):
    r"""A categorical distribution over the levels 0, 1, ..., n-1 of an ordered quantity, as floats.

    .. math:: P(x = k) = \operatorname{softmax}(a)_k

    Unlike those of torch's class, its samples have the type of the logits, and its mean and variance are those of the levels.

    Args:
        logits: shape ``(*batch_shape, n)``.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import OrdinalCategorical
        >>> OrdinalCategorical(logits=torch.zeros(3)).mean
        tensor(1.)
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> OrdinalCategorical:
        """The same distribution over a larger batch."""
        return super().expand(torch.Size(batch_shape), self._get_checked_instance(OrdinalCategorical, _instance))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, as floats."""
        return super().sample(torch.Size(sample_shape)).to(self.logits.dtype)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self.logits.shape[-1], dtype=self.logits.dtype, device=self.logits.device)

    @property
    def mean(self) -> Tensor:
        """The mean level."""
        return (self.probs * self._levels).sum(-1)

    @property
    def variance(self) -> Tensor:
        """The variance of the level."""
        return (self.probs * (self._levels - self.mean[..., None]).square()).sum(-1)


class DiscretizedLogistic(dist.TorchDistribution):
    r"""A logistic variable rounded to the levels 0, 1, ..., n-1; the end levels take the tails.

    .. math:: P(x = k) = \sigma\Big(\frac{k + \frac12 - \mu}{s}\Big) - \sigma\Big(\frac{k - \frac12 - \mu}{s}\Big)

    The first term is one at k = n-1, and the second is zero at k = 0, so that the probabilities of all levels sum to one.

    Args:
        loc: mu, in levels.
        scale: s, in levels.
        num_levels: n, at least 2.

    References:
        Salimans, Karpathy, Chen and Kingma, PixelCNN++, 2017, https://arxiv.org/abs/1701.05517.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import DiscretizedLogistic
        >>> distribution = DiscretizedLogistic(torch.tensor(3.0), torch.tensor(50.0), num_levels=256)
        >>> round(distribution.log_prob(torch.arange(256.0)).exp().sum().item(), 5)
        1.0
    """

    arg_constraints: ClassVar[dict[str, Any]] = {"loc": constraints.real, "scale": constraints.positive}

    def __init__(self, loc: Tensor, scale: Tensor, num_levels: int, validate_args: bool | None = None):
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.num_levels = num_levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        """The levels."""
        return constraints.integer_interval(0, self.num_levels - 1)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> DiscretizedLogistic:
        """The same distribution over a larger batch."""
        shape = torch.Size(batch_shape)
        return DiscretizedLogistic(self.loc.expand(shape), self.scale.expand(shape), self.num_levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability, in nats."""
        if self._validate_args:
            self._validate_sample(value)
        # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)) keeps its digits where both tails round to one.
        below = F.logsigmoid((value + 0.5 - self.loc) / self.scale)
        above = F.logsigmoid((self.loc - value + 0.5) / self.scale)
        both = torch.log(-torch.expm1(-1 / self.scale))
        first, last = value <= 0, value >= self.num_levels - 1
        return torch.where(last, 0.0, below) + torch.where(first, 0.0, above) + torch.where(first | last, 0.0, both)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws, as floats."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            u = torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device)
            return (self.loc + self.scale * torch.logit(u)).round().clamp(0, self.num_levels - 1)

    def _moment(self, power: int) -> Tensor:
        # E x = sum_k P(x > k), and E x^2 = sum_k (2k + 1) P(x > k); one level at a time, or memory grows by the levels.
        total = torch.zeros_like(self.loc)
        for level in range(self.num_levels - 1):
            factor = 1 if power == 1 else 2 * level + 1
            total = total + factor * torch.sigmoid((self.loc - level - 0.5) / self.scale)
        return total

    @property
    def mean(self) -> Tensor:
        """The mean level."""
        return self._moment(1)

    @property
    def variance(self) -> Tensor:
        """The variance of the level."""
        return self._moment(2) - self.mean.square()


class ZeroInflatedNegativeBinomial(dist.ZeroInflatedNegativeBinomial):
    r"""Pyro's zero-inflated negative binomial, computed from the logits of its gate.

    .. math:: p(x) = \pi \, [x = 0] + (1 - \pi) \, \mathrm{NB}(x), \qquad \pi = \sigma(g)

    Once a mean or a draw has been computed, Pyro's class keeps the probability of its gate and uses it in ``log_prob``, which
    loses digits, and it can no longer be expanded. It also refuses logits whose probability rounds to one.

    Args:
        total_count: theta, the dispersion.
        logits: log mu - log theta.
        gate_logits: g.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import ZeroInflatedNegativeBinomial
        >>> ZeroInflatedNegativeBinomial(torch.tensor(2.0), torch.tensor(0.0), torch.tensor(0.0)).mean
        tensor(1.)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {
        "total_count": constraints.greater_than_eq(0),
        "logits": constraints.real,
        "gate_logits": constraints.real,
    }

    def __init__(self, total_count: Any, logits: Tensor, gate_logits: Tensor, validate_args: bool | None = None):
        super().__init__(total_count, logits=logits, gate_logits=gate_logits, validate_args=validate_args)

    @property
    def gate(self) -> Tensor:
        """The probability of an extra zero."""
        return torch.sigmoid(self.gate_logits)


class _EachColumn(constraints.Constraint):
    """One constraint for each group of columns; the check is elementwise."""

    event_dim = 0

    def __init__(self, parts: Sequence[tuple[Any, Tensor]], order: Tensor, is_discrete: bool):
        self.parts, self.order, self.is_discrete = parts, order, is_discrete

    def check(self, value: Tensor) -> Tensor:
        checked = [constraint.check(value[..., columns]) for constraint, columns in self.parts]
        return torch.cat(checked, -1)[..., self.order]


def conditioned(distribution: Any, *given: str) -> Any:
    """The same distribution with an attribute ``conditional_on``, the names of what it conditions on, which ``expand`` keeps.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import conditioned
        >>> conditioned(dist.Poisson(torch.ones(3)), "the total").expand((2, 3)).conditional_on
        ('the total',)
    """
    inner = distribution
    while isinstance(inner, torch.distributions.Independent):
        inner = inner.base_dist
    # An attribute of the class, since expand makes another instance without the attributes of this one.
    family: Any = type(inner)
    inner.__class__ = _conditioned_class(family, given)
    return distribution


@cache
def _conditioned_class(family: Any, given: tuple[str, ...]) -> Any:
    return type(family)(family.__name__, (family,), {"conditional_on": given, "__doc__": family.__doc__})


class HeterogeneousIndependent(dist.TorchDistribution):
    r"""Independent columns of a table, whose groups have distributions of different kinds; its batch shape is ``(..., D)``.

    .. math:: \log p(x_d) = \log p_{g(d)}(x_d)

    Args:
        distributions: one for each group, batch shape ``(..., n_g)`` and empty event shape.
        columns: for each group the positions of its columns among the D, shape ``(n_g,)``.
        order: the position of each column when the groups are concatenated; computed from ``columns`` by default.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import HeterogeneousIndependent
        >>> distributions = [dist.Poisson(torch.ones(1)), dist.Normal(torch.zeros(2), 1.0)]
        >>> HeterogeneousIndependent(distributions, [torch.tensor([1]), torch.tensor([0, 2])]).log_prob(torch.zeros(3))
        tensor([-0.9189, -1.0000, -0.9189])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        distributions: Sequence[Any],
        columns: Sequence[Tensor],
        order: Tensor | None = None,
        validate_args: bool | None = None,
    ):
        self.distributions, self.columns = list(distributions), list(columns)
        self.order = torch.argsort(torch.cat(self.columns)) if order is None else order
        leading = torch.broadcast_shapes(*(distribution.batch_shape[:-1] for distribution in self.distributions))
        super().__init__(torch.Size((*leading, len(self.order))), validate_args=validate_args)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> Any:
        """The support of each column."""
        supports = [distribution.support for distribution in self.distributions]
        discrete = all(support.is_discrete for support in supports)
        return _EachColumn(list(zip(supports, self.columns, strict=True)), self.order, discrete)

    @property
    def conditional_on(self) -> tuple[str, ...]:
        """What the distributions of the groups condition on."""
        return tuple(what for distribution in self.distributions for what in getattr(distribution, "conditional_on", ()))

    @property
    def fraction_discrete(self) -> float:
        """The fraction of columns that are discrete."""
        return sum(
            distribution.batch_shape[-1] for distribution in self.distributions if distribution.support.is_discrete
        ) / len(self.order)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> HeterogeneousIndependent:
        """The same distribution over a larger batch."""
        leading = tuple(batch_shape)[:-1]
        distributions = [
            distribution.expand(torch.Size((*leading, distribution.batch_shape[-1]))) for distribution in self.distributions
        ]
        return HeterogeneousIndependent(distributions, self.columns, self.order, validate_args=False)

    def _together(self, parts: list[Tensor]) -> Tensor:
        leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], -1)[..., self.order]

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-probability of each column, in nats."""
        return self._together(
            [
                distribution.log_prob(value[..., columns])
                for distribution, columns in zip(self.distributions, self.columns, strict=True)
            ]
        )

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws."""
        return self._together([distribution.sample(torch.Size(sample_shape)) for distribution in self.distributions])

    @property
    def mean(self) -> Tensor:
        """The mean of each column."""
        return self._together([distribution.mean for distribution in self.distributions])

    @property
    def variance(self) -> Tensor:
        """The variance of each column."""
        return self._together([distribution.variance for distribution in self.distributions])


class _Noisy(constraints.Constraint):
    """Values of a support times n that are not all integers."""

    event_dim = 0
    is_discrete = False

    def __init__(self, base: Any, num_levels: int):
        self.base, self.num_levels = base, num_levels

    def check(self, value: Tensor) -> Tensor:
        return self.base.check(value / self.num_levels) & (value != value.floor()).any()


class Dequantized(dist.TransformedDistribution):
    r"""The density of v = n y, an integer level plus uniform noise, for a distribution of y on the unit scale.

    .. math:: \log p(v) = \log p_y(v / n) - \log n

    Args:
        base_dist: the distribution of y, with an empty event shape.
        num_levels: n, at least 2.

    References:
        Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, https://arxiv.org/abs/1511.01844.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import ContinuousBernoulli, Dequantized
        >>> Dequantized(ContinuousBernoulli(torch.zeros(())), 256).log_prob(torch.tensor(3.7)).exp() * 256
        tensor(1.)
    """

    support_cure = "add noise with pyrovae.data.dequantize to"

    def __init__(self, base_dist: Any, num_levels: int, validate_args: bool | None = None):
        self.num_levels = num_levels
        super().__init__(base_dist, [AffineTransform(0.0, float(num_levels))], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The base's support times n, without values that are all integers: those are levels without noise."""
        return _Noisy(self.base_dist.support, self.num_levels)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Dequantized:
        """The same distribution over a larger batch."""
        return Dequantized(self.base_dist.expand(torch.Size(batch_shape)), self.num_levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density, in nats. It is not checked that noise was added."""
        if self._validate_args and not bool(self.base_dist.support.check(value / self.num_levels).all()):
            raise ValueError(f"A value lies outside the support of {type(self.base_dist).__name__} times {self.num_levels}.")
        return self.base_dist.log_prob(value / self.num_levels) - math.log(self.num_levels)

    @property
    def mean(self) -> Tensor:
        """The mean of v."""
        return self.num_levels * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """The variance of v."""
        return self.num_levels**2 * self.base_dist.variance


_RENAMED = {"Levels": "OrdinalCategorical", "Columns": "HeterogeneousIndependent"}


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        message = f"pyrovae.distributions.{name} is now {_RENAMED[name]}, and the old name goes in version 0.3."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return globals()[_RENAMED[name]]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
