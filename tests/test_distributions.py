"""Distributions of our own against quadrature, closed forms and SciPy."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import integrate, special, stats
from torch import Tensor
from torch.distributions import kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from pyrovae.distributions import (
    BetaBinomial,
    DiagonalNormalMixture,
    FlowDistribution,
    HypersphereUniform,
    NormalMixture,
    OneHot,
    PowerSpherical,
    RelaxedOneHot,
    flow_transform,
    log_area,
    mixture,
    normalizing_flow,
)

pytestmark = pytest.mark.usefixtures("float64")


def _direction(size: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(size), dim=0)


def _over_cosines(distribution: PowerSpherical, function: object, size: int) -> float:
    """The integral over the sphere of a function of the log-density, a circle of one cosine at a time."""
    across = math.log(2) + (size - 1) / 2 * math.log(math.pi) - special.gammaln((size - 1) / 2)
    side = torch.nn.functional.normalize(torch.randn(size), dim=0)
    side = torch.nn.functional.normalize(side - (side @ distribution.loc) * distribution.loc, dim=0)

    def integrand(angle: float) -> float:
        point = math.cos(angle) * distribution.loc + math.sin(angle) * side
        return function(distribution.log_prob(point).item()) * math.exp(across) * math.sin(angle) ** (size - 2)

    return integrate.quad(integrand, 0, math.pi, epsabs=1e-12)[0]


@pytest.mark.parametrize("kappa", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_power_spherical_by_quadrature(size: int, kappa: float) -> None:
    distribution = PowerSpherical(_direction(size), torch.tensor(kappa))
    assert _over_cosines(distribution, math.exp, size) == pytest.approx(1, abs=1e-8)
    entropy = _over_cosines(distribution, lambda log: -log * math.exp(log) if log > -700 else 0.0, size)
    assert distribution.entropy().item() == pytest.approx(entropy, abs=1e-8)
    kl = kl_divergence(distribution, HypersphereUniform(torch.zeros(size)))
    assert kl.item() == pytest.approx(log_area(size) - entropy, abs=1e-8)
    assert kl > 0


def test_no_concentration_is_uniform() -> None:
    distribution = PowerSpherical(_direction(5), torch.tensor(1e-9))
    assert kl_divergence(distribution, HypersphereUniform(torch.zeros(5))).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_power_spherical_draws(size: int) -> None:
    distribution = PowerSpherical(_direction(size), torch.tensor(2.5))
    z = distribution.sample((20_000,))
    assert distribution.support.check(z).all()
    error = z.std(0) / len(z) ** 0.5
    assert ((z.mean(0) - distribution.mean).abs() < 5 * error).all()
    cosine = (z @ distribution.loc).numpy()
    assert stats.kstest((1 + cosine) / 2, stats.beta((size - 1) / 2 + 2.5, (size - 1) / 2).cdf).pvalue > 1e-3
    # At right angles to mu no direction is better than another.
    across = z - (z @ distribution.loc)[:, None] * distribution.loc
    wanted = (torch.eye(size) - torch.outer(distribution.loc, distribution.loc)) * (across**2).sum(-1).mean() / (size - 1)
    assert_allclose(torch.cov(across.T), wanted, atol=0.02)


@pytest.mark.parametrize("axis", [0, 1])
def test_power_spherical_gradients_are_those_of_its_mean(axis: int) -> None:
    """d E[a'z] / d(mu, kappa), also where mu is the first axis."""
    loc = torch.eye(3)[axis].requires_grad_()
    kappa = torch.tensor(1.5, requires_grad=True)
    direction = torch.tensor([0.3, -1.0, 0.7])
    distribution = PowerSpherical(loc / loc.norm(), kappa)
    exact = torch.autograd.grad(distribution.mean @ direction, (loc, kappa))
    draws = []
    for _ in range(30):
        value = (PowerSpherical(loc / loc.norm(), kappa).rsample((2000,)) @ direction).mean()
        draws.append(torch.cat([part.reshape(-1) for part in torch.autograd.grad(value, (loc, kappa))]))
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    wanted = torch.cat([part.reshape(-1) for part in exact])
    assert ((found.mean(0) - wanted).abs() < 5 * error + 1e-9).all()


@pytest.mark.parametrize("kappa", [1e-3, 1e4])
def test_power_spherical_is_finite_in_single_precision(kappa: float) -> None:
    loc = torch.tensor([0.6, -0.8, 0.0], dtype=torch.float32, requires_grad=True)
    concentration = torch.tensor(kappa, dtype=torch.float32, requires_grad=True)
    distribution = PowerSpherical(loc, concentration)
    z = distribution.rsample((5000,))
    assert distribution.log_prob(z).isfinite().all()
    assert distribution.log_prob(-loc.detach()).isfinite()
    (z.sum() + distribution.log_prob(z).sum()).backward()
    assert loc.grad.isfinite().all()
    assert concentration.grad.isfinite()


def test_uniform_on_the_sphere() -> None:
    distribution = HypersphereUniform(torch.zeros(4)).expand((20_000,))
    z = distribution.sample()
    assert distribution.support.check(z).all()
    assert_allclose(torch.cov(z.T), torch.eye(4) / 4, atol=0.01)
    # SciPy's von Mises-Fisher without concentration is the uniform distribution.
    expected = stats.vonmises_fisher([1, 0, 0, 0], 1e-9).logpdf(z[:3].numpy())
    assert_allclose(distribution.log_prob(z)[:3], expected, rtol=1e-6)


# -- the mixture's implicit gradients --------------------------------------------------------------------------------------


def _mixture(size: int) -> tuple[list[Tensor], object]:
    torch.manual_seed(5)
    parameters = [torch.randn(3), torch.randn(3, size), 0.4 * torch.randn(3, size)]
    for parameter in parameters:
        parameter.requires_grad_()
    logits, loc, log_scale = parameters
    return parameters, lambda: DiagonalNormalMixture(
        dist.Categorical(logits=logits), dist.Normal(loc, log_scale.exp()).to_event(1)
    )


@pytest.mark.parametrize("size", [1, 2, 4])
def test_mixture_gradients_are_those_of_its_moments(size: int) -> None:
    """E[z_0^2] and E[z_0 z_last^2] have closed forms, in which every parameter has a part."""
    parameters, distribution = _mixture(size)
    logits, loc, log_scale = parameters
    square = loc**2 + (2 * log_scale).exp()
    cross = loc[:, 0] * square[:, -1] if size > 1 else square[:, 0]
    exact = torch.autograd.grad((logits.softmax(0) * (square[:, 0] + cross)).sum(), parameters)
    wanted = torch.cat([part.flatten() for part in exact])
    draws = []
    for _ in range(30):
        z = distribution().rsample((2000,))
        second = z[:, 0] * z[:, -1] ** 2 if size > 1 else z[:, 0] ** 2
        value = (z[:, 0] ** 2 + second).mean()
        draws.append(torch.cat([part.flatten() for part in torch.autograd.grad(value, parameters)]))
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - wanted).abs() < 5 * error + 1e-9).all()


