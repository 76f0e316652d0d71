"""Encoders: ``encoder(x)`` returns q(z|x), batch shape ``[...]`` and event shape ``(latent_dim,)``.

A body turns a datum into features; the encoder adds the linear heads that turn features into the parameters of q.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from . import distributions
from ._validation import positive_integer, positive_number, unknown
from .distributions import FlowDistribution, check_sphere, flow_transform, normalizing_flow, same_support
from .nn import as_shape, as_widths
from .registry import build, find, register

__all__ = [
    "Categorical", "DiagonalNormal", "Encoder", "Flow", "FullCovarianceNormal", "LowRankNormal", "Mixture", "PowerSpherical",
    "RelaxedOneHot",
]  # fmt: skip


class Encoder(nn.Module):
    """A module that returns q(z|x); concrete encoders make their heads and implement ``forward``.

    Args:
        body: the network from a datum to features.
        latent_dim: L, the number of latent dimensions.
        num_features: the number of features; by default that of ``body.out_shape``.
        in_scale: the data are multiplied by it before the body; 1/16 for counts up to 16, say.

    Raises:
        ValueError: the number of features is not known, ``num_features`` is not that of the body, or a number is not positive.

    Attributes:
        support: the set on which q(z|x) is a density, which must be that of the prior.
    """

    support: ClassVar[constraints.Constraint] = constraints.real_vector

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__()
        shape: Any = getattr(body, "out_shape", num_features)
        if shape is None:
            raise ValueError(
                f"The body must have an attribute out_shape, got a {type(body).__name__} without: pass num_features=... to "
                f"{type(self).__name__}."
            )
        self.feature_shape = as_shape(shape)
        self.num_features = math.prod(self.feature_shape)
        if num_features is not None and num_features != self.num_features:
            raise ValueError(
                f"num_features must be {self.num_features}, as out_shape of {type(body).__name__} says, got {num_features}: "
                f"leave it out."
            )
        self.body, self.latent_dim = body, positive_integer(latent_dim, "latent_dim")
        self.in_scale: float = positive_number(in_scale, "in_scale")

    def features(self, x: Tensor) -> Tensor:
        """The body's output for data ``x``, shape ``[..., num_features]``."""
        if self.in_scale != 1.0:  # otherwise a copy of the data would take a hundredth of the time of a small step
            x = x * self.in_scale
        return self.body(x).flatten(-len(self.feature_shape))

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        raise TypeError(f"{type(self).__name__} must implement forward(x) and return a distribution.")


@register("encoder")
class DiagonalNormal(Encoder):
    r"""A Gaussian with independent dimensions.

    .. math:: q(z \mid x) = \prod_l N(z_l \mid \mu_l(x), \sigma_l(x)^2), \quad \sigma = \exp(s(x))

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, https://arxiv.org/abs/1312.6114.

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
    r"""A Gaussian with a full covariance, given by its Cholesky factor.

    .. math:: q(z \mid x) = N(z \mid \mu(x), L(x) L(x)^\top), \quad L_{ii} = \exp(s_i(x)), \quad L_{ij} = c_{ij}(x), \; i > j

    The posterior of a linear-Gaussian model has this form, so that its bound can be exact.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.

    References:
        Tipping and Bishop, Probabilistic Principal Component Analysis, 1999, https://doi.org/10.1111/1467-9868.00196.
        Lucas, Tucker, Grosse and Norouzi, Don't Blame the ELBO!, 2019, https://arxiv.org/abs/1911.02469.

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


@register("encoder")
class LowRankNormal(Encoder):
    r"""A Gaussian whose covariance is a low-rank matrix plus a diagonal.

    .. math:: q(z \mid x) = N(z \mid \mu(x), W(x) W(x)^\top + \operatorname{diag}(\sigma(x)^2)), \quad \sigma = \exp(s(x))

    Each scale starts at one. W starts small and equal for all data, but not at zero, which is a saddle point.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.
        rank: R, the columns of W.

    Raises:
        ValueError: ``rank`` is not a positive integer.

    References:
        Ong, Nott and Smith, Gaussian Variational Approximation with a Factor Covariance Structure, 2018,
        https://arxiv.org/abs/1701.03208.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import LowRankNormal
        >>> from pyrovae.nn import MLP
        >>> LowRankNormal(MLP(6, [8]), 5, rank=2)(torch.zeros(3, 6)).cov_factor.shape
        torch.Size([3, 5, 2])
    """

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0, rank: int = 2):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.rank = positive_integer(rank, "rank")
        self.loc = _head(self.num_features, self.latent_dim)
        self.log_scale = _flat_head(self.num_features, self.latent_dim)
        self.factor = _flat_head(self.num_features, self.latent_dim * self.rank)
        nn.init.normal_(self.factor.bias, std=0.1)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h = self.features(x)
        factor = self.factor(h).unflatten(-1, (self.latent_dim, self.rank))
        return dist.LowRankMultivariateNormal(self.loc(h), factor, (2 * self.log_scale(h)).exp())


