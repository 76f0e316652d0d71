"""What one run of a pair shows, site by site: right, or refused in a sentence that says why and what to write."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from pyro.distributions.testing.rejection_gamma import ShapeAugmentedGamma
from pyro.infer import autoguide
from pyro.infer.autoguide.effect import AutoHierarchicalNormalMessenger, AutoNormalMessenger
from scipy import stats
from scipy.special import betaln
from torch import Tensor, nn
from torch.distributions import biject_to, constraints

import pyrovae as pv
from pyrovae.estimators.base import make_estimator
from pyrovae.programs.inspect import inspect_pair
from pyrovae.programs.support import free_numbers
from pyrovae.programs.wake_sleep import simulated_log_guide

pytestmark = pytest.mark.usefixtures("float64")

B = 20
Program = Callable[..., Any]


def _x() -> Tensor:
    return torch.linspace(-2.0, 2.0, B)


def _exact(x: Tensor) -> np.ndarray:
    return stats.norm(0, 2**0.5).logpdf(x.numpy())


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x: Tensor) -> None:
    """The exact posterior, so every weight is p(x)."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))


def _in_data(body: Callable[[Tensor], None]) -> Program:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            body(x)

    return program


def _score(model: Program, guide: Program, *data: Tensor, **options: Any) -> pv.Evidence:
    given = data if len(data) > 1 else data[0]
    return pv.log_marginal(model, guide, given, **{"num_samples": 400, "seed": 0} | options)


def _assert_refused(model: Program, guide: Program, match: str, *data: Tensor, proposals: tuple = ("guide", "mixture")) -> None:
    for proposal in proposals:
        with pytest.raises(ValueError, match=match) as caught:
            _score(model, guide, *(data or (_x(),)), proposal=proposal)
        assert "\n" not in str(caught.value)


# -- no density ------------------------------------------------------------------------------------------------------------


