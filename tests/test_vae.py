"""The VAE: valid Pyro, independent of its siblings, saved and loaded exactly."""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from parts import COMBINATIONS, LIKELIHOODS, parts_for, spec
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from scipy import stats
from torch import Tensor, nn

from pyrovae.encoders import DiagonalNormal, FullCovarianceNormal
from pyrovae.estimators.doubly_reparameterized import DReG
from pyrovae.estimators.elbo import ELBO
from pyrovae.estimators.importance_weighted import IWAE
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.models.vae import VAE, make_vae
from pyrovae.nn import MLP, ConvEncoder, GatedMLP
from pyrovae.priors import StandardNormal
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import build, names


def _binary(num: int, *shape: int, seed: int = 0) -> Tensor:
    """Two clusters of noisy bits, so that there is something to learn."""
    random = np.random.default_rng(seed)
    prototype = random.integers(0, 2, (2, *shape))
    flip = random.random((num, *shape)) < 0.1
    return torch.as_tensor(np.abs(prototype[random.integers(0, 2, num)] - flip)).float()


def _small(**options: object) -> VAE:
    return make_vae(**({"data_shape": 6, "latent_dim": 2, "hidden": [8]} | options))


def _weights(vae: VAE) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


# -- valid Pyro ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "encoder"),
    [(Trace_ELBO, name) for name in names("encoder") if name != "categorical"]
    + [(TraceMeanField_ELBO, name) for name in ("diagonal_normal", "full_covariance_normal", "mixture")],
)
def test_plain_svi_trains_it(loss: type, encoder: str) -> None:
    vae, x = _small(**parts_for("encoder", encoder)), _binary(64, 6)
    before = _weights(vae)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.04}), loss())
    losses = [svi.step(x) for _ in range(80)]
    # The entropy of two prototypes and bits flipped with probability 0.1 is 64 * (ln 2 + 6 * 0.325) = 169, and coins
    # without a model cost 64 * 6 * ln 2 = 266.
    assert abs(losses[0] - 266) < 120
    assert np.mean(losses[-20:]) < 230
    assert all(not torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())


# Every likelihood with the usual prior and guide, every prior and guide that fit with the usual likelihood.
@pytest.mark.parametrize(
    ("prior", "likelihood", "encoder"),
    [("standard_normal", likelihood, "diagonal_normal") for likelihood in LIKELIHOODS]
    + [(prior, "bernoulli", encoder) for prior, encoder in COMBINATIONS],
    ids=str,
)
def test_every_combination_is_a_pair(prior: str, likelihood: object, encoder: str) -> None:
    parts = {"prior": spec("prior", prior), "encoder": spec("encoder", encoder)}
    table = isinstance(likelihood, dict) and likelihood["kind"] == "mixed"
    vae = _small(data_shape=6 if table else (2, 3), likelihood=likelihood, **parts)
    x = vae.sample(5)
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    for trace in (model, guide):
        trace.compute_log_prob()
    sites = guide.nodes["z"], model.nodes["z"], model.nodes["x"]
    assert [site["log_prob"].shape for site in sites] == [(5,)] * 3
    losses = [Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1)]
    if guide.nodes["z"]["fn"].has_rsample:
        losses.append(TraceMeanField_ELBO())
    for loss in losses:
        loss.differentiable_loss(vae.model, vae.guide, x).backward()
        for name, parameter in vae.named_parameters():
            assert parameter.grad is not None, name


def test_sites_and_plate_are_the_vocabularys() -> None:
    vae, x = _small(), _binary(4, 6)
    trace = poutine.trace(vae.model).get_trace(x)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample"] == ["data", "z", "x"]
    (frame,) = trace.nodes["x"]["cond_indep_stack"]
    assert (frame.name, frame.dim, frame.size) == ("data", -1, 4)
    shapes = trace.format_shapes()
    # Batch to the left of the bar, event to its right.
    assert re.search(r"z dist +4 \| 2\n +value +4 \| 2", shapes)
    assert re.search(r"x dist +4 \| 6\n +value +4 \| 6", shapes)


