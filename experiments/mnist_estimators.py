"""Seven estimators on MNIST at one budget, ranked by held-out log p(x).

The network is the importance-weighted autoencoder paper's 784-200-200-50 with tanh; every estimator draws K = 8 particles per
datum and trains for the same 30 epochs (Adam, cosine from 1e-3, batches of 100, pixels binarised afresh), from the same initial
weights and the same seed. The groups of MIWAE and PIWAE are two of four particles; CIWAE is half ELBO. The score is log p(x) of
the first 2,000 test images, binarised once, by 5,000 importance samples each; the differences are paired over the images.

    python experiments/mnist_estimators.py --root ../shared/data     # about an hour; writes results/mnist_estimators.json
"""

from __future__ import annotations

import mnist
import record

import pyrovae as pv

NAME = "mnist_estimators"
ESTIMATORS = {name: {"kind": name, "num_particles": 8} for name in "elbo stl iwae dreg ciwae miwae piwae".split()}
EPOCHS, BATCH, IMAGES, SAMPLES = 30, 100, 2_000, 5_000


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="dynamic")
    for name, estimator in ESTIMATORS.items():
        mnist.train(
            mnist.RUNS / NAME / name,
            lambda: pv.make_vae(split.data_shape, latent_dim=50, hidden=[200, 200], activation="tanh"),
            split.train,
            estimator=estimator,
            epochs=EPOCHS,
            batch_size=BATCH,
            lr=1e-3,
            schedule="cosine",
            transform=split.transform,
        )
    result = {
        "network": "784-200-200-50, tanh, Bernoulli, diagonal normal guide",
        "estimators": ESTIMATORS,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "data": split.note,
        "seed": mnist.SEED,
        "score": f"log p(x) in nats of the first {IMAGES} test images, {SAMPLES} importance samples each",
    }
    record.write(NAME, result | {"rows": mnist.rank(NAME, list(ESTIMATORS), split.test[:IMAGES], SAMPLES)})


if __name__ == "__main__":
    main()