def _one_delta_beside_a_normal() -> tuple[Program, Program]:
    def two(x: Tensor) -> None:
        a, b = pyro.sample("a", dist.Normal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def mixed(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(x / 3, 0.8))
        pyro.sample("b", dist.Delta(a / 2 + 0.1 * x))

    return _in_data(two), _in_data(mixed)


def _delta_in_an_event() -> tuple[Program, Program]:
    def vector(x: Tensor) -> None:
        z = pyro.sample("z", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def point(x: Tensor) -> None:
        pyro.sample("z", dist.Delta(torch.full((len(x), 3), 1 / 3), event_dim=1))

    return _in_data(vector), _in_data(point)


def _delta_beside_a_fed_one() -> tuple[Program, Program]:
    def two(x: Tensor) -> None:
        a, b = pyro.sample("a", dist.LogNormal(0.0, 1.0)), pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def fed(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(0.1 * x, 0.5), infer={"is_auxiliary": True})
        pyro.sample("a", dist.Delta(u.exp(), log_density=-u))
        pyro.sample("b", dist.Delta(u))  # moves with u, but two numbers have no density that one number feeds

    return _in_data(two), _in_data(fed)


def _one_number_for_two() -> tuple[Program, Program]:
    def two(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def fed(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(x / 3, 0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(torch.stack([u, u], -1), event_dim=1))  # on a line, which has no area

    return _in_data(two), _in_data(fed)


def _auxiliary_without_a_place() -> tuple[Program, Program]:
    def mixture(x: Tensor) -> None:
        side = pyro.sample("side", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(side - 0.5 + x / 2, 0.7))

    return model, _in_data(mixture)


def _auxiliary_that_feeds_nothing() -> tuple[Program, Program]:
    def idle(x: Tensor) -> None:
        pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(x / 2))

    return model, _in_data(idle)


@pytest.mark.parametrize(
    "pair",
    [
        (model, _in_data(lambda x: pyro.sample("z", dist.Delta(x / 2)))),
        _delta_in_an_event(),
        _delta_beside_a_fed_one(),
        _one_number_for_two(),
        _auxiliary_without_a_place(),
        _auxiliary_that_feeds_nothing(),
    ],
    ids=["delta", "event", "fed once", "one for two", "auxiliary", "idle"],
)
def test_a_guide_without_a_density_does_not_weigh(pair: tuple[Program, Program]) -> None:
    _assert_refused(*pair, r"no density q\(z\|x\).*MAP.*pyrovae\.exact")
    with pytest.raises(ValueError, match="no density"):
        pv.log_weights(*pair, _x(), num_particles=1)


def test_one_delta_beside_a_normal_does_not_weigh() -> None:
    """It moves with the Normal, so two runs differ; yet no auxiliary site pays for its density."""
    _assert_refused(*_one_delta_beside_a_normal(), r"no density.*'b' is a Delta")


def test_an_auto_delta_trains_to_a_point_and_does_not_weigh() -> None:
    point = autoguide.AutoDelta(model)
    pv.fit(model, point, _x(), epochs=300, batch_size=B, shuffle=False, lr=0.05, progress=False)
    assert_allclose(point(_x())["z"].detach(), _x() / 2, atol=1e-3)  # the mode of each posterior
    with pytest.raises(ValueError, match="no density"):
        pv.log_weights(model, point, _x(), num_particles=2)
    with pytest.raises(ValueError, match="no density"):
        pv.compare_estimators(model, point, _x(), ["elbo", "stl"], num_draws=10)
    assert_allclose(pv.exact(model, _drawn(lambda x: dist.Delta(x / 2)), _x()).log_px, _exact(_x()), atol=1e-9)


def test_a_delta_that_an_auxiliary_site_feeds_is_a_guide() -> None:
    def positive(x: Tensor) -> None:
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 1.0), obs=x)

    def fed(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(x / 2, 0.5**0.5), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(u.exp(), log_density=-u))

    pair = _in_data(positive), _in_data(fed)
    assert_allclose(_score(*pair, _x()).log_px, _exact(_x()), atol=1e-9)
    analytic = make_estimator({"kind": "elbo", "kl": "analytic"}).bound(*pair, _x())
    assert_allclose(analytic, _exact(_x()), atol=1e-9)  # Pyro's KL of a Delta forgets its log_density


def test_a_simplex_is_fed_by_one_number_less() -> None:
    def simplex(x: Tensor) -> None:
        z = pyro.sample("z", dist.Dirichlet(torch.tensor([1.0, 1.0, 1.0])))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def fed(x: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(torch.zeros(2), 2.0).to_event(1), infer={"is_auxiliary": True})
        transform = biject_to(torch.distributions.constraints.simplex)
        z = transform(u)
        pyro.sample("z", dist.Delta(z, log_density=-transform.log_abs_det_jacobian(u, z), event_dim=1))

    found = pv.log_weights(_in_data(simplex), _in_data(fed), _x(), num_particles=20_000).log_weights.detach()
    grid = np.linspace(0, 1, 2001)
    exact = [np.log(np.trapezoid(2 * (1 - grid) * stats.norm(grid, 1).pdf(x), grid)) for x in _x().numpy()]
    assert_allclose(torch.logsumexp(found, 0) - math.log(20_000), exact, atol=0.05)


@pytest.mark.parametrize(
    ("support", "shape", "number"),
    [
        (constraints.real, (3,), 3),
        (constraints.unit_interval, (2, 3), 6),
        (constraints.independent(constraints.positive, 1), (2, 3), 6),
        (constraints.simplex, (4,), 3),
        (constraints.simplex, (5, 4), 15),
        (constraints.corr_cholesky, (3, 3), 3),
        (dist.constraints.sphere, (3,), 2),
        (dist.constraints.sphere, (5, 3), 10),
        (constraints.multinomial, (4,), None),
    ],
)
def test_the_dimension_of_a_support(support: Any, shape: tuple[int, ...], number: int | None) -> None:
    assert free_numbers(support, torch.Size(shape)) == number


def test_a_point_in_both_programs_is_a_deterministic_place() -> None:
    def doubled(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Delta(2 * z))
        pyro.sample("x", dist.Normal(y / 2, 1.0), obs=x)

    def follows(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        pyro.sample("y", dist.Delta(2 * z))

    assert_allclose(_score(_in_data(doubled), _in_data(follows), _x()).log_px, _exact(_x()), atol=1e-9)


# -- not a latent ----------------------------------------------------------------------------------------------------------


def _observing(*, aux: bool = False, factor: bool = False, both: bool = False) -> Program:
    def body(x: Tensor) -> None:
        if aux or both:
            pyro.sample("aux", dist.Bernoulli(0.2), obs=torch.ones(len(x)))
        z = pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        if factor or both:
            pyro.factor("loss", 1.0 + z.square(), has_rsample=True)

    return _in_data(body)


def test_a_factor_of_no_datum_is_refused() -> None:
    def regular(x: Tensor) -> None:
        pyro.factor("penalty", torch.tensor(0.3), has_rsample=False)
        guide(x)

    _assert_refused(model, regular, "Site 'penalty' lies outside the data plate 'data', so it belongs to no datum")

    def outside(x: Tensor) -> None:
        pyro.sample("aux", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3))
        guide(x)

    assert_allclose(_score(model, outside, _x()).log_px, _exact(_x()), atol=1e-9)


@pytest.mark.parametrize("what", ["aux", "factor", "both"])
@pytest.mark.parametrize("proposal", ["guide", "mixture", "refined"])
def test_what_the_guide_observes_is_no_part_of_q(what: str, proposal: Any) -> None:
    evidence = _score(model, _observing(**{what: True}), _x(), proposal=proposal)
    assert (np.abs(evidence.log_px - _exact(_x())) <= 5 * evidence.se + 1e-9).all()
    if proposal == "guide":
        assert_allclose(evidence.log_px, _exact(_x()), atol=1e-9)
        assert_allclose(evidence.elbo, _exact(_x()), atol=1e-9)


def test_a_causal_guide_that_observes_the_treatment_is_right() -> None:
    """As in a CEVAE: the guide observes t and y to train what predicts them, and the model observes them too."""

    def causal(x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("t", dist.Bernoulli(logits=torch.zeros(len(x))), obs=t)
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    def predicts(x: Tensor, t: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("t", dist.Bernoulli(logits=2 * x), obs=t, infer={"is_auxiliary": True})
            pyro.sample("y", dist.Normal(x, 2.0), obs=y, infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    t, y = (_x() > 0).double(), _x() ** 2
    exact = _exact(_x()) + math.log(0.5) + stats.norm(t, 1).logpdf(y)
    assert_allclose(_score(causal, predicts, _x(), t, y).log_px, exact, atol=1e-9)
    alone = _in_data(lambda x: pyro.sample("z", dist.Normal(0.0, 1.0), obs=x))
    _assert_refused(model, alone, "guide observes site 'z', which the model samples")


@pytest.mark.parametrize("kind", ["elbo", "iwae", "stl", "dreg", "gdreg"])
def test_a_factor_of_the_guide_is_a_term_of_the_loss_as_in_pyro(kind: str) -> None:
    """The gradient of minus its mean is added; the reported bound is that of the pair without it."""
    slope = torch.tensor(0.4, requires_grad=True)

    def pair(weight: float) -> Program:
        def body(x: Tensor) -> None:
            z = pyro.sample("z", dist.Normal(slope * x, 0.6))
            if weight:
                pyro.factor("loss", weight * (z - slope) ** 2, has_rsample=True)

        return _in_data(body)

    def loss_and_gradient(guide: Program, estimator: Any) -> tuple[float, float]:
        pyro.set_rng_seed(3)
        loss = estimator.differentiable_loss(model, guide, _x())
        return loss.item(), torch.autograd.grad(loss, slope)[0].item()

    ours = make_estimator({"kind": kind} if kind in ("elbo", "stl") else {"kind": kind, "num_particles": 1})
    ours.bound(model, guide, _x())
    with_term, without = loss_and_gradient(pair(0.7), ours), loss_and_gradient(pair(0.0), ours)
    assert with_term[0] == pytest.approx(without[0])
    theirs = [loss_and_gradient(pair(weight), pyro.infer.Trace_ELBO()) for weight in (0.7, 0.0)]
    assert with_term[1] - without[1] == pytest.approx(theirs[0][1] - theirs[1][1])
    assert abs(with_term[1] - without[1]) > 0.1


@pytest.mark.parametrize("kind", ["vimco", "rws", "score_elbo"])
def test_a_factor_of_the_guide_has_no_score(kind: str) -> None:
    with pytest.raises(ValueError, match=r"does not see how the guide's pyro\.factor depends.*'elbo' or 'iwae'"):
        make_estimator({"kind": kind, "num_particles": 3}).loss_and_grads(model, _observing(factor=True), _x())


def test_a_sleeping_guide_does_not_learn_what_it_observes() -> None:
    pyro.set_rng_seed(0)
    plain = simulated_log_guide(model, guide, _x())
    pyro.set_rng_seed(0)
    assert_allclose(simulated_log_guide(model, _observing(both=True), _x()), plain)


@pytest.mark.parametrize("make", [AutoNormalMessenger, AutoHierarchicalNormalMessenger])
def test_effect_guides_are_guides(make: Any) -> None:
    """They run the model, so their trace holds its observed sites and factors; Pyro's ELBO subtracts these."""

    def tilted(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("tilt", -0.5 * z.square())
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    exact = stats.norm(0, 1.5**0.5).logpdf(_x().numpy()) - 0.5 * math.log(2)
    pair = _in_data(tilted), make(_in_data(tilted))
    history = pv.fit(*pair, _x(), epochs=600, batch_size=B, shuffle=False, lr=0.03, progress=False, seed=0)
    assert np.mean(history.bound[-100:]) == pytest.approx(exact.mean(), abs=0.03)
    weights = pv.log_weights(*pair, _x(), num_particles=2000).log_weights.detach()
    assert_allclose(torch.logsumexp(weights, 0) - math.log(2000), exact, atol=0.02)


# -- mass and density ------------------------------------------------------------------------------------------------------


def _one_hot(prior: Any, shape: int = 3) -> Program:
    def body(x: Tensor) -> None:
        y = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(y @ torch.arange(1.0 * shape), 1.0), obs=x)

    return _in_data(body)


def _number(prior: Callable[[], Any]) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", prior())
        pyro.sample("x", dist.Normal(0.1 * z, 1.0), obs=x)

    return _in_data(body)


def _drawn(distribution: Callable[[Tensor], Any]) -> Program:
    return _in_data(lambda x: pyro.sample("z", distribution(x)))


_half, _ones, _two = torch.tensor(0.5), torch.ones(3), torch.tensor([1.0, 2.0])


@pytest.mark.parametrize(
    ("program", "distribution", "match"),
    [
        (
            _one_hot(lambda: dist.OneHotCategorical(torch.ones(3))),
            lambda x: dist.RelaxedOneHotCategoricalStraightThrough(_half, torch.ones(3)),
            r"a probability mass in the model \(OneHotCategorical\) and a density over 2 free number",
        ),
        (
            _one_hot(lambda: dist.OneHotCategorical(torch.ones(3))),
            lambda x: dist.RelaxedOneHotCategorical(_half, torch.ones(len(x), 3)),
            "their ratio is not a weight: sample it in the guide from .* such as OneHotCategorical",
        ),
        (
            _one_hot(lambda: dist.RelaxedOneHotCategorical(_half, torch.ones(3))),
            lambda x: dist.OneHotCategorical(torch.ones(3)),
            "density over 2 free number.*in the model.*probability mass in the guide",
        ),
        (_number(lambda: dist.Bernoulli(0.5)), lambda x: dist.Normal(0.0, 1.0), "probability mass in the model"),
        (
            _number(lambda: dist.Bernoulli(0.5)),
            lambda x: dist.RelaxedBernoulliStraightThrough(_half, _half),
            "probability mass",
        ),
        (_number(lambda: dist.Poisson(2.0)), lambda x: dist.Normal(2.0, 1.0), "probability mass in the model .Poisson"),
        (_number(lambda: dist.Normal(0.0, 1.0)), lambda x: dist.Poisson(2.0), "probability mass in the guide .Poisson"),
        (
            _number(lambda: dist.Delta(torch.tensor(1.0))),
            lambda x: dist.Normal(1.0, 1.0),
            r"point mass \(Delta\) in",
        ),
        (
            _one_hot(lambda: dist.Dirichlet(torch.ones(3))),
            lambda x: dist.Normal(torch.zeros(3), 1.0).to_event(1),
            r"density over 2 free number.*density over 3 free number",
        ),
        (
            _number(lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Poisson(torch.tensor([1.0, 5.0])))),
            lambda x: dist.Gamma(2.0, 1.0),
            "probability mass in the model",
        ),
    ],
)
def test_a_density_never_divides_a_mass(program: Program, distribution: Any, match: str) -> None:
    _assert_refused(program, _drawn(distribution), match)
    with pytest.raises(ValueError, match=match):
        pv.fit(program, _drawn(distribution), _x(), epochs=1, progress=False)


@pytest.mark.parametrize(
    ("program", "distribution"),
    [
        (
            _one_hot(lambda: dist.OneHotCategorical(torch.ones(3))),
            lambda x: dist.OneHotCategoricalStraightThrough(torch.ones(3)),
        ),
        (_number(lambda: dist.Poisson(2.0)), lambda x: dist.NegativeBinomial(3.0, torch.tensor(0.4))),
        (_number(lambda: dist.Gamma(2.0, 1.0)), lambda x: dist.LogNormal(0.3, 0.8)),
        (_number(lambda: dist.Beta(2.0, 1.0)), lambda x: dist.Uniform(0.0, 1.0)),
        (_number(lambda: dist.HalfNormal(1.0)), lambda x: dist.Exponential(1.0)),
        (
            _one_hot(lambda: dist.Normal(_ones, 1).to_event(1)),
            lambda x: dist.Uniform(x[:, None] - _ones, x[:, None] + 9).to_event(1),
        ),
        (
            _number(lambda: dist.MixtureSameFamily(dist.Categorical(_ones), dist.Uniform(torch.arange(3.0), 4.0))),
            lambda x: dist.Uniform(0.0, 4.0),
        ),
        (_one_hot(lambda: dist.Dirichlet(torch.ones(3))), lambda x: dist.Dirichlet(torch.ones(3) * 2)),
        (
            _one_hot(lambda: dist.MultivariateNormal(torch.zeros(3), torch.eye(3))),
            lambda x: dist.Normal(torch.zeros(3), 1).to_event(1),
        ),
        (
            _number(lambda: dist.MixtureSameFamily(dist.Categorical(_ones), dist.Normal(torch.arange(3.0), 1.0))),
            lambda x: dist.Normal(0.0, 1.5),
        ),
    ],
)
def test_measures_of_one_kind_are_fine(program: Program, distribution: Any) -> None:
    assert np.isfinite(_score(program, _drawn(distribution), _x()).log_px).all()


# -- draws outside the prior's support -------------------------------------------------------------------------------------


def _positive(prior: Callable[[], Any]) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", prior())
        pyro.sample(
            "x", dist.Normal(z.sqrt(), 1.0), obs=x
        )  # no number, and refused by the distribution itself, where z is negative

    return _in_data(body)


@pytest.mark.parametrize(
    ("prior", "distribution", "density"),
    [
        (lambda: dist.Gamma(2.0, 1.0), lambda x: dist.Normal(1.5, 1.5), stats.gamma(2.0).pdf),
        (lambda: dist.HalfNormal(2.0), lambda x: dist.Laplace(1.0, 1.5), stats.halfnorm(scale=2.0).pdf),
        (lambda: dist.Beta(2.0, 2.0), lambda x: dist.Uniform(-0.5, 1.5), stats.beta(2.0, 2.0).pdf),
        (
            lambda: dist.Uniform(0.0, torch.tensor(3.0)),
            lambda x: dist.Uniform(torch.tensor(-1.0), 4.0),
            stats.uniform(0, 3).pdf,
        ),
        (lambda: dist.Exponential(1.0), lambda x: dist.Normal(0.5, 2.0), stats.expon.pdf),
        (
            lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Uniform(0 * _two, _two)),
            lambda x: dist.Uniform(-1.0, 3.0),
            lambda z: np.where(z < 1, 0.75, np.where(z < 2, 0.25, 0.0)),
        ),
    ],
)
def test_a_draw_outside_the_prior_weighs_nothing(prior: Any, distribution: Any, density: Any) -> None:
    program, x = _positive(prior), torch.tensor([0.3, 1.1, 2.0])
    grid = np.linspace(0, 40, 400_001)
    exact = [np.log(np.trapezoid(density(grid) * stats.norm(grid**0.5, 1).pdf(value), grid)) for value in x.numpy()]
    pyro.set_rng_seed(0)
    weights = pv.log_weights(program, _drawn(distribution), x, num_particles=40_000).log_weights  # validation is on
    assert (weights == -torch.inf).any()
    assert not weights.isnan().any()
    assert_allclose(torch.logsumexp(weights, 0) - math.log(40_000), exact, atol=0.03)
    evidence = _score(program, _drawn(distribution), x, num_samples=20_000)
    assert_allclose(evidence.log_px, exact, atol=0.04)


def test_more_values_than_the_prior_has_weigh_nothing() -> None:
    chance, levels = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.0, 2.0])

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Categorical(chance))
        pyro.sample("x", dist.Normal(levels[z], 1.0), obs=x)

    wide = _drawn(lambda x: dist.Categorical(torch.ones(5)))
    exact = np.log(stats.norm(levels, 1).pdf(_x()[:, None]) @ chance.numpy())
    assert_allclose(_score(_in_data(body), wide, _x(), num_samples=20_000).log_px, exact, atol=0.05)


