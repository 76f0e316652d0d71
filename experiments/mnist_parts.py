"""Priors, then guides, on MNIST with one network at one budget, ranked by held-out log p(x).

The network is the VampPrior paper's: gated layers, 784-300-300-40 and back. Everything trains by the ELBO with one particle for
the same epochs (Adam, cosine from 1e-3, batches of 250, pixels binarised afresh, beta rising over the first tenth), from the
same seed. First the prior varies, under a diagonal normal guide; then the guide, under the standard normal prior. The score is
log p(x) of the first 2,000 test images, binarised once, by 1,000 importance samples each; differences are paired over images.

    python experiments/mnist_parts.py --root ../shared/data     # about an hour on two cores; writes results/mnist_parts.json
"""

from __future__ import annotations

from typing import Any

import mnist
import record

import pyrovae as pv

NAME = "mnist_parts"
EPOCHS, BATCH, WARM_UP, IMAGES, SAMPLES = 50, 250, 5, 2_000, 1_000
PRIORS: dict[str, Any] = {
    "standard prior": "standard_normal",
    "mixture prior": {"kind": "mixture", "components": 500},
    "flow prior": "flow",
    "vamp prior": {"kind": "vamp", "components": 500},
}
GUIDES: dict[str, Any] = {"flow guide": "flow"}
MODELS = {name: {"prior": prior, "encoder": "diagonal_normal"} for name, prior in PRIORS.items()} | {
    name: {"prior": "standard_normal", "encoder": guide} for name, guide in GUIDES.items()
}


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="dynamic")
    steps = len(split.train) // BATCH
    for name, parts in MODELS.items():
        mnist.train(
            mnist.RUNS / NAME / name,
            lambda: pv.make_vae(split.data_shape, latent_dim=40, hidden=[300, 300], body="gated_mlp", **parts),  # noqa: B023
            split.train,
            estimator={"kind": "elbo", "warm_up": WARM_UP * steps},
            epochs=EPOCHS,
            batch_size=BATCH,
            lr=1e-3,
            schedule="cosine",
            transform=split.transform,
        )
    x = split.test[:IMAGES]
    # The diagonal guide under the standard prior stands in both tables.
    tables = {"priors": list(PRIORS), "guides": ["standard prior", *GUIDES]}
    result = {
        "network": "gated 784-300-300-40, Bernoulli",
        "models": MODELS,
        "training": f"ELBO, 1 particle, {EPOCHS} epochs, batches of {BATCH}, beta from 0 to 1 over {WARM_UP} epochs",
        "data": split.note,
        "seed": mnist.SEED,
        "score": f"log p(x) in nats of the first {IMAGES} test images, {SAMPLES} importance samples each",
    }
    record.write(NAME, result | {title: mnist.rank(NAME, names, x, SAMPLES) for title, names in tables.items()})


if __name__ == "__main__":
    main()
