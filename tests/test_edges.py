"""Latents whose density has a pole at an end of its support, where floating-point numbers end before their mass does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from scipy.special import betaln, gammaln

import pyrovae as pv

# Unconstrained numbers, and the logarithms of their sigmoids. A Beta(0.05, 0.05) has e-folds of 20 to either side.
U = np.linspace(-1200, 1200, 240_001)
LOG_Z, LOG_REST = -np.logaddexp(0, -U), -np.logaddexp(0, U)


def normal(x: Any, z: Any, scale: Any) -> Any:
    """The log-density of x ~ N(z, scale)."""
    return -0.5 * ((x - z) / scale) ** 2 - np.log(scale * math.sqrt(2 * math.pi))


def integrated(log_f: np.ndarray) -> float:
    """The logarithm of the integral of f(u), by equal steps, whose error falls exponentially with their width."""
    top = log_f.max()
    return float(top + np.log(np.exp(log_f - top).sum() * (U[1] - U[0])))


def pair(prior: Callable[[torch.Tensor], Any], posterior: Callable[[torch.Tensor], Any] | None = None) -> tuple[Any, Any]:
    """x ~ N(z, scale) with a prior on z that depends on the datum (x, scale, a, b)."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior(x))
            z = z[..., 1, 0] if z.dim() > 2 else z
            pyro.sample("x", dist.Normal(z, x[:, 1]), obs=x[:, 0])

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", (posterior or prior)(x))

    return model, guide


def table(*columns: tuple[float, ...]) -> np.ndarray:
    """All combinations of some values."""
    return np.stack([part.ravel() for part in np.meshgrid(*columns)], -1)


def beta(x: torch.Tensor) -> Any:
    return dist.Beta(x[:, 2], x[:, 3])


