"""Likelihoods against SciPy, and what all of them must do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import integrate, special, stats
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.data import dequantize
from pyrovae.estimators import ELBO, IWAE
from pyrovae.likelihoods import (
    TYPICAL_LIBRARY,
    Bernoulli,
    Beta,
    BetaBinomial,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    Dequantized,
    DiscretizedLogistic,
    Laplace,
    Likelihood,
    Mixed,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from pyrovae.nn import MLP, ConvDecoder
from pyrovae.pairs import inspect_pair
from pyrovae.registry import build, describe, find, names
from pyrovae.staging import Step
from pyrovae.vae import VAE, make_vae

pytestmark = pytest.mark.usefixtures("float64")

EVENT = (2, 3)


def _decoder(num_parameters: int = 1) -> MLP:
    return MLP(4, [5], EVENT if num_parameters == 1 else (num_parameters, *EVENT), activation="tanh")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _softmax(out: np.ndarray) -> np.ndarray:
    """Over the event."""
    return np.exp(out - special.logsumexp(out, (-1, -2), keepdims=True))


def _logistic_levels(x: np.ndarray, out: np.ndarray, n: int) -> np.ndarray:
    """By SciPy's distribution function on the scale of the paper, on which levels are 2 / (n - 1) apart."""
    loc, scale = out[..., 0, :, :], np.exp(out[..., 1, :, :])
    above = np.where(x == n - 1, np.inf, (2 * x + 1) / (n - 1) - 1)
    below = np.where(x == 0, -np.inf, (2 * x - 1) / (n - 1) - 1)
    # Mirrored into the lower tail, where a difference of distribution functions keeps its digits.
    upper = above + below > 2 * loc
    law = stats.logistic(np.where(upper, -loc, loc), scale)
    return np.log(law.cdf(np.where(upper, -below, above)) - law.cdf(np.where(upper, -above, below)))