@register("encoder")
class Mixture(Encoder):
    r"""A mixture of diagonal Gaussians, for posteriors with several modes.

    .. math:: q(z \mid x) = \sum_{c=1}^{C} \pi_c(x) \prod_l N(z_l \mid \mu_{cl}(x), \sigma_{cl}(x)^2)

    Draws have gradients for all parameters, including the weights, by implicit reparameterisation
    (:class:`pyrovae.distributions.DiagonalNormalMixture`), so every estimator can train it.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.
        components: C.

    Raises:
        ValueError: ``components`` is not a positive integer.

    References:
        Morningstar et al., Automatic Differentiation Variational Inference with Mixtures, 2021,
        https://arxiv.org/abs/2003.01687.
        Figurnov, Mohamed and Mnih, Implicit Reparameterization Gradients, 2018, https://arxiv.org/abs/1805.08498.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import Mixture
        >>> from pyrovae.nn import MLP
        >>> Mixture(MLP(6, [8]), 2, components=4)(torch.zeros(3, 6)).component_distribution.batch_shape
        torch.Size([3, 4])
    """

    def __init__(
        self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0, components: int = 3
    ):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.components = positive_integer(components, "components")
        self.logits = _flat_head(self.num_features, self.components)
        self.loc = _head(self.num_features, self.components * self.latent_dim)
        self.log_scale = _flat_head(self.num_features, self.components * self.latent_dim)
        # Equal components would get equal gradients. Biases make them differ even if all features are zero.
        nn.init.normal_(self.loc.bias)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h, shape = self.features(x), (self.components, self.latent_dim)
        loc, log_scale = self.loc(h).unflatten(-1, shape), self.log_scale(h).unflatten(-1, shape)
        parts = dist.Normal(loc, log_scale.exp()).to_event(1)  # batch [..., C], event (L,)
        return distributions.DiagonalNormalMixture(dist.Categorical(logits=self.logits(h)), parts)


@register("encoder")
class Flow(Encoder):
    r"""A normalising flow on top of another encoder: an invertible g, given the features h, transforms its draws.

    .. math:: z = g(\epsilon; h(x)), \; \epsilon \sim q_0(\epsilon \mid x), \quad
        \log q(z \mid x) = \log q_0(\epsilon \mid x) - \log \left| \det \frac{\partial g}{\partial \epsilon} \right|

    g starts as the identity. A draw and its density take one pass of the networks. The density at any other point, such as a
    detached draw of ``stl`` or ``dreg``, takes L passes, or two for a coupling.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.
        base: the name of the encoder whose draws are transformed; it shares the body.
        family: ``"iaf"``, inverse autoregressive and affine; ``"coupling"``, affine in two halves; ``"nsf"``, inverse
            autoregressive rational-quadratic splines on [-5, 5].
        depth: the number of transforms.
        hidden: widths of each transform's network.

    Raises:
        ValueError: the family is none of these, the base is not a density on all real vectors, or a number is not positive.

    References:
        Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016, https://arxiv.org/abs/1606.04934.
        Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015, https://arxiv.org/abs/1505.05770.
        Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, 2016, https://arxiv.org/abs/1605.08803.
        Durkan, Bekasov, Murray and Papamakarios, Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import Flow
        >>> from pyrovae.nn import MLP
        >>> Flow(MLP(6, [8]), 2, base="full_covariance_normal")(torch.zeros(3, 6)).rsample((5,)).shape
        torch.Size([5, 3, 2])
    """

    def __init__(
        self,
        body: nn.Module,
        latent_dim: int,
        num_features: int | None = None,
        in_scale: float = 1.0,
        base: str = "diagonal_normal",
        family: str = "iaf",
        depth: int = 2,
        hidden: Sequence[int] = (64,),
    ):
        super().__init__(body, latent_dim, num_features, in_scale)
        families = {"iaf": "maf", "coupling": "coupling", "nsf": "nsf"}
        if family not in families:
            raise ValueError(unknown("family", family, families))
        below: type[Encoder] = find("encoder", base)
        if not same_support(below.support, constraints.real_vector):
            raise ValueError(f"base must be an encoder on all real vectors, got {base!r}: choose 'diagonal_normal', say.")
        self.init_arguments = {"base": base}
        # The base takes features as its data, so that the body belongs to one module.
        self.base = build(
            "encoder", base, body=nn.Identity(), latent_dim=self.latent_dim, num_features=self.num_features, in_scale=1.0
        )
        self.family, self.depth, self.hidden = family, positive_integer(depth, "depth"), as_widths(hidden)
        self.transform = flow_transform(
            families[family], self.latent_dim, context=self.num_features, depth=self.depth, hidden=self.hidden
        )

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h = self.features(x)
        # The inverse, since an autoregressive transform takes one pass in one direction only, and a guide draws.
        return FlowDistribution(normalizing_flow(self.transform(h).inv, self.base(h)))


