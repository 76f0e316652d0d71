"""Is log p(x) right? Importance sampling, annealing and quadrature on one trained VAE, and BDMC's sandwich on another.

All are trained on scikit-learn's handwritten digits, 8 x 8 pixels, by a tanh network of one hidden layer either way with a
Gaussian guide of full covariance, in float64.

1. Two latents, pixels black or white: log p(x) of held-out images by quadrature, which is exact to its tolerance, beside
   importance sampling by four proposals, and AIS from the prior.
2. The same with all 17 levels of grey (Binomial), whose posteriors are narrow and of several modes. What no draw comes near no
   weight shows, so the refined proposal looks for eight of them; fitted from the guide alone, as with more latents, it has one.
3. Ten latents, pixels black or white, where nothing is exact: BDMC on images simulated from the model. log p(x) lies between
   its two bounds on average, and with more temperatures they meet.

    python experiments/evidence_truth.py     # a quarter of an hour; writes results/evidence_truth.json and bdmc.png

Each answer is kept in runs/evidence_truth as soon as it is known, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import record
import torch
from matplotlib.figure import Figure

import pyrovae as pv

RUNS = Path("runs") / "evidence_truth"
HIDDEN, EPOCHS, BATCH, LR, SEED = [64], 60, 64, 3e-3, 0
IMAGES, SAMPLES, PRIOR_SHARE = 100, 20_000, 0.5
ONE_MODE: dict[str, Any] = {"covariance": "full", "tail_df": 5.0, "seed": SEED}
CHAINS, AIS_TEMPERATURES = 16, 1_000
DREAMS, TEMPERATURES = 150, [20, 50, 100, 200, 500, 1000]


def main() -> None:
    torch.set_num_threads(1)
    RUNS.mkdir(parents=True, exist_ok=True)
    two = {pixels: answers(pixels) for pixels in ("binary", "levels")}
    deep = trained("binary", 10)
    curve = [sandwich(deep, data("binary")[1][:1], count) for count in TEMPERATURES]
    for point in curve:
        print(f"{point['temperatures']:6d} temperatures: gap {point['gap']:.3f} +- {point['gap_se']:.3f} nats")
    write(two, curve)
    draw(curve)


def data(pixels: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Training images, held-out ones, and the likelihood that fits them."""
    split = pv.data.load("digits")
    if pixels == "levels":
        return split.train.double(), split.test[:IMAGES].double(), split.likelihood
    return (split.train > 7).double(), (split.test[:IMAGES] > 7).double(), "bernoulli"


def trained(pixels: str, latent_dim: int) -> pv.VAE:
    folder = RUNS / f"vae-{pixels}-{latent_dim}"
    if not (folder / "model.json").exists():
        train, _, likelihood = data(pixels)
        torch.manual_seed(SEED)
        parts: dict[str, Any] = {"encoder": "full_covariance_normal", "hidden": HIDDEN, "activation": "tanh"}
        vae = pv.make_vae(train.shape[1:], latent_dim=latent_dim, likelihood=likelihood, **parts).double()
        estimator = {"kind": "dreg", "num_particles": 10}
        vae.fit(train, estimator=estimator, epochs=EPOCHS, batch_size=BATCH, lr=LR, schedule="cosine", seed=SEED)
        vae.save_pretrained(folder)
    return pv.VAE.from_pretrained(folder).double()


def answers(pixels: str) -> dict[str, dict[str, Any]]:
    """log p(x) of the held-out images by every method, beside quadrature."""
    vae, x = trained(pixels, 2), data(pixels)[1]

    def sampled(**options: Any) -> Callable[[], pv.Evidence]:
        return lambda: vae.log_marginal(x, num_samples=SAMPLES, seed=SEED, progress=True, **options)

    chains: dict[str, Any] = {"num_chains": CHAINS, "num_temperatures": AIS_TEMPERATURES, "seed": SEED, "progress": True}
    methods: dict[str, Callable[[], pv.Evidence]] = {
        "quadrature": lambda: pv.exact(vae.model, vae.guide, x),
        "guide": sampled(),
        "refined": sampled(proposal="refined"),
        "refined, one mode": lambda: vae.log_marginal(
            x, num_samples=SAMPLES, seed=SEED, proposal=pv.refine(vae.model, vae.guide, x, **ONE_MODE)
        ),
        "mixture": sampled(proposal="mixture", prior_share=PRIOR_SHARE),
    }
    if pixels == "binary":
        methods |= {
            "prior": sampled(proposal="prior"),
            "ais": lambda: pv.ais(vae.model, vae.guide, x, **chains),
        }
    found = {name: kept(f"{pixels}-{name}", score) for name, score in methods.items()}
    rows = {name: beside(answer, found["quadrature"]) for name, answer in found.items()}
    for name, row in rows.items():
        off = f"off by {row['mean_difference']:+.4f}, at most {row['largest_difference']:.3f}"
        print(f"{pixels:<7} {name:<11} {row['log_px']:9.4f} +- {row['monte_carlo_se']:.4f}   {off}")
    return rows


