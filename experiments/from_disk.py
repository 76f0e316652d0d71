"""Training from a file four times the memory that it may take, against training on the same data in memory.

The file has images of 28 x 28 bytes as one ``.npy``. Each way trains in a process of its own, compiled, and the CPU time of an
epoch is taken between the ends of epochs, so set-up and compilation are left out. Memory is what the process alone holds
(``RssAnon``), at its largest, beyond what it held before it read the data.

    python experiments/from_disk.py                     # writes results/from_disk.json
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch

import pyrovae as pv

BATCH_SIZE, EPOCHS = 256, 4


def own_memory() -> int:
    """Bytes of this process alone, without files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(path: Path, memory: float | None) -> dict[str, Any]:
    """CPU seconds of each epoch after the first, and the memory that training took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = pv.make_vae((28, 28), latent_dim=8, hidden=[200, 200], likelihood={"kind": "continuous_bernoulli"})
    before = own_memory()
    table = pv.data.read(path, memory=1e12 if memory is None else memory)
    # Grey values in [0, 1] are made of a batch in both ways.
    marks, largest = [], 0

    def mark(_: dict[str, Any]) -> None:
        nonlocal largest
        marks.append(time.process_time())
        largest = max(largest, own_memory())

    history = vae.fit(
        table,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        transform=lambda x: x / 255,
        seed=0,
        compile=True,
        on_epoch=mark,
        progress=False,
    )
    return {
        "cpu_seconds": np.diff(marks).round(3).tolist(),
        "memory": largest - before,
        "bound": history.bound,
        "lazily": not isinstance(table.x, np.ndarray),
    }


def main() -> None:
    """Write the file, measure both ways in turn, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=160_000)
    parser.add_argument("--way", nargs=2)
    options = parser.parse_args()
    if options.way:
        path, memory = options.way
        print(measure(Path(path), None if memory == "none" else float(memory)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        np.save(path, np.random.default_rng(0).integers(0, 256, (options.images, 28, 28), dtype=np.uint8))
        budget = path.stat().st_size / 4
        found: dict[str, list[dict[str, Any]]] = {"memory": [], "disk": []}
        for _ in range(2):  # in turn, as other work on the machine comes and goes
            for way, memory in (("memory", "none"), ("disk", str(budget))):
                command = [sys.executable, __file__, "--way", str(path), memory]
                found[way].append(eval(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
                print(way, found[way][-1], flush=True)
        best = {way: min(min(each["cpu_seconds"]) for each in runs) for way, runs in found.items()}
        result = {
            "images": options.images,
            "file_bytes": path.stat().st_size,
            "budget_bytes": budget,
            "batch_size": BATCH_SIZE,
            "runs": found,
            "cpu_seconds_of_the_fastest_epoch": best,
            "ratio": round(best["disk"] / best["memory"], 3),
        }
    print(f"{result['ratio']:.3f} times the CPU time of an epoch in memory")
    record.write("from_disk", result)


if __name__ == "__main__":
    main()
