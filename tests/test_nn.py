"""Bodies against their formulas written out in NumPy and SciPy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.signal import correlate2d
from torch import nn

from pyrovae.nn import (
    ACTIVATIONS,
    MLP,
    ConvDecoder,
    ConvEncoder,
    GatedMLP,
    ResNetDecoder,
    ResNetEncoder,
    _ResidualBlock,
    activation_module,
    as_shape,
)

pytestmark = pytest.mark.usefixtures("float64")


def _perturb(net: nn.Module) -> list[np.ndarray]:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return [parameter.detach().numpy() for parameter in net.parameters()]


def test_mlp_is_its_formula() -> None:
    net = MLP((2, 3), [5, 4], (3, 2), activation="tanh")
    w1, b1, w2, b2, w3, b3 = _perturb(net)
    x = torch.randn(7, 2, 3)
    h = x.numpy().reshape(7, 6)
    expected = np.tanh(np.tanh(h @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    assert_allclose(net(x).detach(), expected.reshape(7, 3, 2), rtol=1e-12)


def test_mlp_without_output_ends_after_the_activation() -> None:
    net = MLP(3, [4], activation="relu")
    w, b = _perturb(net)
    x = torch.randn(9, 3)
    assert net.out_shape == (4,)
    assert_allclose(net(x).detach(), np.maximum(x.numpy() @ w.T + b, 0), rtol=1e-12)


def test_mlp_without_hidden_layers_is_affine_or_the_identity() -> None:
    net = MLP(3, [], 2)
    w, b = _perturb(net)
    x = torch.randn(5, 3)
    assert_allclose(net(x).detach(), x.numpy() @ w.T + b, rtol=1e-12)
    assert MLP((2, 3), []).out_shape == (6,)
    assert torch.equal(MLP((2, 3), [])(x[:2, None].expand(2, 2, 3)), x[:2, None].expand(2, 2, 3).reshape(2, 6))


@pytest.mark.parametrize(("activation", "formula"), [(None, lambda h: h), ("tanh", np.tanh)])
def test_gated_mlp_is_its_formula(activation: str | None, formula: object) -> None:
    net = GatedMLP(3, [4], 2, activation=activation)
    w, b, v, c, u, d = _perturb(net)
    x = torch.randn(6, 3)
    h = x.numpy()
    gated = formula(h @ w.T + b) / (1 + np.exp(-(h @ v.T + c)))
    assert_allclose(net(x).detach(), gated @ u.T + d, rtol=1e-12)


def test_conv_encoder_is_a_strided_correlation() -> None:
    net = ConvEncoder((2, 7, 6), [3], activation="tanh")
    w, b = _perturb(net)
    x = torch.randn(2, 7, 6)
    padded = np.pad(x.numpy(), ((0, 0), (1, 1), (1, 1)))
    planes = [sum(correlate2d(padded[i], w[o, i], "valid") for i in range(2)) + b[o] for o in range(3)]
    expected = np.tanh(np.stack(planes)[:, ::2, ::2])
    assert net.out_shape == (3 * 3 * 3,)
    assert_allclose(net(x).detach(), expected.reshape(-1), rtol=1e-12)


def test_conv_decoder_is_the_adjoint_of_a_strided_correlation() -> None:
    # <conv(x), y> = <x, conv^T(y)> for every x, which fixes a transposed convolution.
    decoder, encoder = ConvDecoder(4, (2, 7, 6), [3], activation="tanh"), ConvEncoder((2, 7, 6), [3], activation=nn.Identity)
    _perturb(decoder)
    transposed, conv = decoder.layers[-1], encoder.layers[0]
    with torch.no_grad():
        conv.weight.copy_(transposed.weight)
        conv.bias.zero_()
        z, x = torch.randn(5, 4), torch.randn(5, 2, 7, 6)
        h = torch.tanh(decoder.start(z))
        image = decoder(z) - transposed.bias[:, None, None]
        assert_allclose((encoder(x) * h).sum(-1), (x * image).sum((1, 2, 3)), rtol=1e-10)


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (29, 35), (4, 7)])
@pytest.mark.parametrize("channels", [1, 3])
def test_conv_bodies_fit_any_size(size: tuple[int, int], channels: int) -> None:
    encoder, decoder = ConvEncoder((channels, *size), [4, 6]), ConvDecoder(5, (2, channels, *size), [4, 6])
    x = torch.randn(2, 3, channels, *size)
    assert encoder(x).shape == (2, 3, *encoder.out_shape)
    assert decoder(torch.randn(2, 3, 5)).shape == (2, 3, 2, channels, *size)
    assert decoder.start_shape[1:] == (size[0] // 4, size[1] // 4)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (7, 5), (13, 4)])
def test_residual_bodies_take_any_size_and_whatever_leads(size: tuple[int, int], blocks: int) -> None:
    encoder, decoder = ResNetEncoder((2, *size), [4, 6], blocks), ResNetDecoder(5, (2, 3, *size), [4, 6], blocks)
    x, z = torch.randn(2, 3, 2, *size), torch.randn(2, 3, 5)
    h, y = encoder(x), decoder(z)
    assert h.shape == (2, 3, *encoder.out_shape) == (2, 3, 6 * (size[0] // 4) * (size[1] // 4))
    assert y.shape == (2, 3, 2, 3, *size)
    assert_allclose(encoder(x[1, 2]).detach(), h[1, 2].detach(), rtol=1e-9, atol=1e-12)
    assert_allclose(decoder(z[1, 2]).detach(), y[1, 2].detach(), rtol=1e-9, atol=1e-12)
    for net, out in [(encoder, h), (decoder, y)]:
        (out * torch.randn_like(out)).sum().backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad.abs().max() > 0, name


def test_a_residual_block_is_its_formula_and_the_identity_at_zero_weights() -> None:
    block, x = _ResidualBlock(2, "relu"), torch.randn(3, 2, 5, 6)
    w1, b1, w2, b2 = _perturb(block)

    def convolved(image: np.ndarray, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.stack([sum(correlate2d(image[i], w[o, i], "same") for i in range(2)) + b[o] for o in range(2)])

    for image, found in zip(x.numpy(), block(x).detach().numpy(), strict=True):
        inner = convolved(np.maximum(image, 0), w1, b1)
        assert_allclose(found, image + convolved(np.maximum(inner, 0), w2, b2), rtol=1e-10)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(block(x), x)


def test_residual_weights_start_by_he() -> None:
    """N(0, 2 / n), n the inputs of a unit: a strided transposed convolution reaches one through a tap in four."""
    encoder, decoder = ResNetEncoder((3, 16, 16), [64, 64]), ResNetDecoder(50, (64, 16, 16), [64, 64])
    strided, block, fan_in = encoder.layers[3], encoder.layers[1].branch[1], 64 * 3 * 3
    cases = [(strided, 64 * 4 * 4), (block, fan_in), (decoder.start, 50), (decoder.layers[-1], 64 * 4 * 4 / 4)]
    for layer, inputs in cases:
        assert_allclose(layer.weight.std().item(), (2 / inputs) ** 0.5, rtol=0.03)
        assert abs(layer.weight.mean().item()) < 4 * (2 / inputs / layer.weight.numel()) ** 0.5
        assert not layer.bias.any()
    # What He's rule is for: a rectified signal keeps its second moment from layer to layer.
    h = torch.randn(20, 64, 16, 16).relu()
    for layer in (decoder.layers[-1], strided):
        assert_allclose((layer(h)[..., 2:-2, 2:-2] ** 2).mean().item(), 2 * (h**2).mean().item(), rtol=0.2)


def test_empty_batch_passes() -> None:
    assert ConvEncoder((1, 8, 8), [2])(torch.zeros(0, 1, 8, 8)).shape == (0, 32)
    assert ConvDecoder(2, (1, 8, 8), [2])(torch.zeros(0, 2)).shape == (0, 1, 8, 8)
    assert MLP(3, [2], 4)(torch.zeros(0, 3)).shape == (0, 4)


def test_weights_start_by_glorot_and_biases_at_zero() -> None:
    net = MLP(300, [500], 200)
    for layer in (net.layers[0], net.layers[2]):
        fan_in, fan_out = layer.in_features, layer.out_features
        limit = (6 / (fan_in + fan_out)) ** 0.5
        assert layer.weight.abs().max() <= limit
        # The standard deviation of a uniform is limit / sqrt(3); 100,000 draws fix it to half a percent.
        assert_allclose(layer.weight.std().item(), limit / 3**0.5, rtol=0.01)
        assert not layer.bias.any()


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation_is_elementwise_and_named_as_in_torch(name: str) -> None:
    x = torch.linspace(-3, 3, 13)
    assert torch.equal(activation_module(name)(x), getattr(nn.functional, name)(x))


ONE_CHANNEL = (
    "The shape of images must be (channels, height, width), got (28, 20): write (1, 28, 20) for images of one channel."
)
NO_IMAGE = "The shape of images must be (channels, height, width), got (784,): use an MLP."


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MLP(3, [4], 2, activation="tahn"), "There is no activation 'tahn'; did you mean 'tanh'?"),
        (lambda: MLP(3, [0], 2), "hidden must be a list of positive integers such as [200, 200], got [0]."),
        (lambda: MLP(3, 200, 2), "hidden must be a list of positive integers such as [200, 200], got 200."),
        (lambda: MLP(3, [2.5], 2), "hidden must be a list of positive integers such as [200, 200], got [2.5]."),
        (lambda: ConvEncoder((1, 8, 8), [0]), "hidden must be a list of positive integers such as [200, 200], got [0]."),
        (lambda: MLP(0, [4]), "A shape must be a positive integer or a non-empty tuple of them, got 0."),
        (lambda: MLP((), [4]), "A shape must be a positive integer or a non-empty tuple of them, got ()."),
        (lambda: MLP(2.5, [4]), "A shape must be a positive integer or a non-empty tuple of them, got 2.5."),
        (lambda: MLP("abc", [4]), "A shape must be a positive integer or a non-empty tuple of them, got 'abc'."),
        (lambda: ConvEncoder(784), NO_IMAGE),
        (lambda: ConvDecoder(2, 784), NO_IMAGE),
        (lambda: ConvDecoder(2, (28, 20)), ONE_CHANNEL),
        (
            lambda: ConvEncoder((1, 8, 8), [2] * 4),
            "An image must be at least 16 x 16 to be halved 4 times, got 8 x 8: use fewer layers.",
        ),
        (
            lambda: ConvDecoder(2, (1, 8, 8), []),
            "hidden of ConvDecoder must have one number of channels or more, got []: pass hidden=[32, 64], say.",
        ),
        (
            lambda: ConvDecoder((2, 2), (1, 8, 8)),
            "in_shape of ConvDecoder must have one dimension, got (2, 2): pass the length of the latent.",
        ),
        (lambda: ResNetEncoder((1, 8, 8), [2], blocks=0), "blocks must be a positive integer, got 0."),
        (
            lambda: ResNetDecoder((2, 2), (1, 8, 8)),
            "in_shape of ResNetDecoder must have one dimension, got (2, 2): pass the length of the latent.",
        ),
        (
            lambda: MLP(3, [4])(torch.zeros(5, 4)),
            "The input of MLP must end in shape (3,), got a tensor of shape (5, 4): reshape it, or build the network for that "
            "shape.",
        ),
        (
            lambda: ConvEncoder((1, 8, 8))(torch.zeros(5, 8, 8)),
            "The input of ConvEncoder must end in shape (1, 8, 8), got a tensor of shape (5, 8, 8): reshape it, or build the "
            "network for that shape.",
        ),
    ],
)
def test_mistakes_get_one_sentence(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_shapes_become_plain_tuples() -> None:
    assert as_shape(784) == (784,)
    assert as_shape(torch.Size([1, 28, 28])) == as_shape([1, 28, 28]) == as_shape(np.array([1, 28, 28])) == (1, 28, 28)
    assert all(type(size) is int for size in as_shape(np.array([1, 28])))
