from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pairs import LinearGaussian, nested_plates_pair, two_latents_pair
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

import pyrovae as pv
from pyrovae import diagnostics
from pyrovae.diagnostics import posterior
from pyrovae.diagnostics.decomposition import decompose
from pyrovae.diagnostics.gradients import compare_estimators, train_estimators
from pyrovae.diagnostics.posterior import posterior_draws


class Scalar:
    """z ~ N(m, 1), x|z ~ N(z, 1), q = N(a x + b, s^2): every moment of the ELBO's gradient has a closed form."""

    def __init__(self) -> None:
        self.m = torch.tensor(0.3, requires_grad=True)
        self.b = torch.tensor(-0.2, requires_grad=True)
        self.scale = 0.8

    def model(self, x: Tensor) -> None:
        m = pyro.param("m", self.m)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        b = pyro.param("b", self.b)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x + b, self.scale))


@pytest.fixture(scope="module")
def compared() -> pv.EstimatorComparison:
    pair = Scalar()
    x = torch.tensor([1.0])
    return compare_estimators(
        pair.model, pair.guide, x, ["elbo", {"kind": "elbo", "num_particles": 4}, "trace_elbo", "iwae"],
        num_draws=500, reference="elbo",
    )  # fmt: skip


def test_gradient_moments_of_the_elbo_are_the_closed_forms(compared: pv.EstimatorComparison):
    # z = mu + s eps with mu = 0.5 x + b = 0.3; d/dm = z - m = s eps, d/db = (x - z) - (z - m) = 1.3 - 2 z.
    mean_m, sd_m = 0.3 - 0.3, 0.8
    mean_b, sd_b = 1.3 - 0.6, 1.6
    assert compared.names == ["elbo", "elbo'", "trace_elbo", "iwae"]
    np.testing.assert_allclose(compared.variance[0], [sd_m**2, sd_b**2], rtol=0.2)
    np.testing.assert_allclose(compared.variance[1], [sd_m**2 / 4, sd_b**2 / 4], rtol=0.2)
    assert compared.norm[0, 0] == pytest.approx(mean_m, abs=0.12)
    assert compared.norm[0, 1] == pytest.approx(mean_b, abs=4 * sd_b / math.sqrt(500))
    assert compared.snr[0, 1] == pytest.approx(mean_b / sd_b, abs=0.12)
    assert compared.snr[1, 1] == pytest.approx(2 * mean_b / sd_b, abs=0.2)


def test_bound_has_its_mean_and_standard_error(compared: pv.EstimatorComparison):
    mu, s = 0.3, 0.8
    expected = -0.5 * math.log(2 * math.pi) - 0.5 * (s**2 + (1 - mu) ** 2) - 0.5 * (s**2 + (mu - 0.3) ** 2) + 0.5 + math.log(s)
    assert abs(compared.bound[0] - expected) < 4 * compared.bound_se[0]
    # log w = const + 1.3 z - z^2 + eps^2 / 2 with z = mu + s eps, a quadratic in eps of known variance.
    linear, square = 1.3 * s - 2 * mu * s, -(s**2) + 0.5
    assert compared.bound_se[0] == pytest.approx(math.sqrt((linear**2 + 2 * square**2) / 500), rel=0.15)
    assert compared.bound[3] > compared.bound[0]


def test_bias_is_zero_against_itself_and_found_where_there_is_one(compared: pv.EstimatorComparison):
    assert compared.bias[0].tolist() == [0, 0] or math.isnan(compared.bias[0, 0])
    assert compared.bias_p[0].tolist() == [1, 1]
    assert compared.bias_p[1, 1] > 0.001, "more particles, the same mean"
    assert compared.bias_p[2, 1] > 0.001, "Pyro's estimator, the same gradient"
    assert compared.bias_p[3, 1] <= 0.002, "the guide's gradient of the IWAE bound is another"
    # IWAE's guide gradient for K = 5 by brute force.
    eps = torch.randn(5, 400_000)
    b = torch.tensor(-0.2, requires_grad=True)
    z = 0.5 + b + 0.8 * eps
    log_w = dist.Normal(0.3, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.tensor(1.0)) + 0.5 * eps**2
    torch.logsumexp(log_w, 0).mean().backward()
    assert compared.bias[3, 1] == pytest.approx(abs(b.grad.item() - 0.7) / 0.7, abs=0.2)


