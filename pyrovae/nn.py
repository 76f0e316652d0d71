"""Bodies: networks that map tensors ``[..., *in_shape]`` to tensors ``[..., *out_shape]``.

The dimensions of particles, plates and batches stand to the left of the event, and every body maps the event only. A body has
attributes ``in_shape`` and ``out_shape``. A shape is an integer (a vector) or a tuple (an image). Weights are initialised as in
Glorot and Bengio (2010), like those of Burda et al. (2016), or as in He et al. (2015) in residual networks. Biases start at
zero.

References:
    Glorot and Bengio, Understanding the Difficulty of Training Deep Feedforward Neural Networks, 2010,
    https://proceedings.mlr.press/v9/glorot10a.html.
    Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.
    He, Zhang, Ren and Sun, Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ._validation import positive_integer, unknown
from .registry import register

__all__ = [
    "MLP", "Activation", "Body", "ConvDecoder", "ConvEncoder", "GatedMLP", "ResNetDecoder", "ResNetEncoder", "Shape",
    "activation_module", "as_shape", "as_widths",
]  # fmt: skip

Shape = int | Sequence[int]
Activation = str | Callable[[], nn.Module]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "leaky_relu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def as_shape(shape: Shape) -> tuple[int, ...]:
    """``784`` -> ``(784,)``; ``[1, 28, 28]`` -> ``(1, 28, 28)``."""
    found: tuple[Any, ...] = tuple(shape) if isinstance(shape, Iterable) else (shape,)
    if not found or not all(isinstance(size, Integral) and int(size) > 0 for size in found):
        raise ValueError(f"A shape must be a positive integer or a non-empty tuple of them, got {shape!r}.")
    return tuple(int(size) for size in found)


def as_widths(widths: Sequence[int]) -> list[int]:
    """Widths or channels of hidden layers as plain integers.

    Raises:
        ValueError: they are not a list of positive integers.
    """
    found = list(widths) if isinstance(widths, Iterable) else [0]
    if not all(isinstance(width, Integral) and width > 0 for width in found):
        raise ValueError(f"hidden must be a list of positive integers such as [200, 200], got {widths!r}.")
    return [int(width) for width in found]


def activation_module(activation: Activation) -> nn.Module:
    """The module with a name such as ``"tanh"``, or the result of a callable without arguments.

    Raises:
        ValueError: the name is unknown.
    """
    if not isinstance(activation, str):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(unknown("activation", activation, ACTIVATIONS))
    return ACTIVATIONS[activation]()


class Body(nn.Module):
    """A network over events; concrete bodies set the shapes and implement ``forward``."""

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]

    def check(self, x: Tensor) -> None:
        """Raise an error if the event has another shape than ``in_shape``.

        Raises:
            ValueError: the trailing dimensions of ``x`` are not ``in_shape``.
        """
        if tuple(x.shape[-len(self.in_shape) :]) != self.in_shape:
            raise ValueError(
                f"The input of {type(self).__name__} must end in shape {self.in_shape}, got a tensor of shape "
                f"{tuple(x.shape)}: reshape it, or build the network for that shape."
            )


class _Perceptron(Body):
    """A stack of hidden layers over the flattened event, and an affine map if there is an ``out_shape``."""

    def __init__(self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: Activation | None):
        super().__init__()
        self.hidden, self.activation = as_widths(hidden), activation
        self.in_shape = as_shape(in_shape)
        widths = [math.prod(self.in_shape), *self.hidden]
        self.out_shape = (widths[-1],) if out_shape is None else as_shape(out_shape)
        self.init_arguments = {"out_shape": None if out_shape is None else self.out_shape}
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths):
            layers += self.layer(wide, narrow)
        if out_shape is not None:
            layers.append(_glorot(nn.Linear(widths[-1], math.prod(self.out_shape))))
        elif not self.hidden:
            layers.append(nn.Identity())
        self.layers = nn.Sequential(*layers)

    @abstractmethod
    def layer(self, wide: int, narrow: int) -> list[nn.Module]:
        """The modules of one hidden layer."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., *in_shape]`` -> ``[..., *out_shape]``."""
        self.check(x)
        y = self.layers(x.flatten(-len(self.in_shape)))
        return y if len(self.out_shape) == 1 else y.unflatten(-1, self.out_shape)


