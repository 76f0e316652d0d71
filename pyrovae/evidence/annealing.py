"""log p(x) by annealed importance sampling."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyro
import torch
from torch import Tensor

from ..programs.coverage import covered_data, joined_flags
from ..programs.inspect import inspect_pair
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..programs.unconstrained import UnconstrainedPair
from .annealing_options import AnnealingOptions, Schedule, Start
from .kinds import Annealed
from .measure import evidence_fields, scored_data
from .paths import AnnealingPath, Field, FieldGradient, annealing, prepare_annealing
from .psis import pareto_khat
from .results import Evidence
from .streaming import Estimate, LogMoments

__all__ = ["ais"]


@in_own_scope()
def ais(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    schedule: Schedule = "sigmoid",
    start: Start = "prior",
    leapfrog_steps: int = 10,
    step_size: float = 0.01,
    target_acceptance: float = 0.65,
    chunk_size: int | None = None,
    vectorize_particles: bool = True,
    compile: bool | Literal["auto"] = "auto",
    seed: int | None = None,
    progress: bool = False,
) -> Evidence:
    r"""Annealed importance sampling: log p(x) of every datum, for any pair with continuous latents.

    .. math:: f_t(u) = f_0(u)^{1 - \beta_t} \, p(x, u)^{\beta_t}, \qquad
        \log w = \sum_{t=1}^T \log \frac{f_t(u_{t-1})}{f_{t-1}(u_{t-1})}, \qquad u_t \sim \mathrm{HMC}(u_{t-1}; f_t)

    The chains go from the prior or from the guide, f_0, to p(x, u), where u are the latents in unconstrained space, through
    one Hamiltonian transition at each of T temperatures. The mean of w over chains is unbiased for p(x), so its logarithm is
    an estimate that lies below log p(x) on average; more temperatures bring it closer.

    Step sizes are tuned for each temperature and datum in a preliminary run with a few chains, then fixed for the reported run;
    adapting them on the chains being weighted would bias the estimate. They are in units of the standard deviations of f_0,
    change by 2 % per temperature towards the target acceptance (by more with fewer than 500 temperatures), stay between 0.0001
    and 0.5, and vary at random by up to a fifth.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); takes the same arguments.
        x: data as for :func:`pyrovae.log_marginal`.
        num_chains: K, independent chains for every datum.
        num_temperatures: T, steps from f_0 to the joint.
        schedule: ``"sigmoid"`` spends more temperatures at both ends; ``"linear"`` is even.
        start: ``"prior"``, which does not use the guide, or ``"guide"``.
        leapfrog_steps: gradients per transition.
        step_size: initial value of the tuning.
        target_acceptance: acceptance probability that tuning aims at.
        chunk_size: (chain, datum) pairs moved at once; by default as many as fill about 4 MB of observations.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        compile: compile the gradient (:mod:`pyrovae.compile`). ``"auto"`` compiles if there are 20,000 or more gradients, and
            otherwise only captures it without Pyro's handlers; ``False`` runs the programs each time.
        seed: makes the estimate reproducible and leaves the global random stream untouched.
        progress: show a bar.

    Returns:
        The evidence, in nats: ``se`` and ``ess`` are those of the K chain weights, ``elbo`` is the mean of log w, a lower bound
        on average, and ``khat`` is ``nan`` with fewer than 25 chains: then ``reliable`` goes by ``ess``, the effective chains.

    Raises:
        ValueError: the options or data are invalid, a latent is not continuous, or ``start="guide"`` is used with a flow that
            cannot be inverted.

    References:
        `Neal, Annealed Importance Sampling, 2001 <https://arxiv.org/abs/physics/9803008>`_. `Wu,
        Burda, Salakhutdinov and Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017 <https://arxiv.org/abs/1611.04273>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> evidence = pv.ais(vae.model, vae.guide, torch.zeros(3, 9), num_chains=8, num_temperatures=20, seed=0)
        >>> evidence.method, evidence.log_px.shape
        ('AIS from the prior, 20 temperatures', (3,))
    """
    options = AnnealingOptions(
        num_chains=num_chains,
        num_temperatures=num_temperatures,
        schedule=schedule,
        start=start,
        leapfrog_steps=leapfrog_steps,
        step_size=step_size,
        target_acceptance=target_acceptance,
        chunk_size=chunk_size,
        vectorize_particles=vectorize_particles,
        compile=compile,
        seed=seed,
        progress=progress,
    )
    return _anneal(model, guide, x, options)


def _anneal(model: Program, guide: Program, x: Any, options: AnnealingOptions) -> Evidence:
    """The evidence of :func:`ais`."""
    data, first = prepare_annealing(model, guide, x, options)
    data.batch_size = first.whole or options.rows(first.info.num_dims)
    path, gradient = AnnealingPath(options, options.betas), FieldGradient(options.backend(data.num_batches, directions=1))
    estimates: list[Estimate] = []
    tails: list[Tensor] = []
    covered: list[Tensor | None] = []
    notes: list[dict[str, np.ndarray]] = []
    with annealing(model, guide, first, data.num_batches, options, directions=1) as bar:
        for batch in data:
            notes.append(scored_data(inspect_pair(model, guide, *batch), batch))
            if options.start == "guide":
                covered.append(covered_data(model, guide, batch, **first.info.layout, vectorize=options.vectorize_particles))
            with pyro.validation_enabled(False):
                pair = UnconstrainedPair(model, guide, batch, vectorize_particles=options.vectorize_particles)
                field = Field(pair, options.start, gradient)
                moments = LogMoments.of(path.forward(field, path.tune(field, bar), bar))
            estimates.append(moments.finish())
            tails.append(moments.tail)
            bar.set_postfix_str(f"{np.concatenate([part.log_px for part in estimates]).mean():.2f} nats/datum")
    log_px, se, ess, elbo = (np.concatenate(parts) for parts in zip(*estimates, strict=True))
    return Evidence(
        log_px=log_px,
        se=se,
        ess=ess,
        khat=pareto_khat(torch.cat(tails).cpu().numpy(), options.num_chains, precision=torch.finfo(first.dtype).eps),
        elbo=elbo,
        num_samples=options.num_chains,
        **evidence_fields(notes, first.info.given),
        method=Annealed.of(options.start, options.num_temperatures).method,
        covered=joined_flags(covered),
    )
