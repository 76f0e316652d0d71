"""The C++ operations: against float64, SciPy and published values, and where graphs may call them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

import pyrovae as pv
from pyrovae.compile import choices, kernels, matmul, notes, rewrites
from pyrovae.compile import graph as compile_graph
from pyrovae.compile.matmul import select_matmul_backend
from pyrovae.compile.rewrites import join_decoders, rewrite

TANH, RELU = 0, 1
# In CI a missing compiler must fail, not skip, this module.
REQUIRED = os.environ.get("PYROVAE_REQUIRE_COMPILER", "0") not in ("", "0") or os.environ.get("CI") == "true"
with warnings.catch_warnings(record=True):  # of a compiler that fails
    warnings.simplefilter("always")
    COMPILES = kernels.load_library() is not None
WHY_NOT = notes.reasons().get("native", "PYROVAE_NATIVE=none switches it off")
pytestmark = pytest.mark.skipif(not COMPILES and not REQUIRED, reason=WHY_NOT)


def network(
    widths: list[int], rows: int, num_data: int, scale: float = 0.3
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(sum(widths) + rows)
    pairs = list(itertools.pairwise(widths))
    weights = [scale * torch.randn(wide, narrow, generator=generator) for wide, narrow in pairs]
    biases = [torch.randn(narrow, generator=generator) for _, narrow in pairs]
    x = torch.rand(num_data, widths[-1], generator=generator)
    return torch.randn(rows, widths[0], generator=generator), weights, biases, x


def exact(
    left: Tensor, weights: list[Tensor], biases: list[Tensor], activations: list[int], x: Tensor, rounded: bool = False
) -> Tensor:
    def factor(value: Tensor) -> Tensor:
        return (value.to(torch.bfloat16) if rounded else value).double()

    value = left
    for place, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        value = factor(value) @ factor(weight) + bias.double()
        if place < len(activations):
            value = torch.tanh(value) if activations[place] == TANH else torch.relu(value)
    data = x[torch.arange(len(left)) % len(x)].double()
    return -functional.binary_cross_entropy_with_logits(value, data, reduction="none").sum(-1)


SIZES = [
    ([5, 7], 1, 1),
    ([3, 16, 48], 8, 2),
    ([50, 200, 200, 784], 301, 1),
    ([4, 33, 15, 9, 95], 130, 13),
    ([6, 100, 2000], 40, 40),
]


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("activation", [TANH, RELU])
@pytest.mark.parametrize(("widths", "rows", "num_data"), SIZES)
def test_a_decoder_is_the_exact_one(threads: int, widths: list[int], rows: int, num_data: int, activation: int) -> None:
    left, weights, biases, x = network(widths, rows, num_data)
    activations = [activation] * (len(weights) - 1)
    found = kernels.bernoulli_decoder(left, weights, biases, activations, x)
    wanted = exact(left, weights, biases, activations, x)
    # A float32 sum of float32 layers, as torch's own.
    assert torch.allclose(found.double(), wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("activation", [TANH, RELU])
@pytest.mark.parametrize(("widths", "rows", "num_data"), SIZES)
def test_a_rounded_decoder_rounds_every_factor(
    threads: int, widths: list[int], rows: int, num_data: int, activation: int
) -> None:
    left, weights, biases, x = network(widths, rows, num_data)
    activations = [activation] * (len(weights) - 1)
    found = kernels.bernoulli_decoder(left, weights, biases, activations, x, True).double()
    wanted = exact(left, weights, biases, activations, x, rounded=True)
    # A hidden value on the brink may be rounded to the other side: few are, so most rows are exact.
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-2)
    off, far = (found - wanted).abs(), (exact(left, weights, biases, activations, x) - wanted).abs()
    assert off.median() <= 0.1 * far.median()


@pytest.mark.parametrize("widths", [[7, 90], [50, 784], [128, 16]])
def test_without_hidden_values_a_rounded_decoder_is_exact(widths: list[int]) -> None:
    left, weights, biases, x = network(widths, 40, 3)
    left[:, :2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halfway, so to the even one: down, and up
    found = kernels.bernoulli_decoder(left, weights, biases, [], x, True)
    assert torch.allclose(found.double(), exact(left, weights, biases, [], x, rounded=True), rtol=2e-6, atol=2e-5)


def test_a_rounded_hidden_layer_of_whole_numbers_is_exact() -> None:
    # All of them below 256, so that bfloat16 has them: nothing is rounded, and what lies where must be right.
    generator = torch.Generator().manual_seed(0)
    widths = [9, 51, 33, 70]
    weights = [torch.randint(-1, 2, pair, generator=generator).float() for pair in itertools.pairwise(widths)]
    biases = [torch.randint(-2, 3, (width,), generator=generator).float() for width in widths[1:]]
    weights[2] /= 64
    left, x = torch.randint(0, 2, (37, 9), generator=generator).float(), torch.rand(5, 70, generator=generator)
    wanted = exact(left, weights, biases, [RELU, RELU], x)
    found = kernels.bernoulli_decoder(left, weights, biases, [RELU, RELU], x, True)
    assert torch.allclose(found.double(), wanted, rtol=2e-6, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: a | {"left": torch.zeros(4, 7)}, r"weights\[0\] must have shape \(7, 5\), got \(6, 5\)"),
        (lambda a: a | {"left": torch.zeros(6)}, r"left must have shape"),
        (lambda a: a | {"left": torch.zeros(6, 4).t()}, "left must be contiguous, got strides"),
        (lambda a: a | {"x": torch.zeros(2, 9).double()}, "x must be float32 on the CPU, got torch.float64"),
        (lambda a: a | {"x": torch.zeros(0, 9)}, r"x must have shape \(1, 9\), got \(0, 9\)"),
        (lambda a: a | {"x": torch.zeros(2, 8)}, r"x must have shape \(2, 9\)"),
        (lambda a: a | {"x": torch.zeros(2, 9, device="meta")}, "x must be float32 on the CPU, got .* on meta"),
        (lambda a: a | {"biases": [torch.zeros(5), torch.zeros(8)]}, r"biases\[1\] must have shape \(9,\)"),
        (lambda a: a | {"biases": a["biases"][:1]}, "a weight and a bias each"),
        (lambda a: a | {"weights": []}, "a weight and a bias each"),
        (lambda a: a | {"activations": [2]}, r"Activations must be 0 \(tanh\) or 1 \(relu\), got \[2\]"),
    ],
)
def test_a_decoder_refuses_what_it_would_misread(change: Callable[[dict], dict], match: str) -> None:
    arguments: dict = {
        "left": torch.zeros(4, 6),
        "weights": [torch.zeros(6, 5), torch.zeros(5, 9)],
        "biases": [torch.zeros(5), torch.zeros(9)],
        "activations": [TANH],
        "x": torch.zeros(2, 9),
    }
    kernels.bernoulli_decoder(**arguments)
    with pytest.raises(ValueError, match=match):
        kernels.bernoulli_decoder(**change(arguments))


def test_the_cpp_compiles_here() -> None:
    assert COMPILES, WHY_NOT


def test_activations_may_differ_and_weights_may_lie_across() -> None:
    left, weights, biases, x = network([20, 70, 60, 50], 33, 3)
    across = [weight.t().contiguous().t() for weight in weights]
    found = kernels.bernoulli_decoder(left, across, biases, [RELU, TANH], x)
    assert torch.allclose(found.double(), exact(left, weights, biases, [RELU, TANH], x), rtol=2e-6, atol=2e-5)
    assert torch.equal(found, kernels.bernoulli_decoder(left, weights, biases, [RELU, TANH], x))


@pytest.mark.parametrize("logit", [0.0, 1e-3, 5.0, 16.0, 60.0, 200.0, 3e4])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("datum", [0.0, 0.3, 1.0])
def test_any_logit_has_its_term(logit: float, sign: float, datum: float) -> None:
    bias = torch.full((4_000,), sign * logit)  # so many that no product of all factors is finite
    left, weight, x = torch.zeros(9, 1), torch.zeros(1, 4_000), torch.full((1, 4_000), datum)
    found = kernels.bernoulli_decoder(left, [weight], [bias], [], x)
    wanted = exact(left, [weight], [bias], [], x)
    assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=4_000 * 1e-7)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("activation", [TANH, RELU])
@pytest.mark.parametrize("layer", [0, 1])
def test_nan_stays_in_its_row(activation: int, layer: int, rounded: bool) -> None:
    left, weights, biases, x = network([6, 40, 90], 20, 1)
    if layer == 0:
        # A NaN of any bits: those of the second would be infinity's once cut off, and those of the third round up to zero.
        left[3, 2] = math.nan
        left.view(torch.int32)[5, 1] = 0x7F800001
        left.view(torch.int32)[6, 1] = 0x7FFFFFFF
        found = kernels.bernoulli_decoder(left, weights, biases, [activation], x, rounded)
        assert torch.isnan(found).nonzero().flatten().tolist() == [3, 5, 6]
    else:
        biases[1][50] = math.nan
        assert torch.isnan(kernels.bernoulli_decoder(left, weights, biases, [activation], x, rounded)).all()


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("columns", [3, 40, 48, 51, 70])
def test_an_infinite_latent_saturates_a_tanh(columns: int, rounded: bool) -> None:
    left, weights, biases, x = network([6, columns, 90], 20, 1)
    left[3, 2], left[4, 2] = math.inf, -math.inf
    found = kernels.bernoulli_decoder(left, weights, biases, [TANH], x, rounded)
    assert torch.allclose(found.double(), exact(left, weights, biases, [TANH], x, rounded), rtol=2e-4, atol=5e-3)


class Decoder(nn.Module):
    def __init__(self, widths: list[int], activation: type[nn.Module]):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(wide, narrow), activation()) for wide, narrow in itertools.pairwise(widths[:-1])]
        self.hidden, self.last = nn.Sequential(*layers), nn.Linear(*widths[-2:])

    def logits(self, z: Tensor) -> Tensor:
        return self.last(self.hidden(z))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        logits = self.logits(z)
        terms = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return terms.view(*logits.shape[:-1], -1).sum(-1)


def targets(
    function: Callable[..., Tensor], *inputs: Tensor, rounded: bool = False
) -> tuple[Callable[..., Tensor], list[object]]:
    """As ``stage`` captures it."""
    with torch.no_grad():
        graph, _ = compile_graph._capture(lambda *given: (function(*given),), inputs)
    graph.run = rewrite(join_decoders(graph.module, rounded))
    return lambda *given: graph(given, ())[0], [node.target for node in graph.module.graph.nodes]


OPERATION = torch.ops.pyrovae.bernoulli_decoder.default


@pytest.mark.parametrize(
    ("activation", "joined"), [(nn.Tanh, 3), (nn.ReLU, 3), (nn.Softplus, 1)], ids=["tanh", "relu", "softplus"]
)
@pytest.mark.parametrize("x_shape", [(1, 784), (4, 784), (1, 4, 784), (200, 4, 784)])
def test_a_captured_decoder_is_one_operation(activation: type[nn.Module], joined: int, x_shape: tuple[int, ...]) -> None:
    decoder = Decoder([12, 100, 50, 784], activation)
    z, x = torch.randn(200, 4, 12), torch.rand(x_shape).round()
    run, found = targets(decoder, z, x)
    assert found.count(OPERATION) == 1
    assert found.count(torch.ops.aten.mm.default) == 3 - joined
    with torch.no_grad():
        assert torch.allclose(run(z, x), decoder(z, x), rtol=1e-5)


def _as_image(decoder: Decoder, z: Tensor, x: Tensor) -> Tensor:
    """The likelihood of an image, as the package's own models have it: logits and data with an event of three dimensions."""
    logits = decoder.logits(z).view(*z.shape[:-1], 1, 28, 28)
    terms = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return terms.reshape(*z.shape[:-1], -1).sum(-1)


