from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zuko
from pairs import LinearGaussian, bare_param_pair, counts_pair, curved_pair, switches_pair, two_latents_pair
from pyro.contrib.zuko import ZukoToPyro
from scipy import optimize
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.evidence.proposals import Probe, missed_nats, mixture_draws, prior_count
from pyrovae.programs.log_weights import log_weights, prior_weights
from pyrovae.programs.unconstrained import UnconstrainedPair

KINDS = ["guide", "prior", "mixture", "refined"]


def far_guide(x: torch.Tensor) -> None:
    """Off by many standard deviations of the posterior, and narrow."""
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(torch.full((x.shape[0], 2), 1.2), 0.3).to_event(1))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_every_proposal_agrees_with_the_closed_form_within_its_error(kind: str):
    pair = LinearGaussian(spread=1.2)
    x = pair.sample(100)
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=1000, proposal=kind, seed=0)
    z = (evidence.log_px - pair.log_px(x)) / np.maximum(evidence.se, 1e-6)
    # The prior wastes its samples, and its logarithm is skewed; its errors are large, and said to be.
    assert np.mean(np.abs(z) < 3) >= (0.95 if kind == "prior" else 0.98)
    assert abs(evidence.mean - pair.log_px(x).mean()) < 5 * evidence.mean_se + 0.001
    assert evidence.method == ("importance sampling" if kind == "guide" else evidence.method)
    assert kind == "guide" or kind in evidence.method


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_every_proposal_works_on_positive_latents_and_foreign_names(kind: str):
    pair = counts_pair()
    y = torch.tensor([0.0, 1, 3, 6]).repeat(30)
    evidence = pv.log_marginal(pair.model, pair.guide, y, num_samples=4000, proposal=kind, seed=0)
    z = (evidence.log_px - pair.log_px(y)) / evidence.se
    light = kind == "guide"  # its tails are lighter than the posterior's, k is 0.57, so its errors are too small
    assert abs(z.mean()) < (0.8 if light else 0.4)  # four of its own errors
    assert 0.75 < z.std() < (1.6 if light else 1.25)
    assert np.median(evidence.se) < 0.02


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["guide", "prior", "mixture"])
def test_discrete_latents_and_inner_plates(kind: str):
    pair = switches_pair()
    x = torch.tensor([[0.1, -1.0], [2.0, 1.5], [-3.0, 0.4]])
    evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=4000, proposal=kind, seed=0)
    assert (np.abs(evidence.log_px - pair.log_px(x)) < 4 * evidence.se).all()
    with pytest.raises(ValueError, match=r"'c' .Categorical. is discrete"):
        pv.log_marginal(pair.model, pair.guide, x, num_samples=50, proposal="refined")


@pytest.mark.usefixtures("float64")
def test_every_proposal_agrees_with_quadrature_on_a_curved_pair():
    pair = curved_pair()
    x = pair.sample(30)
    truth = pv.exact(pair.model, pair.guide, x, method="quadrature")
    for kind in KINDS:
        evidence = pv.log_marginal(pair.model, pair.guide, x, num_samples=4000, proposal=kind, seed=0)
        sure = evidence.reliable
        assert sure.sum() > 10, kind
        assert (np.abs(evidence.log_px - truth.log_px) < 4 * evidence.se + truth.se)[sure].all(), kind


@pytest.mark.usefixtures("float64")
def test_weights_of_the_mixture_are_bounded_whatever_the_guide():
    pair = LinearGaussian()
    x = pair.sample(4)
    seen = {}

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = seen["z"] = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            distribution = dist.Normal(z @ pair.weight.T + pair.bias, pair.noise).to_event(1)
            pyro.sample("x", distribution, obs=x)
            seen.setdefault("likelihood", []).append(distribution.log_prob(x))

    draw = mixture_draws(model, far_guide, True, 1, 100, 25)
    log_w = torch.cat([draw((x,), size) for size in (7, 1, 60, 32)])
    likelihood = torch.cat([part.reshape(-1, 4) for part in seen["likelihood"]])
    assert log_w.shape == likelihood.shape == (100, 4)
    assert (log_w <= likelihood - math.log(0.25) + 1e-12).all()
    # The bound is met where the guide puts nothing, so its share is in the denominator as it stands.
    assert (likelihood - math.log(0.25) - log_w).min() < 1e-6
    # The guide's own weights have no such bound.
    own = log_weights(pair.model, far_guide, x, num_particles=1000).log_weights
    mixed = pv.log_marginal(pair.model, far_guide, x, num_samples=5000, proposal="mixture", prior_share=0.5, seed=0)
    assert (np.abs(mixed.log_px - pair.log_px(x)) < 4 * mixed.se).all()
    assert torch.logsumexp(own, 0).sub(math.log(1000)).numpy() == pytest.approx(pair.log_px(x) - 40, abs=40)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("num_samples", "prior_share", "expected"), [(2, 0.9, 1), (7, 0.1, 1), (1000, 0.25, 250), (64, 0.999, 63)]
)
def test_exactly_its_share_comes_from_the_prior(num_samples: int, prior_share: float, expected: int):
    pair = LinearGaussian()
    x = pair.sample(2)
    counted = {"guide": 0, "prior": 0}

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.full((2,), 1e4), 1.0).to_event(1))
        near = z[..., 0] < 5e3
        counted["prior"] += int(near.sum())
        counted["guide"] += int((~near).sum())

    draw = mixture_draws(pair.model, guide, True, 1, num_samples, prior_count(num_samples, prior_share))
    left = num_samples
    while left:
        draw((x,), min(left, 30))
        left -= min(left, 30)
    assert counted == {"prior": 2 * expected, "guide": 2 * (num_samples - expected)}


