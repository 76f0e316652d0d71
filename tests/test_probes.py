"""The first look at a pair: what may not be scored is refused or flagged, and looking changes nothing."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import planar
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.data.batches import Batches
from pyrovae.programs import coverage as programs_coverage
from pyrovae.programs.inspect import prepare
from pyrovae.programs.parameters import find_parameters
from pyrovae.programs.reachable import modules_of
from pyrovae.programs.state import own_scope
from tests.pairs import pyro_module_function_pair

Law = Callable[[Tensor], Any]


def base_model(x: Tensor) -> None:
    """z ~ N(0, 1), x | z ~ N(z, 1), so that log p(x) = -log(4 pi)/2 - x^2/4."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guided_by(distribution: Law, site: str = "z") -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample(site, distribution(x))

    return guide


base_guide = guided_by(lambda x: dist.Normal(x / 2, math.sqrt(0.5)))


def log_px(x: Tensor) -> np.ndarray:
    return (-math.log(4 * math.pi) / 2 - x**2 / 4).numpy()


def data(num: int = 20) -> Tensor:
    return math.sqrt(2) * torch.randn(num, generator=torch.Generator().manual_seed(1))


# -- coverage --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distribution",
    [
        lambda x: dist.Uniform(torch.zeros(()), 1.0),
        lambda x: dist.Uniform(torch.tensor(-6.0), 6.0),  # outside are two draws of the prior in a thousand million
        lambda x: dist.HalfNormal(1.0),
        lambda x: dist.LogNormal(x / 2, 0.7),
        lambda x: dist.Exponential(torch.ones_like(x)),
        lambda x: dist.Normal(x / 2, 1e-25),
        lambda x: dist.Normal(torch.where(x > -1, x / 2, torch.nan), 1.0, validate_args=False),
    ],
    ids=["uniform", "wide uniform", "half normal", "log-normal", "exponential", "underflow", "nan"],
)
def test_a_guide_that_misses_what_the_prior_allows_is_flagged(distribution: Law):
    x = data()
    with pyro.validation_enabled(False):
        evidence = pv.log_marginal(base_model, guided_by(distribution), x, num_samples=100, seed=0)
    missed = (
        distribution(x).loc.isnan().numpy()
        if isinstance(distribution(x), dist.Normal) and distribution(x).loc.isnan().any()
        else np.ones(20, bool)
    )
    np.testing.assert_array_equal(evidence.covered, ~missed)
    assert not evidence.reliable[missed].any()
    if np.isfinite(evidence.log_px).all():
        assert "The guide rules out values that the prior allows for 20 of 20 data (first datum 0)" in evidence.summary()
        assert 'use proposal="mixture"' in evidence.summary()
        assert "a guide that covers the prior" in evidence.criterion


def test_the_cures_of_a_guide_that_misses_are_right():
    x, guide = data(), guided_by(lambda x: dist.Uniform(torch.zeros(()), 1.0))
    for proposal in ("mixture", "refined"):
        evidence = pv.log_marginal(base_model, guide, x, num_samples=20_000, proposal=proposal, seed=0)
        assert evidence.covered is None
        assert (np.abs(evidence.log_px - log_px(x)) < 5 * evidence.se + 1e-3)[evidence.reliable].all()
        assert evidence.reliable.mean() > 0.7
    annealed = {
        start: pv.ais(base_model, guide, x[:3], num_temperatures=20, start=start, seed=0) for start in ("prior", "guide")
    }
    assert annealed["prior"].covered is None
    assert not annealed["guide"].covered.any()
    assert not annealed["guide"].reliable.any()
    assert 'use start="prior"' in annealed["guide"].summary()


@pytest.mark.parametrize(
    "distribution",
    [
        lambda x: dist.Normal(x / 2, 0.05),  # far too narrow, which is for Pareto k to say
        lambda x: dist.StudentT(3.0, x / 2, 0.7),
        lambda x: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.stack([x, -x], -1), 1.0)),
        lambda x: dist.TransformedDistribution(dist.Normal(x / 2, 0.7), dist.transforms.AffineTransform(0.0, 1.5)),
    ],
    ids=["narrow", "wide tail", "mixture", "transformed"],
)
def test_a_guide_of_full_support_covers(distribution: Law):
    evidence = pv.log_marginal(base_model, guided_by(distribution), data(), num_samples=50, seed=0)
    assert evidence.covered.all()