def test_a_draw_outside_the_prior_leaves_the_gradients_finite() -> None:
    loc = torch.tensor(0.2, requires_grad=True)
    loss = make_estimator({"kind": "iwae", "num_particles": 50}).differentiable_loss(
        _positive(lambda: dist.Gamma(2.0, 1.0)), _drawn(lambda x: dist.Normal(loc, 1.0)), _x()
    )
    (gradient,) = torch.autograd.grad(loss, loc)
    assert gradient.isfinite()
    assert gradient != 0


# -- masks -----------------------------------------------------------------------------------------------------------------


def _mask_around(where: Callable[[Tensor], Any]) -> Program:
    def body(x: Tensor) -> None:
        with poutine.mask(mask=where(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return _in_data(body)


def _mask_inside(where: Callable[[Tensor], Any]) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).mask(where(x)[:, None]).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    return _in_data(body)


@pytest.mark.parametrize(
    ("program", "distribution"),
    [
        (_mask_around(lambda x: x > 0), lambda x: dist.Normal(x / 2, 0.7)),
        (_mask_around(lambda x: False), lambda x: dist.Normal(x / 2, 0.7)),
        (model, lambda x: dist.Normal(x / 2, 0.7).mask(x > 0)),
        (_mask_inside(lambda x: x > 0), lambda x: dist.Normal(x[:, None] / 2, 0.7).to_event(1)),
        (_mask_inside(lambda x: x > 0), lambda x: dist.Normal(x[:, None] / 2, 0.7).mask(x[:, None] > -3).to_event(1)),
    ],
)
def test_masks_of_a_latent_agree_in_both_programs(program: Program, distribution: Any) -> None:
    match = "latent site 'z' is masked otherwise in the model than in the guide"
    _assert_refused(program, _drawn(distribution), match, proposals=("guide", "mixture", "prior", "refined"))
    for scored in (pv.exact, pv.ais):
        with pytest.raises(ValueError, match=match):
            scored(program, _drawn(distribution), _x())
    with pytest.raises(ValueError, match=match):
        pv.fit(program, _drawn(distribution), _x(), epochs=1, progress=False)


def _steps(inner: bool) -> tuple[Program, Program]:
    """Sequences of two steps, of which some data have one: the mask inside the distribution, as in Pyro's dmm.py, or around."""

    def place(distribution: Any, mask: Tensor) -> Any:
        return distribution.mask(mask[:, None]).to_event(1) if inner else distribution.to_event(1)

    def around(mask: Tensor) -> Any:
        return poutine.mask(mask=mask) if not inner else poutine.mask(mask=True)

    def chain(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = torch.zeros(len(x), 1)
            for t in (0, 1):
                with around(t < length):
                    z = pyro.sample(f"z{t}", place(dist.Normal(z, torch.ones(len(x), 1)), t < length))
                    pyro.sample(f"x{t}", place(dist.Normal(z, 1.0), t < length), obs=x[:, t, None])

    def steps(x: Tensor, length: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for t in (0, 1):
                with around(t < length):
                    pyro.sample(f"z{t}", place(dist.Normal(x[:, t, None] / 2, torch.ones(len(x), 1)), t < length))

    return chain, steps


@pytest.mark.parametrize("inner", [True, False])
def test_masked_steps_of_a_sequence_are_left_out_wherever_the_mask_stands(inner: bool) -> None:
    x, length = torch.randn(12, 2, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2 + 1
    pair = _steps(inner)
    covariance = np.array([[2.0, 1.0], [1.0, 3.0]])
    exact = np.where(
        length == 2, stats.multivariate_normal(np.zeros(2), covariance).logpdf(x), stats.norm(0, 2**0.5).logpdf(x[:, 0])
    )
    for proposal in ("guide", "mixture"):
        evidence = _score(*pair, x, length, num_samples=20_000, proposal=proposal)
        assert (np.abs(evidence.log_px - exact) < 5 * evidence.se + 1e-6).all(), proposal
        assert evidence.num_dims == pytest.approx(1.5)
    match = r"latent site 'z1' is masked, so its density does not integrate"
    for score in (pv.exact, pv.ais, lambda *given: _score(*given[:2], *given[2], proposal="refined")):
        with pytest.raises(ValueError, match=match):
            score(*pair, (x, length))
    whole = torch.full_like(length, 2)  # nothing is masked, whatever the type of the mask
    exact = stats.multivariate_normal(np.zeros(2), covariance).logpdf(x)
    assert_allclose(pv.exact(*pair, (x, whole)).log_px, exact, atol=1e-6)
    for kind in ("dreg", "vimco", "rws"):
        with pytest.raises(ValueError, match="that of 'z0', 'z1' is masked for some data"):
            make_estimator({"kind": kind, "num_particles": 4}).loss_and_grads(*pair, x, length)


def test_masked_latents_that_the_model_uses_have_no_evidence() -> None:
    def drawn(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x / 2, 0.7).mask(x > 0))

    def program(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(x > 0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    _assert_refused(_in_data(program), _in_data(drawn), "'z' is masked where the model's other sites depend on it")


def test_masked_switches_cannot_be_summed() -> None:
    def switched(x: Tensor) -> None:
        s = pyro.sample("s", dist.Bernoulli(0.3).mask(x > 0))
        pyro.sample("x", dist.Normal(s * (x > 0), 1.0), obs=x)

    with pytest.raises(ValueError, match="latent site 's' is masked"):
        pv.exact(_in_data(switched), _in_data(lambda x: pyro.sample("s", dist.Bernoulli(0.5).mask(x > 0))), _x())


def test_attend_infer_repeat_masks_by_a_latent() -> None:
    """An object that is absent has a place that is masked in both programs, and reaches nothing."""

    def scene(x: Tensor) -> None:
        here = pyro.sample("here", dist.Bernoulli(0.4))
        where = pyro.sample("where", dist.Normal(torch.zeros(1), 1.0).mask(here[..., None] > 0).to_event(1))
        pyro.sample("x", dist.Normal(here * where[..., 0], 1.0), obs=x)

    def finds(x: Tensor) -> None:
        here = pyro.sample("here", dist.Bernoulli(torch.full((len(x),), 0.5)))
        pyro.sample("where", dist.Normal(x[:, None] / 2, 0.8).mask(here[..., None] > 0).to_event(1))

    exact = np.log(0.4 * stats.norm(0, 2**0.5).pdf(_x()) + 0.6 * stats.norm(0, 1).pdf(_x()))
    assert_allclose(_score(_in_data(scene), _in_data(finds), _x(), num_samples=20_000).log_px, exact, atol=0.03)


# -- shapes ----------------------------------------------------------------------------------------------------------------


def _wide(number: int) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(number), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    return _in_data(body)


def _items(inside: bool) -> Program:
    def program(x: Tensor) -> None:
        items = pyro.plate("items", 3, dim=-1)
        with pyro.plate("data", len(x), dim=-2):
            if inside:
                with items:
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
            else:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with items:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, None].expand(len(x), 3))

    return program


@pytest.mark.parametrize(
    ("program", "drawn"),
    [
        (_wide(5), _drawn(lambda x: dist.Normal(x[:, None] / 5, 1.0).to_event(1))),
        (_wide(1), _drawn(lambda x: dist.Normal(torch.zeros(5), 1.0).to_event(1))),
        (model, _drawn(lambda x: dist.Normal(x[:1, None], 1.0).to_event(1))),
        (_items(True), lambda x: _plain_rows(x)),
    ],
)
def test_shapes_of_a_latent_agree_in_both_programs(program: Program, drawn: Program) -> None:
    _assert_refused(program, drawn, r"latent site 'z' has .* in the model and .* in the guide, so one would be broadcast")


def _plain_rows(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(x[:, None] / 2, 1.0))


def _observes(distribution: Callable[[Tensor], Any], value: Callable[[Tensor], Tensor]) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", distribution(z), obs=value(x))

    return _in_data(body)


@pytest.mark.parametrize(
    ("distribution", "value", "match"),
    [
        (lambda z: dist.Normal(z[..., None], torch.ones(5)).to_event(1), lambda x: x[:, None], r"events of shape \(5,\)"),
        (
            lambda z: dist.Bernoulli(logits=z[..., None, None].expand(*z.shape, 4, 3)).to_event(2),
            lambda x: torch.ones(len(x), 1, 3),
            r"events of shape \(4, 3\)",
        ),
        (lambda z: dist.Normal(z, 1.0), lambda x: x[:1], "a plate of size 20 at dimension -1"),
        (lambda z: dist.Normal(z[..., None], torch.ones(2)).to_event(1), lambda x: torch.ones(1, 2), "plate of size 20"),
    ],
)
def test_an_observed_value_is_not_broadcast(distribution: Any, value: Any, match: str) -> None:
    _assert_refused(
        _observes(distribution, value), guide, rf"value observed at site 'x' has shape .*{match}", proposals=("guide", "prior")
    )


@pytest.mark.parametrize("wide", [True, False], ids=["one parameter for all numbers", "expanded"])
def test_a_distribution_may_be_broadcast_to_what_is_observed(wide: bool) -> None:
    """x_d ~ Bernoulli(z) for d = 1, ..., 5, with z ~ Beta(2, 1): log B(2 + s, 1 + 5 - s) / B(2, 1)."""

    def program(x: Tensor) -> None:
        z = pyro.sample("z", dist.Beta(torch.tensor(2.0), 1.0))[..., None]
        pyro.sample("x", dist.Bernoulli(z if wide else z.expand(*z.shape[:-1], 5)).to_event(1), obs=x)

    def posterior(x: Tensor) -> None:
        pyro.sample("z", dist.Beta(2 + x.sum(-1), 6 - x.sum(-1)))

    x = torch.tensor([[1.0, 1, 1, 1, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    found = _score(_in_data(program), _in_data(posterior), x)
    ones = x.sum(-1).numpy()
    assert_allclose(found.log_px, betaln(2 + ones, 6 - ones) - betaln(2, 1), atol=1e-5)
    assert found.num_dims == 5
    assert found.measure == pv.evidence.measure.Measure(0, 5)


@pytest.mark.usefixtures("float64")
def test_a_delta_of_the_model_is_a_function_of_its_other_latents() -> None:
    """z ~ N(0, 1), y = 2 z as a Delta in both programs, x ~ N(y, 1), so that x ~ N(0, sqrt 5)."""

    def program(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(pyro.sample("y", dist.Delta(2 * z)), 1.0), obs=x)

    def posterior(x: Tensor) -> None:
        pyro.sample("y", dist.Delta(2 * pyro.sample("z", dist.Normal(0.4 * x, 0.5))))

    model, guide, x = _in_data(program), _in_data(posterior), torch.tensor([0.0, 1.0, 3.0])
    truth = stats.norm(0, math.sqrt(5)).logpdf(x)
    assert_allclose(pv.exact(model, guide, x).log_px, truth, atol=1e-5)
    for proposal in ("mixture", "refined", "auto"):
        found = _score(model, guide, x, proposal=proposal, num_samples=400)
        assert found.reliable.all()
        assert_allclose(found.log_px, truth, atol=0.1)
    annealed = pv.ais(model, guide, x, start="guide", num_temperatures=10, num_chains=32, seed=0)
    assert (np.abs(annealed.log_px - truth) < 5 * annealed.se + 0.01).all()

    def nothing_else(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("y", dist.Delta(torch.zeros(()))), 1.0), obs=x)

    with pytest.raises(ValueError, match="All latents of the model are Deltas"):
        pv.exact(_in_data(nothing_else), _in_data(lambda x: pyro.sample("y", dist.Delta(0 * x))), x)


def test_values_outside_a_support_that_depends_on_a_latent_are_the_same_data_each_time() -> None:
    """z ~ U(0, 4), x ~ U(z - 1, z + 1): what is observed does not depend on the draw at which it was looked at."""

    def program(x: Tensor) -> None:
        z = pyro.sample("z", dist.Uniform(torch.zeros(()), 4.0))
        pyro.sample("x", dist.Uniform(z - 1, z + 1, validate_args=False), obs=x)

    def anywhere(x: Tensor) -> None:
        pyro.sample("z", dist.Uniform(0 * x, 4.0))

    x = torch.tensor([0.2, 1.0, 3.5])
    found = {str(seed): pv.log_marginal(_in_data(program), _in_data(anywhere), x, num_samples=99, seed=seed) for seed in (0, 1)}
    found["exact"] = pv.exact(_in_data(program), _in_data(anywhere), x)
    assert_allclose(found["exact"].log_px, np.log((np.minimum(4, x.numpy() + 1) - np.maximum(0, x.numpy() - 1)) / 8), atol=1e-5)
    assert_allclose(found["0"].squares, x.square())
    assert len(pv.compare(found).names) == 3


def test_a_constant_that_every_datum_observes_is_fine() -> None:
    """A number without dimensions, as in a soft constraint."""

    def program(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        pyro.sample("c", dist.Normal(0.0, 1.0), obs=torch.tensor(0.5))

    found = _score(_in_data(program), guide, _x()).log_px
    assert_allclose(found, _exact(_x()) + stats.norm.logpdf(0.5), atol=1e-9)


# -- autoguides ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
        "AutoIAFNormal",
        "AutoLaplaceApproximation",
        "AutoStructured",
        "AutoGaussian",
    ],
)
def test_an_autoguide_of_one_vector_for_all_data_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"auxiliary site .* lies outside the data plate.*use .*autoguide\.AutoNormal"):
        pv.fit(model, getattr(autoguide, name)(model), _x(), epochs=1, batch_size=B, shuffle=False, progress=False)


def test_auto_normal_has_a_factor_for_each_datum() -> None:
    normal = autoguide.AutoNormal(model, init_scale=0.7)
    history = pv.fit(model, normal, _x(), epochs=400, batch_size=B, shuffle=False, lr=0.03, progress=False, seed=0)
    assert np.mean(history.bound[-50:]) == pytest.approx(_exact(_x()).mean(), abs=0.02)
    weights = pv.log_weights(model, normal, _x(), num_particles=2000).log_weights.detach()
    ratio = (weights - torch.as_tensor(_exact(_x()))).exp()
    assert ((ratio.mean(0) - 1).abs() < 5 * ratio.std(0) / 2000**0.5).all()


# -- rejection samplers ----------------------------------------------------------------------------------------------------


def test_a_rejection_sampler_is_not_a_path() -> None:
    """Its gradient has a score part that the path leaves out."""

    def positive(x: Tensor) -> None:
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    shape = torch.tensor(1.5, requires_grad=True)

    def rejects(x: Tensor) -> None:
        pyro.sample("z", ShapeAugmentedGamma(shape.expand(len(x)), torch.ones(len(x))))

    class Accepting(dist.Rejector):
        """Exponential proposals, all of which are accepted."""

        def __init__(self, rate: Tensor) -> None:
            self.rate = rate
            super().__init__(dist.Exponential(rate), lambda z: torch.zeros_like(z), torch.zeros(rate.shape))

        support = torch.distributions.constraints.positive

    pairs = [
        (_in_data(positive), _in_data(rejects)),
        (_in_data(positive), _in_data(lambda x: pyro.sample("z", Accepting(torch.ones(len(x)))))),
    ]
    for pair in pairs:
        info = inspect_pair(*pair, _x())
        assert info.not_reparameterized == ("z",)
        for kind in ("elbo", "iwae", "dreg", "stl"):
            with pytest.raises(ValueError, match=r"no gradient \(or a part of it only\) flows through 'z'"):
                make_estimator(kind).loss_and_grads(*pair, _x())
    make_estimator("trace_elbo").loss_and_grads(*pairs[0], _x())  # Pyro's own adds the score
    assert np.isfinite(_score(*pairs[1], _x()).log_px).all()


# -- published programs ----------------------------------------------------------------------------------------------------


def _unsized(model_body: Callable[..., None], guide_body: Callable[..., None]) -> tuple[Program, Program]:
    def wrap(body: Callable[..., None]) -> Program:
        def program(*args: Tensor) -> None:
            with pyro.plate("data"):
                body(*args)

        return program

    return wrap(model_body), wrap(guide_body)


def _label_pair() -> tuple[Program, Program]:
    """As ss_vae_M2: a style, a label and an image, all of them batched by the data."""

    def body(x: Tensor, y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), torch.ones(len(x), 2)).to_event(1))
        y = pyro.sample("y", dist.OneHotCategorical(torch.ones(len(x), 3) / 3), obs=y)
        mean = z.sum(-1) + y @ torch.tensor([0.0, 1.0, 2.0])
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def drawn(x: Tensor, y: Tensor) -> None:
        pyro.sample("z", dist.Normal((x - y @ torch.tensor([0.0, 1.0, 2.0]))[:, None].expand(-1, 2) / 3, 1.0).to_event(1))

    return _unsized(body, drawn)


@pytest.mark.parametrize("proposal", ["guide", "mixture", "prior", "refined"])
def test_a_plate_without_a_size_takes_it_from_batched_sites(proposal: Any) -> None:
    y = torch.eye(3)[torch.arange(B) % 3]
    exact = stats.norm(y @ torch.tensor([0.0, 1.0, 2.0]), 3**0.5).logpdf(_x()) - math.log(3)
    evidence = _score(*_label_pair(), _x(), y, num_samples=20_000, proposal=proposal)
    assert (np.abs(evidence.log_px - exact) < 5 * evidence.se + 1e-6).all()


def test_a_conditional_vae_as_published_trains_and_is_exact() -> None:
    """The prior depends on the input, and the plate has no size."""
    prior, recognise = nn.Linear(1, 2), nn.Linear(2, 2)

    def body(x: Tensor, y: Tensor) -> None:
        pyro.module("prior", prior)
        loc, log_scale = prior(x[:, None]).chunk(2, -1)
        z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)

    def drawn(x: Tensor, y: Tensor) -> None:
        pyro.module("recognise", recognise)
        loc, log_scale = recognise(torch.stack([x, y], -1)).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    pair, y = _unsized(body, drawn), 0.5 * _x() + 1
    for estimator in ("elbo", "iwae"):
        history = pv.fit(*pair, (_x(), y), estimator=estimator, epochs=20, batch_size=5, lr=0.02, progress=False, seed=0)
        assert history.bound[-1] > history.bound[0]
    with torch.no_grad():
        loc, log_scale = prior(_x()[:, None]).chunk(2, -1)
    exact = stats.norm(loc[:, 0], (1 + log_scale[:, 0].exp() ** 2).sqrt()).logpdf(y)
    assert_allclose(pv.exact(*pair, (_x(), y)).log_px, exact, atol=1e-9)


