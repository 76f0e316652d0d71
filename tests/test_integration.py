from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian, counts_pair, curved_pair, nested_plates_pair, switches_pair
from scipy import integrate, stats
from scipy.special import logsumexp

import pyrovae as pv
from pyrovae.programs.rounding import log_joint_rounding
from pyrovae.programs.unconstrained import UnconstrainedPair


@pytest.mark.usefixtures("float64")
def test_linear_gaussian_pairs_have_a_closed_form():
    pair = LinearGaussian(latent_dim=5, data_dim=7)
    x = pair.sample(30)
    evidence = pv.exact(pair.model, pair.guide, x)
    assert evidence.method == "exact, linear-Gaussian"
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-10)
    assert evidence.se.max() < 1e-11, "rounding alone"
    assert evidence.reliable.all()


@pytest.mark.usefixtures("float64")
def test_programs_that_take_no_particles_are_linear_gaussian_one_by_one():
    pair = LinearGaussian(latent_dim=2, data_dim=3)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = (z @ pair.weight.T + pair.bias).reshape(len(x), 3)
            pyro.sample("x", dist.Normal(loc, pair.noise).to_event(1), obs=x)

    x = pair.sample(5)
    evidence, together = pv.exact(model, pair.guide, x, vectorize_particles=False), pv.exact(pair.model, pair.guide, x)
    assert evidence.method == "exact, linear-Gaussian"
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-10)
    np.testing.assert_allclose(evidence.se, together.se, rtol=0.5)
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        pv.exact(model, pair.guide, x)


@pytest.mark.usefixtures("float64")
def test_a_chain_of_normals_in_inner_plates_is_linear_gaussian_too():
    pair = nested_plates_pair(-1)
    x = torch.randn(4, 6)  # four items of six data
    evidence = pv.exact(pair.model, pair.guide, x)
    covariance = np.ones((4, 4)) + (0.5**2 + 0.3**2) * np.eye(4)
    assert evidence.method == "exact, linear-Gaussian"
    np.testing.assert_allclose(evidence.log_px, stats.multivariate_normal(np.zeros(4), covariance).logpdf(x.T.numpy()))


@pytest.mark.usefixtures("float64")
def test_quadrature_agrees_with_the_closed_form_and_with_scipy():
    pair = LinearGaussian()
    x = pair.sample(20)
    evidence = pv.exact(pair.model, pair.guide, x, method="quadrature")
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-5)
    evidence = pv.exact(pair.model, pair.guide, x, method="quadrature", tolerance=1e-7)
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-9)
    curved = curved_pair()
    x = curved.sample(2)
    evidence = pv.exact(curved.model, curved.guide, x)
    assert evidence.method == "exact, by quadrature"
    for datum, log_px in zip(x.numpy(), evidence.log_px, strict=True):
        nodes, weights = np.polynomial.legendre.leggauss(200)
        z = 7 * np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
        likelihood = stats.norm(curved.decode(torch.as_tensor(z)).numpy(), curved.noise).logpdf(datum).sum(1)
        truth = logsumexp(likelihood + stats.norm.logpdf(z).sum(1), b=49 * np.outer(weights, weights).ravel())
        assert log_px == pytest.approx(truth, abs=1e-6)


@pytest.mark.usefixtures("float64")
def test_quadrature_on_positive_latents_and_narrow_posteriors():
    pair = counts_pair()
    y = torch.tensor([0.0, 1, 5, 30])
    evidence = pv.exact(pair.model, pair.guide, y)
    np.testing.assert_allclose(evidence.log_px, pair.log_px(y), atol=1e-8)
    narrow = LinearGaussian(noise=1e-3)

    def lost(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(torch.full((2,), 3.0), 0.01).to_event(1))

    x = narrow.sample(5)
    evidence = pv.exact(narrow.model, lost, x, method="quadrature")
    np.testing.assert_allclose(evidence.log_px, narrow.log_px(x), atol=1e-6)


