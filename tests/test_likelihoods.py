"""Likelihoods against SciPy, and what all of them must do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from parts import LIKELIHOOD_OPTIONS, MIXED_PARTS, SHAPE, draw_data, small_likelihood, small_vae_of, spec
from scipy import special, stats
from torch import Tensor, nn

from pyrovae import distributions
from pyrovae.compile.step import Step
from pyrovae.data.datasets import dequantize
from pyrovae.estimators.elbo import ELBO
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
from pyrovae.models.vae import make_vae
from pyrovae.nn import MLP, ConvDecoder
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import build

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
    distribution = stats.logistic(np.where(upper, -loc, loc), scale)
    return np.log(distribution.cdf(np.where(upper, -below, above)) - distribution.cdf(np.where(upper, -above, below)))


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


@pytest.mark.parametrize("name", CASES)  # mixed has its own test
def test_log_prob_is_scipys(name: str) -> None:
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
    distribution = likelihood(torch.randn(5, 2, 3))
    assert (distribution.batch_shape, distribution.event_shape) == ((5, 2), (1, 8, 6))


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
            'scale must be a positive number, "shared", "per_dimension", "decoder" or "optimal", got \'learned\'.',
        ),
        (lambda: Normal(_decoder(), scale=0.0), "A fixed scale must be a positive number, got 0.0."),
        (lambda: Normal(_decoder(), scale=-1), "A fixed scale must be a positive number, got -1."),
        (lambda: Normal(_decoder(), scale=float("nan")), "A fixed scale must be a positive number, got nan."),
        (lambda: Normal(_decoder(), scale=float("inf")), "A fixed scale must be a positive number, got inf."),
        (lambda: Normal(_decoder(), scale=None), "A fixed scale must be a positive number, got None."),
        (lambda: Normal(_decoder(), scale=[1.0, 2.0]), "A fixed scale must be a positive number, got [1.0, 2.0]."),
        (lambda: Binomial(_decoder(), 0), "total_count must be a positive integer, got 0."),
        (lambda: Binomial(_decoder(), 1.5), "total_count must be a positive integer, got 1.5."),
        (lambda: Binomial(_decoder(), "16"), "total_count must be a positive integer, got '16'."),
        (
            lambda: Bernoulli(nn.Linear(4, 6)),
            "The decoder must have an attribute out_shape, got a Linear without: pass event_shape=... to Bernoulli.",
        ),
        (
            lambda: Bernoulli(MLP(4, [], 6), event_shape=(2, 3)),
            "out_shape of the decoder of Bernoulli must be (2, 3), with 1 parameter(s) per dimension, got (6,): build the "
            "decoder for that shape.",
        ),
        (
            lambda: Normal(MLP(4, [], (3, 6)), scale="decoder"),
            "out_shape of the decoder of Normal must be (2, 6), with 2 parameter(s) per dimension, got (3, 6): build the "
            "decoder for that shape.",
        ),
        (
            lambda: Normal(MLP(4, [], 2), scale="decoder"),
            "out_shape of the decoder of Normal must be (2, ...), with 2 parameter(s) per dimension, got (2,): build the "
            "decoder for that shape.",
        ),
        (
            lambda: Bernoulli(nn.Linear(4, 6), event_shape=(2, 3))(torch.zeros(5, 4)),
            "The output of the decoder of Bernoulli must end in shape (2, 3), got a tensor of shape (5, 6): reshape it, or "
            "change event_shape.",
        ),
        (
            lambda: Normal(nn.Linear(4, 6), event_shape=6, scale="decoder")(torch.zeros(5, 4)),
            "The output of the decoder of Normal must end in shape (2, 6), got a tensor of shape (5, 6): reshape it, or change "
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


# -- over every registered name --------------------------------------------------------------------------------------------

OUTSIDE: dict[str, tuple[float, str]] = {
    "bernoulli": (0.5, "Bernoulli"),
    "beta": (1.0, "Beta"),
    "beta_binomial": (7.0, "BetaBinomial"),
    "binomial": (0.5, "Binomial"),
    "categorical": (6.0, "OrdinalCategorical"),
    "continuous_bernoulli": (1.01, "ContinuousBernoulli"),
    "dequantized": (4.0, "Dequantized.* add noise with pyrovae.data.dequantize to them"),
    "discretized_logistic": (0.5, "DiscretizedLogistic"),
    "laplace": (math.nan, "must be finite, got NaN"),
    "mixed": (-1.0, r"column\(s\) \[1, 2, 4\] of HeterogeneousIndependent"),
    "negative_binomial": (-1.0, "NegativeBinomial"),
    "normal": (math.nan, "must be finite, got NaN"),
    "poisson": (1.5, "Poisson"),
    "student_t": (math.inf, "must be finite, got NaN or infinite"),
    "zero_inflated_negative_binomial": (0.5, "ZeroInflatedNegativeBinomial"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_data_outside_the_support_get_one_sentence(name: str) -> None:
    value, message = OUTSIDE[name]
    vae = small_vae_of(spec("likelihood", name, **LIKELIHOOD_OPTIONS.get(name, {})))
    x = torch.full((4, *SHAPE), value)
    with pytest.raises(ValueError, match=message) as caught:
        vae.fit(x, epochs=1, progress=False)
    assert "\n" not in str(caught.value)


def test_a_mixture_of_levels_names_its_support() -> None:
    vae = small_vae_of({"kind": "discretized_logistic", "num_levels": 6, "components": 3})
    with pytest.raises(ValueError, match="outside the support of MixtureSameFamily"):
        inspect_pair(vae.model, vae.guide, torch.full((4, *SHAPE), 6.0))


# -- one by one ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logit", [0.0, 1e-4, 0.05999, 0.0601, 0.3, -2.0, 15.0, 50.0, -300.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-13)])
def test_continuous_bernoulli_at_any_logit(logit: float, dtype: torch.dtype, tolerance: float) -> None:
    """Density, gradient, mean and variance against a hundred digits."""
    import mpmath

    given = torch.tensor(logit, dtype=dtype, requires_grad=True)
    distribution = distributions.ContinuousBernoulli(given)
    with mpmath.workdps(100):
        at = mpmath.mpf(given.item()) or mpmath.mpf(10) ** -40
        constant = mpmath.log(at / mpmath.expm1(at))
        mean = 1 - 1 / at + 1 / mpmath.expm1(at)
        variance = 1 / at**2 - 1 / (4 * mpmath.sinh(at / 2) ** 2)
        for x in (0.0, 0.3, 1.0):
            log_prob = distribution.log_prob(torch.tensor(x, dtype=dtype))
            assert log_prob.item() == pytest.approx(float(at * mpmath.mpf(x) + constant), rel=tolerance, abs=10 * tolerance)
        (gradient,) = torch.autograd.grad(distribution.log_prob(torch.tensor(0.5, dtype=dtype)), given)
        assert gradient.item() == pytest.approx(float(mpmath.mpf(0.5) - mean), abs=300 * tolerance)
    assert distribution.mean.item() == pytest.approx(float(mean), abs=10 * tolerance)
    assert distribution.variance.item() == pytest.approx(float(variance), rel=300 * tolerance)
    level = torch.tensor([1e-3, 0.4, 0.9], dtype=dtype)
    sign = float(np.sign(logit)) or 1.0
    size = max(abs(logit), 1e-12)
    lower = level.double() if sign < 0 else 1 - level.double()
    quantile = -np.log1p(lower.numpy() * np.expm1(-size)) / size
    assert_allclose(distribution.icdf(level).detach(), quantile if sign < 0 else 1 - quantile, atol=3e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("logit", [0.0, -0.0, 1e-9, -1e-9, 0.5, -3.0, 40.0, -40.0])
def test_quantiles_of_the_continuous_bernoulli_have_their_gradient(logit: float) -> None:
    """dx/dl = -(dF/dl) / p(x), by implicit differentiation in a hundred digits; u (1 - u) / 2 at a logit of zero."""
    import mpmath

    def exact(u: float) -> float:
        with mpmath.workdps(100):
            at = mpmath.mpf(logit) or mpmath.mpf(10) ** -30
            return float(mpmath.diff(lambda t: mpmath.log1p(u * mpmath.expm1(t)) / t, at, h=mpmath.mpf(10) ** -40))

    levels = [0.0, 0.1, 0.5, 0.8, 1.0]
    given = torch.full((5,), logit, requires_grad=True)
    (gradient,) = torch.autograd.grad(distributions.ContinuousBernoulli(given).icdf(torch.tensor(levels)).sum(), given)
    assert_allclose(gradient, [exact(u) for u in levels], rtol=1e-6, atol=1e-12)
    if abs(logit) < 1e-8:
        assert_allclose(gradient, [u * (1 - u) / 2 for u in levels], rtol=1e-8)


def test_zero_inflation_scores_the_same_after_a_draw() -> None:
    """Pyro's own then takes another branch, and gives -inf where the gate rounds to one."""
    distribution = distributions.ZeroInflatedNegativeBinomial(torch.tensor(2.0), torch.tensor(60.0), torch.tensor(60.0))
    before = distribution.log_prob(torch.tensor(3.0))
    assert distribution.mean.isfinite()
    distribution.sample((2,))
    assert torch.equal(distribution.log_prob(torch.tensor(3.0)), before)
    assert before.isfinite()
    assert distribution.expand((2,)).batch_shape == (2,)


