"""What products in bfloat16 do to bounds and to log p(x): one network trained with either, and scored with either, on MNIST.

The network is 784-200-200-50 with tanh, trained by the ELBO with one particle from one seed (Adam, cosine from 1e-3, batches of
100, pixels binarised afresh). The score is log p(x) of the first 1,000 test images, binarised once, by 1,000 importance samples
each. A score in bfloat16 is compared with that of the same model in float32, image by image, with the same random numbers.

    python experiments/mnist_precision.py --root ../shared/data     # writes results/mnist_precision.json
"""

from __future__ import annotations

import time

import mnist
import numpy as np
import record

import pyrovae as pv

NAME = "mnist_precision"
EPOCHS, BATCH, IMAGES, SAMPLES = 10, 100, 1_000, 1_000
PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="dynamic")
    x = split.test[:IMAGES]
    found = {}
    for trained in PRECISIONS:
        began = time.perf_counter()
        vae = mnist.train(
            mnist.RUNS / NAME / trained,
            lambda: pv.make_vae(split.data_shape, latent_dim=50, hidden=[200, 200], activation="tanh"),
            split.train,
            epochs=EPOCHS,
            batch_size=BATCH,
            schedule="cosine",
            transform=split.transform,
            compile=True,
            precision=trained,
        )
        print(f"trained in {trained}: {time.perf_counter() - began:.0f} s")
        scores = {
            scored: vae.log_marginal(x, num_samples=SAMPLES, seed=mnist.SEED, compile=True, precision=scored, progress=True)
            for scored in PRECISIONS
        }
        off = {name: getattr(scores["bfloat16"], name) - getattr(scores["float32"], name) for name in ("log_px", "elbo")}
        found[f"trained in {trained}"] = {
            "log_px": {scored: float(evidence.log_px.mean()) for scored, evidence in scores.items()},
            "elbo": {scored: float(evidence.elbo.mean()) for scored, evidence in scores.items()},
            "bfloat16_off_by": {name: float(values.mean()) for name, values in off.items()},
            "se_of_that": {name: float(values.std(ddof=1) / np.sqrt(IMAGES)) for name, values in off.items()},
            "off_by_at_most": {name: float(np.abs(values).max()) for name, values in off.items()},
            "se_monte_carlo_one_image": float(scores["float32"].se.mean()),
        }
        print(found[f"trained in {trained}"])
    about = {
        "network": "tanh 784-200-200-50, Bernoulli",
        "training": f"ELBO, 1 particle, {EPOCHS} epochs, batches of {BATCH}",
        "data": split.note,
        "seed": mnist.SEED,
        "score": f"nats, the first {IMAGES} test images, {SAMPLES} importance samples each",
    }
    record.write(NAME, about | found)


if __name__ == "__main__":
    main()