@pytest.mark.usefixtures("float64")
def test_model_and_guide_are_the_three_parts() -> None:
    """The joint and the guide's density equal what prior, likelihood and encoder say by themselves."""
    vae, x = _small(), _binary(5, 6).double()
    guide = poutine.trace(vae.guide).get_trace(x)
    model = poutine.trace(poutine.replay(vae.model, trace=guide)).get_trace(x)
    z = guide.nodes["z"]["value"]
    encoding = torch.distributions.Normal(vae.encode(x).mean, vae.encode(x).stddev)
    logits = vae.likelihood.decoder(z)
    assert_allclose(guide.log_prob_sum().item(), encoding.log_prob(z).sum().item(), rtol=1e-12)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum() - nn.functional.binary_cross_entropy_with_logits(
        logits, x, reduction="sum"
    )
    assert_allclose(model.log_prob_sum().item(), expected.item(), rtol=1e-12)


def test_predictive() -> None:
    vae, x = _small(), _binary(5, 6)
    prior = Predictive(vae.model, num_samples=7)(x)
    assert prior["z"].shape == (7, 5, 2)
    # With the data unobserved, Predictive draws them too, one by one or at once.
    for parallel in (False, True):
        drawn = Predictive(poutine.uncondition(vae.model), num_samples=7, parallel=parallel)(x)
        assert drawn["x"].shape == (7, 5, 6)
        assert drawn["x"].unique().tolist() == [0, 1]
        posterior = Predictive(poutine.uncondition(vae.model), guide=vae.guide, num_samples=7, parallel=parallel)(x)
        assert posterior["x"].shape == (7, 5, 6)


def test_conditioning_on_a_latent() -> None:
    vae, x, z = _small(), _binary(5, 6), torch.randn(5, 2)
    trace = poutine.trace(poutine.condition(vae.model, {"z": z})).get_trace(x)
    assert_allclose(trace.nodes["x"]["fn"].base_dist.logits.detach(), vae.likelihood.decoder(z).detach(), rtol=1e-6)


# -- names and independence ------------------------------------------------------------------------------------------------