def test_mixture_draws_move_along_the_distributional_transform() -> None:
    """In one dimension dz/dphi = -(dF/dphi) / q(z), draw by draw."""
    parameters, distribution = _mixture(1)
    logits, loc, log_scale = parameters
    z = distribution().rsample()
    found = torch.autograd.grad(z.sum(), parameters)
    cdf = (logits.softmax(0) * torch.special.ndtr((z.detach() - loc[:, 0]) / log_scale[:, 0].exp())).sum()
    density = distribution().log_prob(z.detach()).exp().detach()
    for have, want in zip(found, torch.autograd.grad(cdf, parameters), strict=True):
        assert_allclose(have, -want / density, rtol=1e-9)


def test_mixture_of_one_is_reparameterised_as_a_normal() -> None:
    loc, scale = torch.randn(1, 3, requires_grad=True), torch.rand(1, 3).add(0.5).requires_grad_()
    distribution = DiagonalNormalMixture(dist.Categorical(logits=torch.zeros(1)), dist.Normal(loc, scale).to_event(1))
    z = distribution.rsample((6,))
    ones, noise = torch.autograd.grad((z * torch.arange(18.0).view(6, 3)).sum(), (loc, scale))
    weight = torch.arange(18.0).view(6, 3)
    assert_allclose(ones[0], weight.sum(0), rtol=1e-9)
    assert_allclose(noise[0], (weight * (z - loc) / scale).sum(0).detach(), rtol=1e-9)


def test_mixture_gradients_stay_finite_in_single_precision_and_many_dimensions() -> None:
    torch.manual_seed(0)
    loc = (10 * torch.randn(4, 50)).float().requires_grad_()
    logits = torch.zeros(4, dtype=torch.float32, requires_grad=True)
    distribution = DiagonalNormalMixture(
        dist.Categorical(logits=logits), dist.Normal(loc, torch.ones(4, 50).float()).to_event(1)
    )
    z = distribution.expand((20,)).rsample((10,))
    assert z.shape == (10, 20, 50)
    z.square().sum().backward()
    assert loc.grad.isfinite().all()
    assert logits.grad.isfinite().all()


# -- flows and one-hot vectors ---------------------------------------------------------------------------------------------


def _flow() -> tuple[torch.nn.Module, FlowDistribution]:
    transform = flow_transform("maf", 3, hidden=[8])
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    base = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    return transform, FlowDistribution(normalizing_flow(transform().inv, base))


