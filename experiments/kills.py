"""Kill training runs at random moments, resume them, and compare with the run that nobody ended.

``python kills.py [NUMBER [SIGNAL]]`` has so many at once; with a signal, it measures that one anew and keeps the others. Each
run is a process of its own. Some signals come while a checkpoint is being written, since one is written every three steps.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import record

KINDS: dict[str, dict[str, Any]] = {"eager": {"compile": False}, "compiled": {"compile": True}}
SIGNALS = {signal.SIGKILL: 20, signal.SIGTERM: 10, signal.SIGINT: 10}
# Imported once, before the processes are forked.
PRELOADED = [
    "pyrovae.training.loop",
    "pyrovae.models.vae",
    "pyrovae.evidence.importance",
    "arviz",
    "torch._inductor.compile_fx",
]
CONTEXT = multiprocessing.get_context("forkserver")


def train(folder: str | None, kind: str, answer: Any) -> None:
    """Train, score, and send hashes of weights, curve and evidence."""
    import torch

    import pyrovae as pv

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("error")
    torch.manual_seed(0)
    x = torch.rand(260, 6)
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    kept: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": 3, "resume": "auto"}
    history = vae.fit(
        x, epochs=8, batch_size=25, lr=0.01, schedule="cosine", clip_norm=1.0, validation=0.2, patience=12, seed=3,
        estimator={"kind": "elbo", "warm_up": 90, "num_particles": 2}, transform=pv.data.binarize, progress=False,
        **KINDS[kind], **kept,
    )  # fmt: skip
    records = [{name: value for name, value in each.items() if name != "seconds"} for each in history.records]
    evidence = vae.log_marginal((x > 0.5).float()[:20], num_samples=50, seed=1, progress=False)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in vae.parameters())
    parts = (weights, json.dumps(records).encode(), evidence.log_px.tobytes())
    answer.send([hashlib.sha256(part).hexdigest() for part in parts])


def started(folder: Path | None, kind: str) -> tuple[Any, Any]:
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=train, args=(None if folder is None else str(folder), kind, sender))
    process.start()
    sender.close()
    return process, receiver


def finished(folder: Path | None, kind: str) -> list[str]:
    process, receiver = started(folder, kind)
    answer = receiver.recv()
    process.join()
    return answer


def ended(folder: Path, kind: str, number: int, draws: random.Random) -> dict[str, Any]:
    """Send a signal at a random moment between the first checkpoint and what would be the end."""
    process, _ = started(folder, kind)
    while process.is_alive() and not list(folder.glob("step-*")):
        time.sleep(0.001)
    time.sleep(draws.random() * 0.7)
    unfinished = process.is_alive()
    if unfinished:
        os.kill(process.pid, number)
    process.join()
    left = [path.name for path in folder.iterdir() if path.name.startswith((".new", ".old"))]
    steps = sorted(path.name for path in folder.glob("step-*"))
    unfinished = unfinished and process.exitcode != 0
    return {"ended": unfinished, "code": process.exitcode, "in a write": bool(left), "step": int(steps[-1].split("-")[1])}


def attempt(kind: str, number: int, run: int, whole: list[str]) -> dict[str, Any]:
    """One run: ended, resumed, compared."""
    folder = Path(tempfile.mkdtemp()) / "kept"
    how = ended(folder, kind, number, random.Random(run))
    how["same"] = finished(folder, kind) == whole
    shutil.rmtree(folder.parent)
    print(kind, signal.Signals(number).name, run, how, file=sys.stderr, flush=True)
    return how


def main() -> None:
    """Kill, resume, compare, and write the result."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    chosen = {number: runs for number, runs in SIGNALS.items() if number.name in sys.argv[2:] or len(sys.argv) < 3}
    file = Path(__file__).parent / "results" / "kills.json"
    result: dict[str, Any] = json.loads(file.read_text()) if len(chosen) < len(SIGNALS) else {}
    with ThreadPoolExecutor(int(sys.argv[1]) if len(sys.argv) > 1 else 1) as pool:
        for kind in KINDS:
            whole = finished(None, kind)
            for number, runs in chosen.items():
                found = list(pool.map(partial(attempt, kind, number, whole=whole), range(runs)))
                result[f"{kind}, {signal.Signals(number).name}"] = {
                    "runs": runs,
                    "ended before their end": sum(each["ended"] for each in found),
                    "in the middle of a write": sum(each["in a write"] for each in found),
                    "same weights, curve and evidence": sum(each["same"] for each in found),
                    "steps": [each["step"] for each in found],
                }
    print(result)
    record.write("kills", result)


if __name__ == "__main__":
    main()
