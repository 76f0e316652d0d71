"""Pairs of any kind, saved by name and loaded into the same pair built anew."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import constraints

import pyrovae as pv
from pyrovae import files

X = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
Pair = tuple[Callable[..., Any], Callable[..., Any]]


def closures() -> Pair:
    """Two functions whose networks are variables of the same name, with a buffer, and a bare parameter each."""

    def make_model() -> Callable[..., Any]:
        net = nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5, momentum=0.5), nn.Linear(5, 3)).eval()

        def model(x: torch.Tensor) -> None:
            pyro.module("decoder", net)
            scale = pyro.param("scale", lambda: torch.ones(3), constraint=constraints.positive)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                loc = net(z.reshape(-1, 2)).reshape(*z.shape[:-1], 3)
                pyro.sample("x", dist.Normal(loc, scale).to_event(1), obs=x)

        return model

    def make_guide() -> Callable[..., Any]:
        net, width = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))

        def guide(x: torch.Tensor) -> None:
            pyro.module("encoder", net)
            pyro.param("width", width)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(net(x), width.exp()).to_event(1))

        return guide

    return make_model(), make_guide()


def autoguide() -> Pair:
    """A guide whose parameters are made on the first run."""

    def model(x: torch.Tensor) -> None:
        slope = pyro.param("slope", lambda: torch.ones(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * slope, 0.5).to_event(1), obs=x)

    return model, AutoNormal(model)


def ours() -> Pair:
    vae = pv.make_vae(3, latent_dim=2, hidden=[5], likelihood="normal", prior={"kind": "mixture", "components": 3})
    return vae.model, vae.guide


PAIRS = {"closures": closures, "autoguide": autoguide, "ours": ours}


def trained(pair: Pair) -> None:
    pv.fit(*pair, X, epochs=3, batch_size=40, lr=0.05, shuffle=False, seed=0, progress=False, compile=False)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_built_anew_scores_as_the_saved_one(name: str, tmp_path: Path):
    path = tmp_path / "pair.safetensors"
    pair = PAIRS[name]()
    trained(pair)
    pv.save(path, *pair, X)
    expected = pv.log_marginal(*pair, X, num_samples=50, seed=0, proposal="guide").log_px
    pyro.clear_param_store()
    other = PAIRS[name]()
    before = pv.log_marginal(*other, X, num_samples=50, seed=0, proposal="guide").log_px
    assert abs(before - expected).max() > 0.01
    pv.load(path, *other, X)
    after = pv.log_marginal(*other, X, num_samples=50, seed=0, proposal="guide").log_px
    assert (after == expected).all()


def test_names_tell_networks_of_the_same_variable_apart(tmp_path: Path):
    pair = closures()
    pv.save(tmp_path / "pair.safetensors", *pair, X)
    arrays, _ = files.read_arrays(tmp_path / "pair.safetensors")
    expected = {"model.net.0.weight", "model.net.1.running_mean", "guide.net.weight", "guide.width", "pyro.param.scale"}
    assert expected <= arrays.keys()
    assert len(arrays) == 4 + 5 + 2 + 1 + 1


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path: Path):
    path, pair = tmp_path / "pair.safetensors", ours()
    pv.save(path, *pair, X)
    wide = pv.make_vae(3, latent_dim=2, hidden=[6], likelihood="normal", prior={"kind": "mixture", "components": 3})
    before = {name: value.clone() for name, value in wide.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the pair: 'model\..*' must be float32 of shape"):
        pv.load(path, wide.model, wide.guide, X)
    assert all(torch.equal(before[name], value) for name, value in wide.state_dict().items())
    double = pv.make_vae(3, latent_dim=2, hidden=[5], likelihood="normal", prior={"kind": "mixture", "components": 3}).double()
    with pytest.raises(ValueError, match=r"must be float64 of shape .*, got float32"):
        pv.load(path, double.model, double.guide, X.double())
    with pytest.raises(ValueError, match=r"the pair, but not the file, has|the file, but not the pair, has"):
        pv.load(path, *closures(), X)
    with pytest.raises(ValueError, match="parameters to be saved, got none"):
        pv.save(tmp_path / "none", lambda x: _fixed(x, x), lambda x: _fixed(x, None), X)
    assert not (tmp_path / "none").exists()


def _fixed(x: torch.Tensor, observed: torch.Tensor | None) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if observed is not None:
            pyro.sample("x", dist.Normal(z[..., None] * torch.ones(3), 1.0).to_event(1), obs=observed)


class Launch:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("launched"),))


def test_files_of_another_kind_are_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pair = ours()
    Path("pickled").write_bytes(pickle.dumps(Launch()))
    torch.save({"weight": torch.ones(2)}, "torch.pt")
    files.write_arrays("evidence", {"log_px": torch.ones(2)})
    pv.save("good", *pair, X)
    Path("cut").write_bytes(Path("good").read_bytes()[:-7])
    for name, words in (
        ("pickled", "truncated or not a safetensors file"),
        ("torch.pt", "truncated or not a safetensors file"),
        ("cut", "truncated or not a safetensors file"),
        ("evidence", "must be a file that pyrovae.save wrote"),
    ):
        with pytest.raises(ValueError, match=words):
            pv.load(name, *pair, X)
    with pytest.raises(FileNotFoundError, match="no file none"):
        pv.load("none", *pair, X)
    assert not Path("launched").exists()
