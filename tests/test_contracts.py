"""What every component must do: a new prior, likelihood, encoder, body, guide or estimator is tested by being registered.

pytest tests/test_contracts.py -k name_of_it
pytest tests/test_contracts.py -k name_of_it -p module_that_registers_it    # for a class of another package
"""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from parts import encoder_for, parts_for, prior_for, spec
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


# -- priors, encoders and bodies: modules ----------------------------------------------------------------------------------

# Options that change what a class is made of.
VARIANTS = [
    ("prior", {"kind": "vamp", "components": 3, "squash": False, "learn_weights": True}),
    ("prior", {"kind": "flow", "family": "coupling", "hidden": [8]}),
    ("prior", {"kind": "flow", "family": "nsf", "hidden": [8], "depth": 1}),
    ("prior", {"kind": "categorical", "learned": True}),
    ("prior", {"kind": "relaxed_one_hot", "learned": True}),
    ("encoder", {"kind": "flow", "family": "coupling", "hidden": [8]}),
    ("encoder", {"kind": "flow", "family": "nsf", "hidden": [8], "depth": 1}),
    ("encoder", {"kind": "flow", "base": "full_covariance_normal", "hidden": [8]}),
]
COMPONENTS = [(kind, spec(kind, name)) for kind in ("prior", "encoder", "body") for name in names(kind)] + VARIANTS
over_components = pytest.mark.parametrize(("kind", "table"), COMPONENTS, ids=str)


def _component(kind: str, table: dict[str, Any], size: int = 2) -> nn.Module:
    """A small instance with every parameter moved; a prior has the encoder of its VAE."""
    if kind == "body":
        shapes: dict[str, Any] = {"in_shape": (1, 6, 9), "out_shape": 5}
        if table["kind"].endswith("_decoder"):
            shapes = {"in_shape": 2, "out_shape": (2, 6, 9)}
        return _moved(build("body", table, hidden=[4, 3], activation="tanh", **shapes))
    vae = _moved(pv.make_vae(DATA, latent_dim=size, hidden=[6], activation="tanh", **parts_for(kind, table)))
    return vae.prior if kind == "prior" else vae.encoder


def _arguments(kind: str, component: nn.Module, *batch: int) -> list[Tensor]:
    """What a component is called with."""
    shape = {"encoder": (DATA,), "prior": ()}.get(kind, getattr(component, "in_shape", ()))
    return [] if kind == "prior" else [torch.randn(*batch, *shape)]


def _output(kind: str, component: nn.Module, arguments: list[Tensor]) -> Tensor:
    """A tensor that depends on everything that a component computes."""
    out = component(*arguments)
    return out if kind == "body" else out.log_prob(out.sample().detach())


@over_components
def test_a_component_keeps_its_arguments_and_is_rebuilt_from_them(kind: str, table: dict) -> None:
    component = _component(kind, table)
    for argument in inspect.signature(type(component)).parameters:
        assert hasattr(component, argument), f"write self.{argument} = {argument} in __init__"
    again = build(kind, json.loads(json.dumps(describe(component, kind))))
    assert list(again.state_dict()) == list(component.state_dict())
    again.load_state_dict(component.state_dict())
    if kind == "prior":
        again.bind(getattr(component, "_encoder", None))  # the encoder whose posteriors it mixes, if it does
    arguments, outputs = _arguments(kind, component, 4), []
    for module in (component, again):
        pyro.set_rng_seed(3)
        outputs.append(_output(kind, module, arguments))
    assert torch.equal(*outputs)


@over_components
def test_gradients_reach_every_parameter(kind: str, table: dict) -> None:
    component = _component(kind, table)
    out = _output(kind, component, _arguments(kind, component, 6))
    if out.requires_grad:  # in random directions, since a sum can have a gradient of exactly zero
        (out * torch.randn_like(out)).sum().backward()
    for name, parameter in component.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@over_components
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_a_component_keeps_the_precision_of_its_weights(kind: str, table: dict, dtype: torch.dtype) -> None:
    vae = None if kind == "body" else _vae(**parts_for(kind, table)).to(dtype)
    component = _component(kind, table).to(dtype) if vae is None else getattr(vae, kind)
    arguments = [argument.to(dtype) for argument in _arguments(kind, component, 3)]
    assert _output(kind, component, arguments).dtype == dtype, "constant tensors must be buffers"
    if kind != "body":
        assert component(*arguments).sample().dtype == dtype


