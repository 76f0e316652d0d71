"""What checkpoints cost: ``python checkpoints.py --root DIR``, where DIR holds MNIST/raw.

Times are process CPU times, of writes and of epochs in the same run. Memory is the process's resident set over 200,000 steps.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import torch

import pyrovae as pv
from pyrovae.training.keeper import Keeper

STEPS, EPOCHS = 200_000, 4


def of_an_epoch(root: str, batch_size: int) -> dict[str, float]:
    """CPU seconds of an epoch of MNIST and of the checkpoint at its end."""
    x = pv.data.load("mnist", root=root).train
    torch.manual_seed(0)
    vae = pv.make_vae(784, latent_dim=50, hidden=[200, 200])
    writes, ends = [], []
    write = Keeper.write

    def timed(self: Keeper, *args: Any) -> None:
        began = time.process_time()
        write(self, *args)
        writes.append(time.process_time() - began)

    Keeper.write = timed  # type: ignore[method-assign]
    vae.fit(
        x.reshape(len(x), -1), epochs=EPOCHS, batch_size=batch_size, transform=pv.data.binarize, compile=True, seed=0,
        progress=False, checkpoint=tempfile.mkdtemp(), every="epoch", validation=0.1,
        on_epoch=lambda _: ends.append(time.process_time()),
    )  # fmt: skip
    Keeper.write = write  # type: ignore[method-assign]
    epochs = [later - earlier for earlier, later in itertools.pairwise(ends)]
    cost, epoch = statistics.median(writes), statistics.median(epochs)
    return {"checkpoint, CPU s": cost, "epoch, CPU s": epoch - cost, "ratio": cost / (epoch - cost)}


def resident() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def of_many_steps() -> dict[str, Any]:
    """Resident memory during many tiny steps with a checkpoint after each 1,000."""
    torch.manual_seed(0)
    vae = pv.make_vae(4, latent_dim=1, hidden=[4])
    x = torch.bernoulli(torch.full((4000, 4), 0.5))
    seen: list[int] = []
    # 400 steps an epoch
    vae.fit(
        x, epochs=STEPS // 400, batch_size=10, compile=True, seed=0, progress=False, checkpoint=tempfile.mkdtemp(), every=1000,
        validation=x[:100], on_epoch=lambda _: seen.append(resident()),
    )  # fmt: skip
    start, end = seen[len(seen) // 10], seen[-1]
    return {"steps": STEPS, "MB after a tenth": start / 1e6, "MB at the end": end / 1e6, "growth": end / start - 1,
            "largest growth": max(seen[len(seen) // 10 :]) / start - 1}  # fmt: skip


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", required=True)
    torch.set_num_threads(1)
    result = {f"batches of {size}": of_an_epoch(parser.parse_args().root, size) for size in (100, 1000)}
    print(result, flush=True)
    result["memory"] = of_many_steps()
    print(result["memory"])
    record.write("checkpoints", result)


if __name__ == "__main__":
    main()