def kept(name: str, score: Callable[[], pv.Evidence]) -> pv.Evidence:
    path = RUNS / f"{name}.safetensors"
    if not path.exists():
        began = time.perf_counter()
        evidence = score()
        evidence.notes["seconds"] = time.perf_counter() - began
        evidence.save(path)
    return pv.Evidence.load(path)


def beside(answer: pv.Evidence, truth: pv.Evidence) -> dict[str, Any]:
    difference = answer.log_px - truth.log_px
    return {
        "method": answer.method,
        "effort": answer.effort,
        "log_px": answer.mean,
        "monte_carlo_se": answer.mean_se,
        "mean_difference": float(difference.mean()),
        "largest_difference": float(np.abs(difference).max()),
        "largest_in_standard_errors": None if answer.is_exact else float((np.abs(difference) / answer.se).max()),
        "reliable": int(answer.reliable.sum()),
        "seconds": answer.notes["seconds"],
        "findings": answer.summary(),
    }


def sandwich(vae: pv.VAE, like: torch.Tensor, num_temperatures: int) -> dict[str, Any]:
    path = RUNS / f"bdmc-{num_temperatures}.json"
    if not path.exists():
        began = time.perf_counter()
        found = pv.bdmc(
            vae.model,
            vae.guide,
            like,
            num_data=DREAMS,
            num_chains=CHAINS,
            num_temperatures=num_temperatures,
            seed=SEED,
            progress=True,
        )
        seconds = time.perf_counter() - began
        point = {
            "temperatures": num_temperatures,
            "lower": float(found.lower.mean()),
            "upper": float(found.upper.mean()),
            "gap": found.gap,
            "gap_se": found.gap_se,
            "largest_gap": float((found.upper - found.lower).max()),
            "seconds": seconds,
        }
        path.write_text(json.dumps(point))
    return json.loads(path.read_text())


def draw(curve: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    ax = figure.subplots()
    temperatures, gap, error = (np.array([point[name] for point in curve]) for name in ("temperatures", "gap", "gap_se"))
    ax.axhline(0, color="0.6", linewidth=1)
    ax.axhline(0.1, color="0.6", linewidth=1, linestyle=(0, (4, 3)))
    ax.text(temperatures[-1], 0.1, "0.1 nats", color="0.4", fontsize="small", va="bottom", ha="right")
    ax.errorbar(temperatures, gap, 2 * error, marker="o", markersize=5, linewidth=1.6, capsize=3)
    ax.set_xscale("log")
    ax.set_xticks(temperatures, [f"{count:,}" for count in temperatures])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("temperatures")
    ax.set_ylabel("upper minus lower bound (nats per datum)")
    ax.set_title(
        f"BDMC's sandwich closes: VAE of 10 latents, 10-64-64 tanh, binary digits\n"
        f"{DREAMS} images simulated from the model, {CHAINS} chains each way; bars are two standard errors",
        fontsize="small",
        loc="left",
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)
    figure.savefig(record.RESULTS / "bdmc.png", dpi=150)


def write(two: dict[str, dict], curve: list[dict[str, Any]]) -> None:
    result = {
        "network": f"tanh, hidden {HIDDEN} either way, full-covariance normal guide, float64",
        "training": f"DReG of 10 particles, {EPOCHS} epochs, batches of {BATCH}, Adam, cosine from {LR}",
        "data": "scikit-learn's handwritten digits, 8 x 8; binary: above 7 or not, Bernoulli; levels: 0 to 16, Binomial",
        "two_latents": {
            "images": IMAGES,
            "what": "log p(x) of the first held-out images, nats per datum; differences are to quadrature",
            "prior_share_of_the_mixture": PRIOR_SHARE,
            **two,
        },
        "ten_latents": {
            "what": "BDMC on binary images simulated from the model, nats per datum",
            "images": DREAMS,
            "chains": CHAINS,
            "points": curve,
        },
        "seed": SEED,
    }
    record.write("evidence_truth", result)


if __name__ == "__main__":
    main()