def test_only_the_data_whose_discrete_values_are_ruled_out_are_flagged():
    rare = torch.tensor([0.5, 0.4999, 0.0001])  # which 64 draws do not show

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            c = pyro.sample("c", dist.Categorical(rare))
            pyro.sample("x", dist.Normal(8.0 * c, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            logits = torch.stack([0 * x, 0 * x, torch.where(x > 10, -math.inf, 0.0)], -1)
            pyro.sample("c", dist.Categorical(logits=logits))

    x = torch.tensor([0.0, 16.0, 7.0, 15.0])
    evidence = pv.log_marginal(model, guide, x, num_samples=4000, seed=0)
    assert evidence.covered.tolist() == [True, False, True, False]
    assert not evidence.reliable[[1, 3]].any()
    exact = pv.exact(model, guide, x).log_px
    assert (np.abs(evidence.log_px - exact)[[1, 3]] > 10).all()
    assert (np.abs(evidence.log_px - exact)[[0, 2]] < 5 * evidence.se[[0, 2]] + 1e-6).all()


@pytest.mark.parametrize(
    ("prior", "distribution"),
    [
        (lambda: dist.Bernoulli(0.5), lambda x: dist.Bernoulli(torch.where(x > 0, 1.0, 0.5))),
        (lambda: dist.Bernoulli(0.5), lambda x: dist.Bernoulli(logits=torch.where(x > 0, -math.inf, 0.5))),
        (lambda: dist.Categorical(torch.ones(2)), lambda x: dist.Categorical(torch.stack([0 * x + 1, (x <= 0).float()], -1))),
        (lambda: dist.Poisson(torch.ones(())), lambda x: dist.Binomial(torch.where(x > 0, 1.0, 60.0), torch.full((), 0.1))),
        (lambda: dist.Geometric(torch.full((), 0.4)), lambda x: dist.Poisson(torch.where(x > 0, 0.0, 2.0))),
    ],
    ids=["probability of one", "logits", "probability of zero", "binomial", "geometric"],
)
def test_a_value_of_probability_zero_is_flagged(prior: Callable[[], Any], distribution: Law):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", prior())
            pyro.sample("x", dist.Normal(s.float(), 1.0), obs=x)

    evidence = pv.log_marginal(model, guided_by(distribution, "s"), torch.tensor([-1.0, 1.0]), num_samples=50, seed=0)
    assert evidence.covered.tolist() == [True, False]


def test_vectors_of_switches_are_judged_by_number():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            s = pyro.sample("s", dist.Bernoulli(torch.full((3,), 0.5)).to_event(1))
            c = pyro.sample("c", dist.OneHotCategorical(torch.ones(3)))
            pyro.sample("x", dist.Normal((s * c).sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("s", dist.Bernoulli(torch.stack([0 * x + 0.5, (x - 1) / 2, 0 * x + 0.5], -1)).to_event(1))
            pyro.sample("c", dist.OneHotCategorical(torch.stack([0 * x + 1, 2 + 0 * x, 2 - x], -1)))

    x = torch.tensor([1.0, 1.5, 2.0])
    assert pv.log_marginal(model, guide, x, num_samples=50, seed=0).covered.tolist() == [False, True, False]


def test_a_guide_as_narrow_as_the_likelihood_makes_the_posterior_covers():
    # x | z ~ U(0, z) rules out z < x, so a guide on (x, 10) misses nothing: log p(x) = log(log(10/x) / 10).
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, torch.tensor(10.0)))
            pyro.sample("x", dist.Uniform(torch.zeros(()), z), obs=x)

    x = torch.tensor([1.0, 3.0, 9.0])
    evidence = pv.log_marginal(model, guided_by(lambda x: dist.Uniform(x, 10.0)), x, num_samples=20_000, seed=0)
    assert evidence.covered.all()
    assert (np.abs(evidence.log_px - np.log(np.log(10 / x.numpy()) / 10)) < 5 * evidence.se).all()
    evidence = pv.log_marginal(model, guided_by(lambda x: dist.Uniform(x, 9.5)), x, num_samples=100, seed=0)
    assert not evidence.covered.any()


def test_constrained_latents_masks_and_vectors_are_judged_by_site():
    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, torch.ones(())))
            share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
            with pyro.poutine.mask(mask=mask):
                v = pyro.sample("v", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(rate + share[..., 0] + v.sum(-1) * mask, 1.0), obs=x)

    def guide(upper: float, masked: bool) -> Callable[..., None]:
        def run(x: Tensor, mask: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("rate", dist.LogNormal(torch.zeros(()), 1.0))
                pyro.sample("share", dist.Dirichlet(torch.ones(3)))
                with pyro.poutine.mask(mask=mask):
                    v = dist.Uniform(torch.full((2,), -9.0), torch.tensor([9.0, upper]))
                    pyro.sample("v", (v if masked else dist.Normal(torch.zeros(2), 1.0)).to_event(1))

        return run

    x, mask = torch.ones(4), torch.tensor([True, False, True, False])
    shape: dict[str, Any] = {"plate": "data", "nesting": 1, "num_dims": 1}
    found = [programs_coverage.covered_data(model, guide(*how), (x, mask), **shape) for how in ((9.0, False), (0.5, True))]
    assert found[0].tolist() == [True] * 4
    assert found[1].tolist() == [False, True, False, True]


class _Coarse(dist.Exponential):
    """Draws that round to zero for every other particle, as draws of a Weibull(0.05) do in float32."""

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        return (torch.arange(shape[0]) % 2.0).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).clone()


