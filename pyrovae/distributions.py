"""Distributions that Pyro, torch and zuko lack, or that they give up on in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import AffineTransform


class ContinuousBernoulli(dist.ContinuousBernoulli):
    r"""The continuous Bernoulli by its logits, to rounding at any logit.

    .. math:: p(x) = \frac{\ell}{e^\ell - 1} e^{\ell x}, \qquad x \in [0, 1], \quad \ell \in \mathbb{R}

    torch computes its constant from the probability, which saturates: in float32 its density at a logit of 50 integrates to
    0.3, and its mean near a logit of 0 is wrong in the fourth digit.

    Args:
        logits: :math:`\ell`, of any shape, which is the batch shape.

    References:
        Loaiza-Ganem and Cunningham, The continuous Bernoulli, 2019.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import ContinuousBernoulli
        >>> ContinuousBernoulli(logits=torch.tensor([0.0, 50.0])).mean
        tensor([0.5000, 0.9800])
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ContinuousBernoulli:
        """The same law over a larger batch."""
        return ContinuousBernoulli(self.logits.expand(torch.Size(batch_shape)), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The density's logarithm, in nats."""
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
        # At -|l| the exponential stays below one; the other sign is its mirror image.
        size = self.logits.abs()
        safe = torch.where(size < 1e-4, 1.0, size)
        level = torch.where(self.logits > 0, 1 - value, value)
        exact = torch.log1p(level * torch.expm1(-safe)) / -safe
        low = torch.where(size < 1e-4, level - level * (1 - level) * size / 2, exact).clamp(0.0, 1.0)
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

    At 0 and 1 the density is zero or infinite, so a datum there is a mistake; torch counts both as support.

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
        """The same law over a larger batch."""
        return super().expand(torch.Size(batch_shape), self._get_checked_instance(Beta, _instance))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws with a gradient; what rounds to 0 or 1 stays just inside."""
        value = super().rsample(torch.Size(sample_shape))
        limits = torch.finfo(value.dtype)
        return value.clamp(limits.tiny, 1 - limits.eps)


class Levels(dist.Categorical):
    r"""A categorical distribution over the levels 0, 1, ..., n-1 of an ordered quantity, as floats.

    .. math:: P(x = k) = \operatorname{softmax}(a)_k

    Unlike torch's, its samples have the type of the logits, and it has the mean and variance of the levels.

    Args:
        logits: shape ``(*batch_shape, n)``.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import Levels
        >>> Levels(logits=torch.zeros(3)).mean
        tensor(1.)
    """

    def __init__(self, logits: Tensor, validate_args: bool | None = None):
        super().__init__(logits=logits, validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Levels:
        """The same law over a larger batch."""
        return super().expand(torch.Size(batch_shape), self._get_checked_instance(Levels, _instance))

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

    with the first term one at k = n-1 and the second zero at k = 0, so that the sum over the levels is one exactly.

    Args:
        loc: mu, in levels.
        scale: s, in levels.
        num_levels: n, at least 2.

    References:
        Salimans et al., PixelCNN++, 2017.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import DiscretizedLogistic
        >>> law = DiscretizedLogistic(torch.tensor(3.0), torch.tensor(50.0), num_levels=256)
        >>> round(law.log_prob(torch.arange(256.0)).exp().sum().item(), 5)
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
        """The same law over a larger batch."""
        shape = torch.Size(batch_shape)
        return DiscretizedLogistic(self.loc.expand(shape), self.scale.expand(shape), self.num_levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The probability's logarithm, in nats."""
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
    r"""Pyro's zero-inflated negative binomial, by the logits of its gate throughout.

    .. math:: p(x) = \pi \, [x = 0] + (1 - \pi) \, \mathrm{NB}(x), \qquad \pi = \sigma(g)

    Pyro's remembers the gate's probability once it has been asked for a mean or a draw; from then on it scores by that, which
    loses digits, and cannot be expanded. It also refuses logits whose probability rounds to one.

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


class Columns(dist.TorchDistribution):
    r"""Independent columns of a table, whose groups have laws of different kinds; its batch shape is ``(..., D)``.

    .. math:: \log p(x_d) = \log p_{g(d)}(x_d)

    Args:
        laws: one for each group, batch shape ``(..., n_g)`` and empty event shape.
        columns: for each group the positions of its columns among the D, shape ``(n_g,)``.
        order: where each column stands when the groups are put side by side; worked out from ``columns`` if not given.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.distributions import Columns
        >>> laws = [dist.Poisson(torch.ones(1)), dist.Normal(torch.zeros(2), 1.0)]
        >>> Columns(laws, [torch.tensor([1]), torch.tensor([0, 2])]).log_prob(torch.zeros(3))
        tensor([-0.9189, -1.0000, -0.9189])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(
        self, laws: Sequence[Any], columns: Sequence[Tensor], order: Tensor | None = None, validate_args: bool | None = None
    ):
        self.laws, self.columns = list(laws), list(columns)
        self.order = torch.argsort(torch.cat(self.columns)) if order is None else order
        leading = torch.broadcast_shapes(*(law.batch_shape[:-1] for law in self.laws))
        super().__init__(torch.Size((*leading, len(self.order))), validate_args=validate_args)

    @constraints.dependent_property(event_dim=0)
    def support(self) -> Any:
        """Each column's own."""
        supports = [law.support for law in self.laws]
        discrete = all(support.is_discrete for support in supports)
        return _EachColumn(list(zip(supports, self.columns, strict=True)), self.order, discrete)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Columns:
        """The same law over a larger batch."""
        leading = tuple(batch_shape)[:-1]
        laws = [law.expand(torch.Size((*leading, law.batch_shape[-1]))) for law in self.laws]
        return Columns(laws, self.columns, self.order, validate_args=False)

    def _together(self, parts: list[Tensor]) -> Tensor:
        leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*leading, part.shape[-1]) for part in parts], -1)[..., self.order]

    def log_prob(self, value: Tensor) -> Tensor:
        """Each column's own, in nats."""
        return self._together([law.log_prob(value[..., columns]) for law, columns in zip(self.laws, self.columns, strict=True)])

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws."""
        return self._together([law.sample(torch.Size(sample_shape)) for law in self.laws])

    @property
    def mean(self) -> Tensor:
        """Each column's own."""
        return self._together([law.mean for law in self.laws])

    @property
    def variance(self) -> Tensor:
        """Each column's own."""
        return self._together([law.variance for law in self.laws])