@pytest.mark.usefixtures("float64")
def test_prior_draws_outside_the_guides_support_have_no_density_there():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(2.0, 2.0))

    x = torch.tensor([0.5, -1.0])
    weights = prior_weights(model, guide, x, num_particles=500)
    assert 0.4 < (weights.log_guide == -math.inf).double().mean() < 0.6
    evidence = pv.log_marginal(model, guide, x, num_samples=20000, proposal="mixture", prior_share=0.5, seed=0)
    truth = dist.Normal(0.0, math.sqrt(2)).log_prob(x).numpy()
    assert (np.abs(evidence.log_px - truth) < 4 * evidence.se).all()
    # The guide alone never sees the negative half: its estimate is wrong, and no number of samples shows it.
    assert pv.log_marginal(model, guide, x, num_samples=20000, seed=0).log_px[1] < truth[1] - 0.5


@pytest.mark.usefixtures("float64")
def test_a_full_refinement_finds_the_exact_posterior():
    pair = LinearGaussian(latent_dim=2, data_dim=3)
    x = pair.sample(50)
    refinement = pv.refine(pair.model, far_guide, x, covariance="full", steps=300, seed=0)
    posterior = pair.posterior(x)
    np.testing.assert_allclose(refinement.loc[:, 0], posterior.mean, atol=1e-3)
    np.testing.assert_allclose(refinement.scale_tril[:, 0], posterior.scale_tril.expand(50, 2, 2), atol=1e-3)
    np.testing.assert_allclose(refinement.elbo, pair.log_px(x), atol=1e-3)
    assert refinement.elbo_se.max() < 1e-3
    evidence = pv.log_marginal(pair.model, far_guide, x, num_samples=200, proposal=refinement, seed=0)
    np.testing.assert_allclose(evidence.log_px, pair.log_px(x), atol=1e-3)


@pytest.mark.usefixtures("float64")
def test_a_diagonal_refinement_closes_the_amortization_gap_and_leaves_that_of_its_family():
    pair = LinearGaussian(latent_dim=2, data_dim=3)
    x = pair.sample(40)
    refinement = pv.refine(pair.model, far_guide, x, num_samples=500, seed=0)
    precision = torch.linalg.inv(pair.posterior(x[:1]).covariance_matrix[0])
    family = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision)).item()  # KL of the best diagonal Gaussian
    assert np.mean(pair.log_px(x) - refinement.elbo) == pytest.approx(family, abs=0.02)
    assert refinement.amortization_gap.min() > 0
    exact_gap = np.mean(pair.log_px(x) - refinement.guide_elbo) - family
    assert refinement.amortization_gap.mean() == pytest.approx(exact_gap, abs=0.03)
    assert pv.log_marginal(pair.model, far_guide, x, num_samples=1000, seed=0).reliable.mean() < 0.2
    assert pv.log_marginal(pair.model, far_guide, x, num_samples=1000, proposal="refined", seed=0).reliable.all()


@pytest.mark.usefixtures("float64")
def test_student_tails_bound_the_weights_of_a_gaussian_target():
    pair = LinearGaussian(latent_dim=2, data_dim=3)
    x = pair.sample(40)
    refinement = pv.refine(pair.model, far_guide, x, objective="iwae", tail_df=5.0, seed=0)
    evidence = pv.log_marginal(pair.model, far_guide, x, num_samples=2000, proposal=refinement, seed=0)
    assert np.nanmax(evidence.khat) < 0.4
    assert (np.abs(evidence.log_px - pair.log_px(x)) < 4 * evidence.se).all()
    assert evidence.se.min() > 1e-4