@pytest.mark.usefixtures("float64")
def test_levels_far_in_the_tails_keep_their_digits() -> None:
    distribution = distributions.DiscretizedLogistic(torch.tensor([10.0, 250.0]), torch.tensor([0.5, 0.5]), 256)
    # At many scales from the mean the distribution is exponential: the next level has exp(-1/s) of the probability.
    found = distribution.log_prob(torch.tensor([[100.0, 100.0], [101.0, 99.0]]))
    assert_allclose(found[1] - found[0], [-2.0, -2.0], rtol=1e-12)
    assert distributions.DiscretizedLogistic(torch.tensor(0.3), torch.tensor(1e9), 2).log_prob(torch.ones(())).exp() == (
        pytest.approx(0.5)
    )


class _PrecomputedOutput(nn.Module):
    """A decoder whose output is given."""

    def __init__(self, out: Tensor):
        super().__init__()
        self.out = out

    def forward(self, z: Tensor) -> Tensor:
        return self.out


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("components", [1, 2])
def test_the_log_scale_of_a_logistic_stops_at_minus_seven(components: int) -> None:
    """As in the paper, on the scale on which all levels span [-1, 1]; a scale without end makes a level's density unbounded."""
    loc = torch.tensor([0.3, -0.9])
    log_scale = torch.tensor([-7.5, -60.0])
    parts = [loc, log_scale] if components == 1 else [torch.zeros(2)] * 2 + [loc] * 2 + [log_scale] * 2
    distribution = DiscretizedLogistic(_PrecomputedOutput(torch.stack(parts)), 256, components, event_shape=2)(torch.zeros(3))
    x, s = np.array([165.0, 12.0]), math.exp(-7) * 127.5
    mean = (loc.numpy() + 1) * 127.5
    exact = np.log(stats.logistic.cdf((x + 0.5 - mean) / s) - stats.logistic.cdf((x - 0.5 - mean) / s)).sum()
    assert distribution.log_prob(torch.as_tensor(x)).item() == pytest.approx(exact, rel=1e-9)
    assert exact < -1  # neither level is the likeliest


