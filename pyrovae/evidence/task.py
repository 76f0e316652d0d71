"""What one call of ``log_marginal(..., proposal="auto")`` fixes for all its groups of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro
import torch
from torch import Tensor

from ..data.matching import Batch
from ..programs.inspect import FirstBatch
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode
from .enumeration import enumerate_latents
from .planning import ImportanceOptions, Plan, one_datum
from .proposals import mixture_draws
from .psis import Array
from .streaming import LogMoments
from .terms import PairTerms

__all__ = ["Task", "make_task"]

# Covariances of more latents than these are not fitted.
MOST_LATENTS = 400


@dataclass(frozen=True)
class Task:
    """What one call of :func:`pyrovae.log_marginal` fixes for all its groups.

    Attributes:
        num_samples: draws of an estimate, at the most.
        target_se: the standard error to aim at, or ``None``.
        checks: the numbers of draws that an estimate may be from.
        discrete: whether there are discrete latents.
        precision: relative rounding error of log-weights.
        chunk: (draw, datum) pairs that are scored at once.
        whole: how many data have to run together, if any.
        threads: chunks of the guide's draws that run at the same time.
        draw_guide: starts to draw log-weights of the guide, and returns the function that waits for them.
        probe: what the guide misses of the data in some rows, from their pilot's largest log-weight and estimate, in nats.
        finish: the answer for some data from their sums, by the names of the store's files.
        terms: the pair over its unconstrained latents, or ``None`` if it has none.
        mixture: draws of the mixture of prior and guide, from how many are made in all and how many are the prior's.
        exact: the exact answer for some data, by the names of the store's files, or ``None`` if it is not cheap.
    """

    num_samples: int
    target_se: float | None
    checks: list[int]
    discrete: bool
    precision: float
    chunk: int
    whole: int | None
    threads: int
    draw_guide: Callable[[Batch, int], Callable[[], Tensor]]
    probe: Callable[[Batch, Array, Array], Array]
    finish: Callable[[LogMoments], dict[str, Array]]
    terms: PairTerms | None
    mixture: Callable[[int, int], Callable[[Batch, int], Tensor]]
    exact: Callable[[Batch], dict[str, Array] | None]


def make_task(
    model: Program,
    guide: Program,
    first: FirstBatch,
    options: ImportanceOptions,
    plan: Plan,
    *,
    draw_guide: Callable[[Batch, int], Callable[[], Tensor]],
    probe: Callable[[Batch, Array, Array], Array],
    finish: Callable[[LogMoments], dict[str, Array]],
) -> tuple[Task, str | None]:
    """The task, and why no proposal can be fitted to the pair, if that is so; see :class:`Task`."""
    terms, why = _pair_terms(model, guide, first, options, plan)

    def exact(batch: Batch) -> dict[str, Array] | None:
        if set(first.info.discrete) != set(first.info.latents):
            return None
        nesting, vectorize = first.info.max_plate_nesting, options.vectorize_particles
        try:
            answer = enumerate_latents(model, batch, nesting, plan.chunk, vectorize, limit=options.num_samples)
        except ValueError:  # too many assignments, or they cannot be listed; the guide's draws need no list
            return None
        # As many weights as assignments, each p(x).
        moments = LogMoments(len(answer.log_px), options.num_samples, first.device, curve=True)
        log_w = torch.as_tensor(answer.log_px, device=first.device).expand(answer.num_points, -1)
        moments.update(log_w)
        constant = np.where(np.isfinite(answer.log_px), -np.inf, np.inf)
        return finish(moments) | {"se": answer.error, "khat": constant, "log_px_psis": answer.log_px}

    task = Task(
        num_samples=options.num_samples,
        target_se=options.target_se,
        checks=plan.checks,
        discrete=bool(first.info.discrete),
        precision=torch.finfo(first.dtype).eps,
        chunk=plan.chunk,
        whole=plan.whole,
        threads=plan.threads,
        draw_guide=draw_guide,
        probe=probe,
        finish=finish,
        terms=terms,
        exact=exact,
        mixture=partial(mixture_draws, model, guide, options.vectorize_particles, first.info.max_plate_nesting),
    )
    return task, why


def _pair_terms(
    model: Program, guide: Program, first: FirstBatch, options: ImportanceOptions, plan: Plan
) -> tuple[PairTerms | None, str | None]:
    """The pair over its unconstrained latents; or ``None``, and why no proposal can be fitted to it."""
    if first.info.discrete:
        return None, f"the latent site {first.info.discrete[0]!r} is discrete"
    if plan.whole is not None:
        return None, "the pair is tied to one set of data"
    backend = "inductor" if plan.compile else "eager"
    terms = PairTerms(model, guide, options.vectorize_particles, backend, options.precision, plan.chunk // 2)
    try:
        with torch.no_grad(), pyro.validation_enabled(False), evaluation_mode(model, guide):
            number = terms.pair(one_datum(first)).num_latents
    except ValueError as error:
        return None, str(error)
    if number > MOST_LATENTS:
        return None, f"a datum has {number:,} latent numbers, more than the {MOST_LATENTS} to which a Gaussian is fitted"
    return terms, None