class Given(pyro.infer.ELBO):
    """Bounds (R,) and gradients (R, 3) that are given: the draw that was seeded with r has row r."""

    def __init__(self, pair: Scalar, bounds: np.ndarray, gradients: np.ndarray) -> None:
        super().__init__()
        self.pair, self.bounds, self.gradients = pair, torch.as_tensor(bounds), torch.as_tensor(gradients)

    def differentiable_loss(self, model: object, guide: object, x: Tensor) -> Tensor:
        r, parameters = torch.initial_seed() % len(self.bounds), torch.cat([self.pair.m, self.pair.b[None]])
        return -len(x) * (self.bounds[r] + self.gradients[r] @ (parameters - parameters.detach()))

    def _get_trace(self, *args: object) -> None:
        raise NotImplementedError


@pytest.mark.usefixtures("float64")
def test_every_number_of_a_comparison_is_its_formula():
    """On draws that are given; the test's p-value by all 4096 ways to flip twelve signs."""
    R, x, pair = 12, torch.tensor([1.0, -0.5]), Scalar()
    pair.m, pair.b = torch.full((2,), 0.3, requires_grad=True), pair.b.detach().double().requires_grad_()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("m", pair.m).sum(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    random = np.random.default_rng(4)
    bounds = random.normal(-3, 1, size=R)
    reference = random.normal(0.8, 1, size=(R, 3))
    own = reference + 0.45 + random.normal(0, 1, size=(R, 3))
    result = compare_estimators(
        model, pair.guide, x, [Given(pair, bounds, own)], num_draws=R, reference=Given(pair, bounds, reference), seed=0
    )
    assert result.bound[0] == pytest.approx(bounds.mean(), rel=1e-12)
    assert result.bound_se[0] == pytest.approx(bounds.std(ddof=1) / math.sqrt(R), rel=1e-12)

    def norm_of_mean(draws: np.ndarray) -> float:
        return math.sqrt(sum(draws[r] @ draws[s] for r in range(R) for s in range(R) if r != s) / (R * (R - 1)))

    signs = 1 - 2 * ((np.arange(2**R)[:, None] >> np.arange(R)) & 1)
    for group, columns in enumerate((slice(0, 2), slice(2, 3))):
        g, ref = own[:, columns], reference[:, columns]
        variance = ((g - g.mean(0)) ** 2).sum() / (R - 1)
        assert result.norm[0, group] == pytest.approx(norm_of_mean(g), rel=1e-12)
        assert result.variance[0, group] == pytest.approx(variance, rel=1e-12)
        assert result.snr[0, group] == pytest.approx(norm_of_mean(g) / math.sqrt(variance), rel=1e-12)
        assert result.bias[0, group] == pytest.approx(norm_of_mean(g - ref) / norm_of_mean(ref), rel=1e-12)
        flipped = ((signs @ (g - ref)) ** 2).sum(1)
        p = np.mean(flipped >= flipped[0] * (1 - 1e-12))
        assert result.bias_p[0, group] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 999) + 0.001)
        assert 0.02 < p < 0.3
    np.testing.assert_allclose(result.snr_per_second, result.snr / np.sqrt(result.seconds)[:, None])
    assert 0 < result.seconds[0] < 1


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("drawn_inside", [True, False])
def test_estimators_are_compared_per_datum_under_a_subsampled_plate(drawn_inside: bool):
    """The plate's scale N/B multiplies the loss alone: per datum all numbers are those of the B data by themselves."""
    pair = Scalar()
    x = torch.linspace(-1, 2, 20)

    def plate(x: Tensor) -> pyro.plate:
        return pyro.plate("data", 20, subsample=torch.arange(4)) if size == 20 else pyro.plate("data", len(x))

    def model(x: Tensor) -> None:
        with plate(x):
            z = pyro.sample("z", dist.Normal(pyro.param("m", pair.m), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:4])

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", dist.Normal(0.5 * x[:4] + pyro.param("b", pair.b), pair.scale))

    results = []
    for size in (20, 4):
        data = x if size == 20 and drawn_inside else x[:4]
        results.append(compare_estimators(model, guide, data, ["elbo", "trace_elbo", "iwae"], num_draws=10, reference="stl"))
    for name in ("bound", "bound_se", "norm", "bias", "variance", "snr"):
        np.testing.assert_allclose(*(getattr(result, name) for result in results), rtol=1e-6, err_msg=name)
    assert (results[0].variance > 0).all()


