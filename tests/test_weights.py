"""Log-weights against closed forms and against the same densities computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from pairs import (
    LinearGaussian,
    bare_param_pair,
    nested_plates_pair,
    pyro_module_function_pair,
    pyro_nn_pair,
    two_latents_pair,
)
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from scipy import stats
from torch import Tensor, nn
from torch import distributions as td

from pyrovae.estimators.base import make_estimator
from pyrovae.models.vae import make_vae
from pyrovae.programs.inspect import inspect_pair
from pyrovae.programs.log_weights import log_weights, prior_weights
from pyrovae.programs.parameters import find_parameters
from pyrovae.programs.weights import LogWeights, zero_negligible

pytestmark = pytest.mark.usefixtures("float64")

K, B = 6, 5


def _parts(weights: LogWeights) -> list[np.ndarray]:
    return [part.detach().numpy() for part in (weights.log_likelihood, weights.log_prior, weights.log_guide)]


def _check(weights: LogWeights, log_likelihood: Tensor, log_prior: Tensor, log_guide: Tensor) -> None:
    for found, expected in zip(_parts(weights), (log_likelihood, log_prior, log_guide), strict=True):
        assert found.shape == expected.shape
        assert_allclose(found, expected.detach().numpy(), rtol=1e-10)
    assert_allclose(weights.log_weights.detach(), (log_likelihood + log_prior - log_guide).detach(), rtol=1e-10, atol=1e-12)


# -- closed form -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("num_particles", [1, 7])
def test_exact_posterior_makes_every_weight_log_px(num_particles: int, vectorize: bool) -> None:
    pair = LinearGaussian(latent_dim=3, data_dim=5)
    x = pair.sample(20)
    weights = log_weights(pair.model, pair.guide, x, num_particles=num_particles, vectorize_particles=vectorize)
    assert weights.log_weights.shape == (num_particles, 20)
    assert (weights.num_particles, weights.num_data, weights.num_dims, weights.scale) == (num_particles, 20, 5, 1.0)
    assert_allclose(weights.log_weights, np.tile(pair.log_px(x), (num_particles, 1)), rtol=0, atol=1e-10)


def test_weights_average_to_px() -> None:
    """E_q[w] = p(x) for a guide that is not the posterior, within five standard errors of the mean."""
    pair = LinearGaussian(spread=1.3)
    x = pair.sample(10)
    weights = log_weights(pair.model, pair.guide, x, num_particles=20_000).log_weights.numpy()
    ratio = np.exp(weights - pair.log_px(x))
    assert ratio.std(0).min() > 0.1  # otherwise the guide is the posterior after all
    assert (np.abs(ratio.mean(0) - 1) < 5 * ratio.std(0) / 20_000**0.5).all()


# -- each part by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, K])
def test_parts_of_a_linear_gaussian(num_particles: int) -> None:
    pair = LinearGaussian(spread=1.4)
    x = pair.sample(B)
    weights = log_weights(pair.model, pair.guide, x, num_particles=num_particles)
    z = pair.seen["z"].numpy().reshape(num_particles, B, 2)
    mean, covariance = pair.posterior(x).mean.numpy(), pair.posterior(x).covariance_matrix.numpy()
    likelihood, prior, guide = _parts(weights)
    assert_allclose(prior, stats.norm.logpdf(z).sum(-1), rtol=1e-10)
    assert_allclose(likelihood, stats.norm.logpdf(x, z @ pair.weight.numpy().T + pair.bias.numpy(), 0.7).sum(-1), rtol=1e-10)
    for b in range(B):
        assert_allclose(guide[:, b], stats.multivariate_normal(mean[b], covariance[b]).logpdf(z[:, b]), rtol=1e-10)


@pytest.mark.parametrize("num_particles", [1, K])
def test_pair_with_pyro_module(num_particles: int) -> None:
    pair, y = pyro_module_function_pair(), torch.randint(0, 2, (B, 3)).double()
    weights = log_weights(pair.model, pair.guide, y, num_particles=num_particles)
    h = pair.seen["h"].reshape(num_particles, B, 2)
    loc, log_scale = pair.encoder(y).chunk(2, -1)
    _check(
        weights,
        td.Bernoulli(logits=pair.decoder(h)).log_prob(y).sum(-1),
        td.Normal(0, 1).log_prob(h).sum(-1),
        td.Normal(loc, log_scale.exp()).log_prob(h).sum(-1),
    )


@pytest.mark.parametrize("num_particles", [1, K])
def test_pair_of_pyro_modules(num_particles: int) -> None:
    pair, x = pyro_nn_pair(), torch.randn(B, 3)
    pyro.set_rng_seed(4)
    weights = log_weights(pair.model, pair.guide, x, num_particles=num_particles)
    pyro.set_rng_seed(4)
    distribution = td.Normal(pair.guide.loc(x), pair.guide.log_scale(x).exp())
    z = distribution.rsample((num_particles,))
    _check(
        weights,
        td.Normal(pair.model.linear(z), 0.5).log_prob(x).sum(-1),
        td.Normal(0, 1).log_prob(z).sum(-1),
        distribution.log_prob(z).sum(-1),
    )


@pytest.mark.parametrize("num_particles", [1, K])
def test_pair_of_bare_params(num_particles: int) -> None:
    pair, x = bare_param_pair(), torch.randn(B)
    weights = log_weights(pair.model, pair.guide, x, num_particles=num_particles)
    z = pair.seen["z"].reshape(num_particles, B)
    _check(weights, td.Normal(0.8 * z, 0.6).log_prob(x), td.Normal(0, 1).log_prob(z), td.Normal(0.3 * x, 0.9).log_prob(z))
    assert weights.num_dims == 1


@pytest.mark.parametrize("num_particles", [1, K])
def test_pair_with_two_latents(num_particles: int) -> None:
    pair, y = two_latents_pair(), torch.randn(B, 4)
    weights = log_weights(pair.model, pair.guide, y, num_particles=num_particles)
    a, b = (pair.seen[name].reshape(num_particles, B, -1) for name in "ab")
    nets = pair.nets
    _check(
        weights,
        td.Normal(nets.observe(b), 0.4).log_prob(y).sum(-1),
        td.Laplace(0, 1).log_prob(a).sum(-1) + td.Normal(nets.forward(a), 0.5).log_prob(b).sum(-1),
        td.Normal(nets.up(y), 0.6).log_prob(b).sum(-1) + td.Normal(nets.back(b), 0.8).log_prob(a).sum(-1),
    )
    assert weights.num_dims == 4


@pytest.mark.parametrize("data_dim", [-1, -2])
@pytest.mark.parametrize("num_particles", [1, K])
def test_pair_with_a_plate_within_a_datum(num_particles: int, data_dim: int) -> None:
    pair = nested_plates_pair(data_dim)
    x = torch.randn(B, 3) if data_dim == -2 else torch.randn(3, B)
    weights = log_weights(pair.model, pair.guide, x, num_particles=num_particles)
    # By hand with the items last: z (K, B, 1), u (K, B, 3), x (B, 3).
    z, u = pair.seen["z"], pair.seen["u"]
    if data_dim == -1:
        x, z, u = x.mT, z.mT, u.mT
    z, u = z.reshape(num_particles, B, 1), u.reshape(num_particles, B, 3)
    _check(
        weights,
        td.Normal(u, 0.3).log_prob(x).sum(-1),
        td.Normal(0, 1).log_prob(z).squeeze(-1) + td.Normal(z, 0.5).log_prob(u).sum(-1),
        td.Normal(0.4 * x.mean(-1, keepdim=True), 0.7).log_prob(z).squeeze(-1) + td.Normal(0.8 * x, 0.4).log_prob(u).sum(-1),
    )
    assert weights.num_dims == 3
    info = inspect_pair(pair.model, pair.guide, x if data_dim == -2 else x.mT)
    assert (info.max_plate_nesting, info.num_data, info.latents) == (2, B, ("z", "u"))


def _masked(how: str) -> Callable[[Tensor, Tensor], None]:
    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            distribution = dist.Normal(z[..., None].expand(*z.shape, 4), 0.5)
            if how == "site":
                pyro.sample("x", distribution.mask(mask).to_event(1), obs=x)
            else:
                with poutine.mask(mask=mask[:, 0]):
                    pyro.sample("x", distribution.to_event(1), obs=x)

    return model


@pytest.mark.parametrize("how", ["site", "context"])
@pytest.mark.parametrize("num_particles", [1, K])
def test_masks_take_their_part_out(num_particles: int, how: str) -> None:
    x, mask = torch.randn(B, 4), torch.rand(B, 4) < 0.5
    mask[:, 0] = torch.arange(B) % 2 == 0
    seen = {}

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Normal(0.2, 0.7))

    weights = log_weights(_masked(how), guide, x, mask, num_particles=num_particles)
    z = seen["z"].reshape(num_particles, B)
    terms = td.Normal(z[..., None], 0.5).log_prob(x)
    kept = terms * mask if how == "site" else terms * mask[:, :1]
    _check(weights, kept.sum(-1), td.Normal(0, 1).log_prob(z), td.Normal(0.2, 0.7).log_prob(z))


@pytest.mark.parametrize(("inside", "outside"), [(1, 0), (0, 1), (1, 1), (1, 2), (0, 2), (1, 3), (0, 0)])
def test_what_every_mask_leaves_is_what_counts_as_observed(inside: int, outside: int) -> None:
    """Masks inside a distribution, over a site, and one within another; of data, and of a datum's items."""
    random = np.random.default_rng(0)
    inner, rows, items = (torch.as_tensor(random.random(size) < 0.5) for size in ((B, 3, 4), (B, 1), (B, 3)))
    outer = [None, rows.expand(B, 3), rows & items, False][outside]

    def model(x: Tensor) -> None:
        with pyro.plate("data", B, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("items", 3, dim=-1), poutine.mask(mask=True if outer is None else outer):
                distribution = dist.Normal(z[..., None].expand(B, 3, 4), 0.5)
                pyro.sample("x", (distribution.mask(inner) if inside else distribution).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", B, dim=-2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    left = torch.ones(B, 3, 4).bool() & (inner if inside else True)
    if outer is not None:
        left &= torch.as_tensor(outer).expand(B, 3)[..., None]
    info = inspect_pair(model, guide, torch.randn(B, 3, 4))
    assert (info.num_observed, info.num_dims) == (int(left.sum()), 12)


@pytest.mark.parametrize("num_particles", [1, K])
def test_a_masked_latent_adds_nothing_to_the_analytic_kl(num_particles: int) -> None:
    x, mask = torch.randn(B), torch.arange(B) % 2 == 0

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=mask):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(torch.where(mask, z, 0.0), 1.0), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(x, 0.6))

    (site,) = log_weights(model, guide, x, mask, num_particles=num_particles, analytic_kl=True).sites
    exact = torch.where(mask, td.kl_divergence(td.Normal(x, 0.6), td.Normal(0.0, 1.0)), 0.0)
    assert_allclose(site.kl, exact.expand(num_particles, B), rtol=1e-12)


