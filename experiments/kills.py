"""Kill training runs at random moments, resume them, and compare with the run that nobody ended.

Each process of a run is one of its own. Some signals come while a checkpoint is being written, since one is written every three
steps. If a run has two processes, the first one, the second or both get the signal. ``results/kills.json`` holds the figures of
one process and of two under keys of their own. A call replaces what it measures and keeps the rest.

    python kills.py                    # one process
    python kills.py --processes 2
    python kills.py --at-once 4 --signals SIGINT
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import record

KINDS: dict[str, dict[str, Any]] = {"eager": {"compile": False}, "compiled": {"compile": True}}
SIGNALS = {signal.SIGKILL: 20, signal.SIGTERM: 10, signal.SIGINT: 10}
# Which processes of a run get the signal, in turn.
TARGETS = {1: [[0]], 2: [[0], [1], [0, 1]]}
NAMES = {1: "one process", 2: "two processes"}
# The longest wait for the signal, in seconds: a run of two processes takes longer.
WINDOW = {1: 0.7, 2: 1.5}
# Imported once, before the processes are forked.
PRELOADED = [
    "pyrovae.training.loop",
    "pyrovae.models.vae",
    "pyrovae.evidence.importance",
    "arviz",
    "torch._inductor.compile_fx",
]
CONTEXT = multiprocessing.get_context("forkserver")


def train(folder: str | None, kind: str, rank: int, size: int, store: str, answer: Any) -> None:
    """Train, score, and send hashes of weights, curve and evidence, or what was raised."""
    import torch

    import pyrovae as pv

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets jobs in the background ignore it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("error")
    if size > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
        )
    torch.manual_seed(0)
    x = torch.rand(260, 6)
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    kept: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": 3, "resume": "auto"}
    try:
        history = vae.fit(
            x, epochs=8, batch_size=25, lr=0.01, schedule="cosine", clip_norm=1.0, validation=0.2, patience=12, seed=3,
            estimator={"kind": "elbo", "warm_up": 90, "num_particles": 2}, transform=pv.data.binarize, progress=False,
            **KINDS[kind], **kept,
        )  # fmt: skip
    except ConnectionError as error:
        answer.send(str(error))
        os._exit(1)  # the connections to a lost process may never close
    records = [{name: value for name, value in each.items() if name != "seconds"} for each in history.records]
    evidence = vae.log_marginal((x > 0.5).float()[:20], num_samples=50, seed=1, progress=False)
    weights = b"".join(parameter.detach().numpy().tobytes() for parameter in vae.parameters())
    parts = (weights, json.dumps(records).encode(), evidence.log_px.tobytes())
    answer.send([hashlib.sha256(part).hexdigest() for part in parts])


def started(folder: Path | None, kind: str, size: int, place: Path) -> list[tuple[Any, Any]]:
    """The processes of a run, and where each sends what it found."""
    found = []
    store = str(place / secrets.token_hex(8))
    for rank in range(size):
        receiver, sender = CONTEXT.Pipe(duplex=False)
        given = (None if folder is None else str(folder), kind, rank, size, store, sender)
        process = CONTEXT.Process(target=train, args=given)
        process.start()
        sender.close()
        found.append((process, receiver))
    return found


def finished(folder: Path | None, kind: str, size: int, place: Path) -> list[Any]:
    """What each process of a run found at its end."""
    run = started(folder, kind, size, place)
    answers = [receiver.recv() for _, receiver in run]
    for process, _ in run:
        process.join()
    return answers


def ended(folder: Path, kind: str, number: int, draws: random.Random, targets: list[int], size: int) -> dict[str, Any]:
    """Send a signal at a random moment between the first checkpoint and what would be the end."""
    processes = [process for process, _ in started(folder, kind, size, folder.parent)]
    while all(process.is_alive() for process in processes) and not list(folder.glob("step-*")):
        time.sleep(0.001)
    time.sleep(draws.random() * WINDOW[size])
    unfinished = all(process.is_alive() for process in processes)
    if unfinished:
        for target in targets:
            os.kill(processes[target].pid, number)
    sent = time.monotonic()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    left = [path.name for path in folder.iterdir() if path.name.startswith((".new", ".old"))]
    steps = sorted(path.name for path in folder.glob("step-*"))
    how = {"ended": unfinished and all(codes), "codes": codes, "in a write": bool(left)}
    return how | {"step": int(steps[-1].split("-")[1]), "seconds": time.monotonic() - sent}


def attempt(kind: str, number: int, run: int, whole: list[Any], size: int) -> dict[str, Any]:
    """One run: ended, resumed, compared."""
    folder = Path(tempfile.mkdtemp()) / "kept"
    targets = TARGETS[size][run % len(TARGETS[size])]
    how = ended(folder, kind, number, random.Random(run), targets, size)
    how["same"] = finished(folder, kind, size, folder.parent) == whole
    shutil.rmtree(folder.parent)
    print(kind, signal.Signals(number).name, run, "to", targets, how, file=sys.stderr, flush=True)
    return how


def main() -> None:
    """Kill, resume, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, choices=[*TARGETS], default=1, help="of each run")
    parser.add_argument("--at-once", type=int, default=1, help="runs side by side")
    parser.add_argument("--signals", nargs="+", default=[number.name for number in SIGNALS])
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(PRELOADED)
    file, size = record.RESULTS / "kills.json", options.processes
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    name = NAMES[size]
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as place:
            whole = finished(None, kind, size, Path(place))
        for number in map(signal.Signals.__getitem__, options.signals):
            with ThreadPoolExecutor(options.at_once) as pool:
                one = partial(attempt, kind, number, whole=whole, size=size)
                found = list(pool.map(one, range(SIGNALS[number])))
            figures = {
                "runs": len(found),
                "ended before their end": sum(each["ended"] for each in found),
                "in the middle of a write": sum(each["in a write"] for each in found),
                "same weights, curve and evidence": sum(each["same"] for each in found),
                "most seconds from the signal to the end": round(max(each["seconds"] for each in found), 1),
                "steps": [each["step"] for each in found],
            }
            print(kind, number.name, figures)
            result[name] = result.get(name, {}) | {f"{kind}, {number.name}": figures} | record.about()
            record.write("kills", result)  # at once, since the next ones take minutes


if __name__ == "__main__":
    main()