@pytest.mark.slow
def test_false_alarms_are_as_rare_as_the_level_says():
    torch.set_default_dtype(torch.float64)
    pair = Scalar()
    same = {"same": pv.estimators.ELBO(2)}
    alarms = [
        compare_estimators(
            pair.model, pair.guide, torch.tensor([1.0]), same, num_draws=20, reference="elbo", seed=1000 * i
        ).bias_p[0, 1] < 0.1
        for i in range(60)
    ]  # fmt: skip
    assert sum(alarms) <= 14, "60 draws at level 0.1: more than 14 has probability below 1 in 1000"


def test_shared_parameters_belong_to_both_and_the_pair_is_left_as_it_was():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    x = torch.bernoulli(torch.full((30, 4), 0.5))
    before = torch.nn.utils.parameters_to_vector(vae.parameters()).clone()
    result = compare_estimators(vae.model, vae.guide, x, ["elbo", "stl", "iwae"], num_draws=10, reference="iwae")
    ranking = train_estimators(
        vae.model, vae.guide, x, ["elbo", "stl"], seconds=0.3, held_out=x, num_samples=50, progress=False
    )
    assert torch.equal(torch.nn.utils.parameters_to_vector(vae.parameters()), before)
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert sorted(ranking.names) == ["elbo", "stl"]
    assert (result.seconds > 0).all()
    assert max(map(len, str(result).splitlines())) <= 80
    dataset = result.to_dataset()
    assert dataset["snr"].sel(estimator="stl", parameters="guide").item() == result.snr[1, 1]
    axes = result.plot()
    labels = [ax.get_xlabel() for ax in axes]
    assert [any(word in label for label in labels) for word in ("bound", "bias", "one gradient", "second")] == [True] * 4
    assert len(axes[0].figure.axes) == 4
    given = Figure().subplots(2, 2)
    assert list(result.plot(given)) == list(given.ravel())
    with pytest.raises(ValueError, match="ax must be 4 axes, got 1"):
        result.plot(Figure().subplots())


def test_each_estimator_has_a_name_of_its_own():
    pair, table = Scalar(), {"kind": "iwae", "num_particles": 2}
    specs = ["elbo", table, pv.estimators.IWAE(3), "elbo"]
    result = compare_estimators(pair.model, pair.guide, torch.tensor([1.0]), specs, num_draws=10, reference="elbo")
    assert result.names == ["elbo", "iwae", "IWAE", "elbo'"]
    assert result.num_particles.tolist() == [1, 2, 3, 1]


def test_what_does_not_fit_is_refused():
    pair = Scalar()
    x = torch.tensor([1.0])
    with pytest.raises(ValueError, match="did you mean 'iwae'"):
        compare_estimators(pair.model, pair.guide, x, ["iwea"])
    with pytest.raises(ValueError, match="at least 10"):
        compare_estimators(pair.model, pair.guide, x, ["elbo"], num_draws=2)
    with pytest.raises(ValueError, match="at least one, got none"):
        compare_estimators(pair.model, pair.guide, x, [])


class Slope:
    """z ~ N(0, 1), x|z ~ N(az + b, s^2 I), q = N(m(x) + shift, (w sd)^2) about the exact posterior: all has a closed form."""

    def __init__(self, shift: float = 0.3, width: float = 0.8) -> None:
        self.a, self.b, self.noise = torch.tensor([1.0, -0.5, 0.7]).double(), torch.tensor([0.2, 0.0, -1.0]).double(), 0.6
        self.precision = 1 + float(self.a @ self.a) / self.noise**2
        self.shift, self.scale = shift, width / math.sqrt(self.precision)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z * self.a + self.b, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.centre(x)[:, None], self.scale).to_event(1))

    def centre(self, x: Tensor) -> Tensor:
        return (x - self.b) @ self.a / self.noise**2 / self.precision + self.shift

    def sample(self, num: int) -> Tensor:
        z = torch.randn(num, 1).double()
        return z * self.a + self.b + self.noise * torch.randn(num, 3).double()

    def log_px(self, x: Tensor) -> np.ndarray:
        covariance = torch.outer(self.a, self.a) + self.noise**2 * torch.eye(3).double()
        return dist.MultivariateNormal(self.b, covariance).log_prob(x).numpy()


