"""A deep Markov model in plain Pyro, trained and scored by pyrovae, which knows nothing of it.

Sequences of 8 to 16 steps in four dimensions: a point turns in the plane and is seen through a bent map, with noise. The model
is Krishnan, Shalit and Sontag's (Structured Inference Networks for Nonlinear State Space Models, 2017): a gated transition, an
emission network, and a guide that reads the observations backwards. Sequences stand in the "data" plate, time steps are a loop
inside it, and what lies past a sequence's end is masked. Importance weights over a whole sequence have heavy tails: the share
of sequences whose estimate is believable is printed too, and where it is low the number is rather a lower bound.

    python experiments/foreign/deep_markov.py          # half a minute on one core
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

import pyrovae as pv


class DeepMarkov(nn.Module):
    def __init__(self, data_dim: int = 4, latent_dim: int = 2, width: int = 24):
        super().__init__()
        self.start = nn.Parameter(torch.zeros(latent_dim))
        self.gate = nn.Sequential(nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, latent_dim), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, latent_dim))
        self.straight = nn.Linear(latent_dim, latent_dim)
        self.step_log_scale = nn.Parameter(torch.full((latent_dim,), -1.0))
        self.emission = nn.Sequential(nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, data_dim))
        self.noise_log_scale = nn.Parameter(torch.zeros(data_dim))
        self.backward_cell = nn.GRUCell(data_dim, width)
        self.from_latent = nn.Linear(latent_dim, width)
        self.loc, self.log_scale = nn.Linear(width, latent_dim), nn.Linear(width, latent_dim)

    def transition(self, z: Tensor) -> dist.Distribution:
        gate = self.gate(z)
        loc = (1 - gate) * self.straight(z) + gate * self.proposal(z)
        return dist.Normal(loc, self.step_log_scale.exp()).to_event(1)

    def model(self, x: Tensor, length: Tensor) -> None:
        pyro.module("deep_markov", self)
        with pyro.plate("data", x.shape[0]):
            z = self.start
            for t in range(x.shape[1]):
                with poutine.mask(mask=t < length):
                    distribution = self.transition(z) if t else dist.Normal(self.start, torch.ones_like(self.start)).to_event(1)
                    z = pyro.sample(f"z_{t + 1}", distribution)
                    seen = dist.Normal(self.emission(z), self.noise_log_scale.exp()).to_event(1)
                    pyro.sample(f"x_{t + 1}", seen, obs=x[:, t])

    def guide(self, x: Tensor, length: Tensor) -> None:
        pyro.module("deep_markov", self)
        future = [x.new_zeros(x.shape[0], self.backward_cell.hidden_size)]
        for t in reversed(range(x.shape[1])):
            # Padding leaves the state as it is, so that each sequence is read from its own end.
            inside = (t < length)[:, None]
            future.insert(0, torch.where(inside, self.backward_cell(x[:, t], future[0]), future[0]))
        with pyro.plate("data", x.shape[0]):
            z = self.start
            for t in range(x.shape[1]):
                h = (torch.tanh(self.from_latent(z)) + future[t]) / 2
                with poutine.mask(mask=t < length):
                    z = pyro.sample(f"z_{t + 1}", dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1))


def turning_points(num: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sequences (num, steps, 4), zeros past their end, and their lengths (num,)."""
    random = torch.Generator().manual_seed(seed)
    angle = torch.tensor(0.6)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    bent = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -1.0]])
    z, seen = torch.randn(num, 2, generator=random), []
    for _ in range(steps):
        z = z @ turn.T + 0.1 * torch.randn(num, 2, generator=random)
        seen.append(torch.tanh(z @ bent.T) + 0.1 * torch.randn(num, 4, generator=random))
    length = torch.randint(steps // 2, steps + 1, (num,), generator=random)
    return torch.stack(seen, 1) * (torch.arange(steps) < length[:, None])[..., None], length


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--num-data", type=int, default=400)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--estimator", default="iwae")
    options = parser.parse_args(argv)
    train, test = turning_points(options.num_data, options.steps, seed=0), turning_points(50, options.steps, seed=1)
    torch.manual_seed(0)
    pair = DeepMarkov()
    history = pv.fit(
        pair.model,
        pair.guide,
        train,
        estimator=options.estimator,
        epochs=options.epochs,
        batch_size=25,
        lr=1e-2,
        progress=False,
    )
    evidence = pv.log_marginal(pair.model, pair.guide, test, num_samples=options.num_samples, seed=0)
    steps = test[1].sum().item()
    inside = torch.arange(options.steps) < train[1][:, None]
    shown = train[0][inside]  # the steps as independent draws of one normal: what there is without a state
    alone = dist.Normal(shown.mean(0), shown.std(0)).to_event(1)
    baseline = alone.log_prob(test[0][torch.arange(options.steps) < test[1][:, None]]).mean().item()
    found = {
        "first bound, nats per sequence": history.bound[0],
        "last bound, nats per sequence": history.bound[-1],
        "test log p(x), nats per step": evidence.total / steps,
        "independent steps, nats per step": baseline,
        "share of believable estimates": float(evidence.reliable.mean()),
    }
    for name, value in found.items():
        print(f"{name:<34} {value:8.3f}")
    return found


if __name__ == "__main__":
    main()
