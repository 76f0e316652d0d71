from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import LinearGaussian, counts_pair, curved_pair, nested_plates_pair, switches_pair
from scipy import integrate, stats
from scipy.special import logsumexp

import pyrovae as pv


@pytest.mark.usefixtures("float64")
def test_linear_gaussian_pairs_have_a_closed_form():
    pair = LinearGaussian(latent_dim=5, data_dim=7)
    x = pair.sample(30)
    evidence = pv.exact(pair.model, pair.guide, x)
    assert evidence.method == "exact, linear-Gaussian"
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-10)
    assert evidence.se.max() == 0
    assert evidence.reliable.all()


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