@pytest.mark.parametrize(
    ("x_shape", "joined"),
    [
        ((4, 1, 28, 28), True),
        ((1, 28, 28), True),
        ((200, 4, 1, 28, 28), True),
        ((28,), False),  # a row that all rows of the image have in common
        ((4, 1, 28, 1), False),
        ((200, 1, 1, 28, 28), False),  # data that repeat within the draws
    ],
)
def test_a_decoder_of_images_is_one_operation(x_shape: tuple[int, ...], joined: bool) -> None:
    decoder = Decoder([12, 100, 784], nn.ReLU)
    z, x = torch.randn(200, 4, 12), torch.rand(x_shape).round()
    run, found = targets(lambda z, x: _as_image(decoder, z, x), z, x)
    assert (OPERATION in found) == joined
    with torch.no_grad():
        assert torch.allclose(run(z, x), _as_image(decoder, z, x), rtol=1e-5)


def test_a_layer_of_the_rows_of_an_image_stays() -> None:
    decoder = Decoder([12, 100, 28], nn.ReLU)
    z, x = torch.randn(200, 4, 28, 12), torch.rand(4, 28, 28).round()

    def of_image(z: Tensor, x: Tensor) -> Tensor:
        logits = decoder.logits(z)
        terms = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return terms.reshape(200, 4, 784).sum(-1)

    run, found = targets(of_image, z, x)
    assert OPERATION not in found
    with torch.no_grad():
        assert torch.allclose(run(z, x), of_image(z, x), rtol=1e-5)