def test_names_are_unique_and_settable() -> None:
    found = [_small().name for _ in range(5)]
    assert len(set(found)) == 5
    vae = _small(name="mine")
    assert vae.name == "mine"
    vae.name = "other"
    vae.guide(_binary(3, 6))
    assert set(pyro.get_param_store()) == {f"other$$${name}" for name, _ in vae.named_parameters()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda vae: pickle.loads(pickle.dumps(vae))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_name_and_parameters_of_its_own(duplicate: Callable[[VAE], VAE]) -> None:
    vae, x = _small(name="mine"), _binary(64, 6)
    vae.guide(x)  # so that Pyro's store has seen the original
    twin = duplicate(vae)
    assert twin.name != vae.name
    before = _weights(vae)
    svi = SVI(twin.model, twin.guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
    assert all(not torch.equal(before[name], tensor) for name, tensor in twin.state_dict().items())


def test_a_copy_keeps_what_is_shared() -> None:
    vae = _small()
    vae.guide(_binary(3, 6))
    for twin, encoder in (copy.deepcopy([vae, vae.encoder]), pickle.loads(pickle.dumps([vae, vae.encoder]))):
        assert twin.encoder is encoder
    vae.guide(_binary(3, 6))  # and the original still runs


def test_a_name_in_use_is_refused() -> None:
    """Trap 1 under plain SVI: two models of one name, as when a notebook's cell runs twice."""
    x = _binary(3, 6)
    first, second = _small(name="mine"), _small(name="mine")
    first.model(x)
    for program in (second.model, second.guide):
        with pytest.raises(ValueError, match=r"Another model is called 'mine'.*never train.*pyro\.clear_param_store"):
            program(x)
    second.name = "other"
    second.model(x)
    first.model(x)


def _train(vae: VAE, x: Tensor) -> dict[str, Tensor]:
    pyro.set_rng_seed(5)
    svi = SVI(vae.model, vae.guide, Adam({"lr": 0.02}), Trace_ELBO())
    for _ in range(20):
        svi.step(x)
    return _weights(vae)


def _pair_of_models() -> list[VAE]:
    pyro.set_rng_seed(1)
    return [_small(), _small(encoder="full_covariance_normal")]


def test_two_models_train_as_if_alone_in_either_order() -> None:
    x = _binary(32, 6)
    alone = []
    for which in (0, 1):
        pyro.clear_param_store()
        alone.append(_train(_pair_of_models()[which], x))
    for order in [(0, 1), (1, 0)]:
        pyro.clear_param_store()
        models = _pair_of_models()
        for which in order:
            untrained = _weights(models[which])
            together = _train(models[which], x)
            assert together.keys() == alone[which].keys()
            assert all(torch.equal(together[name], alone[which][name]) for name in together)
            assert all(not torch.equal(untrained[name], together[name]) for name in together)


# -- what one does with it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_shape", "options"),
    [
        (6, {}),
        ((1, 8, 8), {}),
        ((1, 8, 8), {"body": "conv", "hidden": [3, 4]}),
        ((2, 9, 7), {"body": "conv", "hidden": [3]}),
        ((2, 9, 7), {"body": "resnet", "hidden": [3, 4]}),
    ],
)
@pytest.mark.parametrize("likelihood", ["bernoulli", {"kind": "normal", "scale": "decoder"}], ids=["bernoulli", "normal"])
def test_shapes(data_shape: object, options: dict, likelihood: object) -> None:
    vae = _small(data_shape=data_shape, likelihood=likelihood, **options)
    shape = (6,) if data_shape == 6 else data_shape
    x = _binary(5, *shape)
    assert (vae.data_shape, vae.latent_dim) == (shape, 2)
    assert vae.sample(3).shape == (3, *shape)
    assert (vae.encode(x).batch_shape, vae.encode(x).event_shape) == ((5,), (2,))
    distribution = vae.decode(torch.randn(4, 3, 2))
    assert (distribution.batch_shape, distribution.event_shape) == ((4, 3), shape)
    assert vae.reconstruct(x).shape == x.shape
    assert vae.interpolate(x[0], x[1], 7).shape == (7, *shape)
    assert vae.interpolate(x[:2], x[2:4], 7).shape == (7, 2, *shape)
    assert not vae.reconstruct(x).requires_grad
    assert not vae.sample(1).requires_grad
    assert vae.encode(x).mean.requires_grad


def test_interpolation_starts_and_ends_at_the_reconstructions() -> None:
    vae, x = _small(likelihood="normal"), _binary(4, 6)
    line = vae.interpolate(x[:2], x[2:], 5)
    assert_allclose(line[0], vae.reconstruct(x[:2]), rtol=1e-5, atol=1e-6)
    assert_allclose(line[-1], vae.reconstruct(x[2:]), rtol=1e-5, atol=1e-6)
    middle = vae.decode((vae.encode(x[:2]).mean + vae.encode(x[2:]).mean) / 2).mean
    assert_allclose(line[2], middle.detach(), rtol=1e-5, atol=1e-6)
    assert_allclose(vae.interpolate(x[0], x[2], 5), line[:, 0], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("mean", [False, True])
def test_samples_have_the_moments_of_the_model(mean: bool) -> None:
    """A linear decoder: x ~ N(b, WW' + s^2 I), and its mean given z ~ N(b, WW')."""
    vae = _small(data_shape=3, likelihood={"kind": "normal", "scale": 0.5}, hidden=[])
    layer = vae.likelihood.decoder.layers[0]
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    x = vae.sample(20_000, mean=mean)
    covariance = (layer.weight @ layer.weight.T).detach() + (0.0 if mean else 0.25) * torch.eye(3)
    variances = covariance.diag()
    assert ((x.mean(0) - layer.bias.detach()).abs() < 5 * (variances / len(x)).sqrt()).all()
    error = ((variances[:, None] * variances + covariance**2) / len(x)).sqrt()
    assert ((torch.cov(x.T) - covariance).abs() < 5 * error).all()


def test_encoder_is_shown_logarithms_of_counts_and_columns_of_one_size() -> None:
    x = torch.tensor([[0.0, 3.0, 2.0, 9999.0]])
    counts = _small(data_shape=4, likelihood="poisson")
    assert torch.equal(counts.encode(x).mean, counts.encoder(torch.log1p(x)).mean)
    parts = [[[3], "negative_binomial"], [[0, 2], "normal"], [[1], {"kind": "binomial", "total_count": 6}]]
    table = _small(data_shape=4, likelihood={"kind": "mixed", "parts": parts})
    shown = torch.tensor([[0.0, 0.5, 2.0, math.log(10_000)]])
    assert_allclose(table.encode(x).mean.detach(), table.encoder(shown).mean.detach(), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8, torch.int64, torch.bool])
def test_data_of_any_type_meet_the_networks_own(dtype: torch.dtype) -> None:
    vae, x = _small(), _binary(5, 6)
    assert torch.equal(vae.encode(x.to(dtype)).mean, vae.encode(x).mean)
    assert vae.reconstruct(x.to(dtype)).dtype == torch.float32
    assert poutine.trace(vae.model).get_trace(x.to(dtype)).log_prob_sum().dtype == torch.float32


# -- missing data ----------------------------------------------------------------------------------------------------------


class _FactorAnalysis(VAE):
    """x = Wz + b + noise, with the exact posterior given what was observed, or one ``spread`` times as wide, as its guide."""

    def __init__(self, data_dim: int, scale: float, spread: float = 1.0):
        body = MLP(data_dim, [], 1)
        super().__init__(
            StandardNormal(2), Normal(MLP(2, [], data_dim), scale), FullCovarianceNormal(body, 2), f"factors{spread}"
        )
        self.spread = spread
        with torch.no_grad():
            self.likelihood.decoder.layers[0].bias.normal_()

    @property
    def parts(self) -> tuple[Tensor, Tensor, float]:
        layer = self.likelihood.decoder.layers[0]
        return layer.weight.detach(), layer.bias.detach(), self.likelihood.scale

    def encode(self, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        weight, bias, scale = self.parts
        seen = torch.ones_like(x) if mask is None else mask.to(x.dtype)
        precision = torch.eye(2) + torch.einsum("bd,di,dj->bij", seen, weight, weight) / scale**2
        covariance = torch.linalg.inv(precision)
        mean = torch.einsum("bij,bd,dj->bi", covariance, seen * (torch.where(seen > 0, x, 0.0) - bias), weight) / scale**2
        return dist.MultivariateNormal(mean, self.spread**2 * covariance)

    def exact(self, x: Tensor, mask: Tensor) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """log p(x_obs), and mean and covariance of x_mis given x_obs, row by row."""
        weight, bias, scale = self.parts
        total = (weight @ weight.T + scale**2 * torch.eye(len(bias))).numpy()
        log_px, means, covariances = [], [], []
        for row, seen in zip(x.numpy(), mask.numpy(), strict=True):
            centred = row[seen] - bias.numpy()[seen]
            inner, cross = total[np.ix_(seen, seen)], total[np.ix_(~seen, seen)]
            log_px.append(stats.multivariate_normal(cov=inner).logpdf(centred) if seen.any() else 0.0)
            gain = cross @ np.linalg.inv(inner)
            means.append(bias.numpy()[~seen] + gain @ centred)
            covariances.append(total[np.ix_(~seen, ~seen)] - gain @ cross.T)
        return np.array(log_px), means, covariances


def _holes(num: int = 6, data_dim: int = 5) -> tuple[Tensor, Tensor]:
    x, mask = 2 * torch.randn(num, data_dim), torch.rand(num, data_dim) < 0.5
    mask[0], mask[1] = True, False  # nothing missing, and nothing observed
    return x, mask


@pytest.mark.usefixtures("float64")
def test_evidence_of_the_observed_part_is_exact() -> None:
    """With the exact posterior every weight is p(x_obs), whatever stands where a value is missing."""
    vae = _FactorAnalysis(5, 0.7)
    x, mask = _holes()
    exact, _, _ = vae.exact(x, mask)
    for hidden in (0.0, -1e6):
        evidence = vae.log_marginal((torch.where(mask, x, hidden), mask), num_samples=40)
        assert_allclose(evidence.log_px, exact, rtol=1e-10, atol=1e-12)
        assert np.isneginf(evidence.khat).all()
    # Bits for each number that was observed, of which there are not as many in every row.
    assert evidence.num_dims == pytest.approx(mask.sum().item() / 6)
    assert evidence.bits_per_dim == pytest.approx(-exact.sum() / mask.sum().item() / np.log(2))
    everything = vae.log_marginal((x, torch.ones_like(mask)), num_samples=40)
    assert_allclose(everything.log_px, vae.log_marginal(x, num_samples=40).log_px, rtol=1e-12)
    assert everything.num_dims == 5
    # A guide that is too wide makes it an estimate, within its error.
    wide = _FactorAnalysis(5, 0.7, spread=1.5)
    wide.load_state_dict(vae.state_dict())
    evidence = wide.log_marginal((x, mask), num_samples=20_000)
    assert (np.abs(evidence.log_px - exact) < 5 * evidence.se + 1e-12).all()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("spread", [1.0, 1.4])
def test_imputation_is_the_exact_conditional(spread: float) -> None:
    vae = _FactorAnalysis(5, 0.7, spread)
    x, mask = _holes()
    _, means, covariances = vae.exact(x, mask)
    given = torch.where(mask, x, 99.0)
    num = 40_000
    mean = vae.impute(given, mask, num_samples=num, seed=1)
    draws = vae.impute(given, mask, num_samples=num, num_draws=4_000, chunk_size=39_999, seed=1)  # and 1
    assert (mean.shape, draws.shape) == ((6, 5), (4_000, 6, 5))
    assert torch.equal(mean[mask], x[mask])
    assert torch.equal(draws[:, mask], x[mask].expand(4_000, -1))
    for row in range(1, 6):
        hidden = ~mask[row]
        variance = np.diag(covariances[row])
        assert (np.abs(mean[row, hidden].numpy() - means[row]) < 5 * spread**2 * np.sqrt(variance / num)).all()
        drawn = draws[:, row, hidden].numpy()
        assert (np.abs(drawn.mean(0) - means[row]) < 5 * np.sqrt(variance / 4_000)).all()
        error = np.sqrt((np.outer(variance, variance) + covariances[row] ** 2) / 4_000)
        assert (np.abs(np.cov(drawn.T) - covariances[row]) < 5.5 * error).all()


@pytest.mark.usefixtures("float64")
def test_imputation_in_chunks_and_by_seed() -> None:
    vae = _FactorAnalysis(5, 0.7, spread=1.2)
    x, mask = _holes()
    _, means, _ = vae.exact(x, mask)
    state = torch.get_rng_state()
    for chunk in (37, 600, None):  # some latents of one datum at a time, up to all at once
        found = vae.impute(x, mask, num_samples=300, chunk_size=chunk, seed=3)
        assert torch.equal(found, vae.impute(x, mask, num_samples=300, chunk_size=chunk, seed=3))
        assert max(np.abs(found[row][~mask[row]].numpy() - means[row]).max() for row in range(2, 6)) < 0.3
    assert torch.equal(torch.get_rng_state(), state)
    assert vae.impute(x, mask, num_samples=1, num_draws=1).shape == (1, 6, 5)
    assert vae.impute(x, mask, num_samples=2, chunk_size=1).shape == (6, 5)


def test_imputation_says_where_nothing_explains_the_data() -> None:
    vae = _small(likelihood={"kind": "binomial", "total_count": 1})
    vae.likelihood.decoder.layers[-1].bias.data.fill_(-math.inf)
    x, mask = torch.zeros(2, 6), torch.arange(6).expand(2, 6) < 3
    x[0, 0] = 1.0
    with pyro.validation_enabled(False):
        filled = vae.impute(x, mask, num_samples=10)
    assert filled[0, 3:].isnan().all()
    assert torch.equal(filled[0, :3], x[0, :3])


@pytest.mark.parametrize("likelihood", LIKELIHOODS, ids=str)
def test_hidden_values_change_nothing(likelihood: object) -> None:
    vae = _small(likelihood=likelihood)
    x, mask = vae.sample(7), torch.rand(7, 6) < 0.6
    results = []
    for hidden in (0.0, 1e6, -3.25):
        batch = (torch.where(mask, x, hidden), mask)
        for estimator in (ELBO(), IWAE(3), DReG(3), Trace_ELBO(max_plate_nesting=1)):
            pyro.set_rng_seed(0)
            vae.zero_grad()
            loss = estimator.differentiable_loss(vae.model, vae.guide, *batch)
            loss.backward()
            gradients = [par.grad.clone() for par in vae.parameters() if par.grad is not None]
            assert all(gradient.isfinite().all() for gradient in gradients)
            results.append((hidden, loss.item(), gradients))
        inspect_pair(vae.model, vae.guide, *batch)  # outside the support is no fault where nothing was observed
        filled = vae.impute(*batch, num_samples=20, num_draws=3)
        assert torch.equal(filled[:, mask], x[mask].expand(3, -1))
        assert vae.decode(torch.zeros(7, 2)).support.check(filled[0]).all()
        assert vae.reconstruct(*batch).isfinite().all()
    for (_, loss, gradients), (_, other, others) in zip(results[:4] * 2, results[4:], strict=True):
        if likelihood != {"kind": "normal", "scale": "optimal"}:  # whose scale is kept
            assert loss == other
            assert all(map(torch.equal, gradients, others))


def test_fit_with_a_mask_learns_from_what_was_observed() -> None:
    """Columns that copy one bit: a hidden one is then known from the others."""
    bit = (torch.arange(400) % 2).float()
    x, mask = bit[:, None].expand(400, 6), torch.rand(400, 6) < 0.7
    vae = _small()
    history = vae.fit(
        (torch.where(mask, x, 0.0), mask),
        estimator={"kind": "iwae", "num_particles": 5},
        epochs=25,
        lr=0.03,
        progress=False,
        validation=0.1,
        seed=0,
    )
    assert history.bound[-1] > -1.2 > history.bound[0]  # one bit is 0.69 nats
    some = mask.any(1)
    with pytest.warns(UserWarning, match=r"of 400 data \(first datum \d+\) have a Pareto k of 0.57 or more with 200 samples"):
        filled = vae.impute(torch.where(mask, x, 0.0), mask, num_samples=200)
    assert (filled - x)[some].abs().max() < 0.2


def test_labels_beside_the_data_are_left_out_as_before() -> None:
    vae, x = _small(), _binary(8, 6)
    for labels in (torch.arange(8), torch.zeros(8, 3)):
        pyro.set_rng_seed(0)
        with_labels = vae.fit((x, labels), epochs=1, progress=False).bound
        assert len(with_labels) == 1
        assert torch.equal(vae.encode(x, labels).mean, vae.encode(x).mean)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 5, dtype=torch.bool), "got torch.bool of shape (4, 5)."),
        (torch.ones(4, 6), "got torch.float32 of shape (4, 6)."),
    ],
)
def test_a_mask_of_another_kind_gets_one_sentence(mask: Tensor, message: str) -> None:
    said = f"A mask must be a boolean tensor of the data's shape (4, 6), true where a value was observed, {message}"
    for program in (_small().model, _small().guide, _small().impute):
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            program(torch.zeros(4, 6), mask)