class _CostlyExp(torch.distributions.transforms.ExpTransform):
    """Of another module than torch's, so that its inverse counts as costly and two draws of the prior are scored."""


def test_two_draws_are_moved_off_the_edges_to_which_they_round():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", _Coarse(torch.ones(()))), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(0 * x, 1.0), [_CostlyExp()]))

    found = programs_coverage.covered_data(model, guide, (torch.ones(4),), plate="data", nesting=1, num_dims=1)
    assert found is not None
    assert found.all()


@pytest.mark.parametrize("fails", [False, True])
def test_a_guide_that_fails_at_all_points_is_not_judged(fails: bool):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2, 0.7))
            if fails and z.dim() > 1:  # many points at once
                raise RuntimeError("no Cholesky factor")

    found = programs_coverage.covered_data(model, guide, (torch.ones(4),), plate="data", nesting=1, num_dims=1)
    assert found is None if fails else found.all()


def test_what_is_not_known_is_not_judged():
    def auxiliary(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(x / 2, math.sqrt(0.5)), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u))

    evidence = pv.log_marginal(base_model, auxiliary, data(), num_samples=50, seed=0)
    assert evidence.covered is None
    np.testing.assert_allclose(evidence.log_px, log_px(data()), atol=1e-5)


def test_covered_travels_with_the_evidence(tmp_path):
    x = data()
    distribution: Law = lambda x: dist.Uniform(torch.where(x > 0, -1.0, -60.0), 60.0)  # noqa: E731
    evidence = pv.log_marginal(base_model, guided_by(distribution), x, num_samples=30, seed=0)
    np.testing.assert_array_equal(evidence.covered, ~(x > 0).numpy())
    evidence.save(tmp_path / "evidence.safetensors")
    again = pv.Evidence.load(tmp_path / "evidence.safetensors")
    np.testing.assert_array_equal(again.covered, evidence.covered)
    assert evidence.rows(slice(3)).covered.tolist() == evidence.covered[:3].tolist()
    assert evidence.to_datatree()["evidence"]["covered"].values.tolist() == evidence.covered.tolist()
    file = tmp_path / "resume.safetensors"
    for _ in range(2):
        resumed = pv.log_marginal(base_model, guided_by(distribution), x, num_samples=30, seed=0, resume=file)
        np.testing.assert_array_equal(resumed.covered, evidence.covered)
        np.testing.assert_array_equal(resumed.log_px, evidence.log_px)


# -- independence ----------------------------------------------------------------------------------------------------------

WEIGHT = torch.randn(2, 4, generator=torch.Generator().manual_seed(3))


def decoded(decode: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor] | None = None) -> tuple[Any, Any]:
    encode = encode or (lambda x: 0.3 * x[:, :2])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encode(x), 0.9).to_event(1))

    return model, guide


def rows(num: int = 6) -> Tensor:
    return torch.randn(num, 4, generator=torch.Generator().manual_seed(2))


MIXING_PARTICLES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z @ WEIGHT, dim=1),
    "group norm": lambda z: nn.functional.layer_norm(z @ WEIGHT, (z @ WEIGHT).shape[1:]),
    "mean over features": lambda z: z @ WEIGHT - (z @ WEIGHT).mean(1, keepdim=True),
    "cumulative": lambda z: (z @ WEIGHT).cumsum(1),
    "cosine": lambda z: nn.functional.normalize(z @ WEIGHT),  # its dimension is 1 unless told otherwise
}
RIGHT_PARTICLES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z @ WEIGHT, dim=-1),
    "group norm": lambda z: nn.functional.layer_norm(z @ WEIGHT, (4,)),
    "mean over features": lambda z: z @ WEIGHT - (z @ WEIGHT).mean(-1, keepdim=True),
    "cumulative": lambda z: (z @ WEIGHT).cumsum(-1),
    "cosine": lambda z: nn.functional.normalize(z @ WEIGHT, dim=-1),
}


