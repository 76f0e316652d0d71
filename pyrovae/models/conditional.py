"""Models of labelled data: labels are known for all data, or for some data and summed out for the rest."""

from __future__ import annotations

from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..encoders import Encoder
from ..likelihoods import Likelihood
from ..priors import Prior
from ..registry import register
from .labelled import LabelledVAE

__all__ = ["ConditionalVAE", "SemiSupervisedVAE", "make_conditional_vae", "make_semi_supervised_vae"]


@register("model", "conditional")
class ConditionalVAE(LabelledVAE):
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

    def _reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of p(x|z,y) at the mean of q(z|x,y)."""
        return self.decode(self.encode(x, y).mean, y).mean

    def _check_labels(self, y: Tensor) -> None:
        self._check_range(y, lowest=0)


@register("model", "semi_supervised")
class SemiSupervisedVAE(LabelledVAE):
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

    def score_inputs(
        self, x: Tensor, y: Tensor | None, *, mask: Tensor | None = None, covariates: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The data with -1 in place of labels, so that all of them are scored by p(x)."""
        self.train_inputs(x, y, mask=mask, covariates=covariates)
        return x, torch.full((len(x),), -1, device=x.device)

    def label_findings(self, x: Tensor, y: Tensor | None) -> dict[str, str]:
        """The number of labels that Bayes' rule gets right."""
        if y is None:
            return {}
        right = int((self.classify(x).argmax(-1) == y.to(x.device)).sum())
        return {"classified": f"{right:,} of {len(x):,} ({right / len(x):.1%}) correctly, by the largest p(y|x)"}

    def _reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of p(x|z,y) at the mean of q(z|x,y), averaged over p(y|x,z) without a label."""
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

    def _condition(self, y: Tensor | None, covariates: Tensor) -> Tensor:
        raise ValueError(
            'A SemiSupervisedVAE takes no covariates beside its labels: leave them out, or choose model.kind = "conditional".'
        )

    def _check_labels(self, y: Tensor) -> None:
        self._check_range(y, lowest=-1)
        if y.dim() == 2 and not bool((((y == 0) | (y == 1)).all(-1) & (y.sum(-1) <= 1)).all()):
            raise ValueError(
                "A row of one-hot labels must have a single one, or be zeros if there is no label: correct the others."
            )


make_conditional_vae = ConditionalVAE.from_names
make_semi_supervised_vae = SemiSupervisedVAE.from_names
