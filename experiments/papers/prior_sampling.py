"""The naive Monte Carlo estimate of p(x) from the prior, against importance sampling from a guide, as the dimension grows.

z ~ N(0, I), x | z ~ N(z, 0.25 I) in L dimensions, and a guide with the posterior's mean and 1.2 times its scale. log p(x) is
known in closed form. Importance sampling takes about exp(KL(p(z|x) || r)) samples from a proposal r (Chatterjee and Diaconis,
The Sample Size Required in Importance Sampling, 2018, https://arxiv.org/abs/1511.01437). The KL grows with L, by 0.805 nats a
dimension for the prior and by 0.030 for the guide. So 5,000 samples of the prior, exp(8.5), suffice up to some 10.6 dimensions.

    python experiments/papers/prior_sampling.py     # a minute on one core; writes results/prior_sampling.json and .png
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyrovae as pv

sys.path.insert(0, str(Path(__file__).parents[1]))
import record

NUM_DATA, NUM_SAMPLES, SEED = 200, 5000, 0
DIMENSIONS = [1, 2, 5, 8, 10, 12, 15, 20, 30, 50]
NOISE, WIDER = 0.5, 1.2
POSTERIOR_VARIANCE = NOISE**2 / (1 + NOISE**2)
# Mean KL(p(z|x) || r) over data of the model, in nats a dimension.
PRIOR_KL = -0.5 * math.log(POSTERIOR_VARIANCE)
GUIDE_KL = math.log(WIDER) + 0.5 / WIDER**2 - 0.5


def model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, NOISE).to_event(1), obs=x)


def guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        scale = WIDER * POSTERIOR_VARIANCE**0.5
        pyro.sample("z", dist.Normal(x / (1 + NOISE**2), scale).to_event(1))


def main() -> None:
    rows = []
    for dimension in DIMENSIONS:
        random = np.random.default_rng(SEED)
        x = torch.as_tensor(random.normal(0, (1 + NOISE**2) ** 0.5, (NUM_DATA, dimension)), dtype=torch.float32)
        truth = pv.exact(model, guide, x, method="linear_gaussian")
        for proposal in ("prior", "guide"):
            found = pv.log_marginal(model, guide, x, num_samples=NUM_SAMPLES, proposal=proposal, compile=False, seed=SEED)
            error = found.log_px - truth.log_px
            rows.append(
                {
                    "dimension": dimension,
                    "proposal": proposal,
                    "log p(x)": truth.mean,
                    "mean error": float(error.mean()),
                    "largest error": float(np.abs(error).max()),
                    "reported error of one datum": float(np.median(found.se)),
                    "reliable": float(found.reliable.mean()),
                    "KL of the posterior from the proposal": dimension * (PRIOR_KL if proposal == "prior" else GUIDE_KL),
                }
            )
            print(
                {name: round(value, 3) if isinstance(value, float) else value for name, value in rows[-1].items()}, flush=True
            )
    record.write("prior_sampling", {"num_data": NUM_DATA, "num_samples": NUM_SAMPLES, "seed": SEED, "rows": rows})
    draw(rows).savefig(record.RESULTS / "prior_sampling.png", dpi=150)


def draw(rows: list[dict]) -> Figure:
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    errors, shares = figure.subplots(1, 2)
    for proposal, color, marker in (("prior", "#D55E00", "o"), ("guide", "#0072B2", "s")):
        own = [row for row in rows if row["proposal"] == proposal]
        dimensions = [row["dimension"] for row in own]
        errors.plot(dimensions, [row["mean error"] for row in own], marker=marker, color=color, label=f"from the {proposal}")
        shares.plot(dimensions, [100 * row["reliable"] for row in own], marker=marker, color=color)
    limit = math.log(NUM_SAMPLES) / PRIOR_KL
    for ax in (errors, shares):
        ax.axvline(limit, color="0.4", linewidth=1, linestyle="--")
        ax.set(xlabel="latent dimensions", xscale="log")
        ax.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    errors.set(ylabel="estimate minus log p(x), nats", yscale="symlog")
    shares.set(ylabel="estimates called reliable, %", ylim=(-4, 104))
    errors.legend(frameon=False)
    shares.annotate("5,000 = exp(KL)", (limit, 50), (6, 0), textcoords="offset points", color="0.4")
    return figure


if __name__ == "__main__":
    main()
