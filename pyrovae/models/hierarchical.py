"""Hierarchies: models of several stochastic layers.

Layers are numbered from the data up: ``z1`` is next to the data, and the last layer has the prior. A conditional
p(z_i|z_{i+1}) maps a vector to a distribution over vectors, so it is an :class:`pyrovae.encoders.Encoder`, and so is every
factor of a guide.
"""

from __future__ import annotations

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
from ..registry import build, find, register
from .base import PairModule
from .guides import Draw, Guide, Sizes, _encoder, _in
from .inputs import BATCH_SIZE
from .parts import body_pair, build_likelihood, check_parts, check_sizes, in_size_of

__all__ = ["HierarchicalVAE", "make_hierarchical_vae"]


@register("model", "hierarchical")
class HierarchicalVAE(PairModule):
    r"""A variational autoencoder of several stochastic layers, as a pair of Pyro programs.

    .. math:: p_\theta(x, z) = p(z_n) \prod_{i=1}^{n-1} p(z_i \mid z_{i+1}) \; p(x \mid z_1), \qquad
        q_\phi(z \mid x) \approx p_\theta(z \mid x)

    The sites are ``"z1"``, nearest to the data, ``"z2"``, ... and ``"x"``, in the plate ``"data"`` at dim -1.

    Args:
        prior: p(z_n), any prior.
        layers: p(z1|z2), p(z2|z3), ...: encoders from the layer above.
        likelihood: p(x|z1), with its decoder.
        inference: q(z|x): a :class:`~pyrovae.models.guides.BottomUp`, :class:`~pyrovae.models.guides.Ladder` or
            :class:`~pyrovae.models.guides.Structured` guide.
        name: as in :class:`pyrovae.VAE`.

    Raises:
        ValueError: a part has the wrong class, two parts disagree on a size, or the guide cannot use the model's layers.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.
        Sonderby et al., Ladder Variational Autoencoders, 2016, https://arxiv.org/abs/1602.02282.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_hierarchical_vae(9, latent_dims=[3, 2], hidden=[[16], [8]], guide="ladder")
        >>> vae.sample(5).shape
        torch.Size([5, 9])
        >>> pv.log_weights(vae.model, vae.guide, torch.zeros(4, 9), num_particles=3).log_weights.shape
        torch.Size([3, 4])
    """

    parts: ClassVar[dict[str, str | None]] = {
        "prior": "prior",
        "layers": "encoder",
        "likelihood": "likelihood",
        "inference": "guide",
    }

    def __init__(
        self, prior: Prior, layers: Sequence[Encoder], likelihood: Likelihood, inference: Guide, name: str | None = None
    ):
        super().__init__(name)
        if not isinstance(layers, Sequence) or not layers:
            raise ValueError(
                "layers must be a list of one encoder or more, p(z1|z2), ...: for a model of one layer, make a VAE."
            )
        check_parts((prior, Prior), *((layer, Encoder) for layer in layers), (likelihood, Likelihood), (inference, Guide))
        dims = (*(layer.latent_dim for layer in layers), prior.latent_dim)
        check_sizes("on the layers", guide=inference.latent_dims, model=dims)
        check_sizes("on the size of z1", layer=dims[0], decoder=in_size_of(likelihood.decoder))
        for i, layer in enumerate(layers):
            check_sizes(f"on the size of z{i + 2}", **{"layer above": dims[i + 1], f"p(z{i + 1}|z{i + 2})": _in(layer)})
        check_sizes("on the shape of one datum", guide=inference.data_shape, likelihood=likelihood.event_shape)
        inference.check_layers(layers)
        top = inference.top()
        if top is not None:
            prior.bind(top)
        elif prior.mixes_posteriors:
            raise ValueError(
                f"The prior {type(prior).__name__} mixes q(z{len(dims)}|x), which {type(inference).__name__} has only as an "
                f"integral: choose the guide 'ladder' or 'structured'."
            )
        self.prior, self.likelihood, self.inference = prior, likelihood, inference
        self.layers = nn.ModuleList(layers)

    @classmethod
    def from_names(
        cls,
        data_shape: Shape,
        *,
        latent_dims: Sequence[int],
        hidden: Sequence[Sequence[int]] | None = None,
        guide: Any = "bottom_up",
        prior: Any = "standard_normal",
        likelihood: Any = "bernoulli",
        layer: Any = "diagonal_normal",
        encoder: Any = "diagonal_normal",
        body: str = "mlp",
        activation: Activation | None = "tanh",
        name: str | None = None,
    ) -> Self:
        """A :class:`HierarchicalVAE` from names of its parts, as ``pyrovae.make_hierarchical_vae``.

        By default the networks are those of Burda et al. (2016). ``latent_dims=[100, 50]`` is their model of two layers:
        784-200-200-100 and 100-100-100-50 up, the mirror image down.

        Args:
            data_shape: the shape of one datum, ``(1, 28, 28)`` or ``784``.
            latent_dims: sizes of the stochastic layers, nearest to the data first; two or more.
            hidden: widths of the deterministic layers below each stochastic one, mirrored on the way down; by default
                ``[[200, 200], [100, 100], ...]``.
            guide: ``"bottom_up"``, ``"ladder"``, ``"structured"``, or a ready guide.
            prior: of the top layer: a name, a table or a ready object.
            likelihood: p(x|z1), likewise.
            layer: the family of p(z_i|z_{i+1}): an encoder's name or table.
            encoder: the family of the guide's factors: an encoder's name or table.
            body: as in :func:`pyrovae.make_vae`; a pair such as ``"conv"`` is used next to the data only, with MLPs above.
            activation: a name; ``None`` for that of the body.
            name: see :class:`pyrovae.VAE`.

        Raises:
            ValueError: an unknown name (the message has the nearest), or parts that do not fit.

        Example:
            >>> import pyrovae as pv
            >>> vae = pv.make_hierarchical_vae((1, 28, 28), latent_dims=[100, 50], hidden=[[200, 200], [100, 100]])
            >>> vae.latent_dims, sum(p.numel() for p in vae.parameters())
            ((100, 50), 521084)
        """
        shape = as_shape(data_shape)
        dims = tuple(positive_integer(size, "Each of latent_dims") for size in latent_dims)
        if len(dims) < 2:
            raise ValueError(f"latent_dims must hold two sizes or more, got {list(dims)}: for one layer, call make_vae.")
        widths = [[200, 200]] + [[100, 100]] * (len(dims) - 1) if hidden is None else list(hidden)
        if len(widths) != len(dims):
            raise ValueError(
                f"hidden must have a list of widths for each of {len(dims)} layers, as [[200, 200], [100, 100]], got {hidden}."
            )
        # Networks of images fit only next to the data.
        inward, outward, _, _ = body_pair(body, widths[0])
        bodies = [body_pair(body if i == 0 or inward == outward else "mlp", each, activation) for i, each in enumerate(widths)]

        def up(i: int, in_shape: Shape) -> nn.Module:
            return build("body", bodies[i][0], in_shape=in_shape, **bodies[i][2])

        def down(i: int, in_shape: Shape, **out: Any) -> nn.Module:
            return build("body", bodies[i][1], in_shape=in_shape, **bodies[i][3], **out)

        likelihood = build_likelihood(likelihood, shape, lambda out_shape: down(0, dims[0], out_shape=out_shape))
        layers = [build("encoder", layer, body=down(i + 1, dims[i + 1]), latent_dim=dims[i]) for i in range(len(dims) - 1)]
        if isinstance(guide, str):
            family: type[Guide] = find("guide", guide)
            guide = family.of_sizes(Sizes(shape, dims, encoder, likelihood.in_scale, up))
        return cls(build("prior", prior, latent_dim=dims[-1], data_shape=shape), layers, likelihood, guide, name)

    @property
    def latent_dims(self) -> tuple[int, ...]:
        """The size of each layer, nearest to the data first."""
        return self.inference.latent_dims

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        """p(x, z) as a Pyro program; ``x`` and ``mask`` (true for observed values) have shape ``(B, *data_shape)``."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            z = self._descend(lambda i, distribution: pyro.sample(f"z{i + 1}", distribution))
            distribution, value = self.likelihood.observe(z, x, mask)
            pyro.sample("x", distribution, obs=value)  # batch (B,), event data_shape

    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """q(z|x) as a Pyro program; takes what ``model`` takes."""
        encoder_input = self._encoder_input(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            self.inference(encoder_input, self._layers, lambda i, distribution: pyro.sample(f"z{i + 1}", distribution))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x|z1), batch shape ``z.shape[:-1]`` and event shape ``data_shape``."""
        return self.likelihood(z)

    def embed(self, x: Any, mask: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """One point for each datum, shape ``(N, L_1)``: ``z1`` if every layer of the guide is at its centre.

        Args:
            x: data as :meth:`fit` takes them: an array, a data frame, a path, a data loader, ...
            mask: true where a value was observed, if ``x`` does not say it itself.
            batch_size: data that are encoded at once.
        """
        return self._in_batches(self._embed, x, mask, batch_size=batch_size)

    def _embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inference(self._encoder_input(x, mask), self._layers, lambda i, distribution: centre(distribution))[0]

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draws from p(x), shape ``(num_samples, *data_shape)``; or the means of p(x|z1) at draws of ``z1``."""
        top = len(self.layers)
        distribution = self.decode(
            self._descend(lambda i, distribution: distribution.sample((num_samples,) if i == top else ()))
        )
        return distribution.mean if mean else distribution.sample()

    def examples(self, num_samples: int) -> Tensor:
        """Means of p(x|z) at draws of z; shape ``(num_samples, *data_shape)``."""
        return self.sample(num_samples, mean=True)

    def reconstruct(self, x: Any, mask: Any = None, *, batch_size: int = BATCH_SIZE) -> Tensor:
        """The mean of p(x|z1) at ``z1 = embed(x)``, shape of ``x``; takes what :meth:`embed` takes."""
        return self._in_batches(self._reconstruct, x, mask, batch_size=batch_size)

    def _reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        distribution, _ = self.likelihood.observe(self._embed(x, mask), self._as_data(x), self._as_mask(x, mask))
        return distribution.mean

    @property
    def _layers(self) -> list[Encoder]:
        return [_encoder(layer) for layer in self.layers]

    def _descend(self, draw: Draw) -> Tensor:
        z = draw(len(self.layers), self.prior())  # event (L_n,)
        for i in reversed(range(len(self.layers))):
            z = draw(i, self.layers[i](z))  # event (L_{i+1},)
        return z


make_hierarchical_vae = HierarchicalVAE.from_names