def test_a_plate_without_a_size_does_not_share_a_draw() -> None:
    def shared(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, torch.ones(len(x))), obs=x)

    def one(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x.mean(), 1.0))

    def each(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x / 2, 1.0))

    for drawn in (one, each):
        _assert_refused(*_unsized(shared, drawn), r"no size, so all data would share one draw.*x\.shape\[0\]")


def _scaled(program: Program, scale: Any) -> Program:
    def run(*args: Tensor) -> None:
        with poutine.scale(scale=scale):
            program(*args)

    return run


@pytest.mark.parametrize("scale", [0.01, 3.0, torch.tensor(0.5)])
def test_one_scale_around_everything_scales_the_objective_only(scale: Any) -> None:
    pair = _scaled(model, scale), _scaled(guide, scale)
    for proposal in ("guide", "mixture", "refined"):
        evidence = _score(*pair, _x(), proposal=proposal)
        assert (np.abs(evidence.log_px - _exact(_x())) < 5 * evidence.se + 1e-9).all()
    assert_allclose(pv.exact(*pair, _x()).log_px, _exact(_x()), atol=1e-9)
    for kind in ("elbo", "iwae", "trace_elbo"):
        loss = make_estimator(kind).loss(*pair, _x())
        assert loss == pytest.approx(-float(scale) * _exact(_x()).sum())
        pyro.clear_param_store()
        drawn = _scaled(_drawn(lambda x: dist.Normal(pyro.param("gain", torch.tensor(0.3)) * x, 0.8)), scale)
        history = pv.fit(pair[0], drawn, _x(), estimator=kind, epochs=200, batch_size=B, progress=False, lr=0.02, seed=0)
        assert history.bound[-1] == pytest.approx(_exact(_x()).mean(), abs=0.1)  # per datum, whatever the scale
        assert pyro.param("gain").item() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="RenyiELBO puts the scale of all sites"):
        pv.fit(pair[0], drawn, _x(), estimator="renyi_elbo", epochs=1, progress=False)