def test_the_native_backend_joins_a_decoder_and_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_graph, "_inductor", lambda *args: pytest.fail("Inductor is called"))
    decoder = Decoder([12, 100, 784], nn.Tanh)
    x = torch.rand(4, 784).round()

    def draw(length: Tensor, x: Tensor) -> tuple[Tensor]:
        return (decoder(torch.randn(len(length), len(x), 12), x),)

    with torch.no_grad(), contextlib.closing(compile_graph.Staged(draw, "native", threads=2)) as staged:
        for _ in range(3):
            staged.submit(torch.empty(200, 0), x)()
        (graph,) = staged._graphs.values()
        assert [node.target for node in graph.module.graph.nodes].count(OPERATION) == 1
        torch.manual_seed(0)
        value = staged.submit(torch.empty(200, 0), x)()[0]
        torch.manual_seed(0)
        assert torch.allclose(value, draw(torch.empty(200, 0), x)[0], rtol=1e-5)
    assert staged.reason is None


def test_a_rounded_decoder_is_joined_as_one() -> None:
    decoder = Decoder([12, 100, 50, 784], nn.Tanh)
    z, x = torch.randn(200, 4, 12), torch.rand(4, 784).round()
    run, found = targets(decoder, z, x, rounded=True)
    assert found.count(OPERATION) == 1
    layers = [*(block[0] for block in decoder.hidden), decoder.last]
    weights, biases = [layer.weight.detach().t() for layer in layers], [layer.bias.detach() for layer in layers]
    wanted = exact(z.flatten(0, 1), weights, biases, [TANH, TANH], x, rounded=True).view(200, 4)
    with torch.no_grad():
        value, plain = run(z, x).double(), decoder(z, x).double()
    assert (value - wanted).abs().median() < 0.1 * (plain - wanted).abs().median()


def _written(decoder: Decoder, z: Tensor, x: Tensor) -> Tensor:
    logits = decoder.logits(z)
    terms = -functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return terms.view(*logits.shape[:-1], -1).sum(-1) + logits.mean(-1)


