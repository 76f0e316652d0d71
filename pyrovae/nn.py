"""Bodies: networks from tensor to tensor over ``[..., *shape]``, whatever leads.

Particles, plates and batches all stand to the left of the event, so every body maps the event alone. A body says its
``in_shape`` and ``out_shape``; a shape is an integer (a vector) or a tuple (an image). Weights start by Glorot and Bengio
(2010), biases at zero, as in Burda et al. (2016).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

from .registry import register, unknown

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
        raise ValueError(f"A shape is a positive integer or a non-empty tuple of them, not {shape!r}.")
    return tuple(int(size) for size in found)


def as_widths(widths: Sequence[int]) -> list[int]:
    """Widths or channels of hidden layers as plain integers.

    Raises:
        ValueError: they are no list of positive integers.
    """
    found = list(widths) if isinstance(widths, Iterable) else [0]
    if not all(isinstance(width, Integral) and width > 0 for width in found):
        raise ValueError(f"hidden is a list of positive integers such as [200, 200], not {widths!r}.")
    return [int(width) for width in found]


def positive_integer(value: Any, what: str) -> int:
    """``value`` as a plain integer.

    Raises:
        ValueError: it is no positive integer; the message calls it ``what``.
    """
    if not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{what} is a positive integer, not {value!r}.")
    return int(value)


def positive_number(value: Any, what: str) -> float:
    """``value`` as a plain float.

    Raises:
        ValueError: it is no positive, finite number; the message calls it ``what``.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{what} is a positive number, not {value!r}.")
    return float(value)


def activation_module(activation: Activation) -> nn.Module:
    """The module behind a name such as ``"tanh"``, or what a zero-argument callable returns.

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
        """Refuse an event of another shape with one sentence.

        Raises:
            ValueError: the trailing dimensions of ``x`` are not ``in_shape``.
        """
        if tuple(x.shape[-len(self.in_shape) :]) != self.in_shape:
            raise ValueError(
                f"{type(self).__name__} takes events of shape {self.in_shape}, but got a tensor of shape {tuple(x.shape)}: "
                f"reshape it, or build the network for that shape."
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
        in_shape: event shape of the input; more than one dimension is flattened.
        hidden: widths of the hidden layers; ``[]`` makes an affine map.
        out_shape: event shape of the output; ``None`` ends after the last hidden activation, which is what an encoder
            wants from its body.
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
        activation: applied to the ungated half; the identity, as in both papers, if ``None``.

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


@register("body")
class ConvEncoder(Body):
    r"""Strided convolutions from an image to a feature vector.

    Each layer halves height and width (kernel 4, stride 2, padding 1), so any image size works as long as it survives
    the halvings; the result is flattened.

    Args:
        in_shape: ``(channels, height, width)``.
        hidden: channels of the layers.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: the input is not an image, or too small for that many halvings.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ConvEncoder
        >>> ConvEncoder((1, 28, 28), [32, 64])(torch.zeros(5, 2, 1, 28, 28)).shape
        torch.Size([5, 2, 3136])
    """

    def __init__(self, in_shape: Shape, hidden: Sequence[int] = (32, 64), activation: Activation = "relu"):
        super().__init__()
        self.in_shape, self.hidden, self.activation = _image(in_shape), as_widths(hidden), activation
        channels, height, width = self.in_shape
        height, width = _halvings(height, width, len(self.hidden))[-1]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise([channels, *self.hidden]):
            layers += [_glorot(nn.Conv2d(wide, narrow, 4, 2, 1)), activation_module(activation)]
        self.layers = nn.Sequential(*layers)
        self.out_shape = ((self.hidden[-1] if self.hidden else channels) * height * width,)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C, H, W]`` -> ``[..., features]``."""
        self.check(x)
        y = self.layers(x.reshape(-1, *self.in_shape))
        return y.reshape(*x.shape[:-3], *self.out_shape)


@register("body")
class ConvDecoder(Body):
    r"""The mirror of :class:`ConvEncoder`: a latent to an image by transposed convolutions.

    Args:
        in_shape: the latent dimension.
        out_shape: ``(channels, height, width)``, or ``(parameters, channels, height, width)`` for a likelihood that
            takes several parameters per pixel.
        hidden: channels of the mirrored encoder, so the first layer here has ``hidden[-1]``.
        activation: a name or a callable that makes a module.

    Raises:
        ValueError: the output is not an image, or too small for that many doublings.

    Example:
        >>> import torch
        >>> from pyrovae.nn import ConvDecoder
        >>> ConvDecoder(10, (3, 29, 35), [16, 32])(torch.zeros(4, 10)).shape
        torch.Size([4, 3, 29, 35])
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, hidden: Sequence[int] = (32, 64), activation: Activation = "relu"):
        super().__init__()
        self.in_shape, self.out_shape = as_shape(in_shape), as_shape(out_shape)
        self.hidden, self.activation = as_widths(hidden), activation
        if len(self.in_shape) != 1:
            raise ValueError(f"ConvDecoder takes a latent vector, not events of shape {self.in_shape}.")
        if not self.hidden:
            raise ValueError("ConvDecoder needs at least one hidden layer of channels: hidden=[32, 64], for example.")
        _image(self.out_shape[-3:])
        height, width = self.out_shape[-2:]
        sizes = _halvings(height, width, len(self.hidden))
        channels = math.prod(self.out_shape[:-2])
        self.start_shape = (self.hidden[-1], *sizes[-1])
        self.start = _glorot(nn.Linear(self.in_shape[0], math.prod(self.start_shape)))
        layers: list[nn.Module] = []
        widths = [channels, *self.hidden]
        for i in reversed(range(len(self.hidden))):
            # A halving rounds down, so an odd size needs the lost row or column back.
            extra = (sizes[i][0] - 2 * sizes[i + 1][0], sizes[i][1] - 2 * sizes[i + 1][1])
            layers += [activation_module(activation), _glorot(nn.ConvTranspose2d(widths[i + 1], widths[i], 4, 2, 1, extra))]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        """``[..., L]`` -> ``[..., *out_shape]``."""
        self.check(z)
        y = self.layers(self.start(z).reshape(-1, *self.start_shape))
        return y.reshape(*z.shape[:-1], *self.out_shape)


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


def _image(shape: Shape) -> tuple[int, ...]:
    found = as_shape(shape)
    if len(found) != 3:
        raise ValueError(f"A convolutional body takes images (channels, height, width), not shape {found}: use an MLP.")
    return found


def _halvings(height: int, width: int, times: int) -> list[tuple[int, int]]:
    sizes = [(height, width)]
    for _ in range(times):
        height, width = height // 2, width // 2
        sizes.append((height, width))
    if min(height, width) < 1:
        raise ValueError(f"An image of {sizes[0][0]} x {sizes[0][1]} cannot be halved {times} times: use fewer layers.")
    return sizes
