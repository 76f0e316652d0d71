"""The known law of importance-weighted gradients: log SNR against log K (Rainforth et al. 2018, their Gaussian toy).

z ~ N(mu, I), x|z ~ N(z, I), q(z|x) = N(A x + b, 2/3 I) in 20 dimensions, with 1,024 data drawn from the model. A and b are
moved off their optimum by N(0, 0.01^2) as in the paper, mu by N(0, 0.1^2): moved by 0.01, the model's gradient is so small
that its O(1/K) bias rules until K is beyond what two cores can afford. The guide's gradient of the IWAE bound loses its signal
as K^(-1/2); the model's, and the guide's under DReG, gain it as K^(1/2).

    python experiments/snr_law.py          # 15 minutes on two cores; writes results/snr_law.json and snr_law.png
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

import pyrovae as pv

RESULTS = Path(__file__).parent / "results"
DIM, NUM_DATA = 20, 1024
CURVES = {
    "IWAE, guide": ("iwae", "b", -0.5),
    "IWAE, model": ("iwae", "mu", 0.5),
    "DReG, guide": ("dreg", "b", 0.5),
}


class Toy:
    def __init__(self, seed: int):
        random = np.random.default_rng(seed)

        def normal(*shape: int) -> Tensor:
            return torch.as_tensor(random.normal(size=shape), dtype=torch.float32)

        def moved(value: Tensor, by: float) -> Tensor:
            return (value + by * normal(*value.shape)).requires_grad_()

        z = normal(DIM) + normal(NUM_DATA, DIM)
        self.x = z + normal(NUM_DATA, DIM)

        # The optima: the data's mean for mu, and the posterior mean (x + mu) / 2 for A x + b.
        self.mu = moved(self.x.mean(0), 0.1)
        self.A = moved(torch.eye(DIM) / 2, 0.01)
        self.b = moved(self.x.mean(0) / 2, 0.01)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ self.A.T + self.b, (2 / 3) ** 0.5).to_event(1))


def gradient_draws(toy: Toy, estimator: str, num_particles: int, num_draws: int) -> dict[str, np.ndarray]:
    """Draws of the gradient over all data, each (R, 20)."""
    objective = pv.estimators.make_estimator({"kind": estimator, "num_particles": num_particles})
    draws: dict[str, list[np.ndarray]] = {"mu": [], "b": []}
    for seed in range(num_draws):
        torch.manual_seed(seed)
        objective.differentiable_loss(toy.model, toy.guide, toy.x).backward()
        for name, values in draws.items():
            parameter = getattr(toy, name)
            values.append(-parameter.grad.numpy().copy() / NUM_DATA)
        for parameter in (toy.mu, toy.A, toy.b):
            parameter.grad = None
    return {name: np.stack(values) for name, values in draws.items()}


def snr(draws: np.ndarray) -> float:
    """Root of the mean over coordinates of (E g / sd g)^2, the mean's own noise subtracted."""
    squared = draws.mean(0) ** 2 / draws.var(0, ddof=1) - 1 / len(draws)
    return float(np.sqrt(max(squared.mean(), 1e-12)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    toy = Toy(options.seed)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    for num_particles in options.particles:
        drawn = {kind: gradient_draws(toy, kind, num_particles, options.draws) for kind in ("iwae", "dreg")}
        for name, (kind, parameter, _) in CURVES.items():
            curves[name].append(snr(drawn[kind][parameter]))
        print(num_particles, {name: round(values[-1], 4) for name, values in curves.items()}, flush=True)
    log_k = np.log(options.particles)
    slopes = {name: float(np.polyfit(log_k, np.log(values), 1)[0]) for name, values in curves.items()}
    result = {
        "particles": options.particles,
        "snr": curves,
        "slopes": slopes,
        "expected": {name: law for name, (_, _, law) in CURVES.items()},
        "draws": options.draws,
        "seed": options.seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "pyrovae": pv.__version__},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "snr_law.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result).savefig(RESULTS / "snr_law.png", dpi=150)
    print(slopes)


def draw(result: dict) -> Figure:
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = figure.subplots()
    particles = np.array(result["particles"], float)
    for (name, values), color, marker in zip(result["snr"].items(), ("#D55E00", "#0072B2", "#009E73"), "os^", strict=True):
        law = result["expected"][name]
        ax.plot(particles, values, marker, color=color, label=f"{name}: slope {result['slopes'][name]:+.3f} (law {law:+.1f})")
        middle = np.exp(np.mean(np.log(values)) + law * (np.log(particles) - np.log(particles).mean()))
        ax.plot(particles, middle, color=color, alpha=0.4)
    ax.set(xscale="log", yscale="log", xlabel="particles K", ylabel="signal-to-noise ratio of one gradient")
    ax.set_xticks(particles, [f"{int(k)}" for k in particles])
    ax.minorticks_off()
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
