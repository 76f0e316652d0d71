"""Priors against SciPy, and trained with guides that fit them."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from parts import COMBINATIONS, encoder_for, parts_for, spec
from scipy import special, stats
from torch import Tensor

from pyrovae.compile.step import Step
from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators.base import make_estimator
from pyrovae.models.vae import VAE, make_vae
from pyrovae.nn import MLP
from pyrovae.priors import Flow, Laplace, LearnedNormal, Mixture, Prior, StandardNormal, StudentT, Vamp
from pyrovae.registry import build, find, names

pytestmark = pytest.mark.usefixtures("float64")

LATENT = 4


def _encoder() -> DiagonalNormal:
    return DiagonalNormal(MLP(3, [5], activation="tanh"), LATENT)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def _mixture(prior: Mixture, z: np.ndarray) -> np.ndarray:
    parts = stats.norm(_numpy(prior.loc), np.exp(_numpy(prior.log_scale)))
    return special.logsumexp(special.log_softmax(_numpy(prior.logits)) + parts.logpdf(z[..., None, :]).sum(-1), axis=-1)


def _vamp(prior: Vamp, z: np.ndarray) -> np.ndarray:
    q = prior._lent[0](prior.inputs.clamp(0, 1))
    parts = stats.norm(_numpy(q.mean), _numpy(q.stddev)).logpdf(z[..., None, :]).sum(-1)
    return special.logsumexp(parts - np.log(prior.components), axis=-1)


def _flow(prior: Flow, z: np.ndarray) -> np.ndarray:
    """The change of variables, its Jacobian by autograd."""
    transform = prior.transform()
    found = []
    for point in torch.as_tensor(z).reshape(-1, LATENT):
        jacobian = torch.autograd.functional.jacobian(transform, point)
        found.append(stats.norm.logpdf(_numpy(transform(point))).sum() + np.linalg.slogdet(_numpy(jacobian))[1])
    return np.array(found).reshape(z.shape[:-1])


def _relaxed(prior: Prior, z: np.ndarray) -> np.ndarray:
    tau, log_pi, size = prior.temperature, special.log_softmax(_numpy(prior.logits)), z.shape[-1]
    inner = special.logsumexp(log_pi - tau * np.log(z), axis=-1)
    return special.gammaln(size) + (size - 1) * np.log(tau) - size * inner + (log_pi - (tau + 1) * np.log(z)).sum(-1)


# An independent density for each prior; one that is not here has the quadrature of test_contracts.py.
REFERENCE: dict[str, Callable[[Prior, np.ndarray], np.ndarray]] = {
    "standard_normal": lambda prior, z: stats.norm.logpdf(z).sum(-1),
    "learned_normal": lambda prior, z: stats.norm.logpdf(z, _numpy(prior.loc), np.exp(_numpy(prior.log_scale))).sum(-1),
    "mixture": _mixture,
    "vamp": _vamp,
    "flow": _flow,
    "laplace": lambda prior, z: stats.laplace.logpdf(z, scale=prior.scale).sum(-1),
    "student_t": lambda prior, z: stats.t.logpdf(z, prior.df, scale=prior.scale).sum(-1),
    "hypersphere_uniform": lambda prior, z: np.full(
        z.shape[:-1], special.gammaln(LATENT / 2) - np.log(2) - LATENT / 2 * np.log(np.pi)
    ),
    "categorical": lambda prior, z: (z * special.log_softmax(_numpy(prior.logits))).sum(-1),
    "relaxed_one_hot": _relaxed,
}
# Options away from the defaults, so that each has its part in the comparison.
OPTIONS: dict[str, dict] = {
    "laplace": {"scale": 0.7},
    "student_t": {"df": 3.5, "scale": 1.3},
    "categorical": {"learned": True},
    "relaxed_one_hot": {"learned": True, "temperature": 0.8},
}


def _built(name: str, **options: object) -> Prior:
    """Any prior, with its parameters moved, and an encoder where it wants one."""
    prior = build("prior", spec("prior", name, **OPTIONS.get(name, {}), **options), latent_dim=LATENT, data_shape=3)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    prior.bind(_encoder())
    return prior


@pytest.mark.parametrize("name", REFERENCE)
def test_log_prob_is_the_reference(name: str) -> None:
    prior = _built(name)
    distribution = prior()
    z = (
        2 * torch.randn(3, 5, LATENT)
        if str(prior.support) in (str(StandardNormal.support), "None")
        else distribution.sample((3, 5))
    )
    expected = REFERENCE[name](prior, z.numpy())
    assert_allclose(_numpy(distribution.log_prob(z)), expected, rtol=1e-9)
    # Particles and data to the left, as the plates of a pair put them.
    assert_allclose(_numpy(distribution.expand((5,)).log_prob(z)), expected, rtol=1e-9)
    assert_allclose(_numpy(distribution.expand((3, 5)).log_prob(z)), expected, rtol=1e-9)
    assert distribution.expand((3, 5)).sample().shape == (3, 5, LATENT)


def test_standard_normal_samples() -> None:
    z = StandardNormal(2)().sample((4000,))
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z.T.numpy())[0, 1]) < 5 / 4000**0.5


def test_standard_normal_moves_with_its_module_and_stores_nothing() -> None:
    prior = StandardNormal(3)
    assert prior.to(torch.float32)().sample().dtype == torch.float32
    assert not prior.state_dict()


@pytest.mark.parametrize("latent_dim", [0, -1, 2.5, "50", None])
def test_latent_dim_is_a_positive_integer(latent_dim: object) -> None:
    with pytest.raises(ValueError, match="latent_dim must be a positive integer, got"):
        StandardNormal(latent_dim)


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Prior must implement forward\(\)"):
        Prior(2)()


# -- what each starts as, and what it is a case of -------------------------------------------------------------------------


def _same_density(one: Prior, other: Prior, **tolerance: float) -> None:
    z = 2 * torch.randn(50, one.latent_dim)
    assert_allclose(_numpy(one().log_prob(z)), _numpy(other().log_prob(z)), **({"rtol": 1e-12} | tolerance))


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("family", ["coupling", "maf", "nsf"])
def test_a_flow_starts_as_its_base(family: str, latent_dim: int) -> None:
    _same_density(Flow(latent_dim, family), StandardNormal(latent_dim), rtol=1e-11)


def test_a_learned_normal_starts_as_the_standard_one() -> None:
    _same_density(LearnedNormal(3), StandardNormal(3))


def test_a_mixture_of_one_is_a_normal() -> None:
    mixture, normal = Mixture(3, components=1), LearnedNormal(3)
    with torch.no_grad():
        normal.loc.copy_(mixture.loc[0])
        normal.log_scale.copy_(mixture.log_scale[0].normal_())
    _same_density(mixture, normal)


def test_the_components_of_a_mixture_start_apart() -> None:
    assert torch.pdist(Mixture(2, components=5).loc).min() > 0.01


def test_tails() -> None:
    far = torch.full((2,), 20.0)
    assert StandardNormal(2)().log_prob(far) < Laplace(2)().log_prob(far) < StudentT(2)().log_prob(far)


@pytest.mark.parametrize("family", ["coupling", "maf", "nsf"])
def test_a_flow_samples_what_it_scores(family: str) -> None:
    """Draws taken back through the flow are standard normal."""
    prior = Flow(3, family, hidden=[8])
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        z = prior()((2000,))
        back = prior.transform()(z)
    assert (z - back).abs().max() > 0.1
    assert stats.kstest(back.flatten().numpy(), "norm").pvalue > 1e-3
    distribution = prior()
    drawn = distribution.rsample((7,))
    assert_allclose(_numpy(distribution.log_prob(drawn)), _numpy(distribution.log_prob(drawn.clone())), rtol=1e-6)


# -- VampPrior -------------------------------------------------------------------------------------------------------------


def _vamp_vae(likelihood: object = "bernoulli", **options: object) -> VAE:
    prior = {"kind": "vamp", "components": 6} | options
    return make_vae(5, latent_dim=2, hidden=[8], activation="tanh", prior=prior, likelihood=likelihood)


@pytest.mark.parametrize(
    ("likelihood", "data"),
    [
        ("bernoulli", lambda: torch.rand(6, 5).round()),
        ({"kind": "binomial", "total_count": 16}, lambda: torch.randint(17, (6, 5))),
    ],
    ids=["bernoulli", "binomial"],
)
@pytest.mark.parametrize("encoder", [name for prior, name in COMBINATIONS if prior == "vamp"])
def test_vamp_at_the_data_is_the_aggregate_posterior(encoder: str, likelihood: object, data: Callable[[], Tensor]) -> None:
    parts = {"prior": spec("prior", "vamp", components=6, learn_weights=True), "encoder": spec("encoder", encoder)}
    vae, x = make_vae(5, latent_dim=3, hidden=[8], activation="tanh", likelihood=likelihood, **parts), data()
    with torch.no_grad():
        vae.prior.logits.normal_()
    assert vae.prior.from_data(x) is vae.prior
    q = vae.encode(x)
    z = q.sample((4,))
    each = torch.stack([vae.encode(x[i : i + 1]).log_prob(z) for i in range(6)])
    assert_allclose(_numpy(vae.prior().log_prob(z)), _numpy(each.logsumexp(0) - math.log(6)), rtol=1e-10)


def test_vamp_draws_from_more_data_than_it_has_room_for() -> None:
    vae, x = _vamp_vae(), torch.rand(50, 5)
    vae.prior.from_data(x)
    drawn = {tuple(row) for row in vae.prior.pseudo_inputs.tolist()}
    assert len(drawn) == 6
    assert drawn <= {tuple(row) for row in x.tolist()}


def test_vamp_inputs_set_to_black_and_white_still_learn() -> None:
    vae = _vamp_vae()
    vae.prior.from_data(torch.rand(6, 5).round())
    vae.prior().log_prob(torch.randn(20, 2)).sum().backward()
    assert (vae.prior.inputs.grad != 0).all()


@pytest.mark.parametrize("squash", [True, False])
def test_vamp_squashes_what_leaves_the_range(squash: bool) -> None:
    vae = _vamp_vae({"kind": "binomial", "total_count": 4}, squash=squash)
    with torch.no_grad():
        vae.prior.inputs.copy_(torch.linspace(-1, 2, 5).expand(6, 5))
    expected = 4 * (np.clip(np.linspace(-1, 2, 5), 0, 1) if squash else np.linspace(-1, 2, 5))
    assert_allclose(_numpy(vae.prior.pseudo_inputs[3]), expected, atol=1e-12)


def test_vamp_lends_the_encoder_and_does_not_own_it() -> None:
    vae = _vamp_vae()
    assert [name for name in vae.state_dict() if name.startswith("prior.")] == ["prior.inputs"]
    assert [name for name, _ in vae.prior.named_parameters()] == ["inputs"]
    count = len(list(vae.parameters()))
    assert len(list(vae.likelihood.parameters())) + len(list(vae.encoder.parameters())) + 1 == count
    for twin in (copy.deepcopy(vae), pickle.loads(pickle.dumps(vae))):
        assert twin.prior._lent == (twin.encoder,)
        assert twin.encoder is not vae.encoder


def test_vamp_sends_gradients_into_the_encoder() -> None:
    vae = _vamp_vae()
    vae.prior().log_prob(torch.zeros(2)).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in vae.encoder.parameters())


def test_vamp_keeps_inputs_that_are_not_learned(tmp_path: Path) -> None:
    vae, x = _vamp_vae(learn_inputs=False), torch.rand(6, 5)
    vae.prior.from_data(x)
    assert not list(vae.prior.parameters())
    vae.save_pretrained(tmp_path)
    assert torch.equal(VAE.from_pretrained(tmp_path).prior.inputs, x)


# -- every prior with a guide, every guide with a prior --------------------------------------------------------------------

EVERY = [("prior", name) for name in names("prior")] + [("encoder", name) for name in names("encoder")]
over_parts = pytest.mark.parametrize(("kind", "name"), EVERY, ids=lambda part: str(part))


def _vae(kind: str, name: str) -> VAE:
    pyro.set_rng_seed(2)
    return make_vae(6, latent_dim=3, hidden=[8], **parts_for(kind, name))


def _estimator(vae: VAE, name: str = "elbo") -> object:
    """The named estimator, or one that does without a path where there is none."""
    name = name if vae.encode(torch.zeros(1, 6)).has_rsample else "vimco"
    return make_estimator(name if name == "elbo" else {"kind": name, "num_particles": 2})


@over_parts
def test_three_steps_train_every_parameter(kind: str, name: str) -> None:
    vae, x = _vae(kind, name), torch.rand(8, 6).round()
    before = {key: value.clone() for key, value in vae.named_parameters()}
    history = vae.fit(x, estimator=_estimator(vae), epochs=3, batch_size=8, lr=0.01, progress=False, seed=0)
    assert all(math.isfinite(bound) for bound in history.bound)
    # What starts as the identity lets no gradient through to what is behind it in the first step, but in the next.
    for key, value in vae.named_parameters():
        assert not torch.equal(before[key], value), key


# DReG asks most of a guide: its density at detached draws.
@pytest.mark.parametrize(
    ("kind", "name", "estimator"),
    [("prior", name, "elbo") for name in names("prior")] + [("encoder", name, "dreg") for name in names("encoder")],
)
def test_a_staged_step_is_the_eager_one(kind: str, name: str, estimator: str) -> None:
    x, losses = torch.rand(8, 6).round(), {}
    for backend in ("eager", "aten"):
        vae = _vae(kind, name)
        optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
        objective = _estimator(vae, estimator)
        objective.loss(vae.model, vae.guide, x)  # finds the plates, as fit does before its first step
        step = Step(objective, vae.model, vae.guide, optimizer, backend=backend)
        losses[backend] = [step(x) for _ in range(3)]
        assert step.reason is None
    assert_allclose(losses["aten"], losses["eager"], rtol=1e-9)


@over_parts
def test_comes_back_from_its_folder(kind: str, name: str, tmp_path: Path) -> None:
    vae, x = _vae(kind, name), torch.rand(4, 6).round()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    vae.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert list(again.state_dict()) == list(vae.state_dict())
    z = vae.encode(x).sample()
    assert torch.equal(again.prior().log_prob(z), vae.prior().log_prob(z))
    assert torch.equal(again.encode(x).log_prob(z), vae.encode(x).log_prob(z))
    assert torch.equal(again.reconstruct(x), vae.reconstruct(x))


@over_parts
def test_particles_stand_on_the_left(kind: str, name: str) -> None:
    vae, x = _vae(kind, name), torch.rand(5, 6).round()
    assert make_estimator({"kind": "iwae", "num_particles": 7}).bound(vae.model, vae.guide, x).shape == (5,)
    assert vae.embed(x).shape == (5, 3)
    assert vae.sample(2).shape == (2, 6)


# -- what does not fit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prior", "encoder"),
    [(prior, encoder) for prior in names("prior") for encoder in names("encoder") if (prior, encoder) not in COMBINATIONS],
)
def test_laws_on_different_sets_are_refused(prior: str, encoder: str) -> None:
    with pytest.raises(ValueError, match=r"^The prior \w+ is a distribution on .*densities cannot be compared") as caught:
        make_vae(6, latent_dim=3, hidden=[8], prior=spec("prior", prior), encoder=spec("encoder", encoder))
    assert "\n" not in str(caught.value)
    assert encoder_for(prior) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Vamp(2, 3, components=2)(), "A Vamp prior must have an encoder, got none: build a VAE with it, or call bind"),
        (lambda: Vamp(2, 3, components=0), "components must be a positive integer, got 0."),
        (lambda: Mixture(2, components=-1), "components must be a positive integer, got -1."),
        (
            lambda: Vamp(2, 7).bind(_encoder()),
            "data_shape of the Vamp prior must be that of the encoder, (3,), got (7,): build the prior with data_shape=(3,).",
        ),
        (lambda: _vamp_vae().prior.bind(_encoder()), "A Vamp prior must belong to one VAE, got the encoder of a second one: "),
        (
            lambda: _vamp_vae().prior.from_data(torch.zeros(5, 5)),
            "x must hold at least 6 data of shape (5,), got a tensor of shape (5, 5): pass more data",
        ),
        (
            lambda: _vamp_vae().prior.from_data(torch.zeros(9, 4)),
            "x must hold at least 6 data of shape (5,), got a tensor of shape (9, 4): pass more data",
        ),
        (
            lambda: _vamp_vae().prior.from_data(torch.full((6, 5), 1.5)),
            "x must lie between 0 and 1, got values from 1.5 to 1.5: build the Vamp prior with squash=False.",
        ),
        (lambda: Flow(2, "glow"), "There is no family 'glow'; choose one of coupling, maf, nsf."),
        (lambda: Flow(2, depth=0), "depth must be a positive integer, got 0."),
        (lambda: Laplace(2, scale=0.0), "scale must be a positive number, got 0.0."),
        (lambda: StudentT(2, df=-1), "df must be a positive number, got -1."),
        (lambda: find("prior", "hypersphere_uniform")(1), "latent_dim must be at least 2 for a sphere, got 1: raise it."),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        make()