def test_a_density_remembered_without_gradients_is_not_given_where_they_are_wanted() -> None:
    transform, distribution = _flow()
    z = distribution.sample()
    log_prob = distribution.log_prob(z)
    log_prob.backward()
    assert next(transform.parameters()).grad.abs().max() > 0
    with torch.no_grad():
        assert_allclose(distribution.log_prob(z), log_prob.detach(), rtol=1e-9)


def test_a_flow_has_a_centre_and_no_mean() -> None:
    _, distribution = _flow()
    assert_allclose(distribution.centre.detach(), distribution.dist.transform.inv(torch.zeros(3)).detach())
    with pytest.raises(NotImplementedError, match="no closed form"):
        _ = distribution.mean


def test_zuko_leaves_validation_as_it_was() -> None:
    code = (
        "import pyro; from torch.distributions import Distribution; from pyrovae.distributions import flow_transform;"
        "before = Distribution._validate_args; flow_transform('maf', 2); import zuko;"
        "print(before, Distribution._validate_args)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True"]


def test_unknown_flow() -> None:
    with pytest.raises(ValueError, match=r"^There is no family 'glow'; choose one of coupling, maf, nsf\.$"):
        flow_transform("glow", 2)


def test_one_hot_draws() -> None:
    distribution = OneHot(logits=torch.tensor([[0.0, 1.0, -1.0]]).expand(4000, 3))
    z = distribution.sample()
    assert distribution.support.check(z).all()
    counts = z.sum(0).numpy()
    assert stats.chisquare(counts, 4000 * special.softmax([0.0, 1.0, -1.0])).pvalue > 1e-3
    assert distribution.expand((2, 4000)).sample((5,)).shape == (5, 2, 4000, 3)
    assert distribution.enumerate_support().shape == (3, 4000, 3)


def test_relaxed_draws_have_the_categories_probabilities_at_the_corner() -> None:
    """The largest coordinate is the category with exactly its probability, whatever the temperature."""
    logits = torch.tensor([0.0, 1.0, -1.0])
    for temperature in (0.1, 2.0):
        z = RelaxedOneHot(torch.tensor(temperature), logits=logits).sample((4000,))
        counts = np.bincount(z.argmax(-1), minlength=3)
        assert stats.chisquare(counts, 4000 * special.softmax(logits.numpy())).pvalue > 1e-3


def test_relaxed_draws_stay_off_the_edge_in_single_precision() -> None:
    logits = torch.tensor([0.0, 60.0, -60.0], dtype=torch.float32, requires_grad=True)
    distribution = RelaxedOneHot(torch.tensor(0.3, dtype=torch.float32), logits=logits)
    z = distribution.rsample((2000,))
    assert (z > 0).all()
    log_prob = distribution.log_prob(z)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert logits.grad.isfinite().all()


# -- NormalMixture -----------------------------------------------------------------------------------------------------------


