"""What the experiments on MNIST share: train once, score once, rank.

Trained models and scores stay in ``runs/<experiment>``, so an interrupted experiment goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyrovae as pv

RUNS = Path("runs")
SEED = 0


def arguments(description: str | None) -> argparse.Namespace:
    """The command line of an experiment, which asks where the data are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    return parser.parse_args()


def train(folder: Path, make: Callable[[], pv.VAE], data: Any, **options: Any) -> pv.VAE:
    """A model trained by ``pyrovae.fit``, or the one that the folder holds already."""
    done = folder / "training.json"
    if not done.exists():
        torch.manual_seed(SEED)
        vae = make()
        history = vae.fit(data, seed=SEED, **options)
        vae.save_pretrained(folder)
        last = history.records[-1]
        done.write_text(json.dumps({"training_bound": last["bound"], "training_seconds": last["seconds"]}))
    return pv.VAE.from_pretrained(folder)


def score(folder: Path, x: Any, num_samples: int) -> pv.Evidence:
    """log p(x) under the folder's model, or the score that it holds already."""
    path = folder / "evidence.npz"
    if not path.exists():
        vae = pv.VAE.from_pretrained(folder)
        vae.log_marginal(x, num_samples=num_samples, seed=SEED, progress=True).save(path)
    return pv.Evidence.load(path)


def rank(experiment: str, names: list[str], x: Any, num_samples: int) -> dict[str, dict[str, Any]]:
    """Score the models of an experiment on the same data, print their comparison, and return its rows, the best first."""
    evidence = {name: score(RUNS / experiment / name, x, num_samples) for name in names}
    comparison = pv.compare(evidence)
    print(comparison)
    return {
        name: {
            "log_px": float(comparison.mean[place]),
            "behind_the_best": float(comparison.difference[place]),
            "se_data": float(comparison.difference_se[place]),
            "se_monte_carlo": float(comparison.monte_carlo_se[place]),
            "elbo": float(evidence[name].elbo.mean()),
            "unreliable": int(comparison.unreliable[place]),
            "training_bound": json.loads((RUNS / experiment / name / "training.json").read_text())["training_bound"],
        }
        for place, name in enumerate(comparison.names)
    }
