"""Hierarchies against linear-Gaussian chains, whose evidence and posterior are closed form."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from pyro import poutine
from scipy import stats
from torch import Tensor, nn
from torch.optim import Adam

import pyrovae as pv
from pyrovae.compile.step import Step
from pyrovae.encoders import DiagonalNormal, FullCovarianceNormal
from pyrovae.likelihoods import Normal
from pyrovae.models.guides import BottomUp, Ladder, Structured
from pyrovae.models.hierarchical import HierarchicalVAE, make_hierarchical_vae
from pyrovae.nn import MLP
from pyrovae.priors import StandardNormal
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import names

GUIDES = names("guide")


def _assign(layer: nn.Module, weight: object = None, bias: object = None) -> None:
    with torch.no_grad():
        for name, value in {"weight": weight, "bias": bias}.items():
            if value is not None:
                getattr(layer, name).copy_(torch.as_tensor(value))


def _normal(
    size: int, weight: np.ndarray, bias: np.ndarray, covariance: np.ndarray, spread: float = 0.0
) -> FullCovarianceNormal:
    """N(weight h + bias, covariance) as an encoder, its scales off by a factor exp(spread)."""
    encoder = FullCovarianceNormal(MLP(size, []), len(bias))
    tril = np.linalg.cholesky(covariance)
    _assign(encoder.loc, weight, bias)
    _assign(encoder.log_diagonal, bias=np.log(tril.diagonal()) + spread)
    if len(bias) > 1:
        _assign(encoder.below, bias=tril[np.tril_indices(len(bias), -1)])
    return encoder


def _posterior(weight: np.ndarray, noise: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For h ~ N(m, prior) and x|h ~ N(weight h, noise): the gain on x - weight m, and the covariance of h given x."""
    gain = prior @ weight.T @ np.linalg.inv(weight @ prior @ weight.T + noise)
    return gain, prior - gain @ weight @ prior


class Chain:
    """z2 ~ N(0, I), z1|z2 ~ N(A z2 + a, diag(s)^2), x|z1 ~ N(W z1 + b, r^2 I), and exact or inflated guides of each kind."""

    def __init__(self, *, diagonal: bool = False):
        random = np.random.default_rng(5)
        self.D, self.L1, self.L2 = (2, 2, 2) if diagonal else (4, 3, 2)
        self.A, self.W = random.normal(size=(self.L1, self.L2)), random.normal(size=(self.D, self.L1))
        if diagonal:
            self.A, self.W = np.diag(self.A.diagonal()), np.diag(self.W.diagonal())
        self.a, self.b = random.normal(size=self.L1), random.normal(size=self.D)
        self.s, self.r = np.array([0.5, 0.9, 0.7])[: self.L1], 0.6
        self.S, self.R = np.diag(self.s**2), self.r**2 * np.eye(self.D)
        self.mean, self.prior1 = self.W @ self.a + self.b, self.A @ self.A.T + self.S
        self.covariance = self.W @ self.prior1 @ self.W.T + self.R

    def log_px(self, x: Tensor) -> np.ndarray:
        return stats.multivariate_normal(self.mean, self.covariance).logpdf(x.numpy())

    def data(self, num: int) -> Tensor:
        return torch.as_tensor(np.random.default_rng(0).multivariate_normal(self.mean, self.covariance, num))

    def vae(self, kind: str, spread: float = 0.0) -> HierarchicalVAE:
        layer = DiagonalNormal(MLP(self.L2, []), self.L1)
        _assign(layer.loc, self.A, self.a)
        _assign(layer.log_scale, bias=np.log(self.s))
        likelihood = Normal(MLP(self.L1, [], self.D), scale=self.r)
        _assign(likelihood.decoder.layers[0], self.W, self.b)
        return HierarchicalVAE(StandardNormal(self.L2), [layer], likelihood, getattr(self, kind)(spread))

    def structured(self, spread: float = 0.0) -> Structured:
        top, top_cov = _posterior(self.W @ self.A, self.W @ self.S @ self.W.T + self.R, np.eye(self.L2))
        low, low_cov = _posterior(self.W, self.R, self.S)  # around the mean A z2 + a
        weight = np.hstack([low, (np.eye(self.L1) - low @ self.W) @ self.A])
        bias = self.a - low @ (self.W @ self.a + self.b)
        first = _normal(self.D + self.L2, weight, bias, low_cov, spread)
        return Structured(MLP(self.D, []), [first, _normal(self.D, top, -top @ self.mean, top_cov, spread)])

    def bottom_up(self, spread: float = 0.0) -> BottomUp:
        first, first_cov = _posterior(self.W, self.R, self.prior1)
        second, second_cov = _posterior(self.A, self.S, np.eye(self.L2))  # z2 given z1 needs no x
        return BottomUp(
            [
                _normal(self.D, first, self.a - first @ self.mean, first_cov, spread),
                _normal(self.L1, second, -second @ self.a, second_cov, spread),
            ]
        )

    def ladder(self, spread: float = 0.0) -> Ladder:
        """What x alone says of z1, which is exact where all is diagonal, and the exact marginals of z2."""
        precision = self.W.T @ self.W / self.r**2
        top, top_cov = _posterior(self.W @ self.A, self.W @ self.S @ self.W.T + self.R, np.eye(self.L2))
        first, second = DiagonalNormal(MLP(self.D, []), self.L1), DiagonalNormal(MLP(self.D, []), self.L2)
        pull = np.linalg.inv(precision) @ self.W.T / self.r**2
        _assign(first.loc, pull, -pull @ self.b)
        _assign(first.log_scale, bias=-0.5 * np.log(precision.diagonal()) + spread)
        _assign(second.loc, top, -top @ self.mean)
        _assign(second.log_scale, bias=0.5 * np.log(top_cov.diagonal()) + spread)
        return Ladder([MLP(self.D, []), MLP(self.D, [])], [first, second])


