"""``proposal="auto"`` against the truth, on handwritten digits.

The first two models are those of evidence_truth.py, with 17 levels of grey. Two latents: quadrature gives log p(x) of every
image, and posteriors often have several modes. Ten latents: long annealing from the prior, which shares nothing with the guide
or with the fitted proposals. The third is that of ``pyrovae train`` without arguments, whose own evidence of the first test
images is compared with longer annealing.

    python experiments/repaired_truth.py                # half an hour; writes results/repaired_truth.json
    python experiments/repaired_truth.py --only default # one part; the file keeps the others

The default run and its chains stay in runs/repaired_truth, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import evidence_truth
import numpy as np
import record
import torch

import pyrovae as pv

# Draws enough for four standard errors within 0.01 nats.
EXACT: dict[str, Any] = {"num_samples": 400_000, "target_se": 0.002}
USUAL: dict[str, Any] = {"num_samples": 5_000}
CHAINS: dict[str, Any] = {"num_chains": 16, "num_temperatures": 3_000, "leapfrog_steps": 5}
# Of the default run; so many of its images are annealed together.
LONG_CHAINS: dict[str, Any] = {"num_chains": 16, "num_temperatures": 1_000, "leapfrog_steps": 5}
TOGETHER = 10
RUNS = Path("runs") / "repaired_truth"


def differences(evidence: pv.Evidence, truth: pv.Evidence) -> dict[str, Any]:
    """How far estimates are from the truth."""
    away = evidence.log_px - truth.log_px
    errors = np.abs(away) / np.hypot(evidence.se, truth.se)
    good = evidence.reliable
    return {
        "mean": evidence.mean,
        "reliable": f"{int(good.sum())} of {len(evidence)}",
        "rungs": evidence.rungs,
        "mean_difference": float(away.mean()),
        "mean_difference_se": float(np.hypot(evidence.mean_se, truth.mean_se)),
        "largest_difference": float(np.abs(away).max()),
        "within_0.01_nats": int((np.abs(away) <= 0.01).sum()),
        "most_combined_errors": float(errors.max()),
        "beyond_four_errors": int((errors > 4).sum()),
        "reliable_and_beyond_four_errors": int((good & (errors > 4)).sum()),
    }


def against(truth: pv.Evidence, vae: pv.VAE, x: torch.Tensor, proposal: str, **options: Any) -> dict[str, Any]:
    """How far the estimates by a proposal are from the truth, and what they cost."""
    began = time.process_time()
    evidence = vae.log_marginal(x, proposal=proposal, seed=1, **options)
    return differences(evidence, truth) | {"cpu_seconds": round(time.process_time() - began, 1)}


def two_latents(number: int) -> dict[str, Any]:
    """Quadrature's answers beside estimates."""
    vae, x = evidence_truth.trained("levels", 2), evidence_truth.data("levels")[1][:number]
    truth = pv.exact(vae.model, vae.guide, x)
    print(truth.summary(), flush=True)
    return {
        "truth": truth.method,
        "mean": truth.mean,
        "in_doubt_at_most": float(truth.se.max()),
        "auto": {"options": EXACT} | against(truth, vae, x, "auto", **EXACT),
        "auto_5000": against(truth, vae, x, "auto", **USUAL),
        "guide_5000": against(truth, vae, x, "guide", **USUAL),
    }


def annealed(truth: pv.Evidence, settings: dict[str, Any]) -> dict[str, Any]:
    """What the file says of chains."""
    print(truth.summary(), flush=True)
    return {
        "truth": truth.method,
        "settings": settings,
        "mean": truth.mean,
        "mean_se": truth.mean_se,
        "annealing_reliable": int(truth.reliable.sum()),
    }


def ten_latents(number: int) -> dict[str, Any]:
    """Annealing beside estimates."""
    vae, x = evidence_truth.trained("levels", 10), evidence_truth.data("levels")[1][:number]
    truth = pv.ais(vae.model, vae.guide, x, seed=2, **CHAINS)
    return annealed(truth, CHAINS) | {
        "auto_5000": against(truth, vae, x, "auto", **USUAL),
        "guide_5000": against(truth, vae, x, "guide", **USUAL),
    }


def default_run(number: int) -> dict[str, Any]:
    """The evidence that ``pyrovae train`` reports of its first test images, beside annealing."""
    run = RUNS / "runs" / "digits-dreg-4"
    if not (run / "evidence.safetensors").exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pyrovae", "train"], cwd=RUNS, check=True)
    vae, x = pv.VAE.from_pretrained(run), pv.data.load("digits").test
    parts = []
    for start in range(0, number, TOGETHER):
        path = RUNS / f"annealed-{start}.safetensors"
        if not path.exists():
            images = x[start : start + TOGETHER]
            pv.ais(vae.model, vae.guide, images, seed=2, compile=True, **LONG_CHAINS).save(path)
            print(f"{start + len(images)} images annealed, {time.process_time():.0f} s of CPU time in all", flush=True)
        parts.append(pv.Evidence.load(path))
    fields = ("log_px", "se", "ess", "khat", "elbo")
    joined: Any = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    truth = pv.Evidence(**joined, num_samples=parts[0].num_samples, num_dims=x[0].numel(), method=parts[0].method)
    evidence = pv.Evidence.load(run / "evidence.safetensors").rows(slice(len(truth)))
    return annealed(truth, LONG_CHAINS) | {"images": len(truth), "auto_5000": differences(evidence, truth)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--two", type=int, default=100, help="images that are compared with quadrature")
    parser.add_argument("--ten", type=int, default=24, help="images that are annealed")
    parser.add_argument("--default", type=int, default=50, help="images of the default run that are annealed")
    parser.add_argument("--only", choices=["two", "ten", "default"], help="do one part, and keep the file's others")
    options = parser.parse_args()
    torch.set_num_threads(1)
    evidence_truth.RUNS.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {
        "two": ("two_latents", two_latents, options.two),
        "ten": ("ten_latents", ten_latents, options.ten),
        "default": ("default_run", default_run, options.default),
    }
    path = record.RESULTS / "repaired_truth.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    result["network"] = "that of evidence_truth.py, 17 levels of grey; of default_run, that of pyrovae train"
    for name, compute, number in [parts[options.only]] if options.only else parts.values():
        result[name] = compute(number)
        print(result[name], flush=True)
        record.write("repaired_truth", result)


if __name__ == "__main__":
    main()
