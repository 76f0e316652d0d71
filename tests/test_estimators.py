"""Estimators against exact numbers: quadrature, enumeration, closed forms, and gradients computed another way."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian, pyro_module_function_pair
from pyro import poutine
from pyro.distributions.transforms import AffineTransform, SigmoidTransform, Spline, planar
from torch import Tensor, nn

from pyrovae import estimators as est
from pyrovae.programs.inspect import inspect_pair
from pyrovae.programs.log_weights import log_weights
from pyrovae.programs.weights import LogWeights
from pyrovae.registry import build, describe, find, names

pytestmark = pytest.mark.usefixtures("float64")

DRAWS = 20_000
Params = dict[str, Tensor]
Pair = tuple[Callable[..., Any], Callable[..., Any]]

# --- Gradients: 20,000 draws against the exact gradient ------------------------------------------------------------------
# Every draw has a copy of the parameters of its own, on the data plate, so that one backward pass gives all draws apart.


def gradient_draws(estimator: Any, pair: Callable[[Params], Pair], values: dict[str, float], x: float) -> dict[str, np.ndarray]:
    params = {name: torch.full((DRAWS,), value, requires_grad=True) for name, value in values.items()}
    loss = estimator.differentiable_loss(*pair(params), torch.full((DRAWS,), x))
    found = torch.autograd.grad(-loss, list(params.values()), allow_unused=True, materialize_grads=True)
    return {name: draws.numpy() for name, draws in zip(params, found, strict=True)}


def assert_agrees(draws: dict[str, np.ndarray], exact: dict[str, float], blind: tuple[str, ...] = ()) -> None:
    """Within 4 standard errors; and the exact value is so far from zero that a missing gradient would be seen."""
    for name, draw in draws.items():
        error = draw.std(ddof=1) / math.sqrt(len(draw))
        assert abs(draw.mean() - exact[name]) <= 4 * error + 1e-10, (name, draw.mean(), exact[name], error)
        assert name in blind or abs(exact[name]) > 8 * error, f"{name}: the test could not tell {exact[name]} from zero"


def exact_gradient(objective: Callable[[Params], Tensor], values: dict[str, float]) -> dict[str, float]:
    params = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    found = torch.autograd.grad(objective(params), list(params.values()), allow_unused=True, materialize_grads=True)
    return {name: value.item() for name, value in zip(params, found, strict=True)}


def frozen(params: Params) -> Params:
    return {name: value.detach() for name, value in params.items()}


def hermite(num_nodes: int, num_noises: int) -> tuple[Tensor, Tensor]:
    """Nodes (num_noises, n) of a standard normal in so many dimensions, and their weights (n,)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    grid = torch.as_tensor(np.array(np.meshgrid(*[nodes] * num_noises, indexing="ij")).reshape(num_noises, -1))
    mass = torch.as_tensor(np.array(np.meshgrid(*[weights] * num_noises, indexing="ij")).reshape(num_noises, -1)).prod(0)
    return grid, mass / mass.sum()


def normal_log(value: Any, loc: Any, scale: Any) -> Tensor:
    return -0.5 * ((value - loc) / scale) ** 2 - torch.log(torch.as_tensor(scale)) - 0.5 * math.log(2 * math.pi)


class Gaussian:
    """z ~ N(m, e^t), x|z ~ N(wz + b, e^s); z|x ~ N(ax + c, e^l)."""

    x = 0.9
    values = {"m": -0.4, "t": 0.3, "w": 0.9, "b": 0.1, "s": 0.2, "a": 0.2, "c": -0.2, "l": -0.2}

    @staticmethod
    def pair(p: Params) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(p["m"], p["t"].exp()))
                pyro.sample("x", dist.Normal(p["w"] * z + p["b"], p["s"].exp()), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(p["a"] * x + p["c"], p["l"].exp()))

        return model, guide

    @classmethod
    def sample(cls, p: Params, noise: Tensor) -> Tensor:
        return p["a"] * cls.x + p["c"] + p["l"].exp() * noise

    @classmethod
    def log_p(cls, p: Params, z: Tensor) -> Tensor:
        return normal_log(z, p["m"], p["t"].exp()) + normal_log(cls.x, p["w"] * z + p["b"], p["s"].exp())

    @classmethod
    def log_q(cls, p: Params, z: Tensor) -> Tensor:
        return normal_log(z, p["a"] * cls.x + p["c"], p["l"].exp())

    @classmethod
    def expected(cls, reduce: Callable[[Tensor], Tensor], num_particles: int) -> Callable[[Params], Tensor]:
        """The expected value of ``reduce`` of the log-weights (K, n), by quadrature.

        Its gradients agree with those of fewer nodes to 1e-7.
        """
        noise, mass = hermite({1: 80, 2: 60, 4: 16}[num_particles], num_particles)

        def objective(p: Params) -> Tensor:
            z = cls.sample(p, noise)
            return (mass * reduce(cls.log_p(p, z) - cls.log_q(p, z))).sum()

        return objective

    @classmethod
    def expected_larger(cls, p: Params) -> Tensor:
        """E max(log w_1, log w_2) = 2 E[log w_1 P(log w_2 < log w_1)]: a log-weight is a parabola in its noise."""
        noise = torch.linspace(-9, 9, 40_001)
        mass = torch.exp(-0.5 * noise**2)

        def log_w(noise: Tensor) -> Tensor:
            z = cls.sample(p, noise)
            return cls.log_p(p, z) - cls.log_q(p, z)

        low, middle, high = log_w(torch.tensor([-1.0, 0.0, 1.0])).detach()
        curvature, slope = (low + high) / 2 - middle, (high - low) / 2
        centre = -slope / (2 * curvature)
        reach = (noise - centre).abs()
        nearer = torch.special.ndtr(centre + reach) - torch.special.ndtr(centre - reach)
        below = nearer if curvature > 0 else 1 - nearer
        return (mass / mass.sum() * 2 * below * log_w(noise)).sum()

    @classmethod
    def expected_formula(cls, formula: Callable[[Tensor, Tensor], Tensor], num_particles: int) -> Callable[[Params], Tensor]:
        """The expectation, at fixed samples, of a formula in log p and log q (K, n)."""
        noise, mass = hermite({1: 80, 2: 60, 4: 16}[num_particles], num_particles)

        def objective(p: Params) -> Tensor:
            z = cls.sample(frozen(p), noise)
            return (mass * formula(cls.log_p(p, z), cls.log_q(p, z))).sum()

        return objective

    @classmethod
    def sleep(cls, p: Params) -> Tensor:
        """E_p(z, x) log q(z | x), with the model's parameters fixed."""
        noise, mass = hermite(40, 2)
        f = frozen(p)
        z = f["m"] + f["t"].exp() * noise[0]
        x = f["w"] * z + f["b"] + f["s"].exp() * noise[1]
        return (mass * normal_log(z, p["a"] * x + p["c"], p["l"].exp())).sum()


class Mixture:
    """z ~ Bernoulli(sigmoid r), x|z ~ N(u + vz, e^s); z|x ~ Bernoulli(sigmoid(ax + c))."""

    x = 0.9
    values = {"r": 0.4, "u": -0.6, "v": 1.1, "s": 0.1, "a": 0.5, "c": -0.8}

    @staticmethod
    def pair(p: Params) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(logits=p["r"]))
                pyro.sample("x", dist.Normal(p["u"] + p["v"] * z, p["s"].exp()), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=p["a"] * x + p["c"]))

        return model, guide

    @classmethod
    def log_p(cls, p: Params, z: Tensor) -> Tensor:
        log_prior = torch.where(z == 1, p["r"], -p["r"]).sigmoid().log()
        return log_prior + normal_log(cls.x, p["u"] + p["v"] * z, p["s"].exp())

    @classmethod
    def log_q(cls, p: Params, z: Tensor, x: Any = None) -> Tensor:
        logit = p["a"] * (cls.x if x is None else x) + p["c"]
        return torch.where(z == 1, logit, -logit).sigmoid().log()

    @classmethod
    def tuples(cls, num_particles: int) -> Tensor:
        return torch.tensor(list(itertools.product([0.0, 1.0], repeat=num_particles))).T

    @classmethod
    def expected(cls, reduce: Callable[[Tensor], Tensor], num_particles: int) -> Callable[[Params], Tensor]:
        """The expected value of ``reduce`` of the log-weights (K, 2^K): a sum over all tuples of particles."""

        def objective(p: Params) -> Tensor:
            z = cls.tuples(num_particles)
            log_q = cls.log_q(p, z)
            return (log_q.sum(0).exp() * reduce(cls.log_p(p, z) - log_q)).sum()

        return objective

    @classmethod
    def expected_formula(cls, formula: Callable[[Tensor, Tensor], Tensor], num_particles: int) -> Callable[[Params], Tensor]:
        def objective(p: Params) -> Tensor:
            z = cls.tuples(num_particles)
            log_q = cls.log_q(p, z)
            return (log_q.detach().sum(0).exp() * formula(cls.log_p(p, z), log_q)).sum()

        return objective

    @classmethod
    def sleep(cls, p: Params) -> Tensor:
        noise, mass = hermite(80, 1)
        f, total = frozen(p), torch.zeros(())
        for z in (torch.tensor(0.0), torch.tensor(1.0)):
            x = f["u"] + f["v"] * z + f["s"].exp() * noise[0]
            total = total + torch.where(z == 1, f["r"], -f["r"]).sigmoid() * (mass * cls.log_q(p, z, x)).sum()
        return total


