"""Table 1 of Importance Weighted Autoencoders (Burda, Grosse, Salakhutdinov 2016, https://arxiv.org/abs/1509.00519), on MNIST.

One stochastic layer is 784-200-200-50 with tanh. Two layers have latents of 100 and 50, with 100-100 between them. Each is
trained by the VAE's bound (K = 1) and by the importance-weighted bound of five particles. The paper trains for 3,280 epochs in
batches of 20; here it is 10 epochs in batches of 100, and log p(x) is of the first 1,000 test images.

    python experiments/papers/importance_weighted_autoencoder.py --root ../shared/data     # writes a result
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

import pyrovae as pv

sys.path.insert(0, str(Path(__file__).parents[1]))
import mnist
import record

NAME = "importance_weighted_autoencoder"
EPOCHS, BATCH, IMAGES, SAMPLES = 10, 100, 1_000, 1_000
# Negative log p(x) that the paper's Table 1 states, by layers and particles.
PUBLISHED = {(1, 1): 86.76, (1, 5): 85.54, (2, 1): 85.33, (2, 5): 83.89}


def make(layers: int, data_shape: tuple[int, ...]) -> pv.VAE | pv.HierarchicalVAE:
    if layers == 1:
        return pv.make_vae(data_shape, latent_dim=50, hidden=[200, 200], activation="tanh")
    return pv.make_hierarchical_vae(data_shape, latent_dims=[100, 50], hidden=[[200, 200], [100, 100]], activation="tanh")


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="dynamic")
    rows = []
    for (layers, particles), published in PUBLISHED.items():
        # Each row is kept, so that an interrupted run goes on.
        kept = mnist.RUNS / NAME / f"{layers}-{particles}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(measure(split, layers, particles)))
        what = f"log p(x), {layers} layer{'s' * (layers > 1)}, K = {particles}"
        rows.append({"what": what, "layers": layers, "published": -published} | json.loads(kept.read_text()))
        print(rows[-1], flush=True)
        spent = sum(row["processor_seconds"] for row in rows)
        about = {"epochs": EPOCHS, "batch_size": BATCH, "images": IMAGES, "samples": SAMPLES, "seed": mnist.SEED}
        record.write(NAME, about | {"processor_seconds": spent, "rows": rows})


def measure(split: pv.data.Split, layers: int, particles: int) -> dict[str, float]:
    """Train one model and score it."""
    start = time.process_time()
    torch.manual_seed(mnist.SEED)
    vae = make(layers, split.data_shape)
    options = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-3, "schedule": "cosine", "transform": split.transform}
    estimator = "elbo" if particles == 1 else {"kind": "iwae", "num_particles": particles}
    vae.fit(split.train, estimator=estimator, seed=mnist.SEED, progress=False, **options)
    evidence = vae.log_marginal(split.test[:IMAGES], num_samples=SAMPLES, seed=mnist.SEED)
    return {
        "measured": evidence.mean,
        "se": evidence.data_se,
        "reliable": int(evidence.reliable.sum()),
        "processor_seconds": time.process_time() - start,
    }


if __name__ == "__main__":
    main()
