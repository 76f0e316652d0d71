from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyrovae as pv
from pyrovae.diagnostics import compare_estimators, train_estimators


class Scalar:
    """z ~ N(m, 1), x|z ~ N(z, 1), q = N(a x + b, s^2): every moment of the ELBO's gradient has a closed form."""

    def __init__(self) -> None:
        self.m = torch.tensor(0.3, requires_grad=True)
        self.b = torch.tensor(-0.2, requires_grad=True)
        self.scale = 0.8

    def model(self, x: Tensor) -> None:
        m = pyro.param("m", self.m)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        b = pyro.param("b", self.b)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + b, self.scale))


@pytest.fixture(scope="module")
def compared() -> pv.EstimatorComparison:
    pair = Scalar()
    x = torch.tensor([1.0])
    return compare_estimators(
        pair.model, pair.guide, x, ["elbo", {"kind": "elbo", "num_particles": 4}, "trace_elbo", "iwae"],
        num_draws=500, reference="elbo",
    )  # fmt: skip


def test_gradient_moments_of_the_elbo_are_the_closed_forms(compared: pv.EstimatorComparison):
    # z = mu + s eps with mu = 0.5 x + b = 0.3; d/dm = z - m = s eps, d/db = (x - z) - (z - m) = 1.3 - 2 z.
    mean_m, sd_m = 0.3 - 0.3, 0.8
    mean_b, sd_b = 1.3 - 0.6, 1.6
    assert compared.names == ["elbo", "elbo'", "trace_elbo", "iwae"]
    np.testing.assert_allclose(compared.variance[0], [sd_m**2, sd_b**2], rtol=0.2)
    np.testing.assert_allclose(compared.variance[1], [sd_m**2 / 4, sd_b**2 / 4], rtol=0.2)
    assert compared.norm[0, 0] == pytest.approx(mean_m, abs=0.12)
    assert compared.norm[0, 1] == pytest.approx(mean_b, abs=4 * sd_b / math.sqrt(500))
    assert compared.snr[0, 1] == pytest.approx(mean_b / sd_b, abs=0.12)
    assert compared.snr[1, 1] == pytest.approx(2 * mean_b / sd_b, abs=0.2)


def test_bound_has_its_mean_and_standard_error(compared: pv.EstimatorComparison):
    mu, s = 0.3, 0.8
    expected = -0.5 * math.log(2 * math.pi) - 0.5 * (s**2 + (1 - mu) ** 2) - 0.5 * (s**2 + (mu - 0.3) ** 2) + 0.5 + math.log(s)
    assert abs(compared.bound[0] - expected) < 4 * compared.bound_se[0]
    # log w = const + 1.3 z - z^2 + eps^2 / 2 with z = mu + s eps, a quadratic in eps of known variance.
    linear, square = 1.3 * s - 2 * mu * s, -(s**2) + 0.5
    assert compared.bound_se[0] == pytest.approx(math.sqrt((linear**2 + 2 * square**2) / 500), rel=0.15)
    assert compared.bound[3] > compared.bound[0]


def test_bias_is_zero_against_itself_and_found_where_there_is_one(compared: pv.EstimatorComparison):
    assert compared.bias[0].tolist() == [0, 0] or math.isnan(compared.bias[0, 0])
    assert compared.bias_p[0].tolist() == [1, 1]
    assert compared.bias_p[1, 1] > 0.001, "more particles, the same mean"
    assert compared.bias_p[2, 1] > 0.001, "Pyro's estimator, the same gradient"
    assert compared.bias_p[3, 1] <= 0.002, "the guide's gradient of the IWAE bound is another"
    # IWAE's guide gradient for K = 5 by brute force.
    eps = torch.randn(5, 400_000)
    b = torch.tensor(-0.2, requires_grad=True)
    z = 0.5 + b + 0.8 * eps
    log_w = dist.Normal(0.3, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(1.0)) + 0.5 * eps**2
    torch.logsumexp(log_w, 0).mean().backward()
    assert compared.bias[3, 1] == pytest.approx(abs(b.grad.item() - 0.7) / 0.7, abs=0.2)


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_the_level_says():
    torch.set_default_dtype(torch.float64)
    pair = Scalar()
    same = {"same": pv.estimators.ELBO(2)}
    alarms = [
        compare_estimators(
            pair.model, pair.guide, torch.tensor([1.0]), same, num_draws=20, reference="elbo", seed=1000 * i
        ).bias_p[0, 1] < 0.1
        for i in range(60)
    ]  # fmt: skip
    assert sum(alarms) <= 14, "60 draws at level 0.1: more than 14 has probability below 1 in 1000"


def test_shared_parameters_belong_to_both_and_the_pair_is_left_as_it_was():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    x = torch.bernoulli(torch.full((30, 4), 0.5))
    before = torch.nn.utils.parameters_to_vector(vae.parameters()).clone()
    result = compare_estimators(vae.model, vae.guide, x, ["elbo", "stl", "iwae"], num_draws=10, reference="iwae")
    ranking = train_estimators(
        vae.model, vae.guide, x, ["elbo", "stl"], seconds=0.3, held_out=x, num_samples=50, progress=False
    )
    assert torch.equal(torch.nn.utils.parameters_to_vector(vae.parameters()), before)
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert sorted(ranking.names) == ["elbo", "stl"]
    assert (result.seconds > 0).all()
    assert max(map(len, str(result).splitlines())) <= 80
    dataset = result.to_dataset()
    assert dataset["snr"].sel(estimator="stl", parameters="guide").item() == result.snr[1, 1]
    figure = result.plot()
    assert len(figure.axes) == 3


def test_what_does_not_fit_is_refused():
    pair = Scalar()
    x = torch.tensor([1.0])
    with pytest.raises(ValueError, match="did you mean 'iwae'"):
        compare_estimators(pair.model, pair.guide, x, ["iwea"])
    with pytest.raises(ValueError, match="at least 10"):
        compare_estimators(pair.model, pair.guide, x, ["elbo"], num_draws=2)
    with pytest.raises(ValueError, match="name at least one"):
        compare_estimators(pair.model, pair.guide, x, [])
