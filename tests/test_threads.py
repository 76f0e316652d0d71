"""What belongs to a process, under many threads and in a notebook: Pyro's state, registered names and compiled operations."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyrovae as pv

X = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """A pair of a user's own, whose names are those of every other one."""

    def __init__(self, level: float):
        super().__init__()
        self.decode, self.encode = nn.Linear(2, 4), nn.Linear(4, 4)
        nn.init.constant_(self.decode.bias, level)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("decoder", self.decode)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        pyro.module("encoder", self.encode)
        with pyro.plate("data", len(x), dim=-1):
            loc, log_scale = self.encode(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def a_pair(seed: int) -> Pair:
    pair = Pair(float(seed))
    with torch.no_grad():
        for parameter in pair.parameters():
            parameter.fill_(0.1)
    return pair


def trained(seed: int, pair: Pair) -> np.ndarray:
    """Bounds and evidence of a pair that is trained and scored."""
    history = pv.fit(pair.model, pair.guide, X, epochs=3, batch_size=20, seed=seed, progress=False)
    evidence = pv.log_marginal(pair.model, pair.guide, X, num_samples=40, seed=seed)
    return np.concatenate([history.bound, evidence.log_px])


def test_threads_of_one_process_get_the_numbers_that_each_would_alone() -> None:
    # Networks draw from torch's stream when they are made, which no lock of ours could hold: they are made beforehand.
    pairs = [(seed, a_pair(seed)) for seed in (*range(4), *range(4))]
    alone = [trained(*each) for each in pairs[:4]]
    before = list(pyro.get_param_store().keys())
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda each: trained(*each), pairs[4:]))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    assert list(pyro.get_param_store().keys()) == before


def test_a_call_within_a_call_does_not_wait_for_itself() -> None:
    pair, found = Pair(0.0), []

    def score(record: dict) -> None:
        found.append(pv.log_marginal(pair.model, pair.guide, X[:5], num_samples=20, seed=0).mean)

    pv.fit(pair.model, pair.guide, X, epochs=2, progress=False, on_epoch=score)
    assert len(found) == 2


def test_a_model_that_is_gone_leaves_nothing_behind() -> None:
    gc.collect()
    before = set(pyro.get_param_store().keys())
    references = []
    for pair in (Pair(0.0), pv.make_vae(4, latent_dim=2, hidden=[5], likelihood="normal")):
        pv.fit(pair.model, pair.guide, X, epochs=1, progress=False)
        evidence = pv.log_marginal(pair.model, pair.guide, X[:5], num_samples=20)
        assert set(pyro.get_param_store().keys()) == before, "parameters of modules live in the modules"
        references += [weakref.ref(pair), *(weakref.ref(each) for each in pair.parameters())]
    del pair
    gc.collect()
    assert not [each for each in references if each() is not None]
    assert len(evidence) == 5


NOTEBOOK = """
import importlib, sys, warnings
warnings.simplefilter("error")
import torch
import pyrovae as pv

def cell():
    import pyrovae as pv
    torch.manual_seed(0)
    vae = pv.make_vae(4, latent_dim=2, hidden=[5], likelihood="normal")
    history = vae.fit(torch.ones(60, 4), epochs=3, lr=0.05, progress=False, seed=0)
    return history.bound + vae.log_marginal(torch.ones(3, 4), num_samples=50, seed=0).log_px.tolist()

first = cell()
for name in ("pyrovae", "pyrovae.registry", "pyrovae.compile.kernels"):
    importlib.reload(sys.modules[name])
assert cell() == first, "a cell that is run again, after modules with state were loaded again"
for name in [name for name in sys.modules if name.partition(".")[0] == "pyrovae"]:
    del sys.modules[name]
del pv
assert cell() == first, "the package imported anew"
assert torch.equal(torch.ops.pyrovae.once(torch.ones(2)), torch.ones(2))
"""


def test_a_cell_is_run_again_after_reloading_and_importing_anew() -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(pv.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