@pytest.mark.parametrize("name", MIXING_PARTICLES)
def test_a_layer_that_counts_from_the_left_is_refused_and_right_one_by_one(name: str):
    (model, guide), x = decoded(MIXING_PARTICLES[name]), rows()
    for score in (
        lambda: pv.log_marginal(model, guide, x, num_samples=10),
        lambda: pv.log_marginal(model, guide, x[:1], num_samples=10, proposal="prior"),
        lambda: pv.log_marginal(model, guide, x, num_samples=10, proposal="refined"),
        lambda: pv.exact(model, guide, x),
        lambda: pv.ais(model, guide, x, num_temperatures=5),
        lambda: pv.refine(model, guide, x, steps=1),
        lambda: pv.posterior_draws(model, guide, x, num_draws=2, num_samples=5),
        lambda: pv.fit(model, guide, x, estimator="iwae", epochs=1, progress=False),
    ):
        with pytest.raises(
            ValueError, match=r"at site 'x'.*mixes particles or data.*dim=-1.*vectorize_particles=False"
        ) as caught:
            score()
        assert "\n" not in str(caught.value)
    right = decoded(RIGHT_PARTICLES[name])
    wanted = pv.exact(*right, x[:2], tolerance=1e-3).log_px
    one_by_one = pv.log_marginal(model, guide, x[:2], num_samples=400, vectorize_particles=False, seed=0)
    assert (np.abs(one_by_one.log_px - wanted) < 5 * one_by_one.se).all()


@pytest.mark.parametrize(
    "decode",
    [
        lambda z: (z @ WEIGHT).roll(1, -2),
        lambda z: z @ WEIGHT - (z @ WEIGHT).mean(-2, keepdim=True),
        lambda z: (z @ WEIGHT).cumsum(-2),
        lambda z: torch.softmax(z @ z.mT, -1) @ z @ WEIGHT,
    ],
    ids=["roll", "centred", "cumulative", "attention"],
)
def test_a_layer_that_mixes_data_is_refused(decode: Callable[[Tensor], Tensor]):
    (model, guide), x = decoded(decode), rows()
    for options in ({}, {"vectorize_particles": False}):
        for score in (pv.log_marginal, pv.exact):
            with pytest.raises(
                ValueError, match=r"depend on the other data of its batch at site 'x'.*not defined for one datum"
            ):
                score(model, guide, x, **options)


def test_a_guide_that_mixes_data_is_refused():
    for encode in (lambda x: 0.3 * x[:, :2].flip(0), lambda x: torch.softmax(x[:, :2], 0)):
        model, guide = decoded(lambda z: z @ WEIGHT, encode)
        with pytest.raises(ValueError, match="depend on the other data of its batch at site 'z'"):
            pv.log_marginal(model, guide, rows(), num_samples=10)


def test_a_term_that_depends_on_the_size_of_the_batch_is_refused():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("shrunk", -z.abs() / len(x))

    with pytest.raises(ValueError, match=r"other numbers alone than beside others at site 'shrunk'"):
        pv.log_marginal(model, base_guide, data(), num_samples=10)


class Unseen:
    """Holds a network where no search for modules looks."""

    __slots__ = ("network",)

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_batch_norm_in_training_mode_trains_but_is_not_scored():
    def network() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))

    x = rows(40)
    for estimator in ("elbo", "iwae"):
        seen = network()
        model, guide = decoded(lambda z: z @ WEIGHT, lambda x, seen=seen: pyro.module("seen", seen)(x))
        history = pv.fit(model, guide, x, estimator=estimator, epochs=3, batch_size=10, lr=0.01, progress=False)
        assert history.bound[-1] > history.bound[0]
        assert seen[1].training
        assert seen[1].num_batches_tracked == 12, "the first look is no step"
    seen = network().eval()
    wanted = pv.log_marginal(*decoded(lambda z: z @ WEIGHT, seen), x, num_samples=20, seed=0).log_px
    seen.train()
    for held in (seen, lambda x: seen(x), functools.partial(lambda net, x: net(x), seen)):
        found = pv.log_marginal(*decoded(lambda z: z @ WEIGHT, held), x, num_samples=20, seed=0).log_px
        np.testing.assert_array_equal(found, wanted)
        assert seen[1].training
    with pytest.raises(ValueError, match=r"batch norm in training mode \(call eval\(\) on it\)"):
        pv.log_marginal(*decoded(lambda z: z @ WEIGHT, Unseen(seen)), x, num_samples=20)
    seen.eval()
    assert len(pv.log_marginal(*decoded(lambda z: z @ WEIGHT, Unseen(seen)), x, num_samples=20)) == 40


