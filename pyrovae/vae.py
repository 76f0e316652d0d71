"""The most common pair: one latent, one observation, a prior, a likelihood and an encoder."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from . import checkpoint
from .encoders import Encoder
from .likelihoods import Likelihood
from .nn import Activation, Shape, as_shape
from .priors import Prior
from .registry import build, describe, find

if TYPE_CHECKING:
    from .evidence import Evidence
    from .training import History

_counter = itertools.count()


class VAE(nn.Module):
    r"""A variational autoencoder as a pair of Pyro programs.

    .. math:: p_\theta(x, z) = p_\theta(z) \, p_\theta(x \mid z), \qquad q_\phi(z \mid x) \approx p_\theta(z \mid x)

    ``vae.model(x)`` and ``vae.guide(x)`` are valid Pyro: they run under ``pyro.infer.SVI``, ``Predictive`` and
    ``poutine.trace``. The sites are ``"z"`` and ``"x"`` in the plate ``"data"`` at dim -1.

    Args:
        prior: p(z).
        likelihood: p(x|z), with its decoder.
        encoder: q(z|x).
        name: the name under which Pyro's parameter store knows this instance; unique unless set, so that two models in one
            process never share parameters.

    Raises:
        ValueError: the three parts disagree on the latent dimension.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> import torch
        >>> import pyrovae as pv
        >>> vae = pv.VAE(prior=pv.priors.StandardNormal(2),
        ...              likelihood=pv.likelihoods.Bernoulli(pv.nn.MLP(2, [16], 9)),
        ...              encoder=pv.encoders.DiagonalNormal(pv.nn.MLP(9, [16]), 2))
        >>> vae.sample(5).shape
        torch.Size([5, 9])
    """

    def __init__(self, prior: Prior, likelihood: Likelihood, encoder: Encoder, name: str | None = None):
        super().__init__()
        latents = {"prior": prior.latent_dim, "encoder": encoder.latent_dim}
        decoder_in = getattr(likelihood.decoder, "in_shape", None)
        if decoder_in is not None:
            latents["decoder"] = math.prod(decoder_in)
        if len(set(latents.values())) > 1:
            said = ", ".join(f"{part} {size}" for part, size in latents.items())
            raise ValueError(f"The parts disagree on the latent dimension ({said}): build them with the same one.")
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder
        self.name = name or f"vae{next(_counter)}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has parameters of its own: under the original's name Pyro's store would hand it the original's.
        super().__setstate__(state)
        self.name = f"vae{next(_counter)}"

    @property
    def latent_dim(self) -> int:
        """L, the number of latent dimensions."""
        return self.prior.latent_dim

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    def model(self, x: Tensor) -> None:
        """p(x, z) as a Pyro program; ``x`` has shape ``(B, *data_shape)``."""
        self._check_shape(x)
        pyro.module(self.name, self)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())  # batch (B,), event (L,)
            pyro.sample("x", self.likelihood(z), obs=x)  # batch (B,), event data_shape

    def guide(self, x: Tensor) -> None:
        """q(z|x) as a Pyro program; takes what ``model`` takes."""
        self._check_shape(x)
        pyro.module(self.name, self)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self.encoder(x))  # batch (B,), event (L,)

    def encode(self, x: Tensor) -> dist.Distribution:
        """q(z|x), batch shape ``(B,)`` and event shape ``(L,)``."""
        self._check_shape(x)
        return self.encoder(x)

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x|z), batch shape ``z.shape[:-1]`` and event shape ``data_shape``."""
        return self.likelihood(z)

    @torch.no_grad()
    def sample(self, num_samples: int) -> Tensor:
        """Draws from p(x), shape ``(num_samples, *data_shape)``."""
        return self.decode(self.prior().sample((num_samples,))).sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x), shape of ``x``."""
        return self.decode(self.encode(x).mean).mean

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 10) -> Tensor:
        """Means of p(x|z) on the straight line between two encodings.

        Args:
            a: data ``(*data_shape)`` or ``(B, *data_shape)``, where the lines start.
            b: data of the same shape, where they end.
            steps: points on each line, both ends included.

        Returns:
            Shape ``(steps, *data_shape)`` or ``(steps, B, *data_shape)``.
        """
        if a.shape != b.shape:
            raise ValueError(f"The ends must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}.")
        single = a.dim() == len(self.data_shape)
        ends = [self.encode(x[None] if single else x).mean for x in (a, b)]
        weight = torch.linspace(0, 1, steps, dtype=ends[0].dtype, device=ends[0].device)[:, None, None]
        means = self.decode(ends[0] + weight * (ends[1] - ends[0])).mean
        return means[:, 0] if single else means

    def fit(self, data: Any, **options: Any) -> History:
        """Train on data; see :func:`pyrovae.fit`."""
        from .training import fit

        return fit(self.model, self.guide, data, **options)

    def log_marginal(self, x: Any, **options: Any) -> Evidence:
        """Importance-sampled log p(x) of every datum; see :func:`pyrovae.log_marginal`."""
        from .marginal import log_marginal

        return log_marginal(self.model, self.guide, x, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.json`` (what to build) and ``model.safetensors`` (its weights) into a folder.

        Raises:
            ValueError: a part is not registered, so it could not be built again.
        """
        parts = {kind: describe(getattr(self, kind), kind) for kind in ("prior", "likelihood", "encoder")}
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(folder / "model.safetensors", self)
        checkpoint.write_text(folder / "model.json", json.dumps(parts, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> VAE:
        """Build the model that :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: a file is truncated, or does not fit the other; nothing unpickles.
        """
        folder = Path(folder)
        parts = checkpoint.read_json(folder / "model.json")
        if not isinstance(parts, dict) or set(parts) != {"prior", "likelihood", "encoder"}:
            raise ValueError(f"{folder / 'model.json'} does not describe a VAE: it needs prior, likelihood and encoder.")
        vae = cls(**{kind: build(kind, spec) for kind, spec in parts.items()})
        checkpoint.load_weights(folder / "model.safetensors", vae)
        return vae

    def _check_shape(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"The model takes a tensor, not {type(x).__name__}: write torch.as_tensor(x).")
        if tuple(x.shape[1:]) != self.data_shape or x.dim() == 0:
            raise ValueError(
                f"The data have shape {tuple(x.shape)}, but the model takes (N, {', '.join(map(str, self.data_shape))}): "
                f"reshape them, or build the model for that shape."
            )


def make_vae(
    data_shape: Shape,
    *,
    latent_dim: int,
    prior: Any = "standard_normal",
    likelihood: Any = "bernoulli",
    encoder: Any = "diagonal_normal",
    body: str = "mlp",
    hidden: Sequence[int] | None = None,
    activation: Activation | None = None,
    name: str | None = None,
) -> VAE:
    """A :class:`VAE` from names.

    Args:
        data_shape: the shape of one datum, ``(1, 28, 28)`` or ``784``.
        latent_dim: L.
        prior: a name, a table ``{"kind": name, ...}``, or a ready object; so too ``likelihood`` and ``encoder``.
        likelihood: p(x|z).
        encoder: the family of q(z|x).
        body: ``"mlp"``, ``"gated_mlp"`` or ``"conv"``.
        hidden: widths of the encoder's hidden layers, mirrored in the decoder; channels for ``"conv"``. By default
            ``[200, 200]``, or ``[32, 64]`` channels.
        activation: a name such as ``"tanh"``; by default the body's own.
        name: see :class:`VAE`.

    Raises:
        ValueError: an unknown name (the message has the nearest), or parts that do not fit.

    Example:
        >>> import pyrovae as pv
        >>> vae = pv.make_vae((1, 28, 28), latent_dim=50, likelihood={"kind": "normal", "scale": "shared"})
        >>> vae.data_shape, vae.latent_dim
        ((1, 28, 28), 50)
    """
    shape = as_shape(data_shape)
    hidden = list(hidden) if hidden is not None else ([32, 64] if body == "conv" else [200, 200])
    networks = {"hidden": hidden} | ({} if activation is None else {"activation": activation})
    inward, outward = ("conv_encoder", "conv_decoder") if body == "conv" else (body, body)
    outward_networks = networks if body == "conv" else networks | {"hidden": hidden[::-1]}

    def decoder(num_parameters: int) -> nn.Module:
        out_shape = shape if num_parameters == 1 else (num_parameters, *shape)
        return build("body", outward, in_shape=latent_dim, out_shape=out_shape, **outward_networks)

    if isinstance(likelihood, str):
        likelihood = {"kind": likelihood}
    if not isinstance(likelihood, Likelihood):
        options = dict(likelihood)
        family = find("likelihood", options.pop("kind", "none"))
        likelihood = build("likelihood", likelihood, decoder=decoder(family.count_parameters(options)))
    encoder_body = build("body", inward, in_shape=shape, **networks)
    return VAE(
        prior=build("prior", prior, latent_dim=latent_dim),
        likelihood=likelihood,
        encoder=build("encoder", encoder, body=encoder_body, latent_dim=latent_dim, in_scale=likelihood.in_scale),
        name=name,
    )
