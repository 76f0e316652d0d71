"""Operations of our own that a compiled graph may call: products, a decoder with its likelihood, many normals.

A decoder's logits are cheap to compute from and dear to write, and scoring wants nothing of them but the sum of their Bernoulli
terms. ``kernels.cpp`` takes that sum while they are in registers, and the whole costs what MKL's products alone do, or half of
that where the processor multiplies in bfloat16 (``experiments/benchmarks/NOTES.md``). It is compiled once a machine, by the
compiler that Inductor uses. :mod:`pyrovae.rewrites` puts these operations into graphs.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# So deep a layer no longer has its weights in the first caches while rows pass by, and MKL is faster.
DEEPEST = 512
# So many normal numbers take torch's generator longer than it is worth.
MANY = 2**16
# Rounded as written, but for products that are added in one instruction.
FLAGS = ("-fno-unsafe-math-optimizations", "-fno-finite-math-only", "-ffp-contract=fast")


@cache
def compiled() -> ctypes.CDLL | None:
    """The functions of ``kernels.cpp``; ``None`` where they cannot be compiled, with one warning that says why."""
    from torch._inductor.codecache import CppCodeCache

    source = Path(__file__).with_name("kernels.cpp").read_text(encoding="utf-8") + _processor()
    try:
        library = CppCodeCache.load(source, extra_flags=FLAGS)
    except Exception as error:  # whatever a compiler says, or its absence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"Compiled steps and scoring run a little slower, since kernels.cpp does not compile here ({reason[:200]})."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.pyrovae_bernoulli_decoder.argtypes = [*[pointer, number] * 4, ctypes.c_bool]
    library.pyrovae_standard_normals.argtypes = [pointer, number, ctypes.c_uint64]
    library.pyrovae_bernoulli_decoder.restype = library.pyrovae_standard_normals.restype = None
    return library


def _processor() -> str:
    """A comment that differs where instructions do: a folder of compiled code may be shared by several machines."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    return next((f"\n// {line}\n" for line in lines if line.lower().startswith(("flags", "features"))), "")


@cache
def products() -> bool:
    """Whether graphs may call ``pyrovae.product``, which is registered here without Python in between.

    Not where ``kernels.cpp`` does not compile, nor under a torch too old to have stable functions for it.
    """
    if torch._C._dispatch_has_kernel_for_dispatch_key("pyrovae::product", "CPU"):
        return True  # from before the module was loaded again
    library, torch_itself = compiled(), ctypes.CDLL(torch._C.__file__)
    if library is None:
        return False
    try:
        functions = [getattr(torch_itself, f"aoti_torch_{name}") for name in STABLE]
        begin, add = torch_itself.aoti_torch_library_init_impl, torch_itself.aoti_torch_library_impl
    except AttributeError:
        return False
    ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)  # so that compiled graphs find what SHIMS names
    library.pyrovae_use_torch((ctypes.c_void_p * len(functions))(*[ctypes.cast(each, ctypes.c_void_p) for each in functions]))
    handle = ctypes.c_void_p()
    failed = begin(b"pyrovae", b"CPU", b"kernels.cpp", ctypes.c_uint32(0), ctypes.byref(handle))
    return not (
        failed
        or add(handle, b"product", library.pyrovae_product_of_tensors)
        or add(handle, b"product_and_squares", library.pyrovae_product_and_squares_of_tensors)
    )


# ``struct Torch`` of ``kernels.cpp``, in its order.
STABLE = ("get_data_ptr", "get_dtype", "get_dim", "get_sizes", "get_strides", "empty_strided", "delete_tensor_object")


class _ByName(dict[str, list[str]]):
    """Of operations, by their names: Inductor keeps on disk only what was made by options that can be pickled."""

    def __contains__(self, operation: object) -> bool:
        return super().__contains__(str(operation))


_TAKES = "AtenTensorHandle, AtenTensorHandle, int64_t, int32_t, AtenTensorHandle*"
# What a compiled graph may call past torch's dispatcher, which takes longer than a small product itself.
SHIMS = _ByName(
    {
        f"pyrovae.{name}.default": [f"AOTITorchError aoti_torch_cpu_{name}({takes})"]
        for name, takes in [("product", _TAKES), ("product_and_squares", f"{_TAKES}, AtenTensorHandle*")]
    }
)


