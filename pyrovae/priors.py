"""Priors: ``prior()`` returns p(z), a distribution with an empty batch and event shape ``(latent_dim,)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from . import distributions
from ._validation import positive_integer, positive_number
from .distributions import FlowDistribution, flow_transform, mixture, normalizing_flow
from .nn import Shape, as_shape, as_widths
from .registry import register

__all__ = [
    "Categorical", "Flow", "HypersphereUniform", "Laplace", "LearnedNormal", "Mixture", "Prior", "RelaxedOneHot",
    "StandardNormal", "StudentT", "Vamp",
]  # fmt: skip


class Prior(nn.Module):
    """A module that returns p(z); concrete priors set ``latent_dim`` and implement ``forward``.

    Attributes:
        support: the set on which p(z) is a density, which must be that of the encoder; ``None`` for the encoder's own.
        mixes_posteriors: whether p(z) is a mixture of the encoder's posteriors, and undefined before a VAE is built with it.
    """

    latent_dim: int
    support: ClassVar[constraints.Constraint | None] = constraints.real_vector

    def __init__(self, latent_dim: int):
        super().__init__()
        self.latent_dim = positive_integer(latent_dim, "latent_dim")

    mixes_posteriors: ClassVar[bool] = False

    def bind(self, encoder: Any) -> None:
        """Called by a VAE with its encoder; a prior that mixes posteriors keeps it, but not as a submodule."""

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

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        # Buffers, so that .to(device) and .double() move the prior too; not persistent, since they never change.
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        """N(0, I): batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Normal(self.loc, self.scale).to_event(1)