@pytest.mark.parametrize(
    ("function", "widths", "rows", "x_shape"),
    [
        (_written, [12, 784], 400, (4, 784)),  # the logits are wanted themselves
        (Decoder.forward, [12, 784], 2, (4, 784)),  # too few to repay a call
        (Decoder.forward, [kernels.DEEPEST + 8, 784], 400, (4, 784)),  # too deep
        (Decoder.forward, [12, 784], 400, (400, 1, 784)),  # data that do not repeat from their end
    ],
    ids=["read", "few", "deep", "across"],
)
def test_other_decoders_stay(function: Callable[..., Tensor], widths: list[int], rows: int, x_shape: tuple[int, ...]) -> None:
    decoder = Decoder(widths, nn.Tanh)
    z, x = torch.randn(rows, 4, widths[0]), torch.rand(x_shape).round()
    run, found = targets(lambda z, x: function(decoder, z, x), z, x)
    assert OPERATION not in found
    with torch.no_grad():
        assert torch.allclose(run(z, x), function(decoder, z, x), rtol=1e-4)


def test_logits_of_two_dimensions_that_are_read_stay() -> None:
    decoder = Decoder([12, 784], nn.Tanh)
    z, x = torch.randn(1600, 12), torch.rand(1600, 784).round()
    assert OPERATION in targets(decoder, z, x)[1]
    run, found = targets(lambda z, x: _written(decoder, z, x), z, x)
    assert OPERATION not in found
    with torch.no_grad():
        assert torch.allclose(run(z, x), _written(decoder, z, x), rtol=1e-4)


def test_decoders_in_float64_and_in_training_stay() -> None:
    decoder = Decoder([12, 100, 784], nn.Tanh)
    z, x = torch.randn(400, 1, 12), torch.rand(1, 784).round()
    graph, _ = compile_graph._capture(lambda z, x: torch.autograd.grad(decoder(z, x).sum(), list(decoder.parameters())), (z, x))
    assert all(node.target is not OPERATION for node in join_decoders(graph.module).graph.nodes)
    _, found = targets(decoder.double(), z.double(), x.double())
    assert OPERATION not in found


PRODUCTS = pytest.mark.skipif(
    not (kernels.register_products() or REQUIRED), reason="products are switched off, or torch has no stable functions for them"
)


@PRODUCTS
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("across", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"),
    [
        (1, 1, 1),
        (20, 784, 200),
        (200, 20, 784),
        (7, 3, 5),
        (33, 130, 17),
        (41, 16, 96),
        (100, 33, 51),
        (45, 130, 203),  # few rows
        (47, 100, 7),
        (300, 301, 101),  # deep
        (530, 40, 53),  # many rows
        (70, 300, 1000),  # panels that do not all stay near
        (0, 4, 3),
        (4, 3, 0),
        (4, 0, 3),
    ],
)
def test_a_product_is_the_exact_one(
    threads: int, rows: int, depth: int, columns: int, across: tuple[bool, bool], rounded: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + depth)
    left, right = torch.randn(rows, depth, generator=generator), torch.randn(depth, columns, generator=generator)
    left, right = (x.t().contiguous().t() if flip else x for x, flip in zip((left, right), across, strict=True))
    found = torch.ops.pyrovae.product(left, right, threads, rounded)
    if rounded:
        left, right = left.bfloat16(), right.bfloat16()
    exact = left.double() @ right.double()
    assert found.is_contiguous()
    assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6 * max(depth, 1))
    again, squares = torch.ops.pyrovae.product_and_squares(left.float(), right.float(), threads, rounded)
    assert torch.allclose(again.double(), exact, rtol=1e-5, atol=1e-6 * max(depth, 1))
    assert squares.shape == ()
    assert squares.item() == pytest.approx(exact.square().sum().item(), rel=1e-5)


@PRODUCTS
@pytest.mark.parametrize("across", [False, True])
def test_whoever_takes_a_piece_the_product_is_the_same(across: bool) -> None:
    left, right = torch.randn(530, 300), torch.randn(400, 300).t() if across else torch.randn(300, 400)
    alone = torch.ops.pyrovae.product(left, right, 1, False)
    assert torch.allclose(alone.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-4)
    # More threads than processors: some wait for one, and others take their pieces.
    runs = [torch.ops.pyrovae.product_and_squares(left, right, 9, False) for _ in range(30)]
    assert all(torch.equal(product, alone) and torch.equal(squares, runs[0][1]) for product, squares in runs)


