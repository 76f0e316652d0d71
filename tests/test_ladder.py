"""``proposal="auto"``: evidence that repairs itself, against exact answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian, counts_pair
from scipy import integrate, stats
from torch import Tensor

import pyrovae as pv
from pyrovae.evidence import RUNGS
from pyrovae.evidence.ascent import climb, curvature
from pyrovae.evidence.fitted import Fitted, slope_of, stacked, tempered
from pyrovae.evidence.fitting import Scored, adapted
from pyrovae.evidence.ladder import Ladder
from pyrovae.evidence.matching import match_gradients
from pyrovae.evidence.strata import FittedField
from pyrovae.evidence.terms import PairTerms

BAD_GUIDES = ["narrow", "shifted", "constant"]


def bad_guide(pair: LinearGaussian, kind: str):
    """A guide that is four times too narrow, shifted by five standard deviations, or the same for all data."""

    def guide(x: Tensor) -> None:
        q, (size, latents) = pair.posterior(x), (len(x), pair.latent_dim)
        made = {
            "narrow": lambda: dist.MultivariateNormal(q.loc, q.covariance_matrix / 16),
            "shifted": lambda: dist.MultivariateNormal(q.loc + 5 * q.variance.sqrt(), q.covariance_matrix),
            "constant": lambda: dist.Normal(torch.zeros(size, latents).double(), 1.0).to_event(1),
        }[kind]()
        with pyro.plate("data", size):
            pyro.sample("z", made)

    return guide


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("guide", BAD_GUIDES)
@pytest.mark.parametrize("latents", [3, 20, pytest.param(100, marks=pytest.mark.slow)])
def test_bad_guides_are_repaired(latents: int, guide: str):
    pair = LinearGaussian(latent_dim=latents, data_dim=latents + 5)
    x = pair.sample(30)
    evidence = pv.log_marginal(pair.model, bad_guide(pair, guide), x, num_samples=2000, proposal="auto", seed=0)
    z = (evidence.log_px - pair.log_px(x)) / evidence.se
    assert evidence.reliable.all()
    assert (evidence.rung > 0).all()
    assert np.abs(z).max() < 4
    assert z.std() == pytest.approx(1, abs=0.35)
    assert np.abs(evidence.log_px - pair.log_px(x)).max() < 0.02
    # The guide alone is off by nats, and the ladder's bound is still the guide's.
    assert evidence.gap > 1


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("guide", BAD_GUIDES)
@pytest.mark.parametrize("latents", [3, 20])
def test_95_percent_intervals_cover_as_often_as_they_say(latents: int, guide: str):
    pair = LinearGaussian(latent_dim=latents, data_dim=latents + 5)
    x = pair.sample(1).repeat(1000, 1)
    # With three latents the guide has no part in the estimates, so each guide has a seed of its own.
    seed = 11 + BAD_GUIDES.index(guide)
    evidence = pv.log_marginal(pair.model, bad_guide(pair, guide), x, num_samples=2000, proposal="auto", seed=seed)
    z = (evidence.log_px - pair.log_px(x[:1])) / evidence.se
    assert 0.93 <= np.mean(np.abs(z) < 1.96) <= 0.97


class TwoModes:
    """z ~ N(0, I) and x_1 ~ N(z_1^2, s^2), x_l ~ N(z_l, s^2): the sign of z_1 is open, and the guide knows one only."""

    def __init__(self, latents: int, noise: float = 0.3):
        self.latents, self.noise = latents, noise

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latents).double(), 1.0).to_event(1))
            loc = torch.cat([z[..., :1].square(), z[..., 1:]], -1)
            pyro.sample("x", dist.Normal(loc, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        loc = torch.cat([x[:, :1].clamp(min=0.01).sqrt(), x[:, 1:]], 1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))

    def log_px(self, x: Tensor) -> np.ndarray:
        def one(first: float) -> float:
            grid = np.linspace(-6, 6, 20001)
            return math.log(integrate.simpson(stats.norm.pdf(first, grid**2, self.noise) * stats.norm.pdf(grid), x=grid))

        rest = stats.norm.logpdf(x[:, 1:].numpy(), 0, math.sqrt(1 + self.noise**2)).sum(1)
        return np.array([one(first) for first in x[:, 0].tolist()]) + rest


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("latents", [1, 3, 20])
def test_a_mode_that_the_guide_does_not_know(latents: int):
    pair = TwoModes(latents)
    random = np.random.default_rng(0)
    x = torch.as_tensor(np.column_stack([random.uniform(0.5, 2.0, 20), random.normal(size=(20, latents - 1))]))
    truth = pair.log_px(x)
    alone = pv.log_marginal(pair.model, pair.guide, x, num_samples=4000, proposal="guide", seed=0)
    assert np.mean(truth - alone.log_px) > 0.4  # log 2 but for the overlap of the modes
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=4000, proposal="auto", seed=0)
    good = evidence.reliable
    assert good.all()
    assert (np.abs(evidence.log_px - truth) < 4 * evidence.se + 1e-3)[good].all()


@pytest.mark.usefixtures("float64")
def test_positive_latents():
    pair = counts_pair()
    y = torch.tensor([0.0, 1, 3, 6]).repeat(20)
    evidence = pv.log_marginal(pair.model, pair.guide, y, num_samples=2000, proposal="auto", seed=0)
    z = (evidence.log_px - pair.log_px(y)) / evidence.se
    assert evidence.reliable.all()
    assert abs(z.mean()) < 0.45
    assert 0.75 < z.std() < 1.25


@pytest.mark.usefixtures("float64")
def test_a_good_guide_is_left_alone():
    pair = LinearGaussian(latent_dim=8, data_dim=9, spread=1.1)
    x = pair.sample(20)
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=1000, proposal="auto", seed=0)
    assert (evidence.rung == 0).all()
    assert (evidence.drawn == 1000).all()
    searched = evidence.calls - 1000 - evidence.pilot
    assert (searched > 0).all()
    assert (searched < 1700).all()
    assert "20 by the guide; all reliable" in evidence.summary()


@pytest.mark.usefixtures("float64")
def test_the_estimate_is_unbiased():
    # Few draws and a tail, so that the logarithm is biased, and its exponential must not be.
    pair = LinearGaussian(latent_dim=6, data_dim=6)
    x = pair.sample(1).repeat(300, 1)
    evidence = pv.log_marginal(pair.model, bad_guide(pair, "shifted"), x, num_samples=60, proposal="auto", seed=2)
    ratio = np.exp(evidence.log_px - pair.log_px(x[:1]))
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / math.sqrt(len(ratio))


@pytest.mark.usefixtures("float64")
def test_a_target_error_is_met_from_fresh_draws():
    pair = LinearGaussian(latent_dim=20, data_dim=25)
    x = pair.sample(30)
    options = {"num_samples": 20_000, "proposal": "auto", "seed": 0}
    evidence = pv.log_marginal(pair.model, bad_guide(pair, "narrow"), x, target_se=0.02, **options)
    assert (evidence.se <= 0.02).mean() > 0.9
    assert evidence.drawn.mean() < 4000
    z = (evidence.log_px - pair.log_px(x)) / evidence.se
    assert np.abs(z).max() < 4


def test_forty_bits_are_flagged_and_the_reason_is_told():
    torch.manual_seed(0)
    weight = torch.randn(40, 60)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(40)).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x), 40)).to_event(1))

    x = torch.bernoulli(0.5 * torch.ones(5, 40)) @ weight
    evidence = pv.log_marginal(model, guide, x, num_samples=1000, proposal="auto", seed=0)
    assert not evidence.reliable.any()
    assert evidence.notes["not_refined"] == "the latent site 'z' is discrete"
    assert "flagged" in evidence.summary()
    assert (evidence.calls <= 2000).all()


def test_what_the_ladder_spends_is_counted_and_bounded():
    """A posterior of 256 separate modes, of which no fit can have more than a few."""
    calls = 0

    def model(x: Tensor) -> None:
        nonlocal calls
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(8), 1.0).to_event(1))
            calls += z.shape[:-1].numel()
            pyro.sample("x", dist.Normal(z.square(), 0.05).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.ones(8), 0.05).to_event(1).expand([len(x)]))

    x = torch.ones(2, 8)
    evidence = pv.log_marginal(model, guide, x, num_samples=2000, proposal="auto", seed=0, compile=False)
    assert not evidence.reliable.any()
    assert (evidence.calls < 300_000).all()
    assert evidence.calls.max() < 3 * calls


def test_interrupted_and_resumed_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vae = pv.make_vae(9, latent_dim=2, hidden=[16])
    x = torch.bernoulli(torch.full((330, 9), 0.5))
    options = {"num_samples": 200, "proposal": "auto", "seed": 0}
    whole = pv.log_marginal(vae.model, vae.guide, x, **options)
    run, done = Ladder.run, []

    def stops(self: Ladder):
        if done:
            raise KeyboardInterrupt
        done.append(self)
        return run(self)

    monkeypatch.setattr(Ladder, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        pv.log_marginal(vae.model, vae.guide, x, resume=tmp_path / "half", **options)
    monkeypatch.setattr(Ladder, "run", run)
    before = torch.get_rng_state()
    resumed = pv.log_marginal(vae.model, vae.guide, x, resume=tmp_path / "half", **options)
    assert torch.equal(before, torch.get_rng_state())
    for name in ("log_px", "se", "khat", "rung", "calls", "pilot", "drawn"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(resumed, name))


def test_the_size_of_chunks_changes_an_estimate_by_its_error_only():
    vae = pv.make_vae(9, latent_dim=2, hidden=[16])
    x = torch.bernoulli(torch.full((20, 9), 0.5))
    small, large = (
        pv.log_marginal(vae.model, vae.guide, x, num_samples=500, proposal="auto", seed=0, chunk_size=size)
        for size in (70, 10_000)
    )
    z = (small.log_px - large.log_px) / np.hypot(small.se, large.se)
    assert np.abs(z).max() < 4.5
    assert (small.drawn == 500).all()
    assert (large.drawn == 500).all()


def test_rungs_are_saved_and_loaded(tmp_path: Path):
    vae = pv.make_vae(9, latent_dim=2, hidden=[16])
    evidence = pv.log_marginal(vae.model, vae.guide, torch.zeros(5, 9), num_samples=100, proposal="auto", seed=0)
    evidence.save(tmp_path / "evidence")
    loaded = pv.Evidence.load(tmp_path / "evidence")
    np.testing.assert_array_equal(loaded.rung, evidence.rung)
    np.testing.assert_array_equal(loaded.calls, evidence.calls)
    assert loaded.summary() == evidence.summary()
    assert set(loaded.rung.tolist()) <= set(range(len(RUNGS)))


def _some_fitted() -> Fitted:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64)
    tril = torch.linalg.cholesky(factor @ factor.mT + torch.eye(5, dtype=torch.float64))
    loc = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    shares = torch.rand(3, 4, generator=generator, dtype=torch.float64).softmax(-1)
    return Fitted.of(loc, tril, shares, torch.tensor([3.0, 9.0, 1000.0], dtype=torch.float64))


def test_density_and_slope_of_a_fitted_proposal():
    fitted, flat = _some_fitted(), torch.randn(7, 3, 5, dtype=torch.float64).requires_grad_()
    log_prob = fitted.log_prob(flat)
    for datum in range(3):
        parts = [
            stats.multivariate_t(
                fitted.loc[datum, m].numpy(),
                (fitted.tril[datum, m] @ fitted.tril[datum, m].mT).numpy(),
                fitted.df[datum].item(),
            ).pdf(flat[:, datum].detach().numpy())
            for m in range(4)
        ]
        expected = np.log(fitted.shares[datum].numpy() @ np.array(parts))
        np.testing.assert_allclose(log_prob[:, datum].detach().numpy(), expected, rtol=1e-9)
    (slope,) = torch.autograd.grad(log_prob.sum(), flat)
    value, own = slope_of(fitted, flat.detach())
    torch.testing.assert_close(value, log_prob.detach())
    torch.testing.assert_close(own, slope)


def test_tempering_takes_a_power_of_the_likelihood():
    fitted, unit = _some_fitted(), torch.full((3, 5), 2.0, dtype=torch.float64)
    wider = tempered(fitted, unit, 0.6)
    precision, new = (torch.linalg.inv(each.tril @ each.tril.mT) for each in (fitted, wider))
    torch.testing.assert_close(new, 0.4 * torch.eye(5).double() / 4 + 0.6 * precision)
    torch.testing.assert_close(wider.inverse @ wider.tril, torch.eye(5).double().expand_as(wider.tril))


def test_a_neighbour_with_more_modes_leaves_a_proposal_as_it_would_be():
    many, unit, number = _some_fitted(), torch.full((1, 5), 2.0, dtype=torch.float64), 2000
    one = many.rows(torch.tensor([0]))
    one = Fitted.of(one.loc[:, :1], one.tril[:, :1], torch.ones(1, 1, dtype=torch.float64), one.df)
    torch.manual_seed(0)
    flat = one.sample(number)
    # The posterior is broader than the proposal, so that the best one is tempered.
    log_joint = tempered(one, unit, 0.5).log_prob(flat)
    alone = adapted(one, unit, Scored(flat, log_joint, log_joint, (one,), 0.0))
    both = stacked([one, many.rows(torch.tensor([1]))])
    beside = Scored(flat.expand(-1, 2, -1), log_joint.expand(-1, 2), log_joint.expand(-1, 2), (both,), 0.0)
    padded = adapted(both, unit.expand(2, -1), beside).rows(torch.tensor([0]))
    assert padded.shares.tolist() == [[1.0, 0.0, 0.0, 0.0]]
    assert torch.isfinite(padded.inverse).all()
    torch.testing.assert_close(padded.loc[:, 0], alone.loc[:, 0])
    torch.testing.assert_close(padded.tril[:, 0], alone.tril[:, 0])
    torch.testing.assert_close(padded.df, alone.df)
    for own, other in zip(slope_of(padded, flat), slope_of(alone, flat), strict=True):
        torch.testing.assert_close(own, other)


def test_ascent_curvature_and_matching_are_exact_on_gaussians():
    generator = torch.Generator().manual_seed(1)
    factor = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
    precision = factor @ factor.mT + torch.eye(6, dtype=torch.float64)
    mean = torch.randn(2, 6, generator=generator, dtype=torch.float64)

    def gradient(flat: Tensor) -> tuple[Tensor, Tensor]:
        away = (precision @ (flat - mean)[..., None])[..., 0]
        return -(away * (flat - mean)).sum(-1) / 2, -away

    unit = torch.ones(2, 6, dtype=torch.float64)
    peaks = climb(gradient, 5 + torch.zeros(1, 2, 6, dtype=torch.float64), unit, 60)
    torch.testing.assert_close(peaks.point[0], mean, atol=1e-6, rtol=0)
    covariance = torch.linalg.inv(precision)
    tril = curvature(gradient, mean[None], unit)[0]
    torch.testing.assert_close(tril @ tril.mT, covariance, atol=1e-6, rtol=1e-6)
    draws = 3 * torch.randn(12, 2, 6, generator=generator, dtype=torch.float64)
    start = torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    loc, tril = match_gradients(torch.zeros(2, 6).double(), 3 * start, draws, gradient(draws)[1], trust=1e9)
    torch.testing.assert_close(loc, mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(tril @ tril.mT, covariance, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("float64")
def test_chains_from_a_fitted_proposal_move_in_its_own_coordinates():
    pair = LinearGaussian(latent_dim=5, data_dim=6)
    x, fitted = pair.sample(3), _some_fitted()
    terms = PairTerms(pair.model, pair.guide, True, "eager", "float32", 1000)
    field = FittedField.of(terms, (x,), fitted)
    draws = field.draw(4000)
    heaviest = fitted.shares.argmax(1)
    flat = draws[:7].clone().requires_grad_()
    there = fitted.loc[torch.arange(3), heaviest] + (fitted.tril[torch.arange(3), heaviest] @ flat[..., None])[..., 0]
    log_start = fitted.log_prob(there)
    prior = dist.Normal(torch.zeros(5).double(), 1.0).to_event(1)
    log_joint = prior.log_prob(there) + dist.Normal(there @ pair.weight.T + pair.bias, pair.noise).to_event(1).log_prob(x)
    beta = 0.3
    log_f = (1 - beta) * log_start + beta * log_joint
    (slope,) = torch.autograd.grad(log_f.sum(), flat)
    state, value, own = field.slope(flat.detach(), beta)
    torch.testing.assert_close(state.log_ratio, (log_joint - log_start).detach())
    torch.testing.assert_close(value, log_f.detach())
    torch.testing.assert_close(own, slope)
    # The draws are the proposal's: their mean density is that of draws made in the usual coordinates.
    back = fitted.loc[torch.arange(3), heaviest] + (fitted.tril[torch.arange(3), heaviest] @ draws[..., None])[..., 0]
    torch.testing.assert_close(fitted.log_prob(back).mean(0), fitted.log_prob(fitted.sample(4000)).mean(0), atol=0.15, rtol=0)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bits", [1, 8, 11])
def test_discrete_latents_are_summed_where_that_takes_no_more_calls_than_draws(bits: int):
    weight = torch.as_tensor(np.random.default_rng(0).normal(size=(bits, 3)))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3 * torch.ones(bits).double()).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x), bits).double()).to_event(1))

    x = torch.as_tensor(np.random.default_rng(1).normal(size=(300, 3)))
    evidence = pv.log_marginal(model, guide, x, num_samples=1000, proposal="auto", seed=0)
    truth = pv.exact(model, guide, x, method="enumerate").log_px
    every = torch.cartesian_prod(*[torch.arange(2.0).double()] * bits).reshape(-1, bits)
    log_prior = dist.Bernoulli(0.3 * torch.ones(bits).double()).to_event(1).log_prob(every)
    likelihood = dist.Normal((every @ weight)[:, None], 0.5).to_event(1).log_prob(x)
    np.testing.assert_allclose(truth, torch.logsumexp(log_prior[:, None] + likelihood, 0).numpy(), atol=1e-10)
    if bits == 11:  # 2,048 assignments
        assert not (evidence.rung == RUNGS.index("exact")).any()
        return
    assert (evidence.rung == RUNGS.index("exact")).all()
    np.testing.assert_allclose(evidence.log_px, truth, atol=1e-10)
    assert evidence.reliable.all()
    assert (evidence.se < 1e-6).all()
    assert (evidence.calls == evidence.pilot + 2**bits).all()
    assert (evidence.drawn == 2**bits).all()
    assert evidence.gap > 0.1
    assert "300 summed; all reliable." in evidence.summary()
    assert evidence.criterion == "an exact answer"


@pytest.mark.usefixtures("float64")
def test_a_second_opinion_refutes_an_estimate_that_lacks_a_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pyrovae.evidence.second.CHAINS", {"num_chains": 100, "num_temperatures": 40, "leapfrog_steps": 3})
    pair = TwoModes(1)
    x = torch.as_tensor(np.random.default_rng(0).uniform(0.5, 2.0, (12, 1)))
    alone = pv.log_marginal(pair.model, pair.guide, x, num_samples=2000, proposal="guide", seed=0, second=4)
    rows = [0, 4, 7, 11]
    refuted = alone.notes["second"]["refuted"]  # they lack half of the mass, some 0.7 nats
    assert len(refuted) >= 2
    assert set(refuted) <= set(rows)
    assert not alone.reliable[refuted].any()
    assert 0.4 < alone.notes["second"]["difference"] < 1
    assert f"refutes {len(refuted)} of them (first datum {refuted[0]})" in alone.summary()
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=2000, proposal="auto", seed=0, second=4)
    found = evidence.notes["second"]
    assert found["refuted"] == []
    assert evidence.reliable.all()
    assert abs(found["difference"]) < 4 * found["difference_se"]
    assert (found["num_data"], found["simulated"]) == (4, 4)
    assert abs(found["gap"]) < 0.5
    assert "A second opinion on 4 data, by annealing from the prior, refutes none of them" in evidence.summary()
    evidence.save(tmp_path / "evidence")
    assert pv.Evidence.load(tmp_path / "evidence").summary() == evidence.summary()
    # It changes nothing else.
    without = pv.log_marginal(pair.model, pair.guide, x, num_samples=2000, proposal="auto", seed=0)
    np.testing.assert_array_equal(without.log_px, evidence.log_px)


@pytest.mark.parametrize("second", [-1, 2.5, True])
def test_a_second_opinion_is_on_a_whole_number_of_data(second: object):
    vae = pv.make_vae(9, latent_dim=2, hidden=[16])
    with pytest.raises(ValueError, match="second must be a whole number of data, at least 0, got"):
        pv.log_marginal(vae.model, vae.guide, torch.zeros(2, 9), second=second)


def test_a_second_opinion_needs_continuous_latents():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(len(x))))

    with pytest.raises(ValueError, match="second must be 0 for a pair with the discrete latent site 'z'"):
        pv.log_marginal(model, guide, torch.zeros(3), second=2)
