from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pairs import bare_param_pair, pyro_module_function_pair, pyro_nn_pair, two_latents_pair
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyrovae as pv
from pyrovae.compile import step as compile_step
from pyrovae.compile.step import Step
from pyrovae.evidence.keywords import LogMarginalKeywords
from pyrovae.training import loop, setup
from pyrovae.training.loop import fit
from pyrovae.training.options import FitKeywords, FitOptions


def pca_data(num: int = 400, data_dim: int = 6, latent_dim: int = 2, noise: float = 0.6) -> torch.Tensor:
    random = np.random.default_rng(0)
    weight = random.normal(size=(data_dim, latent_dim)) * [2.0, 1.0]
    x = random.normal(size=(num, latent_dim)) @ weight.T + noise * random.normal(size=(num, data_dim)) + 1.0
    return torch.as_tensor(x)


def ppca_optimum(x: torch.Tensor, latent_dim: int) -> float:
    """Maximum log-likelihood per datum of probabilistic PCA (Tipping and Bishop 1999), in nats."""
    data_dim = x.shape[1]
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy().T, bias=True))[::-1]
    sigma2 = eigenvalues[latent_dim:].mean()
    terms = data_dim * math.log(2 * math.pi) + np.log(eigenvalues[:latent_dim]).sum()
    return -0.5 * (terms + (data_dim - latent_dim) * math.log(sigma2) + data_dim)


@pytest.mark.usefixtures("float64")
def test_linear_vae_reaches_the_probabilistic_pca_optimum():
    x = pca_data()
    vae = pv.make_vae(
        6, latent_dim=2, likelihood={"kind": "normal", "scale": "shared"}, encoder="full_covariance_normal", hidden=[]
    )
    fit(vae.model, vae.guide, x, estimator="trace_elbo", epochs=400, batch_size=200, lr=0.03, schedule="cosine",
        progress=False, seed=0)  # fmt: skip
    weight, bias = (parameter.detach() for parameter in vae.likelihood.decoder.parameters())
    covariance = weight @ weight.T + (2 * vae.likelihood.log_scale).exp().item() * torch.eye(6)
    reached = torch.distributions.MultivariateNormal(bias, covariance).log_prob(x).mean().item()
    optimum = ppca_optimum(x, 2)
    assert optimum - 0.005 < reached < optimum + 1e-9
    # Not only the model: the bound touches it too, since this encoder holds the exact posterior.
    assert vae.log_marginal(x, num_samples=200, seed=0).elbo.mean() > optimum - 0.01


@pytest.mark.parametrize("estimator", ["elbo", "trace_elbo", "trace_mean_field_elbo", "iwae"])
def test_every_first_estimator_raises_the_bound(estimator: str):
    vae = pv.make_vae(9, latent_dim=2, hidden=[16])
    x = torch.bernoulli(torch.full((200, 9), 0.5).cumprod(1))
    history = vae.fit(x, estimator=estimator, epochs=12, batch_size=50, lr=0.01, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0] + 0.5
    assert history.estimator == type(pv.estimators.make_estimator(estimator)).__name__


def test_bound_is_the_mean_per_datum_over_ragged_batches():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    for parameter in vae.likelihood.parameters():
        parameter.data.zero_()  # logits are zero, so each datum has log p(x|z) = -4 log 2 exactly, and KL is zero
    for parameter in vae.encoder.parameters():
        parameter.data.zero_()
    x = torch.bernoulli(torch.full((70, 4), 0.5))
    history = vae.fit(
        x, epochs=1, batch_size=64, lr=1e-30, progress=False, estimator="trace_mean_field_elbo", validation=x[:33]
    )
    assert history.bound[0] == pytest.approx(-4 * math.log(2), rel=1e-5)
    assert history.validation[0] == pytest.approx(-4 * math.log(2), rel=1e-5)
    assert [record["step"] for record in history.records] == [2]