def test_a_last_batch_that_cannot_run_is_refused_before_training():
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    model, guide = decoded(lambda z: z @ WEIGHT, lambda x: pyro.module("network", network)(x))
    before = copy.deepcopy(network.state_dict())
    for data_given in (rows(21), DataLoader(TensorDataset(rows(21)), batch_size=5)):  # says the preflight
        with pytest.raises(ValueError, match=r"The last batch of an epoch holds 1 of the 21 data.*choose a batch_size"):
            pv.fit(model, guide, data_given, batch_size=5, epochs=1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    pv.fit(model, guide, rows(21), batch_size=7, epochs=1, progress=False)
    pv.fit(model, guide, DataLoader(TensorDataset(rows(21)), batch_size=5, drop_last=True), epochs=1, progress=False)


@pytest.mark.parametrize(
    "hold",
    [
        lambda net: net,
        lambda net: lambda x: net(x),
        lambda net: functools.partial(lambda net, x: net(x), net),
        lambda net: functools.partial(lambda nets, x: nets["encoder"](x), {"encoder": net}),
        lambda net: SimpleNamespace(run=lambda x: net(x)).run,
        lambda net: net.forward,
        lambda net: lambda x, net=net: net(x),
    ],
    ids=["module", "lambda", "partial", "dictionary", "attribute", "bound method", "default"],
)
def test_dropout_is_off_in_scoring_wherever_the_network_is_held(hold: Callable[[nn.Module], Callable[[Tensor], Tensor]]):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 2))
    scored = []
    for training in (True, False):
        network.train(training)
        pair = decoded(lambda z: z @ WEIGHT, hold(network))
        scored.append(pv.log_marginal(*pair, rows(), num_samples=50, seed=0).log_px)
        assert network[1].training == training
    np.testing.assert_array_equal(*scored)


def test_random_numbers_of_a_networks_own_are_refused():
    unseen = Unseen(nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2)))
    for pair, site in (
        (decoded(lambda z: z @ WEIGHT, unseen), "z"),
        (decoded(lambda z: z @ WEIGHT + torch.randn(4)), "x"),
    ):
        for score in (pv.log_marginal, pv.exact):
            with pytest.raises(ValueError, match=rf"other numbers for the same latents at site '{site}'.*call eval\(\)"):
                score(*pair, rows())


@pytest.mark.parametrize("near", [False, True])
def test_rounding_is_no_dependence(near: bool):
    # Ill-conditioned terms in float32: what products of other shapes round otherwise must not look like a mixing layer.
    for seed in range(20):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(2, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 50))
        scale = 10.0 ** torch.randint(-7, -3, ()).item()
        # Where x is what the decoder gives, all that is left in (x - decoder(z)) / scale is rounding.
        x = (1000 * net(torch.ones(5, 2))).detach() if near else 1000 * torch.randn(5, 50)

        def model(x: Tensor, net: nn.Module = net, scale: float = scale) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(1000 * net(z), scale).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc = torch.ones(2) if near else 100 * torch.tanh(x @ torch.ones(50, 2))
                pyro.sample("z", dist.Normal(loc, 1e-8).to_event(1))

        prepare(model, guide, x)


# -- programs tied to one set of data --------------------------------------------------------------------------------------


def per_datum_guide(x: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(x.shape[0]))
    log_scale = pyro.param("log_scale", lambda: torch.zeros(x.shape[0]))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()))


def constant_guide(num: int) -> Callable[[Tensor], None]:
    def guide(x: Tensor) -> None:
        with pyro.plate("data", num):
            pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))

    return guide


def in_place_guide(x: Tensor) -> None:
    # Runs on any part of the data, but with the parameters of the first ones.
    loc = pyro.param("loc", lambda: torch.zeros(300))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(loc[: len(x)], 0.7))


