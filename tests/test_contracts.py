"""What every component must do: a new prior, likelihood, encoder, body, guide or estimator is tested by being registered.

pytest tests/test_contracts.py -k name_of_it
pytest tests/test_contracts.py -k name_of_it -p module_that_registers_it    # for a class of another package
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from parts import encoder_for, fit_together, parts_for, spec
from quadrature import features, mean_features, nodes, total
from torch import Tensor, nn
from triples import Triple, train

import pyrovae as pv
from pyrovae.estimators.base import Estimator, make_estimator
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import build, describe, find, names

DATA = 5


def _moved(module: nn.Module, size: float = 0.3) -> nn.Module:
    """A module with its parameters moved at random, since many start where mistakes do not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return module


def _vae(**parts: Any) -> pv.VAE:
    return pv.make_vae(DATA, latent_dim=2, hidden=[6], activation="tanh", **parts)


def _some_estimator(vae: pv.VAE, x: Tensor) -> str:
    return "vimco" if inspect_pair(vae.model, vae.guide, x).not_reparameterized else "elbo"


# -- priors and encoders: distributions over latents -----------------------------------------------------------------------


def _latent_law(kind: str, name: str, size: int) -> Any:
    """p(z), or q(z|x) at one x: batch shape ``()``, event shape ``(size,)``."""
    parts = parts_for(kind, name)
    vae = _moved(pv.make_vae(DATA, latent_dim=size, hidden=[6], activation="tanh", **parts))
    return vae.prior() if kind == "prior" else vae.encoder(torch.randn(DATA))


def _sizes(kind: str, name: str) -> list[int]:
    """One and two latents; two alone if the class refuses one, as a sphere does."""
    try:
        _latent_law(kind, name, 1)
    except ValueError:
        return [2]
    return [1, 2]


LATENTS = [(kind, name) for kind in ("prior", "encoder") for name in names(kind)]
over_latents = pytest.mark.parametrize(("kind", "name"), LATENTS)


@over_latents
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_particles_and_data_stand_to_the_left_of_the_latents(kind: str, name: str) -> None:
    law = _latent_law(kind, name, 2)
    assert (law.batch_shape, law.event_shape) == ((), (2,))
    z = law.expand((3, 4)).sample()
    assert z.shape == (3, 4, 2)
    expanded = law.expand((3, 4)).log_prob(z)
    assert expanded.shape == (3, 4)
    torch.testing.assert_close(law.log_prob(z), expanded)
    torch.testing.assert_close(law.log_prob(z[1, 2]), expanded[1, 2])


@over_latents
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_samples_lie_in_the_declared_support(kind: str, name: str) -> None:
    law = _latent_law(kind, name, 2)
    z = law.sample((500,))
    assert law.support.check(z).all()
    declared = find(kind, name).support
    assert declared is None or declared.check(z).all()
    assert law.log_prob(z).isfinite().all()


@over_latents
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_density_integrates_to_one_and_samples_follow_it(kind: str, name: str) -> None:
    laws = [_latent_law(kind, name, size) for size in _sizes(kind, name)]
    rules = [nodes(law) for law in laws]
    if not any(rules):
        pytest.skip(f"tests/quadrature.py has no rule for {laws[0].support}: test by hand that the density integrates to one")
    for law, rule in zip(laws, rules, strict=True):
        if rule is not None:
            assert total(law, *rule) == pytest.approx(1.0, abs=1e-3)
            found = features(law.sample((20_000,)))
            error = (found.var(0) / len(found)).sqrt() + 1e-3
            assert ((found.mean(0) - mean_features(law, *rule)).abs() < 5 * error).all()


@over_latents
def test_a_vae_with_it_is_saved_and_loaded(kind: str, name: str, tmp_path: Path) -> None:
    vae = _moved(_vae(**parts_for(kind, name)))
    vae.save_pretrained(tmp_path)
    again, x = pv.VAE.from_pretrained(tmp_path), torch.rand(4, DATA).round()
    z = vae.prior().sample((4,))
    assert torch.equal(again.prior().log_prob(z), vae.prior().log_prob(z))
    z = vae.encode(x).sample()
    assert torch.equal(again.encode(x).log_prob(z), vae.encode(x).log_prob(z))


@over_latents
def test_a_vae_with_it_trains(kind: str, name: str) -> None:
    prior, encoder = (name, encoder_for(name)) if kind == "prior" else (parts_for(kind, name)["prior"]["kind"], name)
    assert fit_together(prior, encoder), f"no registered prior and encoder go with {name}"
    train(Triple(prior, "bernoulli", encoder), seed=0)


@pytest.mark.parametrize("name", names("encoder"))
@torch.no_grad()
def test_an_encoder_reads_each_datum_alone(name: str) -> None:
    encoder, x = _moved(_vae(**parts_for("encoder", name)).encoder), torch.randn(3, 4, DATA)
    together = encoder(x)
    assert (together.batch_shape, together.event_shape) == ((3, 4), (2,))
    z = together.sample()
    torch.testing.assert_close(encoder(x[1, 2]).log_prob(z[1, 2]), together.log_prob(z)[1, 2], rtol=1e-4, atol=1e-5)


# -- networks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("body"))
def test_a_body_keeps_leading_dimensions_and_is_rebuilt(name: str) -> None:
    image, widths = (1, 8, 8), {"hidden": [4, 4]}
    shapes = {"in_shape": 3, "out_shape": image} if name.endswith("_decoder") else {"in_shape": image}
    body = build("body", spec("body", name, **widths), **shapes).eval()
    x = torch.randn(2, 3, *body.in_shape)
    together = body(x)
    assert together.shape == (2, 3, *body.out_shape)
    torch.testing.assert_close(body(x[1, 2]), together[1, 2], rtol=1e-4, atol=1e-5)
    again = build("body", describe(body, "body")).eval()
    again.load_state_dict(body.state_dict())
    assert torch.equal(again(x), together)
    together.sum().backward()
    assert all(parameter.grad is not None for parameter in body.parameters())