def test_imputation_needs_a_mask_and_a_law_in_parts() -> None:
    with pytest.raises(ValueError, match=r"mask must be a boolean tensor of .* got torch.float32 of shape \(4,\): pass a mask"):
        _small().impute(torch.zeros(4, 6), torch.zeros(4))
    with pytest.raises(ValueError, match=r"mask must be .* got none for data without missing values: pass a mask"):
        _small().impute(torch.zeros(4, 6))

    class Joint(Normal):
        def forward(self, z: Tensor) -> dist.Distribution:
            return dist.MultivariateNormal(self.decoder(z), torch.eye(6))

    vae = _small(likelihood=Joint(MLP(2, [], 6)))
    vae.model(torch.zeros(4, 6))
    with pytest.raises(
        ValueError, match=r"^A likelihood must return independent dimensions, .* got MultivariateNormal from Joint: choose"
    ):
        vae.model(torch.zeros(4, 6), torch.ones(4, 6, dtype=torch.bool))


# -- saved and loaded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [{"likelihood": likelihood} for likelihood in LIKELIHOODS]
    + [parts_for("encoder", name) for name in names("encoder")]
    + [parts_for("prior", name) for name in names("prior")]
    + [{"body": "gated_mlp"}, {"activation": "tanh"}, {"data_shape": (1, 8, 8), "body": "conv"}, {"hidden": []}],
    ids=str,
)
def test_comes_back_the_same(tmp_path: Path, options: dict, dtype: torch.dtype) -> None:
    vae = _small(**options).to(dtype)
    x = _binary(5, *vae.data_shape).to(dtype)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    vae.save_pretrained(tmp_path / "deep" / "folder")
    again = VAE.from_pretrained(str(tmp_path / "deep" / "folder"))
    assert again.name != vae.name
    for method in (lambda v: v.reconstruct(x), lambda v: v.encode(x).sample(), lambda v: v.sample(3)):
        pyro.set_rng_seed(2)
        expected = method(vae)
        pyro.set_rng_seed(2)
        found = method(again)
        assert found.dtype == dtype
        assert torch.equal(found, expected)