def elbo(log_w: Tensor) -> Tensor:
    return log_w.mean(0)


def iwae(log_w: Tensor) -> Tensor:
    return torch.logsumexp(log_w, 0) - math.log(len(log_w))


def leave_one_out(log_w: Tensor) -> Tensor:
    K = len(log_w)
    subsets = [iwae(log_w[[j for j in range(K) if j != k]]) for k in range(K)]
    return K * iwae(log_w) - (K - 1) * torch.stack(subsets).mean(0)


def two_by_two(log_w: Tensor) -> Tensor:
    return (iwae(log_w[:2]) + iwae(log_w[2:])) / 2


REPARAMETERISED: dict[str, tuple[Callable[[], Any], Callable[[Params], Tensor]]] = {
    "elbo": (lambda: est.ELBO(), Gaussian.expected(elbo, 1)),
    "elbo, two particles": (lambda: est.ELBO(2), Gaussian.expected(elbo, 1)),
    "elbo, analytic": (lambda: est.ELBO(kl="analytic"), Gaussian.expected(elbo, 1)),
    "elbo, analytic, two": (lambda: est.ELBO(2, kl="analytic"), Gaussian.expected(elbo, 1)),
    "elbo, analytic, looped": (lambda: est.ELBO(2, kl="analytic", vectorize_particles=False), Gaussian.expected(elbo, 1)),
    "stl": (lambda: est.STL(2), Gaussian.expected(elbo, 1)),
    "iwae": (lambda: est.IWAE(2), Gaussian.expected(iwae, 2)),
    "dreg": (lambda: est.DReG(2), Gaussian.expected(iwae, 2)),
    "dreg, four": (lambda: est.DReG(4), Gaussian.expected(iwae, 4)),
    "gdreg": (lambda: est.GDReG(2), Gaussian.expected(iwae, 2)),
    "gdreg, four": (lambda: est.GDReG(4), Gaussian.expected(iwae, 4)),
    "miwae": (lambda: est.MIWAE(4, num_groups=2), Gaussian.expected(iwae, 2)),
    "ciwae": (lambda: est.CIWAE(2, beta=0.3), Gaussian.expected(lambda w: 0.3 * elbo(w) + 0.7 * iwae(w), 2)),
    "renyi": (lambda: est.Renyi(2, alpha=0.5), Gaussian.expected(lambda w: 2 * iwae(w / 2), 2)),
    "renyi, negative": (lambda: est.Renyi(2, alpha=-1.5), Gaussian.expected(lambda w: iwae(2.5 * w) / 2.5, 2)),
    "vr_max": (lambda: est.VRMax(2), Gaussian.expected_larger),
    "jvi": (lambda: est.JVI(2), Gaussian.expected(leave_one_out, 2)),
    "iwae, looped": (lambda: est.IWAE(2, vectorize_particles=False), Gaussian.expected(iwae, 2)),
    "dreg, looped": (lambda: est.DReG(2, vectorize_particles=False), Gaussian.expected(iwae, 2)),
    "gdreg, looped": (lambda: est.GDReG(2, vectorize_particles=False), Gaussian.expected(iwae, 2)),
}


@pytest.mark.parametrize("name", REPARAMETERISED)
def test_a_gaussian_pair_gets_the_exact_gradient_of_the_expected_bound(name: str) -> None:
    make, objective = REPARAMETERISED[name]
    exact = exact_gradient(objective, Gaussian.values)
    assert_agrees(gradient_draws(make(), Gaussian.pair, Gaussian.values, Gaussian.x), exact)


def test_piwae_gives_the_model_iwaes_gradient_and_the_guide_miwaes() -> None:
    model = exact_gradient(Gaussian.expected(iwae, 4), Gaussian.values)
    guide = exact_gradient(Gaussian.expected(two_by_two, 4), Gaussian.values)
    exact = {name: (guide if name in "acl" else model)[name] for name in Gaussian.values}
    for vectorize in (True, False):
        piwae = est.PIWAE(4, num_groups=2, vectorize_particles=vectorize)
        assert_agrees(gradient_draws(piwae, Gaussian.pair, Gaussian.values, Gaussian.x), exact)


@pytest.mark.parametrize("noise", [0.2, -8.0])
def test_piwae_is_iwae_and_miwae_draw_by_draw_even_where_weights_underflow(noise: float) -> None:
    p = {name: torch.full((5,), value, requires_grad=True) for name, value in (Gaussian.values | {"s": noise}).items()}

    def gradient(estimator: est.Estimator, names: str) -> list[Tensor]:
        pyro.set_rng_seed(6)
        loss = estimator.differentiable_loss(*Gaussian.pair(p), torch.full((5,), Gaussian.x))
        return list(torch.autograd.grad(loss, [p[name] for name in names]))

    piwae = est.PIWAE(6, num_groups=3)
    for other, names_ in ((est.IWAE(6), "mtwbs"), (est.MIWAE(6, num_groups=3), "acl")):
        for ours, theirs in zip(gradient(piwae, names_), gradient(other, names_), strict=True):
            assert ours.numpy() == pytest.approx(theirs.numpy(), rel=1e-9)
            assert theirs.abs().min() > 0


SCORED: dict[str, tuple[Any, Callable[[Tensor], Tensor], int]] = {
    "vimco": (lambda: est.VIMCO(2), iwae, 2),
    "vimco, four": (lambda: est.VIMCO(4), iwae, 4),
    "ovis": (lambda: est.OVIS(2), iwae, 2),
    "ovis, four": (lambda: est.OVIS(4), iwae, 4),
    "score_elbo": (lambda: est.ScoreELBO(2), elbo, 2),
    "score_elbo, four looped": (lambda: est.ScoreELBO(4, vectorize_particles=False), elbo, 4),
}


@pytest.mark.parametrize("pair", [Gaussian, Mixture])
@pytest.mark.parametrize("name", SCORED)
def test_the_score_function_gives_the_exact_gradient_of_the_expected_bound(name: str, pair: Any) -> None:
    make, reduce, K = SCORED[name]
    exact = exact_gradient(pair.expected(reduce, K), pair.values)
    assert_agrees(gradient_draws(make(), pair.pair, pair.values, pair.x), exact)


def test_control_variates_are_those_of_the_papers() -> None:
    # An unbiased gradient does not show a wrong control variate: only its noise does.
    torch.manual_seed(5)
    log_w = 2 * torch.randn(4, 3)
    w, K = log_w.exp(), 4
    for k in range(K):
        rest = [j for j in range(K) if j != k]
        geometric = w[rest].prod(0) ** (1 / (K - 1))
        vimco = (w.mean(0).log() - ((w[rest].sum(0) + geometric) / K).log()) - w[k] / w.sum(0)
        assert -est.VIMCO(K).coefficients(log_w).score[k] == pytest.approx(vimco)
        for gamma in (0.0, 0.4, 1.0):
            share = w[k] / w.sum(0)
            control = w[rest].mean(0).log() - gamma * share + (1 - gamma) * math.log(1 - 1 / K)
            ovis = w.mean(0).log() - share - control
            assert -est.OVIS(K, gamma=gamma).coefficients(log_w).score[k] == pytest.approx(ovis)
        assert -est.ScoreELBO(K).coefficients(log_w).score[k] == pytest.approx((log_w[k] - log_w[rest].mean(0)) / K)


def wake(log_p: Tensor, log_q: Tensor) -> Tensor:
    share = torch.softmax((log_p - log_q).detach(), 0)
    return (share * log_p).sum(0) + (share * log_q).sum(0)


def awake_model(log_p: Tensor, log_q: Tensor) -> Tensor:
    return iwae(log_p - log_q.detach())