@register("body")
class MLP(_Perceptron):
    r"""A multilayer perceptron over the last dimensions.

    .. math:: h_0 = \operatorname{vec}(x), \quad h_i = a(W_i h_{i-1} + b_i), \quad y = W_{n+1} h_n + b_{n+1}

    Args:
        in_shape: event shape of the input, which is flattened.
        hidden: widths of the hidden layers; ``[]`` makes an affine map.
        out_shape: event shape of the output; ``None`` leaves out the last affine map, as in the body of an encoder.
        activation: a name (``"relu"``, ``"tanh"``, ...) or a callable that makes a module.

    Raises:
        ValueError: a width or shape is not positive, or the activation's name is unknown.

    Example:
        >>> import torch
        >>> from pyrovae.nn import MLP
        >>> MLP(50, [200, 200], (1, 28, 28), activation="tanh")(torch.zeros(7, 3, 50)).shape
        torch.Size([7, 3, 1, 28, 28])
    """

    activation: Activation

    def __init__(self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None = None, activation: Activation = "relu"):
        super().__init__(in_shape, hidden, out_shape, activation)

    def layer(self, wide: int, narrow: int) -> list[nn.Module]:
        """An affine map and the activation."""
        return [_glorot(nn.Linear(wide, narrow)), activation_module(self.activation)]


@register("body")
class GatedMLP(_Perceptron):
    r"""A multilayer perceptron whose hidden layers are gated (Dauphin et al. 2017; Tomczak and Welling 2018).

    .. math:: h_i = a(W_i h_{i-1} + b_i) \odot \sigma(V_i h_{i-1} + c_i)

    Args:
        in_shape: event shape of the input.
        hidden: widths of the hidden layers.
        out_shape: event shape of the output, or ``None`` as in :class:`MLP`.
        activation: applied to the affine map before the gate multiplies it; by default the identity, as in both papers.

    References:
        Dauphin, Fan, Auli and Grangier, Language Modeling with Gated Convolutional Networks, 2017,
        https://arxiv.org/abs/1612.08083.
        Tomczak and Welling, VAE with a VampPrior, 2018, https://arxiv.org/abs/1705.07120.

    Example:
        >>> import torch
        >>> from pyrovae.nn import GatedMLP
        >>> GatedMLP(784, [300, 300])(torch.zeros(2, 784)).shape
        torch.Size([2, 300])
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None = None, activation: Activation | None = None
    ):
        super().__init__(in_shape, hidden, out_shape, activation)

    def layer(self, wide: int, narrow: int) -> list[nn.Module]:
        """A gated affine map."""
        return [_GatedLinear(wide, narrow, activation_module(self.activation or nn.Identity))]


class _ImageEncoder(Body):
    """Stages that halve height and width, one for each number of channels; the result is flattened."""

    def _assemble(self, in_shape: Shape, hidden: Sequence[int], activation: Activation) -> None:
        self.in_shape, self.hidden, self.activation = _image(in_shape), as_widths(hidden), activation
        channels, height, width = self.in_shape
        height, width = _halvings(height, width, len(self.hidden))[-1]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise([channels, *self.hidden]):
            layers += self.stage(wide, narrow)
        self.layers = nn.Sequential(*layers)
        self.out_shape = ((self.hidden[-1] if self.hidden else channels) * height * width,)

    @abstractmethod
    def stage(self, wide: int, narrow: int) -> list[nn.Module]:
        """The modules of one stage."""

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C, H, W]`` -> ``[..., features]``."""
        self.check(x)
        y = self.layers(x.reshape(-1, *self.in_shape))
        return y.reshape(*x.shape[:-3], *self.out_shape)