@PRODUCTS
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.97, 1.0])
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_zeros_are_left_out_of_large_products(share: float, threads: int, rounded: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    gradients, values = torch.randn(700, 150, generator=generator), torch.randn(700, 60, generator=generator)
    weights, zero = torch.randn(150, 61, generator=generator), torch.rand(700, generator=generator) < share
    gradients[zero] = -0.0
    gradients[~zero, :40] = 0.0  # as far as the first vectors, others may look like them
    for left, right in ((gradients, weights), (gradients, weights.t().contiguous().t()), (gradients.t(), values)):
        found, squares = torch.ops.pyrovae.product_and_squares(left, right, threads, rounded)
        alone = torch.ops.pyrovae.product(left, right, threads, rounded)  # in another order where few rows are left
        if rounded:
            left, right = left.bfloat16(), right.bfloat16()
        exact = left.double() @ right.double()
        for each in (found, alone):
            assert torch.allclose(each.double(), exact, rtol=1e-5, atol=1e-4)
        assert squares.item() == pytest.approx(exact.square().sum().item(), rel=1e-5)
    # But not where one meets an infinity, as that is no number.
    values[zero.nonzero()[:1], 59], weights[149, 59] = math.inf, -math.inf
    for left, right in ((gradients, weights), (gradients.t(), values)):
        found = torch.ops.pyrovae.product(left, right, threads, rounded)
        exact = left.double() @ right.double()
        assert torch.equal(found.isnan(), exact.isnan())
        assert exact.isnan().any() == (share > 0)


@PRODUCTS
def test_a_product_of_parts_reads_only_those() -> None:
    whole = torch.full((60, 120), math.nan)
    left, right = whole[:40:2, 1:61:3], whole[40:, :110:2]
    left.copy_(torch.randn(20, 20)), right.copy_(torch.randn(20, 55))
    found = torch.ops.pyrovae.product(left, right, 2, False)
    assert torch.allclose(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)
    repeated = torch.randn(1, 55).expand(20, 55)
    assert torch.allclose(torch.ops.pyrovae.product(left, repeated, 1, False), left @ repeated, rtol=1e-4, atol=1e-5)
    among = torch.full((50, 300), math.nan)  # few rows and columns of another matrix, deep enough for vectors along it
    left, right = among[:9, 3:120], among[10:40, 50:167].t()
    left.copy_(torch.randn(9, 117)), right.copy_(torch.randn(117, 30))
    found = torch.ops.pyrovae.product(left, right, 2, False)
    assert torch.allclose(found.double(), left.double() @ right.double(), rtol=1e-5, atol=1e-5)
    for one, other in ((left, right), (right.t(), left.t())):  # of an odd depth, so that the last word is half empty
        exact = one.bfloat16().double() @ other.bfloat16().double()
        assert torch.allclose(torch.ops.pyrovae.product(one, other, 2, True).double(), exact, rtol=1e-5, atol=1e-5)


@PRODUCTS
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_a_product_keeps_nan_and_infinity_where_they_belong(across: bool, rounded: bool) -> None:
    left, right = torch.ones(9, 100), torch.ones(50, 100).t() if across else torch.ones(100, 50)
    left[2, 99], right[98, 49] = math.nan, math.inf
    found, squares = torch.ops.pyrovae.product_and_squares(left, right, 2, rounded)
    for each in (found, torch.ops.pyrovae.product(left, right, 2, rounded)):
        assert torch.equal(torch.isnan(each), (torch.arange(9) == 2)[:, None].expand(9, 50))
        assert torch.equal(torch.isinf(each).nonzero()[:, 1].unique(), torch.tensor([49]))
    assert squares.isnan()
    assert torch.ops.pyrovae.product_and_squares(left[:2], right, 2, rounded)[1].isinf()
    left[:], right[:] = 1.0, 1.0
    left[3, 20] = math.inf  # which is no number where it meets a zero beyond the last column
    assert torch.ops.pyrovae.product_and_squares(left, right, 2, rounded)[1].isinf()


@PRODUCTS
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.ones(3, 4), torch.ones(5, 6)),
        (torch.ones(3, 4).double(), torch.ones(4, 6).double()),
        (torch.ones(3, 4), torch.ones(4, 6).bfloat16()),
        (torch.ones(4), torch.ones(4, 6)),
    ],
    ids=["sizes", "float64", "bfloat16", "one dimension"],
)
def test_a_product_of_anything_else_is_refused(left: Tensor, right: Tensor) -> None:
    with pytest.raises(RuntimeError, match="pyrovae::product takes"):
        torch.ops.pyrovae.product(left, right, 1, False)


@PRODUCTS
def test_a_product_keeps_nothing_of_its_factors() -> None:
    def uses(*tensors: Tensor) -> list[int]:
        return [torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) for tensor in tensors]

    left, right = torch.ones(30, 40), torch.ones(40, 50)
    before = uses(left, right)
    # Views, as each holds its storage until it is gone itself.
    found = torch.ops.pyrovae.product(left[:], right[:], 1, False)
    with pytest.raises(RuntimeError):
        torch.ops.pyrovae.product(left[:], left[:], 1, False)
    assert uses(left, right) == before
    assert uses(found) == uses(torch.ones(1))


def _products(left: Tensor, right: Tensor) -> list[object]:
    graph, _ = compile_graph._capture(lambda left, right: (left @ right,), (left, right))
    return [node.target for node in select_matmul_backend(graph.module, threads=2).graph.nodes]


@PRODUCTS
def test_our_tiles_multiply_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    large, deep = torch.ones(100, 100), torch.ones(100, 4_000)
    tiles = torch.ops.pyrovae.product.default
    monkeypatch.setattr(matmul, "_onednn_order", lambda *shape: None)
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: True)
    assert tiles in _products(large, large)
    thin = torch.ones(10, 100)
    for left, right in (
        (deep, deep.t()),
        (large.double(), large.double()),
        (thin, large),
        (large, thin.t()),
    ):
        assert tiles not in _products(left, right)
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: False)
    assert tiles not in _products(large, large)