@register("encoder")
class PowerSpherical(Encoder):
    r"""A distribution around a direction on the unit sphere of R^L, for the prior ``hypersphere_uniform``.

    .. math:: q(z \mid x) \propto (1 + \mu(x)^\top z)^{\kappa(x)}, \quad \|z\| = \|\mu\| = 1, \quad
        \kappa = (L - 1) \exp(s(x))

    The concentration starts at L - 1, at which the scalar product of a draw and mu is one half on average, in any dimension.
    The KL to the uniform prior has a closed form; see :class:`pyrovae.distributions.PowerSpherical`.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L, the dimension of the space around the sphere.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.

    Raises:
        ValueError: L is below 2.

    References:
        De Cao and Aziz, The Power Spherical Distribution, 2020, https://arxiv.org/abs/2006.04437.
        Davidson et al., Hyperspherical Variational Auto-Encoders, 2018, https://arxiv.org/abs/1804.00891.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import PowerSpherical
        >>> from pyrovae.nn import MLP
        >>> PowerSpherical(MLP(6, [8]), 5)(torch.zeros(3, 6)).rsample().shape
        torch.Size([3, 5])
    """

    support = constraints.sphere

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__(body, latent_dim, num_features, in_scale)
        check_sphere(self.latent_dim)
        self.loc = _head(self.num_features, self.latent_dim)
        self.log_concentration = _flat_head(self.num_features, 1)
        # So that a datum whose features are all zero, such as a black image, has a direction.
        nn.init.normal_(self.loc.bias, std=0.1)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        h = self.features(x)
        concentration = (self.latent_dim - 1) * self.log_concentration(h).squeeze(-1).exp()
        return distributions.PowerSpherical(nn.functional.normalize(self.loc(h), dim=-1), concentration)


@register("encoder")
class RelaxedOneHot(Encoder):
    r"""A relaxed one-hot vector on the simplex, for the prior ``relaxed_one_hot``.

    .. math:: q(z \mid x) = \Gamma(L) \, \tau^{L-1} \Big( \sum_l \pi_l(x) z_l^{-\tau} \Big)^{-L}
        \prod_l \pi_l(x) z_l^{-\tau - 1}

    The KL to the prior is between two relaxed densities, and is estimated from samples.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L, the number of categories.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.
        temperature: tau; the default is that of the paper.

    Raises:
        ValueError: ``temperature`` is not a positive number.

    References:
        Maddison, Mnih and Teh, The Concrete Distribution, 2017, https://arxiv.org/abs/1611.00712.
        Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, https://arxiv.org/abs/1611.01144.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import RelaxedOneHot
        >>> from pyrovae.nn import MLP
        >>> RelaxedOneHot(MLP(6, [8]), 4)(torch.zeros(3, 6)).rsample().shape
        torch.Size([3, 4])
    """

    support = constraints.simplex

    def __init__(
        self,
        body: nn.Module,
        latent_dim: int,
        num_features: int | None = None,
        in_scale: float = 1.0,
        temperature: float = 2 / 3,
    ):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.temperature = positive_number(temperature, "temperature")
        self.logits = _head(self.num_features, self.latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        logits = self.logits(self.features(x))
        return distributions.RelaxedOneHot(logits.new_full((), self.temperature), logits=logits)


@register("encoder")
class Categorical(Encoder):
    r"""One of L categories as a one-hot vector, for the prior ``categorical``.

    .. math:: q(z \mid x) = \prod_l \pi_l(x)^{z_l}, \quad \pi = \operatorname{softmax}(a(x))

    Draws have no gradient: train with ``vimco``, ``score_elbo`` or ``rws``.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., num_features]``.
        latent_dim: L, the number of categories.
        num_features: the number of features, if the body has no ``out_shape``.
        in_scale: the data are multiplied by it before the body.

    Example:
        >>> import torch
        >>> from pyrovae.encoders import Categorical
        >>> from pyrovae.nn import MLP
        >>> Categorical(MLP(6, [8]), 4)(torch.zeros(3, 6)).sample().sum(-1)
        tensor([1., 1., 1.])
    """

    support = constraints.one_hot

    def __init__(self, body: nn.Module, latent_dim: int, num_features: int | None = None, in_scale: float = 1.0):
        super().__init__(body, latent_dim, num_features, in_scale)
        self.logits = _head(self.num_features, self.latent_dim)

    def forward(self, x: Tensor) -> dist.Distribution:
        """q(z|x): batch shape of ``x``, event shape ``(latent_dim,)``."""
        return distributions.OneHot(logits=self.logits(self.features(x)))


def _head(num_features: int, latent_dim: int) -> nn.Linear:
    head = nn.Linear(num_features, latent_dim)
    nn.init.xavier_uniform_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def _flat_head(num_features: int, size: int) -> nn.Linear:
    # Scales are exponentials: with random weights the first bound can be -1e16, so they start at one for every datum.
    head = nn.Linear(num_features, size)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