def _saved(folder: Path) -> Path:
    _small(data_shape=3).save_pretrained(folder)
    return folder


def _edit(folder: Path, part: str, **changes: object) -> None:
    path = folder / "model.json"
    description = json.loads(path.read_text())
    description[part] |= changes
    path.write_text(json.dumps(description))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere/model.json"):
        VAE.from_pretrained(tmp_path / "nowhere")
    (_saved(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"There is no file .*model.safetensors"):
        VAE.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, name: str) -> None:
    path = _saved(tmp_path) / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{name} cannot be read .*truncated") as caught:
        VAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").write_text("[1, 2]"), "does not describe a VAE: it needs prior, likelihood and encoder"),
        (lambda f: (f / "model.json").write_text('{"prior": {}}'), "does not describe a VAE"),
        (lambda f: _edit(f, "prior", kind="vampp"), "There is no prior 'vampp'"),
        (lambda f: _edit(f, "prior", latent_dim=3), r"disagree on the latent dimension \(prior 3, encoder 2, decoder 2\)"),
        (lambda f: _edit(f, "prior", latent_dim="x"), "latent_dim must be a positive integer, got 'x'"),
        (lambda f: _edit(f, "encoder", kind="full_covariance_normal"), "does not fit the model"),
        (lambda f: _edit(f, "likelihood", decoder="mlp"), "does not fit the model"),
        (lambda f: _edit(f, "encoder", body=None), "does not fit the model"),
        (lambda f: _edit(f, "encoder", in_scale="x"), "in_scale must be a positive number, got 'x'"),
        (lambda f: (f / "model.json").write_text('{"prior": 1, "likelihood": 2, "encoder": 3}'), "The prior must be a"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(_saved(tmp_path))
    with pytest.raises(ValueError, match=message) as caught:
        VAE.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_built_again_is_not_saved(tmp_path: Path) -> None:
    vae = VAE(StandardNormal(2), Bernoulli(nn.Linear(2, 3), event_shape=3), DiagonalNormal(MLP(3, [4]), 2))
    with pytest.raises(ValueError, match=r"bernoulli.decoder is a Linear"):
        vae.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# -- made by name ----------------------------------------------------------------------------------------------------------


def test_make_vae_builds_what_it_says() -> None:
    counts = {"kind": "binomial", "total_count": 8}
    vae = make_vae((1, 4, 4), latent_dim=3, hidden=[10, 7], activation="tanh", likelihood=counts)
    assert [type(layer).__name__ for layer in vae.encoder.body.layers] == ["Linear", "Tanh", "Linear", "Tanh"]
    assert (vae.encoder.body.in_shape, vae.encoder.body.hidden) == ((1, 4, 4), [10, 7])
    assert (vae.likelihood.decoder.hidden, vae.likelihood.decoder.out_shape) == ([7, 10], (1, 4, 4))
    assert vae.encoder.in_scale == 1 / 8


def test_make_vae_pairs_convolutional_bodies() -> None:
    vae = make_vae((1, 12, 12), latent_dim=3, body="conv", hidden=[5, 7], likelihood={"kind": "normal", "scale": "decoder"})
    assert isinstance(vae.encoder.body, ConvEncoder)
    assert vae.encoder.body.hidden == vae.likelihood.decoder.hidden == [5, 7]
    assert vae.likelihood.decoder.out_shape == (2, 1, 12, 12)


def test_make_vae_takes_tables_and_ready_parts() -> None:
    prior, likelihood = StandardNormal(2), Normal(MLP(2, [4], 6), scale="shared")
    encoder = build("encoder", "diagonal_normal", body=GatedMLP(6, [4]), latent_dim=2)
    vae = make_vae(6, latent_dim=2, prior=prior, likelihood=likelihood, encoder=encoder)
    assert (vae.prior, vae.likelihood, vae.encoder) == (prior, likelihood, encoder)
    vae = make_vae(6, latent_dim=2, encoder={"kind": "diagonal_normal", "in_scale": 0.5})
    assert vae.encoder.in_scale == 0.5


# -- mistakes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _small(prior="standrd_normal"), "There is no prior 'standrd_normal'; did you mean 'standard_normal'?"),
        (lambda: _small(likelihood="bernouli"), "There is no likelihood 'bernouli'; did you mean 'bernoulli'?"),
        (lambda: _small(encoder="diagonal"), "There is no encoder 'diagonal'; did you mean 'diagonal_normal'?"),
        (lambda: _small(body="convolution"), "There is no body 'convolution'; did you mean 'conv'?"),
        (lambda: _small(body="conv_encoder"), "There is no body 'conv_encoder'; did you mean 'conv'?"),
        (lambda: _small(activation="rellu"), "There is no activation 'rellu'; did you mean 'relu'?"),
        (lambda: _small(hidden=8), "hidden must be a list of positive integers such as [200, 200], got 8."),
        (lambda: _small(latent_dim=0), "latent_dim must be a positive integer, got 0."),
        (
            lambda: _small(body="conv"),
            "The shape of images must be (channels, height, width), got (6,): use an MLP.",
        ),
        (
            lambda: _small(likelihood={"scale": 1.0}),
            'The likelihood must be a name, a table such as {"kind": "bernoulli"} or a Likelihood, got {\'scale\': 1.0}.',
        ),
        (
            lambda: _small(likelihood=5),
            'The likelihood must be a name, a table such as {"kind": "bernoulli"} or a Likelihood, got 5.',
        ),
        (
            lambda: _small(likelihood="binomial"),
            "The likelihood 'binomial' needs total_count: write { kind = 'binomial', total_count = ... }.",
        ),
        (
            lambda: _small(prior=StandardNormal(5)),
            "The parts disagree on the latent dimension (prior 5, encoder 2, decoder 2): build them with the same one.",
        ),
        (
            lambda: _small(likelihood=Bernoulli(MLP(2, [], 7))),
            "The parts disagree on the shape of one datum (encoder (6,), likelihood (7,)): build them with the same one.",
        ),
        (
            lambda: VAE(dist.Normal(0, 1), Bernoulli(MLP(2, [], 7)), DiagonalNormal(MLP(7, []), 2)),
            "The prior must be a pyrovae.priors.Prior, got a Normal: build one, or subclass it.",
        ),
        (
            lambda: _small().encode(torch.zeros(4, 5)),
            "The data have shape (4, 5), but the model takes (N, 6): reshape them, or build the model for that shape.",
        ),
        (
            lambda: _small().model(torch.zeros(6)),
            "The data have shape (6,), but the model takes (N, 6): reshape them, or build the model for that shape.",
        ),
        (
            lambda: _small().guide(torch.tensor(1.0)),
            "The data have shape (), but the model takes (N, 6): reshape them, or build the model for that shape.",
        ),
        (
            lambda: _small().interpolate(torch.zeros(6), torch.zeros(2, 6)),
            "a and b must have the same shape, got (6,) and (2, 6).",
        ),
        (
            lambda: _small().decode(torch.zeros(4, 3)),
            "The input of MLP must end in shape (2,), got a tensor of shape (4, 3): reshape it, or build the network for that "
            "shape.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_arrays_are_refused_with_the_cure() -> None:
    with pytest.raises(TypeError, match=r"must be a tensor, got ndarray: write torch.as_tensor\(x\)"):
        _small().model(np.zeros((3, 6)))