@pytest.mark.parametrize(
    ("made", "num"),  # fewer data than a group, and more
    [(lambda: per_datum_guide, 300), (lambda: AutoNormal(base_model), 20), (lambda: AutoNormal(base_model), 300)],
    ids=["parameter-300", "AutoNormal-20", "AutoNormal-300"],
)
def test_a_guide_with_a_parameter_for_each_datum_is_scored_whole(made: Callable[[], Any], num: int):
    x, guide = data(num), made()
    untrained = pv.log_marginal(base_model, guide, x, num_samples=2000, seed=0)
    assert len(untrained) == num
    assert len(pyro.get_param_store()) == 0, "as if never scored"
    pv.fit(base_model, guide, x, shuffle=False, batch_size=num, epochs=300, lr=0.05, progress=False, seed=0)
    evidence = pv.log_marginal(base_model, guide, x, num_samples=2000, seed=0)
    assert evidence.reliable.mean() > 0.95
    error = np.abs(evidence.log_px - log_px(x))
    assert (error < 5 * evidence.se + 1e-4)[evidence.reliable].all()
    # An autoguide's auxiliary sites have no density at the prior's draws.
    for options in ({"chunk_size": 7}, {"proposal": "mixture" if guide is per_datum_guide else "prior"}):
        other = pv.log_marginal(base_model, guide, x, num_samples=500, seed=0, **options)
        assert (np.abs(other.log_px - log_px(x)) < 6 * other.se + 1e-4)[other.reliable].all()
    with pytest.raises(ValueError, match=r"tied to one set of data.*leave it out"):
        pv.log_marginal(base_model, guide, x, target_se=0.1)


def test_a_plate_of_constant_size_and_parameters_by_place_are_scored_whole():
    x = data(300)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 300):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    evidence = pv.log_marginal(model, constant_guide(300), x, num_samples=100, seed=0)
    np.testing.assert_allclose(evidence.log_px, log_px(x), atol=1e-5)
    assert not prepare(model, constant_guide(300), x).info.tied_to_data  # its network takes the data in any order
    pyro.get_param_store().setdefault("loc", x / 2)
    evidence = pv.log_marginal(base_model, in_place_guide, x, num_samples=2000, seed=0)
    assert (np.abs(evidence.log_px - log_px(x)) < 5 * evidence.se + 1e-3)[evidence.reliable].all()
    assert evidence.reliable.all()
    with pytest.raises(ValueError, match="a data loader gives them in parts: give them as arrays"):
        pv.log_marginal(base_model, in_place_guide, DataLoader(TensorDataset(x), batch_size=100), num_samples=10)


def test_the_first_look_says_what_is_tied():
    x = data(40)
    assert prepare(base_model, per_datum_guide, x).info.tied_to_data
    assert prepare(base_model, AutoNormal(base_model), Batches(x, 10)).info.tied_to_data
    pyro.clear_param_store()
    pyro.get_param_store().setdefault("loc", torch.linspace(-50, 50, 300))
    assert prepare(base_model, in_place_guide, x).info.tied_to_data
    first = prepare(base_model, base_guide, x)
    assert not first.info.tied_to_data
    assert first.whole is None
    vae = pv.make_vae(4, latent_dim=2, hidden=[40, 8])
    assert not prepare(vae.model, vae.guide, torch.ones(40, 4)).info.tied_to_data


# -- no trace --------------------------------------------------------------------------------------------------------------


def test_scoring_a_pair_before_it_is_trained_changes_nothing():
    x = data(30)
    alone = pv.fit(base_model, per_datum_guide, x, shuffle=False, batch_size=30, epochs=5, progress=False, seed=0).bound
    pyro.clear_param_store()
    for score in (
        lambda: pv.log_marginal(base_model, per_datum_guide, x[:7], num_samples=10),
        lambda: pv.exact(base_model, per_datum_guide, x[:3]),
        lambda: pv.ais(base_model, per_datum_guide, x[:3], num_temperatures=5),
        lambda: pv.refine(base_model, per_datum_guide, x[:3], steps=1),
    ):
        score()
        assert len(pyro.get_param_store()) == 0
    after = pv.fit(base_model, per_datum_guide, x, shuffle=False, batch_size=30, epochs=5, progress=False, seed=0).bound
    assert after == alone
    assert pyro.param("loc").shape == (30,)


def test_an_autoguide_is_set_up_by_training_alone():
    guide = AutoNormal(base_model)
    pv.log_marginal(base_model, guide, data(7), num_samples=10)
    assert guide.prototype_trace is None
    assert not list(guide.parameters())
    pv.fit(base_model, guide, data(30), shuffle=False, batch_size=30, epochs=1, progress=False)
    assert guide.locs.z.shape == (30,)

    class Lazily(pyro.nn.PyroModule):
        """A guide that makes its parameter where it first sees data."""

        def forward(self, x: Tensor) -> None:
            if not hasattr(self, "loc"):
                self.loc = pyro.nn.PyroParam(x.mean().detach().clone())
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc, 1.0))

    lazily = Lazily()
    pv.log_marginal(base_model, lazily, data(7), num_samples=10)
    assert not hasattr(lazily, "loc")
    pv.fit(base_model, lazily, data(30), batch_size=30, epochs=1, lr=1e-30, progress=False)
    assert lazily.loc.item() == pytest.approx(data(30).mean().item(), abs=1e-6), "it saw all of the first batch"