@pytest.mark.usefixtures("float64")
def test_decomposition_is_the_closed_forms_of_a_linear_gaussian_pair():
    pair = Slope()
    x = pair.sample(60)
    parts = decompose(pair.model, pair.guide, x, num_samples=500, num_draws=400, mixture_draws=400, seed=0)
    centre, sd = pair.centre(x).numpy(), pair.scale
    posterior_sd = 1 / math.sqrt(pair.precision)
    gap = math.log(posterior_sd / sd) + (sd**2 + pair.shift**2) / (2 * posterior_sd**2) - 0.5
    rate = -math.log(sd) + (sd**2 + centre**2) / 2 - 0.5
    assert parts.closed_form == ("z",)
    np.testing.assert_allclose(parts.rate, rate, rtol=1e-12)
    assert (parts.rate_se == 0).all()
    residual = (x - pair.b - torch.as_tensor(centre)[:, None] * pair.a).square().sum(1).numpy()
    norm_a = float(pair.a @ pair.a)
    distortion = 1.5 * math.log(2 * math.pi * pair.noise**2) + (residual + norm_a * sd**2) / (2 * pair.noise**2)
    assert (np.abs(parts.distortion - distortion) < 5 * parts.distortion_se).all()
    # In the draw's noise the distortion is a parabola, whose variance is that of its line and of its square.
    along = (x - pair.b - torch.as_tensor(centre)[:, None] * pair.a).numpy() @ pair.a.numpy()
    variance = (along * sd / pair.noise**2) ** 2 + 2 * (norm_a * sd**2 / (2 * pair.noise**2)) ** 2
    np.testing.assert_allclose(parts.distortion_se, np.sqrt(variance / 400), rtol=0.3)
    assert parts.distortion_se.mean() == pytest.approx(np.sqrt(variance / 400).mean(), rel=0.04)
    np.testing.assert_allclose(parts.elbo_se, parts.distortion_se, rtol=1e-9)
    np.testing.assert_allclose(parts.elbo, -parts.rate - parts.distortion)
    np.testing.assert_allclose(parts.elbo + parts.gap, parts.evidence.log_px, rtol=1e-12)
    exact_elbo = -rate - distortion
    np.testing.assert_allclose(pair.log_px(x) - exact_elbo, gap, rtol=1e-9)
    assert parts.gap.mean() == pytest.approx(gap, abs=5 * np.sqrt((parts.elbo_se**2).sum() + (parts.evidence.se**2).sum()) / 60)
    # The mixture's entropy by quadrature.
    z = np.linspace(centre.min() - 8 * sd, centre.max() + 8 * sd, 4001)
    log_q = norm.logpdf(z[:, None], centre, sd)
    log_mixture = logsumexp(log_q, axis=1) - math.log(60)
    entropy = -np.trapezoid(np.exp(log_mixture) * log_mixture, z)
    information = entropy - (0.5 * math.log(2 * math.pi * sd**2) + 0.5)
    assert parts.mutual_information == pytest.approx(information, abs=0.02)
    aggregate = -entropy - np.trapezoid(np.exp(log_mixture) * norm.logpdf(z), z)
    assert parts.aggregate_kl == pytest.approx(aggregate, abs=0.02)
    assert parts.rate.mean() == pytest.approx(parts.mutual_information + parts.aggregate_kl, abs=1e-12)
    np.testing.assert_allclose(parts.mean_variances["z"], [centre.var(ddof=1)], rtol=1e-12)
    assert parts.active_units == {"z": 1}
    assert parts.approximation is None


@pytest.mark.usefixtures("float64")
def test_refined_bounds_split_the_gap():
    pair, exact = Slope(), Slope(shift=0.0, width=1.0)
    x = pair.sample(20)
    # The best Gaussian is the posterior itself, so nothing is left to the family.
    parts = decompose(pair.model, pair.guide, x, num_samples=2000, refined=pair.log_px(x), seed=0)
    assert parts.approximation is not None
    assert parts.amortisation is not None
    np.testing.assert_allclose(parts.approximation, parts.evidence.log_px - pair.log_px(x))
    np.testing.assert_allclose(parts.approximation + parts.amortisation, parts.gap)
    assert abs(parts.approximation.mean()) < 4 * parts.evidence.mean_se
    text = str(parts)
    assert max(map(len, text.splitlines())) <= 80
    assert "approximation" in text
    none = decompose(exact.model, exact.guide, x, evidence=parts.evidence, num_draws=2000, seed=0)
    assert none.evidence is parts.evidence
    assert abs(none.gap.mean()) < 4 * math.hypot(parts.evidence.mean_se, np.sqrt((none.elbo_se**2).sum()) / 20)