@register("prior")
class LearnedNormal(Prior):
    r"""A normal with learned mean and scales, one for each dimension.

    .. math:: p(z) = \prod_l N(z_l \mid \mu_l, \sigma_l^2), \quad \sigma = \exp(s)

    It starts as the standard normal.

    Args:
        latent_dim: L.

    Example:
        >>> from pyrovae.priors import LearnedNormal
        >>> [name for name, _ in LearnedNormal(3).named_parameters()]
        ['loc', 'log_scale']
    """

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.loc = nn.Parameter(torch.zeros(self.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(self.latent_dim))

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Normal(self.loc, self.log_scale.exp()).to_event(1)


@register("prior")
class Mixture(Prior):
    r"""A learned mixture of diagonal normals.

    .. math:: p(z) = \sum_{c=1}^{C} \pi_c \prod_l N(z_l \mid \mu_{cl}, \sigma_{cl}^2), \quad \pi = \operatorname{softmax}(a)

    The components are summed exactly, by a logsumexp. Means start at draws from N(0, I), since equal components would stay
    equal; scales start at one and weights at 1/C.

    Args:
        latent_dim: L.
        components: C.

    Raises:
        ValueError: a number is not a positive integer.

    References:
        Dilokthanakul et al., Deep Unsupervised Clustering with Gaussian Mixture Variational Autoencoders, 2016,
        https://arxiv.org/abs/1611.02648.
        Jiang et al., Variational Deep Embedding, 2017, https://arxiv.org/abs/1611.05148.

    Example:
        >>> from pyrovae.priors import Mixture
        >>> Mixture(2, components=10)().component_distribution.batch_shape
        torch.Size([10])
    """

    def __init__(self, latent_dim: int, components: int = 10):
        super().__init__(latent_dim)
        self.components = positive_integer(components, "components")
        self.logits = nn.Parameter(torch.zeros(self.components))
        self.loc = nn.Parameter(torch.randn(self.components, self.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(self.components, self.latent_dim))

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        parts = dist.Normal(self.loc, self.log_scale.exp()).to_event(1)  # batch (C,), event (L,)
        return mixture(self.logits, parts)


@register("prior")
class Vamp(Prior):
    r"""The VampPrior: a mixture of the encoder's posteriors at learned pseudo-inputs.

    .. math:: p(z) = \sum_{c=1}^{C} \pi_c \, q_\phi(z \mid u_c)

    The pseudo-inputs u are trained with the other parameters, and the gradient of log p(z) also reaches the encoder. If the
    pseudo-inputs are the data (:meth:`from_data`), p(z) is the aggregate posterior. The encoder is that of the VAE, so the
    prior has no density before a VAE is built with it. Each evaluation of p(z) runs the encoder on all C pseudo-inputs.

    Args:
        latent_dim: L.
        data_shape: the shape of one datum; :func:`pyrovae.make_vae` fills it in.
        components: C, the number of pseudo-inputs; 500 in the paper.
        squash: clamp pseudo-inputs to [0, 1], in the units of the encoder's input (data times ``in_scale``); ``False`` for data
            without such a range.
        learn_inputs: train the pseudo-inputs; ``False`` keeps those that :meth:`from_data` set.
        learn_weights: train the weights pi; otherwise they are 1/C.

    Raises:
        ValueError: a number is not a positive integer, or ``data_shape`` is not a shape.

    References:
        Tomczak and Welling, VAE with a VampPrior, 2018, https://arxiv.org/abs/1705.07120.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16], prior={"kind": "vamp", "components": 5})
        >>> x = torch.rand(5, 9)
        >>> _ = vae.prior.from_data(x)
        >>> z = torch.zeros(2)
        >>> aggregate = vae.encode(x).log_prob(z).exp().mean().log()
        >>> bool(torch.isclose(vae.prior().log_prob(z), aggregate))
        True
    """

    support = None  # that of the encoder
    mixes_posteriors = True
    inputs: Tensor
    logits: Tensor

    def __init__(
        self,
        latent_dim: int,
        data_shape: Shape,
        components: int = 500,
        squash: bool = True,
        learn_inputs: bool = True,
        learn_weights: bool = False,
    ):
        super().__init__(latent_dim)
        self.data_shape, self.components = as_shape(data_shape), positive_integer(components, "components")
        self.squash, self.learn_inputs, self.learn_weights = squash, learn_inputs, learn_weights
        # In the encoder's units. As in the paper, they start as dark images with a little noise.
        inputs, logits = 0.05 + 0.01 * torch.randn(self.components, *self.data_shape), torch.zeros(self.components)
        for name, value, learned in [("inputs", inputs, learn_inputs), ("logits", logits, learn_weights)]:
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=name == "inputs")
        # In a tuple, so that the encoder is not a submodule of the prior: it belongs to the VAE.
        self._lent: tuple[Any, ...] = ()

    def bind(self, encoder: Any) -> None:
        """Set the encoder whose posteriors are mixed.

        Raises:
            ValueError: another encoder was set before, or this one takes data of another shape.
        """
        if self._lent and self._lent[0] is not encoder:
            raise ValueError("A Vamp prior must belong to one VAE, got the encoder of a second one: build another prior.")
        takes = getattr(encoder.body, "in_shape", None)
        if takes is not None and as_shape(takes) != self.data_shape:
            raise ValueError(
                f"data_shape of the Vamp prior must be that of the encoder, {as_shape(takes)}, got {self.data_shape}: build "
                f"the prior with data_shape={as_shape(takes)}."
            )
        self._lent = (encoder,)

    @property
    def pseudo_inputs(self) -> Tensor:
        """The pseudo-inputs as data, shape ``(components, *data_shape)``.

        Raises:
            ValueError: the prior has no encoder yet.
        """
        # hardtanh has no gradient at exactly 0 and 1, nor has clamp from torch 2.15 on: binary data that are set as
        # pseudo-inputs would never be trained.
        inputs = self.inputs
        if self.squash:
            inputs = torch.where(inputs < 0.0, 0.0, torch.where(inputs > 1.0, 1.0, inputs))
        return inputs / self._encoder.in_scale

    @torch.no_grad()
    def from_data(self, x: Tensor) -> Vamp:
        """Set the pseudo-inputs to data, and the weights to 1/C.

        Args:
            x: data of shape ``(N, *data_shape)``, N at least ``components``. If there are more, ``components`` of them are
                drawn without replacement.

        Returns:
            The prior itself.

        Raises:
            ValueError: there are too few data, they have another shape, or clamping to [0, 1] would change them.
        """
        if tuple(x.shape[1:]) != self.data_shape or len(x) < self.components:
            raise ValueError(
                f"x must hold at least {self.components} data of shape {self.data_shape}, got a tensor of shape "
                f"{tuple(x.shape)}: pass more data, or build the prior with fewer components."
            )
        if len(x) > self.components:
            x = x[torch.randperm(len(x), device=x.device)[: self.components]]
        inputs = x.to(self.inputs) * self._encoder.in_scale
        if self.squash and bool(((inputs < 0) | (inputs > 1)).any()):
            raise ValueError(
                f"x must lie between 0 and {1 / self._encoder.in_scale:g}, got values from {x.min().item():g} to "
                f"{x.max().item():g}: build the Vamp prior with squash=False."
            )
        self.inputs.copy_(inputs)
        self.logits.zero_()
        return self

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``.

        Raises:
            ValueError: the prior has no encoder yet.
        """
        posteriors = self._encoder(self.pseudo_inputs)  # batch (C,), event (L,)
        return mixture(self.logits, posteriors)

    @property
    def _encoder(self) -> Any:
        if not self._lent:
            raise ValueError("A Vamp prior must have an encoder, got none: build a VAE with it, or call bind(encoder).")
        return self._lent[0]


@register("prior")
class Flow(Prior):
    r"""A normalising flow: the distribution that a learned invertible f maps to the standard normal.

    .. math:: \log p(z) = \log N(f(z) \mid 0, I) + \log \left| \det \frac{\partial f(z)}{\partial z} \right|

    f starts as the identity, so that p(z) starts as the standard normal. A density takes one pass of the networks; a sample
    takes L passes, or two for a coupling.

    Args:
        latent_dim: L.
        family: ``"maf"``, masked autoregressive and affine; ``"coupling"``, affine in two halves, as RealNVP; ``"nsf"``,
            autoregressive rational-quadratic splines on [-5, 5].
        depth: the number of transforms.
        hidden: widths of each transform's network.

    Raises:
        ValueError: the family is none of these, or a number is not positive.

    References:
        Dinh, Krueger and Bengio, NICE, 2014, https://arxiv.org/abs/1410.8516.
        Dinh, Sohl-Dickstein and Bengio, Density Estimation Using Real NVP, 2016, https://arxiv.org/abs/1605.08803.
        Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, 2017,
        https://arxiv.org/abs/1705.07057.
        Durkan, Bekasov, Murray and Papamakarios, Neural Spline Flows, 2019, https://arxiv.org/abs/1906.04032.
        As a prior: Chen et al., Variational Lossy Autoencoder, 2016, https://arxiv.org/abs/1611.02731.

    Example:
        >>> import torch
        >>> from pyrovae.priors import Flow, StandardNormal
        >>> z = torch.randn(7, 4)
        >>> bool(torch.allclose(Flow(4)().log_prob(z), StandardNormal(4)().log_prob(z)))
        True
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, family: str = "maf", depth: int = 3, hidden: Sequence[int] = (64, 64)):
        super().__init__(latent_dim)
        self.family, self.depth, self.hidden = family, positive_integer(depth, "depth"), as_widths(hidden)
        self.transform = flow_transform(family, self.latent_dim, depth=self.depth, hidden=self.hidden)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self.register_buffer("scale", torch.ones(self.latent_dim), persistent=False)

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        base = dist.Normal(self.loc, self.scale).to_event(1)
        return FlowDistribution(normalizing_flow(self.transform(), base))


