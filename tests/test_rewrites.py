"""Each rewrite of a captured graph is the same function: against float64, at the ends, and where it must not act."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from pyrovae.compile import matmul, rewrites
from pyrovae.compile.matmul import round_products, select_matmul_backend
from pyrovae.compile.rewrites import draws_as_inputs, rewrite

aten = torch.ops.aten


def rewritten(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Callable[..., Tensor], list[object]]:
    module = rewrite(make_fx(function)(*inputs))
    return module, [node.target for node in module.graph.nodes]


def test_tanh_is_float32_tanh_over_the_whole_range() -> None:
    x = np.concatenate([np.linspace(-12, 12, 400_001), np.logspace(-30, 0, 100_001), [0.0, math.inf, -math.inf]])
    given = torch.tensor(x, dtype=torch.float32)
    run, targets = rewritten(torch.tanh, given)
    assert aten.tanh.default not in targets
    found, exact = run(given).double(), torch.tanh(given.double())
    assert float((found - exact).abs().max()) < 4e-7
    assert float(((found - exact) / exact)[exact.abs() > 1e-30].abs().max()) < 4e-7
    assert float(found.abs().max()) <= 1.0
    assert torch.equal(run(-given), -run(given))
    assert math.isnan(run(torch.tensor([math.nan])).item())


def test_tanh_keeps_its_gradient() -> None:
    x = torch.linspace(-3, 3, 101)

    def slope(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(torch.tanh(x).sum(), x)[0]

    run, _ = rewritten(slope, x)
    assert torch.allclose(run(x), 1 / torch.cosh(x) ** 2, atol=1e-6)


def test_float64_tanh_stays() -> None:
    _, targets = rewritten(torch.tanh, torch.zeros(3, dtype=torch.float64))
    assert aten.tanh.default in targets


def test_a_bias_leaves_its_product() -> None:
    bias, left, right = torch.randn(5), torch.randn(7, 3), torch.randn(3, 5)
    run, targets = rewritten(torch.addmm, bias, left, right)
    assert aten.addmm.default not in targets
    assert aten.mm.default in targets
    assert torch.allclose(run(bias, left, right), torch.addmm(bias, left, right))


def test_a_scaled_bias_stays() -> None:
    inputs = torch.randn(5), torch.randn(7, 3), torch.randn(3, 5)
    run, targets = rewritten(lambda *each: torch.addmm(*each, beta=2.0, alpha=3.0), *inputs)
    assert aten.addmm.default in targets
    assert torch.equal(run(*inputs), torch.addmm(*inputs, beta=2.0, alpha=3.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: a @ b + c @ b,
        lambda a, b, c: a @ b + a @ b,
        lambda a, b, c: (c + 1.0).sum(1, keepdim=True) + a @ b,
        lambda a, b, c: a @ b + (c @ b).double(),
        lambda a, b, c: (a @ b + c @ b) @ b.T + a,
    ],
)
def test_sums_of_products_are_added_under_a_view(function: Callable[..., Tensor]) -> None:
    inputs = torch.randn(7, 3), torch.randn(3, 5), torch.randn(7, 3)
    module = rewrite(make_fx(function)(*inputs))
    for node in module.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        product, other = node.args
        assert getattr(product, "target", None) is not aten.mm.default or getattr(other, "target", None) is aten.view.default
        assert getattr(other, "target", None) is not aten.mm.default or getattr(product, "target", None) is aten.view.default
    found, wanted = module(*inputs), function(*inputs)
    assert found.shape == wanted.shape
    assert found.dtype is wanted.dtype
    assert torch.allclose(found, wanted)


def test_rounded_products_are_rewritten_too() -> None:
    inputs = torch.randn(5), torch.randn(7, 3), torch.randn(3, 5)

    def function(bias: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return torch.tanh(torch.addmm(bias, left, right)) + left @ right

    module = rewrite(round_products(make_fx(function)(*inputs)))
    torch.testing.assert_close(module(*inputs), function(*inputs), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "function", [lambda a, b, c: torch.add(a @ b, c, alpha=2), lambda a, b, c: a @ b + c.expand(2, 7, 5), lambda a, b, c: a + c]
)
def test_other_sums_stay(function: Callable[..., Tensor]) -> None:
    inputs = torch.randn(7, 5), torch.randn(5, 5), torch.randn(7, 5)
    run, targets = rewritten(function, *inputs)
    assert aten.view.default not in targets
    assert torch.equal(run(*inputs), function(*inputs))


def bernoulli(logits: Tensor, x: Tensor) -> Tensor:
    """As Pyro's Bernoulli(logits=...).to_event(1).log_prob(x) is captured."""
    terms = -functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return terms.view(*terms.shape[:-1], -1).sum(-1)


