"""Likelihoods: ``likelihood(z)`` returns p(x|z), a distribution whose event is one datum.

A likelihood contains its decoder, a network from ``[..., L]`` to the parameters of the distribution. If there are several
parameters per dimension, they come first: ``out_shape = (num_parameters, *event_shape)``. All log-probabilities are in nats and
include every constant. Levels and counts are integers in the units of the data, so that all discrete likelihoods of the same
data can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from . import distributions
from ._validation import positive_integer, positive_number
from .nn import Body, Shape, as_shape
from .registry import build, find, register

__all__ = [
    "Bernoulli", "Beta", "BetaBinomial", "Binomial", "Categorical", "ContinuousBernoulli", "Dequantized", "DiscretizedLogistic",
    "Laplace", "Likelihood", "Mixed", "NegativeBinomial", "Normal", "Poisson", "StudentT", "ZeroInflatedNegativeBinomial",
]  # fmt: skip

# The library size for draws without a datum: single-cell data are commonly normalised to counts per ten thousand.
TYPICAL_LIBRARY = 1e4


class Likelihood(nn.Module):
    """A module that returns p(x|z); concrete likelihoods implement ``forward``.

    Those of pyrovae return ``base.to_event(n)``: the dimensions of a datum are independent given z, so that missing ones can be
    left out.

    Args:
        decoder: the network from the latent to the parameters.
        event_shape: the shape of one datum; by default from ``decoder.out_shape``.
        num_parameters: the number of parameters per dimension.

    Raises:
        ValueError: the shape of a datum is not known, or the decoder's ``out_shape`` does not fit.

    Attributes:
        fill_value: a value in the support, put in place of missing values.
    """

    fill_value: float | Tensor = 0.0

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
                f"The decoder must have an attribute out_shape, got a {type(decoder).__name__} without: pass event_shape=... "
                f"to {type(self).__name__}."
            )
        if not self.event_shape or (out_shape is not None and out_shape != (*leading, *self.event_shape)):
            wanted = str((*leading, *(self.event_shape or ("...",)))).replace("'", "")
            raise ValueError(
                f"out_shape of the decoder of {type(self).__name__} must be {wanted}, with {self.num_parameters} parameter(s) "
                f"per dimension, got {out_shape}: build the decoder for that shape."
            )

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """The number of parameters per dimension that the decoder must give, for these options of ``__init__``."""
        return 1

    @classmethod
    def decoder_shape(cls, event_shape: Shape, options: Mapping[str, Any]) -> tuple[int, ...]:
        """The ``out_shape`` that the decoder must have for data of this shape, for these options of ``__init__``."""
        num_parameters = cls.count_parameters(options)
        return (*((num_parameters,) if num_parameters > 1 else ()), *as_shape(event_shape))

    @property
    def in_scale(self) -> float:
        """The factor that brings the data to about unit size for an encoder."""
        return 1.0

    @property
    def event_dim(self) -> int:
        """The number of dimensions of ``event_shape``."""
        return len(self.event_shape)

    def output(self, z: Tensor) -> Tensor:
        """The decoder's output, shape ``[..., *event_shape]``, with ``num_parameters`` in front of the event if several.

        Raises:
            ValueError: the output has another shape, which is possible if the decoder has no ``out_shape``.
        """
        out = self.decoder(z)
        wanted = (*((self.num_parameters,) if self.num_parameters > 1 else ()), *self.event_shape)
        if tuple(out.shape[-len(wanted) :]) != wanted:
            raise ValueError(
                f"The output of the decoder of {type(self).__name__} must end in shape {wanted}, got a tensor of shape "
                f"{tuple(out.shape)}: reshape it, or change event_shape."
            )
        return out

    def parameters_of(self, z: Tensor) -> tuple[Tensor, ...]:
        """The decoder's output as ``num_parameters`` tensors of shape ``[..., *event_shape]``."""
        out = self.output(z)
        return (out,) if self.num_parameters == 1 else out.unbind(-self.event_dim - 1)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        raise TypeError(f"{type(self).__name__} must implement forward(z) and return a distribution.")

    def encoder_input(self, x: Tensor) -> Tensor:
        """The encoder's input for data of shape ``[..., *event_shape]``: the data, or log(1 + x) for unbounded counts.

        Raw counts in the thousands would make the scales of an encoder, which are exponentials, infinite.

        References:
            Lopez et al., Deep Generative Modeling for Single-Cell Transcriptomics, 2018,
            https://doi.org/10.1038/s41592-018-0229-2.
        """
        return x

    def given(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z) for likelihoods that also depend on a statistic of the datum, such as its total; by default ``self(z)``.

        Args:
            z: the latent, shape ``[..., L]``.
            x: the data, shape ``[..., *event_shape]``, with ``fill_value`` in place of missing values.
            mask: whether each number was observed, of the shape of ``x``; by default all were.
        """
        return self(z)

    def observe(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> tuple[dist.Distribution, Tensor]:
        r"""p(x|z) of the observed values, and the values at which a model evaluates it.

        .. math:: \log p(x_{obs} \mid z) = \sum_{d \, \text{observed}} \log p(x_d \mid z)

        Args:
            z: the latent, shape ``[..., L]``.
            x: the data, shape ``[..., *event_shape]``; values where the mask is false are ignored.
            mask: whether each number was observed, of the shape of ``x``; by default all were.

        Raises:
            ValueError: there is a mask, and the dimensions are not independent given z.
        """
        if mask is None:
            return self.given(z, x), x
        x = torch.where(mask, x, self.fill_value)
        distribution = self.given(z, x, mask)
        if not isinstance(distribution, torch.distributions.Independent) or distribution.base_dist.event_shape:
            raise ValueError(
                f"A likelihood must return independent dimensions, base.to_event(n), if values are missing, got "
                f"{type(distribution).__name__} from {type(self).__name__}: choose another likelihood, or complete data."
            )
        return distribution.base_dist.mask(mask).to_event(self.event_dim), x


class _ScaleParameter(Likelihood):
    """A likelihood with a positive parameter that is fixed, learned, or given by the decoder as its last output."""

    parameter_name = "scale"
    choices: tuple[str, ...] = ("shared", "per_dimension", "decoder")

    def __init__(self, decoder: nn.Module, choice: float | str, event_shape: Shape | None, num_parameters: int):
        if isinstance(choice, str) and choice not in self.choices:
            *most, last = (f'"{word}"' for word in self.choices)
            raise ValueError(f"{self.parameter_name} must be a positive number, {', '.join(most)} or {last}, got {choice!r}.")
        if not isinstance(choice, str):
            choice = positive_number(choice, f"A fixed {self.parameter_name}")
        super().__init__(decoder, event_shape, num_parameters)
        setattr(self, self.parameter_name, choice)
        if choice in ("shared", "per_dimension"):
            shape = () if choice == "shared" else self.event_shape
            setattr(self, f"log_{self.parameter_name}", nn.Parameter(torch.zeros(shape)))

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Two if the decoder gives the positive parameter, else one."""
        return 2 if options.get(cls.parameter_name) == "decoder" else 1

    def split_parameters(self, z: Tensor) -> tuple[Any, ...]:
        """The decoder's other parameters, followed by the positive one."""
        parameters, choice = self.parameters_of(z), getattr(self, self.parameter_name)
        if choice == "decoder":
            return (*parameters[:-1], parameters[-1].exp())
        return (*parameters, getattr(self, f"log_{self.parameter_name}").exp() if isinstance(choice, str) else choice)


