"""Streaming sums of weights equal the formulas on all weights, and resampling follows the weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyrovae.evidence.psis import tail_size
from pyrovae.evidence.streaming import Estimate, LogMoments, Resampler

SAMPLES, DATA = 600, 4


def log_weights() -> torch.Tensor:
    return 300 + 2 * torch.randn(SAMPLES, DATA, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def expected(log_w: np.ndarray) -> Estimate:
    w = np.exp(log_w - log_w.max())
    return Estimate(
        log_px=logsumexp(log_w, axis=0) - math.log(len(log_w)),
        se=w.std(0, ddof=1) / w.mean(0) / math.sqrt(len(w)),
        ess=w.sum(0) ** 2 / (w**2).sum(0),
        elbo=log_w.mean(0),
    )


def in_chunks(log_w: torch.Tensor) -> LogMoments:
    moments = LogMoments(DATA, SAMPLES)
    for chunk in log_w.split(77):
        moments.update(chunk)
    return moments


def by_rows(log_w: torch.Tensor) -> LogMoments:
    moments = LogMoments(DATA, SAMPLES, curve=True)
    for chosen in torch.arange(DATA).split(3):
        part = moments.rows(chosen)
        part.extend(iter(log_w[:, chosen].split(77)), SAMPLES)
        moments.put(chosen, part)
    moments.num_drawn = SAMPLES
    return moments


def merged(log_w: torch.Tensor) -> LogMoments:
    moments = in_chunks(log_w[:100])
    moments.merge(LogMoments.of(log_w[100:]))
    return moments


@pytest.mark.parametrize("reduce", [LogMoments.of, in_chunks, by_rows, merged])
def test_sums_give_the_formulas_however_the_samples_come(reduce: Callable[[torch.Tensor], LogMoments]) -> None:
    log_w = log_weights()
    moments = reduce(log_w)
    assert moments.num_drawn == SAMPLES
    for have, want in zip(moments.finish(), expected(log_w.numpy()), strict=True):
        np.testing.assert_allclose(have, want, rtol=1e-9)
    largest = log_w.sort(0, descending=True).values[: tail_size(SAMPLES)].T
    torch.testing.assert_close(moments.tail, largest, rtol=0, atol=0)


def test_the_curve_has_the_sums_of_the_first_samples() -> None:
    log_w = log_weights()
    moments = by_rows(log_w)
    assert moments.recorded == [1, 10, 100]
    for place, size in enumerate(moments.recorded):
        torch.testing.assert_close(moments.curve_sum[:, place], torch.logsumexp(log_w[:size], 0))
        torch.testing.assert_close(moments.curve_square[:, place], torch.logsumexp(2 * log_w[:size], 0))


def test_normalised_weights_of_chunks_sum_to_one() -> None:
    log_w = log_weights()
    log_w[:, 0] = -math.inf
    moments, mean = LogMoments(DATA, SAMPLES), torch.zeros(DATA, dtype=torch.float64)
    values = torch.arange(SAMPLES, dtype=torch.float64)[:, None]
    for chunk, value in zip(log_w.split(77), values.split(77), strict=True):
        earlier, new = moments.normalize(chunk)
        mean = mean * earlier + (new * value).sum(0)
    want = (torch.softmax(log_w, 0) * values).sum(0)
    torch.testing.assert_close(mean[1:], want[1:])
    assert mean[0] == 0, "no weight at all"
    assert moments.finish().ess[0] == 0
    assert moments.finish().log_px[0] == -math.inf


def test_resampled_values_have_the_frequencies_of_their_weights() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([[0.1, 0.7], [0.2, 0.0], [0.3, 0.1], [0.4, 0.2]], dtype=torch.float64)
    resampler = Resampler(LogMoments(2, 4), num_draws=20_000)
    number = torch.arange(4)[:, None].expand(4, 2)
    for chosen in torch.arange(4).split(3):
        # A second value shows that all that belongs to a sample is taken together.
        resampler.update(probabilities[chosen].log(), {"z": number[chosen], "twice": 2 * number[chosen]})
    drawn = resampler.draws["z"]
    assert torch.equal(resampler.draws["twice"], 2 * drawn)
    frequencies = torch.stack([(drawn == value).double().mean(0) for value in range(4)])
    assert ((frequencies - probabilities).abs() < 5 * (probabilities * (1 - probabilities) / 20_000).sqrt() + 1e-12).all()


def test_draws_stay_where_a_chunk_has_no_finite_weight() -> None:
    resampler = Resampler(LogMoments(1, 4), num_draws=50)
    resampler.update(torch.zeros(2, 1, dtype=torch.float64), {"z": torch.ones(2, 1)})
    resampler.update(torch.full((2, 1), -math.inf, dtype=torch.float64), {"z": torch.zeros(2, 1)})
    assert (resampler.draws["z"] == 1).all()
