"""log p(x) by importance sampling: per datum, exactly as many samples as asked, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Batch, Batches, arguments
from .evidence import Evidence, curve_of, curve_sizes, pareto_smooth, tail_size
from .pairs import first_run, inspect_pair
from .proposals import (
    METHODS,
    Draw,
    Kind,
    Options,
    Refinement,
    guide_draws,
    mixture_draws,
    prior_draws,
    refine_batch,
    refined_draws,
    rows_at_once,
)
from .registry import unknown
from .traces import Program, evaluation_mode

# A chunk of decoder output past 32 MB makes every temporary a fresh mapping, which is slower than many small chunks.
CHUNK_NUMBERS = 2**22


def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 5000,
    proposal: Kind | Refinement = "guide",
    prior_share: float = 0.1,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Importance-sampled log p(x) of every datum, with what tells whether to believe it.

    .. math:: \log \hat p(x) = \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{r(z_s \mid x)}, \qquad z_s \sim r(z \mid x)

    The proposal r is

    - ``"guide"``: q(z|x) as the guide declares it;
    - ``"prior"``: p(z), so that the weights are likelihoods: the naive estimator, hopeless where x says much about z;
    - ``"mixture"``: :math:`\alpha p(z) + (1 - \alpha) q(z \mid x)`, whose weights are at most :math:`p(x \mid z) / \alpha` even
      where the guide misses what the model allows (Owen and Zhou 2000). Exactly :math:`\alpha S` of the S draws come from the
      prior, whose error is no larger than the one reported, which takes them for draws of the whole mixture;
    - ``"refined"``: a Student-t of 5 degrees of freedom about a Gaussian of full covariance, which is fitted to each datum from
      where the guide put it; see :func:`pyrovae.refine`, whose result may be given instead of the name, for settings of one's
      own. It has one mode: where the posterior has several, prefer a mixture.

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and the memory
    does not grow with ``num_samples`` beyond its square root. Modules whose bound methods the programs are score in evaluation
    mode; where the programs are functions, call ``eval()`` on their modules first.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a Dataset or a DataLoader.
        num_samples: S, drawn for every datum, no more and no fewer.
        proposal: a name from above, or what :func:`pyrovae.refine` returned for the same data in the same order.
        prior_share: :math:`\alpha`, the share of draws that ``"mixture"`` takes from the prior, rounded to whole draws.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the estimate reproducible and leaves the global random stream untouched.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats, with arrays over the N data; its ``elbo`` is that of the proposal.

    Raises:
        ValueError: bad data or options, a proposal that the pair has no density for, or a pair that
            :func:`pyrovae.log_weights` refuses.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. Vehtari et al., Pareto smoothed importance
        sampling, 2024. Owen and Zhou, Safe and Effective Importance Sampling, 2000.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> evidence = pv.log_marginal(vae.model, vae.guide, torch.zeros(5, 9), num_samples=100, seed=0)
        >>> evidence.log_px.shape, evidence.num_samples
        ((5,), 100)
    """
    if int(num_samples) != num_samples or num_samples < 1:
        raise ValueError(f"num_samples is a positive integer, not {num_samples!r}.")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is a positive integer, not {chunk_size!r}.")
    num_samples = int(num_samples)
    given = proposal if isinstance(proposal, Refinement) else None
    kind = "refined" if isinstance(proposal, Refinement) else proposal
    if kind not in METHODS:
        raise ValueError(unknown("proposal", kind, METHODS))
    if kind == "mixture" and not 0 < prior_share < 1:
        raise ValueError(f"prior_share lies between 0 and 1, not {prior_share!r}.")
    if kind == "mixture" and num_samples < 2:
        raise ValueError("A mixture takes at least two samples, one of the prior and one of the guide.")
    first = first_run(model, guide, *arguments(model, next(iter(Batches(x, batch_size=1)))))
    info, dtype, device = first.info, first.dtype, first.device
    nesting = info.max_plate_nesting
    if info.scale != 1.0:
        raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
    chunk = chunk_size or max(1, CHUNK_NUMBERS // max(info.num_dims, 256))
    rows, together, options = max(1, chunk // num_samples), 1, Options(covariance="full", tail_df=5.0)
    if kind == "refined" and given is None:
        together = max(1, rows_at_once(info.num_dims, options) // rows)  # steps for one datum cost as much as for many
    data = Batches(x, batch_size=rows * together, dtype=dtype, device=device)
    if given is not None and (data.loader is not None or data.num_data != len(given)):
        raise ValueError(f"The refinement is of {len(given)} data in their order: give the same data, as arrays.")

    def pieces(batch: Batch, start: int) -> Iterator[tuple[Batch, Draw]]:
        """A batch in parts of at most one chunk, each with what draws its log-weights."""
        fitted = given.rows(start, len(batch[0])) if given else None
        if kind == "refined" and fitted is None:
            fitted = refine_batch(model, guide, batch, options, vectorize_particles)
        step = rows if together > 1 else len(batch[0])
        for row in range(0, len(batch[0]), step):
            part = tuple(array[row : row + step] for array in batch)
            if fitted is not None:
                yield part, refined_draws(model, guide, fitted.rows(row, step), vectorize_particles)
            elif kind == "mixture":
                yield part, mixture_draws(model, guide, vectorize_particles, nesting, num_samples, prior_share)
            elif kind == "prior":
                yield part, prior_draws(model, vectorize_particles, nesting)
            else:
                yield part, guide_draws(model, guide, vectorize_particles, nesting)

    parts: list[dict[str, Tensor]] = []
    total, done = 0.0, 0
    generator_devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluation_mode(model, guide), torch.random.fork_rng(generator_devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with tqdm(data, total=data.num_batches, desc="log p(x)", unit="batch", disable=not progress) as bar:
            for batch in bar:
                batch = arguments(model, batch)
                inspect_pair(model, guide, *batch)
                for part, draw in pieces(batch, done):
                    parts.append(_score(draw, part, num_samples, chunk))
                    total, done = total + parts[-1]["log_px"].sum().item(), done + len(parts[-1]["log_px"])
                    bar.set_postfix_str(f"{total / done:.2f} nats/datum")
    arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    khat, log_px_psis = pareto_smooth(arrays["tail"], arrays["log_px"], num_samples, precision=torch.finfo(dtype).eps)
    return Evidence(
        log_px=arrays["log_px"],
        se=arrays["se"],
        ess=arrays["ess"],
        elbo=arrays["elbo"],
        khat=khat,
        log_px_psis=log_px_psis,
        curve=curve_of(arrays["curve_sum"].T, arrays["curve_square"].T, arrays["elbo"], num_samples),
        num_samples=num_samples,
        num_dims=info.num_dims,
        method=METHODS[kind],
    )


def _score(draw: Callable[[Batch, int], Tensor], batch: Batch, num_samples: int, chunk: int) -> dict[str, Tensor]:
    """One batch: streaming sums of w, w^2 and log w, and the largest weights, which are all that Pareto k needs."""
    zeros = torch.zeros(len(batch[0]), dtype=torch.float64, device=batch[0].device)
    log_sum, log_square, mean, tail = zeros - math.inf, zeros - math.inf, zeros, zeros.new_zeros(0, len(zeros))
    keep, left = tail_size(num_samples), num_samples
    curve: list[tuple[Tensor, Tensor]] = []
    while left:
        size = min(left, max(1, chunk // len(batch[0])))
        log_w = draw(batch, size)  # (size, B), float64
        for head in (count - num_samples + left for count in curve_sizes(num_samples)[:-1]):
            if 0 < head <= size:
                squares = torch.logaddexp(log_square, torch.logsumexp(2 * log_w[:head], 0))
                curve.append((torch.logaddexp(log_sum, torch.logsumexp(log_w[:head], 0)), squares))
        log_sum = torch.logaddexp(log_sum, torch.logsumexp(log_w, 0))
        log_square = torch.logaddexp(log_square, torch.logsumexp(2 * log_w, 0))
        mean = mean + log_w.sum(0) / num_samples
        tail = torch.cat([tail, log_w])
        tail = torch.topk(tail, min(keep, len(tail)), dim=0).values
        left -= size
    share = torch.exp(log_square - 2 * log_sum)  # sum of squared normalised weights, 1/ESS
    variance = (share - 1 / num_samples).clamp(min=0) * num_samples / (num_samples - 1) if num_samples > 1 else share * math.nan
    return {
        "log_px": log_sum - math.log(num_samples),
        "se": variance.sqrt(),
        "ess": torch.where(log_sum == -math.inf, zeros, 1 / share),
        "elbo": mean,
        "tail": tail.T,
        "curve_sum": torch.stack([*(sums for sums, _ in curve), log_sum], 1),
        "curve_square": torch.stack([*(squares for _, squares in curve), log_square], 1),
    }
