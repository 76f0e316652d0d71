"""A conditional VAE in plain Pyro, trained and scored by pyrovae, which knows nothing of it.

The lower half of a handwritten digit given its upper half (Sohn, Lee and Yan, Learning Structured Output Representation using
Deep Conditional Generative Models, 2015): p(z|y) p(x|z, y), and a guide that sees both halves. The prior is a network too, and
``log_marginal`` estimates log p(x|y).

    python experiments/foreign/conditional_vae.py      # half a minute on one core
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyrovae as pv

HALF = 32


def gaussian(inputs: int, outputs: int, width: int) -> nn.Module:
    """A network to means and log-scales, the latter zero at first."""
    net = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 2 * outputs))
    with torch.no_grad():
        net[-1].weight[outputs:].zero_()
        net[-1].bias.zero_()
    return net


class Halves(nn.Module):
    def __init__(self, latent_dim: int = 8, width: int = 64):
        super().__init__()
        self.prior = gaussian(HALF, latent_dim, width)
        self.recognition = gaussian(2 * HALF, latent_dim, width)
        self.decoder = nn.Sequential(nn.Linear(latent_dim + HALF, width), nn.Tanh(), nn.Linear(width, HALF))

    def model(self, lower: Tensor, upper: Tensor) -> None:
        pyro.module("halves", self)
        with pyro.plate("data", lower.shape[0]):
            loc, log_scale = self.prior(upper).chunk(2, -1)
            z = pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))
            seen = torch.cat([z, upper.expand(*z.shape[:-1], HALF)], -1)
            pyro.sample("lower", dist.Bernoulli(logits=self.decoder(seen)).to_event(1), obs=lower)

    def guide(self, lower: Tensor, upper: Tensor) -> None:
        pyro.module("halves", self)
        with pyro.plate("data", lower.shape[0]):
            loc, log_scale = self.recognition(torch.cat([lower, upper], -1)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-data", type=int, default=1500)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--estimator", default="dreg")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    pixels = torch.as_tensor(load_digits().data > 7).float()
    pixels = pixels[torch.randperm(len(pixels))]
    upper, lower = pixels.split(HALF, -1)
    train, test = (lower[: options.num_data], upper[: options.num_data]), (lower[1600:], upper[1600:])
    pair = Halves()
    history = pv.fit(
        pair.model,
        pair.guide,
        train,
        estimator=options.estimator,
        epochs=options.epochs,
        batch_size=50,
        lr=3e-3,
        progress=False,
    )
    evidence = pv.log_marginal(pair.model, pair.guide, test, num_samples=options.num_samples, seed=0)
    frequency = (train[0].sum(0) + 0.5) / (len(train[0]) + 1)
    found = {
        "first bound, nats": history.bound[0],
        "last bound, nats": history.bound[-1],
        "test log p(lower|upper), nats": evidence.mean,
        "independent pixels, nats": dist.Bernoulli(frequency).to_event(1).log_prob(test[0]).mean().item(),
        "share of believable estimates": float(evidence.reliable.mean()),
    }
    for name, value in found.items():
        print(f"{name:<34} {value:8.3f}")
    return found


if __name__ == "__main__":
    main()
