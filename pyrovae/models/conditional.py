"""Models of labelled data: labels are known for all data, or for some data and summed out for the rest."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._validation import positive_integer
from ..distributions import centre
from ..encoders import Encoder
from ..likelihoods import Likelihood
from ..nn import Activation, Shape, as_shape
from ..priors import Prior
from ..registry import build, register
from .base import PairModule
from .parts import build_networks, check_parts, check_sizes, in_shape_of, in_size_of

__all__ = ["ConditionalVAE", "SemiSupervisedVAE", "make_conditional_vae", "make_semi_supervised_vae"]


class _LabelledVAE(PairModule):
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

    def encode(self, x: Tensor, y: Tensor) -> dist.Distribution:
        """q(z|x,y), batch shape ``(B,)`` and event shape ``(L,)``."""
        x = self._as_data(x)
        return self._encode(x, self._as_labels(y, x))

    def embed(self, x: Tensor, y: Tensor) -> Tensor:
        """One point for each datum, shape ``(B, L)``: the mean of q(z|x,y), or its centre if it has no mean."""
        return centre(self.encode(x, y))

    def train_inputs(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """The data and their labels."""
        if y is None:
            raise ValueError(
                f"The data of a {type(self).__name__} must have labels, got data without: choose others, or another model.kind."
            )
        return x, y

    def score_inputs(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """The data and their labels."""
        return self.train_inputs(x, y)

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


@register("model", "conditional")
class ConditionalVAE(_LabelledVAE):
    r"""A variational autoencoder of data given a label.

    .. math:: p_\theta(x, z \mid y) = p(z) \, p_\theta(x \mid z, y), \qquad q_\phi(z \mid x, y) \approx p_\theta(z \mid x, y)

    ``model`` and ``guide`` take ``(x, y)``, as do ``fit((x, y))`` and ``log_marginal((x, y))``, which estimates log p(x|y).
    Labels are integers ``(B,)`` or numbers ``(B, C)``, one-hot or any condition. They are appended to the latent for the
    decoder. For the encoder they are appended to the flattened data, or to the channels of an image as C constant planes.

    Args:
        prior: p(z).
        likelihood: p(x|z,y), whose decoder takes ``L + C`` numbers.
        encoder: q(z|x,y), whose body takes ``D + C`` numbers, or images of C more channels.
        num_classes: C.
        name: as in :class:`pyrovae.VAE`.

    Raises:
        ValueError: a part has the wrong class, or two parts disagree on a size.

    References:
        Kingma et al., Semi-supervised Learning with Deep Generative Models, 2014, https://arxiv.org/abs/1406.5298.
        Sohn, Lee and Yan, Learning Structured Output Representation using Deep Conditional Generative Models, 2015,
        https://papers.nips.cc/paper/5775-learning-structured-output-representation-using-deep-conditional-generative-models.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_conditional_vae(9, num_classes=3, latent_dim=2, hidden=[16])
        >>> vae.sample(torch.tensor([0, 0, 2])).shape
        torch.Size([3, 9])
        >>> vae.log_marginal((torch.zeros(5, 9), torch.zeros(5, dtype=torch.long)), num_samples=10).log_px.shape
        (5,)
    """

    quantity: ClassVar[str] = "log p(x|y)"

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(x, z|y) as a Pyro program; ``x`` has shape ``(B, *data_shape)``, ``y`` ``(B,)`` or ``(B, C)``."""
        x = self._as_data(x)
        y = self._as_labels(y, x)
        self._register()
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())  # batch (B,), event (L,)
            pyro.sample("x", self._decode(z, y, x), obs=x)  # batch (B,), event data_shape

    def decode(self, z: Tensor, y: Tensor) -> dist.Distribution:
        """p(x|z,y), batch shape ``(B,)`` and event shape ``data_shape``."""
        return self._decode(z, self._as_labels(y, z))

    @torch.no_grad()
    def sample(self, y: Tensor, *, mean: bool = False) -> Tensor:
        """A draw from p(x|y) for each label, shape ``(B, *data_shape)``; or the means of p(x|z,y) at draws of z."""
        distribution = self.decode(self.prior().sample((len(y),)), y)
        return distribution.mean if mean else distribution.sample()

    def examples(self, num_samples: int) -> Tensor:
        """Means of p(x|z,y) at draws of z, for each class in turn; shape ``(num_samples, *data_shape)``."""
        return self.sample(torch.arange(num_samples, device=self._device) % self.num_classes, mean=True)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of p(x|z,y) at the mean of q(z|x,y), shape of ``x``."""
        return self.decode(self.encode(x, y).mean, y).mean

    def _check_labels(self, y: Tensor) -> None:
        self._check_range(y, lowest=0)


@register("model", "semi_supervised")
class SemiSupervisedVAE(_LabelledVAE):
    r"""A variational autoencoder of partly labelled data; unknown labels are summed out exactly.

    .. math:: p_\theta(x, y, z) = p_\theta(y) \, p(z) \, p_\theta(x \mid z, y), \qquad
        p_\theta(x, z) = p(z) \sum_y p_\theta(y) \, p_\theta(x \mid z, y)

    A datum with a label is scored by p(x, y, z), and one without by p(x, z): the sum over y is part of the density of site
    ``"x"``. No latent is discrete, so every estimator applies, and ``log_marginal`` estimates log p(x, y) or log p(x). The
    model is M2 of Kingma et al. Their bound has a network q(y|x), which makes it looser; here :meth:`classify` applies Bayes'
    rule. Each step decodes every latent C times.

    Labels are integers ``(B,)``, -1 if unknown, or one-hot ``(B, C)``, zeros if unknown. The sites are ``"z"``, ``"y"`` (scored
    if known) and ``"x"``. A known label is not a dimension of x, so ``num_dims`` does not count it; its probability is a part
    of log p(x, y), so ``measure`` counts it. For bits per dimension of x, score without labels.

    Args:
        prior: p(z).
        likelihood: p(x|z,y), whose decoder takes ``L + C`` numbers.
        encoder: q(z|x,y), whose body takes ``D + C`` numbers, or images of C more channels; an unknown label is zeros.
        num_classes: C; p(y) is learned, and starts uniform.
        name: as in :class:`pyrovae.VAE`.

    Raises:
        ValueError: a part has the wrong class, or two parts disagree on a size.

    References:
        Kingma, Rezende, Mohamed and Welling, Semi-supervised Learning with Deep Generative Models, 2014,
        https://arxiv.org/abs/1406.5298.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_semi_supervised_vae(9, num_classes=3, latent_dim=2, hidden=[16])
        >>> x, y = torch.zeros(5, 9), torch.tensor([0, -1, 2, -1, -1])
        >>> vae.log_marginal((x, y), num_samples=10).log_px.shape
        (5,)
        >>> vae.classify(x).shape
        torch.Size([5, 3])
    """

    def __init__(self, prior: Prior, likelihood: Likelihood, encoder: Encoder, num_classes: int, name: str | None = None):
        super().__init__(prior, likelihood, encoder, num_classes, name)
        self.label_logits = nn.Parameter(torch.zeros(self.num_classes))

    def model(self, x: Tensor, y: Tensor) -> None:
        """p(x, y, z), or p(x, z) if the label is unknown, as a Pyro program; shapes as for :class:`ConditionalVAE`."""
        x = self._as_data(x)
        y = self._as_labels(y, x)
        known = y.sum(-1) > 0  # (B,)
        self._register()
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())  # batch (B,), event (L,)
            distribution = dist.Categorical(logits=self.label_logits.expand(*y.shape)).mask(known)
            pyro.sample("y", distribution, obs=y.argmax(-1), infer={"num_dims": 0})  # bits per dimension are those of the data
            pyro.sample("x", self._mixture(z, y), obs=x)  # batch (B,), event data_shape

    def decode(self, z: Tensor, y: Tensor) -> dist.Distribution:
        """p(x|z,y), or p(x|z) without a label; batch shape ``(B,)`` and event shape ``data_shape``."""
        return self._mixture(z, self._as_labels(y, z))

    @torch.no_grad()
    def classify(self, x: Tensor, num_samples: int = 100) -> Tensor:
        r"""The probabilities p(y|x), shape ``(B, C)``, by importance sampling.

        .. math:: \hat p(y \mid x) \propto p(y) \sum_k \frac{p(z_k)}{q(z_k \mid x)} \, p(x \mid z_k, y), \qquad
            z_k \sim q(z \mid x)
        """
        x = self._as_data(x)
        guide = self._encode(x, x.new_zeros(len(x), self.num_classes))
        z = guide.sample((num_samples,))  # (K, B, L)
        log_w = (self.prior().log_prob(z) - guide.log_prob(z))[..., None] + self._log_joint(x, z)
        return torch.softmax(torch.logsumexp(log_w, 0), -1)

    @torch.no_grad()
    def sample(self, num_samples: int, y: Tensor | None = None, *, mean: bool = False) -> Tensor:
        """Draws from p(x), or from p(x|y) for each of ``num_samples`` labels; shape ``(num_samples, *data_shape)``.

        With ``mean`` the means of p(x|z), or of p(x|z,y), at draws of z.
        """
        z = self.prior().sample((num_samples,))
        none = torch.full((num_samples,), -1, device=z.device)
        distribution = self.decode(z, none if y is None else y)
        return distribution.mean if mean else distribution.sample()

    def examples(self, num_samples: int) -> Tensor:
        """Means of p(x|z,y) at draws of z, for each class in turn; shape ``(num_samples, *data_shape)``."""
        return self.sample(num_samples, torch.arange(num_samples, device=self._device) % self.num_classes, mean=True)

    def score_inputs(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """The data with -1 in place of labels, so that all of them are scored by p(x)."""
        return x, torch.full((len(x),), -1, device=x.device)

    def label_findings(self, x: Tensor, y: Tensor | None) -> dict[str, str]:
        """The number of labels that Bayes' rule gets right."""
        if y is None:
            return {}
        right = int((self.classify(x).argmax(-1) == y.to(x.device)).sum())
        return {"classified": f"{right:,} of {len(x):,} ({right / len(x):.1%}) correctly, by the largest p(y|x)"}

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of p(x|z,y) at the mean of q(z|x,y), averaged over p(y|x,z) without a label; shape of ``x``."""
        x = self._as_data(x)
        y = self._as_labels(y, x)
        z = self._encode(x, y).mean
        weight = torch.where(y.sum(-1, keepdim=True) > 0, y, torch.softmax(self._log_joint(x, z), -1))  # (B, C)
        means = self._components(z).mean  # (B, C, *data_shape)
        return (weight.reshape(*weight.shape, *(1,) * self.likelihood.event_dim) * means).sum(1)

    def _components(self, z: Tensor) -> dist.Distribution:
        """p(x|z,y) for every y: batch shape ``(*z.shape[:-1], C)``."""
        return self._decode(z[..., None, :], torch.eye(self.num_classes, dtype=z.dtype, device=z.device))

    def _log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """Log p(y) + log p(x|z,y), shape ``(*z.shape[:-1], C)``."""
        return torch.log_softmax(self.label_logits, -1) + self._components(z).log_prob(
            x.unsqueeze(-1 - self.likelihood.event_dim)
        )

    def _mixture(self, z: Tensor, y: Tensor) -> dist.Distribution:
        """p(x|z,y) if the label is known, else the sum over p(y)."""
        unknown = y.sum(-1, keepdim=True) == 0
        logits = torch.where(unknown, self.label_logits, torch.where(y > 0, 0.0, -torch.inf))  # (B, C)
        components = self._components(z)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits.expand(components.batch_shape)), components)

    def _check_labels(self, y: Tensor) -> None:
        self._check_range(y, lowest=-1)
        if y.dim() == 2 and not bool((((y == 0) | (y == 1)).all(-1) & (y.sum(-1) <= 1)).all()):
            raise ValueError(
                "A row of one-hot labels must have a single one, or be zeros if there is no label: correct the others."
            )


make_conditional_vae = ConditionalVAE.from_names
make_semi_supervised_vae = SemiSupervisedVAE.from_names