class _FixedScale(Prior):
    """Independent dimensions with location zero and one fixed scale."""

    loc: Tensor

    def __init__(self, latent_dim: int, scale: float):
        super().__init__(latent_dim)
        self.scale = positive_number(scale, "scale")
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)


@register("prior")
class Laplace(_FixedScale):
    r"""Independent Laplace dimensions, for sparse latents: many small coordinates and few large ones.

    .. math:: p(z) = \prod_l \frac{1}{2b} \exp(-|z_l| / b)

    Args:
        latent_dim: L.
        scale: b; the standard deviation is :math:`\sqrt 2\, b`.

    Raises:
        ValueError: ``scale`` is not a positive number.

    References:
        Barello, Charles and Pillow, Sparse-Coding Variational Auto-Encoders, 2018, https://doi.org/10.1101/399246.

    Example:
        >>> import torch
        >>> from pyrovae.priors import Laplace
        >>> Laplace(2)().log_prob(torch.zeros(2))
        tensor(-1.3863)
    """

    def __init__(self, latent_dim: int, scale: float = 1.0):
        super().__init__(latent_dim, scale)

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.Laplace(self.loc, self.scale).to_event(1)


@register("prior")
class StudentT(_FixedScale):
    r"""Independent Student-t dimensions, whose heavy tails allow outliers.

    .. math:: p(z) = \prod_l \frac{\Gamma((\nu + 1)/2)}{\Gamma(\nu/2) \sqrt{\nu \pi}\, s}
        \Big( 1 + \frac{z_l^2}{\nu s^2} \Big)^{-(\nu + 1)/2}

    Args:
        latent_dim: L.
        df: nu, the degrees of freedom.
        scale: s.

    Raises:
        ValueError: ``df`` or ``scale`` is not a positive number.

    References:
        Abiri and Ohlsson, Variational Auto-Encoders with Student's t-Prior, 2019, https://arxiv.org/abs/2004.02581.

    Example:
        >>> import torch
        >>> from pyrovae.priors import StudentT
        >>> StudentT(2)().log_prob(torch.zeros(2))
        tensor(-1.9372)
    """

    def __init__(self, latent_dim: int, df: float = 5.0, scale: float = 1.0):
        super().__init__(latent_dim, scale)
        self.df = positive_number(df, "df")

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return dist.StudentT(self.df, self.loc, self.scale).to_event(1)


