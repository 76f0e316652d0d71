"""Sixty of the run files that `python tests/fuzz_config.py` judges by the thousand, and a check that it would see a fault."""

from __future__ import annotations

import sys
from pathlib import Path

import fuzz_config
import pytest


def test_run_files_are_accepted_or_refused_in_one_sentence() -> None:
    records = [fuzz_config.judge(seed) for seed in range(60)]
    assert not [record for record in records if "violation" in record]
    for form in ("mutated", "random"):
        assert {record["outcome"] for record in records if record["form"] == form} == {"accepted", "refused"}


@pytest.mark.parametrize("fault", ["unforeseen", "two lines", "folder", "hang", "code"])
def test_a_fault_would_be_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def faulty(command: list[str]) -> int:
        if fault == "hang":
            fuzz_config._late()
        if fault == "folder":
            Path("runs").mkdir()
        print("pyrovae: a sentence." + ("\npyrovae: another." if fault == "two lines" else ""), file=sys.stderr)
        return {"unforeseen": 1, "code": 0}.get(fault, 2)

    monkeypatch.setattr(fuzz_config, "main", faulty)
    assert "violation" in fuzz_config.judge(0)
