"""Inference networks of hierarchies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..encoders import DiagonalNormal, Encoder
from ..nn import MLP, Shape, as_shape
from ..registry import build, register
from .parts import check_parts, check_sizes, in_shape_of, in_size_of

__all__ = ["BottomUp", "Draw", "Guide", "Ladder", "Sizes", "Structured", "TopEncoder", "merge"]

Draw = Callable[[int, dist.Distribution], Tensor]


class Sizes(NamedTuple):
    """Sizes to build a guide for; ``network(i, in_shape)`` makes the deterministic layers below ``z{i + 1}``."""

    data_shape: tuple[int, ...]
    latent_dims: tuple[int, ...]
    encoder: Any
    in_scale: float
    network: Callable[[int, Shape], Any]


class Guide(nn.Module):
    """A factorised q(z|x); concrete guides implement ``forward`` and ``of_sizes``.

    Attributes:
        latent_dims: the size of each layer, nearest to the data first.
        data_shape: the shape of one datum, if it is known.
    """

    latent_dims: tuple[int, ...]

    @property
    @abstractmethod
    def data_shape(self) -> tuple[int, ...] | None:
        """The shape of one datum, if it is known."""

    @classmethod
    @abstractmethod
    def of_sizes(cls, sizes: Sizes) -> Guide:
        """The guide that :func:`pyrovae.make_hierarchical_vae` builds by name."""

    def check_layers(self, layers: Sequence[Encoder]) -> None:
        """Raise an error if this guide cannot use the conditionals p(z_i|z_{i+1}).

        Raises:
            ValueError: it needs others.
        """
        return

    def top(self) -> TopEncoder | None:
        """q(z_n|x), for a prior that mixes such posteriors, if this guide has it in closed form."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, layers: Sequence[Encoder], draw: Draw) -> list[Tensor]:
        """Values of all layers, nearest to the data first.

        Args:
            x: data ``(B, *data_shape)``.
            layers: the model's p(z_i|z_{i+1}), nearest to the data first, for guides that share them.
            draw: a function of a layer's index and distribution that returns a value, such as a sample or the mean.
        """


class TopEncoder:
    """q(z_n|x) of a top-down guide: a chain of bodies, then an encoder.

    Args:
        bodies: networks, applied to the data in this order.
        encoder: from their features to q(z_n|x).
        in_scale: multiplies the data on their way into the first body.
    """

    def __init__(self, bodies: Sequence[nn.Module], encoder: nn.Module, in_scale: float):
        self.bodies, self.body, self.encoder, self.in_scale = bodies, bodies[0], encoder, in_scale

    def __call__(self, x: Tensor) -> dist.Distribution:
        """Batch shape ``x.shape[:-event_dim]``, event shape ``(L_n,)``."""
        h = x * self.in_scale
        for body in self.bodies:
            h = body(h)
        return self.encoder(h)


@register("guide")
class BottomUp(Guide):
    r"""A bottom-up guide: each layer given the one below.

    .. math:: q(z \mid x) = q(z_1 \mid x) \prod_{i=2}^{n} q(z_i \mid z_{i-1})

    Args:
        encoders: q(z1|x), q(z2|z1), ...

    Raises:
        ValueError: the sizes of successive encoders do not fit.

    References:
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016,
        https://arxiv.org/abs/1509.00519.

    Example:
        >>> import pyrovae as pv
        >>> guide = pv.models.guides.BottomUp([pv.encoders.DiagonalNormal(pv.nn.MLP(9, [8]), 3),
        ...                                   pv.encoders.DiagonalNormal(pv.nn.MLP(3, [8]), 2)])
        >>> guide.latent_dims
        (3, 2)
    """

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
        self.encoders, self.latent_dims = _listed(encoders)
        self.init_arguments = {"encoders": list(encoders)}
        for i, below in enumerate(self.latent_dims[:-1]):
            check_sizes(
                f"on the size of z{i + 1}", **{f"q(z{i + 1})": below, f"q(z{i + 2}|z{i + 1})": _in(self.encoders[i + 1])}
            )

    @classmethod
    def of_sizes(cls, sizes: Sizes) -> BottomUp:
        """The body of each encoder is the network of its layer."""
        ins: list[Shape] = [sizes.data_shape, *sizes.latent_dims[:-1]]
        return cls(
            [
                build(
                    "encoder",
                    sizes.encoder,
                    body=sizes.network(i, ins[i]),
                    latent_dim=size,
                    in_scale=1.0 if i else sizes.in_scale,
                )
                for i, size in enumerate(sizes.latent_dims)
            ]
        )

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """The input shape of its first network."""
        return in_shape_of(_encoder(self.encoders[0]).body)

    def forward(self, x: Tensor, layers: Sequence[Encoder], draw: Draw) -> list[Tensor]:
        """Values of all layers, drawn from ``z1`` upwards."""
        values: list[Tensor] = []
        for i, encoder in enumerate(self.encoders):
            values.append(draw(i, encoder(values[-1] if values else x)))
        return values