def test_foreign_pairs_train_and_score():
    y = torch.bernoulli(torch.full((60, 3), 0.7))
    functions = pyro_module_function_pair()
    history = fit(functions.model, functions.guide, y, epochs=15, batch_size=20, lr=0.05, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0]
    before = np.concatenate([p.detach().numpy().ravel() for p in functions.parameters])
    assert len(pv.log_marginal(functions.model, functions.guide, y, num_samples=10)) == 60

    modules = pyro_nn_pair()
    x = torch.randn(60, 3) + 2
    noise = modules.model.noise.item()
    history = fit(modules.model, modules.guide, x, epochs=15, batch_size=20, lr=0.05, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0] + 1
    assert modules.model.noise.item() != noise

    bare = bare_param_pair()
    x = 2 * torch.randn(300)
    history = fit(bare.model, bare.guide, x, epochs=40, batch_size=100, lr=0.02, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0]
    store = pyro.get_param_store()
    variance = (store["slope"] ** 2 + store["noise"] ** 2).item()
    assert variance == pytest.approx(x.var(unbiased=False).item(), rel=0.15), "the marginal of x is N(0, slope^2 + noise^2)"

    chain = two_latents_pair()
    history = fit(chain.model, chain.guide, torch.randn(60, 4), epochs=15, batch_size=20, lr=0.01, progress=False, seed=0)
    assert history.bound[-1] > history.bound[0] + 1
    assert not np.array_equal(before, np.concatenate([p.detach().numpy().ravel() for p in chain.parameters]))


def test_bound_methods_of_a_plain_module_train_without_pyro_module():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder, self.encoder = nn.Linear(2, 3), nn.Linear(3, 2)

        def model(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

        def guide(self, x: torch.Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))

    for estimator in ("elbo", "trace_elbo"):
        plain = Plain()
        history = fit(plain.model, plain.guide, torch.randn(40, 3) + 3, estimator=estimator, epochs=10, lr=0.05,
                      progress=False, seed=0)  # fmt: skip
        assert history.bound[-1] > history.bound[0] + 1


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_models_in_one_process_train_as_if_alone(order: tuple[int, int]):
    x = torch.bernoulli(torch.full((50, 5), 0.6))

    def made(seed: int) -> pv.VAE:
        torch.manual_seed(seed)
        return pv.make_vae(5, latent_dim=2, hidden=[8])

    def train(vae: pv.VAE) -> torch.Tensor:
        fit(vae.model, vae.guide, x, epochs=3, batch_size=20, lr=0.01, progress=False, seed=4)
        return torch.nn.utils.parameters_to_vector(vae.parameters()).detach()

    alone = []
    for seed in (0, 1):
        pyro.clear_param_store()
        alone.append(train(made(seed)))
    pyro.clear_param_store()
    together = {seed: made(seed) for seed in (0, 1)}
    for seed in order:
        assert torch.equal(train(together[seed]), alone[seed])
    pyro.clear_param_store()
    again = made(0)
    train(again)
    pyro.clear_param_store()
    assert not torch.equal(train(again), alone[0]), "a cleared store does not reset a model"


def test_a_second_module_under_a_used_name_trains():
    x = torch.bernoulli(torch.full((20, 3), 0.6))
    first, second = pyro_module_function_pair("same"), pyro_module_function_pair("same")
    before = [[parameter.clone() for parameter in pair.parameters] for pair in (first, second)]
    for pair, start in ((first, before[0]), (second, before[1])):
        fit(pair.model, pair.guide, x, epochs=1, progress=False)
        assert not any(map(torch.equal, pair.parameters, start))


def test_same_seed_same_result_and_numpy_tensor_dataset_loader_agree():
    random = np.random.default_rng(0)
    x = (random.uniform(size=(40, 5)) < 0.5).astype(np.float64)
    results = []
    for data in (x, torch.as_tensor(x), torch.as_tensor(x).float(), x.astype(int), TensorDataset(torch.as_tensor(x))):
        torch.manual_seed(0)
        vae = pv.make_vae(5, latent_dim=2, hidden=[8])
        results.append(vae.fit(data, epochs=2, batch_size=16, progress=False, seed=3).bound)
    assert all(result == results[0] for result in results)
    vae = pv.make_vae(5, latent_dim=2, hidden=[8])
    labels = torch.zeros(40)
    loader = DataLoader(TensorDataset(torch.as_tensor(x).float(), labels), batch_size=16, shuffle=True)
    history = vae.fit(loader, epochs=2, progress=False, validation=loader)
    assert history.records[-1]["step"] == 6
    assert math.isfinite(history.validation[-1])