def _nbinom(x: np.ndarray, mean: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return stats.nbinom.logpmf(x, theta, theta / (theta + mean))


def _zinb(x: np.ndarray, mean: np.ndarray, gate: np.ndarray, theta: np.ndarray) -> np.ndarray:
    return np.log(gate * (x == 0) + (1 - gate) * np.exp(_nbinom(x, mean, theta)))


def _counts(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.poisson(3.0, shape)


def _real(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.normal(size=shape)


def _unit(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.random(size=shape)


def _up_to_6(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return random.integers(0, 7, shape)


# For each likelihood: how it is built, how x is drawn, and log p(x|z) per dimension from the decoder's output, and from what
# it learns besides.
CASES: dict[str, tuple[Callable[[], Likelihood], Callable[..., np.ndarray], Callable[..., np.ndarray]]] = {
    "bernoulli": (
        lambda: Bernoulli(_decoder()),
        lambda random, shape: random.integers(0, 2, shape),
        lambda x, out, _: stats.bernoulli.logpmf(x, _sigmoid(out)),
    ),
    "binomial": (
        lambda: Binomial(_decoder(), total_count=16),
        lambda random, shape: random.integers(0, 17, shape),
        lambda x, out, _: stats.binom.logpmf(x, 16, _sigmoid(out)),
    ),
    "normal": (
        lambda: Normal(_decoder()),
        lambda random, shape: random.normal(size=shape),
        lambda x, out, _: stats.norm.logpdf(x, out, 1.0),
    ),
    "normal fixed": (
        lambda: Normal(_decoder(), scale=0.3),
        lambda random, shape: random.normal(size=shape),
        lambda x, out, _: stats.norm.logpdf(x, out, 0.3),
    ),
    "normal shared": (
        lambda: Normal(_decoder(), scale="shared"),
        lambda random, shape: random.normal(size=shape),
        lambda x, out, log_scale: stats.norm.logpdf(x, out, np.exp(log_scale)),
    ),
    "normal per_dimension": (
        lambda: Normal(_decoder(), scale="per_dimension"),
        lambda random, shape: random.normal(size=shape),
        lambda x, out, log_scale: stats.norm.logpdf(x, out, np.exp(log_scale)),
    ),
    "normal decoder": (
        lambda: Normal(_decoder(2), scale="decoder"),
        lambda random, shape: random.normal(size=shape),
        lambda x, out, _: stats.norm.logpdf(x, out[..., 0, :, :], np.exp(out[..., 1, :, :])),
    ),
    "normal optimal": (
        lambda: Normal(_decoder(), scale="optimal"),
        _real,
        lambda x, out, _: stats.norm.logpdf(x, out, 1.0),
    ),
    "laplace": (
        lambda: Laplace(_decoder(), scale="per_dimension"),
        _real,
        lambda x, out, log_scale: stats.laplace.logpdf(x, out, np.exp(log_scale)),
    ),
    "student_t": (
        lambda: StudentT(_decoder(2), df=2.5, scale="decoder"),
        _real,
        lambda x, out, _: stats.t.logpdf(x, 2.5, out[..., 0, :, :], np.exp(out[..., 1, :, :])),
    ),
    "student_t shared": (
        lambda: StudentT(_decoder(), df="shared"),
        _real,
        lambda x, out, log_excess: stats.t.logpdf(x, 1 + 3 * np.exp(log_excess), out),
    ),
    "continuous_bernoulli": (
        lambda: ContinuousBernoulli(_decoder()),
        _unit,
        lambda x, out, _: out * x + np.log(out / np.expm1(out)),
    ),
    "beta": (
        lambda: Beta(_decoder(2)),
        _unit,
        lambda x, out, _: stats.beta.logpdf(x, np.exp(out[..., 0, :, :]), np.exp(out[..., 1, :, :])),
    ),
    "beta_binomial": (
        lambda: BetaBinomial(_decoder(2), total_count=6),
        _up_to_6,
        lambda x, out, _: stats.betabinom.logpmf(x, 6, np.exp(out[..., 0, :, :]), np.exp(out[..., 1, :, :])),
    ),
    "poisson": (
        lambda: Poisson(_decoder()),
        _counts,
        lambda x, out, _: stats.poisson.logpmf(x, np.exp(out)),
    ),
    "negative_binomial": (
        lambda: NegativeBinomial(_decoder()),
        _counts,
        lambda x, out, log_theta: _nbinom(x, np.exp(out), np.exp(log_theta)),
    ),
    "negative_binomial library": (
        lambda: NegativeBinomial(_decoder(2), dispersion="decoder", library=20),
        _counts,
        lambda x, out, _: _nbinom(x, 20 * _softmax(out[..., 0, :, :]), np.exp(out[..., 1, :, :])),
    ),
    "zero_inflated_negative_binomial": (
        lambda: ZeroInflatedNegativeBinomial(_decoder(2)),
        _counts,
        lambda x, out, log_theta: _zinb(
            x, TYPICAL_LIBRARY * _softmax(out[..., 0, :, :]), _sigmoid(out[..., 1, :, :]), np.exp(log_theta)
        ),
    ),
    "zero_inflated_negative_binomial fixed": (
        lambda: ZeroInflatedNegativeBinomial(_decoder(2), dispersion=2.5, library=None),
        _counts,
        lambda x, out, _: _zinb(x, np.exp(out[..., 0, :, :]), _sigmoid(out[..., 1, :, :]), np.full(EVENT, 2.5)),
    ),
    "categorical": (
        lambda: Categorical(_decoder(7), num_levels=7),
        _up_to_6,
        lambda x, out, _: np.take_along_axis(
            special.log_softmax(out, -3), np.broadcast_to(x, (*out.shape[:-3], *EVENT))[..., None, :, :], -3
        )[..., 0, :, :],
    ),
    "discretized_logistic": (
        lambda: DiscretizedLogistic(_decoder(2), num_levels=7),
        _up_to_6,
        lambda x, out, _: _logistic_levels(x, out, 7),
    ),
    "discretized_logistic mixture": (
        lambda: DiscretizedLogistic(_decoder(9), num_levels=7, components=3),
        _up_to_6,
        lambda x, out, _: special.logsumexp(
            [
                special.log_softmax(out[..., :3, :, :], -3)[..., c, :, :]
                + _logistic_levels(x, out[..., [3 + c, 6 + c], :, :], 7)
                for c in range(3)
            ],
            0,
        ),
    ),
    "dequantized": (
        lambda: Dequantized(_decoder(), {"kind": "normal", "scale": 0.3}, num_levels=7),
        lambda random, shape: random.integers(0, 7, shape) + random.random(size=shape),
        lambda x, out, _: stats.norm.logpdf(x, 7 * out, 7 * 0.3),
    ),
}


@pytest.mark.parametrize("name", sorted({*CASES, *names("likelihood")} - {"mixed"}))  # mixed: see its own test
def test_log_prob_is_scipys(name: str) -> None:
    assert name in CASES, f"add the density of {name} from SciPy, or by hand, to CASES"
    make, draw, reference = CASES[name]
    likelihood = make()
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    z = torch.randn(3, 7, 4)
    x = draw(np.random.default_rng(0), (7, *EVENT))
    besides = [par.detach().numpy() for name, par in likelihood.named_parameters() if not name.startswith("decoder.")]
    expected = reference(x, likelihood.decoder(z).detach().numpy(), *(besides or [None])).sum((-1, -2))
    # Data of shape (B, *event) meet parameters of shape (K, B, *event).
    found = likelihood(z).log_prob(torch.as_tensor(x, dtype=z.dtype))
    assert found.shape == (3, 7)
    assert_allclose(found.detach(), expected, rtol=1e-10)


@pytest.mark.parametrize(("scale", "shape"), [("shared", ()), ("per_dimension", EVENT)])
def test_learned_scales_start_at_one(scale: str, shape: tuple[int, ...]) -> None:
    likelihood = Normal(_decoder(), scale=scale)
    assert likelihood.log_scale.shape == shape
    assert torch.equal(likelihood(torch.randn(4)).stddev, torch.ones(EVENT))


@pytest.mark.parametrize("scale", [0.5, "decoder"])
def test_other_scales_add_no_parameter(scale: float | str) -> None:
    likelihood = Normal(_decoder(2 if scale == "decoder" else 1), scale=scale)
    assert len(list(likelihood.parameters())) == len(list(likelihood.decoder.parameters()))


def test_maximum_likelihood_of_the_shared_scale() -> None:
    """The gradient of the scale vanishes at the root mean square residual, and points to it from elsewhere."""
    likelihood = Normal(_decoder(), scale="shared")
    z, x = torch.randn(50, 4), torch.randn(50, *EVENT)
    residual = (x - likelihood.decoder(z)).square().mean().sqrt().item()
    for factor, sign in [(1.0, 0), (0.5, 1), (2.0, -1)]:
        with torch.no_grad():
            likelihood.log_scale.fill_(np.log(factor * residual))
        (gradient,) = torch.autograd.grad(likelihood(z).log_prob(x).sum(), likelihood.log_scale)
        assert abs(gradient) < 1e-10 if sign == 0 else gradient.sign() == sign


@pytest.mark.parametrize(
    ("make", "scale"),
    [(lambda: Bernoulli(_decoder()), 1.0), (lambda: Normal(_decoder()), 1.0), (lambda: Binomial(_decoder(), 16), 1 / 16)],
)
def test_in_scale_brings_data_to_unit_size(make: Callable[[], Likelihood], scale: float) -> None:
    assert make().in_scale == scale


def test_images_through_a_convolutional_decoder() -> None:
    likelihood = Normal(ConvDecoder(3, (2, 1, 8, 6), [4, 5]), scale="decoder")
    assert likelihood.event_shape == (1, 8, 6)
    law = likelihood(torch.randn(5, 2, 3))
    assert (law.batch_shape, law.event_shape) == ((5, 2), (1, 8, 6))


def test_any_module_decodes_when_the_shape_is_given() -> None:
    net = nn.Linear(4, 6)
    likelihood = Bernoulli(net, event_shape=6)
    z, x = torch.randn(5, 4), torch.ones(5, 6)
    assert_allclose(likelihood(z).log_prob(x).detach(), nn.functional.logsigmoid(net(z)).sum(-1).detach(), rtol=1e-12)


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, float("nan")])
def test_bernoulli_refuses_what_is_not_binary(value: float) -> None:
    with pytest.raises(ValueError, match="support"):
        Bernoulli(_decoder())(torch.zeros(4)).log_prob(torch.full(EVENT, value))


@pytest.mark.parametrize("value", [0.5, -1.0, 17.0])
def test_binomial_refuses_what_is_no_count(value: float) -> None:
    with pytest.raises(ValueError, match="support"):
        Binomial(_decoder(), 16)(torch.zeros(4)).log_prob(torch.full(EVENT, value))


def test_extreme_logits_stay_finite() -> None:
    """At logits of +-800 a probability rounds to 0 or 1; the log-probability is still n times the logit."""

    class Fixed(nn.Module):
        out_shape = (2,)

        def forward(self, z: Tensor) -> Tensor:
            return torch.tensor([800.0, -800.0]).expand(*z.shape[:-1], 2)

    z = torch.zeros(1)
    assert Bernoulli(Fixed())(z).log_prob(torch.tensor([0.0, 1.0])).item() == -1600
    assert Binomial(Fixed(), 16)(z).log_prob(torch.tensor([0.0, 16.0])).item() == -25600
    assert Binomial(Fixed(), 16)(z).log_prob(torch.tensor([16.0, 0.0])).item() == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Normal(_decoder(), scale="learned"),
            'scale is a positive number, "shared", "per_dimension", "decoder" or "optimal", not \'learned\'.',
        ),
        (lambda: Normal(_decoder(), scale=0.0), "A fixed scale is a positive number, not 0.0."),
        (lambda: Normal(_decoder(), scale=-1), "A fixed scale is a positive number, not -1."),
        (lambda: Normal(_decoder(), scale=float("nan")), "A fixed scale is a positive number, not nan."),
        (lambda: Normal(_decoder(), scale=float("inf")), "A fixed scale is a positive number, not inf."),
        (lambda: Normal(_decoder(), scale=None), "A fixed scale is a positive number, not None."),
        (lambda: Normal(_decoder(), scale=[1.0, 2.0]), "A fixed scale is a positive number, not [1.0, 2.0]."),
        (lambda: Binomial(_decoder(), 0), "total_count is a positive integer, not 0."),
        (lambda: Binomial(_decoder(), 1.5), "total_count is a positive integer, not 1.5."),
        (lambda: Binomial(_decoder(), "16"), "total_count is a positive integer, not '16'."),
        (
            lambda: Bernoulli(nn.Linear(4, 6)),
            "Linear does not say its out_shape: pass event_shape=... to Bernoulli.",
        ),
        (
            lambda: Bernoulli(MLP(4, [], 6), event_shape=(2, 3)),
            "Bernoulli takes 1 parameter(s) per dimension, so its decoder's out_shape must be (2, 3), not (6,).",
        ),
        (
            lambda: Normal(MLP(4, [], (3, 6)), scale="decoder"),
            "Normal takes 2 parameter(s) per dimension, so its decoder's out_shape must be (2, 6), not (3, 6).",
        ),
        (
            lambda: Normal(MLP(4, [], 2), scale="decoder"),
            "Normal takes 2 parameter(s) per dimension, so its decoder's out_shape must be (2, ...), not (2,).",
        ),
        (
            lambda: Bernoulli(nn.Linear(4, 6), event_shape=(2, 3))(torch.zeros(5, 4)),
            "The decoder of Bernoulli gave a tensor of shape (5, 6), which must end in (2, 3): reshape its output, or change "
            "event_shape.",
        ),
        (
            lambda: Normal(nn.Linear(4, 6), event_shape=6, scale="decoder")(torch.zeros(5, 4)),
            "The decoder of Normal gave a tensor of shape (5, 6), which must end in (2, 6): reshape its output, or change "
            "event_shape.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Likelihood must implement forward\(z\)"):
        Likelihood(_decoder())(torch.zeros(4))