def test_every_line_of_a_decomposition_has_its_standard_error():
    """Sampling errors of N independent data add in squares, over N; those of a difference too."""
    log_px, rate, distortion, refined = np.array([[-3.0, -5.0, -4.0], [1.0, 2.0, 1.5], [3.0, 4.0, 3.5], [-3.5, -5.5, -4.5]])
    se, rate_se, distortion_se, elbo_se = np.array([[0.1, 0.2, 0.2], [0.3, 0.0, 0.4], [0.2, 0.3, 0.6], [0.4, 0.4, 0.2]])
    information = np.array([0.5, 0.9, 0.1])
    evidence = pv.Evidence(log_px, se, np.full(3, 50.0), np.full(3, 0.2), -rate - distortion, num_samples=200, num_dims=4)
    parts = diagnostics.Decomposition(
        evidence, rate, distortion, rate_se, distortion_se, elbo_se, information,
        {"z": np.array([0.0, 0.0099, 0.0101, 0.05, 0.099, 2.0])}, refined, 10, ("z",),
    )  # fmt: skip
    spread = information.std(ddof=1) / math.sqrt(3)
    expected = {
        "log p(x)": (-4.0, 0.3 / 3),
        "ELBO": (-5.0, 0.6 / 3),
        "gap": (1.0, math.hypot(0.1, 0.2)),
        "  approximation": (0.5, math.nan),
        "  amortisation": (0.5, math.nan),
        "rate": (1.5, 0.5 / 3),
        "  mutual information": (0.5, spread),
        "  aggregate KL": (1.0, math.hypot(spread, 0.5 / 3)),
        "distortion": (3.5, 0.7 / 3),
    }
    assert [name for name, *_ in parts.rows()] == list(expected)
    for name, mean, error, _ in parts.rows():
        assert (mean, error) == pytest.approx(expected[name], rel=1e-12, nan_ok=True), name
    assert parts.active_units == {"z": 4}
    assert parts.rows()[0][3] == "estimate, 200 samples"


@pytest.mark.usefixtures("float64")
def test_a_rate_without_closed_form_is_sampled():
    pair = LinearGaussian(spread=1.3)
    x = pair.sample(40)
    parts = decompose(pair.model, pair.guide, x, num_draws=300, mixture_draws=20, seed=0)
    posterior = pair.posterior(x)
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2))
    expected = torch.distributions.kl_divergence(posterior, prior).numpy()
    assert parts.closed_form == ()
    assert (np.abs(parts.rate - expected) < 5 * parts.rate_se).all()
    np.testing.assert_allclose(parts.mean_variances["z"], posterior.mean.var(0).numpy(), rtol=1e-12)
    z = posterior.sample((4000,))
    log_mixture = torch.stack([posterior.log_prob(z[:, n, None, :]) for n in range(40)], 1).logsumexp(-1) - math.log(40)
    assert parts.mutual_information == pytest.approx((posterior.log_prob(z) - log_mixture).mean().item(), abs=0.05)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("vectorize", [True, False])