@pytest.mark.usefixtures("float64")
def test_a_dequantised_likelihood_conditions_on_the_unit_scale() -> None:
    """The optimal scale is that of the residuals of x / n, under a distribution that is then stretched to n levels."""
    n, mean = 8, torch.tensor([0.2, 0.5, 0.9])
    likelihood = Dequantized(_PrecomputedOutput(mean), {"kind": "normal", "scale": "optimal"}, num_levels=n, event_shape=3)
    x, mask = n * torch.rand(6, 3), torch.rand(6, 3) < 0.7
    for observed in (None, mask):
        error = (x / n - mean).square()
        scale = error.mean().sqrt() if observed is None else error[observed].mean().sqrt()
        distribution = likelihood.given(torch.zeros(6, 2), x, observed)
        exact = stats.norm.logpdf(x.numpy(), n * mean.numpy(), n * scale.item()).sum(-1)
        assert_allclose(distribution.log_prob(x), exact, rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_a_mixture_of_equal_logistics_is_one_logistic() -> None:
    one = small_likelihood({"kind": "discretized_logistic", "num_levels": 9})
    many = DiscretizedLogistic(MLP(3, [], (6, *SHAPE)), 9, 2)

    z = torch.randn(4, 3)
    loc, log_scale = one.decoder(z).detach().unbind(-2)
    many.decoder = _PrecomputedOutput(torch.stack([torch.randn(4, 5), torch.randn(4, 5), loc, loc, log_scale, log_scale], -2))
    x = torch.randint(0, 9, (4, 5)).double()
    assert_allclose(many(z).log_prob(x), one(z).log_prob(x).detach(), rtol=1e-12)
    assert_allclose(many(z).mean, one(z).mean.detach(), rtol=1e-12)


@pytest.mark.usefixtures("float64")
def test_mixed_is_the_sum_of_its_parts() -> None:
    likelihood = small_likelihood({"kind": "mixed", "parts": MIXED_PARTS})
    z, x = torch.randn(3, 7, 3), draw_data(likelihood, 7)
    out = likelihood.decoder(z).detach()
    assert out.shape[-1] == 2 + 1 + 2 + 1
    expected = (
        dist.Normal(out[..., 0:2], 1.0).log_prob(x[:, [0, 3]]).sum(-1)
        + dist.Binomial(3, logits=out[..., 2]).log_prob(x[:, 2])
        + dist.Beta(out[..., 3].exp(), out[..., 4].exp()).log_prob(x[:, 1])
        + dist.Poisson(out[..., 5].exp()).log_prob(x[:, 4])
    )
    distribution, seen = likelihood.observe(z, x)
    assert_allclose(distribution.log_prob(seen).detach(), expected, rtol=1e-13)
    # And so where values are missing.
    mask = torch.tensor([True, False, True, True, False]).expand(7, 5)
    distribution, seen = likelihood.observe(z, torch.where(mask, x, -7.0), mask)
    kept = expected - dist.Beta(out[..., 3].exp(), out[..., 4].exp()).log_prob(x[:, 1])
    assert_allclose(distribution.log_prob(seen).detach(), kept - dist.Poisson(out[..., 5].exp()).log_prob(x[:, 4]), rtol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["negative_binomial", "zero_inflated_negative_binomial"])
def test_library_is_the_total_of_what_was_observed(kind: str) -> None:
    likelihood = small_likelihood({"kind": kind, "library": "total"})
    z, x = torch.randn(3, 4, 3), torch.randint(1, 9, (4, 5)).double()
    distribution, _ = likelihood.observe(z, x)
    negative = distribution.base_dist.base_dist if kind.startswith("zero") else distribution.base_dist
    assert_allclose(negative.mean.sum(-1).detach(), x.sum(-1).expand(3, 4), rtol=1e-12)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]).bool()
    distribution, _ = likelihood.observe(z, x, mask)
    inner = distribution.base_dist.base_dist
    inner = inner.base_dist if kind.startswith("zero") else inner
    observed = (inner.mean * mask).sum(-1).detach()[:, [0, 2, 3]]
    assert_allclose(observed, (x * mask).sum(-1)[[0, 2, 3]].expand(3, 3), rtol=1e-12)
    assert distribution.log_prob(x)[:, 1].eq(0).all()
    gradients = torch.autograd.grad(distribution.log_prob(x).sum(), list(likelihood.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    # The shares stay what they are, whichever part was observed.
    shares = negative.mean / negative.mean.sum(-1, keepdim=True)
    assert_allclose((inner.mean / inner.mean.sum(-1, keepdim=True)).detach(), shares.detach(), rtol=1e-12)
    # An empty datum, and one of an image's shape.
    assert likelihood.given(z, 0 * x).log_prob(0 * x).isfinite().all()
    image = build("likelihood", {"kind": "negative_binomial", "library": "total"}, decoder=MLP(3, [], (2, 3)))
    distribution, _ = image.observe(z, torch.ones(4, 2, 3), torch.rand(4, 2, 3) < 0.5)
    assert distribution.mean.shape == (3, 4, 2, 3)


@pytest.mark.usefixtures("float64")
def test_optimal_scale_is_the_batchs_in_training_and_a_number_in_evaluation() -> None:
    likelihood = Normal(MLP(3, [], SHAPE), scale="optimal")
    z, x = torch.randn(2, 7, 3), torch.randn(7, *SHAPE)
    error = (x - likelihood.decoder(z)).square().detach()
    distribution = likelihood.given(z, x)
    assert_allclose(distribution.stddev.detach(), error.mean().sqrt().expand(2, 7, 5), rtol=1e-12)
    # No other scale gives this batch a higher density.
    scales = torch.linspace(0.5, 2.0, 101) * error.mean().sqrt()
    others = [dist.Normal(likelihood.decoder(z), scale).log_prob(x).sum().item() for scale in scales]
    assert np.argmax(others) == 33 + 0 or max(others) <= distribution.log_prob(x).sum().item() + 1e-9
    running = 0.9 + 0.1 * error.mean()
    assert_allclose(likelihood.variance, running, rtol=1e-12)
    mask = torch.rand(7, *SHAPE) < 0.5
    distribution = likelihood.given(z, x, mask)
    assert_allclose(distribution.variance.detach().flatten()[0], (error * mask).sum() / (2 * mask.sum()), rtol=1e-12)
    # Scored, it is a number: one datum's density does not depend on the others.
    kept = likelihood.variance.clone()
    with torch.no_grad():
        assert likelihood.given(z, x).variance.eq(kept).all()
    likelihood.eval()
    assert_allclose(likelihood.given(z, x).log_prob(x)[:, 2].detach(), likelihood.given(z[:, 2], x[2]).log_prob(x[2]).detach())
    assert torch.equal(likelihood.variance, kept)


@pytest.mark.parametrize("backend", ["eager", "aten", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_optimal_scale_follows_the_residual_in_training(backend: str) -> None:
    """On noise of scale 0.2 about a line, the running scale ends near 0.2 under every way to run a step."""
    vae = make_vae(4, latent_dim=1, hidden=[], likelihood={"kind": "normal", "scale": "optimal"})
    line = torch.randn(512, 1) @ torch.ones(1, 4) + 0.2 * torch.randn(512, 4)
    step = Step(ELBO(), vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=0.05, fused=True), backend=backend)
    for _ in range(150):
        step(line)
    assert step.reason is None
    assert vae.likelihood.variance.sqrt().item() == pytest.approx(0.2, rel=0.1)


@pytest.mark.usefixtures("float64")
def test_dequantised_bits_per_dimension_of_known_laws() -> None:
    """A uniform density over 256 levels is 8 bits a level; a Gaussian's bits are its entropy in levels."""

    class Constant(nn.Module):
        def __init__(self, *values: float):
            super().__init__()
            self.values = nn.Parameter(torch.tensor(values)[..., None].expand(len(values), 6).squeeze(0).clone())

        def forward(self, z: Tensor) -> Tensor:
            return self.values.expand(*z.shape[:-1], *self.values.shape)

    levels = torch.randint(0, 256, (400, 6), dtype=torch.uint8)

    def bits(likelihood: Likelihood, x: Tensor) -> float:
        vae = make_vae(6, latent_dim=2, hidden=[], likelihood=likelihood)
        with torch.no_grad():  # a guide that is the prior, which is exact here: the decoder ignores z
            for parameter in vae.encoder.parameters():
                parameter.zero_()
        evidence = vae.log_marginal(x, num_samples=30)
        assert np.isneginf(evidence.khat).all()
        return evidence.bits_per_dim

    noisy = dequantize(levels)
    for inner, values in [("beta", (0.0, 0.0)), ("continuous_bernoulli", (0.0,))]:
        assert bits(Dequantized(Constant(*values), inner, event_shape=6), noisy) == pytest.approx(8.0, abs=1e-12)
    assert bits(Categorical(Constant(*[0.0] * 256), event_shape=6), levels) == pytest.approx(8.0, abs=1e-12)
    # Levels of a Gaussian of 20 levels' width: the mass of a bin against the bound with noise.
    drawn = (128 + 20 * torch.randn(4000, 6)).floor().clamp(0, 255)
    distribution = stats.norm(128, 20)
    exact = -np.log2(distribution.cdf(drawn.numpy() + 1) - distribution.cdf(drawn.numpy())).mean()
    found = bits(Dequantized(Constant(0.5), {"kind": "normal", "scale": 20 / 256}, event_shape=6), dequantize(drawn))
    density = -stats.norm.logpdf(dequantize(drawn).numpy(), 128, 20).mean() / math.log(2)
    assert found == pytest.approx(density, abs=2e-3)
    assert 0 < found - exact + 2e-3 < 4e-3
    entropy = 0.5 * math.log2(2 * math.pi * math.e * 400)
    assert found == pytest.approx(entropy, abs=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_dequantised_levels_lie_inside_their_bin(dtype: torch.dtype) -> None:
    levels = torch.arange(256).repeat(2000).to(dtype)
    noisy = dequantize(levels)
    assert noisy.dtype == (dtype if dtype.is_floating_point else torch.get_default_dtype())
    assert torch.equal(noisy.floor(), levels.to(noisy.dtype))
    assert noisy.min() > 0
    remainder = (noisy - levels).double()
    assert abs(remainder.mean() - 0.5) < 5 / math.sqrt(12 * len(levels))
    assert abs(remainder.var() - 1 / 12) < 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Laplace(_decoder(), scale="optimal"),
            'scale must be a positive number, "shared", "per_dimension" or "decoder", got \'optimal\'.',
        ),
        (lambda: StudentT(_decoder(), df=1), 'df must be a number above 1, so that a mean exists, or "shared", got 1.'),
        (
            lambda: StudentT(_decoder(), df="decoder"),
            "df must be a number above 1, so that a mean exists, or \"shared\", got 'decoder'.",
        ),
        (lambda: BetaBinomial(_decoder(2), 0), "total_count must be a positive integer, got 0."),
        (
            lambda: Beta(MLP(4, [], (3, 6))),
            "out_shape of the decoder of Beta must be (2, 6), with 2 parameter(s) per dimension, got (3, 6): build the "
            "decoder for that shape.",
        ),
        (lambda: Categorical(_decoder(5), num_levels=1), "num_levels must be an integer of at least 2, got 1."),
        (
            lambda: Categorical(_decoder(5)),
            "out_shape of the decoder of Categorical must be (256, 2, 3), with 256 parameter(s) per dimension, got (5, 2, 3): "
            "build the decoder for that shape.",
        ),
        (lambda: DiscretizedLogistic(_decoder(2), components=0), "components must be a positive integer, got 0."),
        (
            lambda: DiscretizedLogistic(_decoder(2), components=2),
            "out_shape of the decoder of DiscretizedLogistic must be (6, 2, 3), with 6 parameter(s) per dimension, got "
            "(2, 2, 3): build the decoder for that shape.",
        ),
        (
            lambda: NegativeBinomial(_decoder(), dispersion="optimal"),
            'dispersion must be a positive number, "shared", "per_dimension" or "decoder", got \'optimal\'.',
        ),
        (lambda: NegativeBinomial(_decoder(), dispersion=0), "A fixed dispersion must be a positive number, got 0."),
        (
            lambda: NegativeBinomial(_decoder(), library="sum"),
            "library must be a positive number, \"total\" or None, got 'sum'.",
        ),
        (
            lambda: ZeroInflatedNegativeBinomial(_decoder(2), library=-3.0),
            "A fixed library must be a positive number, got -3.0.",
        ),
        (
            lambda: Dequantized(_decoder(), "bernoulli"),
            "The likelihood within Dequantized must be continuous, got Bernoulli: use that without Dequantized, or choose a "
            'continuous one such as "normal".',
        ),
        (lambda: Dequantized(_decoder(), "nomal"), "There is no likelihood 'nomal'; did you mean 'normal'?"),
        (
            lambda: Dequantized(_decoder(), {"scale": 1}),
            'A likelihood within another must be a name or a table such as {"kind": "normal"}, got {\'scale\': 1}.',
        ),
        (
            lambda: Mixed(MLP(4, [], 3), [([0, 1], "normal"), ([2], "beta")]),
            "out_shape of the decoder of Mixed must be (4,), the parameters of all parts, got (3,): build the decoder for that "
            "shape.",
        ),
        (
            lambda: Mixed(nn.Linear(4, 3), [([0, 1], "normal"), ([2], "beta")])(torch.zeros(2, 4)),
            "The output of the decoder of Mixed must end in shape (4,), got a tensor of shape (2, 3): change its last layer, "
            "or the parts.",
        ),
        (
            lambda: Mixed(MLP(4, [], 3), [([0, 1], "normal"), ([1], "normal")]),
            "The parts of Mixed must contain each of the columns 0, 1, ... once, got [0, 1, 1]: write parts = "
            '[[[0, 2], "normal"], [[1], {"kind": "bernoulli"}]], for example.',
        ),
        (
            lambda: Mixed(MLP(4, [], 3), "normal"),
            "The parts of Mixed must be pairs of columns and a likelihood, got 'normal': write parts = "
            '[[[0, 2], "normal"], [[1], {"kind": "bernoulli"}]], for example.',
        ),
        (
            lambda: Mixed(MLP(4, [], 3), [(0, "normal")]),
            "The columns of a part of Mixed must be a list of integers, got 0: write parts = "
            '[[[0, 2], "normal"], [[1], {"kind": "bernoulli"}]], for example.',
        ),
        (
            lambda: make_vae(4, latent_dim=2, likelihood={"kind": "mixed", "parts": [[[0, 1], "normal"]]}),
            "A datum of Mixed must have shape (2,), as many columns as its parts, got (4,): change the parts, or flatten the "
            "data.",
        ),
    ],
)
def test_other_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()