def test_iterable_dataset_is_counted_as_it_comes():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.bernoulli(torch.full((30, 4), 0.5)))

    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    assert vae.fit(Stream(), epochs=2, batch_size=8, progress=False).records[-1]["step"] == 8
    assert len(vae.log_marginal(Stream(), num_samples=5)) == 30
    with pytest.raises(ValueError, match="choose schedule='constant'"):
        vae.fit(Stream(), epochs=2, batch_size=8, schedule="cosine", progress=False)


def test_pairs_of_two_arguments_take_a_tuple():
    net = nn.Linear(3, 2)

    def model(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor, y: torch.Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, log_scale = net(torch.stack([x, y, x * y], -1)).unbind(-1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    y = torch.randn(80)
    x = y + math.sqrt(2) * torch.randn(80)
    history = fit(model, guide, (x, y), epochs=100, batch_size=40, lr=0.05, progress=False, seed=0)
    exact = dist.Normal(y, math.sqrt(2)).log_prob(x).mean().item()
    assert exact - 0.1 < history.bound[-1] < exact + 0.1
    evidence = pv.log_marginal(model, guide, (x, y), num_samples=500, seed=0)
    assert evidence.mean == pytest.approx(exact, abs=4 * evidence.mean_se + 1e-4)
    with pytest.raises(ValueError, match="takes x, y, but the data give 1"):
        fit(model, guide, x, epochs=1, progress=False)


def test_subsampled_plate_is_reported_per_datum():
    gain = nn.Linear(1, 1)
    x = torch.randn(100)

    def model(batch: torch.Tensor) -> None:
        pyro.module("gain", gain)
        with pyro.plate("data", 100, subsample=batch):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=batch)

    def guide(batch: torch.Tensor) -> None:
        pyro.module("gain", gain)
        with pyro.plate("data", 100, subsample=batch):
            pyro.sample("z", dist.Normal(batch / 2 + 0 * gain(batch[:, None])[:, 0], math.sqrt(0.5)))

    exact = dist.Normal(0.0, math.sqrt(2)).log_prob(x).mean().item()
    # The guide is exact, so a batch's bound is its own mean evidence, and each counts as all 100.
    for estimator in ("elbo", "trace_elbo"):
        history = fit(model, guide, x, estimator=estimator, epochs=50, batch_size=25, progress=False, seed=0, lr=1e-30)
        assert np.mean(history.bound) == pytest.approx(exact, abs=1e-4)
    renyi = pyro.infer.RenyiELBO(alpha=0.5, num_particles=2)
    with pytest.raises(ValueError, match="N/B = 4 inside the logsumexp"):
        fit(model, guide, x, estimator=renyi, epochs=1, batch_size=25, progress=False)


def test_a_discrete_latent_is_summed_by_pyros_enumeration():
    logits = nn.Parameter(torch.tensor([0.3, -0.2]))
    means = nn.Parameter(torch.tensor([-1.0, 1.5]))
    x = torch.cat([torch.randn(60) - 2, torch.randn(40) + 2])

    @pyro.infer.config_enumerate
    def model(x: torch.Tensor) -> None:
        weights, locs = pyro.param("logits", logits), pyro.param("means", means)
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(logits=weights))
            pyro.sample("x", dist.Normal(locs[c], 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        pass

    def exact() -> float:
        distribution = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits), torch.distributions.Normal(means, torch.ones(2))
        )
        return distribution.log_prob(x).mean().item()

    at_start = exact()
    history = fit(model, guide, x, estimator="trace_enum_elbo", epochs=1, lr=1e-30, progress=False)
    assert history.bound[0] == pytest.approx(at_start, rel=1e-5)
    history = fit(model, guide, x, estimator=pyro.infer.TraceEnum_ELBO(), epochs=200, lr=0.05, progress=False)
    assert history.bound[-1] == pytest.approx(exact(), rel=1e-3)
    assert exact() > at_start + 0.1
    with pytest.raises(ValueError, match=r"IWAE cannot sum out 'c'.*trace_enum_elbo"):
        fit(model, guide, x, estimator="iwae", epochs=1, progress=False)
    with pytest.raises(ValueError, match="'c' is not in the guide"):
        pv.log_marginal(model, guide, x, num_samples=10)