def thermodynamic(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The covariance gradient of the paper, point by point: E[grad f] + E[f grad log pi] - E[f] E[grad log pi]."""
    f, total = log_p - log_q, 0.0
    points = [0.0, 0.01, 0.1, 1.0]
    for beta, after in itertools.pairwise(points):
        v = ((f.detach() * beta).exp() / (f.detach() * beta).exp().sum(0)).detach()
        tempered = beta * log_p + (1 - beta) * log_q
        covariance = (v * f.detach() * tempered).sum(0) - (v * f.detach()).sum(0) * (v * tempered).sum(0)
        total = total + (after - beta) * ((v * f).sum(0) + covariance)
    return total


def ovis_many(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Equation 17 at gamma = 1, for two particles: the signal is log Z - log w of the other one."""
    log_w = (log_p - log_q).detach()
    signal = iwae(log_w) - log_w.flip(0)
    return (torch.softmax(log_w, 0) * log_p).sum(0) + (signal * log_q).sum(0)


@pytest.mark.parametrize("pair", [Gaussian, Mixture])
@pytest.mark.parametrize(
    ("build", "formula", "num_particles"),
    [
        (lambda: est.RWS(2), wake, 2),
        (lambda: est.RWS(4), wake, 4),
        (lambda: est.TVO(2, num_partitions=3), thermodynamic, 2),
        (lambda: est.TVO(4, num_partitions=3), thermodynamic, 4),
        (lambda: est.OVIS(2, gamma=1.0), ovis_many, 2),
    ],
    ids=["rws", "rws, four", "tvo", "tvo, four", "ovis, many"],
)
def test_a_gradient_of_no_bound_has_the_mean_of_its_formula(build: Any, formula: Any, num_particles: int, pair: Any) -> None:
    exact = exact_gradient(pair.expected_formula(formula, num_particles), pair.values)
    assert_agrees(gradient_draws(build(), pair.pair, pair.values, pair.x), exact, blind=("l",))


@pytest.mark.parametrize("pair", [Gaussian, Mixture])
def test_asleep_the_guide_learns_the_models_dreams(pair: Any) -> None:
    model = exact_gradient(pair.expected_formula(awake_model, 2), pair.values)
    guide = exact_gradient(pair.sleep, pair.values)
    exact = {name: guide[name] or model[name] for name in pair.values}
    draws = gradient_draws(est.RWS(2, guide_phase="sleep"), pair.pair, pair.values, pair.x)
    assert_agrees(draws, exact)


def test_thermodynamic_reports_its_left_sum() -> None:
    torch.manual_seed(1)
    log_w = torch.randn(4, 7)
    tvo = est.TVO(4, num_partitions=3)
    assert tvo.points == pytest.approx([0.0, 0.01, 0.1, 1.0])
    expected = torch.zeros(7)
    for beta, after in itertools.pairwise([0.0, 0.01, 0.1, 1.0]):
        expected += (after - beta) * (torch.softmax(beta * log_w, 0) * log_w).sum(0)
    assert tvo.reduce(raw(log_w)) == pytest.approx(expected)
    assert est.TVO(4, num_partitions=1).reduce(raw(log_w)) == pytest.approx(log_w.mean(0))


@pytest.mark.parametrize("options", [{"beta": 0.3}, {"beta": 0.3, "kl": "analytic"}, {"warm_up": 4}, {"free_bits": 5.0}])
def test_beta_warm_up_and_free_bits_change_the_objective_and_not_the_bound(options: dict[str, Any]) -> None:
    beta = {"beta": 0.3, "warm_up": 0.25, "free_bits": 0.0}[next(iter(options))]

    def objective(p: Params) -> Tensor:
        kl = torch.distributions.kl_divergence
        q = dist.Normal(p["a"] * Gaussian.x + p["c"], p["l"].exp())
        noise, mass = hermite(60, 1)
        z = Gaussian.sample(p, noise)
        log_likelihood = (mass * normal_log(Gaussian.x, p["w"] * z + p["b"], p["s"].exp())).sum()
        return log_likelihood - beta * kl(q, dist.Normal(p["m"], p["t"].exp()))

    estimator = est.ELBO(**options)
    exact = exact_gradient(objective, Gaussian.values)
    blind = ("m", "t") if "free_bits" in options else ()
    assert_agrees(gradient_draws(estimator, Gaussian.pair, Gaussian.values, Gaussian.x), exact, blind=blind)
    if "warm_up" in options:
        assert [estimator.steps, estimator.current_beta] == [1, 0.5]
        estimator.steps = 100
        assert estimator.current_beta == 1.0
    pair = Gaussian.pair({name: torch.full((DRAWS,), value) for name, value in Gaussian.values.items()})
    bound = est.ELBO(**options).bound(*pair, torch.full((DRAWS,), Gaussian.x)).numpy()
    truth = Gaussian.expected(elbo, 1)({name: torch.tensor(value) for name, value in Gaussian.values.items()}).item()
    assert abs(bound.mean() - truth) < 4 * bound.std() / math.sqrt(DRAWS)


def test_free_bits_leave_a_kl_above_them_alone() -> None:
    pyro.set_rng_seed(4)
    free = gradient_draws(est.ELBO(free_bits=0.01), Gaussian.pair, Gaussian.values, Gaussian.x)
    pyro.set_rng_seed(4)
    plain = gradient_draws(est.ELBO(), Gaussian.pair, Gaussian.values, Gaussian.x)
    for name in free:
        assert free[name] == pytest.approx(plain[name], abs=1e-12)


# --- A hierarchy: two dependent latents, a learned prior, either order of the guide -----------------------------------------


def chain(order: str) -> SimpleNamespace:
    """z1 ~ N(m, e^t), z2|z1 ~ N(r z1, e^u), x ~ N(w z2 + v z1, 0.8); the guide samples z1 first, or z2 first."""
    values = {"m": 0.3, "t": -0.1, "r": 0.7, "u": 0.2, "w": 0.9, "v": 0.4, "a": 0.5, "l": -0.3, "d": 0.4, "c": -0.3, "k": -0.1}
    x = 1.2
    first, second = ("z1", "z2") if order == "down" else ("z2", "z1")

    def pair(p: Params) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z1 = pyro.sample("z1", dist.Normal(p["m"], p["t"].exp()))
                z2 = pyro.sample("z2", dist.Normal(p["r"] * z1, p["u"].exp()))
                pyro.sample("x", dist.Normal(p["w"] * z2 + p["v"] * z1, 0.8), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                h = pyro.sample(first, dist.Normal(p["a"] * x, p["l"].exp()))
                pyro.sample(second, dist.Normal(p["d"] * h + p["c"] * x, p["k"].exp()))

        return model, guide

    def objective(p: Params) -> Tensor:
        noise, mass = hermite(18, 4)
        h = p["a"] * x + p["l"].exp() * noise[:2]
        g = p["d"] * h + p["c"] * x + p["k"].exp() * noise[2:]
        z = {first: h, second: g}
        log_q = normal_log(h, p["a"] * x, p["l"].exp()) + normal_log(g, p["d"] * h + p["c"] * x, p["k"].exp())
        log_p = normal_log(z["z1"], p["m"], p["t"].exp()) + normal_log(z["z2"], p["r"] * z["z1"], p["u"].exp())
        log_p = log_p + normal_log(torch.tensor(x), p["w"] * z["z2"] + p["v"] * z["z1"], torch.tensor(0.8))
        return (mass * iwae(log_p - log_q)).sum()

    return SimpleNamespace(pair=pair, values=values, x=x, objective=objective)


@pytest.mark.parametrize("order", ["down", "up"])
def test_a_hierarchy_gets_the_exact_gradient(order: str) -> None:
    hierarchy = chain(order)
    exact = exact_gradient(hierarchy.objective, hierarchy.values)
    for estimator in (est.IWAE(2), est.DReG(2), est.GDReG(2), est.VIMCO(2)):
        assert_agrees(gradient_draws(estimator, hierarchy.pair, hierarchy.values, hierarchy.x), exact, blind=tuple("turldck"))


def test_gdreg_lowers_the_noise_of_a_learned_prior() -> None:
    hierarchy = chain("down")
    noise = {}
    for estimator in (est.DReG(16), est.GDReG(16)):
        draws = gradient_draws(estimator, hierarchy.pair, hierarchy.values, hierarchy.x)
        noise[type(estimator).__name__] = np.array([draws[name].std() for name in ("m", "t")])
    assert (noise["GDReG"] < noise["DReG"]).all(), noise


def location_scale(family: Any) -> Callable[[Tensor], tuple[Any, Callable[[Tensor], Tensor]]]:
    """A prior of two dimensions over five numbers, and its sampler as a function of fixed noise, by hand."""

    def build(t: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
        distribution = family(loc=t[:2], scale=t[2:4].exp())
        return distribution.to_event(1), lambda z: t[:2] + t[2:4].exp() * ((z - t[:2]) / t[2:4].exp()).detach()

    return build


def multivariate(t: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The lower triangle and the entry above it, which is no part of the distribution, are all leaves."""
    tril = torch.stack([t[2], t[4], t[3] - 0.7, t[3] + 1.0]).reshape(2, 2)  # t[4] above the diagonal

    def sampler(z: Tensor) -> Tensor:
        first = ((z[..., 0] - t[0]) / tril[0, 0]).detach()
        second = ((z[..., 1] - t[1] - tril[1, 0] * first) / tril[1, 1]).detach()
        return torch.stack([t[0] + tril[0, 0] * first, t[1] + tril[1, 0] * first + tril[1, 1] * second], -1)

    return dist.MultivariateNormal(t[:2], scale_tril=tril, validate_args=False), sampler


def affine(t: Tensor) -> tuple[Any, Callable[[Tensor], Tensor]]:
    base = dist.Normal(t[:2], t[2:4].exp()).to_event(1)
    transform = AffineTransform(0.5, t[4].exp(), event_dim=1)

    def sampler(z: Tensor) -> Tensor:
        noise = ((((z - 0.5) / t[4].exp()) - t[:2]) / t[2:4].exp()).detach()
        return 0.5 + t[4].exp() * (t[:2] + t[2:4].exp() * noise)

    return dist.TransformedDistribution(base, [transform]), sampler


FAMILIES = [dist.Normal, dist.Laplace, dist.Cauchy, dist.Gumbel, partial(dist.StudentT, 4.0)]


@pytest.mark.parametrize("build", [*map(location_scale, FAMILIES), multivariate, affine])
@pytest.mark.parametrize("num_particles", [1, 4])
def test_gdreg_moves_a_priors_every_parameter_along_its_sampler(build: Any, num_particles: int) -> None:
    """Equation by equation: (w d[log p(x, z) - log p(z)]/dz - w^2 d log w/dz) dT/dt, draw by draw."""
    theta = torch.tensor([0.3, -0.4, 0.8, 0.2, 0.6], requires_grad=True)
    seen: dict[str, Tensor] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", build(theta)[0])
            pyro.sample("x", dist.Normal(z.prod(-1), 0.7), obs=x)

    q = dist.Normal(torch.tensor([0.1, -0.2]), 0.9).to_event(1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", q)

    x = torch.tensor([0.3, -0.8, 1.2])
    loss = est.GDReG(num_particles).differentiable_loss(model, guide, x)
    (ours,) = torch.autograd.grad(-loss, theta)
    z = seen["z"].detach().reshape(num_particles, 3, 2).requires_grad_()
    distribution, sampler = build(theta)
    log_prior, likelihood = distribution.log_prob(z), normal_log(x, z.prod(-1), 0.7)
    log_w = likelihood + log_prior - q.log_prob(z)
    share = torch.softmax(log_w.detach(), 0)
    slope = torch.autograd.grad((share * likelihood - share**2 * log_w).sum(), z)[0]
    (exact,) = torch.autograd.grad((slope * sampler(z.detach())).sum(), theta, allow_unused=True)
    assert ours.numpy() == pytest.approx(exact.numpy(), rel=1e-10, abs=1e-12)
    assert exact[:4].abs().min() > 1e-4
    assert (exact[4] == 0) == (build is not affine)


def test_gdreg_says_where_it_cannot_invert_a_prior() -> None:
    def pair(p: Params, prior: Callable[[], Any]) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", prior())
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model, Gaussian.pair(p)[1]

    p = {name: torch.full((3,), value, requires_grad=True) for name, value in Gaussian.values.items()}
    logits = torch.zeros(2, requires_grad=True)

    def mixture() -> Any:
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), dist.Normal(torch.zeros(2), torch.ones(2)))

    def flow() -> Any:
        return dist.TransformedDistribution(dist.Normal(p["m"], 1.0), [AffineTransform(p["b"], p["t"].exp())])

    terms = [est.GDReG(4).prior_terms(*pair(p, prior), torch.zeros(3)) for prior in (mixture, flow)]
    assert terms == [{"z": "score"}, {"z": "reparameterised"}]


# --- Any guide: the gradient against one computed with frozen copies of the parameters --------------------------------------


def mixture_guide() -> SimpleNamespace:
    params = {
        "locs": torch.tensor([[-0.8, 0.3], [0.9, -0.4]]),
        "scale": torch.tensor([[0.5, 0.7], [0.6, 0.4]]),
        "logits": torch.tensor([0.3, -0.2]),
    }

    def distribution(p: Params, x: Tensor) -> Any:
        locs = p["locs"] + 0.2 * x[:, None, None]
        return dist.MixtureOfDiagNormals(locs, p["scale"].expand(len(x), 2, 2), p["logits"].expand(len(x), 2))

    return SimpleNamespace(params=params, distributions={"z": lambda p, x, seen: distribution(p, x)})


def flow_guide() -> SimpleNamespace:
    """A spline, then a squashing and an affine layer, all with parameters."""
    pyro.set_rng_seed(7)
    spline = Spline(2, count_bins=4, bound=4.0)
    params = {name: value.detach().clone() for name, value in spline.named_parameters()}
    params |= {"loc": torch.tensor([0.3, -0.2]), "log_scale": torch.tensor([-0.2, 0.1]), "gain": torch.tensor([3.0, 4.0])}

    def distribution(p: Params, x: Tensor) -> Any:
        moved = copy.deepcopy(spline)
        for name, _ in spline.named_parameters():
            delattr(moved, name)
            setattr(moved, name, p[name])
        base = dist.Normal(p["loc"] + 0.5 * x[:, None], p["log_scale"].exp()).to_event(1)
        return dist.TransformedDistribution(base, [moved, SigmoidTransform(), AffineTransform(-1.5, p["gain"], event_dim=1)])

    return SimpleNamespace(params=params, distributions={"z": lambda p, x, seen: distribution(p, x)})


def dependent_guide() -> SimpleNamespace:
    params = {"a": torch.tensor([0.5, -0.3]), "s": torch.tensor([-0.4, -0.2]), "d": torch.tensor([0.6, 0.7])}

    def first(p: Params, x: Tensor, seen: Params) -> Any:
        return dist.Normal(p["a"] * x[:, None], p["s"].exp()).to_event(1)

    def second(p: Params, x: Tensor, seen: Params) -> Any:
        return dist.Normal(p["d"] * seen["y"] + p["a"], (p["s"] + 0.1 * seen["y"]).exp()).to_event(1)

    return SimpleNamespace(params=params, distributions={"y": first, "z": second})


def auxiliary_guide() -> SimpleNamespace:
    """The same, with the first site in the guide alone."""
    setup = dependent_guide()
    return SimpleNamespace(params=setup.params, distributions=setup.distributions, auxiliary="y")


@pytest.mark.parametrize("build", [mixture_guide, flow_guide, dependent_guide, auxiliary_guide])
@pytest.mark.parametrize("kind", ["stl", "dreg", "gdreg"])
def test_gradients_are_stopped_for_any_guide(build: Callable[[], SimpleNamespace], kind: str) -> None:
    setup = build()
    phi = {name: value.clone().requires_grad_() for name, value in setup.params.items()}
    theta = torch.tensor([0.8, -0.6], requires_grad=True)
    x, K = torch.tensor([0.2, -0.7, 1.1, 0.4]), 3
    auxiliary = getattr(setup, "auxiliary", "")
    latents = [name for name in setup.distributions if name != auxiliary]

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen = {name: pyro.sample(name, dist.Normal(torch.zeros(2), 1.0).to_event(1)) for name in latents}
            pyro.sample("x", dist.Normal((theta * sum(seen.values())).tanh().sum(-1), 0.6), obs=x)

    def guide(x: Tensor) -> None:
        seen: Params = {}
        with pyro.plate("data", len(x)):
            for name, distribution in setup.distributions.items():
                seen[name] = pyro.sample(name, distribution(phi, x, seen), infer={"is_auxiliary": name == auxiliary})

    estimator = {"stl": est.STL, "dreg": est.DReG, "gdreg": est.GDReG}[kind](K)
    pyro.set_rng_seed(11)
    loss = estimator.differentiable_loss(model, guide, x)
    leaves = [theta, *phi.values()]
    ours = torch.autograd.grad(-loss, leaves, allow_unused=True, materialize_grads=True)

    inspect_pair(model, guide, x)  # leaves the random stream where it is
    pyro.set_rng_seed(11)
    with pyro.plate("particles", K, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    seen = {name: trace.nodes[name]["value"] for name in setup.distributions}
    still = frozen(phi)
    log_q = sum(distribution(still, x, seen).log_prob(seen[name]) for name, distribution in setup.distributions.items())

    def log_p(theta: Tensor) -> Tensor:
        log_prior = sum(normal_log(seen[name], 0.0, 1.0).sum(-1) for name in latents)
        return log_prior + normal_log(x, (theta * sum(seen[name] for name in latents)).tanh().sum(-1), 0.6)

    share = torch.softmax((log_p(theta) - log_q).detach(), 0) if kind != "stl" else torch.full((K, len(x)), 1 / K)
    square = share**2 if kind != "stl" else share
    (model_gradient,) = torch.autograd.grad((share * log_p(theta)).sum(), theta, retain_graph=True)
    path = (square * (log_p(theta.detach()) - log_q)).sum()
    guide_gradient = torch.autograd.grad(path, list(phi.values()), allow_unused=True, materialize_grads=True)
    for mine, other in zip(ours, (model_gradient, *guide_gradient), strict=True):
        assert mine.numpy() == pytest.approx(other.numpy(), abs=1e-10)
        assert other.abs().max() > 1e-3


@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("kind", ["dreg", "gdreg"])
@pytest.mark.parametrize("vectorize", [True, False])
def test_gradients_are_stopped_within_nested_plates(data_dim: int, kind: str, vectorize: bool) -> None:
    """One latent per datum, one per datum and item; the data plate on either side."""
    K, B, T, item_dim = 3, 4, 2, -3 - data_dim
    torch.manual_seed(3)
    x = torch.randn(B, T) if data_dim == -2 else torch.randn(T, B)
    phi = torch.tensor([0.4, -0.3, 0.7, -0.5], requires_grad=True)
    theta = torch.tensor([0.3, 0.6], requires_grad=True)

    def distributions(phi: Tensor, z: Any) -> tuple[Any, Any]:
        top = dist.Normal(phi[0] * x.mean(item_dim, keepdim=True), phi[1].exp())
        return top, dist.Normal(phi[2] * x + 0.2 * phi[0] * z, phi[3].exp())

    def plates() -> tuple[Any, Any]:
        return pyro.plate("data", B, dim=data_dim), pyro.plate("items", T, dim=item_dim)

    def model(x: Tensor) -> None:
        data, items = plates()
        with data:
            z = pyro.sample("z", dist.Normal(theta[0], 1.0))
            with items:
                u = pyro.sample("u", dist.Normal(theta[1] * z, 0.5))
                pyro.sample("x", dist.Normal(u, 0.3), obs=x)

    def guide(x: Tensor) -> None:
        data, items = plates()
        with data:
            z = pyro.sample("z", distributions(phi, 0.0)[0])
            with items:
                pyro.sample("u", distributions(phi, z)[1])

    estimator = {"dreg": est.DReG, "gdreg": est.GDReG}[kind](K, vectorize_particles=vectorize)
    pyro.set_rng_seed(9)
    loss = estimator.differentiable_loss(model, guide, x)
    ours = torch.autograd.grad(-loss, [theta, phi])
    pyro.set_rng_seed(9)
    if vectorize:
        with pyro.plate("particles", K, dim=-3):
            trace = poutine.trace(guide).get_trace(x)
        z, u = (trace.nodes[name]["value"] for name in "zu")
    else:
        runs = [poutine.trace(guide).get_trace(x) for _ in range(K)]
        z, u = (torch.stack([run.nodes[name]["value"] for run in runs]) for name in "zu")

    def total(per_datum: Tensor, per_item: Tensor) -> Tensor:
        return per_datum.squeeze(item_dim) + per_item.sum(item_dim)

    first, second = distributions(phi.detach(), z)
    log_q = total(first.log_prob(z), second.log_prob(u))

    def log_p(theta: Tensor) -> Tensor:
        per_item = normal_log(u, theta[1] * z, 0.5) + normal_log(x, u, 0.3)
        return total(normal_log(z, theta[0], 1.0), per_item)

    share = torch.softmax((log_p(theta) - log_q).detach(), 0)
    (path,) = torch.autograd.grad((share**2 * (log_p(theta.detach()) - log_q)).sum(), phi, retain_graph=True)
    assert ours[1].numpy() == pytest.approx(path.numpy(), abs=1e-10)
    if kind == "dreg":
        (direct,) = torch.autograd.grad((share * log_p(theta)).sum(), theta)
        assert ours[0].numpy() == pytest.approx(direct.numpy(), abs=1e-10)


def test_a_flow_without_an_inverse_is_refused_by_name_where_its_score_is_needed() -> None:
    flow = planar(2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [flow]))

    est.IWAE(3).loss_and_grads(model, guide, torch.zeros(4))
    assert flow.bias.grad is not None
    for estimator in (est.STL(3), est.DReG(3), est.GDReG(3), est.VIMCO(3)):
        with pytest.raises(ValueError, match=r"cannot be inverted .* such as elbo or iwae"):
            estimator.loss_and_grads(model, guide, torch.zeros(4))
        assert torch.isfinite(estimator.bound(model, guide, torch.zeros(4))).all()


@pytest.mark.parametrize("kind", ["stl", "dreg", "gdreg", "iwae", "vimco", "rws"])
def test_a_guide_written_as_pyros_autoguides_are_gets_the_same_gradient(kind: str) -> None:
    """An auxiliary site, pushed through a transform into a Delta that carries the Jacobian: a LogNormal, spelt out."""
    values = {"m": 0.2, "t": -0.1, "a": 0.4, "l": -0.5}
    p = {name: torch.full((4,), value, requires_grad=True) for name, value in values.items()}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(p["m"], p["t"].exp()))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def plain(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.LogNormal(p["a"] * x, p["l"].exp()))

    def spelt_out(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(p["a"] * x, p["l"].exp()), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    def gradient(guide: Any, kind: str) -> dict[str, np.ndarray]:
        pyro.set_rng_seed(8)
        loss = few(kind).differentiable_loss(model, guide, torch.tensor([0.5, 1.0, 1.5, 2.0]))
        return {name: value.numpy() for name, value in zip(p, torch.autograd.grad(loss, list(p.values())), strict=True)}

    ours, theirs = gradient(spelt_out, kind), gradient(plain, kind)
    if kind == "gdreg":  # the prior's own sampler needs the guide's density at z, which a Delta does not have
        assert few(kind).prior_terms(model, spelt_out, torch.ones(4)) == {"z": "score"}
        assert few(kind).prior_terms(model, plain, torch.ones(4)) == {"z": "reparameterised"}
        theirs |= {name: value for name, value in gradient(plain, "dreg").items() if name in "mt"}
    for name in p:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-10), name
        assert np.abs(theirs[name]).min() > 1e-4


def test_a_learned_point_is_refused_where_its_score_would_be_needed() -> None:
    point = torch.zeros(3, requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(point))

    model = Gaussian.pair({name: torch.full((3,), value) for name, value in Gaussian.values.items()})[0]
    x = torch.tensor([0.1, 0.5, -1.0])
    for name in ("vimco", "ovis", "score_elbo", "tvo", "rws"):
        with pytest.raises(ValueError, match=r"'z' is a learned Delta.*such as elbo"):
            few(name).loss_and_grads(model, guide, x)
    est.ELBO().loss_and_grads(model, guide, x)
    m, t, w, b, s = (Gaussian.values[name] for name in "mtwbs")
    exact = m * math.exp(-2 * t) + w * (x - b) * math.exp(-2 * s)  # d log p(x, z) / dz at zero
    assert point.grad is not None
    assert (-point.grad).numpy() == pytest.approx(exact.numpy())


# --- Exact posterior, limits and order of the bounds --------------------------------------------------------------------


def raw(log_w: Tensor) -> LogWeights:
    return LogWeights(log_w, torch.zeros_like(log_w), torch.zeros_like(log_w))


def test_stl_is_silent_at_the_exact_posterior_and_the_elbo_is_not() -> None:
    pair = LinearGaussian()
    x = pair.sample(6)
    distribution = pair.posterior(x)
    loc, tril = distribution.loc.clone().requires_grad_(), distribution.scale_tril.clone().requires_grad_()

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    for estimator in (est.STL(), est.STL(4), est.DReG(4), est.GDReG(4)):
        loss = estimator.differentiable_loss(pair.model, guide, x)
        for gradient in torch.autograd.grad(loss, [loc, tril]):
            assert gradient.abs().max() < 1e-12
        assert -loss.item() == pytest.approx(pair.log_px(x).sum(), abs=1e-10)
    loud = torch.autograd.grad(est.ELBO().differentiable_loss(pair.model, guide, x), [loc])[0]
    assert loud.abs().max() > 0.1


def test_special_cases_agree_on_the_same_draws() -> None:
    torch.manual_seed(2)
    log_w = 3 * torch.randn(6, 5) - 40
    one, many = raw(log_w[:1]), raw(log_w)

    def same(first: est.Estimator, second: est.Estimator, weights: LogWeights) -> None:
        assert first.reduce(weights) == pytest.approx(second.reduce(weights), abs=1e-9)
        ours, theirs = (estimator.coefficients(weights.log_weights) for estimator in (first, second))
        for a, b in zip(ours, theirs, strict=True):
            assert a == pytest.approx(b, abs=1e-9)

    same(est.IWAE(1), est.ELBO(), one)
    same(est.DReG(1), est.STL(), one)
    same(est.MIWAE(6, num_groups=6), est.ELBO(6), many)
    same(est.MIWAE(6, num_groups=1), est.IWAE(6), many)
    same(est.PIWAE(6, num_groups=1), est.IWAE(6), many)
    same(est.CIWAE(6, beta=1.0), est.ELBO(6), many)
    same(est.CIWAE(6, beta=0.0), est.IWAE(6), many)
    same(est.Renyi(6, alpha=1.0), est.ELBO(6), many)
    same(est.Renyi(6, alpha=0.0), est.IWAE(6), many)
    same(est.JVI(6, order=0), est.IWAE(6), many)
    assert est.Renyi(6, alpha=1 + 1e-7).reduce(many) == pytest.approx(log_w.mean(0), abs=1e-5)
    assert est.Renyi(6, alpha=-5000.0).reduce(many) == pytest.approx(est.VRMax(6).reduce(many), abs=1e-3)
    assert est.Renyi(6, alpha=0.5).reduce(many) == pytest.approx(2 * (torch.logsumexp(log_w / 2, 0) - math.log(6)))
    assert est.PIWAE(6, num_groups=3).reduce(many) == pytest.approx(est.IWAE(6).reduce(many))


def test_the_jackknife_of_order_two_is_its_combination_of_exact_expected_bounds() -> None:
    values = {name: torch.tensor(value) for name, value in Mixture.values.items()}
    expected = {K: Mixture.expected(iwae, K)(values).item() for K in (4, 5, 6)}
    order_one = Mixture.expected(lambda log_w: est.JVI(6).reduce(raw(log_w)), 6)(values).item()
    assert order_one == pytest.approx(6 * expected[6] - 5 * expected[5], abs=1e-12)
    order_two = Mixture.expected(lambda log_w: est.JVI(6, order=2).reduce(raw(log_w)), 6)(values).item()
    assert order_two == pytest.approx(36 / 2 * expected[6] - 25 * expected[5] + 16 / 2 * expected[4], abs=1e-11)
    log_px = torch.logsumexp(Mixture.log_p(values, torch.tensor([0.0, 1.0])), 0).item()
    assert abs(order_one - log_px) < abs(expected[6] - log_px) / 5


def test_bounds_rise_with_particles_and_stay_below_log_px() -> None:
    values = {name: torch.tensor(value) for name, value in Mixture.values.items()}
    log_px = torch.logsumexp(Mixture.log_p(values, torch.tensor([0.0, 1.0])), 0).item()
    for family in (est.IWAE, lambda K: est.Renyi(K, alpha=0.5), lambda K: est.CIWAE(K, beta=0.3), est.DReG, est.VIMCO):
        expected = []
        for K in range(2, 9):
            z = Mixture.tuples(K)
            log_q = Mixture.log_q(values, z)
            bound = family(K).reduce(raw(Mixture.log_p(values, z) - log_q))
            expected.append((log_q.sum(0).exp() * bound).sum().item())
        assert np.all(np.diff(expected) > 0)
        assert expected[-1] < log_px


def test_the_reported_bound_is_the_expected_one() -> None:
    values = {name: torch.full((DRAWS,), value) for name, value in Gaussian.values.items()}
    scalars = {name: torch.tensor(value) for name, value in Gaussian.values.items()}
    for name, (make, objective) in REPARAMETERISED.items():
        bound = make().bound(*Gaussian.pair(values), torch.full((DRAWS,), Gaussian.x)).numpy()
        exact = objective(scalars).item()
        assert bound.shape == (DRAWS,)
        assert abs(bound.mean() - exact) < 4 * bound.std() / math.sqrt(DRAWS), name


# --- Zero weights -------------------------------------------------------------------------------------------------------

OURS = [name for name in names("estimator") if issubclass(find("estimator", name), est.Estimator)]


@pytest.mark.parametrize("name", OURS)
def test_an_estimator_is_rebuilt_from_its_description(name: str) -> None:
    estimator = few(name)
    again = build("estimator", describe(estimator, "estimator") | {"component": "estimator"})
    assert type(again) is type(estimator)
    assert describe(again, "estimator") == describe(estimator, "estimator")


def few(name: str) -> Any:
    return est.make_estimator({"kind": name, "num_particles": 4})


def special(name: str) -> Any:
    options = {
        "elbo, beta": {"kind": "elbo", "beta": 0.5},
        "elbo, analytic": {"kind": "elbo", "kl": "analytic"},
        "rws, asleep": {"kind": "rws", "guide_phase": "sleep"},
    }
    return est.make_estimator({"num_particles": 4} | options.get(name, {"kind": name}))


@pytest.mark.parametrize("name", [*OURS, "elbo, beta", "elbo, analytic", "rws, asleep"])
def test_one_datum_of_weight_zero_does_not_touch_the_others(name: str) -> None:
    theta, phi = torch.tensor([0.7, -0.2], requires_grad=True), torch.tensor([0.4, 0.1], requires_grad=True)

    def model(x: Tensor, dies: Callable[[Tensor, Tensor], Tensor]) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta[1], 1.0))
            pyro.factor("cut", torch.where(dies(x, z), -torch.inf, theta[0] * z))
            pyro.sample("x", dist.Normal(theta[0] * z, 1.0), obs=x)

    def guide(x: Tensor, dies: Callable[[Tensor, Tensor], Tensor]) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(phi[0] * x.clamp(max=1), phi[1].exp()))

    x, estimator = torch.tensor([0.3, -0.8, 9.0]), special(name)

    def draw(dies: Callable[[Tensor, Tensor], Tensor]) -> LogWeights:
        pyro.set_rng_seed(5)
        return estimator._draw(model, guide, (x, dies), {})

    pyro.set_rng_seed(5)
    loss = estimator.differentiable_loss(model, guide, x, lambda x, z: x > 5)
    assert loss.item() == math.inf
    bound = estimator.bound(model, guide, x, lambda x, z: x > 5)
    assert bound[2] == -math.inf
    assert torch.isfinite(bound[:2]).all()
    # What the first two data give where the third is alive, on the same draws.
    others = estimator.objective(draw(lambda x, z: x > 50))[:2].sum()
    if name == "rws, asleep":  # a dream knows no data, so the third has its own
        others = estimator.objective(draw(lambda x, z: x > 5)).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, [theta, phi]), torch.autograd.grad(-others, [theta, phi]), strict=True):
        assert torch.isfinite(ours).all()
        assert ours.numpy() == pytest.approx(theirs.numpy(), abs=1e-12)
    # Some of a datum's particles at zero leave numbers too.
    some = estimator.objective(draw(lambda x, z: z > 0.2)).sum()
    for gradient in torch.autograd.grad(some, [theta, phi]):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("kind", ["vimco", "ovis", "rws", "tvo"])
def test_a_particle_of_weight_zero_teaches_the_guide_to_stay_away(kind: str) -> None:
    """Draw by draw, what the papers' formulas say of the score of z = 2, which the model rules out."""
    K, x = 5, torch.linspace(-1, 2, 6)
    theta, phi = torch.tensor([0.2, -0.4, 0.9]), torch.tensor([0.5, 0.1, -0.3], requires_grad=True)
    seen: dict[str, Tensor] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=theta))
            pyro.factor("cut", torch.where(z == 2, -torch.inf, 0.0))
            pyro.sample("x", dist.Normal(z.double(), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Categorical(logits=phi))

    estimator = est.make_estimator({"kind": kind, "num_particles": K})
    pyro.set_rng_seed(4)
    (ours,) = torch.autograd.grad(-estimator.differentiable_loss(model, guide, x), phi)
    z = seen["z"]
    dead = z == 2
    assert (dead.sum(0) <= K - 2).all()
    assert (dead.sum(0) == 1).any()  # with two, the others' geometric mean is zero, and so is VIMCO's signal
    log_q = torch.log_softmax(phi, 0)[z]
    log_w = torch.log_softmax(theta, 0)[z] + normal_log(x, z.double(), 1.0) - log_q.detach()
    w = torch.where(dead, 0.0, log_w.exp())
    share, bound = w / w.sum(0), w.mean(0).log()
    signal = torch.zeros(K, 6)
    for k in range(K):
        others = [j for j in range(K) if j != k]
        if kind == "vimco":  # the geometric mean of the others is zero where one of them is
            signal[k] = bound - share[k] - ((w[others].sum(0) + w[others].prod(0) ** (1 / (K - 1))) / K).log()
        elif kind == "ovis":
            signal[k] = bound - share[k] - w[others].mean(0).log() - math.log(1 - 1 / K)
        elif kind == "rws":
            signal[k] = share[k]
    if kind == "tvo":
        for low, high in itertools.pairwise(estimator.points):
            v = torch.where(dead, 0.0, w**low)
            v, of_w = v / v.sum(0), torch.where(dead, 0.0, log_w)
            signal += (high - low) * v * ((1 - low) * (of_w - (v * of_w).sum(0)) - 1)
    (exact,) = torch.autograd.grad((signal * log_q).sum(), phi)
    assert ours.numpy() == pytest.approx(exact.numpy(), rel=1e-9)


@pytest.mark.parametrize("kind", ["dreg", "gdreg", "piwae"])
def test_a_particle_of_weight_zero_and_infinite_slope_adds_nothing(kind: str) -> None:
    """p(x, z) is N(z; m, 1) N(x; z, 1) z for z > 0: below, log 0 sends 0 x inf back."""
    params = {name: torch.tensor(value, requires_grad=True) for name, value in {"m": 0.4, "a": 0.3, "l": -0.2}.items()}
    seen: dict[str, Tensor] = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(params["m"], 1.0))
            pyro.factor("cut", torch.log(z * (z > 0)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Normal(params["a"] * x, params["l"].exp()))

    x, K = torch.tensor([0.3, -0.8, 1.0]), 6
    estimator = est.make_estimator({"kind": kind, "num_particles": K})
    pyro.set_rng_seed(5)
    ours = torch.autograd.grad(-estimator.differentiable_loss(model, guide, x), list(params.values()))
    noise = (seen["z"] - params["a"] * x).detach() / params["l"].exp().item()
    z = params["a"] * x + params["l"].exp() * noise
    alive = z.detach() > 0
    assert alive.any(0).all()
    assert not alive.all()

    def log_w(p: Params, q: Params, z: Tensor) -> Tensor:
        inside = torch.where(alive, z, 1.0)
        terms = normal_log(inside, p["m"], 1.0) + inside.log() + normal_log(x, inside, 1.0)
        return torch.where(alive, terms - normal_log(inside, q["a"] * x, q["l"].exp()), -torch.inf)

    still = frozen(params)
    share = torch.softmax(log_w(still, still, z.detach()), 0)
    groups = torch.softmax(log_w(still, still, z.detach()).unflatten(0, (2, -1)), 1).nan_to_num().flatten(0, 1) / 2
    finite = torch.where(alive, log_w(params, params if kind == "piwae" else still, z), 0.0)
    path = torch.where(alive, groups if kind == "piwae" else share**2, 0.0)
    of_model = torch.autograd.grad((share * finite).sum(), params["m"], retain_graph=True)
    of_guide = torch.autograd.grad((path * finite).sum(), [params["a"], params["l"]], retain_graph=True)
    if kind == "gdreg":  # the prior's location moves its own sample: T = m + eps
        joint = torch.where(alive, normal_log(z, still["m"], 1.0) + z.abs().log() + normal_log(x, z, 1.0), 0.0)
        prior = torch.where(alive, normal_log(z, still["m"], 1.0), 0.0)
        (slope,) = torch.autograd.grad((share * (joint - prior) - path * finite).sum(), z)
        of_model = (slope.sum(),)
    for mine, other in zip(ours, (*of_model, *of_guide), strict=True):
        assert mine.item() == pytest.approx(other.item(), rel=1e-10)


@pytest.mark.parametrize("name", [name for name in OURS if name not in ("elbo", "stl", "vr_max", "score_elbo")])
def test_no_gradient_is_a_subnormal_number(name: str) -> None:
    # Weights of e^-90 are below every normal float32 number, and products of such take many times as long.
    torch.set_default_dtype(torch.float32)
    seen: list[Tensor] = []
    slope, loc = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            mean = slope * z
            if mean.requires_grad:
                mean.register_hook(seen.append)
            pyro.sample("x", dist.Normal(mean, 0.2).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x + loc, 1.5).to_event(1))

    x = torch.zeros(100, 3)
    estimator = est.make_estimator({"kind": name, "num_particles": 10 if name in ("jvi", "tvo") else 40})
    with torch.no_grad():
        log_w = estimator._draw(model, guide, (x,), {}).log_weights
    assert log_w.dtype is torch.float32
    share = torch.softmax(log_w.double(), 0)
    assert ((share > 1e-44) & (share < 1e-38)).any()
    loss = estimator.differentiable_loss(model, guide, x)
    torch.autograd.grad(loss, [slope, loc])
    assert seen
    smallest = torch.finfo(torch.float32).tiny
    assert not any(((each != 0) & (each.abs() < smallest)).any() for each in seen)


# --- Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in OURS if name not in "tvo rws vimco ovis score_elbo".split()])
def test_an_estimator_that_needs_a_path_refuses_a_site_without_one_by_name(name: str) -> None:
    p = {key: torch.full((3,), value, requires_grad=True) for key, value in Mixture.values.items()}
    x = torch.zeros(3)
    estimator = few(name)
    with pytest.raises(ValueError, match=r"needs reparameterised sites.*'z'.*vimco"):
        estimator.loss_and_grads(*Mixture.pair(p), x)
    with pytest.raises(ValueError, match=r"needs reparameterised sites.*'z'"):
        est.check_estimator(estimator, inspect_pair(*Mixture.pair(p), x))
    assert estimator.bound(*Mixture.pair(p), x).shape == (3,)


def test_what_needs_no_path_is_let_through() -> None:
    p = {key: torch.full((3,), value, requires_grad=True) for key, value in Mixture.values.items()}
    info = inspect_pair(*Mixture.pair(p), torch.zeros(3))
    for name in ("tvo", "rws", "vimco", "ovis", "score_elbo", "trace_elbo", "trace_enum_elbo", "trace_graph_elbo"):
        est.check_estimator(est.make_estimator(name), info)
    for refused in (pyro.infer.RenyiELBO(alpha=0.0), pyro.infer.TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match="needs reparameterised sites"):
            est.check_estimator(refused, info)
    est.check_estimator(pyro.infer.RenyiELBO(alpha=0.5), info)


def test_pyros_renyi_is_refused_on_a_subsampled_plate_with_the_reason() -> None:
    def pair(size: int) -> Pair:
        def model(x: Tensor) -> None:
            with pyro.plate("data", size, subsample_size=len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", size, subsample_size=len(x)):
                pyro.sample("z", dist.Normal(0.5 * x, 0.7))

        return model, guide

    x = torch.zeros(4)
    with pytest.raises(ValueError, match=r"N/B = 5 inside the logsumexp.*'renyi' or 'iwae'"):
        est.check_estimator(pyro.infer.RenyiELBO(), inspect_pair(*pair(20), x))
    est.check_estimator(pyro.infer.RenyiELBO(), inspect_pair(*pair(4), x))
    est.check_estimator(est.Renyi(), inspect_pair(*pair(20), x))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "vimco", "num_particles": 1}, "at least 2"),
        ({"kind": "ovis", "num_particles": 1}, "at least 2"),
        ({"kind": "tvo", "num_particles": 1}, "at least 2"),
        ({"kind": "score_elbo", "num_particles": 1}, "at least 2"),
        ({"kind": "iwae", "num_particles": 0}, "positive integer"),
        ({"kind": "miwae", "num_particles": 8, "num_groups": 3}, "num_groups must divide num_particles = 8, got 3"),
        ({"kind": "piwae", "num_particles": 8, "num_groups": 0}, "num_groups must be a positive integer"),
        ({"kind": "ciwae", "beta": 1.2}, "between 0 and 1"),
        ({"kind": "renyi", "alpha": -math.inf}, "vr_max"),
        ({"kind": "jvi", "num_particles": 3, "order": 3}, "order must be below num_particles = 3, got 3"),
        ({"kind": "tvo", "num_partitions": 0}, "positive integer"),
        ({"kind": "tvo", "log10_beta": 0.0}, "log10_beta must be negative, got 0.0"),
        ({"kind": "rws", "guide_phase": "dream"}, "wake"),
        ({"kind": "ovis", "gamma": -0.1}, "between 0 and 1"),
        ({"kind": "elbo", "kl": "exact"}, "analytic"),
        ({"kind": "elbo", "beta": -1.0}, "beta must be non-negative, got -1.0"),
        ({"kind": "elbo", "num_particle": 2}, "did you mean 'num_particles'"),
    ],
)
def test_an_option_out_of_range_is_refused(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        est.make_estimator(spec)


def test_sleep_refuses_an_observation_that_is_no_argument() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x + 1)

    guide = Gaussian.pair({name: torch.full((3,), value, requires_grad=True) for name, value in Gaussian.values.items()})[1]
    with pytest.raises(ValueError, match=r"site 'x'.*wake phase"):
        est.RWS(3, guide_phase="sleep").loss_and_grads(model, guide, torch.zeros(3))