def test_what_depends_on_the_data_first_sees_a_whole_batch():
    def guide(x: Tensor) -> None:
        spread = pyro.param("spread", lambda: x.std(), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, spread))

    x = data(300)
    seen: list[Tensor] = []
    pv.fit(base_model, guide, x, batch_size=100, shuffle=False, epochs=1, lr=1e-30, progress=False)
    assert pyro.param("spread").item() == pytest.approx(x[:100].std().item(), rel=1e-5)
    pyro.clear_param_store()

    def watched(x: Tensor) -> None:
        guide(x)
        seen.append(pyro.param("spread").detach().clone())

    pv.log_marginal(base_model, watched, x, num_samples=10)
    assert torch.allclose(seen[-1], x[:256].std())
    assert torch.isfinite(torch.stack(seen)).all()


def test_a_refused_fit_leaves_the_store_as_it_was():
    pyro.param("other", torch.ones(2))
    network = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="NaN"):
        pv.fit(base_model, per_datum_guide, torch.full((20,), math.nan), progress=False)
    assert set(pyro.get_param_store()) == {"other"}
    model, guide = decoded(lambda z: z @ WEIGHT, lambda x: pyro.module("network", network)(x))
    pv.fit(model, guide, rows(), epochs=1, progress=False)
    assert set(pyro.get_param_store()) == {"other"}, "parameters of modules stay in the modules"


