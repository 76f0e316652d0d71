"""What every test starts from: one thread, an empty parameter store, a seed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyro
import pytest
import torch
from trained_runs import TrainedRun, trained

torch.set_num_threads(1)
# Components with mistakes on purpose, which only test_broken_components.py registers, in a process of its own.
collect_ignore = ["broken_components.py"]


@pytest.fixture(autouse=True)
def _fresh_state() -> Iterator[None]:
    # Pyro's store and the default dtype belong to the process: what one test leaves there another would find.
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)  # importing zuko turns torch's off
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float32)
    assert torch.distributions.Distribution._validate_args, "the test, or what it calls, leaves validation off"


@pytest.fixture
def float64() -> None:
    """Float64 by default, for comparisons with exact values."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many of torch's threads, by indirect parameters."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A run that is trained once in each process, for tests that read it."""
    return trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture
def copied_run(trained_run: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Copies that run to ``runs/NAME`` of the test's folder, which becomes the current one, for tests that change it."""
    monkeypatch.chdir(tmp_path)
    return lambda name: Path(shutil.copytree(trained_run.folder, tmp_path / "runs" / name))