@PRODUCTS
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("share", "chosen"), [(0.7, True), (0.97, False)])
def test_our_products_have_to_be_clearly_faster(
    share: float, chosen: bool, rounded: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def seconds(contenders: dict[str, Callable[[], Tensor]], laps: int) -> dict[str, float]:
        return {name: share if name.startswith("native") else 1.0 for name in contenders}

    monkeypatch.setattr(matmul, "_seconds", seconds)
    monkeypatch.setenv("PYROVAE_CACHE", str(tmp_path))
    assert matmul.native_is_faster(2, rounded) is chosen
    # The answer is kept: neither this process nor another measures again.
    monkeypatch.setattr(matmul, "_seconds", lambda *args, **kwargs: pytest.fail("measured again"))
    choices._answers.clear()
    assert matmul.native_is_faster(2, rounded) is chosen


@PRODUCTS
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_by_our_tiles_is_the_eager_one(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: True)
    x, losses = torch.rand(30, 60).round(), []
    for backend in ("inductor", "eager"):
        torch.manual_seed(0)
        vae = pv.make_vae(60, latent_dim=12, hidden=[70], activation="tanh")
        adam = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
        options = {"precision": precision} if backend == "inductor" else {}
        step = pv.stage(pv.estimators.IWAE(20), vae.model, vae.guide, adam, x, backend=backend, **options)
        torch.manual_seed(1)
        losses.append([number for _ in range(30) for number in step(x)])  # and norms of gradients
        assert step.reason is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if precision == "float32" else 0.05)
    assert (losses[0] == pytest.approx(losses[1], rel=1e-5)) == (precision == "float32")


@PRODUCTS
@pytest.mark.skipif(
    not hasattr(torch._inductor.config.aot_inductor, "custom_ops_to_c_shims"),
    reason="a torch whose graphs dispatch all",
)
def test_a_compiled_graph_calls_products_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: True)
    counters["inductor"].clear()
    weight = torch.randn(60, 40, requires_grad=True)
    gradient = compile_graph.Staged(lambda x: torch.autograd.grad((x @ weight).tanh().sum(), weight))
    x = torch.randn(50, 60)
    gradient(x), gradient(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        (found,) = gradient(x)
        torch.ops.pyrovae.product(x, weight.detach(), 1, False)
    assert [event.name for event in profile.events()].count("pyrovae::product") == 1
    torch.testing.assert_close(found, torch.autograd.grad((x @ weight).tanh().sum(), weight)[0], rtol=1e-5, atol=1e-5)
    # What was compiled is there for the next process: the options can be written down.
    assert not any(name.startswith("fxgraph_cache_bypass") for name in counters["inductor"])


@PRODUCTS
@pytest.mark.skipif(shutil.which("nm") is None, reason="nothing here lists a library's names")
def test_other_libraries_find_none_of_their_names_in_ours() -> None:
    library = kernels.load_library()
    assert library is not None
    listed = subprocess.run(["nm", "-D", "--defined-only", library._name], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in listed.splitlines()]
    assert "pyrovae_standard_normals" in names
    own = re.compile(r"pyrovae_|aoti_torch_cpu_product|_Z.*7pyrovae|_ZN?K?S[at]|_ZGVZ?N?7pyrovae")
    assert [name for name in names if not own.match(name)] == []


@PRODUCTS
def test_rounded_products_are_our_tiles_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles, faster = torch.ops.pyrovae.product.default, True
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: faster and rounded)

    def targets(rows: int) -> tuple[list[object], list[object], Tensor, Tensor]:
        left, right, bias = torch.randn(rows, 70), torch.randn(70, 90), torch.randn(90)
        graph, _ = compile_graph._capture(lambda left, right: (torch.addmm(bias, left, right),), (left, right))
        module = matmul.round_products(graph.module, threads=1)
        exact = bias.double() + left.bfloat16().double() @ right.bfloat16().double()
        rounded = [node.args[3] for node in module.graph.nodes if node.target is tiles]
        return rounded, [node.target for node in module.graph.nodes], module(left, right, bias)[0].double() - exact, exact

    rounded, _, error, _ = targets(100)
    assert rounded == [True]
    assert error.abs().max() < 1e-4
    rounded, _, error, exact = targets(20)  # as they are
    assert rounded == [False]
    assert 1e-4 < error.abs().max() < 0.02 * exact.abs().max()
    faster = False
    rounded, found, *_ = targets(100)
    assert not rounded
    assert torch.ops.aten.mm.default in found


@PRODUCTS
@pytest.mark.parametrize("rounded", [False, True])
def test_many_squares_are_added_up_in_double(rounded: bool) -> None:
    left, right = torch.full((2_000, 20), 0.75), torch.full((20, 3_000), 1.25)
    _, squares = torch.ops.pyrovae.product_and_squares(left, right, 1, rounded)
    assert squares.item() == pytest.approx(6e6 * 18.75**2, rel=1e-6)


