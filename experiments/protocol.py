"""How far the usual protocol, 5,000 draws from the guide, lies below the repaired estimate of log p(x) on MNIST.

Models of 10, 20, 50 and 100 latents (784-200-200, tanh) are trained by the ELBO, IWAE-50 and DReG-50, each for the same few
epochs. Every model is scored on the same test images twice, by ``proposal="guide"`` and by ``proposal="auto"``. The first cell
is a model of 50 latents that the ELBO trains for longer, scored on more images and, on some, compared with annealing.

    python experiments/protocol.py --root ../shared/data          # goes on where it was stopped; results/protocol.json, .png
    python experiments/protocol.py --root ../shared/data --report # of the cells that are done, computes nothing

Time is the process's CPU time, so that other processes on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import mnist
import numpy as np
import record
import torch

import pyrovae as pv

NAME = "protocol"
SAMPLES = 5_000
ESTIMATORS: dict[str, dict[str, Any]] = {
    "elbo": {"kind": "elbo"},
    "iwae": {"kind": "iwae", "num_particles": 50},
    "dreg": {"kind": "dreg", "num_particles": 50},
}
LATENTS = (50, 20, 10, 100)
CHAINS, TEMPERATURES, LEAPFROG = 8, 10_000, 4
# Images that are annealed together.
TOGETHER = 8


class Cell(NamedTuple):
    """One model and the images that it is scored on."""

    estimator: str
    latents: int
    epochs: int
    images: int
    annealed: int = 0

    @property
    def folder(self) -> Path:
        """Where its model and scores are kept."""
        return mnist.RUNS / NAME / f"{self.estimator}-{self.latents}-{self.epochs}"

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"{self.estimator}, {self.latents} latents, {self.epochs} epochs"


def cells(options: argparse.Namespace) -> list[Cell]:
    """All cells, the one that takes more images first."""
    rest = [Cell(name, size, options.epochs, options.images) for name in ESTIMATORS for size in LATENTS]
    return [Cell("elbo", 50, 12, options.many_images, options.annealed), *rest]


def scored(cell: Cell, proposal: str, x: torch.Tensor, seed: int) -> pv.Evidence:
    """The cell's evidence by a proposal, computed or from its file; the CPU time goes beside it."""
    path = cell.folder / f"{proposal}-{len(x)}.safetensors"
    if not path.exists():
        vae = pv.VAE.from_pretrained(cell.folder)
        began = time.process_time()
        evidence = vae.log_marginal(x, num_samples=SAMPLES, proposal=proposal, seed=seed)
        path.with_suffix(".json").write_text(json.dumps({"cpu_seconds": time.process_time() - began}))
        evidence.save(path)
    return pv.Evidence.load(path)


def anneal(cell: Cell, x: torch.Tensor) -> None:
    """Chains from the prior, a few images at a time so that little is lost when the script is stopped."""
    for start in range(0, cell.annealed, TOGETHER):
        path = cell.folder / f"annealed-{start}.safetensors"
        if not path.exists():
            vae = pv.VAE.from_pretrained(cell.folder)
            options: Any = {"num_chains": CHAINS, "num_temperatures": TEMPERATURES, "leapfrog_steps": LEAPFROG}
            part = x[start : min(start + TOGETHER, cell.annealed)]
            pv.ais(vae.model, vae.guide, part, seed=3, compile=True, **options).save(path)
            print(f"{start + len(part)} images annealed, {time.process_time():.0f} s of CPU time in all", flush=True)


def annealed(cell: Cell) -> pv.Evidence | None:
    """The chains' evidence of the first images, as many as have been annealed."""
    paths = (cell.folder / f"annealed-{start}.safetensors" for start in range(0, cell.annealed, TOGETHER))
    parts = [pv.Evidence.load(path) for path in takewhile(Path.exists, paths)]
    if not parts:
        return None
    fields = ("log_px", "se", "ess", "khat", "elbo")
    joined: Any = {name: np.concatenate([getattr(part, name) for part in parts]) for name in fields}
    return pv.Evidence(**joined, num_samples=CHAINS, num_dims=784, method=parts[0].method)


def compute(cell: Cell, split: Any) -> None:
    """Train and score one cell, as far as it is not done."""
    mnist.train(
        cell.folder,
        lambda: pv.make_vae(split.data_shape, latent_dim=cell.latents, hidden=[200, 200], activation="tanh"),
        split.train,
        estimator=ESTIMATORS[cell.estimator],
        epochs=cell.epochs,
        batch_size=100,
        lr=1e-3,
        schedule="cosine",
        transform=split.transform,
    )
    x = split.test[: cell.images]
    for proposal in ("guide", "auto") if cell.images else ():
        scored(cell, proposal, x, seed=1)


def row(cell: Cell, x: torch.Tensor) -> dict[str, Any]:
    """What the table says of a cell that is done."""
    guide, auto = (scored(cell, proposal, x[: cell.images], seed=1) for proposal in ("guide", "auto"))
    files = (cell.folder / f"{proposal}-{cell.images}.json" for proposal in ("guide", "auto"))
    times = [json.loads(path.read_text())["cpu_seconds"] for path in files]
    difference = auto.log_px - guide.log_px
    found: dict[str, Any] = {
        "images": len(auto),
        "guide": guide.mean,
        "auto": auto.mean,
        "below": float(difference.mean()),
        "below_se_monte_carlo": float(np.hypot(guide.mean_se, auto.mean_se)),
        "below_se_images": float(difference.std(ddof=1) / np.sqrt(len(auto))),
        "below_most": float(difference.max()),
        "reliable_guide": float(guide.reliable.mean()),
        "reliable_auto": float(auto.reliable.mean()),
        "rungs": auto.rungs,
        "decoder_calls_auto": float(auto.calls.mean()) if auto.calls is not None else None,
        "cpu_seconds_guide": round(times[0], 1),
        "cpu_seconds_auto": round(times[1], 1),
        "time_ratio": round(times[1] / times[0], 2),
    }
    return found


