"""Which likelihood the digits get: held-out log p(x) on a fifth of the TRAINING images, which the test images do not enter.

Four likelihoods of the values 0..16 under the network and the schedule of ``pyrovae train``, beside a histogram of each pixel.

    python experiments/digits_likelihood.py     # two minutes of processor time; writes results/digits_likelihood.json
"""

from __future__ import annotations

import time
from typing import Any

import record
import torch
from torch import Tensor

import pyrovae as pv

LEVELS, EPOCHS, SAMPLES, SEED = 17, 60, 1_000, 0
LIKELIHOODS: list[dict[str, Any]] = [
    {"kind": "binomial", "total_count": LEVELS - 1},
    {"kind": "beta_binomial", "total_count": LEVELS - 1},
    {"kind": "discretized_logistic", "num_levels": LEVELS},
    {"kind": "categorical", "num_levels": LEVELS},
]


def main() -> None:
    x = pv.data.load("digits").train
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    train, held_out = x[order[: len(x) * 4 // 5]], x[order[len(x) * 4 // 5 :]]
    rows = [{"likelihood": "histogram of each pixel", "log p(x)": histogram(train, held_out)}]
    for likelihood in LIKELIHOODS:
        start = time.process_time()
        torch.manual_seed(SEED)
        vae = pv.make_vae(x.shape[1:], latent_dim=4, hidden=[200, 200], encoder="full_covariance_normal", likelihood=likelihood)
        options = {"epochs": EPOCHS, "batch_size": 64, "lr": 2e-3, "schedule": "cosine", "progress": False}
        vae.fit(train, estimator={"kind": "dreg", "num_particles": 10}, seed=SEED, **options)
        evidence = vae.log_marginal(held_out, num_samples=SAMPLES, seed=SEED)
        rows.append(
            {
                "likelihood": likelihood["kind"],
                "log p(x)": evidence.mean,
                "se": evidence.data_se,
                "reliable": float(evidence.reliable.mean()),
                "processor_seconds": time.process_time() - start,
            }
        )
    for row in rows:
        print(row)
    record.write("digits_likelihood", {"num_held_out": len(held_out), "epochs": EPOCHS, "seed": SEED, "rows": rows})


def histogram(train: Tensor, held_out: Tensor) -> float:
    """Mean log-probability under the counts of each pixel's levels, one tenth added to each."""
    levels, found = train.flatten(1).long(), held_out.flatten(1).long()
    counts = torch.stack([(levels == level).sum(0) for level in range(LEVELS)]) + 0.1
    return float((counts / counts.sum(0)).log().gather(0, found).sum(1).mean())


if __name__ == "__main__":
    main()