@pytest.mark.parametrize("size", [784, 64, 37 * 16, 3000])
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_sum_is_the_exact_one(size: int, scale: float, dtype: torch.dtype) -> None:
    logits, x = scale * torch.randn(11, 2, size, dtype=dtype), (torch.rand(2, size) < 0.3).to(dtype).expand(11, 2, size)
    run, targets = rewritten(bernoulli, logits, x)
    assert aten.binary_cross_entropy_with_logits.default not in targets
    found, exact = run(logits, x).double(), bernoulli(logits.double(), x.double())
    assert found.shape == (11, 2)
    assert torch.allclose(found, exact, rtol=20 * torch.finfo(dtype).eps, atol=size * torch.finfo(dtype).eps)


def test_bernoulli_sum_at_the_ends() -> None:
    logits = torch.zeros(6, 64)
    logits[:, 0] = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 200.0])
    for value in (0.0, 1.0):
        x = torch.full((6, 64), value)
        run, _ = rewritten(bernoulli, logits, x)
        assert torch.allclose(run(logits, x), bernoulli(logits, x), equal_nan=True)


def test_bernoulli_sum_keeps_its_gradient() -> None:
    logits, x = torch.randn(5, 64), (torch.rand(5, 64) < 0.5).float()

    def slope(logits: Tensor, x: Tensor) -> Tensor:
        logits = logits.detach().requires_grad_()
        return torch.autograd.grad(bernoulli(logits, x).sum(), logits)[0]

    run, _ = rewritten(slope, logits, x)
    assert torch.allclose(run(logits, x), x - torch.sigmoid(logits), atol=1e-6)


def test_bernoulli_terms_that_are_read_elsewhere_stay() -> None:
    def both(logits: Tensor, x: Tensor) -> Tensor:
        terms = -functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
        return terms.view(5, -1).sum(-1) + terms[:, 0]

    inputs = torch.randn(5, 64), torch.ones(5, 64)
    run, targets = rewritten(both, *inputs)
    assert aten.binary_cross_entropy_with_logits.default in targets
    assert torch.allclose(run(*inputs), both(*inputs))


@pytest.mark.parametrize("size", [9, 17 * 13])
def test_bernoulli_sums_too_short_to_group_stay(size: int) -> None:
    inputs = torch.randn(5, size), torch.ones(5, size)
    run, targets = rewritten(bernoulli, *inputs)
    assert torch.allclose(run(*inputs), bernoulli(*inputs))
    assert (aten.binary_cross_entropy_with_logits.default in targets) == (size == 9)


@pytest.mark.parametrize(("rows", "once"), [(2**16, True), (2**12, False)])
def test_many_logarithms_of_repeated_numbers_are_taken_once(rows: int, once: bool) -> None:
    scale = torch.rand(1, 3)
    run, targets = rewritten(lambda scale: (scale.expand(rows, 1, 3).log() * 2.0).sum(0), scale)
    assert (torch.ops.pyrovae.once.default in targets) == once
    assert torch.allclose(run(scale), 2.0 * rows * scale.log())


def test_logarithms_of_numbers_repeated_a_few_times_stay() -> None:
    scale = torch.rand(2**15, 1)
    _, targets = rewritten(lambda scale: scale.expand(2**15, 4).log(), scale)
    assert torch.ops.pyrovae.once.default not in targets


def test_standard_normals_are_drawn_without_a_copy() -> None:
    run, targets = rewritten(lambda x: torch.empty(x.shape).normal_() + x, torch.zeros(100, 3))
    assert aten.randn.default in targets
    assert aten.normal_.default not in targets
    torch.manual_seed(0)
    found = run(torch.zeros(100, 3))
    torch.manual_seed(0)
    assert torch.equal(found, torch.empty(100, 3).normal_())