class _Noisy(constraints.Constraint):
    """n times a value of the support, not all of them integers."""

    event_dim = 0
    is_discrete = False

    def __init__(self, base: Any, num_levels: int):
        self.base, self.num_levels = base, num_levels

    def check(self, value: Tensor) -> Tensor:
        return self.base.check(value / self.num_levels) & (value != value.floor()).any()


class Dequantized(dist.TransformedDistribution):
    r"""A law y on the unit scale, read as a density of v = n y, an integer level plus uniform noise.

    .. math:: \log p(v) = \log p_y(v / n) - \log n

    Args:
        base_dist: the law of y, with an empty event shape.
        num_levels: n, at least 2.

    References:
        Theis, van den Oord and Bethge, A note on the evaluation of generative models, 2016.

    Example:
        >>> import torch
        >>> from pyrovae.distributions import ContinuousBernoulli, Dequantized
        >>> Dequantized(ContinuousBernoulli(torch.zeros(())), 256).log_prob(torch.tensor(3.7)).exp() * 256
        tensor(1.)
    """

    def __init__(self, base_dist: Any, num_levels: int, validate_args: bool | None = None):
        self.num_levels = num_levels
        super().__init__(base_dist, [AffineTransform(0.0, float(num_levels))], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The base's, n times as wide; integers throughout are levels to which no noise was added."""
        return _Noisy(self.base_dist.support, self.num_levels)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Dequantized:
        """The same law over a larger batch."""
        return Dequantized(self.base_dist.expand(torch.Size(batch_shape)), self.num_levels, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """The density's logarithm, in nats; whether noise was added is for the caller to check."""
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
