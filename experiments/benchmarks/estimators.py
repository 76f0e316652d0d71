"""What each estimator costs over the passes that it needs: one forward run of the pair, one backward pass.

The network is the importance-weighted autoencoder paper's 784-200-200-50 with tanh, batch 100, K = 8. The baseline draws the
same log-weights and sends one gradient back through their sum. All contenders run in turn, interleaved in one process; the
ratio of medians counts, since the machine is noisy.

    python experiments/benchmarks/estimators.py     # two minutes; writes ../results/estimator_cost.json
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pyro
import torch
from common import write

import pyrovae as pv

BATCH, PARTICLES, LAPS = 100, 8, 100
NAMES = "elbo iwae stl dreg gdreg miwae ciwae piwae renyi vr_max tvo rws jvi vimco ovis score_elbo".split()
# GDReG's gradient with respect to the prior needs the path's gradient first, so its own baseline has that pass too.
BASELINES = {"gdreg": "baseline with a backward pass to the latents"}


def main() -> None:
    torch.manual_seed(0)
    vae = pv.make_vae(784, latent_dim=50, likelihood="bernoulli", hidden=[200, 200], activation="tanh")
    x = torch.bernoulli(torch.full((BATCH, 784), 0.3))

    def baseline() -> None:
        weights = pv.log_weights(vae.model, vae.guide, x, num_particles=PARTICLES, max_plate_nesting=1)
        weights.log_weights.sum().backward()

    def baseline_to_latents() -> None:
        weights = pv.log_weights(vae.model, vae.guide, x, num_particles=PARTICLES, max_plate_nesting=1, gradients="leaf")
        (leaf,) = weights.leaves
        (gradient,) = torch.autograd.grad(weights.log_weights.sum(), leaf.value, retain_graph=True)
        (weights.log_weights.sum() + (gradient * leaf.sample).sum()).backward()

    def step(estimator: pyro.infer.ELBO) -> Callable[[], object]:
        return lambda: estimator.loss_and_grads(vae.model, vae.guide, x)

    contenders: dict[str, Callable[[], object]] = {"baseline": baseline, BASELINES["gdreg"]: baseline_to_latents}
    for name in NAMES:
        contenders[name] = step(pv.estimators.make_estimator({"kind": name, "num_particles": PARTICLES}))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with pyro.validation_enabled(False):
        for lap in range(LAPS + 3):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                if lap >= 3:
                    times[name].append(time.perf_counter() - began)
                vae.zero_grad(set_to_none=True)
    medians = {name: float(np.median(values)) for name, values in times.items()}
    # The ratio within a lap is steadier than the ratio of medians: both ran in the same moment.
    ratios = {
        name: float(np.median(np.array(times[name]) / np.array(times[BASELINES.get(name, "baseline")]))) for name in times
    }
    result = {
        "network": "784-200-200-50, tanh, Bernoulli, diagonal normal guide",
        "batch": BATCH,
        "particles": PARTICLES,
        "laps": LAPS,
        "milliseconds": {name: round(1e3 * value, 3) for name, value in medians.items()},
        "ratio": {name: round(value, 3) for name, value in ratios.items()},
        "other_baselines": BASELINES,
        "seed": 0,
    }
    write("estimator_cost", result)
    for name, ratio in sorted(ratios.items(), key=lambda item: item[1]):
        print(f"{name:<46} {1e3 * medians[name]:8.2f} ms  {ratio:5.2f} x")


if __name__ == "__main__":
    main()