def test_chains_and_nested_plates_decompose(vectorize: bool):
    chain = two_latents_pair()
    y = torch.randn(12, 4)
    parts = decompose(chain.model, chain.guide, y, num_draws=60, mixture_draws=10 if vectorize else 3, seed=0,
                      num_samples=50, vectorize_particles=vectorize)  # fmt: skip
    with torch.no_grad():
        centres = chain.nets.up(y)
        b = centres + 0.6 * torch.randn(4000, 12, 3)
        log_q = dist.Normal(centres, 0.6).to_event(1).log_prob(b[:, :, None])
        # Given b, a knows nothing of y: all information is in b.
        exact = (log_q.diagonal(dim1=1, dim2=2) - log_q.logsumexp(-1)).mean().item() + math.log(12)
    assert parts.mutual_information == pytest.approx(exact, abs=0.1 if vectorize else 0.2)
    assert set(parts.mean_variances) == {"a", "b"}
    np.testing.assert_allclose(parts.mean_variances["b"], centres.var(0).numpy(), rtol=1e-9)
    assert parts.closed_form == ("a",), "the guide inverts the model's order, so b's has none"
    nested = nested_plates_pair(-2)
    x = torch.randn(10, 3)
    parts = decompose(nested.model, nested.guide, x, num_draws=60, mixture_draws=20 if vectorize else 3, num_samples=50,
                      vectorize_particles=vectorize, seed=0)  # fmt: skip
    centres, scales = torch.cat([0.4 * x.mean(1, keepdim=True), 0.8 * x], 1), torch.tensor([0.7, 0.4, 0.4, 0.4])
    distribution = dist.Normal(centres, scales).to_event(1)
    log_q = distribution.log_prob((centres + scales * torch.randn(4000, 10, 4))[:, :, None])
    exact = (log_q.diagonal(dim1=1, dim2=2) - log_q.logsumexp(-1)).mean().item() + math.log(10)
    assert parts.mutual_information == pytest.approx(exact, abs=0.1 if vectorize else 0.2)
    np.testing.assert_allclose(parts.mean_variances["u"], (0.8 * x).var(0).numpy(), rtol=1e-9)


@pytest.mark.usefixtures("float64")
def test_programs_that_take_no_particles_on_the_left_run_one_by_one():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.5 * x, 0.5**0.5).to_event(1))
            assert z.dim() == 2

    x = torch.randn(5, 2)
    options = {"num_draws": 4, "vectorize_particles": False, "seed": 0}
    parts = decompose(model, guide, x, num_samples=6, mixture_draws=2, **options)
    np.testing.assert_allclose(parts.evidence.log_px, dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1), rtol=1e-12)
    assert posterior_draws(model, guide, x, num_samples=6, **options).posterior["z"].shape == (4, 5, 2)


def test_units_that_are_switched_off_are_not_counted():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            base = dist.Normal(torch.zeros(len(x), 3), 1.0)
            moved = dist.TransformedDistribution(
                base, dist.transforms.AffineTransform(x[:, None] * torch.tensor([1.0, 0.0, 0.0]), 0.9)
            )
            pyro.sample("z", moved.to_event(1))

    # A transformed distribution has no mean in closed form, so the means are sampled, and their noise of variance 1/50 is no
    # activity.
    parts = decompose(model, guide, torch.randn(50), num_draws=50, num_samples=50, seed=0)
    assert parts.active_units == {"z": 1}
    assert parts.mean_variances["z"][0] == pytest.approx(1, rel=0.5)


@pytest.mark.parametrize(("variance", "active"), [(0.03, 1), (0.003, 0)])
def test_a_unit_is_active_from_a_variance_of_a_hundredth_on(variance: float, active: int):
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(math.sqrt(variance) * x, 1.0))

    x = torch.tensor([-1.0, 1.0] * 20) * math.sqrt(39 / 40)  # of variance one
    parts = decompose(model, guide, x, num_draws=2, num_samples=50, seed=0)
    assert parts.mean_variances["z"] == pytest.approx(variance)
    assert parts.active_units == {"z": active}