def test_a_scale_that_depends_on_the_batch_is_steady_or_refused() -> None:
    def whole(program: Program) -> Program:
        return lambda x: _scaled(program, 1000 / len(x))(x)

    drawn = _drawn(lambda x: dist.Normal(pyro.param("gain", torch.tensor(0.3)) * x, 0.8))
    history = pv.fit(whole(model), whole(drawn), _x(), epochs=2, batch_size=5, lr=1e-9, shuffle=False, progress=False, seed=0)
    plain = pv.fit(model, drawn, _x(), epochs=2, batch_size=5, lr=1e-9, shuffle=False, progress=False, seed=0)
    assert_allclose(history.bound, plain.bound, rtol=1e-6)
    with pytest.raises(ValueError, match=r"scale around all sites is 125 for 8 data and 142\.857 for one less"):
        pv.fit(whole(model), whole(drawn), _x(), epochs=1, batch_size=8, progress=False)


def test_a_scale_on_some_sites_only_is_refused() -> None:
    _assert_refused(_scaled(model, 0.5), guide, r"is scaled apart.*put one around all sites", proposals=("guide", "prior"))
    _assert_refused(model, _scaled(guide, 0.5), r"'z' is scaled apart")
    each = torch.ones(B)
    each[0] = 2.0
    _assert_refused(_scaled(model, each), _scaled(guide, each), "is scaled apart", proposals=("guide",))