def beta_truth(row: np.ndarray) -> float:
    x, scale, a, b = row
    return integrated(a * LOG_Z + b * LOG_REST - betaln(a, b) + normal(x, np.exp(LOG_Z), scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_finds_the_mass_of_a_beta_past_the_last_float(dtype):
    rows = table((0.0, 0.3, 1.0), (1.0, 0.05), (0.05, 0.2, 0.5), (0.05, 0.2, 0.5))  # the likelihood pulls to either end
    truth = np.array([beta_truth(row) for row in torch.as_tensor(rows, dtype=dtype).double().numpy()])
    evidence = pv.exact(*pair(beta), torch.as_tensor(rows, dtype=dtype))
    np.testing.assert_allclose(evidence.log_px, truth, atol=3e-5)
    assert evidence.reliable.all()


def test_exact_takes_gammas_and_half_cauchys_in_float32():
    rows = table((0.0, 0.3, 1.0), (1.0, 0.05), (0.05, 0.1, 0.3, 0.5), (1.0, 1e15))
    with np.errstate(over="ignore"):
        z = np.exp(U)
        truth = [
            integrated(a * (U + np.log(b)) - z * b - gammaln(a) + normal(x, z, scale))
            for x, scale, a, b in torch.as_tensor(rows, dtype=torch.float32).double().numpy()
        ]
        halves = [integrated(math.log(2 / math.pi) - np.logaddexp(0, 2 * U) + U + normal(x, z, 0.1)) for x in (0.0, 2.0)]
    evidence = pv.exact(*pair(lambda x: dist.Gamma(x[:, 2], x[:, 3])), torch.tensor(rows, dtype=torch.float32))
    np.testing.assert_allclose(evidence.log_px, truth, atol=1e-4)
    assert evidence.reliable.all()
    evidence = pv.exact(*pair(lambda x: dist.HalfCauchy(torch.ones(len(x)))), torch.tensor([[0.0, 0.1], [2.0, 0.1]]))
    np.testing.assert_allclose(evidence.log_px, halves, atol=1e-5)


TAIL = np.where(U > 30, math.log(0.1) + LOG_REST, np.log(-np.expm1(0.1 * np.minimum(LOG_Z, -1e-14))))
LAWS: dict[str, tuple[Callable[[], Any], np.ndarray, np.ndarray]] = {
    "logit-normal": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 10.0), dist.transforms.SigmoidTransform()),
        normal(U, 0, 10),
        np.exp(LOG_Z),
    ),
    "Kumaraswamy": (
        lambda: dist.Kumaraswamy(torch.tensor(0.1), torch.tensor(0.1)),
        2 * math.log(0.1) + 0.1 * LOG_Z - 0.9 * TAIL + LOG_REST,
        np.exp(LOG_Z),
    ),
    "affine": (
        lambda: dist.AffineBeta(torch.tensor(0.1), torch.tensor(0.1), torch.tensor(2.0), torch.tensor(3.0)),
        0.1 * (LOG_Z + LOG_REST) - betaln(0.1, 0.1),
        2 + 3 * np.exp(LOG_Z),
    ),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)), dist.Beta(torch.tensor([0.1, 1.0]), torch.tensor([0.1, 2.0]))
        ),
        np.logaddexp(0.1 * (LOG_Z + LOG_REST) - betaln(0.1, 0.1), LOG_Z + 2 * LOG_REST + math.log(2)) - math.log(2),
        np.exp(LOG_Z),
    ),
    "relaxed": (
        lambda: dist.RelaxedBernoulli(torch.tensor(0.05), logits=torch.tensor(0.5)),
        math.log(0.05) + 0.5 - 0.05 * U - 2 * np.logaddexp(0, 0.5 - 0.05 * U),
        np.exp(LOG_Z),
    ),
    "correlation": (
        lambda: dist.LKJCholesky(2, torch.tensor(0.05)),
        0.05 * (2 * math.log(2) - 2 * np.logaddexp(U, -U)) - betaln(0.05, 0.05) + 0.9 * math.log(2),
        np.tanh(U),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_other_laws_keep_their_mass_at_the_ends_in_float32(name):
    law, log_density, z = LAWS[name]
    assert abs(integrated(log_density)) < 1e-3
    x = z[len(z) // 2] + np.array([-0.45, 0.5])
    truth = [integrated(log_density + normal(each, z, 0.3)) for each in x]
    data = torch.tensor(np.stack([x, 0.3 * np.ones(2)], -1), dtype=torch.float32)
    evidence = pv.exact(*pair(lambda x: law().expand([len(x)])), data)
    np.testing.assert_allclose(evidence.log_px, truth, atol=1e-4)
    assert evidence.reliable.all()


def test_exact_sums_the_corners_of_a_simplex():
    """x ~ N(w z, 0.5) with z ~ Dirichlet(0.2, 0.2, 0.2): by stick-breaking, two independent Betas."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Dirichlet(torch.full((3,), 0.2)))
            pyro.sample("x", dist.Normal(z @ torch.tensor([-1.0, 0.0, 2.0]), 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Dirichlet(torch.full((3,), 0.2)))

    u = np.linspace(-160, 160, 1601)
    z, rest = -np.logaddexp(0, -u), -np.logaddexp(0, u)
    first, second = 0.2 * z + 0.4 * rest - betaln(0.2, 0.4), 0.2 * z + 0.2 * rest - betaln(0.2, 0.2)
    loc = -np.exp(z)[:, None] + 2 * np.exp(rest)[:, None] * np.exp(rest)
    x = np.array([-1.0, 0.3, 2.0])
    truth = [np.log((np.exp(first[:, None] + second + normal(each, loc, 0.5))).sum() * (u[1] - u[0]) ** 2) for each in x]
    evidence = pv.exact(model, guide, torch.tensor(x, dtype=torch.float32))
    np.testing.assert_allclose(evidence.log_px, truth, atol=1e-3)
    assert evidence.reliable.all()


MISFITS = np.array(
    [[1, 0.05, 1, 0.08], [0.5, 0.05, 0.5, 0.1], [0.05, 0.05, 0.05, 0.1], [1, 0.05, 1, 0.03]]
)  # Betas of prior, guide


@pytest.mark.parametrize(
    ("proposal", "dtype", "place"),
    [
        ("guide", torch.float32, 0.0),
        ("mixture", torch.float32, 0.0),
        ("refined", torch.float32, 0.0),
        ("auto", torch.float32, 0.0),
        ("guide", torch.float64, 0.0),
        ("mixture", torch.float32, 10.0),  # a float32 near 10 keeps fewer digits of its distance from either end
    ],
)
def test_weights_are_right_where_draws_round_to_an_end(proposal, dtype, place):
    """The density of the prior over that of the guide is infinite, or zero, at z = 1, where a third of all draws are."""
    rows = np.array([[x, 1.0, *shape] for shape in MISFITS for x in (0.3, 1.0)])
    truth = np.array([beta_truth(row[:4]) for row in rows])

    def law(first: int) -> Callable[[torch.Tensor], Any]:
        if not place:
            return lambda x: dist.Beta(x[:, first], x[:, first + 1])
        return lambda x: dist.AffineBeta(x[:, first], x[:, first + 1], torch.tensor(place), torch.tensor(1.0))

    rows[:, 0] += place
    model, guide = pair(law(2), law(4))
    evidence = pv.log_marginal(model, guide, torch.tensor(rows, dtype=dtype), num_samples=4000, proposal=proposal, seed=0)
    wrong = np.abs(evidence.log_px - truth) > np.maximum(5 * evidence.se, 0.02)
    assert not (wrong & evidence.reliable).any()
    assert evidence.reliable.mean() > 0.6


def test_draws_of_a_gamma_below_the_smallest_float_have_their_weights():
    x, shape = np.array([0.0, 3.0]), 0.01
    model, guide = pair(lambda x: dist.Gamma(x[:, 2], x[:, 3]), lambda x: dist.Gamma(1.5 * x[:, 2], 0.9 * x[:, 3]))
    u = np.linspace(-4000, 6, 400_001)
    log_f = [shape * u - np.exp(u) - gammaln(shape) + normal(each, np.exp(u), 1.0) for each in x]
    truth = [float(each.max() + np.log(np.exp(each - each.max()).sum() * (u[1] - u[0]))) for each in log_f]
    rows = torch.tensor([[each, 1.0, shape, 1.0] for each in x], dtype=torch.float32)
    evidence = pv.log_marginal(model, guide, rows, num_samples=20_000, seed=0)
    np.testing.assert_allclose(evidence.log_px, truth, atol=0.03)  # the floats alone give 0.1 less
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(pv.exact(model, guide, rows).log_px, truth, atol=1e-4)


def test_a_prior_whose_draws_are_infinite_is_refused_in_words():
    model, guide = pair(lambda x: dist.LogNormal(0 * x[:, 0], 60.0))
    with pytest.raises(ValueError, match="draw of the prior at the latent site 'z' rounds to an end of its support"):
        pv.exact(model, guide, torch.ones(2, 2))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("make", [AutoNormal, AutoDiagonalNormal])
def test_exact_needs_no_density_of_the_guide(make):
    """An autoguide draws from auxiliary sites, so its density at other numbers is not known."""
    x = torch.tensor([-1.0, 0.3, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    guide = make(model)
    guide(x)
    if make is AutoDiagonalNormal:  # which draws the latents of all data as one vector
        with pytest.raises(ValueError, match="AutoNormal"):
            pv.exact(model, guide, x)
        return
    truth = normal(x.numpy(), 0.0, math.sqrt(2))
    for method in ("auto", "quadrature"):
        np.testing.assert_allclose(pv.exact(model, guide, x, method=method).log_px, truth, atol=1e-5)
    refined = pv.log_marginal(model, guide, x, num_samples=2000, proposal="refined", seed=0)
    np.testing.assert_allclose(refined.log_px, truth, atol=0.02)
    with pytest.raises(ValueError, match="density q"):
        pv.ais(model, guide, x, start="guide", num_temperatures=10, num_chains=8, seed=0)
