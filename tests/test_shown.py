"""What a report shows of a trained model: computed from the model, and equal to what it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import pyrovae as pv
from pyrovae.cli.rows import by_class, columns_section, traversal
from pyrovae.cli.shown import MOST_ROWS, SPREAD, STEPS, gather

X = (torch.rand(60, 9, generator=torch.Generator().manual_seed(0)) < 0.4).float()


def trained(**parts: object) -> pv.VAE:
    torch.manual_seed(0)
    vae = pv.make_vae(9, latent_dim=3, hidden=[16], **parts)
    estimator = "vimco" if parts.get("prior") == "categorical" else "elbo"
    vae.fit(X, estimator=estimator, epochs=30, batch_size=60, lr=0.02, seed=0, progress=False, compile=False)
    return vae


def shown_of(vae: pv.VAE, *inputs: torch.Tensor, **options: object):
    evidence = vae.log_marginal(inputs, num_samples=60, proposal="guide", seed=0)
    return gather(vae, inputs, evidence, **options)


def test_the_bars_of_a_diagonal_guide_add_up_to_the_rate():
    vae = trained()
    shown = shown_of(vae, X)
    with torch.no_grad():
        q = vae.encode(X)
        prior = Independent(Normal(torch.zeros(3), torch.ones(3)), 1)
        rate = kl_divergence(Independent(Normal(q.mean, q.variance.sqrt()), 1), prior.expand((60,)))
    assert shown.latent_kl is not None
    assert shown.latent_kl.sum() == pytest.approx(float(rate.mean()), rel=1e-5)
    parts = pv.decompose(vae.model, vae.guide, X, num_samples=50, seed=0)
    assert shown.latent_kl.sum() == pytest.approx(parts.rate.mean(), rel=1e-4)


def test_a_traversal_moves_one_latent_over_the_spread_of_the_data():
    vae = trained()
    shown = shown_of(vae, X)
    with torch.no_grad():
        latents = vae.embed(X)
        row, place = 0, shown.traversed[0]
        point = latents[0].clone()
        point[place] = latents[:, place].mean() + SPREAD * latents[:, place].std()
        expected = vae.decode(point).mean
    assert shown.traversal is not None
    assert shown.traversal.shape == (len(shown.traversed), STEPS, 9)
    np.testing.assert_allclose(shown.traversal[row, -1], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert list(shown.traversed) == sorted(shown.traversed, key=lambda place: -shown.latent_kl[place])
    np.testing.assert_allclose(shown.interpolation[0][[0, -1]], vae.reconstruct(X[:2]).numpy(), rtol=1e-4, atol=1e-6)
    words = traversal(shown, (0.0, 1.0))
    assert [row["name"] for row in words["changes"]] == [f"z[{place}]" for place in shown.traversed]


def test_draws_follow_the_prior_and_the_data():
    vae = trained()
    shown = shown_of(vae, X, train=X, labels=torch.arange(60) % 2, classes=("no", "yes"))
    assert shown.prior.shape == shown.posterior.shape == (8 * 60, 3)
    assert abs(shown.prior.mean()) < 0.15
    assert shown.prior.std() == pytest.approx(1, abs=0.1)
    assert shown.predicted.shape == (8, 60, 9)
    assert set(np.unique(shown.predicted)) <= {0.0, 1.0}
    np.testing.assert_allclose(shown.predicted.mean((0, 1)), X.mean(0).numpy(), atol=0.15)
    assert set(shown.labels) == {"no", "yes"}
    assert by_class(vae.log_marginal(X, num_samples=9, proposal="guide"), shown.labels, "log p(x)")["count"] == 2
    assert shown.baseline is not None
    assert len(shown.observed) <= MOST_ROWS


def test_missing_values_are_missing_in_the_figures():
    vae = trained()
    mask = torch.ones(60, 9, dtype=torch.bool)
    mask[:20, 4] = False
    shown = shown_of(vae, X, mask)
    assert np.isnan(shown.observed[:20, 4]).all()
    assert np.isfinite(shown.observed[20:]).all()
    section = columns_section(shown)
    assert section is not None
    means = {row["name"]: row["observed"] for row in section["worst"]}
    assert means["column 4"] == pytest.approx(float(X[20:, 4].mean()))


@pytest.mark.parametrize(
    "parts",
    [
        {"prior": "hypersphere_uniform", "encoder": "power_spherical"},
        {"prior": "categorical", "encoder": "categorical"},
        {"encoder": "flow"},
    ],
)
def test_any_parts_are_shown(parts: dict[str, str]):
    shown = shown_of(trained(**parts), X)
    assert shown.samples is not None
    assert shown.posterior is not None