@pytest.mark.parametrize("name", names("guide"))
def test_a_guide_trains_a_hierarchy(name: str, tmp_path: Path) -> None:
    vae = pv.make_hierarchical_vae(DATA, latent_dims=[3, 2], hidden=[[6], [6]], guide=name)
    x = torch.rand(8, DATA).round()
    before = copy.deepcopy(vae.state_dict())
    history = vae.fit(x, epochs=2, batch_size=4, lr=0.02, compile=False, progress=False)
    assert all(map(math.isfinite, history.bound))
    assert not any(torch.equal(parameter, before[key]) for key, parameter in vae.named_parameters())
    vae.save_pretrained(tmp_path)
    again = pv.HierarchicalVAE.from_pretrained(tmp_path)
    scores = [pair.log_marginal(x, num_samples=20, seed=0).log_px for pair in (vae, again)]
    assert (scores[0] == scores[1]).all()


# -- estimators ------------------------------------------------------------------------------------------------------------

ESTIMATORS = names("estimator")
OURS = [name for name in ESTIMATORS if issubclass(find("estimator", name), Estimator)]
# Pyro's own: some need a model that is marked for enumeration, and none is captured as a graph.


def _estimator(name: str) -> Any:
    return make_estimator(spec("estimator", name, num_particles=4))


@pytest.mark.parametrize("name", OURS)
def test_an_estimator_is_rebuilt_from_its_description(name: str) -> None:
    description = describe(_estimator(name), "estimator")
    assert describe(build("estimator", description), "estimator") == description


@pytest.mark.parametrize("vectorize_particles", [True, False])
@pytest.mark.parametrize("name", OURS)
def test_the_bound_comes_per_datum_and_is_finite(name: str, vectorize_particles: bool) -> None:
    vae, x = _vae(), torch.rand(7, DATA).round()
    estimator = make_estimator(spec("estimator", name, num_particles=4, vectorize_particles=vectorize_particles))
    bound = estimator.bound(vae.model, vae.guide, x)
    assert bound.shape == (7,)
    assert bound.isfinite().all()
    assert not bound.requires_grad


Cut = Callable[[Tensor, Tensor], Tensor]


def _cut_pair(theta: Tensor, phi: Tensor, dies: Cut) -> tuple[Callable[..., None], Callable[..., None]]:
    """A pair of one latent whose weight is zero where ``dies(x, z)``."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(theta[1], 1.0))
            pyro.factor("cut", torch.where(dies(x, z), -torch.inf, theta[0] * z))
            pyro.sample("x", dist.Normal(theta[0] * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(phi[0] * x.clamp(max=1), phi[1].exp()))

    return model, guide


@pytest.mark.parametrize("dies", [lambda x, z: x > 5, lambda x, z: z > 0.2], ids=["all particles", "some particles"])
@pytest.mark.parametrize("name", OURS)
@pytest.mark.usefixtures("float64")
def test_gradients_are_finite_where_a_datum_has_weight_zero(name: str, dies: Cut) -> None:
    theta, phi = torch.tensor([0.7, -0.2], requires_grad=True), torch.tensor([0.4, 0.1], requires_grad=True)
    model, guide = _cut_pair(theta, phi, dies)
    loss = _estimator(name).differentiable_loss(model, guide, torch.tensor([0.3, -0.8, 9.0]))
    assert not loss.isnan()
    for gradient in torch.autograd.grad(loss, [theta, phi]):
        assert gradient.isfinite().all()


def _losses(name: str, backend: str) -> tuple[list[float], dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    vae, x = _vae(), torch.rand(8, DATA).round()
    adam = torch.optim.Adam(vae.parameters(), lr=1e-2)
    step = pv.stage(_estimator(name), vae.model, vae.guide, adam, x, backend=backend)
    losses = [step(x).loss for _ in range(3)]
    assert step.reason is None
    return losses, vae.state_dict()


@pytest.mark.parametrize("name", OURS)
def test_captured_steps_equal_eager_steps(name: str) -> None:
    eager, state = _losses(name, "eager")
    captured, captured_state = _losses(name, "aten")
    assert captured == pytest.approx(eager, rel=1e-5)
    for key, tensor in state.items():
        torch.testing.assert_close(captured_state[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_an_estimator_trains(name: str) -> None:
    """On data that are all alike, 60 steps raise the importance-weighted bound."""
    vae, x = _vae(), torch.tensor([1.0, 0, 1, 1, 0]).expand(32, DATA)
    before = vae.log_marginal(x[:1], num_samples=500, seed=0).mean
    vae.fit(x, estimator=_estimator(name), epochs=30, batch_size=16, lr=0.02, compile=False, progress=False, seed=0)
    after = vae.log_marginal(x[:1], num_samples=500, seed=0).mean
    assert after > before + 0.3


@pytest.mark.parametrize("name", sorted(set(ESTIMATORS) - set(OURS)))
def test_pyros_own_estimators_are_passed_on(name: str) -> None:
    assert issubclass(find("estimator", name), pyro.infer.ELBO)


# -- all kinds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in pv.registry.KINDS for name in names(kind)])
def test_a_component_says_what_it_is(kind: str, name: str) -> None:
    """`pyrovae list` and docs/components.md print the first sentence."""
    first = (find(kind, name).__doc__ or "").strip().split("\n")[0]
    assert first, f"{name} needs a docstring"
