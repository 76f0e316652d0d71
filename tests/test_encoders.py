"""Encoders against SciPy."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from parts import spec
from pyro.distributions import constraints
from scipy import special, stats
from torch import nn

from pyrovae.encoders import (
    DiagonalNormal,
    Encoder,
    Flow,
    FullCovarianceNormal,
    LowRankNormal,
    Mixture,
    PowerSpherical,
    RelaxedOneHot,
)
from pyrovae.estimators.base import make_estimator
from pyrovae.models.vae import make_vae
from pyrovae.nn import MLP, ConvEncoder
from pyrovae.registry import build, names

pytestmark = pytest.mark.usefixtures("float64")


def _perturbed(encoder: Encoder) -> Encoder:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _low_rank(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    found = []
    for features, value in zip(h, z, strict=True):
        factor = _numpy(encoder.factor(features)).reshape(encoder.latent_dim, encoder.rank)
        covariance = factor @ factor.T + np.diag(np.exp(2 * _numpy(encoder.log_scale(features))))
        found.append(stats.multivariate_normal(_numpy(encoder.loc(features)), covariance).logpdf(value))
    return np.array(found)


def _mixture(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    shape = (len(h), encoder.components, encoder.latent_dim)
    loc, scale = _numpy(encoder.loc(h)).reshape(shape), np.exp(_numpy(encoder.log_scale(h))).reshape(shape)
    parts = stats.norm.logpdf(z[:, None], loc, scale).sum(-1)
    return special.logsumexp(special.log_softmax(_numpy(encoder.logits(h)), -1) + parts, axis=-1)


def _flow(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    """The change of variables from the base, the Jacobian of the sampler by autograd."""
    found = []
    for features, value in zip(h, torch.as_tensor(z), strict=True):
        sampler = encoder.transform(features)
        noise = sampler.inv(value)
        assert_allclose(_numpy(sampler(noise)), value, rtol=1e-8)
        jacobian = torch.autograd.functional.jacobian(sampler, noise)
        base = encoder.base
        normal = stats.norm(_numpy(base.loc(features)), np.exp(_numpy(base.log_scale(features))))
        found.append(normal.logpdf(_numpy(noise)).sum() - np.linalg.slogdet(_numpy(jacobian))[1])
    return np.array(found)


def _power_spherical(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    """The density of the angle to mu, by the Beta distribution of its cosine, spread over the sphere at right angles."""
    size = encoder.latent_dim
    loc = _numpy(encoder.loc(h))
    cosine = (z * loc / np.linalg.norm(loc, axis=-1, keepdims=True)).sum(-1)
    kappa = (size - 1) * np.exp(_numpy(encoder.log_concentration(h))[:, 0])
    beta = stats.beta((size - 1) / 2 + kappa, (size - 1) / 2)
    area_below = np.log(2) + (size - 1) / 2 * np.log(np.pi) - special.gammaln((size - 1) / 2)
    return beta.logpdf((1 + cosine) / 2) - np.log(2) - area_below - (size - 3) / 2 * np.log(1 - cosine**2)


def _relaxed(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    tau, size, log_pi = encoder.temperature, encoder.latent_dim, special.log_softmax(_numpy(encoder.logits(h)), -1)
    inner = special.logsumexp(log_pi - tau * np.log(z), axis=-1)
    return special.gammaln(size) + (size - 1) * np.log(tau) - size * inner + (log_pi - (tau + 1) * np.log(z)).sum(-1)


def _full_covariance(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    size = encoder.latent_dim
    found = []
    for features, value in zip(h, z, strict=True):
        factor = np.diag(np.exp(encoder.log_diagonal(features).numpy()))
        if size > 1:
            factor[np.tril_indices(size, -1)] = encoder.below(features).numpy()
        found.append(stats.multivariate_normal(encoder.loc(features).numpy(), factor @ factor.T).logpdf(value))
    return np.array(found)


# log q(z|x) from the features of the body; one that is not here has the quadrature of test_contracts.py.
REFERENCE: dict[str, Callable[[Encoder, torch.Tensor, np.ndarray], np.ndarray]] = {
    "diagonal_normal": lambda encoder, h, z: stats.norm.logpdf(
        z, encoder.loc(h).numpy(), np.exp(encoder.log_scale(h).numpy())
    ).sum(-1),
    "full_covariance_normal": _full_covariance,
    "low_rank_normal": _low_rank,
    "mixture": _mixture,
    "flow": _flow,
    "power_spherical": _power_spherical,
    "relaxed_one_hot": _relaxed,
    "categorical": lambda encoder, h, z: (z * special.log_softmax(_numpy(encoder.logits(h)), -1)).sum(-1),
}


def _sizes(name: str) -> list[int]:
    return [2, 3] if name in ("power_spherical", "relaxed_one_hot") else [1, 3]


@pytest.mark.parametrize(("name", "latent_dim"), [(name, size) for name in REFERENCE for size in _sizes(name)])
@torch.no_grad()
def test_log_prob_is_the_reference(name: str, latent_dim: int) -> None:
    body = MLP((2, 3), [7], activation="tanh")
    encoder = _perturbed(build("encoder", spec("encoder", name), body=body, latent_dim=latent_dim, in_scale=0.25))
    x = torch.randn(6, 2, 3)
    z = torch.randn(6, latent_dim) if type(encoder).support is constraints.real_vector else encoder(x).sample()
    expected = REFERENCE[name](encoder, body(x / 4), z.numpy())
    assert_allclose(encoder(x).log_prob(z), expected, rtol=1e-9, atol=1e-12)


def test_full_covariance_is_not_its_transpose_and_not_diagonal() -> None:
    encoder = _perturbed(FullCovarianceNormal(MLP(3, []), 3))
    distribution = encoder(torch.randn(3))
    factor = distribution.scale_tril
    assert torch.equal(factor, factor.tril())
    assert (factor.tril(-1)[torch.ones(3, 3).tril(-1).bool()].abs() > 0.01).all()
    z = distribution.sample((20_000,))
    covariance = (factor @ factor.T).detach()
    variances = covariance.diag()
    error = ((variances[:, None] * variances + covariance**2) / len(z)).sqrt()
    assert ((torch.cov(z.T) - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("name", REFERENCE)
def test_scale_starts_the_same_for_every_datum(name: str) -> None:
    distribution = build("encoder", name, body=MLP(4, [8]), latent_dim=2)(100 * torch.randn(9, 4))
    if name == "flow":
        distribution = distribution.dist.base
    if name == "mixture":
        distribution = distribution.component_distribution
    if name == "power_spherical":
        assert torch.equal(distribution.concentration, torch.ones(9))
    elif name == "low_rank_normal":
        assert torch.equal(distribution.cov_diag, torch.ones(9, 2))
        assert torch.equal(distribution.cov_factor, distribution.cov_factor[:1].expand(9, 2, 2))
        assert distribution.cov_factor.abs().max() < 1
    elif name not in ("relaxed_one_hot", "categorical"):  # which have no scale
        assert torch.equal(distribution.stddev, torch.ones_like(distribution.mean))


@pytest.mark.parametrize("family", ["iaf", "coupling", "nsf"])
@pytest.mark.parametrize("estimator", ["elbo", "stl", "dreg"])
def test_a_flow_starts_as_its_base_under_every_gradient(family: str, estimator: str) -> None:
    """At the identity: the same bound and the same gradients as the base alone, with its density found by inversion."""
    x, found = torch.rand(5, 6).round(), {}
    base = make_vae(6, latent_dim=3, hidden=[8])
    flow = make_vae(6, latent_dim=3, hidden=[8], encoder={"kind": "flow", "family": family, "hidden": [8]})
    flow.likelihood.load_state_dict(base.likelihood.state_dict())
    flow.encoder.body.load_state_dict(base.encoder.body.state_dict())
    flow.encoder.base.load_state_dict(base.encoder.state_dict(), strict=False)
    for vae in (base, flow):
        pyro.set_rng_seed(4)
        loss = make_estimator({"kind": estimator, "num_particles": 3}).differentiable_loss(vae.model, vae.guide, x)
        loss.backward()
        heads = vae.encoder if vae is base else vae.encoder.base
        gradients = [heads.loc.weight.grad, heads.log_scale.weight.grad, *(p.grad for p in vae.likelihood.parameters())]
        found[vae.name] = torch.cat([loss.detach()[None], *(gradient.flatten() for gradient in gradients)])
    assert_allclose(found[flow.name], found[base.name], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in names("encoder") if name != "categorical"])
def test_the_density_is_the_same_at_detached_draws(name: str) -> None:
    """What STL, DReG and their like read beside the density of a draw itself."""
    encoder = _perturbed(build("encoder", spec("encoder", name), body=MLP(4, [8]), latent_dim=3))
    distribution = encoder(torch.randn(6, 4)).expand((7, 6))
    z = distribution.rsample()
    assert z.requires_grad
    assert_allclose(_numpy(distribution.log_prob(z.detach())), _numpy(distribution.log_prob(z)), rtol=1e-7)


def test_the_body_of_a_flow_has_one_owner() -> None:
    encoder = Flow(MLP(4, [8]), 2)
    assert not [name for name in encoder.state_dict() if name.startswith("base.body")]
    assert len([name for name in encoder.state_dict() if name.endswith("layers.0.weight")]) == 1
    assert not dict(encoder.named_buffers(remove_duplicate=False)).keys() & encoder.state_dict().keys()


def test_a_mixture_of_one_is_a_diagonal_normal() -> None:
    x, z = torch.randn(5, 4), torch.randn(5, 2)
    mixture, normal = Mixture(MLP(4, [8]), 2, components=1), DiagonalNormal(MLP(4, [8]), 2)
    normal.load_state_dict({key: value for key, value in mixture.state_dict().items() if not key.startswith("logits")})
    assert_allclose(_numpy(mixture(x).log_prob(z)), _numpy(normal(x).log_prob(z)), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_are_scaled_in_floating_point(dtype: torch.dtype) -> None:
    counts = torch.tensor([[0, 8, 16]])
    encoder = DiagonalNormal(MLP(3, [4]), 2, in_scale=1 / 16)
    assert torch.equal(encoder(counts.to(dtype)).mean, encoder(counts.double()).mean)


def test_convolutional_body() -> None:
    encoder = FullCovarianceNormal(ConvEncoder((1, 8, 8), [2, 3]), 2)
    distribution = encoder(torch.randn(4, 5, 1, 8, 8))
    assert (distribution.batch_shape, distribution.event_shape) == ((4, 5), (2,))


def test_features_of_any_shape_are_flattened() -> None:
    encoder = DiagonalNormal(MLP(3, [4], (2, 5)), 2)
    assert encoder.num_features == 10
    assert encoder(torch.randn(7, 3)).batch_shape == (7,)


def test_any_module_encodes_when_the_features_are_counted() -> None:
    encoder = DiagonalNormal(nn.Linear(3, 6), 2, num_features=6)
    assert encoder(torch.randn(7, 3)).event_shape == (2,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DiagonalNormal(nn.Linear(3, 6), 2),
            "The body must have an attribute out_shape, got a Linear without: pass num_features=... to DiagonalNormal.",
        ),
        (lambda: DiagonalNormal(MLP(3, [6]), 0), "latent_dim must be a positive integer, got 0."),
        (lambda: FullCovarianceNormal(MLP(3, [6]), 1.5), "latent_dim must be a positive integer, got 1.5."),
        (lambda: Flow(MLP(3, [6]), 2, family="maf"), "There is no family 'maf'; choose one of coupling, iaf, nsf."),
        (
            lambda: Flow(MLP(3, [6]), 2, base="power_spherical"),
            "base must be an encoder on all real vectors, got 'power_spherical': choose 'diagonal_normal', say.",
        ),
        (lambda: Flow(MLP(3, [6]), 2, base="diagonal"), "There is no encoder 'diagonal'; did you mean 'diagonal_normal'?"),
        (lambda: LowRankNormal(MLP(3, [6]), 2, rank=0), "rank must be a positive integer, got 0."),
        (lambda: Mixture(MLP(3, [6]), 2, components=0), "components must be a positive integer, got 0."),
        (lambda: RelaxedOneHot(MLP(3, [6]), 2, temperature=0), "temperature must be a positive number, got 0."),
        (lambda: PowerSpherical(MLP(3, [6]), 1), "latent_dim must be at least 2 for a sphere, got 1: raise it."),
        (
            lambda: DiagonalNormal(MLP(3, [6]), 2, num_features=5),
            "num_features must be 6, as out_shape of MLP says, got 5: leave it out.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Encoder must implement forward\(x\)"):
        Encoder(MLP(3, [4]), 2)(torch.zeros(3))