class _Layer(ctypes.Structure):
    """``struct Layer`` of ``kernels.cpp``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "bias")] + [
        (name, ctypes.c_int64) for name in ("depth", "columns", "along_depth", "along_columns", "activation")
    ]


def bernoulli_decoder(
    left: Tensor, weights: list[Tensor], biases: list[Tensor], activations: list[int], x: Tensor, rounded: bool = False
) -> Tensor:
    r""":math:`\sum_d \log \mathrm{Bernoulli}(x_d \mid l_d)` of each row, of logits that are written nowhere.

    .. math:: h_0 = \text{left}, \quad h_i = a_i(h_{i-1} W_i + b_i), \quad l = h_{n-1} W_n + b_n

    Args:
        left: (rows, depth), contiguous and float32 as all others.
        weights: of each layer, (depth, columns) of any strides.
        biases: of each layer, (columns,).
        activations: of each layer but the last, its place among ``ACTIVATIONS``.
        x: (number of data, columns of the last), contiguous; row i has datum i modulo their number.
        rounded: whether the factors of products, inputs, weights and hidden values, are rounded to bfloat16.

    Returns:
        (rows,), in nats.
    """
    library, out = compiled(), left.new_empty(left.shape[0])
    assert library is not None
    layers = (_Layer * len(weights))(
        *[
            _Layer(weight.data_ptr(), bias.data_ptr(), *weight.shape, *weight.stride(), activation)
            for weight, bias, activation in zip(weights, biases, [*activations, 0], strict=True)
        ]
    )
    library.pyrovae_bernoulli_decoder(
        left.data_ptr(), len(left), layers, len(layers), x.data_ptr(), len(x), out.data_ptr(), torch.get_num_threads(), rounded
    )
    return out


def standard_normals(shape: Sequence[int], seed: int) -> Tensor:
    """float32 draws of N(0, 1), the same for a seed wherever and on whatever thread they are made.

    torch's own generator makes one number after the other, and takes four times as long.

    Args:
        shape: of the draws.
        seed: from 0 to 2^64 - 1.

    References:
        Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011: Threefry-2x32 with 20 rounds.
    """
    library, out = compiled(), torch.empty(*shape, dtype=torch.float32)
    assert library is not None
    library.pyrovae_standard_normals(out.data_ptr(), out.numel(), seed)
    return out


def seeded(draw: partial[Tensor]) -> Callable[[], Tensor]:
    """What gives a draw's numbers on another thread: they are drawn now, or made there from a seed that is."""
    shape = torch.Size(draw.args[0])
    if draw.func is torch.ops.aten.randn.default and _many(shape, draw.keywords.get("dtype")):
        return partial(standard_normals, shape, _seed())
    numbers = draw()
    return lambda: numbers


class SeededNormals(TorchDispatchMode):
    """The same for a function that runs as it is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.normal_.default and not kwargs and args[1:] in ((), (0,), (0, 1)):
            if args[0].device.type == "cpu" and _many(args[0].shape, args[0].dtype):
                return args[0].copy_(standard_normals(args[0].shape, _seed()))
        elif func is torch.ops.aten.randn.default and "generator" not in kwargs:
            device = kwargs.get("device") or torch.get_default_device()
            if torch.device(device).type == "cpu" and _many(torch.Size(args[0]), kwargs.get("dtype")):
                return standard_normals(args[0], _seed())
        return func(*args, **kwargs)


def _many(shape: torch.Size, dtype: torch.dtype | None) -> bool:
    return (dtype or torch.get_default_dtype()) is torch.float32 and shape.numel() >= MANY and compiled() is not None


def _seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


ACTIVATIONS = (torch.ops.aten.tanh.default, torch.ops.aten.relu.default)


def _onednn_mm(left: Tensor, right: Tensor, flip: bool) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise  # x @ weight.T, whatever their layouts
    if flip:
        return linear(right.t(), left, None, "none", [], "").t().contiguous()
    return linear(left, right.t(), None, "none", [], "")


OPERATIONS = {
    # What a compiler does not look into, and so computes once instead of wherever it is read.
    "once(Tensor value) -> Tensor": (torch.clone, torch.empty_like),
    "mm(Tensor left, Tensor right, bool flip) -> Tensor": (
        _onednn_mm,
        lambda left, right, flip: left.new_empty(left.shape[0], right.shape[1]),
    ),
    "product(Tensor left, Tensor right, int threads, bool rounded) -> Tensor": (
        None,  # :func:`products` gives it, and the next
        lambda left, right, threads, rounded: left.new_empty(left.shape[0], right.shape[1]),
    ),
    "product_and_squares(Tensor left, Tensor right, int threads, bool rounded) -> (Tensor, Tensor)": (
        None,
        lambda left, right, threads, rounded: (left.new_empty(left.shape[0], right.shape[1]), left.new_empty(())),
    ),
    "bernoulli_decoder(Tensor left, Tensor[] weights, Tensor[] biases, int[] activations, Tensor x, bool rounded) -> Tensor": (
        bernoulli_decoder,
        lambda left, weights, biases, activations, x, rounded: left.new_empty(left.shape[0]),
    ),
}
if "_LIBRARY" not in globals():  # as it is when the module is loaded again
    _LIBRARY = torch.library.Library("pyrovae", "DEF")
    for _schema, (_function, _shape) in OPERATIONS.items():
        _LIBRARY.define(_schema)
        if _function is not None:
            _LIBRARY.impl(_schema.partition("(")[0], _function, "CPU")
        _LIBRARY.impl(_schema.partition("(")[0], _shape, "Meta")
