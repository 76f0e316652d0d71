"""log p(x) without sampling: discrete latents summed, linear-Gaussian pairs in closed form, two dimensions by quadrature."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyro
import torch
from tqdm import tqdm

from .._validation import positive_number, unknown
from ..data.matching import Batch
from ..programs.inspect import PairInfo, inspect_pair, open_pair
from ..programs.sites import Program, sites_of
from ..programs.state import in_own_scope
from ..programs.tracing import trace_from_prior
from ..programs.unconstrained import UnconstrainedPair
from .answer import Answer
from .enumeration import enumerate_latents
from .kinds import EXACT_METHODS, KINDS
from .latent_quadrature import integrate_by_quadrature
from .linear_gaussian import integrate_linear_gaussian, why_not_linear_gaussian
from .measure import evidence_fields, scored_data
from .results import Evidence
from .scope import seeded_evaluation

__all__ = ["exact"]

Method = Literal["auto", "enumerate", "quadrature", "linear_gaussian"]
# Observed numbers that are computed at once.
CHUNK_NUMBERS = 2**22


@in_own_scope()
def exact(
    model: Program,
    guide: Program,
    x: Any,
    *,
    method: Method = "auto",
    tolerance: float = 1e-5,
    vectorize_particles: bool = True,
    seed: int | None = 0,
    progress: bool = False,
) -> Evidence:
    r"""Compute log p(x) of each datum without Monte Carlo error, for few latents or linear-Gaussian pairs.

    .. math:: \log p(x) = \log \sum_z p(x, z) \qquad \text{or} \qquad \log p(x) = \log \int p(x, z) \, dz

    - ``"enumerate"``: all latents are discrete, and every assignment of theirs is summed;
    - ``"linear_gaussian"``: all sites are Normal with locations affine in earlier latents and scales that do not depend on
      them, so log p(x, z) is a quadratic in z, whose integral is known. That they are affine is read off every tensor
      operation on a latent, so a network that is affine only near some points is refused;
    - ``"quadrature"``: one or two continuous numbers per datum, by cells that are split wherever they may hold more than is
      known of them: once over all that the prior allows, and again in the scale of the posterior that showed, until two such
      answers agree. A mode that shows in no point of either, nor in a draw of the prior or the guide, would be missed.

    An angle is integrated over one turn, and a mixture over all that any of its components allows.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x); only quadrature uses it, to find modes.
        x: data as for :func:`pyrovae.log_marginal`.
        method: one of the above, or ``"auto"`` for the first that fits.
        tolerance: the error at which quadrature stops, in nats.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: of the draws that place the grid; the global random stream is left untouched. ``None`` uses that stream.
        progress: show a bar with the running mean.

    Returns:
        The evidence, in nats. ``se`` is what rounding may have moved it by, and for quadrature also what the cells leave in
        doubt and by how much two sets of them differ: where it is above 0.01, the answer is not ``reliable``.
        ``num_samples`` is the number of assignments or grid points per datum, one in closed form; ``khat`` is ``-inf``, as for
        constant weights; ``elbo`` equals ``log_px``, since nothing is bounded.

    Raises:
        ValueError: bad data, or latents that the method cannot integrate out; the message says why.

    References:
        `Tipping and Bishop, Probabilistic Principal Component Analysis, 1999
        <https://doi.org/10.1111/1467-9868.00196>`_. `Genz and Malik, An adaptive algorithm for numerical integration over an
        N-dimensional rectangular region, 1980 <https://doi.org/10.1016/0771-050X(80)90039-X>`_.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16], activation="tanh")
        >>> evidence = pv.exact(vae.model, vae.guide, torch.zeros(3, 9))
        >>> evidence.method, bool(evidence.se.max() < 1e-4)
        ('exact, by quadrature', True)
    """
    if method not in ("auto", *EXACT_METHODS):
        raise ValueError(unknown("method", method, ["auto", *EXACT_METHODS]))
    tolerance = positive_number(tolerance, "tolerance")
    data, first = open_pair(model, guide, x, vectorize_particles=vectorize_particles)
    data.batch_size = first.whole or 16
    parts: list[Answer] = []
    notes: list[dict[str, np.ndarray]] = []
    chosen: str | None = None if method == "auto" else method
    with (
        seeded_evaluation(model, guide, first.device, seed),
        tqdm(data, total=data.num_batches, desc="exact log p(x)", unit="batch", disable=not progress) as bar,
    ):
        for batch in bar:
            notes.append(scored_data(inspect_pair(model, guide, *batch), batch))
            # The data and the pair have been checked, and a grid extends to values that round to the edge of a support.
            with pyro.validation_enabled(False), torch.no_grad():
                chosen = chosen or _choose(model, guide, batch)
                parts.append(_answer(chosen, model, guide, batch, first.info, tolerance, vectorize_particles))
            bar.set_postfix_str(f"{np.mean(np.concatenate([part.log_px for part in parts])):.2f} nats/datum")
    assert chosen is not None
    log_px = np.concatenate([part.log_px for part in parts])
    points = max(part.num_points for part in parts)
    return Evidence(
        log_px=log_px,
        se=np.concatenate([part.error for part in parts]),
        ess=np.full(len(log_px), float(points)),
        khat=np.full(len(log_px), -np.inf),
        elbo=log_px.copy(),
        num_samples=points,
        **evidence_fields(notes, first.info.given),
        method=KINDS[chosen].method,
    )


def _answer(
    method: str, model: Program, guide: Program, batch: Batch, info: PairInfo, tolerance: float, vectorize: bool
) -> Answer:
    """log p(x) of one batch by one method."""
    dims = max(info.num_dims, 256)
    if method == "enumerate":
        return enumerate_latents(model, batch, info.max_plate_nesting, CHUNK_NUMBERS // dims, vectorize)
    pair = UnconstrainedPair(model, guide, batch, vectorize_particles=vectorize)
    if method == "linear_gaussian":
        return integrate_linear_gaussian(pair)
    return integrate_by_quadrature(pair, tolerance, max(1, CHUNK_NUMBERS // (dims * pair.num_data)))


def _choose(model: Program, guide: Program, batch: Batch) -> str:
    """The first method that fits the pair."""
    trace = trace_from_prior(model, None, batch, 1, None).guide
    if all(site["fn"].has_enumerate_support for site in sites_of(trace)):
        return "enumerate"
    pair = UnconstrainedPair(model, guide, batch)
    why = why_not_linear_gaussian(pair)
    if why is None:
        return "linear_gaussian"
    if pair.num_latents <= 2:
        return "quadrature"
    raise ValueError(
        f"There is no exact answer for {pair.num_latents} continuous latent numbers per datum, and {why}: use pyrovae.ais, or "
        f"log_marginal."
    )