class _ImageDecoder(Body):
    """An affine map to the smallest image, then a stage for each doubling of height and width."""

    def _assemble(self, in_shape: Shape, out_shape: Shape, hidden: Sequence[int], activation: Activation) -> None:
        kind = type(self).__name__
        self.in_shape, self.out_shape = as_shape(in_shape), as_shape(out_shape)
        self.hidden, self.activation = as_widths(hidden), activation
        if len(self.in_shape) != 1:
            raise ValueError(f"in_shape of {kind} must have one dimension, got {self.in_shape}: pass the length of the latent.")
        if not self.hidden:
            raise ValueError(f"hidden of {kind} must have one number of channels or more, got []: pass hidden=[32, 64], say.")
        _image(self.out_shape[-3:])
        height, width = self.out_shape[-2:]
        sizes = _halvings(height, width, len(self.hidden))
        channels = math.prod(self.out_shape[:-2])
        self.start_shape = (self.hidden[-1], *sizes[-1])
        self.start = self.initialize(nn.Linear(self.in_shape[0], math.prod(self.start_shape)))
        layers: list[nn.Module] = []
        widths = [channels, *self.hidden]
        for i in reversed(range(len(self.hidden))):
            # Halving rounds down, so that an odd size needs one more row or column.
            extra = (sizes[i][0] - 2 * sizes[i + 1][0], sizes[i][1] - 2 * sizes[i + 1][1])
            layers += self.stage(widths[i + 1])
            layers += [activation_module(activation)]
            layers += [self.initialize(nn.ConvTranspose2d(widths[i + 1], widths[i], 4, 2, 1, extra))]
        self.layers = nn.Sequential(*layers)

    @abstractmethod
    def stage(self, channels: int) -> list[nn.Module]:
        """The modules that come before height and width are doubled."""

    @abstractmethod
    def initialize(self, layer: nn.Linear | nn.ConvTranspose2d) -> nn.Module:
        """The layer, with its weights initialised."""

    def forward(self, z: Tensor) -> Tensor:
        """``[..., L]`` -> ``[..., *out_shape]``."""
        self.check(z)
        y = self.layers(self.start(z).reshape(-1, *self.start_shape))
        return y.reshape(*z.shape[:-1], *self.out_shape)


@register("body")
class ConvEncoder(_ImageEncoder):
    r"""Strided convolutions from an image to a feature vector.

    Each layer halves height and width (kernel 4, stride 2, padding 1), rounding down. The result is flattened.

    Args:
        in_shape: ``(channels, height, width)``.
        hidden: channels of the layers.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: ``in_shape`` is not that of an image, or the image is too small for so many layers.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ConvEncoder
        >>> ConvEncoder((1, 28, 28), [32, 64])(torch.zeros(5, 2, 1, 28, 28)).shape
        torch.Size([5, 2, 3136])
    """

    def __init__(self, in_shape: Shape, hidden: Sequence[int] = (32, 64), activation: Activation = "relu"):
        super().__init__()
        self._assemble(in_shape, hidden, activation)

    def stage(self, wide: int, narrow: int) -> list[nn.Module]:
        """A strided convolution and the activation."""
        return [_glorot(nn.Conv2d(wide, narrow, 4, 2, 1)), activation_module(self.activation)]