@pytest.mark.parametrize("how", ["scaled", "shifted", "in place"])
def test_other_normals_stay(how: str) -> None:
    def draw(x: Tensor) -> Tensor:
        given = x.clone() if how == "in place" else torch.empty(x.shape)
        return given.normal_(1.0 if how == "shifted" else 0.0, 2.0 if how == "scaled" else 1.0)

    _, targets = rewritten(draw, torch.zeros(100, 3))
    assert aten.normal_.default in targets


def rounded(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().float()


def test_products_take_rounded_factors_and_their_biases_whole() -> None:
    bias, left, right = torch.randn(5), torch.randn(7, 300), torch.randn(300, 5)
    for function in (torch.addmm, lambda bias, left, right: bias + left @ right):
        run = round_products(make_fx(function)(bias, left, right))
        exact = (rounded(left).double() @ rounded(right).double()).float()
        # The sum is in float32 and rounded once; the bias is not rounded.
        assert torch.allclose(run(bias, left, right), bias + rounded(exact), rtol=2**-8, atol=1e-4)
        assert not torch.allclose(run(bias, left, right), function(bias, left, right), rtol=1e-5, atol=1e-5)


def test_products_of_products_and_their_gradients_are_rounded_too() -> None:
    first, second = torch.randn(40, 60), torch.randn(60, 30)

    def slope(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        first = first.detach().requires_grad_()
        return torch.autograd.grad(((x @ first).tanh() @ second).square().sum(), first)[0]

    x = torch.randn(50, 40) / 5
    module = round_products(make_fx(slope)(x, first, second))
    products = [node for node in module.graph.nodes if node.target is aten.mm.default]
    assert len(products) == 4
    assert all(factor.kwargs["dtype"] is torch.bfloat16 for node in products for factor in node.args)
    found, exact = module(x, first, second), slope(x, first, second)
    assert found.dtype == torch.float32
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 2e-2


def test_convolutions_are_rounded_with_their_gradients() -> None:
    kernel, bias = torch.randn(4, 3, 3, 3), torch.randn(4)

    def slopes(x: Tensor, kernel: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        wanted = [kernel.detach().requires_grad_(), bias.detach().requires_grad_()]
        return torch.autograd.grad(functional.conv2d(x, *wanted).square().sum(), wanted)

    x = torch.randn(5, 3, 8, 8)
    module = round_products(make_fx(slopes)(x, kernel, bias))
    assert aten.convolution_backward.default in [node.target for node in module.graph.nodes]
    for found, exact in zip(module(x, kernel, bias), slopes(x, kernel, bias), strict=True):
        assert found.dtype == torch.float32
        assert 1e-5 < float((found - exact).norm() / exact.norm()) < 2e-2


def test_products_in_float64_stay() -> None:
    inputs = torch.randn(7, 3, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    run = round_products(make_fx(torch.mm)(*inputs))
    assert torch.equal(run(*inputs), torch.mm(*inputs))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed", "every second"])
def test_onednn_products_are_products(transposed: bool, layout: str) -> None:
    left, right = torch.randn(33, 70), torch.randn(70, 50)
    if layout in ("columns", "mixed"):
        right = right.t().contiguous().t()
    if layout == "columns":
        left = left.t().contiguous().t()
    if layout == "every second":
        left, right = torch.randn(33, 140)[:, ::2], torch.randn(140, 100)[::2, ::2]
    found = torch.ops.pyrovae.mm(left, right, transposed)
    assert found.is_contiguous()
    torch.testing.assert_close(found, (left.double() @ right.double()).float(), rtol=1e-5, atol=1e-4)


LARGE = (1024, 784, 256, (True, False), 1)
onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


def chosen(monkeypatch: pytest.MonkeyPatch, shares: Callable[..., dict[str, float]], *inputs: Tensor) -> list[object]:
    """The ways of the products x @ weight.T (1000 x 50 x 200, 2 threads) and 3 x 4 x 5 of which oneDNN has taken the first."""
    monkeypatch.setattr(matmul, "_onednn_time_ratio", shares)
    monkeypatch.setattr(matmul, "native_is_faster", lambda threads, rounded: False)

    def function(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return x @ weight.t(), a @ b

    module = select_matmul_backend(make_fx(function)(*inputs), threads=2)
    for found, exact in zip(module(*inputs), function(*inputs), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
    targets = [node.target for node in module.graph.nodes]
    assert aten.mm.default in targets  # the small one
    return [node.args[2] for node in module.graph.nodes if node.target == torch.ops.pyrovae.mm.default]


@onednn
@pytest.mark.parametrize(
    ("large", "straight", "transposed", "expected"),
    [
        (0.5, 0.5, 0.6, [False]),
        (0.5, 0.6, 0.5, [True]),
        (0.5, 0.9, 0.9, []),  # MKL's is as fast at this shape
        (0.9, 0.5, 0.5, []),  # and at a large one: an Intel processor, and noise
    ],
)
def test_a_product_goes_to_the_faster_library(
    monkeypatch: pytest.MonkeyPatch, large: float, straight: float, transposed: float, expected: list[bool]
) -> None:
    asked = []

    def shares(*product: object) -> dict[str, float]:
        asked.append(product)
        return {"straight": large, "transposed": 1.1} if product == LARGE else {"straight": straight, "transposed": transposed}

    inputs = torch.randn(1000, 50), torch.randn(200, 50), torch.randn(3, 4), torch.randn(4, 5)
    assert chosen(monkeypatch, shares, *inputs) == expected
    # The second factor is a transposed view.
    assert asked == [LARGE] if large > 0.75 else asked == [LARGE, (1000, 50, 200, (True, False), 2)]


def test_products_stay_without_onednn_and_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(1000, 50), torch.randn(200, 50), torch.randn(3, 4), torch.randn(4, 5)
    assert chosen(monkeypatch, lambda *product: {}, *inputs) == []
    doubles = tuple(each.double() for each in inputs)
    assert chosen(monkeypatch, lambda *product: {"straight": 0.1, "transposed": 0.1}, *doubles) == []


def test_rounded_products_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_onednn_time_ratio", lambda *product: {"straight": 0.1, "transposed": 0.1})
    inputs = torch.randn(1000, 50), torch.randn(50, 200)
    module = select_matmul_backend(rewrite(round_products(make_fx(torch.mm)(*inputs))), threads=1)
    (product,) = module.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert all(factor.kwargs["dtype"] is torch.bfloat16 for factor in product.args)


@onednn
@pytest.mark.usefixtures("float64")
def test_a_product_is_timed_in_float32_whatever_the_default() -> None:
    seen = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu"):
        patch.setattr(matmul, "_seconds", lambda each: {name: float(seen.append(run()) or 1) for name, run in each.items()})
        assert matmul._time_onednn(64, 32, 16, (True, True), 1) == {"straight": 1.0, "transposed": 1.0}
    assert [each.dtype for each in seen] == [torch.float32] * 3


def test_a_build_without_such_products_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(each: object) -> None:
        raise RuntimeError("itensor_view_from_dense")

    monkeypatch.setattr(matmul, "_seconds", refused)
    assert matmul._time_onednn(64, 32, 16, (True, True), 1) == {}


def test_the_module_can_be_loaded_again() -> None:
    importlib.reload(rewrites)
    assert torch.equal(torch.ops.pyrovae.mm(torch.ones(2, 3), torch.ones(3, 4), False), torch.full((2, 4), 3.0))


@onednn
def test_timing_a_product_leaves_threads_and_random_numbers_alone() -> None:
    before, state = torch.get_num_threads(), torch.get_rng_state()
    shares = matmul._time_onednn(64, 32, 16, (False, True), before + 1)
    assert set(shares) == {"straight", "transposed"}
    assert all(share > 0 for share in shares.values())
    assert torch.get_num_threads() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_become_inputs_in_their_order() -> None:
    def function(x: Tensor) -> Tensor:
        return x + torch.randn(3, 4) * torch.empty(4, dtype=torch.float64).normal_() + torch.rand(2, 3, 4)

    x = torch.ones(3, 4)
    module = make_fx(function)(x)
    draws = draws_as_inputs(module)
    torch.manual_seed(0)
    expected = function(x)
    torch.manual_seed(0)
    drawn = [draw() for draw in draws]
    torch.manual_seed(1)
    assert torch.equal(module(x, *drawn), expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.randn(3) + torch.bernoulli(x),
        lambda x: torch.randn(3) + torch.poisson(x),
    ],
)
def test_random_numbers_whose_law_depends_on_others_stay_and_all_with_them(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.full((3,), 0.5)
    module = make_fx(function)(x)
    assert draws_as_inputs(module) == []
    torch.manual_seed(0)
    expected = function(x)
    torch.manual_seed(0)
    assert torch.equal(module(x), expected)