def test_what_decompose_cannot_take_is_refused():
    pair = Slope()
    x = pair.sample(4)
    for options, message in (
        ({"refined": np.zeros(3)}, "refined must have shape"),
        ({"num_draws": 1}, "num_draws must be at least 2"),
        ({"num_draws": 3, "mixture_draws": 4}, "at least mixture_draws = 4, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            decompose(pair.model, pair.guide, x, **options)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("numbers", [None, 256 * 90])
def test_posterior_draws_have_the_posteriors_moments(numbers: int | None, monkeypatch: pytest.MonkeyPatch):
    if numbers is not None:  # chunks of 90 samples
        monkeypatch.setattr(posterior, "CHUNK_NUMBERS", numbers)
    pair = LinearGaussian(spread=1.4)
    x = pair.sample(6)
    draws = posterior_draws(pair.model, pair.guide, x, num_draws=1500, num_samples=6000 if numbers is None else 4000, seed=0)
    z = draws.posterior["z"]
    exact = pair.posterior(x)
    mean, covariance = exact.mean.numpy(), exact.covariance_matrix.numpy()[0] / 1.4**2
    # Draws that repeat carry as much as fewer that do not.
    error = np.sqrt(np.diag(covariance) * (1 / 1500 + 1 / draws.ess[:, None]))
    assert (np.abs(z.mean(0) - mean) < 4.5 * error).all()
    for n in range(6):
        np.testing.assert_allclose(np.cov(z[:, n].T), covariance, atol=0.15 * covariance.max())
    weight, bias = pair.weight.numpy(), pair.bias.numpy()
    expected = norm.logpdf(x.numpy(), z @ weight.T + bias, pair.noise).sum(-1)
    np.testing.assert_allclose(draws.log_likelihood["x"], expected, rtol=1e-10)
    np.testing.assert_array_equal(draws.observed_data["x"], x.numpy())
    noise = draws.posterior_predictive["x"] - (z @ weight.T + bias)
    assert noise.std() == pytest.approx(pair.noise, rel=0.02)
    prior_noise = draws.prior_predictive["x"] - (draws.prior["z"] @ weight.T + bias)
    assert prior_noise.std() == pytest.approx(pair.noise, rel=0.02)
    assert draws.prior["z"].std() == pytest.approx(1, rel=0.02)
    again = posterior_draws(pair.model, pair.guide, x, num_draws=10, num_samples=30, seed=3)
    if numbers is None:  # drawn at once, so from the stream's first numbers
        torch.manual_seed(3)
        w = pv.log_weights(pair.model, pair.guide, x, num_particles=30, max_plate_nesting=1).log_weights.exp().numpy()
        np.testing.assert_allclose(again.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-9)
    np.testing.assert_array_equal(
        again.posterior["z"], posterior_draws(pair.model, pair.guide, x, num_draws=10, num_samples=30, seed=3).posterior["z"]
    )


@pytest.mark.usefixtures("float64")
def test_draws_of_discrete_latents_have_the_exact_frequencies():
    weights, centres = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-1.0, 0.5, 2.0])

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.factor("tilt", 0.1 * z)
            pyro.sample("x", dist.Normal(centres[z], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(3) / 3).expand([len(x)]))

    x = torch.tensor([-0.5, 1.0])
    draws = posterior_draws(model, guide, x, num_draws=4000, num_samples=4000, seed=0)
    joint = weights * torch.exp(0.1 * torch.arange(3) + dist.Normal(centres, 1.0).log_prob(x[:, None]))
    frequencies = (draws.posterior["z"][..., None] == np.arange(3)).mean(0)
    np.testing.assert_allclose(frequencies, joint / joint.sum(1, keepdim=True), atol=0.05)
    assert set(draws.log_likelihood) == {"tilt", "x"}
    assert set(draws.posterior_predictive) == set(draws.observed_data) == {"x"}
    parts = decompose(model, guide, x, num_draws=20, num_samples=50, seed=0)
    assert parts.mean_variances == {}
    assert parts.mutual_information == pytest.approx(0, abs=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("vectorize", [True, False])
def test_draws_of_nested_plates_keep_their_shapes(vectorize: bool):
    nested = nested_plates_pair(-2)
    x = torch.randn(5, 3)
    draws = posterior_draws(nested.model, nested.guide, x, num_draws=8, num_samples=20, vectorize_particles=vectorize, seed=0)
    assert draws.posterior["z"].shape == (8, 5)
    assert draws.posterior["u"].shape == draws.prior["u"].shape == draws.posterior_predictive["x"].shape == (8, 5, 3)
    expected = norm.logpdf(x.numpy(), draws.posterior["u"], 0.3).sum(-1)
    np.testing.assert_allclose(draws.log_likelihood["x"], expected, rtol=1e-10)
    tree = draws.to_datatree()
    assert tree["posterior"]["u"].dims == ("chain", "draw", "datum", "u_dim_0")
    bare = posterior_draws(nested.model, nested.guide, x, num_draws=8, num_samples=20, predictive=False)
    assert "prior" not in bare.to_datatree().children


def test_a_datum_without_weight_cannot_be_resampled():
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("allowed", torch.where(x > 0, 0.0, -math.inf))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.5))

    with pytest.raises(ValueError, match="Datum 1 has only zero, NaN or infinite weights"):
        posterior_draws(model, guide, torch.tensor([1.0, -1.0]), num_draws=5, num_samples=10)