def test_patience_stops_and_restores_the_best():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    x = torch.bernoulli(torch.full((60, 4), 0.5))
    history = vae.fit(x, epochs=200, batch_size=20, lr=0.3, validation=0.3, patience=3, progress=False, seed=0)
    assert len(history.records) < 200
    assert history.stopped == "no better validation bound for 3 epochs"
    best = int(np.argmax(history.validation)) + 1
    assert best == len(history.records) - 3


def test_clipping_is_global(monkeypatch: pytest.MonkeyPatch):
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    norms = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            norms.append(torch.cat([g.ravel() for g in gradients]).norm().item())
            return super().step(closure)

    vae.fit(torch.ones(20, 4), epochs=2, batch_size=20, lr=1e-3, optimizer=Watched, clip_norm=0.01, progress=False)
    np.testing.assert_allclose(norms, 0.01, rtol=1e-3)


def test_schedules_move_the_learning_rate():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    x = torch.ones(20, 4)
    cosine = vae.fit(x, epochs=4, batch_size=20, lr=0.1, schedule="cosine", progress=False)
    np.testing.assert_allclose(
        [record["lr"] for record in cosine.records], [0.05 * (1 + math.cos(math.pi * i / 4)) for i in (1, 2, 3, 4)], atol=1e-9
    )
    mine = vae.fit(x, epochs=2, lr=0.1, schedule=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), progress=False)
    assert [record["lr"] for record in mine.records] == [0.05, 0.025]


def test_nan_stops_with_one_sentence_and_keeps_the_last_parameters():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8], likelihood={"kind": "normal", "scale": "shared"})
    with (
        pytest.warns(
            UserWarning, match=r"(loss|gradient) became .* in epoch \d+, step \d+, which is skipped: lower the learning"
        ),
        pytest.raises(FloatingPointError, match=r"in epoch \d+, step \d+ and in the 9 before it: lower the learning rate"),
    ):
        vae.fit(torch.randn(20, 4), epochs=50, batch_size=20, lr=1e4, optimizer="sgd", progress=False, seed=0)


def test_a_gpu_is_looked_at_seldom_and_says_the_same(monkeypatch: pytest.MonkeyPatch):
    x = torch.bernoulli(torch.full((50, 4), 0.5))
    starts, looked = [], []
    of, outcomes = compile_step.stage, Step.drain

    def stage(*args, asynchronous: bool, **options):
        step = of(*args, **options)
        step.asynchronous = asynchronous
        return step

    def counted(step: Step):
        looked.append(outcomes(step))
        return looked[-1]

    monkeypatch.setattr(loop, "SYNC_EVERY", 7)
    monkeypatch.setattr(Step, "drain", counted)
    for asynchronous in (False, True):
        monkeypatch.setattr(setup, "stage", partial(stage, asynchronous=asynchronous))
        looked.clear()
        vae = pv.make_vae(4, latent_dim=2, hidden=[8])
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter.fill_(0.1)
        history = vae.fit(x, epochs=3, batch_size=5, lr=0.01, schedule="cosine", progress=False, seed=0, compile=False)
        starts.append((history.bound, [parameter.detach().clone() for parameter in vae.parameters()]))
    assert [len(each) for each in looked] == [7, 3, 4, 6, 1, 7, 2]  # ten steps an epoch, and at its end
    assert starts[0][0] == pytest.approx(starts[1][0], rel=1e-6)
    assert all(map(torch.equal, starts[0][1], starts[1][1]))

    said = []
    for asynchronous in (False, True):
        monkeypatch.setattr(setup, "stage", partial(stage, asynchronous=asynchronous))
        torch.manual_seed(0)
        vae = pv.make_vae(4, latent_dim=2, hidden=[8], likelihood={"kind": "normal", "scale": "shared"})
        with pytest.warns(UserWarning, match="is skipped"), pytest.raises(FloatingPointError) as error:
            vae.fit(torch.randn(60, 4), epochs=50, batch_size=20, lr=1e4, optimizer="sgd", progress=False, seed=0)
        said.append((str(error.value), [parameter.detach().clone() for parameter in vae.parameters()]))
    assert said[0][0] == said[1][0]
    assert all(map(torch.equal, said[0][1], said[1][1]))