# --- Analytic KL --------------------------------------------------------------------------------------------------------


def test_the_kl_is_analytic_where_it_may_be_and_says_where() -> None:
    hierarchy = {order: chain(order) for order in ("down", "up")}
    terms = {}
    for order, pair in hierarchy.items():
        p = {name: torch.full((5,), value) for name, value in pair.values.items()}
        terms[order] = est.ELBO(kl="analytic").kl_terms(*pair.pair(p), torch.full((5,), pair.x))
        assert est.ELBO().kl_terms(*pair.pair(p), torch.zeros(5)) == {"z1": "sample", "z2": "sample"}
    assert terms["down"] == {"z1": "analytic", "z2": "analytic"}
    # p(z2 | z1) depends on what this guide samples after z2, so z2 cannot be integrated out of it.
    assert terms["up"] == {"z2": "sample", "z1": "analytic"}


@pytest.mark.parametrize("order", ["down", "up"])
def test_the_analytic_kl_leaves_the_bound_and_its_gradient_where_they_are(order: str) -> None:
    pair = chain(order)
    values = {name: torch.full((DRAWS,), value) for name, value in pair.values.items()}
    x = torch.full((DRAWS,), pair.x)
    sampled, analytic = (est.ELBO(kl=kl).bound(*pair.pair(values), x).numpy() for kl in ("sample", "analytic"))
    assert abs(sampled.mean() - analytic.mean()) < 4 * math.hypot(sampled.std(), analytic.std()) / math.sqrt(DRAWS)
    ours = gradient_draws(est.ELBO(kl="analytic"), pair.pair, pair.values, pair.x)
    plain = gradient_draws(est.ELBO(), pair.pair, pair.values, pair.x)
    for name in ours:
        error = math.hypot(ours[name].std(), plain[name].std()) / math.sqrt(DRAWS)
        assert abs(ours[name].mean() - plain[name].mean()) < 4 * error, name


