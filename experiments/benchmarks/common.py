"""What the benchmarks share: one network in plain PyTorch, and the same network in other hands.

The network is written as a person without a library would write it. Ours, Pyro's and NumPyro's take over its very weights, so
that all contenders of a benchmark do the same arithmetic, and a check can say so.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import pyrovae as pv

sys.path.append(str(Path(__file__).parents[1]))
from record import RESULTS, write  # noqa: F401  (the benchmarks write their records by it)

PIXELS = 784
os.environ.setdefault("JAX_PLATFORMS", "cpu")


class LeftOut(Exception):  # noqa: N818
    """A contender that cannot take part, and why."""


def library(name: str) -> Any:
    """A module of an optional library."""
    package = name.partition(".")[0]
    if util.find_spec(package) is None:
        raise LeftOut(f"{package} is not installed")
    return import_module(name)


def lap(contenders: dict[str, Callable[[], Any]], order: np.random.Generator) -> dict[str, tuple[float, Any]]:
    """Run each once, in an order drawn afresh: the seconds that it took, and what it returned."""
    found = {}
    for name in order.permutation(list(contenders)):
        time.sleep(0.01)  # until the last contender's threads no longer spin for work
        began = time.perf_counter()
        returned = contenders[name]()
        found[str(name)] = time.perf_counter() - began, returned
    return found


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    """The median over laps of the ratio of two contenders' times: steadier than that of medians, both ran in one moment."""
    return round(float(np.median(np.array(times[above]) / np.array(times[below]))), 3)


def agree(name: str, found: tuple[float, float], wanted: tuple[float, float]) -> None:
    """Stop where a mean with its standard error is more than four of them from another."""
    if not abs(found[0] - wanted[0]) <= 4 * np.hypot(found[1], wanted[1]):
        raise SystemExit(
            f"{name} has {found[0]:.4f} +- {found[1]:.4f} nats per datum where the network's own is {wanted[0]:.4f} +- "
            f"{wanted[1]:.4f}: it does other arithmetic, so its time would mean nothing."
        )


def table(heads: tuple[str, str, str], times: dict, ratios: dict, to_ours: dict, left_out: dict[str, str]) -> None:
    """Print a contender a line, the fastest first: its time, its ratio to the baseline, and the ratio of ours to it."""
    print(f"\n{heads[0]:<38}{heads[1]:>12}{heads[2]:>12}{'ours / it':>12}")
    for name in sorted(times, key=lambda each: ratios[each]):
        print(f"  {name:<36}" + "".join(f"{each[name]:12.3f}" for each in (times, ratios, to_ours) if name in each))
    for name, reason in left_out.items():
        print(textwrap.fill(f"{name}: left out, {reason}", 79, initial_indent="  ", subsequent_indent="    "))


class Gated(nn.Module):
    def __init__(self, wide: int, narrow: int):
        super().__init__()
        self.linear, self.gate = nn.Linear(wide, narrow), nn.Linear(wide, narrow)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.sigmoid(self.gate(x))


class Inference(nn.Module):
    """x (..., 784) -> the mean and the log-scale of q(z|x), each (..., L)."""

    def __init__(self, body: nn.Module, features: int, latent_dim: int):
        super().__init__()
        self.body = body
        self.loc, self.log_scale = nn.Linear(features, latent_dim), nn.Linear(features, latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.loc(h), self.log_scale(h)


class Network(nn.Module):
    """A VAE of binary 28 x 28 images, by hand; data and logits are flat, (..., 784).

    Args:
        kind: ``"tanh"`` (784-200-200-50), ``"gated"`` (784-300-300-40) or ``"conv"`` (channels 32 and 64, 50 latents).
        components: pseudo-inputs of a VampPrior; 0 for a standard normal one.
        spread: standard deviation of the guide's means and log-scales: far enough from the prior to see if one is left out.
    """

    def __init__(self, kind: str, components: int = 0, spread: float = 0.5):
        super().__init__()
        self.kind, self.latent_dim = kind, 40 if kind == "gated" else 50
        latent = self.latent_dim
        if kind == "conv":
            features = 64 * 7 * 7
            body = nn.Sequential(
                nn.Unflatten(-1, (1, 28, 28)), nn.Conv2d(1, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
                nn.Flatten(-3),
            )  # fmt: skip
            self.decoder = nn.Sequential(
                nn.Linear(latent, features), nn.Unflatten(-1, (64, 7, 7)), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1),
                nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1), nn.Flatten(-3),
            )  # fmt: skip
        else:
            features = 300 if kind == "gated" else 200

            def layer(wide: int) -> list[nn.Module]:
                return [Gated(wide, features)] if kind == "gated" else [nn.Linear(wide, features), nn.Tanh()]

            body = nn.Sequential(*layer(PIXELS), *layer(features))
            self.decoder = nn.Sequential(*layer(latent), *layer(features), nn.Linear(features, PIXELS))
        inference = self.inference = Inference(body, features, latent)
        with torch.no_grad():
            for head, values in zip((inference.loc, inference.log_scale), inference(binary_images(100)), strict=True):
                head.weight *= spread / values.std()
        self.pseudo_inputs = nn.Parameter(0.05 + 0.01 * torch.randn(components, PIXELS)) if components else None

    def log_weights(self, x: Tensor, particles: int) -> Tensor:
        """log p(x, z) - log q(z|x) at draws from q, shape (K, B)."""
        loc, log_scale = self.inference(x)
        noise = torch.randn(particles, *loc.shape)
        z = loc + log_scale.exp() * noise
        logits = self.decoder(z.flatten(0, 1)).unflatten(0, z.shape[:2])
        log_likelihood = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        # The constants of the two normals cancel.
        return log_likelihood + self._log_prior(z) + (0.5 * noise**2 + log_scale).sum(-1)

    def _log_prior(self, z: Tensor) -> Tensor:
        if self.pseudo_inputs is None:
            return -0.5 * (z**2).sum(-1)
        loc, log_scale = self.inference(self.pseudo_inputs.clamp(0.0, 1.0))
        each = -(0.5 * ((z[..., None, :] - loc) * torch.exp(-log_scale)) ** 2 + log_scale).sum(-1)
        return torch.logsumexp(each, -1) - np.log(len(loc))


