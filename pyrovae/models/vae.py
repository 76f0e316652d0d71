"""The most common pair: one latent, one observation, a prior, a likelihood and an encoder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from .._validation import positive_integer
from ..distributions import centre
from ..encoders import Encoder
from ..likelihoods import Likelihood
from ..nn import Activation, Shape, as_shape
from ..priors import Prior
from ..registry import build, register
from .base import PairModule
from .inputs import BATCH_SIZE, all_at_once, opened
from .parts import build_networks, check_parts, check_sizes, check_supports, in_shape_of, in_size_of

__all__ = ["VAE", "make_vae"]


@register("model", "vae")
class VAE(PairModule):
    r"""A variational autoencoder as a pair of Pyro programs.

    .. math:: p_\theta(x, z) = p_\theta(z) \, p_\theta(x \mid z), \qquad q_\phi(z \mid x) \approx p_\theta(z \mid x)

    ``vae.model(x)`` and ``vae.guide(x)`` are valid Pyro: they run under ``pyro.infer.SVI``, ``Predictive`` and
    ``poutine.trace``. The sites are ``"z"`` and ``"x"`` in the plate ``"data"`` at dim -1. If values are missing, pass a mask
    of the shape of ``x``, true for observed values: ``vae.model(x, mask)``. Only observed values are scored, so that every
    bound and estimate is of log p(x_obs), and the encoder gets zeros in place of the others. Methods that take data take the
    pair: ``vae.fit((x, mask))``, ``vae.log_marginal((x, mask))``.

    Args:
        prior: p(z).
        likelihood: p(x|z), with its decoder.
        encoder: q(z|x).
        name: the name of this instance in Pyro's parameter store; by default unique, so that two models in one process do not
            share parameters.

    Raises:
        ValueError: a part has the wrong class; two parts disagree on the latent dimension or the shape of the data; or prior
            and encoder are densities on different sets, such as a sphere and all vectors.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014, https://arxiv.org/abs/1312.6114.

    Example:
        >>> import torch
        >>> import pyrovae as pv
        >>> vae = pv.VAE(prior=pv.priors.StandardNormal(2),
        ...              likelihood=pv.likelihoods.Bernoulli(pv.nn.MLP(2, [16], 9)),
        ...              encoder=pv.encoders.DiagonalNormal(pv.nn.MLP(9, [16]), 2))
        >>> vae.sample(5).shape
        torch.Size([5, 9])
    """

    parts: ClassVar[dict[str, str | None]] = {"prior": "prior", "likelihood": "likelihood", "encoder": "encoder"}
    run_defaults: ClassVar[dict[str, Any]] = {"latent_dim": 4, "encoder": "full_covariance_normal"}

    def __init__(self, prior: Prior, likelihood: Likelihood, encoder: Encoder, name: str | None = None):
        super().__init__(name)
        check_parts((prior, Prior), (likelihood, Likelihood), (encoder, Encoder))
        check_sizes(
            "on the latent dimension",
            prior=prior.latent_dim,
            encoder=encoder.latent_dim,
            decoder=in_size_of(likelihood.decoder),
        )
        check_sizes("on the shape of one datum", encoder=in_shape_of(encoder.body), likelihood=likelihood.event_shape)
        check_supports(prior, encoder)
        prior.bind(encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    @classmethod
    def from_names(
        cls,
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
    ) -> Self:
        """A :class:`VAE` from names of its parts, as ``pyrovae.make_vae``.

        Args:
            data_shape: the shape of one datum, ``(1, 28, 28)`` or ``784``.
            latent_dim: L.
            prior: a name, a table ``{"kind": name, ...}``, or a ready object; likewise ``likelihood`` and ``encoder``.
            likelihood: p(x|z).
            encoder: the family of q(z|x).
            body: ``"mlp"``, ``"gated_mlp"``, ``"conv"`` or ``"resnet"``; the last two stand for a pair, such as
                ``"conv_encoder"`` and ``"conv_decoder"``.
            hidden: widths of the encoder's hidden layers, mirrored in the decoder; channels for such a pair. By default
                ``[200, 200]``, or the default channels of the pair.
            activation: a name such as ``"tanh"``; by default that of the body.
            name: see :class:`VAE`.

        Raises:
            ValueError: an unknown name (the message has the nearest), or parts that do not fit.

        Example:
            >>> import pyrovae as pv
            >>> vae = pv.make_vae((1, 28, 28), latent_dim=50, likelihood={"kind": "normal", "scale": "shared"})
            >>> vae.data_shape, vae.latent_dim
            ((1, 28, 28), 50)
        """
        shape, latent_dim = as_shape(data_shape), positive_integer(latent_dim, "latent_dim")
        likelihood, encoder_body = build_networks(shape, latent_dim, likelihood, body, hidden, activation)
        return cls(
            prior=build("prior", prior, latent_dim=latent_dim, data_shape=shape),
            likelihood=likelihood,
            encoder=build("encoder", encoder, body=encoder_body, latent_dim=latent_dim, in_scale=likelihood.in_scale),
            name=name,
        )

    @property
    def latent_dim(self) -> int:
        """L, the number of latent dimensions."""
        return self.prior.latent_dim

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        """p(x, z) as a Pyro program; ``x`` and ``mask`` (true for observed values) have shape ``(B, *data_shape)``."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())  # batch (B,), event (L,)
            distribution, value = self.likelihood.observe(z, x, mask)
            pyro.sample("x", distribution, obs=value)  # batch (B,), event data_shape

    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """q(z|x) as a Pyro program; takes what ``model`` takes."""
        encoding = self.encode(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", encoding)  # batch (B,), event (L,)

    def encode(self, x: Any, mask: Any = None) -> dist.Distribution:
        """q(z|x) of all data at once, batch shape ``(N,)`` and event shape ``(L,)``; missing values are encoded as zeros.

        Args:
            x: data as :meth:`fit` takes them. Of tensors the distribution has gradients, of other data it has none.
            mask: true where a value was observed, if ``x`` does not say it itself.
        """
        return all_at_once(self.model, self._encode, x, mask)

    def embed(self, x: Any, mask: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """One point for each datum, shape ``(N, L)``: the mean of q(z|x), or its centre if the mean has no closed form.

        Args:
            x: data as :meth:`fit` takes them: an array, a data frame, a path, a data loader, ...
            mask: true where a value was observed, if ``x`` does not say it itself.
            batch_size: data that are encoded at once.
        """
        return self._in_batches(lambda *batch: centre(self.encode(*batch)), x, mask, batch_size=batch_size)

    def _encode(self, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        return self.encoder(self._encoder_input(x, mask))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x|z), batch shape ``z.shape[:-1]`` and event shape ``data_shape``."""
        return self.likelihood(z)

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draws from p(x), shape ``(num_samples, *data_shape)``; or the means of p(x|z) at draws of z."""
        distribution = self.decode(self.prior().sample((num_samples,)))
        return distribution.mean if mean else distribution.sample()

    def examples(self, num_samples: int) -> Tensor:
        """Means of p(x|z) at draws of z; shape ``(num_samples, *data_shape)``."""
        return self.sample(num_samples, mean=True)

    def reconstruct(self, x: Any, mask: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """The mean of p(x|z) at ``z = embed(x)``, shape of ``x``; takes what :meth:`embed` takes."""
        return self._in_batches(self._reconstruct, x, mask, batch_size=batch_size)

    def _reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = centre(self.encode(x, mask))
        distribution, _ = self.likelihood.observe(z, self._as_data(x), self._as_mask(x, mask))
        return distribution.mean

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
            raise ValueError(f"a and b must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
        single = a.dim() == len(self.data_shape)
        ends = [self.embed(x[None] if single else x) for x in (a, b)]
        weight = torch.linspace(0, 1, steps, dtype=ends[0].dtype, device=ends[0].device)[:, None, None]
        means = self.decode(ends[0] + weight * (ends[1] - ends[0])).mean
        return means[:, 0] if single else means

    def export(self, folder: str | Path, *, format: Literal["torch", "onnx"] = "torch") -> list[Path]:
        """Write encoder and decoder as graphs that run without this package, for batches of any size.

        The encoder's graph takes data to :meth:`embed`, the decoder's takes latents to the mean of p(x|z). Each is run and
        compared with the model before it is kept.

        Args:
            folder: where ``encoder.pt2`` and ``decoder.pt2`` go, or ``encoder.onnx`` and ``decoder.onnx``.
            format: ``"torch"`` for torch.export, which ``torch.export.load`` reads; or ``"onnx"``, which needs
                ``pip install "pyrovae[onnx]"``.

        Returns:
            The two files.

        Raises:
            ValueError: another format, a package that is missing, or a part that cannot be exported, such as a flow.

        Example:
            >>> import tempfile, torch, pyrovae as pv
            >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     encoder, decoder = vae.export(folder)
            ...     torch.export.load(encoder).module()(torch.ones(5, 9)).shape
            torch.Size([5, 2])
        """
        from .sharing import export_networks

        like = next(self.parameters())
        with torch.no_grad():
            z = self.prior().sample((3,))
            x = self.decode(z).mean.reshape(3, *self.data_shape)
        functions = {
            "encoder": (lambda x: centre(self.encoder(self._encoder_input(x))), x.to(like)),
            "decoder": (lambda z: self.decode(z).mean, z.to(like)),
        }
        return export_networks(self, functions, folder, format)

    def impute(
        self,
        x: Any,
        mask: Any = None,
        *,
        num_samples: int = 1000,
        num_draws: int | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""Fill in missing values by self-normalised importance sampling; observed ones are kept.

        .. math:: \mathbb{E}[x_{mis} \mid x_{obs}] \approx \sum_{s=1}^S \bar w_s \, \mathbb{E}[x_{mis} \mid z_s], \qquad
            \bar w_s \propto \frac{p(x_{obs} \mid z_s) \, p(z_s)}{q(z_s \mid x_{obs})}, \quad z_s \sim q(z \mid x_{obs})

        Each draw picks a latent with probability :math:`\bar w_s` and samples p(x|z) there. Means and draws are as reliable as
        the weights: with 25 samples or more, a warning says for how many data the Pareto k is too large. A few latents dominate
        the result of those; draw more samples, or train a guide that is closer to the posterior.

        Args:
            x: data, shape ``(B, *data_shape)``, as :meth:`fit` takes them; values where the mask is false are ignored.
            mask: true where a value was observed, shape of ``x``; not needed beside masked arrays and data frames, whose
                empty cells are filled in.
            num_samples: S, latents drawn for every datum.
            num_draws: return this many draws of the missing values instead of their mean.
            chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations.
            seed: the seed of the draws; the global random stream is left untouched.

        Returns:
            The posterior-predictive mean, shape of ``x``; or draws, shape ``(num_draws, B, *data_shape)``. With discrete data
            only the draws lie in the support.

        Raises:
            ValueError: the mask is not a boolean tensor of the shape of ``x``, or a number is not positive.

        References:
            Mattei and Frellsen, MIWAE: Deep generative modelling and imputation of incomplete data sets, 2019,
            https://arxiv.org/abs/1812.02633.

        Example:
            >>> import torch, pyrovae as pv
            >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
            >>> x, mask = torch.ones(5, 9), torch.arange(9) < 6
            >>> filled = vae.impute(x, mask.expand(5, 9), num_samples=1000, seed=0)
            >>> filled[0, 0].item(), bool(filled[0, 8] < 1)
            (1.0, True)
        """
        from ..evidence.planning import CHUNK_NUMBERS
        from ..programs.tracing import scoring_context

        num_samples = positive_integer(num_samples, "num_samples")
        num_draws = None if num_draws is None else positive_integer(num_draws, "num_draws")
        chunk = CHUNK_NUMBERS // max(math.prod(self.data_shape), 256) if chunk_size is None else chunk_size
        chunk = positive_integer(max(chunk, 1) if chunk_size is None else chunk, "chunk_size")
        x, *masks = opened(self.model, x, mask)
        x, known = self._as_data(x), self._as_mask(x, masks[0] if masks else None)
        if known is None:
            got = f"{masks[0].dtype} of shape {tuple(masks[0].shape)}" if masks else "none for data without missing values"
            raise ValueError(
                f"mask must be a boolean tensor of the data's shape {tuple(x.shape)}, true where a value was observed, got "
                f"{got}: pass a mask, or a data frame with empty cells."
            )
        rows = max(1, chunk // num_samples)
        with torch.no_grad(), scoring_context(self.model, self.guide, seed, x.device):
            parts = [
                self._impute(data, seen, num_samples, num_draws, max(1, chunk // len(data)))
                for data, seen in zip(x.split(rows), known.split(rows), strict=True)
            ]
        _warn_of_tails(torch.cat([tail for _, tail in parts]), num_samples, torch.finfo(x.dtype).eps)
        return torch.cat([filled for filled, _ in parts], 0 if num_draws is None else 1)

    def _impute(self, x: Tensor, mask: Tensor, num_samples: int, num_draws: int | None, chunk: int) -> tuple[Tensor, Tensor]:
        """One batch, in chunks of particles: the filled data, and the largest log-weights of each datum."""
        from ..evidence.streaming import LogMoments, Resampler
        from ..programs.log_weights import log_weights
        from ..programs.tracing import Recorder

        event = (1,) * len(self.data_shape)
        moments, mean = LogMoments(len(x), num_samples, x.device), torch.zeros_like(x)
        resampler = None if num_draws is None else Resampler(moments, num_draws)
        while left := num_samples - moments.num_drawn:
            size = min(left, chunk)
            with Recorder() as recorder:
                weights = log_weights(self.model, self.guide, x, mask, num_particles=size, max_plate_nesting=1)
            log_w = weights.log_weights.double()  # (size, B)
            if resampler is not None:
                resampler.update(log_w, {"z": recorder.values["z"].reshape(size, len(x), self.latent_dim)})
                continue
            earlier, new = (part.to(x.dtype).reshape(*part.shape, *event) for part in moments.normalize(log_w))
            mean = mean * earlier + (new * recorder.distributions["x"].mean.reshape(size, *x.shape)).sum(0)
        filled = mean
        if resampler is not None:
            distribution, _ = self.likelihood.observe(resampler.draws["z"], x, mask)
            filled = distribution.sample()
        # If every latent gives the observed values probability zero, the missing values are unknown.
        filled = filled.masked_fill((moments.log_sum == -math.inf).reshape(-1, *event), math.nan)
        return torch.where(mask, x, filled), moments.tail


def _warn_of_tails(tail: Tensor, num_samples: int, precision: float) -> None:
    """Warn if the largest log-weights (N, 5 M) show that a few latents dominate the result for some data."""
    from ..evidence.psis import FEWEST_SAMPLES, khat_limit, pareto_khat

    if num_samples < FEWEST_SAMPLES:
        return
    limit = khat_limit(num_samples)
    bad = np.flatnonzero(pareto_khat(tail.cpu().numpy(), num_samples, precision=precision) >= limit)
    if len(bad):
        warnings.warn(
            f"The weights of {len(bad)} of {len(tail)} data (first datum {bad[0]}) have a Pareto k of {limit:.2f} or more with "
            f"{num_samples:,} samples, so a few latents dominate what is filled in there: draw more samples.",
            UserWarning,
            stacklevel=3,
        )


make_vae = VAE.from_names