@over_components
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_leading_dimensions_are_particles_and_data(kind: str, table: dict) -> None:
    component = _component(kind, table).eval()
    arguments = _arguments(kind, component, 3, 4)
    together = component(*arguments)
    if kind == "body":
        assert together.shape == (3, 4, *component.out_shape)
        torch.testing.assert_close(component(arguments[0][1, 2]), together[1, 2])
        return
    shapes = (() if kind == "prior" else (3, 4), (2,))
    assert (together.batch_shape, together.event_shape) == shapes, "one latent vector is one event: write .to_event(1)"
    wide = together.expand((5, 3, 4))
    z = wide.sample()
    assert z.shape == (5, 3, 4, 2)
    assert wide.log_prob(z).shape == (5, 3, 4)
    torch.testing.assert_close(together.log_prob(z[0]), wide.log_prob(z)[0])
    alone = component(*[argument[1, 2] for argument in arguments])
    torch.testing.assert_close(alone.log_prob(z[0, 1, 2]), wide.log_prob(z)[0, 1, 2])


# -- priors and encoders: distributions over latents -----------------------------------------------------------------------

over_latents = pytest.mark.parametrize(("kind", "table"), [case for case in COMPONENTS if case[0] != "body"], ids=str)
over_latent_names = pytest.mark.parametrize(("kind", "name"), [(k, name) for k in ("prior", "encoder") for name in names(k)])


def _law(kind: str, table: dict[str, Any], size: int) -> Any:
    """p(z), or q(z|x) at one x: batch shape ``()``, event shape ``(size,)``."""
    component = _component(kind, table, size)
    return component(*_arguments(kind, component))


def _sizes(kind: str, table: dict[str, Any]) -> list[int]:
    """One and two latents; two alone if the class refuses one, as a sphere does."""
    try:
        _law(kind, table, 1)
    except ValueError:
        return [2]
    return [1, 2]


@over_latents
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_samples_lie_in_the_declared_support(kind: str, table: dict) -> None:
    law = _law(kind, table, 2)
    z = law.sample((500,))
    assert law.support.check(z).all()
    declared = find(kind, table["kind"]).support
    assert declared is None or declared.check(z).all()
    assert law.log_prob(z).isfinite().all()


@over_latents
@pytest.mark.usefixtures("float64")
@torch.no_grad()
def test_the_density_integrates_to_one_and_samples_follow_it(kind: str, table: dict) -> None:
    laws = [_law(kind, table, size) for size in _sizes(kind, table)]
    rules = [nodes(law) for law in laws]
    if not any(rules):
        pytest.skip(f"tests/quadrature.py has no rule for {laws[0].support}: test by hand that the density integrates to one")
    for law, rule in zip(laws, rules, strict=True):
        if rule is not None:
            assert total(law, *rule) == pytest.approx(1.0, abs=5e-4)
            found = features(law.sample((20_000,)))
            error = (found.var(0) / len(found)).sqrt() + 1e-3
            assert ((found.mean(0) - mean_features(law, *rule)).abs() < 5 * error).all()


@over_latent_names
def test_a_vae_with_it_is_saved_and_loaded(kind: str, name: str, tmp_path: Path) -> None:
    vae = _moved(_vae(**parts_for(kind, name)))
    vae.save_pretrained(tmp_path)
    again, x = pv.VAE.from_pretrained(tmp_path), torch.rand(4, DATA).round()
    z = vae.prior().sample((4,))
    assert torch.equal(again.prior().log_prob(z), vae.prior().log_prob(z))
    z = vae.encode(x).sample()
    assert torch.equal(again.encode(x).log_prob(z), vae.encode(x).log_prob(z))


@over_latent_names
def test_a_vae_with_it_trains(kind: str, name: str) -> None:
    prior, encoder = (name, encoder_for(name)) if kind == "prior" else (prior_for(name), name)
    train(Triple(prior, "bernoulli", encoder), seed=0)


# -- guides of a hierarchy -------------------------------------------------------------------------------------------------


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
