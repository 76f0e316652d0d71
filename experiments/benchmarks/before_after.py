"""What a change of the code did to its speed: training steps and scoring of two checkouts, interleaved.

Each checkout runs in a process of its own, with its own package and ``step.py``. In every round both take the same work, in an
order drawn afresh, and the ratio within a round counts, since the machine is noisy. Each cell has several pairs of
processes, since the same step may take 1.4 times as long in one process as in the next.

    git worktree add /tmp/before REVISION
    python experiments/benchmarks/before_after.py /tmp/before      # 18 minutes; writes ../results/before_after.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

HERE = Path(__file__).resolve().parents[2]
CELLS = ("tanh-20", "tanh-100", "tanh-256", "tanh-20-k5", "tanh-100-k5", "tanh-20-k50", "gated-100", "conv-100", "vamp-100")
SCORED = {"score-600": (600, 5_000), "score-3000": (3_000, 5_000), "score-10000": (10_000, 5_000)}  # images and samples
MOST = 1.03
# What one process runs: it prints a line when it is ready, and a line after each task it is told to take.
SERVE = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/experiments/benchmarks"]
import copy, torch, common, step, pyrovae as pv
name, images, samples = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
assert pv.__file__.startswith(sys.argv[1]), pv.__file__
if images:
    torch.manual_seed(0)
    net, data = common.Network("tanh", spread=0.1), common.binary_images(images, 0)
    net.decoder[0].weight.data *= 0.3
    vae = common.as_vae(net)
    data = data.reshape(-1, *vae.data_shape)
    block = lambda: vae.log_marginal(data, num_samples=samples, seed=0, compile=True, progress=False)
else:
    cell = step.CELLS[name]
    block = step.ours(cell, *step.start(cell, ""), backend="inductor")
block()
print("ready", flush=True)
for _ in sys.stdin:
    block()
    print("done", flush=True)
"""


def main() -> None:
    """Time all cells and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="a checkout of the code as it was")
    parser.add_argument("--processes", type=int, default=5, help="pairs of processes for each cell")
    parser.add_argument("--rounds", type=int, default=8, help="of each pair of processes")
    parser.add_argument("--cells", nargs="+", choices=(*CELLS, *SCORED), default=(*CELLS, *SCORED), metavar="CELL")
    options = parser.parse_args()
    checkouts = {"before": options.before.resolve(), "after": HERE}
    kept = common.RESULTS / "before_after.json"
    cells = json.loads(kept.read_text())["cells"] if kept.exists() else {}
    for name in options.cells:
        cells[name] = timed(name, checkouts, *((options.processes, options.rounds) if name in CELLS else (1, 3)))
        print(f"{name:14} {cells[name]['ratio']:.3f} {cells[name]['of each pair of processes']}", flush=True)
    revisions = {which: revision(path) for which, path in checkouts.items()}
    ratios = [cell["ratio"] for cell in cells.values()]
    found = {"median": round(float(np.median(ratios)), 3), "largest": max(ratios), "most_allowed": MOST}
    common.write("before_after", {"revisions": revisions, **found, "cells": cells})


def timed(name: str, checkouts: dict[str, Path], processes: int, rounds: int) -> dict[str, Any]:
    """The ratio of the seconds after to those before: the median of each pair of processes, and the median of these."""
    times: dict[str, list[list[float]]] = {which: [] for which in checkouts}
    order = np.random.default_rng(0)
    for _ in range(processes):
        with contextlib.ExitStack() as stack:
            run = {which: stack.enter_context(Served(path, name)) for which, path in checkouts.items()}
            for values in times.values():
                values.append([])
            for _ in range(rounds):
                for which, (seconds, _) in common.lap(run, order).items():
                    times[which][-1].append(seconds)
    ratios = np.median(np.array(times["after"]) / np.array(times["before"]), 1)
    return {
        "ratio": round(float(np.median(ratios)), 3),
        "of each pair of processes": [round(float(each), 3) for each in ratios],
        "seconds": {which: round(float(np.median(values)), 4) for which, values in times.items()},
        "rounds": rounds,
    }


class Served(contextlib.AbstractContextManager["Served"]):
    """A process that holds one task of one checkout, and takes it when called."""

    def __init__(self, checkout: Path, name: str):
        images, samples = SCORED.get(name, (0, 0))
        command = [sys.executable, "-c", SERVE, str(checkout), name, str(images), str(samples)]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
        )
        self._wait("ready")

    def __call__(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._wait("done")

    def _wait(self, word: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == word:
                return
        raise SystemExit(f"The process stopped with {self.process.wait()}.")

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()


def revision(checkout: Path) -> str:
    """The commit of a checkout."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