@pytest.mark.parametrize("num_particles", [1, K])
def test_factor_counts_and_deterministic_does_not(num_particles: int) -> None:
    seen = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            double = pyro.deterministic("double", 2 * z)
            pyro.factor("tilt", -0.5 * z.square() * x)
            pyro.sample("x", dist.Normal(double, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Normal(0.2, 0.7))

    x = torch.randn(B)
    weights = log_weights(model, guide, x, num_particles=num_particles)
    z = seen["z"].reshape(num_particles, B)
    _check(
        weights,
        td.Normal(2 * z, 0.5).log_prob(x) - 0.5 * z.square() * x,
        td.Normal(0, 1).log_prob(z),
        td.Normal(0.2, 0.7).log_prob(z),
    )
    assert weights.num_dims == 1  # a factor observes nothing
    assert inspect_pair(model, guide, x).latents == ("z",)


@pytest.mark.parametrize("num_particles", [1, K])
def test_subsampling_scales_nothing_but_the_objective(num_particles: int) -> None:
    seen, data = {}, torch.randn(20)

    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=B) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=B) as rows:
            seen["rows"] = rows
            seen["z"] = pyro.sample("z", dist.Normal(0.5 * x[rows], 0.7))

    weights = log_weights(model, guide, data, num_particles=num_particles)
    assert weights.scale == 4.0
    assert weights.num_data == B
    z, x = seen["z"].reshape(num_particles, B), data[seen["rows"]]
    assert len(set(seen["rows"].tolist())) == B
    _check(weights, td.Normal(z, 0.5).log_prob(x), td.Normal(0, 1).log_prob(z), td.Normal(0.5 * x, 0.7).log_prob(z))


