"""A semi-supervised VAE in plain Pyro, trained and scored by pyrovae, which knows nothing of it.

Handwritten digits, one in ten with its label: Kingma, Rezende, Mohamed and Welling's M2 (Semi-supervised Learning with Deep
Generative Models, 2014), p(y) p(z) p(x|z, y) with the guide q(y|x) q(z|x, y). Where the label is known, the guide's q(y|x) is
all at it. Training sums the bound over the labels by Pyro's enumeration; ``log_marginal`` draws them, and gives log p(x, y) or
log p(x) per datum. The classifier's own term, which is no density of the data, is in the program that trains and not in the one
that is scored.

    python experiments/foreign/semi_supervised_vae.py  # under a minute on one core
"""

from __future__ import annotations

import argparse

import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import pyrovae as pv

CLASSES, PIXELS = 10, 64


def beside(a: Tensor, b: Tensor) -> Tensor:
    """Both in one vector, whatever particles or labels lead."""
    batch = torch.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in (a, b)], -1)


class Digits(nn.Module):
    def __init__(self, latent_dim: int = 6, width: int = 64):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(PIXELS, width), nn.Tanh(), nn.Linear(width, CLASSES))
        self.features = nn.Sequential(nn.Linear(PIXELS + CLASSES, width), nn.Tanh())
        self.loc, self.log_scale = nn.Linear(width, latent_dim), nn.Linear(width, latent_dim)
        self.decoder = nn.Sequential(nn.Linear(latent_dim + CLASSES, width), nn.Tanh(), nn.Linear(width, PIXELS))
        self.latent_dim = latent_dim

    def model(self, x: Tensor, label: Tensor) -> None:
        self.joint(x)

    def trained_model(self, x: Tensor, label: Tensor) -> None:
        self.joint(x, label)

    def joint(self, x: Tensor, label: Tensor | None = None) -> None:
        pyro.module("digits", self)
        with pyro.plate("data", x.shape[0]):
            y = pyro.sample("y", dist.OneHotCategorical(logits=x.new_zeros(CLASSES)))
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(beside(z, y))).to_event(1), obs=x)
            if label is not None:
                known = dist.Categorical(logits=self.classifier(x)).mask(label >= 0)
                pyro.sample("label", known, obs=label.clamp(min=0))

    def guide(self, x: Tensor, label: Tensor) -> None:
        pyro.module("digits", self)
        one_hot = (label[:, None] == torch.arange(CLASSES)).to(x.dtype)
        probs = torch.where(label[:, None] >= 0, one_hot, torch.softmax(self.classifier(x), -1))
        with pyro.plate("data", x.shape[0]):
            y = pyro.sample("y", dist.OneHotCategorical(probs), infer={"enumerate": "parallel"})
            h = self.features(beside(x, y))
            pyro.sample("z", dist.Normal(self.loc(h), self.log_scale(h).exp()).to_event(1))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--num-data", type=int, default=1500)
    parser.add_argument("--num-samples", type=int, default=500)
    parser.add_argument("--estimator", default="trace_enum_elbo", help="or one that takes discrete sites, such as vimco or rws")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    x, truth = torch.as_tensor(digits.data > 7).float()[order], torch.as_tensor(digits.target)[order]
    label = torch.where(torch.arange(len(x)) % 10 == 0, truth, -1)
    train, test = (x[: options.num_data], label[: options.num_data]), (x[1600:], torch.full_like(truth[1600:], -1))
    pair = Digits()
    history = pv.fit(
        pair.trained_model,
        pair.guide,
        train,
        estimator=options.estimator,
        epochs=options.epochs,
        batch_size=50,
        lr=3e-3,
        progress=False,
    )
    evidence = pv.log_marginal(pair.model, pair.guide, test, num_samples=options.num_samples, seed=0)
    with torch.no_grad():
        right = (pair.classifier(test[0]).argmax(-1) == truth[1600:]).float().mean().item()
    frequency = (train[0].sum(0) + 0.5) / (len(train[0]) + 1)
    found = {
        "first bound, nats": history.bound[0],
        "last bound, nats": history.bound[-1],
        "test log p(x), nats": evidence.mean,
        "independent pixels, nats": dist.Bernoulli(frequency).to_event(1).log_prob(test[0]).mean().item(),
        "test accuracy": right,
        "share of believable estimates": float(evidence.reliable.mean()),
    }
    for name, value in found.items():
        print(f"{name:<34} {value:8.3f}")
    return found


if __name__ == "__main__":
    main()