def test_gradients_left_behind_do_not_enter_the_first_step():
    x = torch.bernoulli(torch.full((20, 4), 0.5))
    results = []
    for left in (None, math.nan, 1e6):
        torch.manual_seed(0)
        vae = pv.make_vae(4, latent_dim=2, hidden=[8])
        for parameter in vae.parameters():
            parameter.grad = None if left is None else torch.full_like(parameter, left)
        results.append(vae.fit(x, epochs=2, lr=0.1, progress=False, seed=0).bound)
    assert results[0] == results[1] == results[2]


def test_a_datum_of_weight_zero_does_not_stop_training():
    loc = nn.Parameter(torch.tensor(0.0))
    allowed = torch.tensor([True] * 19 + [False])

    def model(x: torch.Tensor, allowed: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("loc", loc), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("allowed", torch.where(allowed, 0.0, -math.inf))

    def guide(x: torch.Tensor, allowed: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + 2) / 2, 0.7))

    x = torch.full((20,), 2.0)
    fit(model, guide, (x, allowed), estimator="iwae", epochs=300, batch_size=20, lr=0.05, progress=False, seed=0)
    assert loc.item() == pytest.approx(2.0, abs=0.2)


def test_unshuffled_data_keep_their_order():
    x = torch.eye(6)
    seen = []
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    vae.fit(x, epochs=2, batch_size=6, shuffle=False, progress=False)
    assert all(torch.equal(batch, x[: len(batch)]) for batch in seen)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.full((5, 4), math.nan), "NaN or infinite values in 5 of 5 rows"),
        (np.array([[1.0, 0.0, 0.0, math.inf]]), "NaN or infinite"),
        (torch.full((5, 4), 0.5), "outside the support of Bernoulli.*binarise"),
        (torch.ones(5, 3), r"shape \(5, 3\), but the model takes \(N, 4\)"),
        (torch.ones(0, 4), "empty"),
        ([], "empty"),
        (np.array([["a"]]), "must be an array of numbers"),
        (np.ones((3, 4)) * 1j, "complex"),
        ([[1.0], [1.0, 2.0]], "must be an array of numbers"),
        (None, "must be an array of numbers"),
        ((torch.ones(5, 4), torch.ones(4)), "different lengths"),
    ],
)
def test_bad_data_get_one_sentence_before_training(data: object, message: str):
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    before = torch.nn.utils.parameters_to_vector(vae.parameters()).clone()
    with pytest.raises(ValueError, match=message) as caught:
        vae.fit(data, epochs=1, progress=False)
    assert "\n" not in str(caught.value)
    assert torch.equal(torch.nn.utils.parameters_to_vector(vae.parameters()), before)


def test_a_bad_datum_in_a_late_batch_is_found_before_training():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    x = torch.ones(50, 4)
    x[49, 0] = 2
    seen = []
    with pytest.raises(ValueError, match="outside the support"):
        vae.fit(x, epochs=1, batch_size=10, progress=False, on_epoch=seen.append)
    assert not seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "iwea"}, "did you mean 'iwae'"),
        ({"estimator": 3}, "pyro.infer.ELBO"),
        ({"optimizer": "adm"}, "did you mean 'adam'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"optimizer": torch.optim.LBFGS}, "got LBFGS, which does so several times"),
        ({"schedule": torch.optim.lr_scheduler.ReduceLROnPlateau}, "follows the validation bound needs one"),
        ({"estimator": pyro.infer.TraceTailAdaptive_ELBO(num_particles=3)}, "has a gradient and no loss"),
        ({"lr": "fast"}, "lr must be a positive number, got 'fast'"),
        ({"epochs": 0}, "epochs must be a positive integer"),
        ({"clip_norm": -1.0}, "clip_norm must be a positive number"),
        ({"epochs": 1.5}, "epochs must be a positive integer"),
        ({"estimator": pyro.infer.ReweightedWakeSleep()}, "choose 'rws'"),
        ({"batch_size": 0}, "batch_size must be a positive integer"),
        ({"validation": 1.5}, "fraction between 0 and 1"),
        ({"patience": 3}, "validation=0.1"),
    ],
)
def test_bad_options_get_one_sentence(options: dict, message: str):
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    with pytest.raises(ValueError, match=re.escape(message)):
        vae.fit(torch.ones(5, 4), **({"epochs": 1, "progress": False} | options))