class _PrecomputedOutput(Body):
    """Takes the place of a decoder that has been run already: reshapes a part of its output for one likelihood."""

    def __init__(self, out_shape: Shape):
        super().__init__()
        self.out_shape = as_shape(out_shape)
        self.in_shape = (math.prod(self.out_shape),)

    def forward(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, self.out_shape)


def _num_levels(value: Any) -> int:
    if not isinstance(value, Integral) or value < 2:
        raise ValueError(f"num_levels must be an integer of at least 2, got {value!r}.")
    return int(value)


@register("likelihood")
class Bernoulli(Likelihood):
    r"""Binary data; the decoder gives logits.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \sigma(\ell_d(z)) + (1 - x_d) \log \sigma(-\ell_d(z)), \quad x_d \in \{0, 1\}

    Grey values between 0 and 1 are refused, since the formula is not a density over them: binarise them.

    Args:
        decoder: maps ``[..., L]`` to logits ``[..., *event_shape]``.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

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
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

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
class Normal(_ScaleParameter):
    r"""Real data with Gaussian noise.

    .. math:: \log p(x \mid z) = -\sum_d \tfrac12 \log 2\pi + \log \sigma_d + \tfrac{(x_d - \mu_d(z))^2}{2 \sigma_d^2}

    With ``scale="optimal"``, training sets one shared scale to its maximum-likelihood value given the means of the batch (over
    all particles), :math:`\sigma^2 = \operatorname{mean}_{k,b,d} (x_{bd} - \mu_d(z_{kb}))^2`. The training objective is then
    maximised over sigma, and is no longer a lower bound. A running mean of :math:`\sigma^2` over batches (a tenth from the
    newest) is kept in the state, like the statistics of batch normalisation. In evaluation mode and without gradients, as in
    ``log_marginal`` and the validation bound, the scale is that of the running mean, so that p(x|z) is a density.

    Args:
        decoder: maps ``[..., L]`` to the mean ``[..., *event_shape]``; with ``scale="decoder"`` to ``[..., 2, *event_shape]``,
            the mean and the logarithm of the scale.
        scale: the scale sigma. A number is fixed; ``"shared"`` learns one; ``"per_dimension"`` learns one for each dimension;
            ``"decoder"`` takes it from the decoder for each datum; ``"optimal"`` is that of sigma-VAE, as above. Learned scales
            start at 1.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``scale`` is neither a positive number nor one of the words, or the decoder does not fit it.

    References:
        Rybkin, Daniilidis and Levine, Simple and Effective VAE Training with Calibrated Decoders, 2021,
        https://arxiv.org/abs/2006.13202.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Normal
        >>> from pyrovae.nn import MLP
        >>> Normal(MLP(2, [8], (2, 5)), scale="decoder")(torch.zeros(7, 2)).event_shape
        torch.Size([5])
    """

    choices = ("shared", "per_dimension", "decoder", "optimal")
    variance: Tensor

    def __init__(self, decoder: nn.Module, scale: float | str = 1.0, event_shape: Shape | None = None):
        super().__init__(decoder, scale, event_shape, self.count_parameters({"scale": scale}))
        self.scale: float | str
        if scale == "optimal":
            self.register_buffer("variance", torch.ones(()))

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        if self.scale == "optimal":
            (loc,), scale = self.parameters_of(z), self.variance.sqrt()
        else:
            loc, scale = self.split_parameters(z)
        return dist.Normal(loc, scale).to_event(self.event_dim)

    def given(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z); the optimal scale is that of this batch in training mode with gradients."""
        if self.scale != "optimal" or not (self.training and torch.is_grad_enabled()):
            return self(z)
        (loc,) = self.parameters_of(z)
        with torch.no_grad():
            error = (x - loc).square()
            observed = torch.ones_like(error) if mask is None else mask.to(error.dtype).expand_as(error)
            # If a decoder fits a batch exactly, the density would be infinite.
            variance = ((error * observed).sum() / observed.sum().clamp(min=1.0)).clamp(min=1e-12)
            self.variance.lerp_(variance, 0.1)
        return dist.Normal(loc, variance.sqrt()).to_event(self.event_dim)


