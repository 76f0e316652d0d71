"""Pairs of Pyro programs that are not our VAE, each with what is known of it exactly.

A program keeps the values it drew last in ``seen``, so that a test can compute the same log-probabilities by hand.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from scipy import stats
from torch import Tensor, nn
from torch.distributions import constraints


class LinearGaussian:
    """z ~ N(0, I), x|z ~ N(Wz + b, s^2 I), with its exact posterior, or one inflated by ``spread``, as guide."""

    def __init__(self, latent_dim: int = 2, data_dim: int = 3, noise: float = 0.7, spread: float = 1.0, seed: int = 3):
        random = np.random.default_rng(seed)
        self.weight = torch.as_tensor(random.normal(size=(data_dim, latent_dim)))
        self.bias = torch.as_tensor(random.normal(size=data_dim))
        self.noise, self.spread, self.latent_dim = noise, spread, latent_dim
        self.seen: dict[str, Tensor] = {}

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(self.latent_dim).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.weight.T + self.bias, self.noise).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            self.seen["z"] = pyro.sample("z", self.posterior(x))

    def posterior(self, x: Tensor) -> dist.Distribution:
        precision = torch.eye(self.latent_dim).double() + self.weight.T @ self.weight / self.noise**2
        covariance = torch.linalg.inv(precision)
        mean = (x - self.bias) @ self.weight @ covariance / self.noise**2
        return dist.MultivariateNormal(mean, self.spread**2 * covariance)

    def sample(self, num: int, seed: int = 0) -> Tensor:
        random = np.random.default_rng(seed)
        z = random.normal(size=(num, self.latent_dim))
        x = z @ self.weight.numpy().T + self.bias.numpy() + self.noise * random.normal(size=(num, len(self.bias)))
        return torch.as_tensor(x)

    def log_px(self, x: Tensor) -> np.ndarray:
        covariance = self.weight.numpy() @ self.weight.numpy().T + self.noise**2 * np.eye(len(self.bias))
        return np.atleast_1d(stats.multivariate_normal(self.bias.numpy(), covariance).logpdf(x.numpy()))


def pyro_module_function_pair(prefix: str = "foreign") -> SimpleNamespace:
    """Functions that register plain networks with ``pyro.module``; sites ``h`` and ``y`` in the plate ``rows``."""
    decoder, encoder, seen = nn.Linear(2, 3), nn.Linear(3, 4), {}

    def model(y: Tensor) -> None:
        pyro.module(f"{prefix}.decoder", decoder)
        with pyro.plate("rows", len(y)):
            h = pyro.sample("h", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=decoder(h)).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module(f"{prefix}.encoder", encoder)
        with pyro.plate("rows", len(y)):
            loc, log_scale = encoder(y).chunk(2, -1)
            seen["h"] = pyro.sample("h", dist.Normal(loc, log_scale.exp()).to_event(1))

    parameters = [*decoder.parameters(), *encoder.parameters()]
    return SimpleNamespace(model=model, guide=guide, seen=seen, parameters=parameters, decoder=decoder, encoder=encoder)


def pyro_nn_pair() -> SimpleNamespace:
    """Two ``PyroModule`` instances, one with a constrained ``PyroParam``."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[nn.Linear](2, 3)
            self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

        def forward(self, x: Tensor) -> None:
            noise = self.noise
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(self.linear(z), noise).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.loc, self.log_scale = PyroModule[nn.Linear](3, 2), PyroModule[nn.Linear](3, 2)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.loc(x), self.log_scale(x).exp()).to_event(1))

    model, guide = Model(), Guide()
    return SimpleNamespace(model=model, guide=guide, parameters=[*model.parameters(), *guide.parameters()])