def as_vae(net: Network) -> pv.VAE:
    """Ours, with a copy of the network's weights."""
    vae = pv.make_vae(
        (1, 28, 28) if net.kind == "conv" else PIXELS,
        latent_dim=net.latent_dim,
        prior="standard_normal" if net.pseudo_inputs is None else {"kind": "vamp", "components": len(net.pseudo_inputs)},
        body={"tanh": "mlp", "gated": "gated_mlp", "conv": "conv"}[net.kind],
        hidden={"tanh": [200, 200], "gated": [300, 300], "conv": [32, 64]}[net.kind],
        activation="tanh" if net.kind == "tanh" else None,
    )
    pairs = [(vae.likelihood.decoder, net.decoder), (vae.encoder.body, net.inference.body)]
    pairs += [(vae.encoder.loc, net.inference.loc), (vae.encoder.log_scale, net.inference.log_scale)]
    with torch.no_grad():
        for ours, theirs in pairs:
            for mine, weight in zip(ours.parameters(), theirs.parameters(), strict=True):
                mine.copy_(weight)
        if net.pseudo_inputs is not None:
            (mine,) = [parameter for parameter in vae.prior.parameters() if parameter.shape == net.pseudo_inputs.shape]
            mine.copy_(net.pseudo_inputs)
    return vae


