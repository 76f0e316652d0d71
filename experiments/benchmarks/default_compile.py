"""What ``compile="auto"`` costs against the better of ``compile=True`` and ``compile=False``, compile time included.

Each run is a process of its own with an empty compiler cache, or with one that an earlier process filled. Only the call of
``fit`` or ``log_marginal`` is timed, after the imports. The network is the 784-200-200-50 with tanh, the images are random and
binary: no time depends on them.

    python experiments/benchmarks/default_compile.py            # 15 minutes; writes ../results/default_compile.json
    python experiments/benchmarks/default_compile.py --sizes score-100 fit-300
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import write

# Images that are scored with 5,000 samples, and steps of a fit at batch size 100.
SCORED, FITTED = (100, 200, 300, 450, 700, 1500), (200, 600, 2000, 6000)
SIZES = {f"score-{number}": ("score", number) for number in SCORED} | {f"fit-{number}": ("fit", number) for number in FITTED}
MOST = 1.15
RUN = """
import sys, time, torch, common, pyrovae as pv
what, number, compile = sys.argv[1], int(sys.argv[2]), {"auto": "auto", "True": True, "False": False}[sys.argv[3]]
torch.manual_seed(0)
vae = common.as_vae(common.Network("tanh", spread=0.1))
if what == "score":
    data = common.binary_images(number, 0).reshape(-1, *vae.data_shape)
    run = lambda: vae.log_marginal(data, num_samples=5000, seed=0, compile=compile, progress=False)
else:
    data = common.binary_images(2000, 0).reshape(-1, *vae.data_shape)
    run = lambda: vae.fit(data, epochs=max(1, number // 20), batch_size=100, seed=0, compile=compile, progress=False)
began = time.perf_counter()
run()
print("seconds", time.perf_counter() - began)
"""


def main() -> None:
    """Time all sizes and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=tuple(SIZES), metavar="SIZE")
    cells: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as kept:
        for name in parser.parse_args().sizes:
            what, number = SIZES[name]
            cells[name] = {}
            timed(what, number, "True", kept)  # fills the cache that is kept
            for cache in ("empty", "filled"):
                seconds = {}
                for compile in ("False", "True", "auto"):
                    with tempfile.TemporaryDirectory() as fresh:
                        seconds[compile] = timed(what, number, compile, fresh if cache == "empty" else kept)
                best = min(seconds["True"], seconds["False"])
                cells[name][cache] = {"seconds": seconds, "ratio": round(seconds["auto"] / best, 3)}
            print(f"{name:12} {cells[name]}", flush=True)
    largest = {cache: max(cell[cache]["ratio"] for cell in cells.values()) for cache in ("empty", "filled")}
    write("default_compile", {"most_allowed": MOST, "largest": largest, "cells": cells})


def timed(what: str, number: int, compile: str, cache: str) -> float:
    """Seconds of one run in a process with this compiler cache."""
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": cache,
        "PYTHONPATH": os.pathsep.join([str(here.parents[1]), str(here), str(here.parent)]),
    }
    command = [sys.executable, "-W", "ignore", "-c", RUN, what, str(number), compile]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return round(float(done.stdout.split("seconds")[-1]), 2)


if __name__ == "__main__":
    main()