def bare_param_pair() -> SimpleNamespace:
    """Nothing but ``pyro.param``, one of them constrained; everything is scalar."""
    seen: dict[str, Tensor] = {}

    def model(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.8))
        noise = pyro.param("noise", torch.tensor(0.6), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(slope * z, noise), obs=x)

    def guide(x: Tensor) -> None:
        gain = pyro.param("gain", torch.tensor(0.3))
        spread = pyro.param("spread", torch.tensor(0.9), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            seen["z"] = pyro.sample("z", dist.Normal(gain * x, spread))

    return SimpleNamespace(model=model, guide=guide, seen=seen, names={"slope", "noise", "gain", "spread"})


def two_latents_pair() -> SimpleNamespace:
    """A chain a -> b -> y of vectors, with other site names and another plate name; the guide goes b, then a."""
    forward, observe = nn.Linear(2, 3), nn.Linear(3, 4)
    up, back, seen = nn.Linear(4, 3), nn.Linear(3, 2), {}

    def model(y: Tensor) -> None:
        pyro.module("chain.forward", forward)
        pyro.module("chain.observe", observe)
        with pyro.plate("rows", len(y)):
            a = pyro.sample("a", dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1))
            b = pyro.sample("b", dist.Normal(forward(a), 0.5).to_event(1))
            pyro.sample("y", dist.Normal(observe(b), 0.4).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("chain.up", up)
        pyro.module("chain.back", back)
        with pyro.plate("rows", len(y)):
            b = seen["b"] = pyro.sample("b", dist.Normal(up(y), 0.6).to_event(1))
            seen["a"] = pyro.sample("a", dist.Normal(back(b), 0.8).to_event(1))

    nets = SimpleNamespace(forward=forward, observe=observe, up=up, back=back)
    parameters = [p for net in (forward, observe, up, back) for p in net.parameters()]
    return SimpleNamespace(model=model, guide=guide, seen=seen, nets=nets, parameters=parameters)


def nested_plates_pair(data_dim: int) -> SimpleNamespace:
    """A latent per datum, a latent and an observation per datum and item; the data plate at ``data_dim``, -1 or -2.

    The argument has shape (B, T) with the data plate at -2, and (T, B) with it at -1.
    """
    item_dim, seen = -3 - data_dim, {}

    def plates(x: Tensor) -> tuple:
        return pyro.plate("data", x.shape[data_dim], dim=data_dim), pyro.plate("items", x.shape[item_dim], dim=item_dim)

    def model(x: Tensor) -> None:
        data, items = plates(x)
        with data:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with items:
                u = pyro.sample("u", dist.Normal(z, 0.5))
                pyro.sample("x", dist.Normal(u, 0.3), obs=x)

    def guide(x: Tensor) -> None:
        data, items = plates(x)
        with data:
            seen["z"] = pyro.sample("z", dist.Normal(0.4 * x.mean(item_dim, keepdim=True), 0.7))
            with items:
                seen["u"] = pyro.sample("u", dist.Normal(0.8 * x, 0.4))

    return SimpleNamespace(model=model, guide=guide, seen=seen, item_dim=item_dim)


def curved_pair(latent_dim: int = 2, data_dim: int = 3, seed: int = 1) -> SimpleNamespace:
    """z ~ N(0, I), x|z normal about a tanh network of z, in float64; the guide is affine and not exact."""
    random = np.random.default_rng(seed)
    inner, outer = (torch.as_tensor(random.normal(size=size)) for size in [(6, latent_dim), (data_dim, 6)])
    inner = 0.5 * inner  # so that few posteriors have two modes
    back, log_scale = (
        torch.as_tensor(0.2 * random.normal(size=(latent_dim, data_dim))),
        torch.full((latent_dim,), -0.3).double(),
    )

    def decode(z: Tensor) -> Tensor:
        return torch.tanh(z @ inner.T) @ outer.T

    def model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(torch.zeros(latent_dim).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decode(z), 0.6).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x @ back.T, log_scale.exp()).to_event(1))

    def sample(num: int, seed: int = 0) -> Tensor:
        random = np.random.default_rng(seed)
        z = torch.as_tensor(random.normal(size=(num, latent_dim)))
        return decode(z) + 0.6 * torch.as_tensor(random.normal(size=(num, data_dim)))

    return SimpleNamespace(model=model, guide=guide, decode=decode, noise=0.6, sample=sample)


def counts_pair() -> SimpleNamespace:
    """A positive latent: rate ~ Gamma(3, 1.5), count|rate ~ Poisson, so p(count) is negative binomial; another plate's name."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.Gamma(torch.tensor(3.0).double(), 1.5))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("rate", dist.LogNormal(((y.double() + 3) / 2.5).log(), 0.4))

    def log_px(y: Tensor) -> np.ndarray:
        return stats.nbinom(3.0, 1.5 / 2.5).logpmf(y.numpy())

    return SimpleNamespace(model=model, guide=guide, log_px=log_px)


def switches_pair() -> SimpleNamespace:
    """Discrete latents: a class c for each datum and a switch s for each of its two items; x (B, 2) normal."""
    chance = torch.tensor([0.2, 0.5, 0.3]).double()

    def model(x: Tensor) -> None:
        items = pyro.plate("items", 2, dim=-1)
        with pyro.plate("data", x.shape[0], dim=-2):
            c = pyro.sample("c", dist.Categorical(chance))
            with items:
                s = pyro.sample("s", dist.Bernoulli(0.2 + 0.3 * c.double()))
                pyro.sample("x", dist.Normal(c.double() - 2 * s, 0.8), obs=x)

    def guide(x: Tensor) -> None:
        items = pyro.plate("items", 2, dim=-1)
        with pyro.plate("data", x.shape[0], dim=-2):
            pyro.sample("c", dist.Categorical(torch.tensor([0.3, 0.4, 0.3]).double()))
            with items:
                pyro.sample("s", dist.Bernoulli(torch.sigmoid(-x)))

    def log_px(x: Tensor) -> np.ndarray:
        total = np.zeros(len(x))
        for c, weight in enumerate(chance.numpy()):
            on = 0.2 + 0.3 * c
            each = on * stats.norm(c - 2, 0.8).pdf(x.numpy()) + (1 - on) * stats.norm(c, 0.8).pdf(x.numpy())
            total += weight * each.prod(1)
        return np.log(total)

    return SimpleNamespace(model=model, guide=guide, log_px=log_px)
