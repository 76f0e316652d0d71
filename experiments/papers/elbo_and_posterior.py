"""ELBO + KL(q(z|x) || p(z|x)) = log p(x), on a VAE of two latents whose guide and exact posterior are drawn.

Kingma and Welling (Auto-Encoding Variational Bayes, 2014, https://arxiv.org/abs/1312.6114, equation 1) derive the VAE from this
identity. Its three numbers are computed in three ways: the ELBO by draws from the guide, the KL on a grid over the latents, and
log p(x) by adaptive quadrature.

    python experiments/papers/elbo_and_posterior.py     # a minute on one core; writes results/elbo_and_posterior.json and .png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyrovae as pv

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

SEED, NUM_DRAWS, POINTS, NUM_SHOWN = 0, 50_000, 401, 3


def main() -> None:
    digits = pv.data.load("digits")
    binary = [(part > 7).float() for part in (digits.train, digits.test)]
    torch.manual_seed(SEED)
    vae = pv.make_vae((1, 8, 8), latent_dim=2, hidden=[32], activation="tanh")
    vae.fit(binary[0], epochs=60, batch_size=50, lr=3e-3, seed=SEED, progress=False)
    x = binary[1][:12]
    truth = pv.exact(vae.model, vae.guide, x)
    bound = pv.log_marginal(vae.model, vae.guide, x, num_samples=NUM_DRAWS, proposal="guide", compile=False, seed=SEED)
    rows, pictures = [], []
    for datum in range(len(x)):
        grid, log_posterior, log_guide = on_grid(vae, x[datum : datum + 1])
        kl = float((log_guide.exp() * (log_guide - log_posterior)).sum() / log_guide.exp().sum())
        total = float(bound.elbo[datum]) + kl
        row = {"ELBO": float(bound.elbo[datum]), "KL": kl, "sum": total, "log p(x)": float(truth.log_px[datum])}
        rows.append(row)
        pictures.append((grid, log_posterior, log_guide))
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
    off = max(abs(row["sum"] - row["log p(x)"]) for row in rows)
    record.write("elbo_and_posterior", {"seed": SEED, "num_draws": NUM_DRAWS, "largest difference": off, "rows": rows})
    worst = np.argsort([-row["KL"] for row in rows])[:NUM_SHOWN]
    draw([(rows[datum], *pictures[datum]) for datum in worst]).savefig(record.RESULTS / "elbo_and_posterior.png", dpi=150)


@torch.no_grad()
def on_grid(vae: pv.VAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Two axes, and on them log p(z|x) and log q(z|x), normalised over the grid; in float64 where densities are summed."""
    q = vae.encode(x)
    axis = torch.linspace(-5.5, 5.5, POINTS)
    z = torch.cartesian_prod(axis, axis)  # (points, 2)
    image = x.expand(len(z), *x.shape[1:])
    log_joint = (vae.decode(z).log_prob(image) + vae.prior().log_prob(z)).double()
    area = float(axis[1] - axis[0]) ** 2
    log_posterior = log_joint - torch.logsumexp(log_joint, 0) - np.log(area)
    shape = (POINTS, POINTS)
    return axis, log_posterior.reshape(shape), q.log_prob(z[:, None]).double().reshape(shape)


def draw(pictures: list[tuple[dict, Tensor, Tensor, Tensor]]) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for ax, (row, axis, log_posterior, log_guide) in zip(figure.subplots(1, len(pictures)), pictures, strict=True):
        density = log_posterior.exp().numpy().T
        ax.contourf(axis, axis, density, levels=20, cmap="viridis")
        peak = float(log_guide.exp().max())
        ax.contour(axis, axis, log_guide.exp().numpy().T, levels=[peak * level for level in (0.05, 0.3, 0.8)], colors="white")
        # The part of the plane that either distribution covers.
        covered = (log_posterior > log_posterior.max() - 7) | (log_guide > log_guide.max() - 5)
        rows, columns = (axis[covered.any(dim)] for dim in (1, 0))
        ax.set(xlim=(float(rows.min()), float(rows.max())), ylim=(float(columns.min()), float(columns.max())))
        ax.set(xlabel="first latent", ylabel="second latent")
        ax.set_title(f"{row['ELBO']:.2f} + {row['KL']:.2f} = {row['log p(x)']:.2f} nats", fontsize="medium")
    figure.suptitle("ELBO + KL(q || p(z|x)) = log p(x); colours: the posterior, white lines: the guide", fontsize="medium")
    return figure


if __name__ == "__main__":
    main()
