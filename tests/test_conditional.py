"""Models with labels, against sums over everything discrete and against linear-Gaussian evidence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from scipy.special import expit, log_softmax, logsumexp, softmax
from torch import Tensor, nn
from torch.optim import Adam

import pyrovae as pv
from pyrovae.compile.step import Step
from pyrovae.encoders import DiagonalNormal, Encoder
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.models.conditional import ConditionalVAE, SemiSupervisedVAE, make_conditional_vae, make_semi_supervised_vae
from pyrovae.nn import MLP
from pyrovae.priors import Prior, StandardNormal
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import names

C = 3
MAKERS = [make_conditional_vae, make_semi_supervised_vae]


def _labels(num: int, *, hidden: bool = False) -> Tensor:
    y = torch.arange(num) % C
    return torch.where(torch.arange(num) % 2 == 0, y, -1) if hidden else y


def _binary(num: int, *shape: int) -> Tensor:
    return torch.as_tensor(np.random.default_rng(0).integers(0, 2, (num, *shape))).float()


def _moved(module: nn.Module, by: float = 0.5) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))


# -- exact answers -----------------------------------------------------------------------------------------------------------


class _Four(Prior):
    """One of four corners, uniformly: a latent that can be summed."""

    def __init__(self) -> None:
        super().__init__(4)

    def forward(self) -> dist.Distribution:
        return dist.OneHotCategorical(torch.full((4,), 0.25))


class _Table(Encoder):
    """The exact posterior over the four, by Bayes' rule over all of the model's values."""

    def __init__(self, posterior: Callable[[Tensor], Tensor]):
        super().__init__(MLP(2 + C, []), 4)
        self.posterior = posterior

    def forward(self, x: Tensor) -> dist.Distribution:
        return dist.OneHotCategorical(self.posterior(x))


class _Tiny:
    """z in 4 corners, y in 3 classes, x in {0, 1}^2: log p(x, y, z) as a table, by NumPy alone."""

    def __init__(self, label_logits: np.ndarray):
        self.decoder = MLP(4 + C, [], 2)
        _moved(self.decoder, 1.0)
        weight, bias = (p.detach().numpy() for p in self.decoder.parameters())
        logits = weight.T[:4, None] + weight.T[None, 4:] + bias  # (4, C, 2)
        self.x = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=float)
        p = expit(logits)
        log_px = (self.x[:, None, None] * np.log(p) + (1 - self.x[:, None, None]) * np.log(1 - p)).sum(-1)  # (4, 4, C)
        self.given = log_px + np.log(0.25)  # log p(x, z|y): x, z, y
        self.joint = self.given + log_softmax(label_logits)

    def posterior(self, joint: np.ndarray) -> Callable[[Tensor], Tensor]:
        def table(seen: Tensor) -> Tensor:
            row = (2 * seen[:, 0] + seen[:, 1]).long().numpy()
            y = seen[:, 2:].numpy()
            known = np.where(y.sum(-1, keepdims=True) > 0, np.log(np.maximum(y, 1e-300)), 0.0)
            return torch.as_tensor(softmax(logsumexp(joint[row] + known[:, None], axis=-1), axis=-1))

        return table


@pytest.mark.usefixtures("float64")
def test_a_tiny_discrete_model_is_summed() -> None:
    """With the exact posterior as guide every weight is p(x, y) or p(x) = sum_yz p(x, y, z), both counted by hand."""
    logits = np.array([0.3, -0.7, 1.1])
    tiny = _Tiny(logits)
    vae = SemiSupervisedVAE(_Four(), Bernoulli(tiny.decoder), _Table(tiny.posterior(tiny.joint)), C)
    with torch.no_grad():
        vae.label_logits.copy_(torch.as_tensor(logits))
    x = torch.as_tensor(np.repeat(tiny.x, 4, axis=0))
    y = torch.tensor([-1, 0, 1, 2] * 4)
    with_label = logsumexp(tiny.joint, axis=1)  # (x, y)
    expected = np.column_stack([logsumexp(with_label, axis=1), with_label]).reshape(-1)
    assert_allclose(logsumexp(expected[::4]), 0.0, atol=1e-12)
    for labels in (y, (y[:, None] == torch.arange(C)).double()):
        log_w = pv.log_weights(vae.model, vae.guide, x, labels, num_particles=20).log_weights.detach()
        assert_allclose(log_w, np.broadcast_to(expected, (20, 16)), atol=1e-10)
        assert_allclose(vae.log_marginal((x, labels), num_samples=50).log_px, expected, atol=1e-10)
    # The guide is exact, so the average over samples of p(y|x, z) p(z|x) has p(y|x) as its mean.
    exact = np.exp(with_label - logsumexp(with_label, axis=1, keepdims=True))
    assert_allclose(vae.classify(torch.as_tensor(tiny.x), num_samples=20_000), exact, atol=0.02)


@pytest.mark.usefixtures("float64")
def test_reconstructions_average_over_what_the_data_say_of_the_label() -> None:
    """The weights are p(y|x, z), by Bayes' rule with scipy's densities, or the label that is known."""
    vae = SemiSupervisedVAE(StandardNormal(2), Normal(MLP(2 + C, [], 4), scale=0.7), DiagonalNormal(MLP(4 + C, []), 2), C)
    _moved(vae)
    x, y = torch.randn(9, 4), torch.tensor([-1, 0, 1, 2, -1, -1, 2, -1, -1])
    z = vae.encode(x, y).mean.detach()
    means = np.stack([vae.decode(z, torch.full((9,), c)).mean.detach() for c in range(C)], 1)  # (9, C, 4)
    log_joint = log_softmax(vae.label_logits.detach().numpy()) + stats.norm.logpdf(x.numpy()[:, None], means, 0.7).sum(-1)
    weight = np.where(y.numpy()[:, None] < 0, softmax(log_joint, axis=1), np.eye(C)[y.numpy()])
    assert_allclose(vae.reconstruct(x, y), (weight[..., None] * means).sum(1), rtol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("known", [0, 3, 6])
def test_a_known_label_is_no_dimension_of_the_data(known: int) -> None:
    vae = _semi()
    x, y = _binary(6, 5).double(), torch.where(torch.arange(6) < known, torch.arange(6) % C, -1)
    info = inspect_pair(vae.model, vae.guide, x, y)
    assert (info.num_dims, info.num_observed) == (5, 30)
    evidence = vae.log_marginal((x, y), num_samples=20, seed=0)
    assert evidence.num_dims == 5
    assert evidence.bits_per_dim == pytest.approx(-evidence.log_px.mean() / (5 * np.log(2)), rel=1e-12)
    assert pv.log_weights(vae.model, vae.guide, x, y, num_particles=1).num_dims == 5


@pytest.mark.usefixtures("float64")
def test_a_tiny_conditional_model_is_summed() -> None:
    tiny = _Tiny(np.zeros(C))
    vae = ConditionalVAE(_Four(), Bernoulli(tiny.decoder), _Table(tiny.posterior(tiny.given)), C)
    x, y = torch.as_tensor(np.repeat(tiny.x, C, axis=0)), torch.arange(C).repeat(4)
    expected = logsumexp(tiny.given, axis=1)  # log p(x|y)
    assert_allclose(np.exp(expected).sum(0), np.ones(C))
    assert_allclose(vae.log_marginal((x, y), num_samples=30).log_px, expected.reshape(-1), atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("cls", [ConditionalVAE, SemiSupervisedVAE])
def test_a_linear_model_agrees_within_its_standard_errors(cls: type) -> None:
    """x|z,y ~ N(Wz + u_y + b, s^2 I), so that p(x|y) is normal and p(x) a mixture of normals."""
    decoder, encoder = MLP(2 + C, [], 3), DiagonalNormal(MLP(3 + C, []), 2)
    _moved(decoder)
    nn.init.zeros_(encoder.loc.weight)  # the prior as guide, whose weights are bounded
    vae = cls(StandardNormal(2), Normal(decoder, scale=0.8), encoder, C)
    weight, bias = (p.detach().numpy() for p in decoder.parameters())
    W, U = weight[:, :2], weight[:, 2:]
    covariance = W @ W.T + 0.64 * np.eye(3)
    x, y = torch.randn(60, 3), torch.arange(60) % C
    given = np.stack([stats.multivariate_normal(U[:, c] + bias, covariance).logpdf(x.numpy()) for c in range(C)], 1)
    expected = given[range(60), y.numpy()]
    if cls is SemiSupervisedVAE:
        with torch.no_grad():
            vae.label_logits.copy_(torch.tensor([0.4, -0.6, 0.9]))
        joint = given + log_softmax(vae.label_logits.detach().numpy())
        y = torch.where(torch.arange(60) % 2 == 0, y, -1)
        expected = np.where(y.numpy() < 0, logsumexp(joint, axis=1), joint[range(60), y.numpy()])
    evidence = vae.log_marginal((x, y), num_samples=4000, seed=0)
    assert evidence.se.max() < 0.5
    assert (np.abs(evidence.log_px - expected) < 5 * evidence.se).all()
    if cls is SemiSupervisedVAE:
        assert_allclose(vae.classify(x, num_samples=4000), softmax(joint, axis=1), atol=0.1)


@pytest.mark.usefixtures("float64")
def test_conditions_enter_where_they_are_said_to() -> None:
    vae = make_conditional_vae(4, num_classes=C, latent_dim=2, hidden=[6], likelihood={"kind": "binomial", "total_count": 5})
    x, y, z = torch.randint(0, 6, (5, 4)).double(), torch.arange(5) % C, torch.randn(7, 5, 2)
    one_hot = torch.eye(C)[y]
    features = vae.encoder.body(torch.cat([x / 5, one_hot], -1))
    assert_allclose(vae.encode(x, y).mean.detach(), vae.encoder.loc(features).detach(), rtol=1e-12)
    logits = vae.likelihood.decoder(torch.cat([z, one_hot.expand(7, 5, C)], -1))
    assert_allclose(vae.decode(z[0], y).base_dist.logits.detach(), logits[0].detach(), rtol=1e-12)
    condition = torch.randn(5, C)
    assert vae.encode(x, condition).mean.shape == (5, 2)
    image = make_conditional_vae((1, 6, 6), num_classes=C, latent_dim=2, body="conv", hidden=[4])
    pixels = torch.rand(5, 1, 6, 6)
    planes = torch.cat([pixels, one_hot[..., None, None] * torch.ones(6, 6)], 1)
    assert_allclose(image.encode(pixels, y).mean.detach(), image.encoder(planes).mean.detach(), rtol=1e-12)


# -- valid Pyro --------------------------------------------------------------------------------------------------------------


# Pyro's own remark that nothing is there to enumerate.
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites:UserWarning")
@pytest.mark.parametrize("make", MAKERS)
def test_every_estimator_takes_a_step(make: Callable[..., ConditionalVAE]) -> None:
    x, y = _binary(9, 5), _labels(9, hidden=make is make_semi_supervised_vae)
    for name in names("estimator"):
        vae = make(5, num_classes=C, latent_dim=2, hidden=[6])
        history = vae.fit((x, y), estimator=name, epochs=1, batch_size=9, progress=False)
        assert np.isfinite(history.bound).all(), name
        assert all(parameter.isfinite().all() for parameter in vae.parameters()), name


@pytest.mark.parametrize("make", MAKERS)
def test_gradients_reach_every_parameter(make: Callable[..., ConditionalVAE]) -> None:
    x, y = _binary(9, 5), _labels(9, hidden=make is make_semi_supervised_vae)
    vae = make(5, num_classes=C, latent_dim=2, hidden=[6])
    weights = pv.log_weights(vae.model, vae.guide, x, y, num_particles=4)
    (weights.log_weights * torch.randn(4, 9)).sum().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("make", MAKERS)
def test_a_step_is_captured_and_equals_eager(make: Callable[..., ConditionalVAE]) -> None:
    x, y, found = _binary(9, 5), _labels(9, hidden=make is make_semi_supervised_vae), []
    for backend in ("eager", "aten"):
        pyro.set_rng_seed(3)
        vae = make(5, num_classes=C, latent_dim=2, hidden=[6])
        estimator = pv.estimators.DReG(3)
        estimator.loss(vae.model, vae.guide, x, y)  # finds the plates, as fit does before the first step
        step = Step(estimator, vae.model, vae.guide, Adam(vae.parameters(), lr=0.01), backend=backend)
        found.append([step(x, y).loss for _ in range(3)])
        assert step.reason is None
    assert_allclose(found[0], found[1], rtol=1e-5)


def test_semi_supervision_learns_to_classify() -> None:
    random = np.random.default_rng(0)
    prototypes = random.integers(0, 2, (C, 12))
    truth = random.integers(0, C, 200)
    x = torch.as_tensor(np.abs(prototypes[truth] - (random.random((200, 12)) < 0.1))).float()
    y = torch.where(torch.arange(200) < 30, torch.as_tensor(truth), -1)
    vae = make_semi_supervised_vae(12, num_classes=C, latent_dim=2, hidden=[16])
    vae.fit((x, y), epochs=30, batch_size=50, lr=0.02, progress=False, seed=0)
    found = vae.classify(x[30:], num_samples=20).argmax(-1).numpy()
    assert (found == truth[30:]).mean() > 0.9


@pytest.mark.parametrize("body", ["mlp", "conv"])
def test_shapes(body: str) -> None:
    x, y = _binary(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    options = {"num_classes": C, "latent_dim": 2, "body": body, "hidden": [4]}
    conditional = make_conditional_vae((1, 6, 6), **options)
    assert conditional.sample(y).shape == conditional.reconstruct(x, y).shape == x.shape
    semi = make_semi_supervised_vae((1, 6, 6), **options)
    some = torch.tensor([0, -1, 2, -1])
    assert semi.sample(4).shape == semi.sample(4, y).shape == semi.reconstruct(x, some).shape == x.shape
    assert_allclose(semi.classify(x).sum(-1), np.ones(4), rtol=1e-5)
    # A known label leaves nothing to average over.
    known = semi.decode(semi.encode(x, y).mean, y).mean
    assert_allclose(semi.reconstruct(x, y), known.detach(), rtol=1e-5)


@pytest.mark.parametrize("make", MAKERS)
def test_comes_back_the_same(tmp_path: Path, make: Callable[..., ConditionalVAE]) -> None:
    vae = make(5, num_classes=C, latent_dim=2, hidden=[6]).double()
    _moved(vae, 0.1)
    vae.save_pretrained(tmp_path)
    again = type(vae).from_pretrained(tmp_path)
    x, y = _binary(4, 5).double(), torch.tensor([0, 1, 2, 0])
    assert torch.equal(vae.reconstruct(x, y), again.reconstruct(x, y))
    with pytest.raises(ValueError, match="does not describe a VAE"):
        pv.VAE.from_pretrained(tmp_path)


# -- mistakes ----------------------------------------------------------------------------------------------------------------


def _small() -> ConditionalVAE:
    return make_conditional_vae(5, num_classes=C, latent_dim=2, hidden=[6])


def _semi() -> SemiSupervisedVAE:
    return make_semi_supervised_vae(5, num_classes=C, latent_dim=2, hidden=[6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: _small().model(torch.zeros(2, 5), torch.tensor([0, 3])),
            "Labels must lie between 0 and 2, got 0 to 3: renumber them, or set num_classes.",
        ),
        (
            lambda: _small().model(torch.zeros(2, 5), torch.tensor([0, -1])),
            "Labels must lie between 0 and 2, got -1 to 0: renumber them, or set num_classes.",
        ),
        (
            lambda: _semi().fit((torch.zeros(4, 5), torch.tensor([0, -1, -2, 1])), progress=False),
            "Labels must lie between -1 and 2, got -2 to 1: renumber them, or set num_classes.",
        ),
        (
            lambda: _semi().model(torch.zeros(2, 5), torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])),
            "A row of one-hot labels must have a single one, or be zeros if there is no label: correct the others.",
        ),
        (
            lambda: _small().model(torch.zeros(2, 5), torch.zeros(2)),
            "Labels must be integers of shape (2,) or one-hot of shape (2, 3), got torch.float32 of shape (2,).",
        ),
        (
            lambda: _small().model(torch.zeros(2, 5), torch.zeros(3, 3)),
            "Labels must be integers of shape (2,) or one-hot of shape (2, 3), got torch.float32 of shape (3, 3).",
        ),
        (lambda: make_conditional_vae(5, num_classes=0, latent_dim=2), "num_classes must be a positive integer, got 0."),
        (
            lambda: ConditionalVAE(StandardNormal(2), Bernoulli(MLP(2, [], 5)), DiagonalNormal(MLP(8, []), 2), C),
            "The parts disagree on what the decoder takes (latent and label 5, decoder 2): build them with the same one.",
        ),
        (
            lambda: ConditionalVAE(StandardNormal(2), Bernoulli(MLP(5, [], 5)), DiagonalNormal(MLP(5, []), 2), C),
            "The parts disagree on what the encoder takes (data and label (8,), encoder (5,)): build them with the same one.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_arrays_are_refused_with_the_cure() -> None:
    with pytest.raises(TypeError, match=r"Labels must be a tensor, got ndarray: write torch.as_tensor\(y\)"):
        _small().model(torch.zeros(2, 5), np.zeros(2))


def test_a_vamp_prior_is_refused() -> None:
    with pytest.raises(ValueError, match="this encoder takes labels too: choose another prior"):
        pv.make_conditional_vae(
            9, num_classes=3, latent_dim=2, hidden=[8], prior={"kind": "vamp", "components": 3, "data_shape": (9,)}
        )
