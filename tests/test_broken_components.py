"""The contract tests see the mistakes that they are there for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
# The test that sees each mistake.
SEEN_BY = {
    "broken_density": "integrates_to_one",
    "broken_sampler": "integrates_to_one",
    "broken_support": "a_vae_with_it_trains",
    "broken_batch": "leading_dimensions",
    "broken_constant": "sums_or_integrates_to_one",
    "broken_event": "particles_stand_on_the_left",
    "broken_zero": "weight_zero",
    "broken_branch": "captured_steps",
    "broken_sign": "an_estimator_trains",
}


@pytest.mark.slow
def test_every_mistake_is_seen() -> None:
    files = [str(TESTS / "test_contracts.py"), str(TESTS / "test_contracts_likelihoods.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "broken_components", "-k", "broken", *files]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "COLUMNS": "200"}
    report = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True).stdout
    failed = re.findall(r"^FAILED (.*)$", report, re.M)
    for name, test in SEEN_BY.items():
        assert any(name in line and test in line for line in failed), f"{test} does not see {name}:\n{report}"
