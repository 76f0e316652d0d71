"""Streaming sums of importance weights: log p(x), its standard error, the effective sample size, and resampling."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .psis import Array, tail_size

__all__ = ["Estimate", "LogMoments", "Resampler", "curve_sizes", "inverse_ess", "standard_error"]

# Log-weights of each datum that are reduced together: a reduction is several small operations, which cost time by themselves.
REDUCED_AT_ONCE = 2**13


def curve_sizes(num_samples: int) -> list[int]:
    """The numbers of samples at which a :class:`~pyrovae.evidence.Curve` is recorded: the powers of ten below S, and S.

    Example:
        >>> from pyrovae.evidence import curve_sizes
        >>> curve_sizes(5000)
        [1, 10, 100, 1000, 5000]
    """
    return [10**power for power in range(20) if 10**power < num_samples] + [num_samples]


def inverse_ess(log_sum: Array, log_square: Array) -> Array:
    r"""The sum of squared normalised weights, :math:`\sum_s \bar w_s^2`, which is one over the effective sample size."""
    with np.errstate(all="ignore"):
        return np.exp(log_square - 2 * log_sum)


def standard_error(log_sum: Array, log_square: Array, num_drawn: Array | int) -> Array:
    r"""Standard error of the log of the mean weight, by the delta method, in nats; ``nan`` from one sample.

    .. math:: \operatorname{se}^2 = \frac{S}{S - 1} \left( \sum_s \bar w_s^2 - \frac1S \right)

    Args:
        log_sum: the logarithm of the summed weights.
        log_square: the logarithm of the summed squares of the weights.
        num_drawn: S.
    """
    count = np.asarray(num_drawn)
    with np.errstate(all="ignore"):
        correction = np.where(count > 1, count / (count - 1), np.nan)
        return np.sqrt(np.maximum(inverse_ess(log_sum, log_square) - 1 / count, 0.0) * correction)


class Estimate(NamedTuple):
    """What the weights of N data say, each of shape (N,), in nats but for ``ess``."""

    log_px: Array  # the log of the mean weight
    se: Array  # its standard error
    ess: Array  # the effective sample size
    elbo: Array  # the mean log-weight


class LogMoments:
    r"""Sums over the importance weights of N data, taken in chunk by chunk and kept as logarithms in float64.

    .. math:: \log \sum_s w_s, \qquad \log \sum_s w_s^2, \qquad \sum_s \log w_s

    and the largest log-weights, which are all that Pareto k needs. Everything that is estimated from importance weights comes
    from these sums: importance sampling, annealed chains, imputation and posterior draws.

    Args:
        num_data: N.
        num_samples: S, the most samples that any datum takes.
        device: of the sums.
        curve: also record the first two sums at the numbers of samples of :func:`curve_sizes`.

    Attributes:
        log_sum: the logarithm of the summed weights, shape (N,).
        log_square: that of their squares, shape (N,).
        total: the sum of log-weights, shape (N,).
        tail: the largest log-weights in descending order, ``-inf`` where there are fewer yet, shape (N, 5 M).
        curve_sum: ``log_sum`` at each recorded number of samples, shape (N, C).
        curve_square: ``log_square`` there, shape (N, C).
        num_drawn: samples taken in so far.

    Example:
        >>> import torch
        >>> from pyrovae.evidence.streaming import LogMoments
        >>> moments = LogMoments(num_data=2, num_samples=100)
        >>> for log_w in torch.zeros(100, 2, dtype=torch.float64).split(30):
        ...     moments.update(log_w)
        >>> moments.finish().log_px, moments.finish().ess
        (array([0., 0.]), array([100., 100.]))
    """

    def __init__(self, num_data: int, num_samples: int, device: torch.device | str = "cpu", *, curve: bool = False):
        self.recorded = curve_sizes(num_samples)[:-1] if curve else []
        self.num_drawn = 0
        self.log_sum = torch.full((num_data,), -math.inf, dtype=torch.float64, device=device)
        self.log_square = self.log_sum.clone()
        self.total = torch.zeros_like(self.log_sum)
        self.tail = self.log_sum[:, None].repeat(1, tail_size(num_samples))
        self.curve_sum = self.log_sum[:, None].repeat(1, len(self.recorded))
        self.curve_square = self.curve_sum.clone()

    @classmethod
    def of(cls, log_w: Tensor) -> LogMoments:
        """The sums of all samples at once, from log-weights (S, N) in float64."""
        moments = cls(log_w.shape[1], len(log_w), log_w.device)
        moments.update(log_w)
        return moments

    def update(self, log_w: Tensor, *, dim: int = 0) -> None:
        """Take in more samples of all data.

        Args:
            log_w: log-weights in float64, (K, N) or with ``dim=1`` (N, K).
            dim: the dimension of the samples. Many samples of few data are faster along the last.
        """
        number = log_w.shape[dim]
        # Of w and of w^2 together, since each operation costs more than what it computes.
        both = torch.stack([self.log_sum, self.log_square])
        powers = torch.stack([log_w, 2 * log_w])
        done, until = self.num_drawn, self.num_drawn + number
        for count in sorted({until} | {count for count in self.recorded if done < count < until}):
            both = torch.logaddexp(both, torch.logsumexp(powers.narrow(dim + 1, 0, count - done), dim + 1))
            powers, done = powers.narrow(dim + 1, count - done, until - count), count
            if count in self.recorded:
                place = self.recorded.index(count)
                self.curve_sum[:, place], self.curve_square[:, place] = both
        self.log_sum, self.log_square = both
        self.total = self.total + log_w.sum(dim)
        rows, keep = log_w.T if dim == 0 else log_w, self.tail.shape[1]
        kept = torch.cat([self.tail[:, : min(keep, self.num_drawn)], rows], 1)
        kept = torch.topk(kept, min(keep, kept.shape[1])).values
        self.tail = torch.cat([kept, self.tail[:, kept.shape[1] :]], 1)
        self.num_drawn = until

    def extend(self, blocks: Iterator[Tensor], until: int) -> None:
        """Take in the next blocks of log-weights, each (size, N) in float64, up to so many samples; by large reductions."""
        waiting: list[Tensor] = []
        while self.num_drawn < until:
            waiting.append(next(blocks))
            if sum(map(len, waiting)) >= min(REDUCED_AT_ONCE, until - self.num_drawn):
                self.update(torch.cat(waiting).T.contiguous(), dim=1)
                waiting.clear()

    def merge(self, other: LogMoments) -> None:
        """Take in the samples of the same data that other sums are of; neither records a curve."""
        self.log_sum = torch.logaddexp(self.log_sum, other.log_sum)
        self.log_square = torch.logaddexp(self.log_square, other.log_square)
        self.total = self.total + other.total
        keep = max(self.tail.shape[1], other.tail.shape[1])
        self.tail = torch.topk(torch.cat([self.tail, other.tail], 1), keep).values
        self.num_drawn += other.num_drawn

    def normalize(self, log_w: Tensor) -> tuple[Tensor, Tensor]:
        """Take in more samples (K, N), and return the normalised weight of all before, (N,), and of each new one, (K, N).

        For a datum whose weights are all zero these are one and zeros.
        """
        before = self.log_sum
        self.update(log_w)
        no_weight = self.log_sum == -math.inf
        earlier = torch.where(no_weight, 1.0, torch.exp(before - self.log_sum))
        return earlier, torch.where(no_weight, 0.0, torch.exp(log_w - self.log_sum))

    def rows(self, chosen: Tensor) -> LogMoments:
        """The sums of some of the data, by their numbers."""
        part = copy.copy(self)
        for name in _PER_DATUM:
            setattr(part, name, getattr(self, name)[chosen])
        return part

    def put(self, chosen: Tensor, part: LogMoments) -> None:
        """Write the sums of some of the data back; ``num_drawn`` stays for the caller to set."""
        for name in _PER_DATUM:
            getattr(self, name)[chosen] = getattr(part, name)

    def arrays(self) -> dict[str, Array]:
        """The sums as arrays on the CPU, by their names."""
        return {name: getattr(self, name).cpu().numpy() for name in _PER_DATUM}

    def finish(self) -> Estimate:
        """The estimates from all samples that were taken in."""
        log_sum, log_square, total = (part.cpu().numpy() for part in (self.log_sum, self.log_square, self.total))
        with np.errstate(all="ignore"):
            return Estimate(
                log_px=log_sum - np.log(self.num_drawn),
                se=standard_error(log_sum, log_square, self.num_drawn),
                ess=np.where(np.isneginf(log_sum), 0.0, 1 / inverse_ess(log_sum, log_square)),
                elbo=total / self.num_drawn,
            )


_PER_DATUM = ("log_sum", "log_square", "total", "tail", "curve_sum", "curve_square")


class Resampler:
    """Draws from p(z|x) by importance resampling, from samples that come in chunks.

    Weighted reservoir sampling: each draw is replaced by one of the new chunk with probability (weight of the chunk) / (weight
    of all samples so far), so at the end it is any sample with probability proportional to its weight.

    Args:
        moments: the sums of the weights, which :meth:`update` adds to.
        num_draws: M, draws for each datum.

    Attributes:
        draws: the values at the draws by name, each (M, N, ...).

    Example:
        >>> import torch
        >>> from pyrovae.evidence.streaming import LogMoments, Resampler
        >>> resampler = Resampler(LogMoments(num_data=1, num_samples=20), num_draws=5)
        >>> for z in torch.arange(20.0)[:, None].split(10):
        ...     log_w = torch.where(z == 13, 0.0, -torch.inf).double()
        ...     resampler.update(log_w, {"z": z})
        >>> resampler.draws["z"][:, 0]
        tensor([13., 13., 13., 13., 13.])
    """

    def __init__(self, moments: LogMoments, num_draws: int):
        self.moments, self.num_draws = moments, num_draws
        self.draws: dict[Any, Tensor] = {}

    def update(self, log_w: Tensor, values: dict[Any, Tensor]) -> None:
        """Take in a chunk of samples.

        Args:
            log_w: their log-weights in float64, (K, N).
            values: what they are, by name, each (K, N, ...).
        """
        _, weights = self.moments.normalize(log_w)
        chunk_weight = weights.sum(0)
        num_data = len(chunk_weight)
        replace = torch.rand(self.num_draws, num_data, dtype=log_w.dtype, device=log_w.device) < chunk_weight
        # Any sample stands for a chunk whose weights are all zero, or not all finite: no draw moves there.
        possible = torch.where(chunk_weight > 0, weights, 1.0)
        chosen = torch.multinomial(possible.T, self.num_draws, replacement=True).T  # (M, N)
        rows = torch.arange(num_data, device=log_w.device)
        for name, value in values.items():
            new = value[chosen, rows]
            old = self.draws.get(name, new)
            self.draws[name] = torch.where(replace.reshape(replace.shape + (1,) * (new.dim() - 2)), new, old)