@PRODUCTS
def test_squares_of_what_is_changed_in_between_are_not_taken_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: True)
    left, right = torch.randn(30, 40), torch.randn(40, 50)

    def changed(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        product = left @ right
        product.view(-1).add_(1.0)
        return (product.square().sum(),)

    graph, exact = compile_graph._capture(changed, (left, right))
    (found,) = select_matmul_backend(graph.module, threads=1)(left, right)
    assert found.item() == pytest.approx(exact[0].item(), rel=1e-5)


@PRODUCTS
def test_the_squares_of_a_gradient_come_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: True)
    left, right = torch.randn(30, 40), torch.randn(40, 50)

    def gradient_and_norms(left: Tensor, right: Tensor) -> tuple[Tensor, ...]:
        product = left @ right
        gradient = product.t()
        return gradient, gradient.square().sum(), gradient.pow(3).sum(), gradient.square().sum(0), product.square().sum()

    graph, exact = compile_graph._capture(gradient_and_norms, (left, right))
    module = select_matmul_backend(graph.module, threads=1)
    targets = [node.target for node in module.graph.nodes]
    assert torch.ops.pyrovae.product_and_squares.default in targets
    assert torch.ops.pyrovae.product.default not in targets
    assert targets.count(torch.ops.aten.pow.Tensor_Scalar) == 2  # the cube, and what is summed by columns
    for have, want in zip(module(left, right), exact, strict=True):
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-4)


def test_without_torchs_stable_functions_products_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: False)
    monkeypatch.setattr(kernels, "STABLE", ("none_such",))
    assert not kernels._register_products.__wrapped__()
    assert "no stable C functions" in notes.reasons()["products"]
    monkeypatch.setattr(rewrites.kernels, "register_products", lambda: False)
    assert not matmul.native_is_faster(1, False)


