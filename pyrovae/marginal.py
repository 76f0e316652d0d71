"""log p(x) by importance sampling: per datum, exactly as many samples as asked, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .data import Batches, arguments
from .evidence import Evidence, pareto_khat, tail_size
from .pairs import first_run, inspect_pair
from .traces import Program, evaluation_mode
from .weights import log_weights

# A chunk of decoder output past 32 MB makes every temporary a fresh mapping, which is slower than many small chunks.
CHUNK_NUMBERS = 2**22


def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 5000,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Importance-sampled log p(x) of every datum, with what tells whether to believe it.

    .. math:: \log \hat p(x) = \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{q(z_s \mid x)}, \qquad z_s \sim q(z \mid x)

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and the memory
    does not grow with ``num_samples`` beyond its square root. Modules whose bound methods the programs are score in evaluation
    mode; where the programs are functions, call ``eval()`` on their modules first. Where values are missing, it is
    log p(x_obs), and ``num_dims`` the mean number of observed values per datum.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a Dataset or a DataLoader.
        num_samples: S, drawn for every datum, no more and no fewer.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: makes the estimate reproducible and leaves the global random stream untouched.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats, with arrays over the N data.

    Raises:
        ValueError: bad data, or a pair that :func:`pyrovae.log_weights` refuses.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016. Vehtari et al., Pareto smoothed importance
        sampling, 2024.

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
    first = first_run(model, guide, *arguments(model, next(iter(Batches(x, batch_size=1)))))
    info, dtype, device = first.info, first.dtype, first.device
    if info.scale != 1.0:
        raise ValueError("A subsampled data plate scores other data than it is given: size the plate by x.shape[0].")
    chunk = chunk_size or max(1, CHUNK_NUMBERS // max(info.num_dims, 256))
    data = Batches(x, batch_size=max(1, chunk // num_samples), dtype=dtype, device=device)
    parts: list[dict[str, Tensor]] = []
    total, done, observed = 0.0, 0, 0
    generator_devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), evaluation_mode(model, guide), torch.random.fork_rng(generator_devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        with tqdm(data, total=data.num_batches, desc="log p(x)", unit="batch", disable=not progress) as bar:
            for batch in bar:
                batch = arguments(model, batch)
                observed += inspect_pair(model, guide, *batch).num_observed
                parts.append(_score(model, guide, batch, num_samples, chunk, vectorize_particles, info.max_plate_nesting))
                total, done = total + parts[-1]["log_px"].sum().item(), done + len(parts[-1]["log_px"])
                bar.set_postfix_str(f"{total / done:.2f} nats/datum")
    arrays = {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
    tails = arrays.pop("tail")
    return Evidence(
        log_px=arrays["log_px"],
        se=arrays["se"],
        ess=arrays["ess"],
        elbo=arrays["elbo"],
        khat=pareto_khat(tails, num_samples, precision=torch.finfo(dtype).eps),
        num_samples=num_samples,
        num_dims=observed // done if observed % done == 0 else observed / done,
        method="importance sampling",
    )


def _score(
    model: Program, guide: Program, batch: tuple, num_samples: int, chunk: int, vectorize: bool, nesting: int
) -> dict[str, Tensor]:
    """One batch: streaming sums of w, w^2 and log w, and the largest weights, which are all that Pareto k needs."""
    zeros = torch.zeros(len(batch[0]), dtype=torch.float64, device=batch[0].device)
    log_sum, log_square, mean, tail = zeros - math.inf, zeros - math.inf, zeros, zeros.new_zeros(0, len(zeros))
    keep, left = tail_size(num_samples), num_samples
    while left:
        size = min(left, max(1, chunk // len(batch[0])))
        weights = log_weights(
            model, guide, *batch, num_particles=size, vectorize_particles=vectorize, max_plate_nesting=nesting
        )
        log_w = weights.log_weights.double()  # (size, B)
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
    }