@pytest.mark.usefixtures("float64")
def test_components_find_the_modes_that_the_guide_left_out():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.2, 1.0))
            pyro.sample("x", dist.Normal(z.square(), 0.05), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.sqrt(), 0.05))

    x = torch.tensor([0.5, 1.0, 2.0])
    truth = pv.exact(model, guide, x, method="quadrature").log_px
    right = 1 / (1 + torch.exp(-0.4 * x.sqrt())).numpy()  # the mass of the mode at +sqrt(x), to first order in its width
    one, eight = (pv.refine(model, guide, x, num_components=number, tail_df=5.0, seed=0) for number in (1, 8))
    options = {"num_samples": 4000, "seed": 0}
    blind = pv.log_marginal(model, guide, x, proposal=one, **options)
    np.testing.assert_allclose(blind.log_px - truth, np.log(right), atol=0.02)
    assert (blind.se < 0.02).all()  # which says nothing of the other mode
    for proposal in (eight, "refined"):
        evidence = pv.log_marginal(model, guide, x, proposal=proposal, **options)
        assert (np.abs(evidence.log_px - truth) < 4 * evidence.se).all()
        assert evidence.se.max() < 0.02
    # Nine tenths by mass and a tenth evenly, however many components found the same mode.
    on_the_right = eight.loc[..., 0] > 0
    even = on_the_right.mean(1)
    assert set(even) <= {k / 8 for k in range(1, 8)}
    assert len(set(even)) > 1
    np.testing.assert_allclose(np.where(on_the_right, eight.shares, 0).sum(1), 0.9 * right + 0.1 * even, atol=0.03)
    np.testing.assert_allclose(eight.shares.sum(1), 1)
    # The ELBO is that of one Gaussian, about the heavier mode.
    np.testing.assert_allclose(eight.elbo, truth + np.log(right), atol=0.02)


def test_refined_proposals_take_several_sites_float32_loaders_and_single_particles():
    chain = two_latents_pair()
    y = torch.randn(9, 4)
    loader = DataLoader(TensorDataset(y), batch_size=4)
    many = pv.log_marginal(chain.model, chain.guide, y, num_samples=200, proposal="refined", chunk_size=700, seed=0)
    other = pv.log_marginal(chain.model, chain.guide, loader, num_samples=200, proposal="refined", seed=1)
    assert len(other) == 9
    assert (np.abs(other.log_px - many.log_px) < 5 * np.hypot(other.se, many.se)).all()
    bare = bare_param_pair()
    x = torch.linspace(-1, 1, 3)
    refinement = pv.refine(
        bare.model, bare.guide, x, steps=100, num_particles=4, num_samples=20, vectorize_particles=False, seed=0
    )
    exact = dist.Normal(0.0, math.hypot(0.8, 0.6)).log_prob(x).numpy()
    np.testing.assert_allclose(refinement.elbo, exact, atol=0.03)  # a conjugate posterior is a Gaussian