@register("body")
class ConvDecoder(_ImageDecoder):
    r"""Transposed convolutions from a latent vector to an image, mirroring :class:`ConvEncoder`.

    Args:
        in_shape: the latent dimension.
        out_shape: ``(channels, height, width)``, or ``(parameters, channels, height, width)`` for a likelihood that
            takes several parameters per pixel.
        hidden: channels of the mirrored encoder, so the first layer here has ``hidden[-1]``.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: ``out_shape`` is not that of an image, or the image is too small for so many layers.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ConvDecoder
        >>> ConvDecoder(10, (3, 29, 35), [16, 32])(torch.zeros(4, 10)).shape
        torch.Size([4, 3, 29, 35])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, hidden: Sequence[int] = (32, 64), activation: Activation = "relu"):
        super().__init__()
        self._assemble(in_shape, out_shape, hidden, activation)

    def stage(self, channels: int) -> list[nn.Module]:
        """No modules."""
        return []

    def initialize(self, layer: nn.Linear | nn.ConvTranspose2d) -> nn.Module:
        """Initialise as in Glorot and Bengio (2010)."""
        return _glorot(layer)


@register("body", "resnet_encoder")
class ResNetEncoder(_ImageEncoder):
    r"""Strided convolutions from an image to a feature vector, each followed by residual blocks.

    .. math:: h \mapsto h + W_2 * a(W_1 * a(h))

    A stage halves height and width as in :class:`ConvEncoder`. A block has two 3 x 3 convolutions with an activation before
    each (He et al. 2016). There is no batch normalisation, so that the posterior of a datum does not depend on the rest of its
    batch. Weights start as :math:`N(0, 2 / n)` for units of n inputs (He et al. 2015).

    Args:
        in_shape: ``(channels, height, width)``.
        hidden: channels of the stages.
        blocks: residual blocks in each stage.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: ``in_shape`` is not that of an image, or the image is too small for so many layers.

    References:
        He, Zhang, Ren and Sun, Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852.
        He, Zhang, Ren and Sun, Identity Mappings in Deep Residual Networks, 2016, https://arxiv.org/abs/1603.05027.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ResNetEncoder
        >>> ResNetEncoder((1, 28, 28), [8, 16])(torch.zeros(5, 2, 1, 28, 28)).shape
        torch.Size([5, 2, 784])
    """

    def __init__(self, in_shape: Shape, hidden: Sequence[int] = (32, 64), blocks: int = 1, activation: Activation = "relu"):
        super().__init__()
        self.blocks = positive_integer(blocks, "blocks")
        self._assemble(in_shape, hidden, activation)

    def stage(self, wide: int, narrow: int) -> list[nn.Module]:
        """A strided convolution, the blocks, and the activation."""
        blocks = [_ResidualBlock(narrow, self.activation) for _ in range(self.blocks)]
        return [_he(nn.Conv2d(wide, narrow, 4, 2, 1)), *blocks, activation_module(self.activation)]


@register("body", "resnet_decoder")
class ResNetDecoder(_ImageDecoder):
    r"""Residual blocks and transposed convolutions from a latent vector to an image, mirroring :class:`ResNetEncoder`.

    Args:
        in_shape: the latent dimension.
        out_shape: ``(channels, height, width)``, or ``(parameters, channels, height, width)`` as in :class:`ConvDecoder`.
        hidden: channels of the mirrored encoder, so the first stage here has ``hidden[-1]``.
        blocks: residual blocks in each stage.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: ``out_shape`` is not that of an image, or the image is too small for so many layers.

    References:
        He, Zhang, Ren and Sun, Delving Deep into Rectifiers, 2015, https://arxiv.org/abs/1502.01852.
        He, Zhang, Ren and Sun, Identity Mappings in Deep Residual Networks, 2016, https://arxiv.org/abs/1603.05027.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ResNetDecoder
        >>> ResNetDecoder(10, (3, 29, 35), [8, 16])(torch.zeros(4, 10)).shape
        torch.Size([4, 3, 29, 35])
    """

    def __init__(
        self,
        in_shape: Shape,
        out_shape: Shape,
        hidden: Sequence[int] = (32, 64),
        blocks: int = 1,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.blocks = positive_integer(blocks, "blocks")
        self._assemble(in_shape, out_shape, hidden, activation)

    def stage(self, channels: int) -> list[nn.Module]:
        """The residual blocks."""
        return [_ResidualBlock(channels, self.activation) for _ in range(self.blocks)]

    def initialize(self, layer: nn.Linear | nn.ConvTranspose2d) -> nn.Module:
        """Initialise as in He et al. (2015)."""
        return _he(layer)


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, activation: Activation):
        super().__init__()
        convolutions = [_he(nn.Conv2d(channels, channels, 3, 1, 1)) for _ in range(2)]
        self.branch = nn.Sequential(*(layer for each in convolutions for layer in (activation_module(activation), each)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class _GatedLinear(nn.Module):
    def __init__(self, wide: int, narrow: int, activation: nn.Module):
        super().__init__()
        self.linear = _glorot(nn.Linear(wide, narrow))
        self.gate = _glorot(nn.Linear(wide, narrow))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x)) * torch.sigmoid(self.gate(x))


def _glorot(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _he(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
    if isinstance(layer, nn.ConvTranspose2d):
        # With stride s, each output of a transposed convolution depends on one in s^2 of the kernel's weights.
        fan_in = layer.in_channels * math.prod(layer.kernel_size) / math.prod(layer.stride)
    else:
        fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=math.sqrt(2.0 / fan_in))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _image(shape: Shape) -> tuple[int, ...]:
    found = as_shape(shape)
    if len(found) != 3:
        cure = f"write {(1, *found)} for images of one channel" if len(found) == 2 else "use an MLP"
        raise ValueError(f"The shape of images must be (channels, height, width), got {found}: {cure}.")
    return found


def _halvings(height: int, width: int, times: int) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    for _ in range(times):
        height, width = height // 2, width // 2
        sizes.append((height, width))
    if min(height, width) < 1:
        raise ValueError(
            f"An image must be at least {2**times} x {2**times} to be halved {times} times, got {sizes[0][0]} x {sizes[0][1]}: "
            f"use fewer layers."
        )
    return sizes