class _Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside has."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, Tensor):
                self.numbers = max(self.numbers, each.untyped_storage().nbytes() // each.element_size())
        return made


def _few_and_many(smallest: float, C: int = 30, L: int = 40) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, means and scales in float32, and draws at the means, where the terms cancel most."""
    random = np.random.default_rng(0)
    logits, loc = random.normal(size=C), random.normal(size=(C, L))
    scale = np.exp(random.uniform(np.log(smallest), 0, (C, L)))
    at = random.integers(0, C, 500)
    z = loc[at] + scale[at] * random.normal(size=(500, L))
    return tuple(torch.as_tensor(array).float() for array in (logits, loc, scale, z))  # type: ignore[return-value]


def _scipy_mixture(logits: Tensor, loc: Tensor, scale: Tensor, z: Tensor) -> np.ndarray:
    logits, loc, scale, z = (array.detach().double().numpy() for array in (logits, loc, scale, z))
    return special.logsumexp(special.log_softmax(logits) + stats.norm.logpdf(z[:, None], loc, scale).sum(-1), -1)


@pytest.mark.parametrize("smallest", [1.0, 0.1, 0.01, 1e-3, 1e-4])
def test_a_mixture_by_products_is_as_exact_as_float32(smallest: float) -> None:
    logits, loc, scale, z = _few_and_many(smallest)
    exact = _scipy_mixture(logits, loc, scale, z)
    distribution = mixture(logits, dist.Normal(loc, scale).to_event(1))
    assert type(distribution) is NormalMixture
    found = distribution.log_prob(z)
    assert found.dtype == torch.float32
    # To the last digit of float32, whatever the scales; the weights were rounded before.
    assert_allclose(found, exact, rtol=1.2e-7, atol=4e-7)


@pytest.mark.parametrize("smallest", [1.0, 0.01, 1e-4])
def test_a_mixture_by_products_has_the_gradients_of_the_sum(smallest: float) -> None:
    given = _few_and_many(smallest, C=5, L=3)
    found = [tensor.clone().requires_grad_() for tensor in given]
    exact = [tensor.double().requires_grad_() for tensor in given]
    for logits, loc, scale, z in (found, exact):
        distribution = mixture(logits, dist.Normal(loc, scale).to_event(1))
        (distribution.log_prob(z) * torch.linspace(-1, 1, len(z), dtype=z.dtype)).sum().backward()
    for one, other in zip(found, exact, strict=True):
        assert_allclose(one.grad, other.grad, rtol=2e-5, atol=1e-5 * other.grad.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_by_products_spreads_over_plates(dtype: torch.dtype) -> None:
    logits, loc, scale, z = (tensor.to(dtype) for tensor in _few_and_many(0.1, C=4, L=3))
    distribution = mixture(logits, dist.Normal(loc, scale).to_event(1))
    exact = _scipy_mixture(logits, loc, scale, z)
    spread = distribution.expand((7, 500)).mask(torch.ones(500, dtype=torch.bool))
    assert_allclose(spread.log_prob(z), np.broadcast_to(exact, (7, 500)), rtol=1e-6, atol=1e-6)
    assert spread.sample().shape == (7, 500, 3)
    assert_allclose(distribution.log_prob(z.reshape(5, 100, 3)), exact.reshape(5, 100), rtol=1e-6, atol=1e-6)
    assert_allclose(distribution.expand((6,)).log_prob(z[0]), np.full(6, exact[0]), rtol=1e-6, atol=1e-6)
    # Components that differ by datum have no one matrix to multiply with.
    each = mixture(logits.expand(500, 4), dist.Normal(loc.expand(500, 4, 3), scale).to_event(1))
    assert_allclose(each.log_prob(z), exact, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="support"):
        distribution.log_prob(z * torch.nan)


def test_a_mixture_by_products_holds_no_number_for_each_dimension_of_each_component() -> None:
    logits, loc, scale, z = _few_and_many(0.1)
    loc.requires_grad_()
    distribution = mixture(logits, dist.Normal(loc, scale).to_event(1))
    with _Largest() as seen:
        distribution.log_prob(z.requires_grad_()).sum().backward()
    assert seen.numbers <= len(z) * 2 * loc.shape[1]


def test_other_components_make_a_mixture_of_the_usual_kind() -> None:
    for parts in (dist.Laplace(torch.zeros(3, 2), 1.0).to_event(1), dist.MultivariateNormal(torch.zeros(3, 2), torch.eye(2))):
        assert type(mixture(torch.zeros(3), parts)) is dist.MixtureSameFamily


@pytest.mark.parametrize("total_count", [1, 16, 255])
def test_the_beta_binomial_is_precise_in_float32(total_count: int):
    a, b = torch.meshgrid(torch.logspace(-4, 7, 23), torch.logspace(-4, 7, 23), indexing="ij")
    x = torch.tensor(sorted({0, 1, total_count // 3, total_count - 1, total_count}))[:, None, None].float()
    ours = BetaBinomial(a, b, total_count=total_count).log_prob(x)
    wide = [parameter.double() for parameter in (a, b)]
    truth = BetaBinomial(*wide, total_count=total_count).log_prob(x.double())
    torch.testing.assert_close(ours.double(), truth, rtol=3e-6, atol=2e-4 if total_count > 16 else 3e-5)
    # Exactly, by a product of rational numbers; scipy's own loses digits for large concentrations.
    index = torch.arange(total_count).double().reshape(-1, 1, 1, 1)
    counts, number = x.double(), torch.tensor(float(total_count), dtype=torch.float64)

    def rising(start: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        return torch.where(index < steps, (start + index).log(), 0.0).sum(0)

    choices = (number + 1).lgamma() - (counts + 1).lgamma() - (number - counts + 1).lgamma()
    products = rising(wide[0], counts) + rising(wide[1], number - counts) - rising(wide[0] + wide[1], number)
    torch.testing.assert_close(truth, choices + products, rtol=1e-8, atol=1e-7)


def test_the_beta_binomial_has_gradients_and_expands():
    a, b = torch.tensor([1e-3, 2.0, 3e4], requires_grad=True), torch.tensor([5.0, 0.1, 2e4], requires_grad=True)
    x = torch.tensor([0.0, 3.0, 9.0])
    wide = [parameter.detach().double().requires_grad_() for parameter in (a, b)]
    gradients = torch.autograd.grad(BetaBinomial(a, b, total_count=16).expand((2, 3)).log_prob(x).sum(), (a, b))
    exact = torch.autograd.grad(2 * dist.BetaBinomial(*wide, total_count=16).log_prob(x.double()).sum(), wide)
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-7)