def test_a_labelled_single_cell_model_as_published() -> None:
    """As scANVI: one scale around everything, a classification loss as a factor of the guide, a label that is observed."""
    classify, alpha = nn.Linear(1, 3), 0.5
    offsets = torch.tensor([-1.0, 0.0, 1.0])

    def body(x: Tensor, y: Tensor) -> None:
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.OneHotCategorical(logits=torch.zeros(3)), obs=y)
        z2 = pyro.sample("z2", dist.Normal(z1 + y @ offsets, 1.0))
        pyro.sample("x", dist.Normal(z2, 1.0), obs=x)

    def drawn(x: Tensor, y: Tensor) -> None:
        pyro.module("classify", classify)
        z2 = pyro.sample("z2", dist.Normal((2 * x + y @ offsets) / 3, (2 / 3) ** 0.5))
        loss = dist.OneHotCategorical(logits=classify(z2[..., None])).log_prob(y)
        pyro.factor("classification_loss", -alpha * loss, has_rsample=False)
        pyro.sample("z1", dist.Normal((z2 - y @ offsets) / 2, 0.5**0.5))

    def plated(body: Callable[[Tensor, Tensor], None]) -> Program:
        def program(x: Tensor, y: Tensor) -> None:
            with pyro.plate("batch", len(x)), poutine.scale(scale=1 / 700):
                body(x, y)

        return program

    y = torch.eye(3)[(torch.arange(B) * 3) // B]
    exact = stats.norm(y @ offsets, 3**0.5).logpdf(_x()) - math.log(3)
    pair = plated(body), plated(drawn)
    assert_allclose(_score(*pair, _x(), y).log_px, exact, atol=1e-9)
    before = classify.weight.detach().clone()
    history = pv.fit(*pair, (_x(), y), epochs=50, batch_size=B, lr=0.05, progress=False, seed=0)
    assert_allclose(history.bound, exact.mean(), atol=1e-9)  # the bound is that of the pair
    assert (classify.weight - before).abs().max() > 0.1  # and the classifier has learnt
    guessed = classify(torch.tensor([[-2.0], [2.0]])).argmax(-1)
    assert guessed.tolist() == [0, 2]


# -- words -----------------------------------------------------------------------------------------------------------------


def test_a_dimension_that_is_not_there_is_said_in_a_sentence() -> None:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 3])

    anywhere = _drawn(lambda x: dist.Normal(0.0, 1.0))
    for data in (_x(), torch.zeros(B, 2)):
        with pytest.raises(ValueError, match=r"cannot be run on its arguments \(IndexError.*no dimension that") as caught:
            pv.log_weights(_in_data(body), anywhere, data, num_particles=3)
        assert "\n" not in str(caught.value)


