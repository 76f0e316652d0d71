"""What part of the inference gap is amortisation (Cremer, Li, Duvenaud 2018, https://arxiv.org/abs/1801.03558), on MNIST.

The paper finds that the gap between log p(x) and the bound of a VAE is often due to amortisation, the use of one network for
all data, rather than to the family of the guide. The model is the paper's: two layers of 200 with ELU, 50 latents, a guide
with diagonal covariance, and the ELBO. It trains for 5 epochs, far fewer than the paper's. Then a guide of the same family is
fitted to each of 50 training and 50 test images (``pv.refine``), and ``pv.decompose`` splits the gap. log p(x) is estimated
with ``proposal="auto"``, since with the guide alone nearly all estimates would be unreliable.

    python experiments/papers/amortisation_gap.py --root ../shared/data     # writes a result
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import pyrovae as pv

sys.path.insert(0, str(Path(__file__).parents[1]))
import mnist
import record

NAME = "amortisation_gap"
EPOCHS, BATCH, IMAGES, SAMPLES, STEPS = 5, 100, 50, 1_000, 300


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="static")
    start = time.process_time()
    torch.manual_seed(mnist.SEED)
    vae = pv.make_vae(split.data_shape, latent_dim=50, hidden=[200, 200], activation="elu")
    options = {"epochs": EPOCHS, "batch_size": BATCH, "lr": 1e-3, "schedule": "cosine"}
    vae.fit(split.train, estimator="elbo", seed=mnist.SEED, progress=False, **options)
    rows = []
    for part, x in (("training", split.train[:IMAGES]), ("test", split.test[:IMAGES])):
        fitted = pv.refine(vae.model, vae.guide, x, steps=STEPS, seed=mnist.SEED)
        gaps = pv.decompose(vae.model, vae.guide, x, num_samples=SAMPLES, refined=fitted.elbo, seed=mnist.SEED)
        row = {
            "images": part,
            "log p(x)": gaps.evidence.mean,
            "reliable": int(gaps.evidence.reliable.sum()),
            "ELBO": float(gaps.elbo.mean()),
            "approximation": float(gaps.approximation.mean()),
            "approximation_se": float(gaps.approximation.std() / IMAGES**0.5),
            "amortisation": float(gaps.amortisation.mean()),
            "amortisation_se": float(gaps.amortisation.std() / IMAGES**0.5),
        }
        rows.append(row)
        print(row, f"{time.process_time() - start:.0f} s of processor time", flush=True)
    record.write(
        NAME,
        {
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "num_images": IMAGES,
            "samples": SAMPLES,
            "steps": STEPS,
            "seed": mnist.SEED,
            "processor_seconds": time.process_time() - start,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
