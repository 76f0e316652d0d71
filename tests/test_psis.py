"""The fit of all tails together is ArviZ's of each."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pyrovae.evidence import psis
from pyrovae.evidence.psis import pareto_smooth, pareto_smooth_together, tail_size

LAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "Pareto 0.2": lambda u: -0.2 * torch.log(u),
    "Pareto 0.9": lambda u: -0.9 * torch.log(u) - 400,
    "normal": lambda u: 2 * torch.erfinv(2 * u - 1),
    "bounded": lambda u: torch.log1p(-0.5 * u) + 30,
    "spread": lambda u: 40 * torch.erfinv(2 * u - 1) - 1000,
}


def weights(distribution: str, rows: int, samples: int) -> tuple[Tensor, Tensor]:
    u = torch.rand(rows, samples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_w = LAWS[distribution](u.clamp(1e-12, 1 - 1e-12))
    return log_w.topk(tail_size(samples)).values, log_w.logsumexp(1)


@pytest.mark.parametrize("samples", [225, 1000, 5000])
@pytest.mark.parametrize("distribution", LAWS)
def test_together_is_one_by_one(distribution: str, samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psis, "MOST_NUMBERS", 10_000)  # in several parts
    largest, log_sum = weights(distribution, 6, samples)
    khat, smoothed, ordinary = pareto_smooth_together(largest, log_sum, samples)
    expected = pareto_smooth(largest.numpy(), (log_sum - math.log(samples)).numpy(), samples)
    assert ordinary.all()
    np.testing.assert_allclose(khat, expected[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(smoothed, expected[1], rtol=0, atol=1e-9)


def test_what_is_not_ordinary_is_left_to_arviz() -> None:
    largest, log_sum = weights("normal", 9, 1000)
    size = largest.shape[1] // 5
    largest[0], log_sum[0] = 3.0, 3.0 + math.log(1000)  # constant
    largest[1, 5] = math.nan
    largest[2, 0], log_sum[2] = math.inf, math.inf
    largest[3] = -math.inf
    largest[4, size - 2 : size + 2] = largest[4, size]  # ties at the cutoff
    largest[5, 1:] -= 900.0  # one weight far above all others
    largest[6] = 2.0 + 1e-6 * torch.arange(largest.shape[1], 0, -1) / 1000  # constant to the precision of float32
    largest[7, size + 1 :] = -math.inf  # which is ordinary: the tail is there
    _, _, ordinary = pareto_smooth_together(largest, log_sum, 1000, precision=1.2e-7)
    assert ordinary.tolist() == [False] * 7 + [True] * 2
    assert not pareto_smooth_together(*weights("normal", 3, 200), 200)[2].any()  # another size of tail


@pytest.mark.parametrize(("samples", "khat", "lowered"), [(50, -2.73487644, 0.0377711), (500, -5.26479971, 0.03703932)])
def test_a_tail_of_ties_is_fitted_as_arviz_did_until_it_refused(samples: int, khat: float, lowered: float) -> None:
    # As many largest weights as the tail has, all the same, and one value below: discrete latents have such weights.
    fitted = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
    log_weights = np.where(np.arange(samples) < fitted, 0.0, -1.4641)[None]
    log_px = np.log(np.mean(np.exp(log_weights), 1))
    found, smoothed = pareto_smooth(np.sort(log_weights)[:, -tail_size(samples) :], log_px, samples)
    np.testing.assert_allclose(found, khat, rtol=1e-7)  # by ArviZ 0.23.4
    np.testing.assert_allclose(log_px - smoothed, lowered, rtol=1e-5)