def test_programs_of_different_arguments_are_said_to_be() -> None:
    def two(x: Tensor, y: Tensor) -> None:
        guide(x)

    with pytest.raises(ValueError, match=r"TypeError.*missing.*'y'.*let model and guide take the same arguments"):
        pv.log_weights(model, two, _x(), num_particles=2)
    with pytest.raises(ValueError, match=r"let model and guide take the same arguments"):
        pv.log_weights(model, guide, _x(), _x(), num_particles=1)


@pytest.mark.parametrize("flat", ["reshape", "view"])
def test_a_decoder_that_reshapes_by_the_batch_is_told_of_particles(flat: str) -> None:
    net = nn.Linear(2, 4)

    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        h = z.reshape(-1, 2) if flat == "reshape" else z.view(len(x), 2)
        pyro.sample("x", dist.Normal(net(h), 1.0).to_event(1), obs=x)

    pair, x = (_in_data(body), _drawn(lambda x: dist.Normal(torch.zeros(2), 1.0).to_event(1))), torch.zeros(B, 4)
    with pytest.raises(ValueError, match=r"not with 3 on the left.*vectorize_particles=False") as caught:
        pv.log_weights(*pair, x, num_particles=3)
    assert ".to_event" not in str(caught.value)
    assert pv.log_weights(*pair, x, num_particles=3, vectorize_particles=False).log_weights.shape == (3, B)


def test_a_forgotten_obs_is_said_to_be() -> None:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0))

    _assert_refused(_in_data(body), guide, "observes nothing, and its site 'x' is not in the guide: give the site of .* obs=x")


