from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian, counts_pair, curved_pair, nested_plates_pair, switches_pair
from scipy import stats
from tqdm import tqdm

import pyrovae as pv
from pyrovae.evidence.annealing_options import AnnealingOptions, inverse_temperatures
from pyrovae.evidence.paths import AnnealingPath, Field, FieldGradient
from pyrovae.programs.unconstrained import UnconstrainedPair


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("start", "schedule"), [("prior", "sigmoid"), ("guide", "linear")])
def test_ais_agrees_with_the_closed_form_within_its_error(start: str, schedule: str):
    pair = LinearGaussian(spread=1.5)
    x = pair.sample(60)
    evidence = pv.ais(pair.model, pair.guide, x, num_temperatures=60, start=start, schedule=schedule, leapfrog_steps=5, seed=0)
    error = evidence.log_px - pair.log_px(x)
    assert abs(error.mean()) < 4 * evidence.mean_se
    assert np.mean(np.abs(error) < 3 * evidence.se) > 0.9, "the error of 16 weights is itself uncertain"
    assert evidence.mean_se < 0.03
    assert (evidence.elbo < evidence.log_px).all()
    assert (evidence.elbo - pair.log_px(x)).mean() < 0
    assert (evidence.num_samples, evidence.num_dims) == (16, 3)
    assert evidence.method == f"AIS from the {start}, 60 temperatures"


@pytest.mark.usefixtures("float64")
def test_ais_agrees_with_quadrature_on_curved_and_on_positive_latents():
    curved = curved_pair()
    x = curved.sample(30)
    counts = counts_pair()
    y = torch.tensor([0.0, 1, 4, 9])
    for pair, data in [(curved, x), (counts, y)]:
        truth = pv.exact(pair.model, pair.guide, data)
        evidence = pv.ais(pair.model, pair.guide, data, num_temperatures=30, leapfrog_steps=4, num_chains=32, seed=0)
        error = evidence.log_px - truth.log_px
        assert abs(error.mean()) < 4 * evidence.mean_se
        assert (np.abs(error) < 5 * evidence.se).all()
        assert evidence.se.max() < 0.2
        assert np.isfinite(evidence.khat).all()


@pytest.mark.usefixtures("float64")
def test_reliable_tells_chains_that_arrive_from_chains_that_do_not():
    pair = LinearGaussian(latent_dim=2, noise=0.7)
    x = pair.sample(30)
    options = {"leapfrog_steps": 4, "seed": 0}
    slow, fast = (pv.ais(pair.model, pair.guide, x, num_temperatures=count, **options) for count in (100, 2))
    error = np.abs(slow.log_px - pair.log_px(x))
    assert slow.reliable.mean() > 0.9
    assert (error < 3 * slow.se)[slow.reliable].mean() > 0.9
    assert fast.reliable.mean() < 0.1
    assert (fast.log_px - pair.log_px(x)).mean() < -0.2, "what is flagged is far off"


@pytest.mark.usefixtures("float64")
def test_unbiased_for_px_even_with_few_temperatures():
    # The mean of w over many chains, not its logarithm, with steps that were tuned beforehand.
    pair = LinearGaussian()
    x = pair.sample(1)
    evidence = pv.ais(pair.model, pair.guide, x.expand(20, -1), num_temperatures=4, num_chains=500, leapfrog_steps=3, seed=0)
    ratio = np.exp(evidence.log_px - pair.log_px(x))
    assert ratio.mean() == pytest.approx(1, abs=4 * ratio.std(ddof=1) / np.sqrt(20))
    assert ratio.std(ddof=1) / np.sqrt(20) < 0.05


@pytest.mark.usefixtures("float64")
def test_a_transition_leaves_its_target_as_it_is():
    pair = counts_pair()
    y = torch.tensor([0.0, 3.0])
    field = Field(UnconstrainedPair(pair.model, pair.guide, (y,)), "prior", FieldGradient("eager"))
    path = AnnealingPath(AnnealingOptions(leapfrog_steps=5, step_size=0.3), [0.0, 1.0])
    posterior = dist.Gamma(3 + y, torch.tensor(2.5))
    state = field.at(posterior.sample((4000,)).log()[..., None])
    for _ in range(3):
        state, acceptance = path._move(field, state, 1.0, torch.full((2,), 0.45), torch.ones(2, 1))
    assert ((acceptance > 0.5) & (acceptance < 0.999)).all()
    for datum in range(2):
        drawn = state.flat[:, datum, 0].exp().numpy()
        assert stats.kstest(drawn, stats.gamma(3 + y[datum].item(), scale=1 / 2.5).cdf).pvalue > 0.001
    torch.testing.assert_close(state.log_ratio, field.at(state.flat).log_ratio)