def test_a_pair_without_parameters_is_refused():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="no parameters to train"):
        fit(model, guide, torch.ones(3), epochs=1, progress=False)


def test_transform_is_drawn_afresh_for_training_and_once_for_validation():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    grey = torch.full((40, 4), 0.5)
    seen = []
    vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    vae.fit(grey, epochs=2, batch_size=40, validation=0.5, transform=pv.data.binarize, progress=False, seed=0)
    assert all(set(x.unique().tolist()) <= {0.0, 1.0} for x in seen)
    assert torch.equal(seen[-1], seen[-3]), "the validation set of both epochs"
    assert not torch.equal(seen[-2], seen[-4]), "the training batch of both epochs"


def test_progress_bar_shows_the_bound(capsys: pytest.CaptureFixture):
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    history = vae.fit(torch.ones(20, 4), epochs=1, validation=0.5)
    assert f"bound {history.bound[-1]:.2f}, validation {history.validation[-1]:.2f} nats/datum" in capsys.readouterr().err


def test_the_bar_has_room_for_the_epoch_and_both_bounds_in_80_columns(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (80, 24))
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    history = vae.fit(torch.ones(20, 4), epochs=2, validation=0.5)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert last.endswith(f"epoch 2/2, bound {history.bound[-1]:.2f}, validation {history.validation[-1]:.2f}")
    assert last.startswith("100%|")
    assert len(last) <= 80


def test_history_plots_itself():
    vae = pv.make_vae(4, latent_dim=2, hidden=[8])
    ax = vae.fit(torch.ones(20, 4), epochs=3, validation=0.5, progress=False).plot()
    drawn = [line.get_ydata() for line in ax.lines]
    assert len(drawn) >= 2
    assert len(drawn[0]) == 3


@pytest.mark.parametrize(
    ("function", "keywords"), [(pv.fit, FitKeywords), (pv.log_marginal, LogMarginalKeywords)], ids=["fit", "log_marginal"]
)
def test_passed_on_keywords_are_the_functions_own(function: Callable, keywords: type):
    hints = get_type_hints(function)
    own = {p.name: hints[p.name] for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert get_type_hints(keywords) == own


def test_the_options_of_fit_are_its_keywords():
    assert get_type_hints(FitOptions, include_extras=True).items() >= get_type_hints(FitKeywords).items()
    assert list(FitOptions.__dataclass_fields__) == list(inspect.signature(pv.fit).parameters)[3:]


@pytest.mark.slow
def test_a_type_checker_objects_to_a_misspelt_keyword(tmp_path: Path):
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(
        "import pyrovae as pv\nvae = pv.make_vae(4, latent_dim=2)\nvae.fit([[0.0] * 4], epochs=3)\n"
        "vae.fit([[0.0] * 4], epohcs=3)\nvae.fit([[0.0] * 4], epochs='3')\nvae.log_marginal([[0.0] * 4], num_sample=3)\n"
    )
    root = Path(pv.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), "--no-incremental"]
    done = subprocess.run([*command, str(tmp_path / "program.py")], cwd=root, capture_output=True, text=True)
    lines = [line.partition("program.py:")[2] for line in done.stdout.splitlines() if ": error:" in line]
    assert [line[0] for line in lines] == ["4", "5", "6"], done.stdout
    assert '"epohcs"' in lines[0]
    assert '"num_sample"' in lines[2]