def test_particles_one_by_one_keep_to_one_subsample() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=B) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=B) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))  # the posterior, so a column is one datum's log p(x)

    weights = log_weights(model, guide, torch.randn(20), num_particles=4, vectorize_particles=False).log_weights
    assert_allclose(weights, weights[:1].expand(4, B), rtol=0, atol=1e-10)


def test_discrete_latents_sum_to_px() -> None:
    """Over all values of a discrete latent, sum q(z) w(z) = p(x), here a mixture of Poissons by SciPy."""
    rates, probs, guess = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    seen = {}

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(probs))
            pyro.sample("x", dist.Poisson(rates[z]), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Categorical(guess))

    x = torch.tensor([0.0, 2.0, 5.0, 12.0])
    weights = log_weights(model, guide, x, num_particles=200)
    assert weights.not_reparameterized == ("z",)
    expected = stats.poisson.pmf(x.numpy()[:, None], rates.numpy()) @ probs.numpy()
    for b in range(len(x)):
        weight_of = {z.item(): w.item() for z, w in zip(seen["z"][:, b], weights.log_weights[:, b].exp(), strict=True)}
        assert set(weight_of) == {0, 1, 2}
        assert_allclose(sum(guess[z].item() * w for z, w in weight_of.items()), expected[b], rtol=1e-12)
    assert inspect_pair(model, guide, x).not_reparameterized == ("z",)