# -- two models, one process -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The text of Pyro's tutorial: programs that register their networks by constant names."""

    def __init__(self, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.dec)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.dec(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.enc)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.enc(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("by_svi", [False, True])
def test_the_same_text_twice_trains_and_scores_as_if_alone(clear: bool, by_svi: bool):
    x = rows(30) + 1
    options = {"epochs": 3, "batch_size": 10, "lr": 0.02, "progress": False, "seed": 0}

    def alone(seed: int) -> tuple[list[float], np.ndarray]:
        pyro.clear_param_store()
        net = Net(seed)
        bound = pv.fit(net.model, net.guide, x, **options).bound
        return bound, pv.log_marginal(net.model, net.guide, x, num_samples=20, seed=1).log_px

    wanted = [alone(seed) for seed in (0, 1)]
    pyro.clear_param_store()
    nets = [Net(0), Net(1)]
    if by_svi:  # Pyro's store then holds the names for a third one
        third = Net(2)
        svi = pyro.infer.SVI(third.model, third.guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
        svi.step(x)
        kept = {name: value.unconstrained() for name, value in pyro.get_param_store().items()}
    for net, (bound, _) in zip(nets, wanted, strict=True):
        assert pv.fit(net.model, net.guide, x, **options).bound == bound
    if by_svi:
        assert all(pyro.get_param_store()[name].unconstrained() is value for name, value in kept.items())
    if clear:
        pyro.clear_param_store()
    for net, (_, scored) in zip(nets, wanted, strict=True):
        np.testing.assert_array_equal(pv.log_marginal(net.model, net.guide, x, num_samples=20, seed=1).log_px, scored)
    if by_svi and not clear:
        before = third.enc.weight.clone()
        svi.step(x)
        assert not torch.equal(third.enc.weight, before)


def test_our_models_and_autoguides_of_one_name_do_not_meet():
    x = (rows(30) > 0).float()
    first, second = (pv.make_vae(4, latent_dim=2, hidden=[8], name="mine") for _ in range(2))
    first.model(x)  # takes the name in Pyro's store
    before = [parameter.clone() for parameter in second.parameters()]
    pv.fit(second.model, second.guide, x, epochs=1, progress=False)
    assert not any(map(torch.equal, second.parameters(), before))
    pv.log_marginal(second.model, second.guide, x, num_samples=10)
    pyro.clear_param_store()
    y = data(10)
    guides = [AutoNormal(base_model), AutoNormal(base_model)]
    svi = pyro.infer.SVI(base_model, guides[0], pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(50):
        svi.step(y)
    trained = guides[0].locs.z.detach().clone()
    pv.fit(base_model, guides[1], y, shuffle=False, batch_size=10, epochs=1, lr=1e-30, progress=False)
    assert torch.equal(guides[0].locs.z, trained)
    assert guides[1].locs.z.abs().max() < trained.abs().max() / 2, "it starts from its own"


def test_parameters_of_both_programs_under_one_name_are_found():
    # As in Pyro's CEVAE, whose model and guide have networks of the same names.
    class Half(pyro.nn.PyroModule):
        def __init__(self, encodes: bool):
            super().__init__()
            self.net, self.encodes = pyro.nn.PyroModule[nn.Linear](*((4, 2) if encodes else (2, 4))), encodes

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                distribution = dist.Normal(self.net(x), 1.0) if self.encodes else dist.Normal(torch.zeros(2), 1.0)
                z = pyro.sample("z", distribution.to_event(1))
                if not self.encodes:
                    pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    model, guide, x = Half(False), Half(True), rows(30)
    found = find_parameters(model, guide, x)
    assert {id(p) for p in found} == {id(p) for p in [*model.parameters(), *guide.parameters()]}
    assert len(pv.log_marginal(model, guide, x, num_samples=10)) == 30
    before = [parameter.clone() for parameter in [*model.parameters(), *guide.parameters()]]
    pv.fit(model, guide, x, epochs=2, progress=False)
    assert not any(map(torch.equal, [*model.parameters(), *guide.parameters()], before))


def test_bare_parameters_are_carried_in_and_written_back():
    def made() -> tuple[Any, Any, nn.Parameter]:
        shift = nn.Parameter(torch.tensor(0.0))

        def model(x: Tensor) -> None:
            loc = pyro.param("loc", torch.tensor(0.0))
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(loc + pyro.param("shift", shift), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        return model, base_guide, shift

    x = data() + 3
    (model, guide, shift), (again, _, second) = made(), made()
    pyro.get_param_store().setdefault("loc", torch.tensor(1.0))
    user = pyro.get_param_store()._params["loc"]
    pv.fit(model, guide, x, epochs=20, lr=0.1, progress=False, seed=0)
    assert pyro.get_param_store()._params["loc"] is user
    assert user.item() > 1.1
    assert pyro.param("shift").item() == shift.item() > 0.1
    value = shift.item()
    pv.fit(again, guide, x, epochs=20, lr=0.1, progress=False, seed=0)
    assert second.item() > 0.01
    assert shift.item() == value
    fresh = pv.log_marginal(model, guide, x, num_samples=4000, seed=0)
    mean = user.item() + value
    exact = dist.Normal(mean, math.sqrt(2)).log_prob(x).detach().numpy()
    assert (np.abs(fresh.log_px - exact) < 5 * fresh.se)[fresh.reliable].all()


def test_a_scope_restores_whatever_happens():
    store = pyro.get_param_store()
    pyro.param("kept", torch.ones(1))
    for keep, error, names in [
        (False, None, {"kept"}),
        (True, None, {"kept", "new"}),
        (True, ValueError, {"kept"}),
        (True, FloatingPointError, {"kept", "new"}),
        (False, FloatingPointError, {"kept"}),
    ]:
        try:
            with own_scope(base_model, base_guide, keep=keep):
                assert "kept" in store
                pyro.param("new", torch.zeros(1))
                if error is not None:
                    raise error
        except (ValueError, FloatingPointError):
            pass
        assert set(store) == names
        if "new" in store:
            del store["new"]


def test_modules_are_found_where_programs_hold_them():
    functions = pyro_module_function_pair()
    found = modules_of(functions.model, functions.guide)
    assert functions.decoder in found
    assert functions.encoder in found
    wrapped = pyro.poutine.scale(pyro.infer.config_enumerate(functions.model), scale=1.0)
    assert functions.decoder in modules_of(wrapped)
    assert GLOBAL in modules_of(uses_a_global)
    assert GLOBAL not in modules_of(base_model)


GLOBAL = nn.Linear(1, 1)


def uses_a_global(x: Tensor) -> Tensor:
    def inner() -> Tensor:
        return GLOBAL(x)

    return inner()


def test_a_flow_without_an_inverse_is_scored_at_its_own_draws():
    flow = planar(1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            base = dist.Normal(x[:, None] / 2, 0.9).to_event(1)
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    x = torch.tensor([-1.0, 0.0, 2.0])
    evidence = pv.log_marginal(model, guide, x, num_samples=5000, seed=0)
    assert evidence.reliable.all()
    assert evidence.log_px == pytest.approx(dist.Normal(0.0, math.sqrt(2)).log_prob(x).numpy(), abs=0.05)
