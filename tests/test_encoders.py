"""Encoders against SciPy."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch import nn

from pyrovae.encoders import DiagonalNormal, Encoder, FullCovarianceNormal
from pyrovae.nn import MLP, ConvEncoder
from pyrovae.registry import build, names

pytestmark = pytest.mark.usefixtures("float64")


def _perturbed(encoder: Encoder) -> Encoder:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return encoder


def _full_covariance(encoder: Encoder, h: torch.Tensor, z: np.ndarray) -> np.ndarray:
    size = encoder.latent_dim
    found = []
    for features, value in zip(h, z, strict=True):
        factor = np.diag(np.exp(encoder.log_diagonal(features).numpy()))
        if size > 1:
            factor[np.tril_indices(size, -1)] = encoder.below(features).numpy()
        found.append(stats.multivariate_normal(encoder.loc(features).numpy(), factor @ factor.T).logpdf(value))
    return np.array(found)


# log q(z|x) from the features of the body: a new encoder brings its own.
REFERENCE: dict[str, Callable[[Encoder, torch.Tensor, np.ndarray], np.ndarray]] = {
    "diagonal_normal": lambda encoder, h, z: stats.norm.logpdf(
        z, encoder.loc(h).numpy(), np.exp(encoder.log_scale(h).numpy())
    ).sum(-1),
    "full_covariance_normal": _full_covariance,
}


@pytest.mark.parametrize("latent_dim", [1, 3])
@pytest.mark.parametrize("name", names("encoder"))
@torch.no_grad()
def test_log_prob_is_the_reference(name: str, latent_dim: int) -> None:
    assert name in REFERENCE, f"add the density of {name} from SciPy, or by hand, to REFERENCE"
    body = MLP((2, 3), [7], activation="tanh")
    encoder = _perturbed(build("encoder", name, body=body, latent_dim=latent_dim, in_scale=0.25))
    x, z = torch.randn(6, 2, 3), torch.randn(6, latent_dim)
    expected = REFERENCE[name](encoder, body(x / 4), z.numpy())
    assert_allclose(encoder(x).log_prob(z), expected, rtol=1e-10)


def test_full_covariance_is_not_its_transpose_and_not_diagonal() -> None:
    encoder = _perturbed(FullCovarianceNormal(MLP(3, []), 3))
    law = encoder(torch.randn(3))
    factor = law.scale_tril
    assert torch.equal(factor, factor.tril())
    assert (factor.tril(-1)[torch.ones(3, 3).tril(-1).bool()].abs() > 0.01).all()
    z = law.sample((20_000,))
    covariance = (factor @ factor.T).detach()
    variances = covariance.diag()
    error = ((variances[:, None] * variances + covariance**2) / len(z)).sqrt()
    assert ((torch.cov(z.T) - covariance).abs() < 5 * error).all()


@pytest.mark.parametrize("name", names("encoder"))
def test_scale_starts_at_one_for_every_datum(name: str) -> None:
    law = build("encoder", name, body=MLP(4, [8]), latent_dim=2)(100 * torch.randn(9, 4))
    assert torch.equal(law.stddev, torch.ones(9, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_are_scaled_in_floating_point(dtype: torch.dtype) -> None:
    counts = torch.tensor([[0, 8, 16]])
    encoder = DiagonalNormal(MLP(3, [4]), 2, in_scale=1 / 16)
    assert torch.equal(encoder(counts.to(dtype)).mean, encoder(counts.double()).mean)


def test_convolutional_body() -> None:
    encoder = FullCovarianceNormal(ConvEncoder((1, 8, 8), [2, 3]), 2)
    law = encoder(torch.randn(4, 5, 1, 8, 8))
    assert (law.batch_shape, law.event_shape) == ((4, 5), (2,))


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
            "Linear does not say its out_shape: pass num_features=... to DiagonalNormal.",
        ),
        (lambda: DiagonalNormal(MLP(3, [6]), 0), "latent_dim is a positive integer, not 0."),
        (lambda: FullCovarianceNormal(MLP(3, [6]), 1.5), "latent_dim is a positive integer, not 1.5."),
        (lambda: DiagonalNormal(MLP(3, [6]), 2, num_features=5), "MLP gives 6 features, not 5: leave num_features out."),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Encoder must implement forward\(x\)"):
        Encoder(MLP(3, [4]), 2)(torch.zeros(3))