def test_reparameterised_latents_are_not_named() -> None:
    pair = two_latents_pair()
    assert log_weights(pair.model, pair.guide, torch.randn(B, 4), num_particles=2).not_reparameterized == ()


# -- particles -------------------------------------------------------------------------------------------------------------


def test_particles_one_by_one_are_single_particles() -> None:
    pair, y = two_latents_pair(), torch.randn(B, 4)
    pyro.set_rng_seed(9)
    together = log_weights(pair.model, pair.guide, y, num_particles=4, vectorize_particles=False)
    pyro.set_rng_seed(9)
    single = [log_weights(pair.model, pair.guide, y, num_particles=1) for _ in range(4)]
    assert together.log_weights.shape == (4, B)
    assert_allclose(together.log_weights.detach(), torch.cat([one.log_weights for one in single]).detach(), rtol=1e-14)
    assert (together.num_particles, together.num_data, together.num_dims) == (4, B, 4)


def test_particles_one_by_one_follow_the_same_law() -> None:
    pair = LinearGaussian(spread=1.4)
    x = pair.sample(1)
    samples = [
        log_weights(pair.model, pair.guide, x, num_particles=400, vectorize_particles=vectorize).log_weights[:, 0].numpy()
        for vectorize in (True, False)
    ]
    assert stats.ks_2samp(*samples).pvalue > 1e-3


def test_particles_differ_and_data_differ() -> None:
    pair = LinearGaussian(spread=1.4)
    log_guide = log_weights(pair.model, pair.guide, pair.sample(1).expand(B, 3), num_particles=K).log_guide
    assert len(log_guide.flatten().unique()) == K * B


@pytest.mark.parametrize("inspect", [inspect_pair, find_parameters])
def test_looking_leaves_the_random_stream_alone(inspect: Callable) -> None:
    pair, x = pyro_module_function_pair(), torch.randint(0, 2, (B, 3)).double()
    pyro.set_rng_seed(3)
    expected = torch.randn(4)
    pyro.set_rng_seed(3)
    inspect(pair.model, pair.guide, x)
    assert torch.equal(torch.randn(4), expected)


def test_finding_the_nesting_changes_no_draw() -> None:
    pair = LinearGaussian(spread=1.4)
    x = pair.sample(B)
    found = []
    for nesting in (None, 1, None):
        pyro.set_rng_seed(3)
        found.append(log_weights(pair.model, pair.guide, x, num_particles=K, max_plate_nesting=nesting).log_weights)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_gradients_are_those_of_the_sum() -> None:
    """d/dgain E[log w] of the scalar pair has a closed form per draw: the pathwise derivative at z = gain x + spread e."""
    pair, x = bare_param_pair(), torch.randn(B)
    weights = log_weights(pair.model, pair.guide, x, num_particles=K)
    weights.log_weights.sum().backward()
    z = pair.seen["z"].detach()
    # log w = -(x - s z)^2 / 2n^2 - z^2/2 + const(gain), and dz/dgain = x.
    expected = ((x - 0.8 * z) * 0.8 / 0.36 - z) * x
    gain = pyro.get_param_store()["gain"].unconstrained()
    assert_allclose(gain.grad.item(), expected.sum().item(), rtol=1e-10)