@register("guide")
class Structured(Guide):
    r"""A guide with the factorisation of the posterior: each layer given the one above, and the data.

    .. math:: q(z \mid x) = q(z_n \mid x) \prod_{i=1}^{n-1} q(z_i \mid z_{i+1}, x)

    The exact posterior of a chain has this form. One body computes features h of the data for all factors; the lower encoders
    take these features, followed by the layer above.

    Args:
        body: maps ``[..., *data_shape]`` to features ``[..., H]``.
        encoders: q(z1|h, z2), ..., q(zn|h), whose bodies take ``H + L_2``, ..., ``H`` numbers.
        in_scale: multiplies the data on their way into the body.

    Raises:
        ValueError: the sizes do not fit.

    References:
        Webb et al., Faithful Inversion of Generative Models for Effective Amortized Inference, 2018,
        https://arxiv.org/abs/1712.00287.

    Example:
        >>> import pyrovae as pv
        >>> guide = pv.models.guides.Structured(pv.nn.MLP(9, [8]), [pv.encoders.DiagonalNormal(pv.nn.MLP(8 + 2, [8]), 3),
        ...                                                        pv.encoders.DiagonalNormal(pv.nn.MLP(8, [8]), 2)])
        >>> guide.latent_dims
        (3, 2)
    """

    def __init__(self, body: nn.Module, encoders: Sequence[Encoder], in_scale: float = 1.0):
        super().__init__()
        self.encoders, self.latent_dims = _listed(encoders)
        self.init_arguments = {"encoders": list(encoders)}
        self.body, self.in_scale = body, float(in_scale)
        width = _features(body)
        wanted = [width + above for above in self.latent_dims[1:]] + [width]
        for i, size in enumerate(wanted):
            check_sizes(f"on the input of q(z{i + 1})", **{"features and parent": size, "encoder": _in(self.encoders[i])})

    @classmethod
    def of_sizes(cls, sizes: Sizes) -> Structured:
        """Network 0 is the body of all factors; encoder i has network i, but encoder 0 has network 1."""
        body = sizes.network(0, sizes.data_shape)
        width, top = _features(body), len(sizes.latent_dims) - 1
        ins = [width + above for above in sizes.latent_dims[1:]] + [width]
        encoders = [
            build("encoder", sizes.encoder, body=sizes.network(max(i, min(1, top)), ins[i]), latent_dim=size)
            for i, size in enumerate(sizes.latent_dims)
        ]
        return cls(body, encoders, sizes.in_scale)

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """The input shape of its first network."""
        return in_shape_of(self.body)

    def top(self) -> TopEncoder:
        """q(z_n|x)."""
        return TopEncoder([self.body], self.encoders[-1], self.in_scale)

    def forward(self, x: Tensor, layers: Sequence[Encoder], draw: Draw) -> list[Tensor]:
        """Values of all layers, drawn from the top down."""
        h = self.body(x * self.in_scale)
        top = len(self.encoders) - 1
        values = [draw(top, self.encoders[top](h))]
        for i in reversed(range(top)):
            above = values[0]
            inputs = torch.cat([h.expand(*above.shape[:-1], h.shape[-1]), above], -1)
            values.insert(0, draw(i, self.encoders[i](inputs)))
        return values


