"""log p(x) by importance sampling, with a fixed number of samples per datum and bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..programs.sites import Program
from ..programs.state import in_own_scope
from .planning import ImportanceOptions
from .proposals import Kind, Refinement
from .results import Evidence
from .sampler import ImportanceSampler
from .second import SecondOpinion, checked

__all__ = ["log_marginal"]


@in_own_scope()
def log_marginal(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 5000,
    target_se: float | None = None,
    proposal: Kind | Refinement = "guide",
    prior_share: float = 0.1,
    chunk_size: int | None = None,
    max_memory: float | None = None,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    precision: Literal["float32", "tf32", "bfloat16"] = "float32",
    seed: int | None = None,
    resume: str | Path | None = None,
    second: int = 0,
    progress: bool = False,
) -> Evidence:
    r"""Estimate log p(x) of each datum by importance sampling, with diagnostics of its reliability.

    .. math:: \log \hat p(x) = \log \frac1S \sum_{s=1}^S \frac{p(x, z_s)}{r(z_s \mid x)}, \qquad z_s \sim r(z \mid x)

    The proposal r is

    - ``"auto"``: for each datum the cheapest that is good enough. A pilot of the guide's draws shows whether the guide will
      do, and ascents from the guide, its mirror image and the prior whether the posterior has other modes; where they leave
      that open, more ascents look for them. Else a Gaussian is matched to the gradients around each mode (Cai et al. 2024),
      tempered and given the tail by which the weights of a second pilot vary least, adapted to those weights if need be, and
      mixed with the prior, which has 4 % of the draws. If that fails, more ascents and larger pilots make a second proposal,
      and if no proposal is good enough, 64 chains are annealed from the best one, through 60 temperatures or 240. What is then
      still not reliable is flagged. ``rung`` says which it was, ``calls`` what it cost. Reported draws are fresh, so
      :math:`\hat p(x)` is unbiased but for data that their own draws turn back, which costs at most half a standard error. The
      ``elbo`` is the guide's. Discrete latents are summed if that takes no more decoder calls than ``num_samples``. Where it
      takes more, and for pairs that are tied to one set of data and for more than 400 latents, the rungs are ``"guide"`` and
      ``"mixture"`` only; the evidence's ``notes`` say why;
    - ``"guide"``: q(z|x), the guide itself, which is what papers report. It is the default of this function, whose cost is
      then known beforehand; that of the command line is ``"auto"``;
    - ``"prior"``: p(z), so that the weights are likelihoods: the naive estimator, hopeless if x says much about z;
    - ``"mixture"``: :math:`\alpha p(z) + (1 - \alpha) q(z \mid x)`, whose weights are at most :math:`p(x \mid z) / \alpha` even
      if the guide misses what the model allows (Owen and Zhou 2000). The draws are stratified: exactly :math:`\alpha S` come
      from the prior. The reported standard error ignores this and is therefore conservative;
    - ``"refined"``: for each datum a Student-t with 5 degrees of freedom around a Gaussian with full covariance, fitted from
      the guide's position. With three latents or fewer it is a mixture of eight, the others fitted from likely draws of the
      prior, which finds more modes. With more latents it has one mode: if the posterior has several, prefer a mixture, or pass
      the result of :func:`pyrovae.refine` instead of the name, to choose the settings.

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and memory grows
    with the square root of ``num_samples``. Modules that the programs use are put into evaluation mode, if they are found in
    closures, partials and attributes. With missing values it is log p(x_obs), and ``num_dims`` is the mean number of observed
    values per datum.

    With a ``target_se`` a pilot decides for each datum how many draws it needs: 250, 500, 1,000 and so on up to
    ``num_samples``. The estimate uses that many fresh draws, so :math:`\hat p(x)` is as unbiased as without a target. Stopping
    at the error of the same draws would favour those in which large weights are missing, because the estimate and its standard
    error are correlated. ``drawn`` is the number of draws of each estimate, and ``pilot`` the number that decided, at least a
    quarter of it. The error is measured on the fresh draws, and can miss the target by chance, or if the tail is heavy and the
    pilot missed the large weights. Discrete latents may give weights without any spread, which shows only that all draws have
    the same value: then all ``num_samples`` are drawn.

    Weights cannot show what the proposal never draws. Therefore one draw of the prior for every 80 is scored as well.
    ``missed`` is what they add to log p(x) where their weights are larger than any that was drawn; a datum with more than 0.05
    nats and two standard errors is not reliable. A mixture draws from the prior anyway. If a draw of the prior cannot be
    scored under the guide, as with a flow that cannot be inverted, ``missed`` is ``None`` and ``notes`` say why.

    If ``torch.distributed`` is initialised, pass all data to each process. The processes divide the work, and each returns the
    complete answer.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a masked array for those with a
            parameter ``mask``, a Dataset or a DataLoader. All data are scored in the order of the data set, even if a
            DataLoader shuffles or drops its last batch.
        num_samples: S, the number of draws for each datum; with a ``target_se`` the largest number.
        target_se: the standard error to aim at for each datum's estimate, in nats; ``None`` draws all S. For a
            mixture, the number of draws is one of which the fraction from the prior is whole.
        proposal: a name from above, or what :func:`pyrovae.refine` returned for the same data in the same order.
        prior_share: :math:`\alpha`, the fraction of draws that ``"mixture"`` takes from the prior, rounded to whole draws.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations (if
            compiled, 8 MB of the widest value; on a GPU, half a million), or fewer to respect ``max_memory``.
        max_memory: MiB that the temporaries of a chunk may fill, by an estimate of their number; by default 512, or on a GPU a
            quarter of its free memory.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: capture and compile the scoring of a chunk (:mod:`pyrovae.compile`), if the proposal is guide, prior or auto.
            ``"auto"`` compiles from 300 chunks of 16 MB on; if ``target_se`` is set, 1,000 draws are assumed when deciding.
            Compiled and eager runs use different chunk sizes and a different normal generator, so with the same seed they
            differ by Monte Carlo error.
        precision: ``"bfloat16"`` rounds the factors of matrix products and convolutions, and compiles; ``"tf32"`` uses
            the faster units of an NVIDIA GPU, which round them less, and is refused on a CPU. Both approximate the model, and
            the standard error does not include that; the evidence's ``notes`` record it.
        seed: makes the estimate reproducible. It does not depend on the number of processes or on interruptions, and the global
            random stream is not changed. Without a seed, one is drawn from that stream. Eager results are the same to rounding
            for any number of threads; compiled ones depend on that number, within their errors.
        resume: a file of the results so far. Repeat an interrupted call with the same file to continue. The file holds hashes
            of the parameters, buffers and data, and the terms of one log-weight; it is refused if they differ.
        second: a second opinion on so many data, evenly spaced: 16 chains that are annealed from the prior, which share nothing
            with the guide or a fit, and bidirectional Monte Carlo with the same settings on as many simulated data. The
            evidence's ``notes`` and ``summary()`` carry both gaps, and an estimate that the chains refute is not ``reliable``.
            It finds modes that no weight shows, but takes some 340,000 decoder calls for each such datum, so it is off unless
            asked for.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats, with arrays over the N data; its ``elbo`` is that of the proposal.

    Raises:
        ValueError: the data or options are invalid, the proposal has no density for the pair, :func:`pyrovae.log_weights`
            refuses the pair, or the ``resume`` file is of another evaluation.

    References:
        `Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016 <https://arxiv.org/abs/1509.00519>`_.
        `Vehtari, Simpson, Gelman, Yao and Gabry, Pareto Smoothed Importance Sampling, 2024
        <https://arxiv.org/abs/1507.02646>`_.
        `Cai, Modi, Pillaud-Vivien, Margossian, Gower, Blei and Saul, Batch and match: black-box variational inference with a
        score-based divergence, 2024 <https://arxiv.org/abs/2402.14758>`_.
        `Owen and Zhou, Safe and Effective Importance Sampling, 2000
        <https://doi.org/10.1080/01621459.2000.10473909>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> evidence = pv.log_marginal(vae.model, vae.guide, torch.zeros(5, 9), num_samples=100, seed=0)
        >>> evidence.log_px.shape, evidence.num_samples
        ((5,), 100)
    """
    options = ImportanceOptions(
        num_samples=num_samples,
        target_se=target_se,
        proposal=proposal,
        prior_share=prior_share,
        chunk_size=chunk_size,
        max_memory=max_memory,
        vectorize_particles=vectorize_particles,
        compile=compile,
        precision=precision,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    number = checked(second)
    opinion = SecondOpinion(model, guide, x, number, options.seed, vectorize_particles) if number else None
    evidence = ImportanceSampler(model, guide, x, options).run()
    return evidence if opinion is None else opinion.on(evidence)
