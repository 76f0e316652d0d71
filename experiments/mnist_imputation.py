"""Imputation on MNIST with half the pixels hidden, by three hands, judged by the log-likelihood of the hidden pixels.

A 784-200-200-50 network trains by the MIWAE bound (IWAE with five particles on the observed pixels) on images of which half the
pixels, chosen at random once for each image, are hidden; it never sees a whole one. On held-out images, half hidden likewise,
each hand gives every hidden pixel a probability of being white:

- mean: that pixel's mean over the training images in which it was observed;
- single sample: p(x|z) at one draw of q(z|x_obs), as a reconstruction would be read;
- impute: the posterior-predictive mean, weighted by importance, ``vae.impute(x, mask)``.

All three are judged by the sum of log Bernoulli over an image's hidden pixels.

    python experiments/mnist_imputation.py --root ../shared/data    # a quarter of an hour; writes a result
"""

from __future__ import annotations

import math

import mnist
import record
import torch
from torch import Tensor

import pyrovae as pv

NAME = "mnist_imputation"
EPOCHS, BATCH, PARTICLES, IMAGES, SAMPLES = 40, 100, 5, 2_000, 1_000


def main() -> None:
    split = pv.data.load("mnist", root=mnist.arguments(__doc__).root, binarize="static")
    generator = torch.Generator().manual_seed(mnist.SEED)
    x, test = split.train, split.test[:IMAGES]
    mask = torch.rand(x.shape, generator=generator) < 0.5
    shown = torch.rand(test.shape, generator=generator) < 0.5
    vae = mnist.train(
        mnist.RUNS / NAME,
        lambda: pv.make_vae(split.data_shape, latent_dim=50, hidden=[200, 200], activation="tanh"),
        (torch.where(mask, x, 0.0), mask),
        estimator={"kind": "iwae", "num_particles": PARTICLES},
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=1e-3,
        schedule="cosine",
    )
    seen = torch.where(shown, test, 0.0)
    torch.manual_seed(mnist.SEED)
    with torch.no_grad():
        single = vae.decode(vae.encode(seen, shown).sample()).mean
    hands = {
        "mean": ((x * mask).sum(0) + 0.5) / (mask.sum(0) + 1.0),
        "single sample": single,
        "impute": vae.impute(seen, shown, num_samples=SAMPLES, seed=mnist.SEED),
    }
    scores = {hand: _hidden_log_likelihood(test, shown, chance) for hand, chance in hands.items()}
    observed = vae.log_marginal((seen, shown), num_samples=SAMPLES, seed=mnist.SEED)
    hidden = float((~shown).sum()) / IMAGES
    rows = {hand: _row(score, scores["impute"], hidden) for hand, score in scores.items()}
    print(f"{'hidden pixels by':<24}{'log p, nats':>13}{'bits/pixel':>12}{'behind impute':>15}{'se':>8}")
    for hand, row in rows.items():
        print(f"{hand:<24}{row['log_p']:>13.2f}{row['bits_per_pixel']:>12.4f}{row['behind_impute']:>15.2f}{row['se']:>8.2f}")
    record.write(
        NAME,
        {
            "network": "784-200-200-50, tanh, Bernoulli, diagonal normal guide",
            "training": f"IWAE, {PARTICLES} particles, {EPOCHS} epochs, batches of {BATCH}, half of every image hidden",
            "data": split.note,
            "seed": mnist.SEED,
            "score": f"log-likelihood in nats per image of its hidden pixels (about {hidden:.0f}), {IMAGES} test images",
            "samples": SAMPLES,
            "rows": rows,
            "weights": {"mean_ess": float(observed.ess.mean()), "unreliable": int((~observed.reliable).sum())},
        },
    )


def _hidden_log_likelihood(x: Tensor, shown: Tensor, chance: Tensor) -> Tensor:
    """Sum of log Bernoulli over each image's hidden pixels, shape (N,)."""
    chance = chance.double().clamp(1e-6, 1 - 1e-6)
    log_p = torch.where(x > 0.5, chance.log(), (1 - chance).log())
    return torch.where(shown, 0.0, log_p).flatten(1).sum(1)


def _row(score: Tensor, reference: Tensor, hidden: float) -> dict[str, float]:
    behind = reference - score
    return {
        "log_p": float(score.mean()),
        "bits_per_pixel": -float(score.mean()) / (hidden * math.log(2)),
        "behind_impute": float(behind.mean()),
        "se": float(behind.std() / math.sqrt(len(score))),
    }


if __name__ == "__main__":
    main()
