"""``proposal="auto"`` against the truth, on handwritten digits with 17 levels of grey.

The models are those of evidence_truth.py. Two latents: quadrature gives log p(x) of every image, and posteriors often have
several modes. Ten latents: long annealing from the prior, which shares nothing with the guide or with the fitted proposals.

    python experiments/repaired_truth.py      # some minutes; writes results/repaired_truth.json
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import evidence_truth
import numpy as np
import record
import torch

import pyrovae as pv

# Draws enough for four standard errors within 0.01 nats.
EXACT: dict[str, Any] = {"num_samples": 400_000, "target_se": 0.002}
USUAL: dict[str, Any] = {"num_samples": 5_000}
CHAINS, TEMPERATURES, LEAPFROG = 16, 3_000, 5


def against(truth: pv.Evidence, vae: pv.VAE, x: torch.Tensor, proposal: str, **options: Any) -> dict[str, Any]:
    """How far the estimates by a proposal are from the truth."""
    began = time.process_time()
    evidence = vae.log_marginal(x, proposal=proposal, seed=1, **options)
    away = evidence.log_px - truth.log_px
    errors = np.abs(away) / np.hypot(evidence.se, truth.se)
    good = evidence.reliable
    return {
        "mean": evidence.mean,
        "reliable": f"{int(good.sum())} of {len(evidence)}",
        "rungs": evidence.rungs,
        "mean_difference": float(away.mean()),
        "largest_difference": float(np.abs(away).max()),
        "within_0.01_nats": int((np.abs(away) <= 0.01).sum()),
        "most_combined_errors": float(errors.max()),
        "beyond_four_errors": int((errors > 4).sum()),
        "reliable_and_beyond_four_errors": int((good & (errors > 4)).sum()),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two", type=int, default=100, help="images that are compared with quadrature")
    parser.add_argument("--ten", type=int, default=24, help="images that are annealed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evidence_truth.RUNS.mkdir(parents=True, exist_ok=True)
    images = evidence_truth.data("levels")[1]
    result: dict[str, Any] = {"network": "that of evidence_truth.py, 17 levels of grey"}
    vae, x = evidence_truth.trained("levels", 2), images[: options.two]
    truth = pv.exact(vae.model, vae.guide, x)
    print(truth.summary(), flush=True)
    result["two_latents"] = {
        "truth": truth.method,
        "mean": truth.mean,
        "in_doubt_at_most": float(truth.se.max()),
        "auto": {"options": EXACT} | against(truth, vae, x, "auto", **EXACT),
        "auto_5000": against(truth, vae, x, "auto", **USUAL),
        "guide_5000": against(truth, vae, x, "guide", **USUAL),
    }
    print(result["two_latents"], flush=True)
    vae, x = evidence_truth.trained("levels", 10), images[: options.ten]
    settings: Any = {"num_chains": CHAINS, "num_temperatures": TEMPERATURES, "leapfrog_steps": LEAPFROG}
    truth = pv.ais(vae.model, vae.guide, x, seed=2, **settings)
    print(truth.summary(), flush=True)
    result["ten_latents"] = {
        "truth": truth.method,
        "settings": settings,
        "mean": truth.mean,
        "mean_se": truth.mean_se,
        "annealing_reliable": int(truth.reliable.sum()),
        "auto_5000": against(truth, vae, x, "auto", **USUAL),
        "guide_5000": against(truth, vae, x, "guide", **USUAL),
    }
    print(result["ten_latents"], flush=True)
    record.write("repaired_truth", result)


if __name__ == "__main__":
    main()