def test_the_gradient_of_an_analytic_kl_has_no_noise() -> None:
    # The likelihood does not depend on z, so that the KL is all that the parameters change.
    loc, scale = (torch.tensor(values, requires_grad=True) for values in ([0.3, -1.2, 2.0], [0.5, 2.0, 1.0]))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))

    est.ELBO(2, kl="analytic").differentiable_loss(model, guide, torch.zeros(3)).backward()
    torch.testing.assert_close(loc.grad, loc.detach())
    torch.testing.assert_close(scale.grad, (scale - 1 / scale).detach())


# --- Under Pyro: its own gradient tests in our words ---------------------------------------------------------------------


def store_gradients(estimator: Any, model: Any, guide: Any, x: Tensor, repeats: int) -> dict[str, Tensor]:
    """Gradients of Pyro's parameters, shape (repeats,), as ``loss_and_grads`` leaves them."""
    found: dict[str, list[Tensor]] = {}
    for _ in range(repeats):
        with poutine.trace(param_only=True) as capture:
            estimator.loss_and_grads(model, guide, x)
        for name, site in capture.trace.nodes.items():
            leaf = site["value"].unconstrained()
            found.setdefault(name, []).append(leaf.grad.clone())
            leaf.grad = None
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize(
    ("name", "subsampled"),
    [(name, False) for name in ("elbo", "stl", "iwae", "dreg", "gdreg", "score_elbo", "vimco")]
    + [(name, True) for name in ("elbo", "dreg", "score_elbo", "vimco")],
)
def test_normal_normal_in_the_parameter_store(name: str, subsampled: bool) -> None:
    """z ~ N(0, 1), x ~ N(z, 1); the ELBO's gradient for q = N(loc, e^log_scale) is known, and a subsample scales it."""
    data = torch.tensor([-0.5, 2.0])
    size = 2 if not subsampled else 6
    estimator = est.make_estimator({"kind": name, "num_particles": 400 if name in ("iwae", "dreg", "gdreg", "vimco") else 4})
    loc, log_scale = 0.3, -0.4

    def model(x: Tensor) -> None:
        with pyro.plate("data", size, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        q_loc = pyro.param("loc", torch.tensor(loc))
        q_scale = pyro.param("log_scale", torch.tensor(log_scale)).exp()
        with pyro.plate("data", size, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(q_loc, q_scale))

    found = store_gradients(estimator, model, guide, data, 150)
    if name in ("elbo", "stl", "score_elbo"):
        exact = {"loc": -(data - 2 * loc).sum() * size / 2, "log_scale": -(1 - 2 * math.exp(2 * log_scale)) * size}
    else:
        # With many particles the bound no longer depends on the guide.
        exact = {"loc": torch.tensor(0.0), "log_scale": torch.tensor(0.0)}
    for key, draws in found.items():
        error = draws.std() / math.sqrt(len(draws))
        slack = 0.0 if name in ("elbo", "stl", "score_elbo") else 0.02 * size
        assert abs(draws.mean() - exact[key]) < 4 * error + slack, (key, draws.mean(), exact[key], error)
        assert error < 0.25 * size


def test_a_subsampled_plate_multiplies_the_objective_and_nothing_else() -> None:
    x = torch.tensor([0.4, -1.0, 0.7])

    def run(size: int, name: str) -> tuple[float, Tensor, Tensor]:
        phi = torch.tensor([0.2, -0.3], requires_grad=True)

        def model(x: Tensor) -> None:
            with pyro.plate("data", size, subsample_size=len(x), subsample=torch.arange(3)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", size, subsample_size=len(x), subsample=torch.arange(3)):
                pyro.sample("z", dist.Normal(phi[0] * x, phi[1].exp()))

        estimator = few(name)
        pyro.set_rng_seed(3)
        loss = estimator.differentiable_loss(model, guide, x)
        pyro.set_rng_seed(3)
        bound = estimator.bound(model, guide, x)
        return loss.item(), torch.autograd.grad(loss, phi)[0], bound

    for name in OURS:
        plain, scaled = run(3, name), run(30, name)
        assert scaled[0] == pytest.approx(10 * plain[0])
        assert scaled[1].numpy() == pytest.approx(10 * plain[1].numpy())
        assert scaled[2].numpy() == pytest.approx(plain[2].numpy())
        assert plain[1].abs().max() > 1e-4


def test_enumeration_and_the_score_function_agree_on_bernoullis() -> None:
    """TraceEnum_ELBO sums the latent out: its gradient is exact, and equal to ours summed by hand."""
    x = torch.tensor([0.9])

    def pair(p: Params) -> Pair:
        model, guide = Mixture.pair(p)
        return model, lambda x: poutine.infer_config(guide, lambda site: {"enumerate": "parallel"})(x)

    p = {name: torch.full((1,), value, requires_grad=True) for name, value in Mixture.values.items()}
    summed = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(*pair(p), x)
    enumerated = torch.autograd.grad(-summed, list(p.values()))
    exact = exact_gradient(Mixture.expected(elbo, 1), Mixture.values)
    assert dict(zip(p, (value.item() for value in enumerated), strict=True)) == pytest.approx(exact, abs=1e-12)
    draws = gradient_draws(est.ScoreELBO(3), Mixture.pair, Mixture.values, Mixture.x)
    assert_agrees(draws, {name: value.item() for name, value in zip(p, enumerated, strict=True)})


@pytest.mark.parametrize("name", [*OURS, "trace_elbo", "trace_mean_field_elbo", "trace_graph_elbo", "renyi_elbo"])
def test_every_name_trains_under_plain_svi(name: str) -> None:
    torch.set_default_dtype(torch.float32)
    pair = pyro_module_function_pair(f"svi.{name}")
    y = torch.bernoulli(torch.tensor([[0.9, 0.1, 0.8]] * 16))
    before = [parameter.detach().clone() for parameter in pair.parameters]
    svi = pyro.infer.SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.02}), loss=est.make_estimator(name))
    losses = [svi.step(y) for _ in range(60)]
    assert all(not torch.equal(old, new) for old, new in zip(before, pair.parameters, strict=True))
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    assert math.isfinite(svi.evaluate_loss(y))