@pytest.mark.usefixtures("float64")
def test_step_sizes_follow_temperature_and_datum():
    pair = LinearGaussian(latent_dim=1, data_dim=1, noise=0.02)
    x = pair.sample(3)
    field = Field(UnconstrainedPair(pair.model, pair.guide, (x,)), "prior", FieldGradient("eager"))
    options = AnnealingOptions(num_chains=8, num_temperatures=100, leapfrog_steps=4)
    path = AnnealingPath(options, options.betas)
    tuned = path.tune(field, tqdm(disable=True))
    assert len(tuned.steps) == 101
    scale = 0.02 / abs(pair.weight.item())  # the posterior's, to four digits
    assert (tuned.steps[20] > 3 * tuned.steps[-1]).all()
    assert ((tuned.steps[-1] > 0.5 * scale) & (tuned.steps[-1] < 4 * scale)).all()
    torch.testing.assert_close(tuned.scale, torch.ones(3, 1), atol=0.5, rtol=0)


def test_schedules_run_from_zero_to_one():
    for schedule in ("linear", "sigmoid"):
        betas = np.array(inverse_temperatures(schedule, 50))
        assert len(betas) == 51
        assert (betas[0], betas[-1]) == (0.0, pytest.approx(1.0))
        assert (np.diff(betas) > 0).all()
        np.testing.assert_allclose(betas + betas[::-1], 1, atol=1e-12)
    sigmoid = 1 / (1 + np.exp(-4 * np.linspace(-1, 1, 51)))  # as in Wu et al. 2017
    np.testing.assert_allclose(betas, (sigmoid - sigmoid[0]) / (sigmoid[-1] - sigmoid[0]), atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_bdmc_brackets_the_exact_value_and_closes_with_more_temperatures():
    pair = LinearGaussian()
    gaps = []
    for num_temperatures in (4, 16, 64):
        sandwich = pv.bdmc(
            pair.model, pair.guide, pair.sample(1), num_data=60, num_temperatures=num_temperatures, num_chains=8,
            leapfrog_steps=4, seed=0,
        )  # fmt: skip
        exact = pair.log_px(torch.as_tensor(sandwich.data[0]))
        below, above = exact - sandwich.lower, sandwich.upper - exact
        for side in (below, above):
            assert side.mean() > -3 * side.std(ddof=1) / np.sqrt(60)
        assert sandwich.gap == pytest.approx((below + above).mean())
        assert sandwich.gap > 0
        gaps.append(sandwich.gap)
    assert gaps[0] > 1.5 * gaps[1] > 3 * gaps[2]
    assert gaps[2] < 0.2
    assert "simulated from the model" in sandwich.summary()


@pytest.mark.usefixtures("float64")
def test_the_reverse_weights_are_unbiased_for_the_inverse():
    pair = LinearGaussian(latent_dim=1, data_dim=1, noise=1.0)
    sandwich = pv.bdmc(
        pair.model, pair.guide, pair.sample(1), num_data=1000, num_temperatures=4, num_chains=1, leapfrog_steps=3, seed=0
    )
    ratio = np.exp(pair.log_px(torch.as_tensor(sandwich.data[0])) - sandwich.upper)
    error = ratio.std(ddof=1) / np.sqrt(1000)
    assert error < 0.05
    assert ratio.mean() == pytest.approx(1, abs=4 * error)


@pytest.mark.usefixtures("float64")
def test_simulated_data_follow_the_model_and_covariates_stay():
    def model(x: torch.Tensor, shift: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor, shift: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    shift = torch.tensor([-5.0, 5.0])
    sandwich = pv.bdmc(model, guide, (torch.zeros(2), shift), num_data=400, num_temperatures=5, num_chains=2, seed=0)
    x, given = sandwich.data
    np.testing.assert_array_equal(given, np.tile([-5.0, 5.0], 200))
    assert stats.kstest(x - given, stats.norm(0, np.sqrt(2)).cdf).pvalue > 0.001


@pytest.mark.usefixtures("float64")
def test_several_sites_in_inner_plates_and_particles_one_by_one():
    pair = nested_plates_pair(-2)
    x = torch.randn(5, 4)
    exact = pv.exact(pair.model, pair.guide, x)
    evidence = pv.ais(pair.model, pair.guide, x, num_temperatures=50, leapfrog_steps=4, seed=0)
    assert abs((evidence.log_px - exact.log_px).mean()) < 5 * evidence.mean_se
    slow = pv.ais(
        pair.model, pair.guide, x, num_temperatures=5, num_chains=3, leapfrog_steps=2, vectorize_particles=False, seed=0
    )
    fast = pv.ais(pair.model, pair.guide, x, num_temperatures=5, num_chains=3, leapfrog_steps=2, seed=0)
    assert np.isfinite(slow.log_px).all()
    assert np.abs(slow.log_px - fast.log_px).mean() < 10


def test_float32_networks_chunks_and_seeds():
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    x = torch.bernoulli(torch.full((7, 6), 0.5))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    options = {"num_temperatures": 10, "num_chains": 8, "chunk_size": 32, "leapfrog_steps": 3, "seed": 0}
    first, second, plain = (
        pv.ais(vae.model, vae.guide, x, start="guide", compile=compile, **options) for compile in ("auto", "auto", False)
    )
    assert torch.equal(torch.rand(3), expected)
    assert first.log_px.dtype == np.float64
    np.testing.assert_array_equal(first.log_px, second.log_px)
    np.testing.assert_allclose(first.log_px, plain.log_px, atol=1e-3)
    assert np.isnan(first.khat).all()
    assert all(parameter.grad is None for parameter in vae.parameters())
    sampled = vae.log_marginal(x, num_samples=2000, seed=0)
    assert np.abs(first.log_px - sampled.log_px).max() < 0.4


def test_what_cannot_be_meant_is_refused_in_a_sentence():
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    x = torch.ones(4, 6)
    for bad in (
        {"num_chains": 0},
        {"num_temperatures": 0},
        {"schedule": "sigmod"},
        {"start": "gide"},
        {"leapfrog_steps": 0},
        {"step_size": 2.0},
        {"target_acceptance": 1.0},
        {"chunk_size": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            pv.ais(vae.model, vae.guide, x, **bad)
    with pytest.raises(ValueError, match="num_data must be a positive integer"):
        pv.bdmc(vae.model, vae.guide, x, num_data=0)
    switches = switches_pair()
    with pytest.raises(ValueError, match="is discrete, and this needs continuous latents"):
        pv.ais(switches.model, switches.guide, torch.zeros(2, 2).double())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_chains", [2, 5])
def test_the_standard_error_of_few_chains_has_their_degrees_of_freedom(num_chains: int):
    pair = LinearGaussian()
    evidence = pv.ais(
        pair.model, pair.guide, pair.sample(6), num_temperatures=4, num_chains=num_chains, leapfrog_steps=2, seed=0
    )
    # The squared deviation of normalised weights from 1/K, over K - 1: the sample variance of the mean weight, relative.
    variance = (1 / evidence.ess - 1 / num_chains) * num_chains / (num_chains - 1)
    np.testing.assert_allclose(evidence.se, np.sqrt(variance), rtol=1e-6)
    assert evidence.se.min() > 0.01


def test_the_sandwichs_error_is_that_of_a_mean():
    upper = np.array([0.0, 1.0, 4.0, 3.0])
    zero = np.zeros(4)
    sandwich = pv.Sandwich(zero, upper, zero, zero, 16, 100, 3, "prior", (zero,))
    assert sandwich.gap == 2
    assert sandwich.gap_se == pytest.approx(np.sqrt((4 + 1 + 4 + 1) / 3) / 2)
    assert f"standard error {sandwich.gap_se:.3f}" in sandwich.summary()
    assert np.isnan(pv.Sandwich(zero[:1], upper[:1], zero[:1], zero[:1], 16, 100, 3, "prior", (zero[:1],)).gap_se)