# -- exact answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "diagonal"), [("structured", False), ("bottom_up", False), ("ladder", True)])
def test_the_exact_posterior_has_constant_weights(kind: str, diagonal: bool) -> None:
    chain = Chain(diagonal=diagonal)
    vae, x = chain.vae(kind), chain.data(5)
    log_w = pv.log_weights(vae.model, vae.guide, x, num_particles=50).log_weights.detach()
    assert_allclose(log_w, np.broadcast_to(chain.log_px(x), (50, 5)), atol=1e-10)
    assert_allclose(vae.log_marginal(x, num_samples=30).log_px, chain.log_px(x), atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", GUIDES)
def test_an_inflated_guide_agrees_within_its_standard_errors(kind: str) -> None:
    chain = Chain()
    x = chain.data(300)
    evidence = chain.vae(kind, spread=0.3).log_marginal(x, num_samples=2000, seed=0)
    score = (evidence.log_px - chain.log_px(x)) / evidence.se
    assert evidence.se.min() > 1e-3, "a guide that is not exact has sampling error"
    assert np.abs(score).max() < 5
    assert abs(score.mean()) < 5 / 300**0.5
    assert (evidence.elbo < chain.log_px(x)).mean() > 0.99


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mean", [False, True])
def test_samples_have_the_moments_of_the_model(mean: bool) -> None:
    chain = Chain()
    x = chain.vae("ladder").sample(20_000, mean=mean)
    covariance = torch.as_tensor(chain.covariance - (chain.R if mean else 0.0))
    variances = covariance.diag()
    assert ((x.mean(0) - torch.as_tensor(chain.mean)).abs() < 5 * (variances / len(x)).sqrt()).all()
    error = ((variances[:, None] * variances + covariance**2) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 5 * error).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("kind", "diagonal"), [("structured", False), ("bottom_up", False), ("ladder", True)])