@pytest.mark.usefixtures("float64")
def test_quadrature_finds_two_modes_and_heavy_tails():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(1.5, 0.0, 1.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.05), obs=x)

    def guide(x: torch.Tensor) -> None:  # sees one mode
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = torch.tensor([0.3, 1.0, 4.0])
    evidence = pv.exact(model, guide, x)
    prior = stats.t(1.5)
    for datum, log_px in zip(x.tolist(), evidence.log_px, strict=True):
        z = np.linspace(datum - 0.6, datum + 0.6, 2001)
        one = integrate.simpson(prior.pdf(z) * stats.norm(np.abs(z), 0.05).pdf(datum) * (z > 0), z)
        assert log_px == pytest.approx(np.log(2 * one), abs=1e-4)


@pytest.mark.usefixtures("float64")
def test_two_resolutions_say_what_kinks_cost():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(3 * torch.relu(z), 0.2), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 3, 0.5))

    x = torch.tensor([0.0, 0.1, 1.0])
    evidence = pv.exact(model, guide, x)
    z = np.linspace(0, 3, 4001)
    above = integrate.simpson(stats.norm.pdf(z) * stats.norm(3 * z, 0.2).pdf(x.numpy()[:, None]), z)
    truth = np.log(0.5 * stats.norm(0, 0.2).pdf(x.numpy()) + above)
    assert evidence.method == "exact, by quadrature"
    assert (np.abs(evidence.log_px - truth) <= evidence.se + 1e-6).all()
    assert evidence.se.max() < 1e-5


@pytest.mark.usefixtures("float64")
def test_discrete_latents_in_plates_are_summed():
    pair = switches_pair()
    x = torch.randn(11, 2)
    for vectorize in (True, False):
        evidence = pv.exact(pair.model, pair.guide, x, vectorize_particles=vectorize)
        assert (evidence.method, evidence.num_samples) == ("exact, by enumeration", 3 * 2 * 2)
        np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-12)


@pytest.mark.usefixtures("float64")
def test_discrete_latents_of_programs_that_take_no_particles_are_summed_one_by_one():
    means = torch.tensor([-1.0, 0.5, 2.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
            pyro.sample("x", dist.Normal(means[c].reshape(len(x)), 0.8), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(len(x), 3)))

    x = torch.randn(5)
    evidence = pv.exact(model, guide, x, vectorize_particles=False)
    each = stats.norm(means.numpy(), 0.8).logpdf(x.numpy()[:, None])
    np.testing.assert_allclose(evidence.log_px, logsumexp(each, axis=1, b=[0.2, 0.5, 0.3]), rtol=1e-12)
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        pv.exact(model, guide, x)


@pytest.mark.usefixtures("float64")
def test_the_rounding_of_a_log_joint_is_its_formula():
    scale, shift = 0.4, torch.tensor([1.0, -20.0, 3.0])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * shift, scale).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, 0], 1.0))

    x, z = torch.randn(4, 3), torch.randn(1, 4)
    inner = UnconstrainedPair(model, guide, (x,))
    found = log_joint_rounding(inner.model_trace(z[..., None])[0], inner.data, 1, inner.nesting)
    expected = torch.zeros(1, 4)
    for value, loc, spread in ((z[..., None], torch.zeros(1), 1.0), (x, z[..., None] * shift, scale)):
        log_prob = torch.distributions.Normal(loc, spread).log_prob(value)
        terms = log_prob.abs() + ((value - loc) / spread**2 * value).abs()
        expected += log_prob.sum(-1).abs() + 2 * terms.square().sum(-1).sqrt()
    torch.testing.assert_close(found, torch.finfo(torch.float64).eps * expected, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("float64")
def test_what_only_looks_linear_is_refused_as_such():
    hidden = torch.nn.Linear(3, 3)

    def pair_of(decode, scale=lambda z: 0.5):
        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(decode(z), scale(z)).to_event(1), obs=x)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

        return model, guide

    x = torch.randn(4, 3)
    for decode, why in [
        (lambda z: torch.relu(hidden(z) + 100), "takes relu of a latent"),  # affine wherever one probes it
        (lambda z: z * (z > -100), "takes gt of a latent"),  # a mask, which autograd's graph does not show
        (lambda z: z * z[..., :1], "takes a product .mul. of a latent"),
        (lambda z: z.detach() + 0.0, "takes detach of a latent"),
        (lambda z: z / z.sum(-1, keepdim=True), "takes a quotient of a latent"),
        (lambda z: z * z.amax().item(), "depend on the other data of its batch"),
    ]:
        with pytest.raises(ValueError, match=why):
            pv.exact(*pair_of(decode), x, method="linear_gaussian")
    with pytest.raises(ValueError, match="the scale of its site 'x' depends on a latent"):
        pv.exact(*pair_of(hidden, lambda z: 1 + z * 0), x, method="linear_gaussian")
    for decode in (
        hidden,
        lambda z: z.flip(-1)[..., [2, 0, 1]] / 2 - z.sum(-1, keepdim=True),
        torch.nn.Sequential(hidden, hidden),
    ):
        assert pv.exact(*pair_of(decode), x).method == "exact, linear-Gaussian"