def test_the_plate_that_most_sites_share_is_named() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("pixels", 2, dim=-2):
            pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def drawn(x: Tensor) -> None:
        with pyro.plate("pixels", 2, dim=-2):
            pyro.sample("offset", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    _assert_refused(program, drawn, "Site 'offset' lies outside the data plate 'rows'")


def test_a_guide_may_leave_out_a_leading_plate_of_size_one() -> None:
    def program(of_model: bool) -> Program:
        def run(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                with pyro.plate("copies", 2, dim=-2):
                    w = pyro.sample("w", dist.Normal(torch.zeros(2, len(x)), 1.0))
                logits = w.sum(-2, keepdim=True) if of_model else torch.zeros(len(x))
                pyro.sample("z", dist.Binomial(5, logits=logits))
                if of_model:
                    pyro.sample("x", dist.Normal(0.0, 1.0).expand(x.shape), obs=x)

        return run

    x = torch.linspace(-1, 1, 4)
    evidence = pv.log_marginal(program(True), program(False), x, num_samples=2000, seed=0)
    torch.testing.assert_close(torch.tensor(evidence.log_px), dist.Normal(0.0, 1.0).log_prob(x), atol=0.3, rtol=0)


def tank(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        theta = pyro.sample("theta", dist.Gamma(2.0, 0.5).expand([len(x)]))
        pyro.sample("x", dist.Uniform(torch.zeros_like(theta), theta), obs=x)


def tank_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("theta", dist.LogNormal((x + 1).log(), 0.7))


def binomial_of_poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        number = pyro.sample("number", dist.Poisson(torch.full((len(x),), 4.0)))
        pyro.sample("x", dist.Binomial(number, torch.full((len(x),), 0.5)), obs=x)


def poisson_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("number", dist.Poisson(x + 1.0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_values_outside_a_support_that_a_latent_moves_weigh_nothing(seed: int) -> None:
    pyro.set_rng_seed(seed)
    x = torch.tensor([0.5, 1.0, 2.0, 5.0])
    # The density of theta is theta / 4 exp(-theta / 2), so that the integral over theta > x is exp(-x / 2) / 2.
    for score in (pv.log_marginal, pv.exact):
        evidence = score(tank, tank_guide, x, seed=seed)
        assert evidence.log_px == pytest.approx((-x / 2 - math.log(2)).numpy(), abs=0.1)
        assert evidence.reliable.all()
    counts = torch.tensor([0.0, 1.0, 3.0, 5.0])
    evidence = pv.log_marginal(binomial_of_poisson, poisson_guide, counts, seed=seed)
    assert evidence.log_px == pytest.approx(dist.Poisson(2.0).log_prob(counts).numpy(), abs=0.1)


def test_values_outside_a_support_that_stays_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Gamma(2.0, 0.5).expand([len(x)]))
            pyro.sample("x", dist.Uniform(x.new_zeros(len(x)), x.new_full((len(x),), 3.0)), obs=x)

    with pytest.raises(ValueError, match="outside the support of Uniform at site 'x', in 1 of the 2"):
        pv.log_marginal(model, tank_guide, torch.tensor([0.5, 5.0]))


def test_an_invalid_parameter_is_told_in_a_sentence() -> None:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("theta", dist.Weibull(torch.exp(-10 * x), 2.0))

    with pytest.raises(ValueError, match=r"parameter scale of Weibull must satisfy .* bring the data to a scale near 1"):
        pv.log_marginal(tank, guide, torch.tensor([0.5, 255.0]))


def test_booleans_are_cast_for_a_network_that_takes_floats() -> None:
    encoder = torch.nn.Linear(3, 2)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z[..., None].expand(*z.shape, 3)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = encoder(x).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    x = torch.tensor([[True, False, True], [False, False, True]])
    with pytest.warns(UserWarning, match="torch.bool, is cast to"):
        evidence = pv.log_marginal(model, guide, x, num_samples=500, seed=0)
    assert evidence.log_px == pytest.approx(pv.log_marginal(model, guide, x.float(), num_samples=500, seed=0).log_px)


# -- what is observed ------------------------------------------------------------------------------------------------------


def _computed(value: Callable[[Tensor, Tensor], Tensor], prior: Any = None) -> Program:
    def body(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0) if prior is None else prior)
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=value(x, z))

    return _in_data(body)


@pytest.mark.parametrize("value", [lambda x, z: x - z, lambda x, z: z - x, lambda x, z: (x - z).clone()])
def test_a_residual_is_a_density_of_the_data(value: Any) -> None:
    for proposal in ("guide", "mixture"):
        evidence = _score(_computed(value), guide, _x(), proposal=proposal)
        assert (np.abs(evidence.log_px - _exact(_x())) <= 5 * evidence.se + 1e-9).all()
    assert_allclose(pv.exact(_computed(value), guide, _x()).log_px, _exact(_x()), atol=1e-6)


@pytest.mark.parametrize("value", [lambda x, z: x / z, lambda x, z: x * (-z).exp(), lambda x, z: torch.asinh(x + z)])
def test_a_value_that_a_latent_stretches_lacks_its_jacobian(value: Any) -> None:
    program, drawn = _computed(value, dist.LogNormal(0.0, 1.0)), _drawn(lambda x: dist.LogNormal(0 * x, 1.0))
    match = "observed at site 'x' depends on a latent by more than a shift"
    _assert_refused(program, drawn, match)
    for score in (pv.exact, pv.ais):
        with pytest.raises(ValueError, match=match):
            score(program, drawn, _x())


@pytest.mark.parametrize("seed", range(6))
def test_a_count_that_stretches_is_found_where_it_is_mostly_zero(seed: int) -> None:
    """At z = 0 the observed values are the data themselves, which the first draws may all be."""
    torch.manual_seed(seed)
    program, drawn = _computed(lambda x, z: x * (1 + z), dist.Bernoulli(0.2)), _drawn(lambda x: dist.Bernoulli(0 * x + 0.2))
    with pytest.raises(ValueError, match="observed at site 'x' depends on a latent by more than a shift"):
        pv.log_marginal(program, drawn, _x()[:4], num_samples=50)


def test_a_value_that_is_never_drawn_may_stretch() -> None:
    program = _computed(lambda x, z: x * (1 - 0.9 * z), dist.Bernoulli(1e-4))
    for score in (pv.exact, pv.log_marginal):
        with pytest.raises(ValueError, match="observed at site 'x' depends on a latent by more than a shift"):
            score(program, _drawn(lambda x: dist.Bernoulli(0 * x + 1e-4)), 10 * _x())


@pytest.mark.parametrize("value", [lambda x, z: x - 1000 * z + 999 * z, lambda x, z: (x + 1e4 * z) - 10001 * z])
def test_a_residual_may_come_from_numbers_far_larger_than_the_data(value: Any) -> None:
    evidence = _score(_computed(value), guide, _x())
    assert (np.abs(evidence.log_px - _exact(_x())) <= 5 * evidence.se + 1e-2).all()


def test_missing_values_drawn_as_latents_are_observed_with_the_others() -> None:
    """Pyro's idiom of imputation: the latent takes the place of what is missing, so the rest is observed as it is."""

    def program(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            m = pyro.sample("m", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(a, 1.0), obs=torch.where(seen, x, m))

    def drawn(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(torch.where(seen, x / 2, 0.0), 0.8))
            pyro.sample("m", dist.Normal(0 * x, 1.5))

    seen = torch.arange(B) % 3 > 0
    # Where x is missing, m has the density N(m; a, 1) N(m; 0, 9) beside it: the integral over both is N(0; 0, 11).
    wanted = np.where(seen, _exact(_x()), stats.norm(0, 11**0.5).logpdf(0.0))
    evidence = _score(program, drawn, _x(), seen, num_samples=20_000)
    assert (np.abs(evidence.log_px - wanted) < 5 * evidence.se + 1e-3).all()


def test_values_of_a_latent_alone_are_a_soft_constraint() -> None:
    def program(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("soft", dist.Normal(0.0, 1.0), obs=2 * z)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    # exp(-2 z^2) tilts the prior to N(0, 1/5), with the factor (2 pi 5)^(-1/2).
    wanted = stats.norm(0, 1.2**0.5).logpdf(_x()) - 0.5 * math.log(10 * math.pi)
    assert_allclose(pv.exact(program, guide, _x()).log_px, wanted, atol=1e-6)


def test_an_improper_prior_trains_and_is_not_scored() -> None:
    def flat(x: Tensor) -> None:
        z = pyro.sample("z", dist.ImproperUniform(torch.distributions.constraints.real, (), ()))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    learnt = _drawn(lambda x: dist.Normal(pyro.param("gain", torch.tensor(0.3)) * x, 0.8))
    match = "prior of the latent site 'z' is improper"
    _assert_refused(_in_data(flat), guide, match, proposals=("guide", "prior", "mixture", "refined"))
    for score in (pv.exact, pv.ais):
        with pytest.raises(ValueError, match=match):
            score(_in_data(flat), guide, _x())
    pv.fit(_in_data(flat), learnt, _x(), epochs=300, batch_size=B, lr=0.02, progress=False, seed=0)
    assert pyro.param("gain").item() == pytest.approx(1.0, abs=0.1)  # where the likelihood is largest


def test_draws_that_are_no_one_hot_vectors_weigh_nothing() -> None:
    program = _one_hot(lambda: dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
    wanted = np.log((np.array([0.2, 0.3, 0.5]) * stats.norm(np.arange(3.0), 1).pdf(_x().numpy()[:, None])).sum(-1))
    for drawn in (
        _drawn(lambda x: dist.Bernoulli(torch.full((len(x), 3), 0.4)).to_event(1)),
        _drawn(lambda x: dist.Multinomial(1, torch.ones(len(x), 3))),
        _drawn(lambda x: dist.Poisson(torch.full((len(x), 3), 0.4)).to_event(1)),
    ):
        for proposal in ("guide", "mixture"):
            evidence = _score(program, drawn, _x(), num_samples=20_000, proposal=proposal)
            assert (np.abs(evidence.log_px - wanted) < 5 * evidence.se + 1e-6).all()
            assert evidence.reliable.all()


def test_causes_are_named_by_what_the_user_wrote() -> None:
    def broken(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", (x - 10).log())

    _assert_refused(_in_data(broken), guide, "pyro.factor of the programs is NaN", proposals=("guide",))
    attention, embed = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(1, 12)

    def attends(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        tokens = embed(z).reshape(*z.shape[:-1], 3, 4)
        pyro.sample("x", dist.Normal(attention(tokens, tokens, tokens)[0].mean((-1, -2)), 1.0), obs=x)

    pair = _in_data(attends), _drawn(lambda x: dist.Normal(0 * x[:, None], 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"with one particle but not with 2 .*vectorize_particles=False"):  # torch asserts
        _score(*pair, _x())
    assert np.isfinite(_score(*pair, _x(), vectorize_particles=False).log_px).all()

    def singular(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        covariance = (z > 0.5)[..., None, None] * torch.eye(2)
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), covariance), obs=x)

    with pytest.raises(ValueError, match="matrix of the programs has no factorization at some values of the latents"):
        _score(_in_data(singular), _drawn(lambda x: dist.Normal(2.0 + 0 * x[:, 0], 1.0)), torch.zeros(3, 2))

    def classes(x: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.OrderedLogistic(z, torch.tensor([-1.0, 1.0])), obs=x)

    with pytest.raises(ValueError, match="number the classes from 0 to 2 in them"):
        _score(_in_data(classes), _drawn(lambda x: dist.Normal(0.0 * x, 1.0)), torch.tensor([0, 1, 3]))

    def counts(x: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Poisson(2.0)), 1.0), obs=x)

    pair = _in_data(counts), _drawn(lambda x: dist.Poisson(torch.full_like(x, 2.0)))
    for method in ("auto", "enumerate"):  # neither sends to a method that refuses it too
        with pytest.raises(ValueError, match=r"log_marginal( with draws of the guide)?\.$"):
            pv.exact(*pair, _x(), method=method)