def test_no_gradients_under_no_grad() -> None:
    vae = make_vae(3, latent_dim=2, hidden=[4])
    with torch.no_grad():
        weights = log_weights(vae.model, vae.guide, torch.zeros(B, 3), num_particles=K)
    assert not weights.log_weights.requires_grad


# -- parameters ------------------------------------------------------------------------------------------------------------


def _svi_finds(model: Callable, guide: Callable, *args: Tensor) -> set[int]:
    """What one step of plain SVI hands to its optimizer."""
    handed: set[int] = set()

    class Spy(PyroOptim):
        def __call__(self, params: list, *args: object, **kwargs: object) -> None:
            handed.update(id(parameter) for parameter in params)

    SVI(model, guide, Spy(torch.optim.Adam, {"lr": 0.01}), Trace_ELBO()).step(*args)
    return handed


@pytest.mark.parametrize(
    ("make", "data", "count"),
    [
        (pyro_module_function_pair, lambda: torch.randint(0, 2, (B, 3)).double(), 4),
        (pyro_nn_pair, lambda: torch.randn(B, 3), 7),
        (bare_param_pair, lambda: torch.randn(B), 4),
        (two_latents_pair, lambda: torch.randn(B, 4), 8),
    ],
)
def test_parameters_are_those_that_svi_finds(make: Callable, data: Callable, count: int) -> None:
    pair, x = make(), data()
    found = find_parameters(pair.model, pair.guide, x)
    assert len(found) == len({id(parameter) for parameter in found}) == count
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in found)
    assert {id(parameter) for parameter in found} == _svi_finds(pair.model, pair.guide, x)
    if hasattr(pair, "parameters"):
        assert {id(parameter) for parameter in found} == {id(parameter) for parameter in pair.parameters}


def test_parameters_of_a_vae_without_the_frozen() -> None:
    vae = make_vae(3, latent_dim=2, hidden=[4]).eval()  # Pyro warns of frozen parameters in training mode
    vae.encoder.loc.requires_grad_(False)
    found = find_parameters(vae.model, vae.guide, torch.zeros(B, 3))
    assert {id(p) for p in found} == {id(p) for p in vae.parameters() if p.requires_grad}
    assert len(found) == len(list(vae.parameters())) - 2


def test_bound_methods_bring_their_module() -> None:
    class Silent(nn.Module):
        """Never tells Pyro about its parameters."""

        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(1, 1)

        def model(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    pair = Silent()
    found = find_parameters(pair.model, pair.guide, torch.zeros(B, 1))
    assert {id(p) for p in found} == {id(p) for p in pair.parameters()}


def test_a_second_module_under_a_used_name_has_its_own_parameters() -> None:
    """Trap 1: under plain Pyro it would never train, with no error."""
    first, x = pyro_module_function_pair(), torch.randint(0, 2, (B, 3)).double()
    find_parameters(first.model, first.guide, x)
    second = pyro_module_function_pair()
    found = find_parameters(second.model, second.guide, x)
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in second.parameters}
    third = pyro_module_function_pair("third")
    assert len(find_parameters(third.model, third.guide, x)) == 4


# -- mistakes --------------------------------------------------------------------------------------------------------------


def _normal_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _normal_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _no_plate_model(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _no_plate_guide(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x, 1.0))


def _global_model(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def _global_guide(x: Tensor) -> None:
    pyro.sample("mean", dist.Normal(0.0, 1.0))
    _normal_guide(x)


def _sizeless(program: Callable) -> Callable:
    def run(x: Tensor) -> None:
        with pyro.plate("data"):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if program is _normal_model:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return run


def _sequential(program: Callable) -> Callable:
    def run(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            if program is _normal_model:
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    return run


def _no_event_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z[..., None], torch.ones(x.shape[-1])), obs=x)


def _other_latent_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("zz", dist.Normal(0.0, 1.0))


def _extra_latent_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("extra", dist.Normal(0.0, 1.0))


def _guide_of_x(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(0.0, 1.0))


def _unobserved_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _scaled(scale: float) -> Callable:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=scale):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return model


def _inner_subsample_model(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("items", 8, subsample_size=2, dim=-1) as items:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, items])


def _inner_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def _two_plates(program: Callable) -> Callable:
    def run(x: Tensor) -> None:
        with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if program is _normal_model:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    return run