def test_a_loss_without_gradients_draws_nothing_more() -> None:
    pair = LinearGaussian(spread=1.3)
    x = pair.sample(4)
    for name in OURS:
        estimator = few(name)
        pyro.set_rng_seed(1)
        loss = estimator.loss(pair.model, pair.guide, x)
        pyro.set_rng_seed(1)
        assert loss == pytest.approx(-estimator.bound(pair.model, pair.guide, x).sum().item())


def test_a_new_estimator_is_one_method() -> None:
    class Median(est.Estimator):
        """The middle log-weight."""

        def reduce(self, weights: LogWeights) -> Tensor:
            return weights.log_weights.median(0).values

    p = {name: torch.full((2,), value, requires_grad=True) for name, value in Gaussian.values.items()}
    pyro.set_rng_seed(2)
    ours = torch.autograd.grad(-Median(3).differentiable_loss(*Gaussian.pair(p), torch.zeros(2)), p["c"])
    pyro.set_rng_seed(2)
    weights = log_weights(*Gaussian.pair(p), torch.zeros(2), num_particles=3)
    theirs = torch.autograd.grad(weights.log_weights.median(0).values.sum(), p["c"])
    assert ours[0].numpy() == pytest.approx(theirs[0].numpy())


# --- Probabilistic PCA --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_stl_trains_a_linear_vae_to_the_likelihood_of_probabilistic_pca() -> None:
    D, L, N = 5, 2, 200
    truth = LinearGaussian(latent_dim=L, data_dim=D, noise=0.5, seed=1)
    x = truth.sample(N)
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True)))[::-1]
    noise = eigenvalues[L:].mean()
    best = -0.5 * (D * math.log(2 * math.pi) + np.log(eigenvalues[:L]).sum() + (D - L) * math.log(noise) + D)
    torch.manual_seed(0)
    decoder, log_noise = nn.Linear(L, D), nn.Parameter(torch.tensor(0.0))
    encoder, raw_tril = nn.Linear(D, L), nn.Parameter(torch.zeros(L, L))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), log_noise.exp()).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        tril = raw_tril.tril(-1) + raw_tril.diagonal().exp().diag_embed()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(encoder(x), scale_tril=tril))

    parameters = [*decoder.parameters(), log_noise, *encoder.parameters(), raw_tril]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    stl, steps, tail = est.STL(16), 3000, 1000
    mean = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 if step < steps // 2 else 0.002
        optimizer.zero_grad()
        (stl.differentiable_loss(model, guide, x) / N).backward()
        optimizer.step()
        if step >= steps - tail:  # the average of the tail has less of the sampling noise
            for total, parameter in zip(mean, parameters, strict=True):
                total += parameter.detach() / tail
    with torch.no_grad():
        for total, parameter in zip(mean, parameters, strict=True):
            parameter.copy_(total)
    W, b = decoder.weight.detach(), decoder.bias.detach()
    covariance = W @ W.T + (2 * log_noise.detach()).exp() * torch.eye(D)
    reached = dist.MultivariateNormal(b, covariance).log_prob(x).mean().item()
    assert best - 1e-5 < reached <= best + 1e-9


