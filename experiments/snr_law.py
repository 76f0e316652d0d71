"""The known law of importance-weighted gradients: log SNR against log K (Rainforth et al. 2018, their Gaussian toy).

z ~ N(mu, I), x|z ~ N(z, I), q(z|x) = N(A x + b, 2/3 I) in 20 dimensions, with 1,024 data drawn from the model and the
parameters near their optimum. The guide's gradient of the IWAE bound loses its signal as K^(-1/2); the model's, and the
guide's under DReG, gain it as K^(1/2).

The law holds for large K, and a curve is measured where two cores can see it: the guide's IWAE gradient at moderate K, for
at large K its signal drowns; the other two up to K = 512. Parameters are moved off their optimum by N(0, 0.01^2) as in the
paper, but mu by N(0, 0.3^2) for the model's curve: the gradient of log p(x) must stand above the bias of order 1/K.

    python experiments/snr_law.py          # 8 minutes on two cores; writes results/snr_law.json and snr_law.png
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import record
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyrovae as pv

DIM, NUM_DATA = 20, 1024


class Curve(NamedTuple):
    """One curve of the figure: whose gradient, by which estimator, where, and the slope that the law gives."""

    name: str
    estimator: str
    group: str
    law: float
    offset_mu: float
    particles: list[int]
    draws: int


CURVES = [
    Curve("IWAE, guide", "iwae", "guide", -0.5, 0.01, [8, 16, 32, 64, 128], 400),
    Curve("IWAE, model", "iwae", "model", 0.5, 0.3, [32, 64, 128, 256, 512], 80),
    Curve("DReG, guide", "dreg", "guide", 0.5, 0.01, [32, 64, 128, 256, 512], 80),
]


class Toy:
    def __init__(self, seed: int, offset_mu: float):
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> Tensor:
            return torch.as_tensor(random.normal(size=shape), dtype=torch.float32)

        def moved(value: Tensor, by: float) -> Tensor:
            return (value + by * normal(*value.shape)).requires_grad_()

        z = normal(DIM) + normal(NUM_DATA, DIM)
        self.x = z + normal(NUM_DATA, DIM)

        # The optima: the data's mean for mu, and the posterior mean (x + mu) / 2 for A x + b.
        self.mu = moved(self.x.mean(0), offset_mu)
        self.A = moved(torch.eye(DIM) / 2, 0.01)
        self.b = moved(self.x.mean(0) / 2, 0.01)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.A.T + self.b, (2 / 3) ** 0.5).to_event(1))


def gradient_draws(toy: Toy, estimator: str, group: str, num_particles: int, num_draws: int) -> np.ndarray:
    """Draws of the gradient per datum, over all data: (R, 20) for the model, (R, 420) for the guide."""
    objective = pv.estimators.make_estimator({"kind": estimator, "num_particles": num_particles})
    parameters = [toy.mu, toy.A, toy.b]
    kept = [toy.mu] if group == "model" else [toy.A, toy.b]
    draws = []
    for seed in range(num_draws):
        torch.manual_seed(seed)
        objective.differentiable_loss(toy.model, toy.guide, toy.x).backward()
        draws.append(np.concatenate([-parameter.grad.numpy().ravel() / NUM_DATA for parameter in kept]))
        for parameter in parameters:
            parameter.grad = None
    return np.stack(draws)


def snr(draws: np.ndarray) -> float:
    """Root of the mean over coordinates of (E g / sd g)^2, the mean's own noise subtracted."""
    squared = draws.mean(0) ** 2 / draws.var(0, ddof=1) - 1 / len(draws)
    return float(np.sqrt(max(squared.mean(), 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    curves = []
    for curve in CURVES:
        toy = Toy(seed, curve.offset_mu)
        ratios = [snr(gradient_draws(toy, curve.estimator, curve.group, k, curve.draws)) for k in curve.particles]
        slope = float(np.polyfit(np.log(curve.particles), np.log(ratios), 1)[0])
        curves.append(curve._asdict() | {"snr": ratios, "slope": slope})
        print(f"{curve.name}: slope {slope:+.3f}, law {curve.law:+.1f}", [round(ratio, 4) for ratio in ratios], flush=True)
    result = {
        "curves": curves,
        "seed": seed,
    }
    record.write("snr_law", result)
    draw(curves).savefig(record.RESULTS / "snr_law.png", dpi=150)


def draw(curves: list[dict]) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    for curve, color, marker in zip(curves, ("#D55E00", "#0072B2", "#009E73"), "os^", strict=True):
        particles, ratios = np.array(curve["particles"], float), np.array(curve["snr"])
        label = f"{curve['name']}: slope {curve['slope']:+.3f} (law {curve['law']:+.1f})"
        ax.plot(particles, ratios, marker, color=color, label=label)
        through_the_middle = np.log(ratios).mean() + curve["law"] * (np.log(particles) - np.log(particles).mean())
        ax.plot(particles, np.exp(through_the_middle), color=color, alpha=0.4)
    ax.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal-to-noise ratio of one gradient")
    ticks = sorted({k for curve in curves for k in curve["particles"]})
    ax.set_xticks(ticks, [str(k) for k in ticks])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
