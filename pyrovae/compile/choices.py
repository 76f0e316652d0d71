"""Measured choices: times compared once for each machine, and kept on disk.

Which library multiplies faster depends on the processor, and rounding depends on the library: a choice by a stopwatch in each
process would make results differ between processes. Here the first process measures, and all later ones read its answer, until
the processor, torch, our C++ or its flags change. ``pyrovae doctor`` lists the answers; delete the folder to measure again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from .. import files
from .kernels import FLAGS, processor, source
from .notes import note
from .settings import cache_folder, cxx_flags

__all__ = ["answers", "choices_folder", "measured_once"]

_answers: dict[tuple[Path, str], dict[str, float]] = {}


def choices_folder() -> Path:
    """The folder of this machine's choices: its name depends on the processor, torch, our C++ and the flags of its compiler."""
    return cache_folder() / "choices" / _machine(cxx_flags())


@cache
def _machine(flags: tuple[str, ...]) -> str:
    parts = (processor(), torch.__version__, source(), *FLAGS, *flags)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def measured_once(question: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The answer to a question of speed: from this process, from disk, or else measured now and kept.

    Args:
        question: names what is compared, with shapes and number of threads.
        measure: returns ratios of times by name.

    Returns:
        What ``measure`` returned when this machine first asked.
    """
    folder = choices_folder()
    key = (folder, question)
    if key not in _answers:
        path = folder / (re.sub(r"[^A-Za-z0-9]+", "-", question) + ".json")
        answer = _read(path)
        if answer is None:
            answer = measure()
            kept = _read(path)  # another process may have answered meanwhile: the first answer counts
            answer = kept if kept is not None else _write(path, question, answer)
        _answers[key] = answer
    return _answers[key]


def answers() -> dict[str, dict[str, float]]:
    """All answers of this machine, on disk and in this process, by question."""
    folder = choices_folder()
    found = {question: answer for (place, question), answer in _answers.items() if place == folder}
    for path in sorted(folder.glob("*.json")):
        answer = _read(path)
        if answer is not None:
            found.setdefault(files.read_json(path)["question"], answer)
    return found


def _read(path: Path) -> dict[str, float] | None:
    """The answer in a file; ``None`` without one, or if the file is damaged, which is then measured and written again."""
    try:
        return {name: float(ratio) for name, ratio in files.read_json(path)["ratios"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, question: str, answer: dict[str, float]) -> dict[str, float]:
    content = {"question": question, "ratios": answer, "torch": torch.__version__, "measured": datetime.now(UTC).isoformat()}
    try:
        files.write_text(path, json.dumps(content) + "\n")
    except OSError as error:
        reason = f"{path.parent} cannot be written ({error}): set PYROVAE_CACHE to a folder that can be"
        note("choices", f"Each process measures again which library multiplies faster, since {reason}.")
    return answer
