"""Programs in plain Pyro that know nothing of the package train and are scored, and mean what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyro
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

import pyrovae as pv

FOLDER = Path(__file__).parent.parent / "experiments" / "foreign"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("conditional_vae", "--epochs 3 --num-data 300 --num-samples 20"),
        ("semi_supervised_vae", "--epochs 3 --num-data 300 --num-samples 20"),
        ("semi_supervised_vae", "--epochs 3 --num-data 300 --num-samples 20 --estimator rws"),
        ("semi_supervised_vae", "--epochs 3 --num-data 300 --num-samples 20 --estimator vimco"),
        ("deep_markov", "--epochs 3 --num-data 100 --steps 5 --num-samples 20"),
        ("deep_markov", "--epochs 3 --num-data 100 --steps 5 --num-samples 20 --estimator stl"),
    ],
)
def test_a_foreign_program_trains_and_is_scored(name: str, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = _load(name).main(options.split())
    first, last, score, baseline, *_ = found.values()
    assert last > first
    assert np.isfinite([score, baseline]).all()
    printed = capsys.readouterr().out
    assert all(f"{value:8.3f}" in printed for value in found.values())


def test_padding_means_nothing() -> None:
    foreign = _load("deep_markov")
    pair = foreign.DeepMarkov()
    x, length = foreign.turning_points(6, 5, seed=3)
    assert length.min() < 5
    log_w = []
    for padding in (0.0, 7.0):
        pyro.set_rng_seed(0)
        padded = torch.where(torch.arange(5)[:, None] < length[:, None, None], x, padding)
        log_w.append(pv.log_weights(pair.model, pair.guide, padded, length, num_particles=4).log_weights.detach())
    assert_allclose(log_w[0], log_w[1], rtol=1e-6)


@pytest.mark.usefixtures("float64")
def test_the_sum_over_labels_is_m2s() -> None:
    """With a decoder that does not see z, and the prior as q(z), the bound is a sum over labels without any noise."""
    pair = _load("semi_supervised_vae").Digits()
    for layer in (pair.loc, pair.log_scale):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        pair.decoder[0].weight[:, : pair.latent_dim] = 0
    x, label = torch.randint(0, 2, (4, 64)).double(), torch.tensor([3, -1, 0, -1])
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(pair.trained_model, pair.guide, x, label)
    with torch.no_grad():
        logits = pair.decoder(torch.cat([torch.zeros(10, pair.latent_dim), torch.eye(10)], -1))
        log_px = torch.distributions.Bernoulli(logits=logits).log_prob(x[:, None]).sum(-1) - np.log(10)  # log p(x, y)
        log_q = torch.log_softmax(pair.classifier(x), -1)
    known = [log_px[i, label[i]] + log_q[i, label[i]] for i in (0, 2)]
    unknown = [(log_q[i].exp() * (log_px[i] - log_q[i])).sum() for i in (1, 3)]
    assert_allclose(loss, -sum(known + unknown).item(), rtol=1e-9)