@register("guide")
class Ladder(Guide):
    r"""A top-down guide: each of the model's conditionals times a Gaussian factor from a bottom-up network.

    .. math:: d_1 = f_1(x), \quad d_i = f_i(d_{i-1}), \quad q(z_n \mid x) = N(\hat\mu_n(d_n), \hat\sigma_n(d_n)^2), \quad
        q(z_i \mid z_{i+1}, x) = N\!\left(\frac{\hat\mu_i \hat\sigma_i^{-2} + \mu_i \sigma_i^{-2}}
        {\hat\sigma_i^{-2} + \sigma_i^{-2}}, \frac{1}{\hat\sigma_i^{-2} + \sigma_i^{-2}}\right)

    Here :math:`\mu_i, \sigma_i` are those of the model's :math:`p(z_i \mid z_{i+1})`, whose networks the guide shares.

    Args:
        bodies: f_1, f_2, ...
        encoders: diagonal normals, the i-th from d_i to mean and scale.
        in_scale: multiplies the data on their way into the first body.

    Raises:
        ValueError: a factor of guide or model is not a diagonal normal, or the sizes do not fit.

    References:
        Sonderby et al., Ladder Variational Autoencoders, 2016, https://arxiv.org/abs/1602.02282.

    Example:
        >>> import pyrovae as pv
        >>> guide = pv.models.guides.Ladder([pv.nn.MLP(9, [8]), pv.nn.MLP(8, [6])],
        ...                                [pv.encoders.DiagonalNormal(pv.nn.MLP(8, []), 3),
        ...                                 pv.encoders.DiagonalNormal(pv.nn.MLP(6, []), 2)])
        >>> guide.latent_dims
        (3, 2)
    """

    def __init__(self, bodies: Sequence[nn.Module], encoders: Sequence[Encoder], in_scale: float = 1.0):
        super().__init__()
        self.encoders, self.latent_dims = _listed(encoders)
        self.init_arguments = {"bodies": list(bodies), "encoders": list(encoders)}
        self.bodies, self.in_scale = nn.ModuleList(bodies), float(in_scale)
        if len(self.bodies) != len(self.encoders):
            raise ValueError(f"A ladder must have a body for each encoder, got {len(self.bodies)} for {len(self.encoders)}.")
        _check_diagonal("guide", encoders)
        for i, (body, encoder) in enumerate(zip(bodies, encoders, strict=True)):
            check_sizes(f"on the size of d{i + 1}", body=_features(body), encoder=_in(encoder))
            if i + 1 < len(bodies):
                check_sizes(
                    f"on the size of d{i + 1}", **{f"f{i + 1}": _features(body), f"f{i + 2}": in_size_of(bodies[i + 1])}
                )

    @classmethod
    def of_sizes(cls, sizes: Sizes) -> Ladder:
        """The bodies are the networks of the layers, in a chain."""
        bodies: list[Any] = []
        for i in range(len(sizes.latent_dims)):
            bodies.append(sizes.network(i, _features(bodies[-1]) if bodies else sizes.data_shape))
        encoders = [
            build("encoder", sizes.encoder, body=MLP(_features(body), []), latent_dim=size)
            for body, size in zip(bodies, sizes.latent_dims, strict=True)
        ]
        return cls(bodies, encoders, sizes.in_scale)

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """The input shape of its first network."""
        return in_shape_of(self.bodies[0])

    def check_layers(self, layers: Sequence[Encoder]) -> None:
        """The model's conditionals must be diagonal normals too."""
        _check_diagonal("model", layers)

    def top(self) -> TopEncoder:
        """q(z_n|x)."""
        return TopEncoder(list(self.bodies), self.encoders[-1], self.in_scale)

    def forward(self, x: Tensor, layers: Sequence[Encoder], draw: Draw) -> list[Tensor]:
        """Values of all layers, drawn from the top down."""
        d, evidence = x * self.in_scale, []
        for body, encoder in zip(self.bodies, self.encoders, strict=True):
            d = body(d)
            evidence.append(encoder(d))
        top = len(evidence) - 1
        values = [draw(top, evidence[top])]
        for i in reversed(range(top)):
            values.insert(0, draw(i, merge(evidence[i], layers[i](values[0]))))
        return values


def merge(evidence: dist.Distribution, prior: dist.Distribution) -> dist.Distribution:
    r"""The normalised product of two diagonal normals: precisions add, means are weighted by them.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyrovae.models.guides import merge
        >>> distribution = merge(dist.Normal(torch.zeros(1), 1.0).to_event(1), dist.Normal(torch.ones(1), 1.0).to_event(1))
        >>> distribution.mean, distribution.variance
        (tensor([0.5000]), tensor([0.5000]))
    """
    here, there = evidence.variance.reciprocal(), prior.variance.reciprocal()
    variance = (here + there).reciprocal()
    return dist.Normal((evidence.mean * here + prior.mean * there) * variance, variance.sqrt()).to_event(1)


def _listed(encoders: Sequence[Encoder]) -> tuple[nn.ModuleList, tuple[int, ...]]:
    check_parts(*((encoder, Encoder) for encoder in encoders))
    if len(encoders) < 2:
        raise ValueError(f"A hierarchy's guide must have an encoder for each of two or more layers, got {len(encoders)}.")
    return nn.ModuleList(encoders), tuple(encoder.latent_dim for encoder in encoders)


def _encoder(module: nn.Module) -> Encoder:
    # To a type checker an nn.ModuleList holds plain modules.
    assert isinstance(module, Encoder)
    return module


def _in(encoder: nn.Module) -> int | None:
    return in_size_of(_encoder(encoder).body)


def _features(body: nn.Module) -> int:
    shape: Any = getattr(body, "out_shape", None)
    if shape is None or len(as_shape(shape)) != 1:
        raise ValueError(f"The body of a guide must have an out_shape of one dimension, got a {type(body).__name__} without.")
    return as_shape(shape)[0]


def _check_diagonal(where: str, encoders: Sequence[Encoder]) -> None:
    for encoder in encoders:
        if not isinstance(encoder, DiagonalNormal):
            raise ValueError(
                f"The encoders of the {where} must be diagonal normals for a ladder, got a {type(encoder).__name__}: choose "
                f"'diagonal_normal' there, or a 'structured' guide."
            )
