"""log p(x) by importance sampling: per datum, exactly as many samples as asked, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ..programs.sites import Program
from ..programs.state import in_own_scope
from .planning import ImportanceOptions
from .proposals import Kind, Refinement
from .results import Evidence
from .sampler import ImportanceSampler

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
      where the guide put it; with three latents or fewer, eight of them, the others fitted from likely draws of the prior, to
      find more modes. With more latents it has one mode: where the posterior has several, prefer a mixture, or give the result
      of :func:`pyrovae.refine` instead of the name, for settings of one's own.

    :math:`\hat p(x)` is unbiased, so its logarithm is an estimate that lies below log p(x) on average. It is only as good as
    the guide's tails: read ``khat`` before the number. Sums run in float64 whatever the networks' precision, and the memory
    does not grow with ``num_samples`` beyond its square root. Modules that the programs use score in evaluation mode, as far
    as they are found in closures, partials and attributes. Where values are missing, it is log p(x_obs), and ``num_dims`` the
    mean number of observed values per datum.

    With a ``target_se`` a pilot decides for each datum how many draws it needs: 250, 500, 1,000 and so on up to
    ``num_samples``. The estimate is from that many fresh draws, so :math:`\hat p(x)` is as unbiased as without a target; to
    stop at an error seen in the same draws would favour those in which large weights are missing. ``drawn`` says how many a
    datum's estimate is from, and ``pilot`` how many decided, a quarter of them or more. The error is measured on the fresh
    draws, and misses the target by chance, or where the tail is heavy and the pilot has not seen the large weights. Latents
    that are discrete may give weights without any spread, which shows nothing but that all draws fell on one value: such a
    pilot decides for ``num_samples``.

    No weight shows what the proposal never draws. So one draw of the prior for every 64 is scored as well; ``missed`` says what
    they add to log p(x) where the weights are larger than any that was drawn, and a datum of which that is more than 0.05 nats
    and three standard errors is not reliable. A mixture draws from the prior by itself. Where a draw of the prior cannot be
    scored under the guide, as with a flow that cannot be inverted, ``missed`` is ``None`` and ``notes`` say why.

    Where ``torch.distributed`` is initialised, the processes share the data, which each is given whole, and all get the whole
    answer.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: an array or tensor (N, ...), a tuple of them for programs of several arguments, a masked array for those with a
            parameter ``mask``, a Dataset or a DataLoader. All data are scored in the order of the data set, also where a
            DataLoader shuffles or drops its last batch.
        num_samples: S, drawn for every datum, no more and no fewer; with a ``target_se`` the most that an estimate is from.
        target_se: the standard error to aim at for each datum's estimate, in nats; ``None`` draws all S. A mixture takes only
            numbers of draws of which its share of the prior is a whole number.
        proposal: a name from above, or what :func:`pyrovae.refine` returned for the same data in the same order.
        prior_share: :math:`\alpha`, the share of draws that ``"mixture"`` takes from the prior, rounded to whole draws.
        chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations, or where
            compiled 8 MB of the widest value, on a GPU half a million, or fewer where ``max_memory`` asks for it.
        max_memory: MiB that a chunk's temporaries may fill, by their estimated number; by default 512, and on a GPU a quarter
            of its free memory.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: capture and compile the scoring of a chunk (:mod:`pyrovae.compile`), for proposals from guide and prior;
            ``"auto"`` does so from three hundred chunks of 16 MB on, with a ``target_se`` as if it took a thousand
            draws. By default a compiled chunk is of another size than an eager one, and many normal numbers are not drawn
            by torch but made from a seed that is, on each thread: the estimates differ within their errors.
        precision: ``"bfloat16"`` rounds the factors of matrix products and convolutions, and compiles; ``"tf32"`` takes an
            NVIDIA GPU's faster units, which round them less, and is refused on a CPU; all else stays as it is. Either is an
            approximation of the model, whose error no standard error shows; the evidence's ``notes`` have it.
        seed: makes the estimate reproducible, by how many processes it is made and however often it was interrupted; the global
            random stream is left alone. Without one, a seed is drawn from that stream. Eager numbers are the same to rounding
            on any number of threads; compiled ones differ with that number, within their errors.
        resume: a file that keeps what has been scored; an interrupted call goes on from it when made again. It holds hashes of
            the parameters, buffers and data, and what the pair gave for one draw, and is refused where they differ.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats, with arrays over the N data; its ``elbo`` is that of the proposal.

    Raises:
        ValueError: bad data or options, a proposal that the pair has no density for, or a pair that
            :func:`pyrovae.log_weights` refuses, or a ``resume`` file of another evaluation.

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
    return ImportanceSampler(model, guide, x, options).run()