def test_renyi_is_continuous_at_one_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    log_w = 3 * torch.randn(5, 200, generator=generator, dtype=torch.float32) - 90
    weights = LogWeights(log_w, torch.zeros_like(log_w), torch.zeros_like(log_w))
    for distance in (1e-3, 1e-5, 1e-7):
        near = est.Renyi(5, alpha=1 - distance).reduce(weights)
        assert near.dtype == torch.float32
        # To first order the bound moves by half the variance of the log-weights times the distance.
        expected = log_w.double().mean(0) + 0.5 * distance * log_w.double().var(0, correction=0)
        assert torch.allclose(near.double(), expected, atol=2e-5 + 30 * distance**2 * 100, rtol=0)


@pytest.mark.parametrize("name", ["dreg", "gdreg", "piwae", "vimco", "rws"])
def test_a_masked_latent_is_refused_where_its_density_is_needed(name: str) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    mask = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        with pyro.plate("data", 3):
            with pyro.poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 3), pyro.poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.3 * x, scale))

    with pytest.raises(ValueError, match="that of 'z' is masked for some data"):
        est.make_estimator({"kind": name, "num_particles": 4}).loss_and_grads(model, guide, torch.ones(3))
    est.make_estimator({"kind": "iwae", "num_particles": 4}).loss_and_grads(model, guide, torch.ones(3))
    assert scale.grad is not None


def test_a_dream_leaves_arguments_of_equal_values_alone() -> None:
    seen = []

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z - 3.0), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        seen.append(mask)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    est.RWS(3, guide_phase="sleep").loss_and_grads(model, guide, torch.ones(30), torch.ones(30, dtype=torch.bool))
    assert all(bool(mask.all()) for mask in seen)


@pytest.mark.parametrize("num_particles", ["abc", math.inf, math.nan, 2.5, 0, None])
def test_odd_numbers_of_particles_are_refused_in_a_sentence(num_particles: Any) -> None:
    with pytest.raises(ValueError, match="num_particles must be a positive integer, got"):
        est.IWAE(num_particles)


def test_odd_orders_and_partitions_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"order must be a positive integer, got 1\.5"):
        est.JVI(5, order=1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_partitions must be a positive integer, got 2\.5"):
        est.TVO(5, num_partitions=2.5)  # type: ignore[arg-type]
    assert est.JVI(5, order=0).order == 0
