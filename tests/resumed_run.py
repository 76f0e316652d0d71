"""A training run in a process of its own, for the tests that kill it: ``python resumed_run.py FOLDER KIND [EVERY]``.

It goes on from the checkpoint in the folder, and prints one line of hashes of all that must be the same to the bit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import pyrovae as pv

KINDS: dict[str, dict[str, Any]] = {
    "eager": {"compile": False, "epochs": 8},
    "compiled": {"compile": True, "epochs": 8},
}
# A warm-up of the KL, a schedule, clipping, early stopping and a last, smaller batch: each has a state of its own.
OPTIONS: dict[str, Any] = {
    "batch_size": 25,
    "lr": 0.01,
    "schedule": "cosine",
    "clip_norm": 1.0,
    "estimator": {"kind": "elbo", "warm_up": 90, "num_particles": 2},
    "validation": 0.2,
    "patience": 8,
    "seed": 3,
    "progress": False,
}


def run(folder: str | None, kind: str, every: int, **options: Any) -> dict[str, Any]:
    """Train, score, and return hashes."""
    torch.manual_seed(0)
    x = torch.rand(260, 6)
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    kept: dict[str, Any] = {} if folder is None else {"checkpoint": folder, "every": every, "resume": "auto"}
    history = vae.fit(x, transform=pv.data.binarize, **OPTIONS | KINDS[kind] | kept | options)
    records = [{name: value for name, value in record.items() if name != "seconds"} for record in history.records]
    evidence = vae.log_marginal((x > 0.5).float()[:20], num_samples=50, seed=1, progress=False)
    weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in vae.parameters())).hexdigest()
    return {
        "weights": weights,
        "records": hashlib.sha256(json.dumps(records).encode()).hexdigest(),
        "evidence": hashlib.sha256(evidence.log_px.tobytes()).hexdigest(),
        "epochs": len(records),
        "stopped": history.stopped,
    }


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    folder, kind, *every = sys.argv[1:]
    print(json.dumps(run(None if folder == "-" else str(Path(folder)), kind, int(every[0]) if every else 1)))
