"""The record of a measurement: a file in ``results`` with what was found, the date, the machine and the versions."""

from __future__ import annotations

import json
import platform
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyrovae as pv

RESULTS = Path(__file__).parent / "results"
# Modules whose version belongs in the record where a script has used them, and the packages that hold them.
USED = {"numpy": "numpy", "pyro": "pyro-ppl", "jax": "jax", "numpyro": "numpyro", "pythae": "pythae"}


def write(name: str, result: dict[str, Any]) -> None:
    """Write ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result | about(), indent=1) + "\n")


def about() -> dict[str, Any]:
    """The date, the machine and the versions."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyrovae": pv.__version__}
        | {package: metadata.version(package) for module, package in USED.items() if module in sys.modules},
    }


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