def pyro_pair(net: Network, name: str) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
    """A plain Pyro pair over the network itself."""
    zeros, ones = torch.zeros(net.latent_dim), torch.ones(net.latent_dim)

    def prior() -> dist.Distribution:
        if net.pseudo_inputs is None:
            return dist.Normal(zeros, ones).to_event(1)
        loc, log_scale = net.inference(pyro.param(f"{name}.pseudo_inputs", net.pseudo_inputs).clamp(0.0, 1.0))
        return dist.MixtureSameFamily(
            dist.Categorical(logits=torch.zeros(len(loc))), dist.Normal(loc, log_scale.exp()).to_event(1)
        )

    def model(x: Tensor) -> None:
        pyro.module(f"{name}.decoder", net.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Bernoulli(logits=net.decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module(f"{name}.inference", net.inference)
        with pyro.plate("data", len(x)):
            loc, log_scale = net.inference(x)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


def numpyro_pair(net: Network) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """A NumPyro pair with a copy of the network's weights, each a ``numpyro.param``."""
    numpyro, distributions, jnp = library("numpyro"), library("numpyro.distributions"), library("jax.numpy")
    inference = net.inference
    parts = {"decoder": net.decoder, "body": inference.body, "loc": inference.loc, "log_scale": inference.log_scale}
    starts, functions = {}, {}
    for part, module in parts.items():
        starts[part], functions[part] = as_jax(module)
    pseudo = None if net.pseudo_inputs is None else net.pseudo_inputs.detach().numpy()

    def run(part: str, x: Any) -> Any:
        return functions[part]([numpyro.param(f"{part}.{i}", start) for i, start in enumerate(starts[part])], x)

    def normal(x: Any) -> Any:
        h = run("body", x)
        return distributions.Normal(run("loc", h), jnp.exp(run("log_scale", h))).to_event(1)

    def prior() -> Any:
        if pseudo is None:
            return distributions.Normal(jnp.zeros(net.latent_dim), 1.0).to_event(1)
        mixing = distributions.Categorical(logits=jnp.zeros(len(pseudo)))
        inputs = jnp.clip(numpyro.param("pseudo_inputs", jnp.asarray(pseudo)), 0.0, 1.0)
        return distributions.MixtureSameFamily(mixing, normal(inputs))

    def model(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            z = numpyro.sample("z", prior())
            numpyro.sample("x", distributions.Bernoulli(logits=run("decoder", z)).to_event(1), obs=x)

    def guide(x: Any) -> None:
        with numpyro.plate("data", x.shape[0]):
            numpyro.sample("z", normal(x))

    return model, guide


def as_jax(module: nn.Module) -> tuple[list[Any], Callable[[list[Any], Any], Any]]:
    """A torch module as a list of JAX arrays and a function of them; images are (..., H, W, C) within, as XLA likes them."""
    jax, jnp = library("jax"), library("jax.numpy")
    if isinstance(module, nn.Sequential | Gated):
        parts = [as_jax(child) for child in module.children()]
        ends = np.cumsum([0] + [len(weights) for weights, _ in parts])

        def run(weights: list[Any], x: Any) -> Any:
            pieces = [(weights[ends[i] : ends[i + 1]], part) for i, (_, part) in enumerate(parts)]
            if isinstance(module, Gated):
                (linear, f), (gate, g) = pieces
                return f(linear, x) * jax.nn.sigmoid(g(gate, x))
            for piece, part in pieces:
                x = part(piece, x)
            return x

        return [array for weights, _ in parts for array in weights], run
    if isinstance(module, nn.Tanh | nn.ReLU):
        return [], lambda weights, x: jnp.tanh(x) if isinstance(module, nn.Tanh) else jax.nn.relu(x)
    if isinstance(module, nn.Unflatten):
        return [], lambda weights, x: jnp.moveaxis(x.reshape(*x.shape[:-1], *module.unflattened_size), -3, -1)
    if isinstance(module, nn.Flatten):
        return [], lambda weights, x: jnp.moveaxis(x, -1, -3).reshape(*x.shape[:-3], -1)
    weight, bias = module.weight.detach(), jnp.array(module.bias.detach().numpy())
    if isinstance(module, nn.Linear):
        return [jnp.array(weight.T.numpy()), bias], lambda weights, x: x @ weights[0] + weights[1]

    def convolve(kernel: Any, images: Any) -> Any:
        return jax.lax.conv_general_dilated(images, kernel, (2, 2), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def transposed(kernel: Any, images: Any) -> Any:
        number, height, width, _ = images.shape
        spread = jax.ShapeDtypeStruct((number, 2 * height, 2 * width, kernel.shape[2]), images.dtype)
        return jax.linear_transpose(lambda y: convolve(kernel, y), spread)(images)[0]

    # Left to itself XLA takes ten times as long for the kernel's gradient of a transposed convolution.
    expand = jax.custom_vjp(transposed)
    expand.defvjp(
        lambda kernel, images: (expand(kernel, images), (kernel, images)),
        lambda saved, g: (jax.vjp(lambda kernel: convolve(kernel, g), saved[0])[1](saved[1])[0], convolve(saved[0], g)),
    )
    apply = convolve if isinstance(module, nn.Conv2d) else expand
    return [jnp.array(weight.permute(2, 3, 1, 0).numpy()), bias], lambda weights, x: apply(weights[0], x) + weights[1]


def as_pythae(net: Network, particles: int = 1) -> Any:
    """pythae's VAE, or its IWAE, around a copy of the network."""
    models, nn_, utils = library("pythae.models"), library("pythae.models.nn"), library("pythae.models.base.base_utils")

    class Encoder(nn_.BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.inference = net.inference

        def forward(self, x: Tensor) -> Any:
            loc, log_scale = self.inference(x)
            return utils.ModelOutput(embedding=loc, log_covariance=2 * log_scale)

    class Decoder(nn_.BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = net.decoder

        def forward(self, z: Tensor) -> Any:
            return utils.ModelOutput(reconstruction=torch.sigmoid(self.decoder(z)))

    options = {"input_dim": (PIXELS,), "latent_dim": net.latent_dim, "reconstruction_loss": "bce"}
    if particles == 1:
        return models.VAE(models.VAEConfig(**options), Encoder(), Decoder())
    return models.IWAE(models.IWAEConfig(**options, number_samples=particles), Encoder(), Decoder())


def products(module: nn.Module, rows: int, *, backward: bool, to_the_input: bool = True) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The matrix products of a module's linear layers, forward and backward, as triples (a, b, out) for ``torch.mm``."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        weight, x, y = layer.weight.detach(), torch.randn(rows, layer.in_features), torch.randn(rows, layer.out_features)
        found.append((x, weight.T, torch.empty_like(y)))
        if backward:
            found.append((y.T, x, torch.empty_like(weight)))
            if to_the_input or layer.in_features != layers[0].in_features:
                found.append((y, weight, torch.empty_like(x)))
    return found


def binary_images(number: int, seed: int = 0) -> Tensor:
    """Random binary images, (N, 784)."""
    return torch.bernoulli(torch.full((number, PIXELS), 0.3), generator=torch.Generator().manual_seed(seed))