@register("likelihood")
class Laplace(_ScaleParameter):
    r"""Real data with Laplace noise, which is robust to outliers.

    .. math:: \log p(x \mid z) = -\sum_d \log 2 b_d + \tfrac{|x_d - \mu_d(z)|}{b_d}

    Args:
        decoder: maps ``[..., L]`` to the median ``[..., *event_shape]``; with ``scale="decoder"`` to
            ``[..., 2, *event_shape]``, the median and the logarithm of the scale.
        scale: the scale b: a positive number, ``"shared"``, ``"per_dimension"`` or ``"decoder"``, as in :class:`Normal`.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``scale`` is neither a positive number nor one of the three words, or the decoder does not fit it.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Laplace
        >>> from pyrovae.nn import MLP
        >>> Laplace(MLP(2, [8], 5), scale="shared")(torch.zeros(7, 2)).batch_shape
        torch.Size([7])
    """

    def __init__(self, decoder: nn.Module, scale: float | str = 1.0, event_shape: Shape | None = None):
        super().__init__(decoder, scale, event_shape, self.count_parameters({"scale": scale}))
        self.scale: float | str

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        loc, scale = self.split_parameters(z)
        return dist.Laplace(loc, scale).to_event(self.event_dim)


@register("likelihood")
class StudentT(_ScaleParameter):
    r"""Real data with Student's t noise, whose tails are polynomial.

    .. math:: \log p(x \mid z) = \sum_d \log \frac{\Gamma(\frac{\nu+1}2)}{\Gamma(\frac\nu2) \sqrt{\nu\pi} \, \sigma_d}
        - \frac{\nu+1}2 \log \Big(1 + \frac{(x_d - \mu_d(z))^2}{\nu \sigma_d^2}\Big)

    Args:
        decoder: maps ``[..., L]`` to the location ``[..., *event_shape]``; with ``scale="decoder"`` to
            ``[..., 2, *event_shape]``, the location and the logarithm of the scale.
        df: the degrees of freedom nu: a number above 1, so that a mean exists, or ``"shared"``, which learns one above 1,
            starting at 4.
        scale: the scale sigma: a positive number, ``"shared"``, ``"per_dimension"`` or ``"decoder"``, as in :class:`Normal`.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``df`` or ``scale`` is none of these, or the decoder does not fit.

    References:
        Takahashi et al., Student-t Variational Autoencoder for Robust Density Estimation, 2018,
        https://www.ijcai.org/proceedings/2018/374.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import StudentT
        >>> from pyrovae.nn import MLP
        >>> StudentT(MLP(2, [8], 5), df="shared")(torch.zeros(2)).base_dist.df[0].item()
        4.0
    """

    def __init__(self, decoder: nn.Module, df: float | str = 4.0, scale: float | str = 1.0, event_shape: Shape | None = None):
        if df != "shared" and not (isinstance(df, Real) and 1 < float(df) < math.inf):
            raise ValueError(f'df must be a number above 1, so that a mean exists, or "shared", got {df!r}.')
        super().__init__(decoder, scale, event_shape, self.count_parameters({"scale": scale}))
        self.scale: float | str
        self.df = df if isinstance(df, str) else float(df)
        if df == "shared":
            self.log_excess = nn.Parameter(torch.tensor(0.0))

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        loc, scale = self.split_parameters(z)
        df = 1 + 3 * self.log_excess.exp() if self.df == "shared" else self.df
        return dist.StudentT(df, loc, scale).to_event(self.event_dim)


