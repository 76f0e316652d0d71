"""Seven estimators on MNIST at one budget, ranked by held-out log p(x).

The network is the importance-weighted autoencoder paper's 784-200-200-50 with tanh; every estimator draws K = 8 particles per
datum and trains for the same 30 epochs (Adam, cosine from 1e-3, batches of 100, pixels binarised afresh), from the same initial
weights and the same seed. The groups of MIWAE and PIWAE are two of four particles; CIWAE is half ELBO. The score is log p(x) of
the first 2,000 test images, binarised once, by 5,000 importance samples each; the differences are paired over the images.

    python experiments/mnist_estimators.py --root ../shared/data     # about an hour; writes results/mnist_estimators.json

Trained models stay in runs/mnist_estimators, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

import pyrovae as pv

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs") / "mnist_estimators"
ESTIMATORS = {name: {"kind": name, "num_particles": 8} for name in "elbo stl iwae dreg ciwae miwae piwae".split()}
EPOCHS, BATCH, IMAGES, SAMPLES, SEED = 30, 100, 2_000, 5_000, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    split = pv.data.load("mnist", root=parser.parse_args().root, binarize="dynamic")
    for name in ESTIMATORS:
        if not (RUNS / name / "training.json").exists():
            train(name, split)
    x = split.test[:IMAGES]
    evidence = {name: score(name, x) for name in ESTIMATORS}
    comparison = pv.compare(evidence)
    print(comparison)
    rows = {}
    for rank, name in enumerate(comparison.names):
        rows[name] = {
            "log_px": float(comparison.mean[rank]),
            "behind_the_best": float(comparison.difference[rank]),
            "se_data": float(comparison.difference_se[rank]),
            "se_monte_carlo": float(comparison.monte_carlo_se[rank]),
            "elbo": float(evidence[name].elbo.mean()),
            "unreliable": int(comparison.unreliable[rank]),
            "training_bound": json.loads((RUNS / name / "training.json").read_text())["training_bound"],
        }
    write(rows, split.note)


def train(name: str, split: pv.data.Split) -> None:
    torch.manual_seed(SEED)
    vae = pv.make_vae(split.data_shape, latent_dim=50, hidden=[200, 200], activation="tanh")
    history = vae.fit(
        split.train,
        estimator=ESTIMATORS[name],
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=1e-3,
        schedule="cosine",
        transform=split.transform,
        seed=SEED,
    )
    vae.save_pretrained(RUNS / name)
    (RUNS / name / "training.json").write_text(json.dumps({"training_bound": history.bound[-1]}))


def score(name: str, x: torch.Tensor) -> pv.Evidence:
    path = RUNS / name / "evidence.npz"
    if not path.exists():
        vae = pv.VAE.from_pretrained(RUNS / name)
        vae.log_marginal(x, num_samples=SAMPLES, seed=SEED, progress=True).save(path)
    return pv.Evidence.load(path)


def write(rows: dict[str, dict], data: str) -> None:
    result = {
        "network": "784-200-200-50, tanh, Bernoulli, diagonal normal guide",
        "estimators": ESTIMATORS,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "data": data,
        "score": f"log p(x) in nats of the first {IMAGES} test images, {SAMPLES} importance samples each",
        "rows": rows,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyrovae": pv.__version__},
        "seed": SEED,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "mnist_estimators.json").write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