def against_annealing(cell: Cell, x: torch.Tensor) -> dict[str, Any] | None:
    """The repaired estimate and the guide's against chains, on the first images of the cell."""
    chains = annealed(cell)
    if chains is None:
        return None
    both = (scored(cell, proposal, x[: cell.images], seed=1) for proposal in ("auto", "guide"))
    auto, guide = (evidence.rows(slice(len(chains))) for evidence in both)
    error, difference = np.hypot(auto.se, chains.se), auto.log_px - chains.log_px
    return {
        "images": len(chains),
        "chains": CHAINS,
        "temperatures": TEMPERATURES,
        "leapfrog_steps": LEAPFROG,
        "annealing": chains.mean,
        "annealing_se": chains.mean_se,
        "annealing_reliable": float(chains.reliable.mean()),
        "auto": auto.mean,
        "auto_se": auto.mean_se,
        "guide": guide.mean,
        "auto_minus_annealing": float(difference.mean()),
        "auto_minus_annealing_se": float(np.hypot(auto.mean_se, chains.mean_se)),
        "largest_difference": float(np.abs(difference).max()),
        "most_combined_errors": float(np.abs(difference / error).max()),
        "images_beyond_four_errors": int((np.abs(difference / error) > 4).sum()),
    }


def ranking(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The order of the models on the same images by both estimates, the best first."""
    order = {by: sorted(rows, key=lambda label: rows[label][by], reverse=True) for by in ("guide", "auto")}
    return order | {"changed": order["guide"] != order["auto"]}


def figure(rows: dict[str, dict[str, Any]]) -> None:
    """How far the guide's estimate lies below the repaired one, for each model."""
    import matplotlib.pyplot as plt

    names = list(reversed(rows))
    below = [rows[name]["below"] for name in names]
    error = [2 * np.hypot(rows[name]["below_se_monte_carlo"], rows[name]["below_se_images"]) for name in names]
    _, ax = plt.subplots(figsize=(7.6, 0.32 * len(names) + 1.2), layout="constrained")
    ax.barh(names, below, xerr=error, color="#9db7d5", ecolor="#333333", capsize=2)
    for place, name in enumerate(names):
        words = f"{rows[name]['reliable_guide']:.0%} → {rows[name]['reliable_auto']:.0%}"
        ax.annotate(words, (below[place] + error[place], place), (4, -3), textcoords="offset points")
    ax.set_xlabel("repaired minus guide's estimate (nats per image, two standard errors)")
    ax.set_title("Reliable estimates by the guide → repaired", fontsize=10, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_xlim(right=1.3 * max(place + width for place, width in zip(below, error, strict=True)))
    plt.savefig(record.RESULTS / f"{NAME}.png", dpi=120)
    plt.close()


def report(wanted: list[Cell], x: torch.Tensor) -> None:
    """Write the table and the figure: of the cells that are done here, and of the others what the table said before."""
    path = record.RESULTS / f"{NAME}.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": {}, "against_annealing": None}
    rows = {}
    for cell in wanted:
        if (cell.folder / f"auto-{cell.images}.json").exists():
            rows[cell.label] = row(cell, x)
        elif cell.label in before["rows"]:
            rows[cell.label] = before["rows"][cell.label]
    for name, each in rows.items():
        print(name, json.dumps(each))
    first = wanted[0]
    record.write(
        NAME,
        {
            "network": "784-200-200, tanh, Bernoulli, diagonal normal guide; Adam, cosine from 1e-3, batches of 100",
            "score": f"log p(x) in nats of the first test images, binarised once, {SAMPLES} draws each",
            "missing": [cell.label for cell in wanted if cell.label not in rows],
            "rows": rows,
            "ranking": ranking({name: each for name, each in rows.items() if name != first.label}),
            "against_annealing": against_annealing(first, x) or before["against_annealing"],
        },
    )
    figure(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=2, help="of every model but the first")
    parser.add_argument("--images", type=int, default=96, help="that every model but the first is scored on")
    parser.add_argument("--many-images", type=int, default=500, help="that the first is scored on")
    parser.add_argument("--annealed", type=int, default=16, help="of these, how many are annealed")
    parser.add_argument("--first", type=int, help="compute so many of the cells, and leave the others as they are")
    parser.add_argument("--train", action="store_true", help="train the models, and score none")
    parser.add_argument("--report", action="store_true", help="report what is done")
    options = parser.parse_args()
    split = pv.data.load("mnist", root=options.root, binarize="dynamic")
    wanted = cells(options)
    for cell in [] if options.report else wanted[: options.first]:
        print(cell.label, flush=True)
        compute(cell if not options.train else cell._replace(images=0), split)
    if not (options.report or options.train):
        report(wanted, split.test)
        anneal(wanted[0], split.test)
    if not options.train:
        report(wanted, split.test)


if __name__ == "__main__":
    main()