@register("prior")
class HypersphereUniform(Prior):
    r"""The uniform distribution on the unit sphere of R^L, for the encoder ``power_spherical``.

    .. math:: p(z) = \frac{\Gamma(L/2)}{2 \pi^{L/2}}, \quad \|z\| = 1

    Args:
        latent_dim: L, the dimension of the space around the sphere.

    Raises:
        ValueError: L is below 2.

    References:
        Davidson et al., Hyperspherical Variational Auto-Encoders, 2018, https://arxiv.org/abs/1804.00891.

    Example:
        >>> from pyrovae.priors import HypersphereUniform
        >>> z = HypersphereUniform(5)().sample()
        >>> bool((z.norm() - 1).abs() < 1e-6)
        True
    """

    support = constraints.sphere
    loc: Tensor

    def __init__(self, latent_dim: int):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(self.latent_dim), persistent=False)
        self()

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return distributions.HypersphereUniform(self.loc)


class _Probabilities(Prior):
    """A distribution with one probability for each dimension."""

    logits: Tensor

    def __init__(self, latent_dim: int, learned: bool):
        super().__init__(latent_dim)
        self.learned = learned
        logits = torch.zeros(self.latent_dim)
        if learned:
            self.logits = nn.Parameter(logits)
        else:
            self.register_buffer("logits", logits, persistent=False)


@register("prior")
class Categorical(_Probabilities):
    r"""One of L categories, as a one-hot vector, for the encoder ``categorical``.

    .. math:: p(z) = \prod_l \pi_l^{z_l}, \quad z_l \in \{0, 1\}, \; \textstyle\sum_l z_l = 1

    Draws have no gradient: train with ``vimco``, ``score_elbo`` or ``rws``.

    Args:
        latent_dim: L, the number of categories.
        learned: train the probabilities; otherwise they are 1/L.

    Example:
        >>> from pyrovae.priors import Categorical
        >>> Categorical(4)().sample().sum()
        tensor(1.)
    """

    support = constraints.one_hot

    def __init__(self, latent_dim: int, learned: bool = False):
        super().__init__(latent_dim, learned)

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return distributions.OneHot(logits=self.logits)


@register("prior")
class RelaxedOneHot(_Probabilities):
    r"""A relaxed one-hot vector on the simplex, for the encoder ``relaxed_one_hot``.

    .. math:: p(z) = \Gamma(L) \, \tau^{L-1} \Big( \sum_l \pi_l z_l^{-\tau} \Big)^{-L} \prod_l \pi_l z_l^{-\tau - 1}

    Bounds and estimates are of log p(x) of the relaxed model, not of the discrete one.

    Args:
        latent_dim: L, the number of categories.
        temperature: tau; the lower it is, the closer draws are to the corners. The default is that of the paper.
        learned: train the probabilities; otherwise they are 1/L.

    Raises:
        ValueError: ``temperature`` is not a positive number.

    References:
        Maddison, Mnih and Teh, The Concrete Distribution, 2017, https://arxiv.org/abs/1611.00712.
        Jang, Gu and Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, https://arxiv.org/abs/1611.01144.

    Example:
        >>> from pyrovae.priors import RelaxedOneHot
        >>> bool((RelaxedOneHot(4)().sample().sum() - 1).abs() < 1e-6)
        True
    """

    support = constraints.simplex

    def __init__(self, latent_dim: int, temperature: float = 0.5, learned: bool = False):
        super().__init__(latent_dim, learned)
        self.temperature = positive_number(temperature, "temperature")

    def forward(self) -> dist.Distribution:
        """p(z): batch shape ``()``, event shape ``(latent_dim,)``."""
        return distributions.RelaxedOneHot(self.logits.new_full((), self.temperature), logits=self.logits)