@register("likelihood")
class ContinuousBernoulli(Likelihood):
    r"""Data in [0, 1], such as grey pixels; the decoder gives logits.

    .. math:: \log p(x \mid z) = \sum_d \ell_d(z) \, x_d + \log \frac{\ell_d(z)}{e^{\ell_d(z)} - 1}

    The Bernoulli's formula with the constant that makes it a density. As with every density, log p(x|z) depends on the units of
    the pixels.

    Args:
        decoder: maps ``[..., L]`` to logits ``[..., *event_shape]``.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    References:
        Loaiza-Ganem and Cunningham, The Continuous Bernoulli: Fixing a Pervasive Error in Variational Autoencoders, 2019,
        https://arxiv.org/abs/1907.06845.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import ContinuousBernoulli
        >>> from pyrovae.nn import MLP
        >>> ContinuousBernoulli(MLP(2, [8], (1, 4, 4)))(torch.zeros(2)).mean[0, 0, 0].item()
        0.5
    """

    def __init__(self, decoder: nn.Module, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        (logits,) = self.parameters_of(z)
        return distributions.ContinuousBernoulli(logits).to_event(self.event_dim)


@register("likelihood")
class Beta(Likelihood):
    r"""Data inside (0, 1), such as proportions; the decoder gives the logarithms of both concentrations.

    .. math:: \log p(x \mid z) = \sum_d (\alpha_d(z) - 1) \log x_d + (\beta_d(z) - 1) \log (1 - x_d)
        - \log B(\alpha_d(z), \beta_d(z))

    If the decoder's output is zero, the density is uniform. Data of exactly 0 or 1 are refused, since the density is zero or
    infinite there.

    Args:
        decoder: maps ``[..., L]`` to ``[..., 2, *event_shape]``, log alpha and log beta.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Beta
        >>> from pyrovae.nn import MLP
        >>> Beta(MLP(2, [8], (2, 5)))(torch.zeros(7, 2)).event_shape
        torch.Size([5])
    """

    fill_value = 0.5

    def __init__(self, decoder: nn.Module, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape, 2)

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Two."""
        return 2

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        alpha, beta = self.output(z).exp().unbind(-self.event_dim - 1)
        return distributions.Beta(alpha, beta).to_event(self.event_dim)


@register("likelihood")
class BetaBinomial(Likelihood):
    r"""Overdispersed counts out of a known total; the decoder gives the logarithms of both concentrations.

    .. math:: \log p(x \mid z) = \sum_d \log \binom{n}{x_d}
        + \log \frac{B(x_d + \alpha_d(z), n - x_d + \beta_d(z))}{B(\alpha_d(z), \beta_d(z))}

    This is a binomial whose probability has a beta distribution. If the decoder's output is zero, it is uniform on 0, ..., n.

    Args:
        decoder: maps ``[..., L]`` to ``[..., 2, *event_shape]``, log alpha and log beta.
        total_count: n, the largest count; 255 for 8-bit pixels.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``total_count`` is not a positive integer.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import BetaBinomial
        >>> from pyrovae.nn import MLP
        >>> bool(BetaBinomial(MLP(2, [8], (2, 64)), total_count=16)(torch.zeros(2)).sample().max() <= 16)
        True
    """

    def __init__(self, decoder: nn.Module, total_count: int, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape, 2)
        self.total_count = positive_integer(total_count, "total_count")

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Two."""
        return 2

    @property
    def in_scale(self) -> float:
        """One over the largest count."""
        return 1.0 / self.total_count

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        alpha, beta = self.output(z).exp().unbind(-self.event_dim - 1)
        return distributions.BetaBinomial(alpha, beta, total_count=self.total_count).to_event(self.event_dim)


@register("likelihood")
class Poisson(Likelihood):
    r"""Unbounded counts; the decoder gives the logarithm of the rate.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \lambda_d(z) - \lambda_d(z) - \log x_d!

    Args:
        decoder: maps ``[..., L]`` to log lambda, shape ``[..., *event_shape]``.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Poisson
        >>> from pyrovae.nn import MLP
        >>> Poisson(MLP(2, [8], 5))(torch.zeros(2)).mean
        tensor([1., 1., 1., 1., 1.], grad_fn=<ExpBackward0>)
    """

    def __init__(self, decoder: nn.Module, event_shape: Shape | None = None):
        super().__init__(decoder, event_shape)

    def encoder_input(self, x: Tensor) -> Tensor:
        """log(1 + x)."""
        return _log_counts(x)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        (log_rate,) = self.parameters_of(z)
        return dist.Poisson(log_rate.exp()).to_event(self.event_dim)


class _Counts(_ScaleParameter):
    """Overdispersed counts with a mean that may be a fraction of a library size."""

    parameter_name = "dispersion"

    def __init__(self, decoder: nn.Module, dispersion: float | str, library: float | str | None, event_shape: Shape | None):
        if isinstance(library, str) and library != "total":
            raise ValueError(f'library must be a positive number, "total" or None, got {library!r}.')
        if library is not None and not isinstance(library, str):
            library = positive_number(library, "A fixed library")
        super().__init__(decoder, dispersion, event_shape, self.count_parameters({"dispersion": dispersion}))
        self.dispersion: float | str
        self.library = library

    def encoder_input(self, x: Tensor) -> Tensor:
        """log(1 + x)."""
        return _log_counts(x)

    def log_mean(self, raw: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The logarithm of the mean, shape ``[..., *event_shape]``."""
        if self.library is None:
            return raw
        dims = tuple(range(-self.event_dim, 0))
        if self.library != "total" or x is None:
            library = self.library if isinstance(self.library, float) else TYPICAL_LIBRARY
            return raw - torch.logsumexp(raw, dims, keepdim=True) + math.log(library)
        # The total of an empty datum is taken to be 1, since 0 has no logarithm.
        log_library = x.sum(dims, keepdim=True).clamp(min=1.0).log()
        if mask is not None:
            # The total is that of the observed counts, so the fractions sum to one over those (over all if none is observed).
            counted = mask | ~mask.flatten(-self.event_dim).any(-1)[(..., *[None] * self.event_dim)]
            return raw - torch.logsumexp(raw.masked_fill(~counted, -math.inf), dims, keepdim=True) + log_library
        return raw - torch.logsumexp(raw, dims, keepdim=True) + log_library

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        return self.distribution(z)

    def given(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z); if the library size is the total, it is that of ``x``."""
        distribution = self.distribution(z, x, mask)
        return distributions.conditioned(distribution, "the total") if self.library == "total" else distribution

    def distribution(self, z: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z); the library size ``"total"`` is that of ``x``, if given."""
        raise NotImplementedError


@register("likelihood", aliases=["nb"])
class NegativeBinomial(_Counts):
    r"""Overdispersed counts; the decoder gives the logarithm of the mean.

    .. math:: \log p(x \mid z) = \sum_d \log \frac{\Gamma(x_d + \theta_d)}{\Gamma(\theta_d) \, x_d!}
        + \theta_d \log \frac{\theta_d}{\theta_d + \mu_d(z)} + x_d \log \frac{\mu_d(z)}{\theta_d + \mu_d(z)}

    The variance is :math:`\mu + \mu^2 / \theta`.

    Args:
        decoder: maps ``[..., L]`` to ``[..., *event_shape]``: log mu, or with a library the logits of the fractions; with
            ``dispersion="decoder"`` to ``[..., 2, *event_shape]``, that and log theta.
        dispersion: theta: a positive number, ``"shared"``, ``"per_dimension"`` or ``"decoder"``. Learned ones start at 1.
        library: ``None`` for mu = exp(.), or as in :class:`ZeroInflatedNegativeBinomial`.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``dispersion`` or ``library`` is none of these, or the decoder does not fit.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import NegativeBinomial
        >>> from pyrovae.nn import MLP
        >>> NegativeBinomial(MLP(2, [8], 5))(torch.zeros(7, 2)).event_shape
        torch.Size([5])
    """

    def __init__(
        self,
        decoder: nn.Module,
        dispersion: float | str = "per_dimension",
        library: float | str | None = None,
        event_shape: Shape | None = None,
    ):
        super().__init__(decoder, dispersion, library, event_shape)

    def distribution(self, z: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z); the library size ``"total"`` is that of ``x``, if given."""
        raw, theta = self.split_parameters(z)
        logits = self.log_mean(raw, x, mask) - _log(theta)
        return dist.NegativeBinomial(theta, logits=logits).to_event(self.event_dim)


@register("likelihood", aliases=["zinb"])
class ZeroInflatedNegativeBinomial(_Counts):
    r"""Negative binomial counts with additional zeros and a library size, as in single-cell data (scVI).

    .. math:: p(x_d \mid z) = \pi_d(z) \, [x_d = 0] + (1 - \pi_d(z)) \, \mathrm{NB}(x_d \mid \mu_d, \theta_d), \qquad
        \mu_d = l \operatorname{softmax}(\rho(z))_d

    With ``library="total"``, l is the total of the datum (of its observed counts; the fractions then sum to one over those). As
    in scVI it is a covariate: p(x|z) is a distribution of counts given l, so compare it only with models that are also given l.
    Without a datum, as in ``vae.sample``, l is 10,000.

    Args:
        decoder: maps ``[..., L]`` to ``[..., 2, *event_shape]``, the logits rho of the fractions and the logits of pi; with
            ``dispersion="decoder"`` to ``[..., 3, *event_shape]``, those and log theta.
        dispersion: theta: a positive number, ``"shared"``, ``"per_dimension"`` or ``"decoder"``. Learned ones start at 1.
        library: the library size l: ``"total"``, a number for all data, or ``None`` for mu = exp(rho).
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``dispersion`` or ``library`` is none of these, or the decoder does not fit.

    References:
        Lopez et al., Deep Generative Modeling for Single-Cell Transcriptomics, 2018, https://doi.org/10.1038/s41592-018-0229-2.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import ZeroInflatedNegativeBinomial
        >>> from pyrovae.nn import MLP
        >>> likelihood = ZeroInflatedNegativeBinomial(MLP(2, [8], (2, 5)))
        >>> likelihood.given(torch.zeros(7, 2), torch.ones(7, 5)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        decoder: nn.Module,
        dispersion: float | str = "per_dimension",
        library: float | str | None = "total",
        event_shape: Shape | None = None,
    ):
        super().__init__(decoder, dispersion, library, event_shape)

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Three if the decoder gives the dispersion, else two."""
        return 3 if options.get("dispersion") == "decoder" else 2

    def distribution(self, z: Tensor, x: Tensor | None = None, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z); the library size ``"total"`` is that of ``x``, if given."""
        raw, gate_logits, theta = self.split_parameters(z)
        logits = self.log_mean(raw, x, mask) - _log(theta)
        return distributions.ZeroInflatedNegativeBinomial(theta, logits, gate_logits).to_event(self.event_dim)


@register("likelihood")
class Categorical(Likelihood):
    r"""Integer levels 0, ..., n-1, such as 8-bit pixels, each with its own probability.

    .. math:: \log p(x \mid z) = \sum_d \log \operatorname{softmax}(a_d(z))_{x_d}

    Probabilities of neighbouring levels are independent, so that the decoder has n outputs for each dimension. The data are the
    levels, as floats or integers, not scaled to [0, 1].

    Args:
        decoder: maps ``[..., L]`` to logits ``[..., num_levels, *event_shape]``.
        num_levels: n, at least 2.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``num_levels`` is not an integer of at least 2, or the decoder does not fit.

    References:
        Van den Oord, Kalchbrenner and Kavukcuoglu, Pixel Recurrent Neural Networks, 2016, https://arxiv.org/abs/1601.06759.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Categorical
        >>> from pyrovae.nn import MLP
        >>> Categorical(MLP(2, [8], (16, 1, 8, 8)), num_levels=16)(torch.zeros(2)).event_shape
        torch.Size([1, 8, 8])
    """

    def __init__(self, decoder: nn.Module, num_levels: int = 256, event_shape: Shape | None = None):
        num_levels = _num_levels(num_levels)
        super().__init__(decoder, event_shape, num_levels)
        self.num_levels = num_levels

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """One for each level."""
        return _num_levels(options.get("num_levels", 256))

    @property
    def in_scale(self) -> float:
        """One over the largest level."""
        return 1.0 / (self.num_levels - 1)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        logits = self.output(z).movedim(-self.event_dim - 1, -1)
        return distributions.OrdinalCategorical(logits).to_event(self.event_dim)


@register("likelihood")
class DiscretizedLogistic(Likelihood):
    r"""Integer levels 0, ..., n-1, such as 8-bit pixels, as a rounded logistic variable or a mixture of them (PixelCNN++).

    .. math:: P(x_d = k \mid z) = \sum_c \pi_{dc} \Big[ \sigma\Big(\tfrac{k + 1/2 - \mu_{dc}}{s_{dc}}\Big)
        - \sigma\Big(\tfrac{k - 1/2 - \mu_{dc}}{s_{dc}}\Big) \Big]

    The first and the last level take the tails. The data are the levels, not scaled to [0, 1]. The decoder's mu and log s are
    on the scale of the paper, on which the levels span [-1, 1]; log s is at least -7. Unlike in the paper, each number has its
    own mixture, and colours are independent given z.

    Args:
        decoder: maps ``[..., L]`` to ``[..., 2, *event_shape]``, mu and log s; with several components to
            ``[..., 3 * components, *event_shape]``, their logits, then their means, then their log-scales.
        num_levels: n, at least 2.
        components: the number of logistics in the mixture; 10 in the paper.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: ``num_levels`` or ``components`` is not such an integer, or the decoder does not fit.

    References:
        Salimans, Karpathy, Chen and Kingma, PixelCNN++, 2017, https://arxiv.org/abs/1701.05517.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import DiscretizedLogistic
        >>> from pyrovae.nn import MLP
        >>> DiscretizedLogistic(MLP(2, [8], (6, 5)), components=2)(torch.zeros(7, 2)).sample().shape
        torch.Size([7, 5])
    """

    def __init__(self, decoder: nn.Module, num_levels: int = 256, components: int = 1, event_shape: Shape | None = None):
        num_levels = _num_levels(num_levels)
        super().__init__(decoder, event_shape, self.count_parameters({"components": components}))
        self.num_levels, self.components = num_levels, positive_integer(components, "components")

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """Two, or three for each of several components."""
        components = positive_integer(options.get("components", 1), "components")
        return 2 if components == 1 else 3 * components

    @property
    def in_scale(self) -> float:
        """One over the largest level."""
        return 1.0 / (self.num_levels - 1)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        *logits, loc, log_scale = (
            self.output(z).unflatten(-self.event_dim - 1, (-1, self.components)).unbind(-self.event_dim - 2)
        )
        half = (self.num_levels - 1) / 2
        # A mixture takes its components in the last dimension.
        loc = ((loc + 1) * half).movedim(-self.event_dim - 1, -1)
        scale = (log_scale.clamp(min=-7.0).exp() * half).movedim(-self.event_dim - 1, -1)
        distribution = distributions.DiscretizedLogistic(loc, scale, self.num_levels)
        if not logits:
            distribution = distributions.DiscretizedLogistic(loc[..., 0], scale[..., 0], self.num_levels)
            return distribution.to_event(self.event_dim)
        weights = dist.Categorical(logits=logits[0].movedim(-self.event_dim - 1, -1))
        return dist.MixtureSameFamily(weights, distribution).to_event(self.event_dim)


@register("likelihood")
class Dequantized(Likelihood):
    r"""Integer levels 0, ..., n-1 with uniform noise added, under a continuous likelihood on the unit scale.

    .. math:: \log p(v \mid z) = \log p_y(v / n \mid z) - D \log n, \qquad v = x + u, \quad u \sim U[0, 1)^D

    The density is in units of the levels. Its mean over the noise is a lower bound on the log-probability of the levels,
    :math:`\mathbb{E}_u \log p(x + u) \le \log \int p(x + u) \, du`, so that it can be compared with discrete likelihoods. Add
    the noise with :func:`pyrovae.data.dequantize`: ``vae.fit(x, transform=dequantize)`` draws it anew in each step,
    ``vae.log_marginal(dequantize(x))`` once. Levels without noise are refused, since a density can be arbitrarily high there.

    Args:
        decoder: the decoder of the continuous likelihood.
        likelihood: the name or table of the continuous likelihood of v / n, such as ``{"kind": "normal", "scale": "shared"}``.
        num_levels: n, at least 2.
        event_shape: the shape of one datum, if the decoder has no ``out_shape``.

    Raises:
        ValueError: the likelihood is discrete or unknown, or ``num_levels`` is not an integer of at least 2.

    References:
        Theis, van den Oord and Bethge, A Note on the Evaluation of Generative Models, 2016, https://arxiv.org/abs/1511.01844.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Dequantized
        >>> from pyrovae.nn import MLP
        >>> Dequantized(MLP(2, [8], 5), "continuous_bernoulli")(torch.zeros(2)).mean.max() <= 256
        tensor(True)
    """

    def __init__(self, decoder: nn.Module, likelihood: Any = "normal", num_levels: int = 256, event_shape: Shape | None = None):
        num_levels = _num_levels(num_levels)
        super().__init__(decoder, event_shape, self.count_parameters({"likelihood": likelihood}))
        self.likelihood, self.num_levels = likelihood, num_levels
        options = _as_table(likelihood)
        precomputed = _PrecomputedOutput(_family(options).decoder_shape(self.event_shape, options))
        self.inner: Likelihood = build("likelihood", options, decoder=precomputed)
        support = self.inner(torch.zeros(precomputed.in_shape)).support
        if support.is_discrete:
            raise ValueError(
                f"The likelihood within Dequantized must be continuous, got {type(self.inner).__name__}: use that without "
                f'Dequantized, or choose a continuous one such as "normal".'
            )

    @classmethod
    def count_parameters(cls, options: Mapping[str, Any]) -> int:
        """That of the continuous likelihood."""
        table = _as_table(options.get("likelihood", "normal"))
        return _family(table).count_parameters(table)

    @property
    def in_scale(self) -> float:
        """That of the continuous likelihood, divided by the number of levels."""
        return self.inner.in_scale / self.num_levels

    @property
    def fill_value(self) -> float | Tensor:  # type: ignore[override]
        """That of the continuous likelihood, in levels."""
        return self.inner.fill_value * self.num_levels

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``event_shape``."""
        return self._in_levels(self.inner(self._flat(z)))

    def given(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z), with the statistics of ``x`` that the continuous likelihood depends on."""
        return self._in_levels(self.inner.given(self._flat(z), x / self.num_levels, mask))

    def _flat(self, z: Tensor) -> Tensor:
        return self.output(z).flatten(-self.event_dim - (self.num_parameters > 1))

    def _in_levels(self, distribution: Any) -> dist.Distribution:
        return distributions.Dequantized(distribution.base_dist, self.num_levels).to_event(self.event_dim)


@register("likelihood")
class Mixed(Likelihood):
    r"""A table whose columns differ in kind: each group of columns has its own likelihood, and all share one decoder.

    .. math:: \log p(x \mid z) = \sum_g \log p_g(x_g \mid z)

    Each likelihood transforms and scales its columns for the encoder. Standardise real-valued columns, which are not scaled.

    Args:
        decoder: maps ``[..., L]`` to ``[..., P]``, the concatenated parameters of all parts, in their order
            (:meth:`decoder_shape`).
        parts: pairs of column positions and a likelihood's name or table, such as
            ``[([0, 3], "normal"), ([1], {"kind": "binomial", "total_count": 5}), ([2], "bernoulli")]``. Each column belongs to
            exactly one part.

    Raises:
        ValueError: a column belongs to no part or to several, or the decoder does not give P numbers.

    References:
        Nazabal, Olmos, Ghahramani and Valera, Handling Incomplete Heterogeneous Data Using VAEs, 2020,
        https://arxiv.org/abs/1807.03653.

    Example:
        >>> import torch
        >>> from pyrovae.likelihoods import Mixed
        >>> from pyrovae.nn import MLP
        >>> parts = [([0, 2], "normal"), ([1], {"kind": "categorical", "num_levels": 4})]
        >>> Mixed(MLP(2, [8], 6), parts)(torch.zeros(7, 2)).event_shape
        torch.Size([3])
    """

    order: Tensor
    fill: Tensor

    def __init__(self, decoder: nn.Module, parts: Any):
        groups = _as_parts(parts)
        shapes = [_family(table).decoder_shape(len(columns), table) for columns, table in groups]
        sizes = [math.prod(shape) for shape in shapes]
        said = getattr(decoder, "out_shape", None)
        if said is not None and as_shape(said) != (sum(sizes),):
            raise ValueError(
                f"out_shape of the decoder of Mixed must be ({sum(sizes)},), the parameters of all parts, got "
                f"{as_shape(said)}: build the decoder for that shape."
            )
        super().__init__(decoder, sum(sizes))
        self.parts = [[columns, table] for columns, table in groups]
        self.sizes = sizes
        self.likelihoods = nn.ModuleList(
            build("likelihood", table, decoder=_PrecomputedOutput(shape))
            for (_, table), shape in zip(groups, shapes, strict=True)
        )
        self.out_size, self.event_shape = sum(sizes), (sum(len(columns) for columns, _ in groups),)
        order = torch.argsort(torch.tensor([column for columns, _ in groups for column in columns]))
        self.register_buffer("order", order, persistent=False)
        for index, (columns, _) in enumerate(groups):
            self.register_buffer(f"columns{index}", torch.tensor(columns), persistent=False)
        fillers = [
            torch.as_tensor(part.fill_value).expand(len(columns))
            for part, (columns, _) in zip(self._each(), groups, strict=True)
        ]
        self.register_buffer("fill", torch.cat(fillers)[order], persistent=False)

    @property
    def fill_value(self) -> Tensor:  # type: ignore[override]
        """The fill value of each column."""
        return self.fill

    @classmethod
    def decoder_shape(cls, event_shape: Shape, options: Mapping[str, Any]) -> tuple[int, ...]:
        """``(P,)``, the number of parameters of all parts."""
        groups = _as_parts(options.get("parts"))
        width = sum(len(columns) for columns, _ in groups)
        if as_shape(event_shape) != (width,):
            raise ValueError(
                f"A datum of Mixed must have shape ({width},), as many columns as its parts, got {as_shape(event_shape)}: "
                f"change the parts, or flatten the data."
            )
        shapes = [_family(table).decoder_shape(len(columns), table) for columns, table in groups]
        return (sum(math.prod(shape) for shape in shapes),)

    def forward(self, z: Tensor) -> dist.Distribution:
        """p(x|z): batch shape ``z.shape[:-1]``, event shape ``(D,)``."""
        return self._together([part(h) for part, h in zip(self._each(), self._slices(z), strict=True)])

    def given(self, z: Tensor, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """p(x|z), with the statistics of ``x`` that the parts depend on."""
        return self._together(
            [
                part.given(h, x[..., columns], None if mask is None else mask[..., columns])
                for part, h, columns in zip(self._each(), self._slices(z), self._columns(), strict=True)
            ]
        )

    def encoder_input(self, x: Tensor) -> Tensor:
        """The encoder's input of each part, brought to about unit size."""
        groups = zip(self._each(), self._columns(), strict=True)
        return torch.cat([part.encoder_input(x[..., columns]) * part.in_scale for part, columns in groups], -1)[..., self.order]

    def _each(self) -> list[Likelihood]:
        return list(self.likelihoods)  # type: ignore[arg-type]

    def _columns(self) -> list[Tensor]:
        return [getattr(self, f"columns{index}") for index in range(len(self.parts))]

    def _slices(self, z: Tensor) -> tuple[Tensor, ...]:
        out = self.decoder(z)
        if out.shape[-1] != self.out_size:
            raise ValueError(
                f"The output of the decoder of Mixed must end in shape ({self.out_size},), got a tensor of shape "
                f"{tuple(out.shape)}: change its last layer, or the parts."
            )
        return out.split(self.sizes, -1)

    def _together(self, groups: list[Any]) -> dist.Distribution:
        columns = [group.base_dist for group in groups]
        return distributions.HeterogeneousIndependent(columns, self._columns(), self.order).to_event(1)


def _log_counts(x: Tensor) -> Tensor:
    # Negative counts are refused when they are scored. A NaN here would cause an earlier error that says less.
    return torch.log1p(x.clamp(min=0.0))


def _log(value: Tensor | float) -> Any:
    return value.log() if isinstance(value, Tensor) else math.log(value)


def _family(table: Mapping[str, Any]) -> type[Likelihood]:
    return find("likelihood", table["kind"])


def _as_table(likelihood: Any) -> dict[str, Any]:
    table = {"kind": likelihood} if isinstance(likelihood, str) else likelihood
    if not isinstance(table, Mapping) or "kind" not in table:
        raise ValueError(f'A likelihood within another must be a name or a table such as {{"kind": "normal"}}, got {table!r}.')
    return dict(table)


def _as_parts(parts: Any) -> list[tuple[list[int], dict[str, Any]]]:
    how = 'write parts = [[[0, 2], "normal"], [[1], {"kind": "bernoulli"}]], for example.'
    pairs = list(parts) if isinstance(parts, Iterable) and not isinstance(parts, str | Mapping) else []
    if not pairs or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"The parts of Mixed must be pairs of columns and a likelihood, got {parts!r}: {how}")
    groups = []
    for columns, likelihood in pairs:
        found = list(columns) if isinstance(columns, Iterable) and not isinstance(columns, str) else []
        if not found or not all(isinstance(column, Integral) for column in found):
            raise ValueError(f"The columns of a part of Mixed must be a list of integers, got {columns!r}: {how}")
        groups.append(([int(column) for column in found], _as_table(likelihood)))
    listed = sorted(column for columns, _ in groups for column in columns)
    if listed != list(range(len(listed))):
        raise ValueError(f"The parts of Mixed must contain each of the columns 0, 1, ... once, got {listed}: {how}")
    return groups
