"""The base class of models of labelled data: labels are further inputs of their encoder and decoder."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

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
from ..registry import build
from .base import PairModule
from .inputs import BATCH_SIZE, all_at_once
from .parts import build_networks, check_parts, check_sizes, in_shape_of, in_size_of

__all__ = ["LabelledVAE"]


class LabelledVAE(PairModule):
    """A model of data with labels, which are further inputs of encoder and decoder."""

    parts: ClassVar[dict[str, str | None]] = {
        "prior": "prior",
        "likelihood": "likelihood",
        "encoder": "encoder",
        "num_classes": None,
    }
    run_defaults: ClassVar[dict[str, Any]] = {"latent_dim": 4, "encoder": "full_covariance_normal"}

    def __init__(self, prior: Prior, likelihood: Likelihood, encoder: Encoder, num_classes: int, name: str | None = None):
        super().__init__(name)
        check_parts((prior, Prior), (likelihood, Likelihood), (encoder, Encoder))
        self.num_classes = positive_integer(num_classes, "num_classes")
        check_sizes("on the latent dimension", prior=prior.latent_dim, encoder=encoder.latent_dim)
        check_sizes(
            "on what the decoder takes",
            **{"latent and label": prior.latent_dim + self.num_classes, "decoder": in_size_of(likelihood.decoder)},
        )
        if prior.mixes_posteriors:
            raise ValueError(
                f"The prior {type(prior).__name__} mixes posteriors of data alone, and this encoder takes labels too: choose "
                f"another prior."
            )
        shape = likelihood.event_shape
        beside = (math.prod(shape) + self.num_classes,)
        planes = (shape[0] + self.num_classes, *shape[1:])
        takes = in_shape_of(encoder.body)
        self._as_planes = takes == planes and len(shape) == 3
        if not self._as_planes:
            check_sizes("on what the encoder takes", **{"data and label": beside, "encoder": takes})
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    @classmethod
    def from_names(
        cls,
        data_shape: Shape,
        *,
        num_classes: int,
        latent_dim: int,
        prior: Any = "standard_normal",
        likelihood: Any = "bernoulli",
        encoder: Any = "diagonal_normal",
        body: str = "mlp",
        hidden: Sequence[int] | None = None,
        activation: Activation | None = None,
        name: str | None = None,
    ) -> Self:
        """A model of this class from names of its parts, as ``make_conditional_vae`` and ``make_semi_supervised_vae``.

        Args:
            data_shape: the shape of one datum.
            num_classes: C, the number of classes, or of numbers in a condition.
            latent_dim: L.
            prior: p(z): a name, a table or a ready object, as in :func:`pyrovae.make_vae`; likewise the other parts.
            likelihood: p(x|z,y).
            encoder: the family of q(z|x,y).
            body: as in :func:`pyrovae.make_vae`; the encoder of ``"conv"`` and ``"resnet"`` takes labels as constant planes.
            hidden: widths of the encoder's hidden layers, mirrored in the decoder.
            activation: a name; by default that of the body.
            name: see :class:`pyrovae.VAE`.

        Raises:
            ValueError: an unknown name (the message has the nearest), or parts that do not fit.

        Example:
            >>> import pyrovae as pv
            >>> pv.make_conditional_vae((1, 28, 28), num_classes=10, latent_dim=5, body="conv").encoder.body.in_shape
            (11, 28, 28)
            >>> pv.make_semi_supervised_vae((1, 28, 28), num_classes=10, latent_dim=5).encoder.body.in_shape
            (794,)
        """
        shape, latent_dim = as_shape(data_shape), positive_integer(latent_dim, "latent_dim")
        num_classes = positive_integer(num_classes, "num_classes")
        likelihood, encoder_body = build_networks(shape, latent_dim, likelihood, body, hidden, activation, num_classes)
        encoder = build("encoder", encoder, body=encoder_body, latent_dim=latent_dim, in_scale=likelihood.in_scale)
        return cls(build("prior", prior, latent_dim=latent_dim), likelihood, encoder, num_classes, name)

    @property
    def latent_dim(self) -> int:
        """L, the number of latent dimensions."""
        return self.prior.latent_dim

    def guide(self, x: Tensor, y: Tensor) -> None:
        """q(z|x,y), or q(z|x) if the label is unknown, as a Pyro program; takes what ``model`` takes."""
        x = self._as_data(x)
        y = self._as_labels(y, x)
        self._register()
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", self._encode(x, y))  # batch (B,), event (L,)

    def encode(self, x: Any, y: Any = None) -> dist.Distribution:
        """q(z|x,y) of all data at once, batch shape ``(N,)`` and event shape ``(L,)``.

        Args:
            x: data as :meth:`fit` takes them. Of tensors the distribution has gradients, of other data it has none.
            y: their labels, if ``x`` does not give them itself.
        """
        return all_at_once(self.model, self._encode_data, x, y)

    def embed(self, x: Any, y: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """One point for each datum, shape ``(N, L)``: the mean of q(z|x,y), or its centre if it has no mean.

        Args:
            x: data as :meth:`fit` takes them: an array, a data frame, a path, a data loader, ...
            y: their labels, if ``x`` does not give them itself.
            batch_size: data that are encoded at once.
        """
        return self._in_batches(lambda *batch: centre(self.encode(*batch)), x, y, batch_size=batch_size)

    def reconstruct(self, x: Any, y: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """A mean of the data for each datum, shape of ``x``; takes what :meth:`embed` takes."""
        return self._in_batches(self._reconstruct, x, y, batch_size=batch_size)

    @abstractmethod
    def _reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The reconstructions of one batch."""

    def train_inputs(self, x: Any, y: Tensor | None, *, mask: Any = None, covariates: Tensor | None = None) -> tuple[Any, ...]:
        """The data and their labels, one-hot and followed by the covariates if there are covariates."""
        if mask is not None:
            raise ValueError(
                f'A {type(self).__name__} takes no missing values, and some are: fill them in, or choose model.kind = "vae".'
            )
        if covariates is not None:
            return x, self._condition(y, covariates)
        if y is None:
            raise ValueError(
                f"The data of a {type(self).__name__} must have labels, got data without: choose others, or another model.kind."
            )
        return x, y

    def score_inputs(
        self, x: Tensor, y: Tensor | None, *, mask: Tensor | None = None, covariates: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The data and their labels."""
        return self.train_inputs(x, y, mask=mask, covariates=covariates)

    def _condition(self, y: Tensor | None, covariates: Tensor) -> Tensor:
        """Labels, one-hot, and covariates side by side, shape ``(N, C)``."""
        if y is None:
            return covariates
        if len(y) and int(y.min()) < 0:
            raise ValueError(f"The data of a {type(self).__name__} must all have labels, got data without: leave those out.")
        classes = torch.arange(self.num_classes - covariates.shape[1], device=y.device)
        return torch.cat([(y[:, None] == classes).to(covariates), covariates], -1)

    def _encode_data(self, x: Tensor, y: Tensor) -> dist.Distribution:
        x = self._as_data(x)
        return self._encode(x, self._as_labels(y, x))

    def _encode(self, x: Tensor, y: Tensor) -> dist.Distribution:
        # The encoder multiplies all of its input by in_scale, which labels do not need.
        x, y = self.likelihood.encoder_input(x), y / self.encoder.in_scale
        if self._as_planes:
            return self.encoder(torch.cat([x, y[..., None, None].expand(*y.shape, *x.shape[-2:])], -3))
        return self.encoder(torch.cat([x.flatten(-self.likelihood.event_dim), y], -1))

    def _decode(self, z: Tensor, y: Tensor, x: Tensor | None = None) -> dist.Distribution:
        """p(x|z,y); with ``x`` for likelihoods that depend on a statistic of the datum, such as its total."""
        batch = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
        both = torch.cat([part.expand(*batch, part.shape[-1]) for part in (z, y)], -1)
        return self.likelihood(both) if x is None else self.likelihood.given(both, x)

    def _as_labels(self, y: Tensor, like: Tensor) -> Tensor:
        """Labels as numbers (B, C)."""
        if not isinstance(y, Tensor):
            raise TypeError(f"Labels must be a tensor, got {type(y).__name__}: write torch.as_tensor(y).")
        shapes = {1: (len(like),), 2: (len(like), self.num_classes)}
        if tuple(y.shape) != shapes.get(y.dim()) or (y.dim() == 1 and y.is_floating_point()):
            raise ValueError(
                f"Labels must be integers of shape ({len(like)},) or one-hot of shape ({len(like)}, {self.num_classes}), got "
                f"{y.dtype} of shape {tuple(y.shape)}."
            )
        # Only while distributions check their values too: the data of a captured step have been checked before.
        if dist.is_validation_enabled():
            self._check_labels(y)
        if y.dim() == 1:
            y = y[:, None] == torch.arange(self.num_classes, device=y.device)
        return y.to(like)

    @abstractmethod
    def _check_labels(self, y: Tensor) -> None:
        """Raise an error if labels are out of range."""

    def _check_range(self, y: Tensor, lowest: int) -> None:
        if y.dim() == 1 and len(y) and not lowest <= int(y.min()) <= int(y.max()) < self.num_classes:
            raise ValueError(
                f"Labels must lie between {lowest} and {self.num_classes - 1}, got {int(y.min())} to {int(y.max())}: renumber "
                f"them, or set num_classes."
            )