def test_what_has_no_exact_answer_is_refused_in_a_sentence():
    vae = pv.make_vae(6, latent_dim=3, hidden=[8])
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match=r"no exact answer for 3 continuous latent numbers .* 'x' is Bernoulli, not Normal"):
        pv.exact(vae.model, vae.guide, x)
    with pytest.raises(ValueError, match="one or two continuous latent numbers"):
        pv.exact(vae.model, vae.guide, x, method="quadrature")
    with pytest.raises(ValueError, match="no finite support"):
        pv.exact(vae.model, vae.guide, x, method="enumerate")
    with pytest.raises(ValueError, match="quadrature"):
        pv.exact(vae.model, vae.guide, x, method="quadratur")
    flat = pv.make_vae(6, latent_dim=2, hidden=[8])
    evidence = pv.exact(flat.model, flat.guide, x, tolerance=1e-4)  # float32, ReLU
    sampled = flat.log_marginal(x, num_samples=20000, seed=0)
    assert (np.abs(evidence.log_px - sampled.log_px) < 4 * sampled.se + 1e-3).all()


def pair_of(prior: Callable[[], Any], likelihood: Callable[[torch.Tensor], Any], guide: Callable[[torch.Tensor], Any]):
    """z ~ prior, x | z ~ likelihood, and a guide, for scalar data."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide_program(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", guide(x))

    return model, guide_program


def integral(log_f: Callable[[np.ndarray], np.ndarray], low: float, high: float, number: int = 400_001) -> float:
    """log of the integral of exp log_f, by the trapezoidal rule."""
    z = np.linspace(low, high, number)
    log_values = log_f(z)
    top = log_values.max()
    return top + np.log(integrate.trapezoid(np.exp(log_values - top), z))


@pytest.mark.parametrize(
    ("data_dim", "latent_dim", "noise", "offset"),
    [(100, 5, 0.01, 0.0), (50, 3, 1e-3, 0.0), (784, 20, 0.1, 3.0), (100, 5, 0.01, 3e3)],
)
def test_float32_linear_gaussian_pairs_are_right_within_what_rounding_may_cost(data_dim, latent_dim, noise, offset):
    random = np.random.default_rng(0)
    weight = torch.tensor(random.normal(size=(data_dim, latent_dim)), dtype=torch.float32)
    bias = torch.tensor(random.normal(size=data_dim) + offset, dtype=torch.float32)
    z = random.normal(size=(8, latent_dim))
    x = z @ weight.double().numpy().T + bias.double().numpy() + noise * random.normal(size=(8, data_dim))
    x = torch.tensor(x, dtype=torch.float32)
    noise = torch.tensor(noise)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + bias, noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), latent_dim), 1.0).to_event(1))

    evidence = pv.exact(model, guide, x)
    wide = weight.double().numpy()
    covariance = wide @ wide.T + noise.double().item() ** 2 * np.eye(data_dim)
    truth = stats.multivariate_normal(bias.double().numpy(), covariance).logpdf(x.double().numpy())
    error = np.abs(evidence.log_px - truth)
    assert evidence.method == "exact, linear-Gaussian"
    assert (error < 3 * evidence.se).all()
    if offset < 1e3:
        assert error.max() < 0.005
        assert evidence.reliable.all()
    else:  # float32 holds such locations to two hundredths of the noise
        assert not evidence.reliable.any()
        assert "score in float64" in evidence.summary()


def test_residuals_are_taken_where_they_are_small():
    """Latents in the thousands and a bias: what float32 loses of a slope, times them, is more than it loses at the mean."""
    random = np.random.default_rng(2)
    weight, bias = (torch.tensor(random.normal(size=100), dtype=torch.float32) for _ in range(2))
    bias = 50 * bias
    z = 1000 * random.normal(size=(8, 1))
    x = torch.tensor(z * weight.double().numpy() + bias.double().numpy() + random.normal(size=(8, 100)), dtype=torch.float32)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1000.0))
            pyro.sample("x", dist.Normal(z[..., None] * weight + bias, 1.0).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1000.0))

    evidence = pv.exact(model, guide, x)
    wide = weight.double().numpy()
    covariance = 1e6 * np.outer(wide, wide) + np.eye(100)
    error = np.abs(evidence.log_px - stats.multivariate_normal(bias.double().numpy(), covariance).logpdf(x.double().numpy()))
    assert (error < 3 * evidence.se).all()
    assert error.max() < 0.003
    assert evidence.reliable.all()


def test_float32_chains_with_full_covariances_and_masks_are_right_too():
    tril = torch.tensor([[0.02, 0.0], [0.01, 0.03]])
    seen = torch.tensor([[True, True, False], [True, False, True], [True, True, True]])
    x = torch.tensor([[1.02, 0.4, 9.0], [-0.3, 5.0, 1.1], [2.0, 2.51, 1.2]])
    loads = torch.tensor([[1.0, 0.0, 0.6], [0.3, 1.2, 0.5]])

    def model(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.tensor([0.5, 0.2]), 2.0).to_event(1))
            b = pyro.sample("b", dist.MultivariateNormal(a.flip(-1) + 1, scale_tril=tril))
            pyro.sample("x", dist.Normal(b @ loads, 0.01).mask(seen).to_event(1), obs=x)

    def guide(x: torch.Tensor, seen: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x), 2), 2.0).to_event(1))
            pyro.sample("b", dist.MultivariateNormal(a, scale_tril=tril))

    evidence = pv.exact(model, guide, (x, seen))
    wide, root = loads.double().numpy(), tril.double().numpy()
    mean = np.array([1.2, 1.5]) @ wide
    covariance = wide.T @ (4 * np.eye(2) + root @ root.T) @ wide + 1e-4 * np.eye(3)
    for datum, here, log_px, se in zip(x.double().numpy(), seen.numpy(), evidence.log_px, evidence.se, strict=True):
        truth = stats.multivariate_normal(mean[here], covariance[np.ix_(here, here)]).logpdf(datum[here])
        assert abs(log_px - truth) < 3 * se < 0.05


def test_sums_over_few_values_state_their_rounding():
    random = np.random.default_rng(0)
    means = torch.tensor(3 * random.normal(size=(4, 1000)), dtype=torch.float32)
    x = (means.double() + 0.01 * torch.as_tensor(random.normal(size=(4, 1000)))).float()
    share, noise = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor(0.01)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(share))
            pyro.sample("x", dist.Normal(means[z], noise).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(share.expand(len(x), 4)))

    evidence = pv.exact(model, guide, x)
    each = stats.norm(means.double().numpy()[:, None], noise.double().item()).logpdf(x.double().numpy()).sum(-1)
    truth = logsumexp(each + np.log(share.double().numpy())[:, None], axis=0)
    error = np.abs(evidence.log_px - truth)
    assert (error < evidence.se).all()
    assert error.max() > 1e-6
    assert evidence.se.max() < 0.01
    assert "exact to rounding" in evidence.summary()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("double", [True, False])
def test_quadrature_finds_modes_that_the_guide_does_not(double: bool):
    def likelihood(z: torch.Tensor) -> Any:
        return dist.Normal(z.square(), 1e-3)

    x = torch.tensor([4.0, 9.0, 16.0])
    if not double:
        x = x.float()
        torch.set_default_dtype(torch.float32)
    evidence = pv.exact(*pair_of(lambda: dist.Normal(0.0, 1.0), likelihood, lambda x: dist.Normal(x.sqrt(), 1e-3)), x)
    for datum, log_px, se in zip(x.tolist(), evidence.log_px, evidence.se, strict=True):
        root = math.sqrt(datum)
        truth = math.log(2) + integral(
            lambda z, datum=datum: stats.norm.logpdf(z) + stats.norm(z**2, 1e-3).logpdf(datum), root - 0.01, root + 0.01
        )
        assert abs(log_px - truth) < se + 1e-9
    assert evidence.reliable.all()


SHAPES: list[tuple[Callable[[Any, Any], Any], float, float]] = [
    (lambda z, m: m.sin(20 * z), 0.7, 1e-3),  # a comb of modes
    (lambda z, m: m.exp(-((z - 1) ** 2)) + 2 * m.exp(-4 * (z + 2) ** 2), 0.9, 1e-2),  # three, of different widths
    (lambda z, m: z**3 - 3 * z, 1.0, 1e-3),  # three roots
    (lambda z, m: abs(z), 2.5, 1e-3),  # two, with a kink between
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("decode", "x", "noise"), SHAPES)
def test_all_modes_of_one_latent_are_summed(decode: Callable[[Any, Any], Any], x: float, noise: float):
    pair = pair_of(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(decode(z, torch), noise), lambda x: dist.Normal(x, 0.1))
    evidence = pv.exact(*pair, torch.tensor([x]))
    truth = integral(lambda z: stats.norm.logpdf(z) + stats.norm(decode(z, np), noise).logpdf(x), -9, 9, 4_000_001)
    assert evidence.log_px[0] == pytest.approx(truth, abs=max(1e-6, evidence.se[0]))
    assert evidence.reliable[0]


@pytest.mark.usefixtures("float64")
def test_a_ring_of_two_latents_is_summed_and_a_thin_curve_is_flagged():
    def ring(noise: float):
        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                a = pyro.sample("a", dist.Normal(0.0, 1.0))
                b = pyro.sample("b", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal((a**2 + b**2).sqrt(), noise), obs=x)

        def guide(x: torch.Tensor) -> None:  # one point of the ring
            with pyro.plate("data", len(x)):
                pyro.sample("a", dist.Normal(x, 0.1))
                pyro.sample("b", dist.Normal(0 * x, 0.1))

        return model, guide

    x = [0.5, 2.0]
    for noise in (0.05, 1e-5):
        evidence = pv.exact(*ring(noise), torch.tensor(x))
        for datum, log_px, se, reliable in zip(x, evidence.log_px, evidence.se, evidence.reliable, strict=True):
            truth = integral(
                lambda r, datum=datum, noise=noise: stats.rayleigh.logpdf(r) + stats.norm(r, noise).logpdf(datum),
                max(1e-12, datum - 12 * noise), datum + 12 * noise,
            )  # fmt: skip
            assert abs(log_px - truth) < 1e-5 or (not reliable and se > abs(log_px - truth))
            assert reliable or noise == 1e-5


@pytest.mark.usefixtures("float64")
def test_a_spike_between_all_points_is_flagged_where_a_draw_shows_it():
    def prior() -> Any:
        return dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.5, 0.5])), dist.Normal(torch.tensor([0.0, 37.3]), torch.tensor([1.0, 1e-7]))
        )

    x = torch.tensor([37.0, 0.0])
    evidence = pv.exact(*pair_of(prior, lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x, 1.0)), x)
    truth = np.log(0.5 * stats.norm(0, math.sqrt(2)).pdf(x) + 0.5 * stats.norm(37.3, 1).pdf(x))
    good = np.abs(evidence.log_px - truth) < 1e-5
    assert (good | ~evidence.reliable).all()
    assert evidence.reliable[1]


@pytest.mark.usefixtures("float64")
def test_slanting_ridges_and_heavy_tails_of_two_latents_are_settled():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            b = pyro.sample("b", dist.Normal(a, 1e-3))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(x / 2, 1.0))
            pyro.sample("b", dist.Normal(a, 1.0))

    x = torch.tensor([-1.0, 2.0])
    evidence = pv.exact(model, guide, x, method="quadrature")
    np.testing.assert_allclose(evidence.log_px, stats.norm(0, math.sqrt(2 + 1e-6)).logpdf(x), atol=1e-6)
    assert evidence.reliable.all()

    def tails(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Cauchy(0.0, 1.0))
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Cauchy(a, b), obs=x)  # given b, Cauchy of scale 1 + b

    def guide_tails(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Cauchy(x, 1.0))
            pyro.sample("b", dist.Gamma(2.0 + 0 * x, 1.0))

    evidence = pv.exact(tails, guide_tails, x)
    for datum, log_px in zip(x.tolist(), evidence.log_px, strict=True):
        truth = integral(lambda b, datum=datum: stats.gamma(2).logpdf(b) + stats.cauchy(0, 1 + b).logpdf(datum), 1e-9, 60)
        assert log_px == pytest.approx(truth, abs=1e-5)
    assert evidence.reliable.all()


def wrapped(prior: Callable[[], Any], decode: Callable[[Any, Any], Any], density: Callable[[np.ndarray], np.ndarray]):
    """A pair over one angle, and log p(x) by one turn."""
    pair = pair_of(prior, lambda z: dist.Normal(decode(z, torch), 1.0), lambda x: prior().expand(x.shape))

    def truth(x: float) -> float:
        return integral(lambda z: density(z) + stats.norm(decode(z, np), 1.0).logpdf(x), -np.pi, np.pi)

    return pair, truth


ANGLES: dict[str, Any] = {
    "table": wrapped(lambda: dist.VonMises(0.0, 1.0), lambda z, m: 2 * m.cos(z), stats.vonmises(1.0).logpdf),
    "across the cut": wrapped(
        lambda: dist.VonMises(3.0, 8.0), lambda z, m: m.sin(z) + 3 * m.cos(z), stats.vonmises(8.0, 3.0).logpdf
    ),
    "skewed": wrapped(
        lambda: dist.VonMises(0.5, 2.0), lambda z, m: z, stats.vonmises(2.0, 0.5).logpdf  # the angle's own number
    ),
}  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ANGLES)
def test_angles_are_integrated_over_one_turn(name: str):
    pair, truth = ANGLES[name]
    x = torch.tensor([-1.0, 0.5, 2.0])
    expected = np.array([truth(datum) for datum in x.tolist()])
    evidence = pv.exact(*pair, x)
    np.testing.assert_allclose(evidence.log_px, expected, atol=1e-5)
    assert evidence.reliable.all()
    refined = pv.log_marginal(*pair, x, num_samples=4000, proposal="refined", seed=0)
    assert (np.abs(refined.log_px - expected) < 5 * refined.se).all()
    annealed = pv.ais(*pair, x, num_temperatures=30, leapfrog_steps=3, num_chains=64, seed=0)
    assert (np.abs(annealed.log_px - expected) < 5 * annealed.se).all()


@pytest.mark.usefixtures("float64")
def test_two_angles_and_a_stretched_one_have_one_turn_each():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.VonMises(torch.tensor([0.3, -1.0]), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z.cos().sum(-1), 0.5), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.VonMises(torch.zeros(len(x), 2), 2.0).to_event(1))

    x = torch.tensor([0.0, 1.5])
    a = np.linspace(-np.pi, np.pi, 2001)[:-1]
    log_prior = stats.vonmises(2.0, 0.3).logpdf(a)[:, None] + stats.vonmises(2.0, -1.0).logpdf(a)
    loc = np.cos(a)[:, None] + np.cos(a)
    truth = [logsumexp(log_prior + stats.norm(loc, 0.5).logpdf(datum)) + 2 * np.log(a[1] - a[0]) for datum in x.tolist()]
    np.testing.assert_allclose(pv.exact(model, guide, x).log_px, truth, atol=1e-5)

    def clock() -> Any:
        turn = dist.VonMises(0.0, 1.5)
        return dist.TransformedDistribution(turn, [dist.transforms.AffineTransform(12.0, 12 / np.pi)])

    pair = pair_of(clock, lambda hour: dist.Normal(hour / 10, 0.4), lambda x: dist.Uniform(torch.zeros_like(x), 24.0))
    evidence = pv.exact(*pair, x)
    for datum, log_px in zip(x.tolist(), evidence.log_px, strict=True):
        truth = integral(
            lambda z, datum=datum: stats.vonmises(1.5).logpdf(z) + stats.norm(1.2 + 1.2 * z / np.pi, 0.4).logpdf(datum),
            -np.pi, np.pi,
        )  # fmt: skip
        assert log_px == pytest.approx(truth, abs=1e-5)


@pytest.mark.usefixtures("float64")
def test_a_direction_on_a_sphere_is_refused_by_its_name():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("heading", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
            pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("heading", dist.ProjectedNormal(torch.tensor([1.0, 0.0]).expand(len(x), 2)))

    for score in (pv.exact, pv.ais, pv.refine):
        with pytest.raises(ValueError, match=r"latent site 'heading' .ProjectedNormal."):
            score(model, guide, torch.zeros(3))


@pytest.mark.usefixtures("float64")
def test_mixtures_live_where_any_component_does():
    weights = torch.tensor([0.3, 0.7])

    def normals() -> Any:
        return dist.MixtureSameFamily(
            dist.Categorical(weights), dist.Normal(torch.tensor([-2.0, 1.0]), torch.tensor([0.5, 1.0]))
        )

    def gammas() -> Any:
        return dist.MixtureSameFamily(dist.Categorical(weights), dist.Gamma(torch.tensor([2.0, 9.0]), torch.tensor([2.0, 3.0])))

    def uniforms() -> Any:
        low, high = torch.tensor([-2.0, 1.0]), torch.tensor([-1.0, 4.0])
        return dist.MixtureSameFamily(
            dist.Categorical(weights), dist.Uniform(low, high, validate_args=False), validate_args=False
        )

    densities = {
        normals: lambda z: 0.3 * stats.norm(-2, 0.5).pdf(z) + 0.7 * stats.norm(1, 1).pdf(z),
        gammas: lambda z: 0.3 * stats.gamma(2, scale=1 / 2).pdf(z) + 0.7 * stats.gamma(9, scale=1 / 3).pdf(z),
        uniforms: lambda z: 0.3 * stats.uniform(-2, 1).pdf(z) + 0.7 * stats.uniform(1, 3).pdf(z),
    }
    x = torch.tensor([-1.0, 0.5, 2.0])
    for prior, density in densities.items():
        pair = pair_of(prior, lambda z: dist.Normal(z, 1.0), lambda x, prior=prior: prior().expand(x.shape))
        z = np.linspace(-12, 15, 1_080_001)
        truth = np.log([integrate.trapezoid(density(z) * stats.norm(z, 1).pdf(datum), z) for datum in x.tolist()])
        evidence = pv.exact(*pair, x)
        np.testing.assert_allclose(evidence.log_px, truth, atol=3e-5)
        assert evidence.reliable.all()
        refined = pv.log_marginal(*pair, x, num_samples=4000, proposal="refined", seed=0)
        assert (np.abs(refined.log_px - truth) < 5 * refined.se).all()


@pytest.mark.parametrize("prior", ["mixture", {"kind": "vamp", "components": 20}], ids=["mixture", "vamp"])
def test_our_own_mixture_priors_have_exact_answers(prior: Any):
    vae = pv.make_vae(4, latent_dim=2, hidden=[8], prior=prior, activation="tanh")
    x = torch.bernoulli(torch.full((3, 4), 0.5))
    evidence = pv.exact(vae.model, vae.guide, x)
    assert evidence.reliable.all()
    sampled = vae.log_marginal(x, num_samples=20_000, seed=0)
    assert (np.abs(evidence.log_px - sampled.log_px) < 5 * sampled.se + 1e-4).all()
    assert np.isfinite(pv.ais(vae.model, vae.guide, x, num_temperatures=5, leapfrog_steps=2, seed=0).log_px).all()
    assert np.isfinite(vae.log_marginal(x, num_samples=100, proposal="refined", seed=0).log_px).all()


@pytest.mark.usefixtures("float64")
def test_uniforms_take_bounds_of_any_shape_and_from_earlier_latents():
    x = torch.tensor([[-1.0, -1, 0], [0.5, 0, 2], [2.0, 1, 4]])
    bounds: list[Callable[[torch.Tensor], Any]] = [
        lambda x: dist.Uniform(0.0, 1.0),
        lambda x: dist.Uniform(torch.tensor(-1.0), torch.tensor(2.0)),
        lambda x: dist.Uniform(x[:, 1], x[:, 2]),
    ]
    for prior in bounds:

        def model(x: torch.Tensor, prior=prior) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("z", prior(x)), 1.0), obs=x[:, 0])

        def guide(x: torch.Tensor, prior=prior) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", prior(x))

        distribution, datum = prior(x), x[:, 0].numpy()
        low, high = distribution.low.numpy(), distribution.high.numpy()
        truth = np.log((stats.norm.cdf(high - datum) - stats.norm.cdf(low - datum)) / (high - low))
        np.testing.assert_allclose(pv.exact(model, guide, x).log_px, truth, atol=1e-5)
        refined = pv.log_marginal(model, guide, x, num_samples=4000, proposal="refined", seed=0)
        assert (np.abs(refined.log_px - truth) < 5 * refined.se).all()
        annealed = pv.ais(model, guide, x, num_temperatures=30, leapfrog_steps=3, num_chains=64, seed=0)
        assert (np.abs(annealed.log_px - truth) < 5 * annealed.se).all()

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            b = pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))  # so b is exponential
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0 + 0 * x, 1.0))
            pyro.sample("b", dist.Uniform(torch.zeros_like(a), a))

    x = torch.tensor([-1.0, 0.5, 2.0])
    truth = np.array([integral(lambda b, datum=datum: stats.norm(b, 1).logpdf(datum) - b, 0, 60) for datum in x.tolist()])
    evidence = pv.exact(model, guide, x)
    np.testing.assert_allclose(evidence.log_px, truth, atol=1e-5)
    assert evidence.reliable.all()
    refined = pv.log_marginal(model, guide, x, num_samples=4000, proposal="refined", seed=0)
    assert (np.abs(refined.log_px - truth) < 5 * refined.se).all()


@pytest.mark.usefixtures("float64")
def test_a_guide_with_draws_outside_the_support_still_says_where_to_look():
    x = torch.tensor([0.5, 2.0])
    pair = pair_of(lambda: dist.Uniform(0.0, 1.0), lambda z: dist.Normal(z, 1.0), lambda x: dist.Normal(x / 2, 1.0))
    truth = np.log(stats.norm.cdf(1 - x.numpy()) - stats.norm.cdf(-x.numpy()))
    with pyro.validation_enabled(False):
        np.testing.assert_allclose(pv.exact(*pair, x).log_px, truth, atol=1e-5)
        refined = pv.log_marginal(*pair, x, num_samples=4000, proposal="refined", seed=0)
        assert (np.abs(refined.log_px - truth) < 5 * refined.se).all()
        with pytest.raises(ValueError, match=r"'z' lies outside the support .* start from the prior"):
            pv.ais(*pair, x, start="guide", num_temperatures=5, seed=0)


@pytest.mark.usefixtures("float64")
def test_latents_masked_inside_their_distribution_are_refused():
    def pair(mask: torch.Tensor | bool):
        def model(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(mask).to_event(1))
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

        def guide(x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).mask(mask).to_event(1))

        return model, guide

    x = torch.zeros(1)
    for mask in (torch.tensor([True, False]), False):
        for score in (pv.exact, pv.ais, pv.refine):
            with pytest.raises(ValueError, match="latent site 'z' is masked"):
                score(*pair(mask), x)
    whole = pv.exact(*pair(torch.tensor([True, True])), x)
    assert whole.log_px[0] == pytest.approx(stats.norm(0, math.sqrt(3)).logpdf(0), abs=1e-9)


def test_four_million_terms_are_summed_without_float32s_steps():
    x = torch.randn(1, 2**22)

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
            pyro.sample("x", dist.Normal(0.001 * z[..., None], 1.0).expand([*z.shape, 2**22]).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.full((len(x),), 0.5, dtype=x.dtype), 1e-12))  # in either type the same place

    short, wide = (pv.log_weights(model, guide, data, num_particles=1).log_likelihood for data in (x, x.double()))
    assert abs(short.item() - wide.item()) < 0.01
    assert wide.abs().item() > 5e6, "where float32 goes in steps of half a nat"