def threefry(counter: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32-20 of Salmon and others (2011), word for word."""
    words = [counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32)]
    first, second = (word.astype(np.uint32) for word in words)
    keys = [np.uint32(key[0]), np.uint32(key[1]), np.uint32(0x1BD11BDA ^ key[0] ^ key[1])]
    turns = [13, 15, 26, 6, 17, 29, 16, 24]
    with np.errstate(over="ignore"):
        first, second = first + keys[0], second + keys[1]
        for round_ in range(20):
            turn = np.uint32(turns[round_ % 8])
            first = first + second
            second = ((second << turn) | (second >> (np.uint32(32) - turn))) ^ first
            if round_ % 4 == 3:
                step = round_ // 4 + 1
                first, second = first + keys[step % 3], second + keys[(step + 1) % 3] + np.uint32(step)
    return first, second


@pytest.mark.parametrize(
    ("counter", "key", "published"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_has_its_published_values(counter: tuple[int, int], key: tuple[int, int], published: tuple[int, int]) -> None:
    words = (ctypes.c_uint32 * 2)(*counter)
    library = kernels.load_library()
    assert library is not None
    library.pyrovae_threefry_block(words, ctypes.c_uint64(key[0] | key[1] << 32))
    assert tuple(words) == published
    found = threefry(np.array([counter[0] | counter[1] << 32], dtype=np.uint64), key)
    assert tuple(int(word[0]) for word in found) == published


def test_normals_are_box_and_muller_of_the_counter() -> None:
    seed, size = 0x123456789ABCDEF0, 100_003
    found = kernels.standard_normals((size,), seed).double().numpy()
    first, second = threefry(np.arange(size, dtype=np.uint64), (seed & 0xFFFFFFFF, seed >> 32))
    radius = np.sqrt(-2 * np.log((first >> 1) * 2.0**-31 + 2.0**-32))
    angle = np.pi * second.view(np.int32) * 2.0**-31
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    # Sixteen cosines, then the sixteen sines of the same counters, on every processor.
    whole = size // 32 * 16
    wanted = pairs[:, :whole].reshape(2, -1, 16).transpose(1, 0, 2).ravel()
    assert np.abs(found[: 2 * whole] - wanted).max() < 2e-6 * 6
    rest = pairs[:, whole : whole + 16].ravel()[: size - 2 * whole]
    assert np.allclose(found[2 * whole :], rest, atol=1e-5)


# Of seed 7: these never change, on no processor and with no compiler.
PUBLISHED = "e88f9b7a8e3bf35e2fc6f041e47d2604e0ce282db641ac1cd354e0041d3b1bc7"


def test_normals_have_their_published_bits() -> None:
    draws = kernels.standard_normals((5_001,), 7)
    assert hashlib.sha256(draws.numpy().tobytes()).hexdigest() == PUBLISHED


X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="flags of an x86 compiler")


@X86
@pytest.mark.parametrize(
    ("flags", "lanes"),
    [
        ("-mno-avx512f", (8,)),
        pytest.param("-mno-avx", (4,), marks=pytest.mark.slow),
        pytest.param("-mno-fma -mno-avx512f", (8,), marks=pytest.mark.slow),
    ],
)
def test_normals_depend_on_no_vector_width(flags: str, lanes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    own = kernels.standard_normals((100_003,), 2**63 + 5)
    monkeypatch.setenv("PYROVAE_CXX_FLAGS", flags)
    library = kernels.load_library()
    assert library is not None
    assert library.pyrovae_lanes() in (*lanes, 4)
    assert torch.equal(kernels.standard_normals((100_003,), 2**63 + 5), own)
    left, weights, biases, x = network([6, 40, 90], 20, 3)
    found = kernels.bernoulli_decoder(left, weights, biases, [TANH], x)
    assert torch.allclose(found.double(), exact(left, weights, biases, [TANH], x), rtol=2e-6, atol=2e-5)


def test_normals_are_normal_and_independent() -> None:
    draws = kernels.standard_normals((1_000, 1_000), 7).double().numpy().ravel()
    assert stats.kstest(draws, "norm").pvalue > 1e-3
    assert stats.kstest(draws**2, "chi2", (1,)).pvalue > 1e-3
    assert stats.kstest(draws.reshape(-1, 50).sum(1) / math.sqrt(50), "norm").pvalue > 1e-3
    for lag in (1, 4, 8, 16, 32, 50, 1_000):
        for power in (1, 2):
            values = draws**power
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / math.sqrt(len(values))
    beyond = np.abs(draws) > 4.5
    assert stats.binomtest(int(beyond.sum()), len(draws), 2 * stats.norm.sf(4.5)).pvalue > 1e-3


def test_normals_go_by_their_seed() -> None:
    one = kernels.standard_normals((3, 5), 1)
    assert one.shape == (3, 5)
    assert one.dtype is torch.float32
    assert torch.equal(one, kernels.standard_normals((3, 5), 1))
    others = [kernels.standard_normals((1_000,), seed) for seed in (2, 3, 2**32, 2**63)]
    table = np.corrcoef(torch.stack(others).double().numpy())
    assert np.abs(table - np.eye(4)).max() < 0.15


@pytest.fixture
def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from torch._inductor.codecache import CppCodeCache

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler\nat all")

    kernels._load_library.cache_clear()
    notes.forget()
    monkeypatch.setattr(CppCodeCache, "load", fail)
    yield
    kernels._load_library.cache_clear()
    notes.forget()


def test_where_it_does_not_compile_graphs_stay_as_they_are(without_a_compiler: None) -> None:
    decoder = Decoder([12, 100, 784], nn.Tanh)
    z, x = torch.randn(200, 1, 12), torch.rand(1, 784).round()
    with pytest.warns(RuntimeWarning, match=r"a little slower, since pyrovae's C\+\+ does not compile here \(no compiler\)"):
        run, found = targets(decoder, z, x)
    assert OPERATION not in found
    with torch.no_grad():
        assert torch.allclose(run(z, x), decoder(z, x), rtol=1e-5)
    draw = torch.ops.aten.randn.default
    numbers = kernels.seeded(functools.partial(draw, [kernels.MANY], dtype=torch.float32))()
    assert numbers.shape == (kernels.MANY,)


@pytest.mark.parametrize(
    ("shape", "dtype", "seeded"),
    [([kernels.MANY], torch.float32, True), ([kernels.MANY - 1], torch.float32, False), ([kernels.MANY], torch.float64, False)],
)
def test_many_normals_come_from_a_seed_of_the_stream(shape: list[int], dtype: torch.dtype, seeded: bool) -> None:
    draw = functools.partial(torch.ops.aten.randn.default, shape, dtype=dtype)
    torch.manual_seed(0)
    numbers, other = kernels.seeded(draw), kernels.seeded(draw)
    torch.manual_seed(0)
    again = kernels.seeded(draw)
    torch.manual_seed(0)
    own = draw()
    first = numbers()
    assert (first.shape, first.dtype) == (torch.Size(shape), dtype)
    assert torch.equal(first, again())
    assert not torch.equal(first, other())
    assert torch.equal(first, own) != seeded


@pytest.mark.parametrize(
    "draw",
    [
        lambda rows: torch.randn(rows, 8),
        lambda rows: torch.empty(rows, 8).normal_(),
        lambda rows: torch.randn(rows, 8) + torch.rand(rows, 1) + torch.randn(rows, 1),
        lambda rows: torch.randn(rows, 8, dtype=torch.float64).float(),
        lambda rows: torch.randn(rows, 8) + torch.poisson(torch.ones(rows, 1)),
    ],
    ids=["randn", "normal_", "others", "float64", "in turn"],
)
def test_no_number_depends_on_what_ran_before(draw: Callable[[int], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_graph, "_inductor", lambda module, *options: module)
    monkeypatch.setattr(compile_graph, "USES_BEFORE_CAPTURE", 3)

    def numbers(rows: list[int]) -> list[Tensor]:
        staged = compile_graph.Staged(lambda length: (draw(len(length)),), threads=2)
        found = []
        for size in rows:
            torch.manual_seed(size)
            found.append(staged.submit(torch.empty(size, 0)))
        values = [value()[0] for value in found]
        staged.close()
        assert staged.reason is None
        return values

    large, ragged = 2**14, 2**13 + 5
    several = numbers([large, large, large, ragged, ragged, ragged, ragged])
    assert all(torch.equal(value, several[0]) for value in several[:3])
    assert all(torch.equal(value, several[3]) for value in several[3:])
    assert torch.equal(numbers([large, ragged])[1], several[3])


def test_the_module_can_be_loaded_again() -> None:
    importlib.reload(kernels)
    product = torch.ops.pyrovae.mm(torch.eye(2), torch.ones(2, 2), False)
    assert torch.equal(product, torch.ones(2, 2))
