"""Fifty of the damaged files that `python tests/fuzz_data.py` judges by the thousand, and a check that it would see a fault."""

from __future__ import annotations

import fuzz_data
import numpy as np
import pytest


def test_damaged_files_are_read_or_refused_in_one_sentence() -> None:
    # HDF5 files are left to the script, whose reading process may crash without ending the tests.
    seeds = [seed for seed in range(60) if not fuzz_data.FORMATS[seed % len(fuzz_data.FORMATS)].endswith(("h5", "h5ad"))][:50]
    records = [fuzz_data.judge(seed) for seed in seeds]
    assert len(records) == 50
    assert not [record for record in records if "violation" in record]
    assert {record["outcome"] for record in records} == {"read", "refused"}


def test_every_file_is_valid_before_it_is_damaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_data, "damage", lambda content, rng: content)
    for seed, form in enumerate(fuzz_data.FORMATS):
        record = fuzz_data.judge(seed)
        assert "violation" not in record, record
        pickled = "trap" in form or (form == "cifar10" and record["outcome"] == "refused")
        assert record["outcome"] == ("refused" if pickled else "read"), record


@pytest.mark.parametrize("fault", ["numbers that are not finite", "not one sentence", "crash"])
def test_a_fault_would_be_seen(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def faulty(path: object) -> np.ndarray:
        if fault == "not one sentence":
            raise ValueError("bad\nTraceback")
        if fault == "crash":
            raise KeyError("x")
        return np.array([[np.nan]])

    monkeypatch.setattr(fuzz_data, "read", faulty)
    monkeypatch.setattr(fuzz_data, "as_arrays", lambda table, program: (fuzz_data.torch.as_tensor(table),))
    assert "violation" in fuzz_data.judge(0)