def test_reconstruction_is_at_the_posterior_mean(kind: str, diagonal: bool) -> None:
    """Means given means are the joint posterior's mean, since everything is linear."""
    chain = Chain(diagonal=diagonal)
    x = chain.data(4)
    gain, _ = _posterior(chain.W, chain.R, chain.prior1)
    mean = chain.a + (x.numpy() - chain.mean) @ gain.T
    assert_allclose(chain.vae(kind).embed(x).detach(), mean, rtol=1e-9)
    assert_allclose(chain.vae(kind).reconstruct(x), mean @ chain.W.T + chain.b, rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_ladder_is_bayes_rule_for_normals() -> None:
    chain = Chain()
    vae, x = chain.vae("ladder"), chain.data(3)
    site = poutine.trace(vae.guide).get_trace(x).nodes
    z2 = site["z2"]["value"].detach().numpy()
    evidence = vae.inference.encoders[0](x)
    distribution = site["z1"]["fn"]
    grid = np.linspace(-12, 12, 20_001)
    for i in range(chain.L1):
        prior = stats.norm((z2 @ chain.A.T + chain.a)[1, i], chain.s[i]).pdf(grid)
        seen = stats.norm(evidence.mean[1, i].item(), evidence.stddev[1, i].item()).pdf(grid)
        product = prior * seen / (prior * seen).sum()
        assert_allclose(distribution.mean[1, i].item(), (grid * product).sum(), rtol=1e-8)
        assert_allclose(distribution.variance[1, i].item(), (grid**2 * product).sum() - (grid * product).sum() ** 2, rtol=1e-6)


# -- valid Pyro, for every guide ---------------------------------------------------------------------------------------------


def _small(**options: object) -> HierarchicalVAE:
    given = {"data_shape": 6, "latent_dims": [3, 2], "hidden": [[8], [5]]} | options
    return make_hierarchical_vae(**given)  # type: ignore[arg-type]


def _binary(num: int, *shape: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(0).integers(0, 2, (num, *shape))).float()


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("kind", GUIDES)
def test_sites_shapes_and_gradients(kind: str, depth: int) -> None:
    vae = _small(latent_dims=[4, 3, 2][:depth], hidden=[[8], [5], [4]][:depth], guide=kind)
    x = _binary(5, 6)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    sites = [f"z{i + 1}" for i in range(depth)]
    down = [*reversed(sites)]
    assert [name for name in model.nodes if name in (*sites, "x")] == [*down, "x"]
    assert [name for name in guide.nodes if name in sites] == (sites if kind == "bottom_up" else down)
    assert [guide.nodes[site]["value"].shape for site in sites] == [(5, size) for size in vae.latent_dims]
    weights = pv.log_weights(vae.model, vae.guide, x, num_particles=3)
    assert weights.log_weights.shape == (3, 5)
    (weights.log_weights * torch.randn(3, 5)).sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        # Scales start with weights of zero, so that the layers before them are reached through the means.
        assert parameter.grad.abs().max() > 0, name
    assert vae.sample(7).shape == (7, 6)
    assert vae.reconstruct(x).shape == x.shape
    assert not vae.reconstruct(x).requires_grad


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", GUIDES)
def test_log_weights_are_the_factors_written_out(kind: str) -> None:
    vae, x = _small(guide=kind).double(), _binary(4, 6).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    trace = poutine.trace(vae.guide).get_trace(x)
    z1, z2 = (trace.nodes[site]["value"] for site in ("z1", "z2"))
    traced = poutine.trace(poutine.replay(vae.model, trace=trace)).get_trace(x).log_prob_sum() - trace.log_prob_sum()
    encoders, prior = vae.inference.encoders, vae.layers[0](z2)
    if kind == "bottom_up":
        q1, q2 = encoders[0](x), encoders[1](z1)
    elif kind == "structured":
        h = vae.inference.body(x)
        q1, q2 = encoders[0](torch.cat([h, z2], -1)), encoders[1](h)
    else:
        d1 = vae.inference.bodies[0](x)
        seen, q2 = encoders[0](d1), encoders[1](vae.inference.bodies[1](d1))
        precision = 1 / seen.variance + 1 / prior.variance
        mean = (seen.mean / seen.variance + prior.mean / prior.variance) / precision
        q1 = torch.distributions.Independent(torch.distributions.Normal(mean, precision**-0.5), 1)
    p2 = torch.distributions.Normal(0.0, 1.0).log_prob(z2).sum(-1)
    by_hand = vae.likelihood(z1).log_prob(x) + prior.log_prob(z1) + p2 - q1.log_prob(z1) - q2.log_prob(z2)
    assert_allclose(traced.item(), by_hand.sum().item(), rtol=1e-12)


@pytest.mark.parametrize("kind", GUIDES)
def test_latents_come_in_the_order_of_the_guide(kind: str) -> None:
    info = inspect_pair(_small(guide=kind).model, _small(guide=kind).guide, _binary(8, 6))
    assert info.latents == (("z1", "z2") if kind == "bottom_up" else ("z2", "z1"))
    assert info.not_reparameterized == ()


# Pyro's own remark that nothing is there to enumerate.
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
@pytest.mark.parametrize("kind", GUIDES)
def test_every_estimator_that_applies_takes_a_step(kind: str) -> None:
    x = _binary(8, 6)
    # A KL given parents is none of a guide that climbs while the model descends; Pyro itself says so, by a warning.
    unfit = {"trace_mean_field_elbo"} if kind == "bottom_up" else set()
    for name in sorted(set(names("estimator")) - unfit):
        vae = _small(guide=kind)
        start = copy.deepcopy(vae.state_dict())
        pyro.set_rng_seed(1)
        history = vae.fit(x, estimator=name, epochs=1, batch_size=8, progress=False)
        assert np.isfinite(history.bound).all(), name
        assert all(not torch.equal(start[key], value) for key, value in vae.state_dict().items() if "bias" in key), name


def test_generalised_dreg_reparameterises_the_conditional_prior() -> None:
    vae, x = _small(guide="structured"), _binary(4, 6)
    terms = pv.estimators.GDReG(num_particles=3).prior_terms(vae.model, vae.guide, x)
    assert terms == {"z2": "reparameterised", "z1": "reparameterised"}


@pytest.mark.parametrize("kind", GUIDES)
def test_a_step_is_captured_and_equals_eager(kind: str) -> None:
    x, found = _binary(8, 6), []
    for backend in ("eager", "aten"):
        pyro.set_rng_seed(3)
        vae = _small(guide=kind, name=f"{kind}.{backend}")
        estimator = pv.estimators.DReG(3)
        estimator.loss(vae.model, vae.guide, x)  # finds the plates, as fit does before the first step
        step = Step(estimator, vae.model, vae.guide, Adam(vae.parameters(), lr=0.01), backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append([step(x).loss for _ in range(3)])
        assert step.reason is None
    assert_allclose(found[0], found[1], rtol=1e-5)


@pytest.mark.parametrize("kind", GUIDES)
def test_training_improves_the_bound(kind: str) -> None:
    vae = _small(guide=kind)
    x = _binary(2, 6)[torch.arange(64) % 2]
    history = vae.fit(x, epochs=25, batch_size=16, lr=0.02, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0] + 1


# -- built by name, saved and loaded -----------------------------------------------------------------------------------------


def test_one_call_has_the_layers_of_the_two_layer_iwae() -> None:
    vae = make_hierarchical_vae((1, 28, 28), latent_dims=[100, 50], hidden=[[200, 200], [100, 100]], guide="bottom_up")
    linear = {name: tuple(p.shape) for name, p in vae.named_parameters() if name.endswith("weight")}
    assert linear == {
        "inference.encoders.0.body.layers.0.weight": (200, 784),
        "inference.encoders.0.body.layers.2.weight": (200, 200),
        "inference.encoders.0.loc.weight": (100, 200),
        "inference.encoders.0.log_scale.weight": (100, 200),
        "inference.encoders.1.body.layers.0.weight": (100, 100),
        "inference.encoders.1.body.layers.2.weight": (100, 100),
        "inference.encoders.1.loc.weight": (50, 100),
        "inference.encoders.1.log_scale.weight": (50, 100),
        "layers.0.body.layers.0.weight": (100, 50),
        "layers.0.body.layers.2.weight": (100, 100),
        "layers.0.loc.weight": (100, 100),
        "layers.0.log_scale.weight": (100, 100),
        "likelihood.decoder.layers.0.weight": (200, 100),
        "likelihood.decoder.layers.2.weight": (200, 200),
        "likelihood.decoder.layers.4.weight": (784, 200),
    }
    assert sum(isinstance(module, nn.Tanh) for module in vae.modules()) == 8
    again = make_hierarchical_vae((1, 28, 28), latent_dims=[100, 50])
    assert [p.shape for p in again.parameters()] == [p.shape for p in vae.parameters()]


@pytest.mark.parametrize("kind", GUIDES)
@pytest.mark.parametrize("body", ["conv", "resnet", "gated_mlp"])
def test_any_body_sees_the_data(kind: str, body: str) -> None:
    counts = {"kind": "binomial", "total_count": 4}
    vae = _small(data_shape=(1, 9, 8), guide=kind, body=body, hidden=[[3, 4], [5]], likelihood=counts, activation=None)
    assert vae.log_marginal(_binary(3, 1, 9, 8), num_samples=5).log_px.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GUIDES)
def test_comes_back_the_same(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    vae = _small(guide=kind, likelihood={"kind": "binomial", "total_count": 2}).to(dtype)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vae.save_pretrained(tmp_path)
    again = HierarchicalVAE.from_pretrained(tmp_path)
    assert again.name != vae.name
    x = _binary(5, 6).to(dtype)
    assert torch.equal(again.reconstruct(x), vae.reconstruct(x))
    assert again.reconstruct(x).dtype == dtype
    found = [pv.log_marginal(each.model, each.guide, x, num_samples=10, seed=0).log_px for each in (vae, again)]
    assert np.array_equal(*found)


def test_another_models_folder_is_refused(tmp_path: Path) -> None:
    _small().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"does not describe a VAE but a HierarchicalVAE: call HierarchicalVAE\.from_pretrained\."
    ):
        pv.VAE.from_pretrained(tmp_path)


def test_a_copy_has_a_name_and_layers_of_its_own() -> None:
    vae, x = _small(guide="ladder"), _binary(4, 6)
    vae.guide(x)
    twin = copy.deepcopy(vae)
    assert twin.name != vae.name
    before = copy.deepcopy(vae.state_dict())
    twin.fit(x, epochs=1, progress=False)
    assert all(torch.equal(before[name], value) for name, value in vae.state_dict().items())


def _parts() -> SimpleNamespace:
    return SimpleNamespace(
        prior=StandardNormal(2),
        layer=DiagonalNormal(MLP(2, []), 3),
        likelihood=Normal(MLP(3, [], 6)),
        low=DiagonalNormal(MLP(6, []), 3),
        high=DiagonalNormal(MLP(3, []), 2),
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: _small(guide="laddr"), "There is no guide 'laddr'; did you mean 'ladder'?"),
        (
            lambda p: _small(latent_dims=[3]),
            "latent_dims must hold two sizes or more, got [3]: for one layer, call make_vae.",
        ),
        (
            lambda p: _small(hidden=[[8]]),
            "hidden must have a list of widths for each of 2 layers, as [[200, 200], [100, 100]], got [[8]].",
        ),
        (lambda p: _small(latent_dims=[3, 0]), "Each of latent_dims must be a positive integer, got 0."),
        (
            lambda p: _small(guide="ladder", encoder="full_covariance_normal"),
            "The encoders of the guide must be diagonal normals for a ladder, got a FullCovarianceNormal: choose "
            "'diagonal_normal' there, or a 'structured' guide.",
        ),
        (
            lambda p: _small(guide="ladder", layer="full_covariance_normal"),
            "The encoders of the model must be diagonal normals for a ladder, got a FullCovarianceNormal: choose "
            "'diagonal_normal' there, or a 'structured' guide.",
        ),
        (
            lambda p: _small(prior=StandardNormal(5)),
            "The parts disagree on the layers (guide (3, 2), model (3, 5)): build them with the same one.",
        ),
        (
            lambda p: BottomUp([p.low, p.low]),
            "The parts disagree on the size of z1 (q(z1) 3, q(z2|z1) 6): build them with the same one.",
        ),
        (
            lambda p: BottomUp([p.low]),
            "A hierarchy's guide must have an encoder for each of two or more layers, got 1.",
        ),
        (
            lambda p: Structured(MLP(6, []), [p.low, p.high]),
            "The parts disagree on the input of q(z1) (features and parent 8, encoder 6): build them with the same one.",
        ),
        (
            lambda p: Ladder([MLP(6, []), MLP(5, [3])], [p.low, p.high]),
            "The parts disagree on the size of d1 (f1 6, f2 5): build them with the same one.",
        ),
        (
            lambda p: HierarchicalVAE(p.prior, [p.layer], Normal(MLP(4, [], 6)), BottomUp([p.low, p.high])),
            "The parts disagree on the size of z1 (layer 3, decoder 4): build them with the same one.",
        ),
        (
            lambda p: HierarchicalVAE(p.prior, [p.layer], Normal(MLP(3, [], 5)), BottomUp([p.low, p.high])),
            "The parts disagree on the shape of one datum (guide (6,), likelihood (5,)): build them with the same one.",
        ),
        (
            lambda p: HierarchicalVAE(p.prior, [DiagonalNormal(MLP(4, []), 3)], p.likelihood, BottomUp([p.low, p.high])),
            "The parts disagree on the size of z2 (layer above 2, p(z1|z2) 4): build them with the same one.",
        ),
        (
            lambda p: HierarchicalVAE(p.prior, [], p.likelihood, BottomUp([p.low, p.high])),
            "layers must be a list of one encoder or more, p(z1|z2), ...: for a model of one layer, make a VAE.",
        ),
        (
            lambda p: HierarchicalVAE(p.prior, [p.layer], p.likelihood, p.low),
            "The guide must be a pyrovae.models.guides.Guide, got a DiagonalNormal: build one, or subclass it.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[SimpleNamespace], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(_parts())


@pytest.mark.parametrize("guide", GUIDES)
def test_the_data_enter_every_guide_at_about_unit_size(guide: str) -> None:
    """Counts up to 20 give what the same networks make of the counts over 20 where nothing is scaled."""
    sites = []
    x = torch.randint(0, 21, (5, 9)).float()
    for likelihood, shown in (({"kind": "binomial", "total_count": 20}, x), ("bernoulli", x / 20)):
        torch.manual_seed(0)
        vae = pv.make_hierarchical_vae(9, latent_dims=[3, 2], hidden=[[8], [6]], guide=guide, likelihood=likelihood)
        trace = poutine.trace(vae.guide).get_trace(shown)
        sites.append([trace.nodes[name]["fn"].base_dist for name in ("z1", "z2")])
    for ours, theirs in zip(*sites, strict=True):
        torch.testing.assert_close((ours.mean, ours.stddev), (theirs.mean, theirs.stddev))


@pytest.mark.parametrize("guide", ["ladder", "structured"])
@pytest.mark.parametrize("likelihood", ["bernoulli", {"kind": "binomial", "total_count": 20}])
def test_a_vamp_prior_on_top_is_the_aggregate_posterior_of_its_pseudo_inputs(
    guide: str, likelihood: Any, tmp_path: Path
) -> None:
    x = torch.bernoulli(torch.full((7, 9), 0.4)) if likelihood == "bernoulli" else torch.randint(0, 21, (7, 9)).float()
    prior = {"kind": "vamp", "components": 7}
    vae = pv.make_hierarchical_vae(9, latent_dims=[3, 2], hidden=[[8], [6]], guide=guide, prior=prior, likelihood=likelihood)
    vae.prior.from_data(x)
    z = torch.randn(4, 2)
    trace = poutine.trace(vae.guide).get_trace(x)
    posteriors = trace.nodes["z2"]["fn"]
    expected = torch.logsumexp(posteriors.log_prob(z[:, None]), 1) - math.log(7)
    torch.testing.assert_close(vae.prior().log_prob(z), expected)
    vae.fit(x, epochs=3, progress=False)
    vae.save_pretrained(tmp_path)
    torch.testing.assert_close(pv.HierarchicalVAE.from_pretrained(tmp_path).prior().log_prob(z), vae.prior().log_prob(z))


def test_a_vamp_prior_is_refused_by_a_guide_that_climbs() -> None:
    with pytest.raises(ValueError, match="choose the guide 'ladder' or 'structured'"):
        pv.make_hierarchical_vae(9, latent_dims=[3, 2], hidden=[[8], [6]], guide="bottom_up", prior="vamp")


@pytest.mark.parametrize("guide", ["bottom_up", "ladder", "structured"])
def test_what_a_mask_hides_changes_nothing(guide: str) -> None:
    vae = pv.make_hierarchical_vae(9, latent_dims=[3, 2], hidden=[[8], [6]], guide=guide)
    x = torch.bernoulli(torch.full((5, 9), 0.4))
    mask = torch.rand(5, 9) < 0.6
    scores = [vae.log_marginal((each, mask), num_samples=20, seed=0).log_px for each in (x, torch.where(mask, x, 1 - x))]
    np.testing.assert_array_equal(*scores)