@pytest.mark.parametrize("kind", ["mixture", "refined"])
def test_a_seed_repeats_the_answer_and_leaves_the_global_stream_alone(kind: str):
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    x = torch.bernoulli(torch.full((5, 6), 0.5))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second = (vae.log_marginal(x, num_samples=50, proposal=kind, seed=7) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first.log_px, second.log_px)
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_what_cannot_be_meant_is_refused_in_a_sentence():
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    x = torch.ones(4, 6)
    with pytest.raises(ValueError, match="mixture"):
        vae.log_marginal(x, num_samples=5, proposal="mixtur")
    with pytest.raises(ValueError, match="must be at least 2 for a mixture"):
        vae.log_marginal(x, num_samples=1, proposal="mixture")
    with pytest.raises(ValueError, match="prior_share must be between 0 and 1"):
        vae.log_marginal(x, num_samples=5, proposal="mixture", prior_share=1.0)
    refinement = pv.refine(vae.model, vae.guide, x[:3], steps=2, num_samples=2)
    with pytest.raises(ValueError, match="must be the 3 data of the refinement in their order"):
        vae.log_marginal(x, num_samples=5, proposal=refinement)
    for bad in (
        {"steps": 0},
        {"lr": -1.0},
        {"covariance": "none"},
        {"objective": "vr"},
        {"tail_df": 0.0},
        {"num_components": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            pv.refine(vae.model, vae.guide, x, **bad)


def test_flows_of_zuko_have_the_support_of_their_transform():
    flow = zuko.flows.NSF(2, transforms=1, hidden_features=[4])
    posterior = zuko.flows.MAF(2, 3, transforms=1, hidden_features=[4])

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", ZukoToPyro(flow()))
            pyro.sample("x", dist.Normal(torch.cat([z, z.sum(-1, keepdim=True)], -1), 0.7).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(posterior(x)))

    x = torch.randn(4, 3)
    exact = pv.exact(model, guide, x, tolerance=1e-2)
    refinement = pv.refine(model, guide, x, steps=60, num_samples=20, tail_df=5.0, seed=0)
    for proposal in ("prior", "mixture", refinement):
        evidence = pv.log_marginal(model, guide, x, num_samples=2000, proposal=proposal, seed=0)
        assert (np.abs(evidence.log_px - exact.log_px) < 4 * evidence.se + 0.01).all()
    evidence = pv.ais(model, guide, x, num_temperatures=10, start="guide", leapfrog_steps=2, seed=0)
    assert np.abs(evidence.log_px - exact.log_px).max() < 2


@pytest.mark.usefixtures("float64")
def test_the_guides_density_in_unconstrained_space_has_its_jacobian():
    """q(u) = q(T(u)) |T'(u)|: of a log-normal guide a normal, of a Gamma-distributed pair of sites what integrates to one."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            b = pyro.sample("b", dist.Beta(2.0, 3.0))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.LogNormal(0.3 * x, 0.8))
            pyro.sample("b", dist.Beta(3.0 + 0 * x, 1.5))

    x = torch.tensor([0.5, -1.0])
    flat = torch.tensor([[[0.4, -1.0], [1.3, 0.2]], [[-0.7, 2.0], [0.0, -0.6]]])
    log_guide = UnconstrainedPair(model, guide, (x,)).terms(flat, guide=True).log_guide
    share = torch.sigmoid(flat[..., 1])
    expected = dist.Normal(0.3 * x, 0.8).log_prob(flat[..., 0])
    expected = expected + dist.Beta(3.0, 1.5).log_prob(share) + (share * (1 - share)).log()
    torch.testing.assert_close(log_guide, expected)


@pytest.mark.usefixtures("float64")
def test_components_that_found_no_mass_are_still_drawn_from():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 30.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    refinement = pv.refine(model, guide, torch.zeros(5), steps=1, lr=1e-3, num_components=4, seed=0)
    assert (np.abs(refinement.loc[:, 1:, 0]) > 2).any(1).all(), "components stand where there is no mass"
    np.testing.assert_allclose(refinement.shares.min(1), 0.1 / 4, rtol=1e-6)  # a tenth, evenly
    np.testing.assert_allclose(refinement.shares.max(1), 0.9 + 0.1 / 4, rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_the_iwae_objective_is_maximised_where_its_bound_is():
    """With two particles the bound is an integral over two standard normals, so its maximum is known."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
            pyro.sample("x", dist.Exponential(rate), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(0 * x, 1.0))

    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = np.outer(weights, weights) / weights.sum() ** 2

    def minus_bound(at: np.ndarray) -> float:
        u = at[0] + np.exp(at[1]) * nodes
        log_w = 2 * u - 2 * np.exp(u) + at[1] + nodes**2 / 2  # Gamma(1, 1), x = 1 and the Jacobian, over the Gaussian
        return -float((weights * np.logaddexp(log_w[:, None], log_w)).sum())

    best = optimize.minimize(
        minus_bound, np.array([-0.2, -0.4]), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-10}
    ).x
    refinement = pv.refine(model, guide, torch.ones(800), steps=600, objective="iwae", num_particles=2, lr=0.05, seed=0)
    found = np.array([refinement.loc[:, 0, 0].mean(), np.log(refinement.scale_tril[:, 0, 0, 0]).mean()])
    np.testing.assert_allclose(found, best, atol=0.02)


@pytest.mark.usefixtures("float64")
def test_what_was_missed_is_its_formula():
    # Nothing beyond; one beyond, which is left out; three beyond and a NaN; one that the proposal never draws.
    largest, log_px, margin = torch.tensor([5.0, 1.0, -1.0, 2.0]), torch.tensor([0.3, -2.0, 1.5, -0.7]), 0.1
    log_likelihood = torch.randn(6, 4)
    log_weights = largest - 3 + torch.rand(6, 4)
    log_weights[0, 0] = 5.05  # equal to the largest within the margin
    log_weights[2, 1] = 1.2
    log_weights[[0, 3, 5], 2], log_weights[4, 2] = torch.tensor([0.0, 7.0, -0.8]), math.nan
    log_weights[1, 3] = math.inf
    kept = [[], [], sorted(log_likelihood[[0, 3, 4, 5], 2].tolist())[:-1], [float(log_likelihood[1, 3])]]
    expected = [
        math.log1p(sum(map(math.exp, terms)) / 6 / math.exp(mean)) for terms, mean in zip(kept, log_px.tolist(), strict=True)
    ]
    found = missed_nats(Probe(log_likelihood, log_weights), largest, log_px, margin)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