@pytest.mark.parametrize("num_particles", [1, 3])
@pytest.mark.parametrize(
    ("model", "guide", "shape", "message"),
    [
        (_no_plate_model, _no_plate_guide, (B,), r"has no data plate.*write \"with pyro\.plate\(\"data\", x\.shape\[0\]\):\""),
        (_global_model, _global_guide, (B,), r"Site 'mean' lies outside the data plate 'data'.*pyro\.param"),
        (_normal_model, _no_plate_guide, (B,), r"Site 'z' lies outside the data plate 'data'"),
        (_sizeless(_normal_model), _sizeless(_normal_guide), (B,), r"no size.*write pyro\.plate\(\"data\", x\.shape\[0\]\)"),
        (_sequential(_normal_model), _sequential(_normal_guide), (B,), "plate 'data' is a sequential loop: write"),
        (_no_event_model, _normal_guide, (B, B), r"declare the dimensions within a datum with \.to_event\(n\)"),
        (_normal_model, _other_latent_guide, (B,), "latent site 'z' is not in the guide: sample it there"),
        (_normal_model, _extra_latent_guide, (B,), "guide's site 'extra' is not in the model: give both programs the same"),
        (_normal_model, _guide_of_x, (B,), "guide's site 'x' is observed in the model: give both programs the same"),
        (_unobserved_model, _normal_guide, (B,), "The model observes nothing: give its data site obs=x"),
        (_scaled(0.5), _normal_guide, (B,), r"Site 'z' is scaled apart from the data plate 'data'.*remove the scale"),
        (_scaled(1.001), _normal_guide, (B,), r"Site 'z' is scaled apart from the data plate 'data'.*remove the scale"),
        (_inner_subsample_model, _inner_guide, (B, 8), r"Site 'x' is scaled apart.*subsampling inside a datum"),
        (_two_plates(_normal_model), _two_plates(_normal_guide), (5, 3), r"\['columns', 'rows'\].*call the one over data"),
    ],
)
def test_pairs_that_cannot_be_read(
    model: Callable, guide: Callable, shape: tuple[int, ...], message: str, num_particles: int
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        log_weights(model, guide, torch.zeros(shape), num_particles=num_particles)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_particles", [0, -1])
def test_particles_are_counted_from_one(num_particles: int) -> None:
    with pytest.raises(ValueError, match=f"num_particles must be a positive integer, got {num_particles}"):
        log_weights(_normal_model, _normal_guide, torch.zeros(B), num_particles=num_particles)


class _Stubborn(nn.Module):
    """Takes one leading dimension and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 3)

    def forward(self, z: Tensor) -> Tensor:
        batch, _ = z.shape
        return self.net(z).reshape(batch, 3)


def test_networks_without_leading_dimensions_are_told_the_way() -> None:
    net = _Stubborn()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    x = torch.zeros(B, 3)
    with pytest.raises(ValueError, match=r"not with 3 on the left.*vectorize_particles=False") as caught:
        log_weights(model, guide, x, num_particles=3)
    assert "\n" not in str(caught.value)
    assert log_weights(model, guide, x, num_particles=3, vectorize_particles=False).log_weights.shape == (3, B)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_data_that_are_not_finite(value: float) -> None:
    x = torch.zeros(B, 3)
    x[[1, 3], 0] = value
    vae = make_vae(3, latent_dim=2, hidden=[4])
    with pytest.raises(ValueError, match=r"NaN or infinite values in 2 of 5 rows, first row 1: drop or repair them"):
        inspect_pair(vae.model, vae.guide, x)


@pytest.mark.parametrize(
    ("likelihood", "value", "message"),
    [
        ("bernoulli", 0.5, r"outside the support of Bernoulli at site 'x'.*range from 0 to 0\.5\): binarise"),
        ({"kind": "binomial", "total_count": 4}, 5.0, r"outside the support of Binomial at site 'x'.*from 0 to 5\): rescale"),
        ({"kind": "binomial", "total_count": 4}, -1.0, r"outside the support of Binomial at site 'x'.*from -1 to 0\): rescale"),
    ],
)
def test_data_outside_the_support(likelihood: object, value: float, message: str) -> None:
    x = torch.zeros(B, 3)
    x[2, 1] = value
    vae = make_vae(3, latent_dim=2, hidden=[4], likelihood=likelihood)
    with pytest.raises(ValueError, match=message) as caught:
        inspect_pair(vae.model, vae.guide, x)
    assert "in 1 of the 5 " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_particles", [1, 2, 5])
@pytest.mark.parametrize("deeper", ["model", "guide"])
def test_draws_of_the_prior_stand_left_of_the_plates_of_both_programs(deeper: str, num_particles: int) -> None:
    """Found by itself, the nesting is the deeper program's: here one of them has a plate of one more."""
    seen = {}

    def plates(program: str) -> Any:
        return pyro.plate("inner", 1, dim=-2) if program == deeper else nullcontext()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), plates("model"):
            seen["z"] = pyro.sample("z", dist.Normal(0.3, 1.2))
            pyro.sample("x", dist.Normal(seen["z"], 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-1), plates("guide"):
            pyro.sample("z", dist.Normal(x, 0.7))

    x = torch.randn(B)
    weights = prior_weights(model, guide, x, num_particles=num_particles)
    z = seen["z"].reshape(num_particles, B)
    _check(weights, td.Normal(z, 0.5).log_prob(x), td.Normal(0.3, 1.2).log_prob(z), td.Normal(x, 0.7).log_prob(z))


def test_what_a_mask_hides_need_not_lie_in_the_support() -> None:
    """Where Pyro itself does not check; what the mask shows does."""
    x, mask = torch.tensor([0.0, 2.0, 1.0, 3.0]), torch.tensor([True, False, True, False])

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask):
                pyro.sample("x", dist.Bernoulli(logits=z), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pyro.validation_enabled(False):
        assert inspect_pair(model, guide, x, mask).num_observed == 2
        with pytest.raises(ValueError, match="outside the support of Bernoulli at site 'x', in 1 of the 4"):
            inspect_pair(model, guide, x, mask | torch.tensor([False, True, False, False]))


def test_data_of_the_wrong_shape_keep_their_own_sentence() -> None:
    vae = make_vae(3, latent_dim=2, hidden=[4])
    with pytest.raises(ValueError, match=r"^The data have shape \(5, 4\), but the model takes \(N, 3\)[^\n]*$"):
        log_weights(vae.model, vae.guide, torch.zeros(B, 4), num_particles=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("number", [2, 3, 50, 2_000])
def test_what_is_cleared_is_less_than_the_rounding_of_the_largest(number: int, apart: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    coefficient = (torch.softmax(12 * torch.randn(number, 200), 0) * torch.randn(number, 200).sign()).to(dtype)
    kept = zero_negligible(coefficient, apart)
    cleared = kept == 0
    assert torch.equal(kept[~cleared], coefficient[~cleared])
    size = coefficient.abs().double() / coefficient.abs().amax(0).double()
    rounding = torch.finfo(dtype).eps ** (2 if apart else 1)
    together = torch.where(cleared, size, 0.0).sum(0)
    assert (together < rounding).all()
    assert cleared[size < rounding / number * (1 - 1e-6)].all()
    assert not cleared[size >= rounding * max(1 / 4, 1 / number)].any()
    if number == 50 and dtype == torch.float32 and not apart:  # most of what rounding could hide
        assert cleared.sum() > 0.95 * (size.sort(0).values.cumsum(0) < rounding).sum()


def test_a_parameter_that_a_light_particle_alone_reaches_keeps_its_gradient() -> None:
    torch.set_default_dtype(torch.float32)
    levels = torch.tensor([0.0, 6.6, -6.4], requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(levels[z], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(3)))

    loss = make_estimator({"kind": "rws", "num_particles": 64}).differentiable_loss(model, guide, torch.zeros(4))
    (found,) = torch.autograd.grad(loss, [levels])
    # Each value is about a third of the draws, and the first has nearly all of the weight.
    exact = levels.detach() * torch.exp(-0.5 * levels.detach() ** 2) * 4
    assert (found[1:] / exact[1:] > 0.2).all()
    assert (found[1:] / exact[1:] < 5.0).all()


@pytest.mark.parametrize(
    "column", [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [torch.nan, 1e-30, 1.0], [1.0, 1e-8, 1e-8], [-1.0, 0.5, 1e-3]]
)
def test_what_no_rounding_hides_is_kept(column: list[float]) -> None:
    coefficient = torch.tensor(column)[:, None]
    assert torch.equal(torch.nan_to_num(zero_negligible(coefficient), 7.0), torch.nan_to_num(coefficient, 7.0))
