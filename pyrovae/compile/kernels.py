"""Operations of our own in C++ that a compiled graph may call: a decoder with its likelihood, many normals, matrix products.

Scoring needs only the sum of a decoder's Bernoulli log-likelihood, so that writing the logits to memory is most of its cost.
The sources in ``native/`` accumulate that sum in registers: the whole costs what MKL's products alone do, or half of that on a
processor that multiplies in bfloat16 (``experiments/benchmarks/NOTES.md``). They are compiled once for each machine, by the
compiler that Inductor uses. :mod:`pyrovae.compile.rewrites` and :mod:`pyrovae.compile.matmul` put the operations into graphs.
"""

from __future__ import annotations

import ctypes
import platform
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .notes import note
from .settings import cxx_flags, native_level

__all__ = [
    "ACTIVATIONS",
    "DEEPEST",
    "MANY",
    "OPERATIONS",
    "SHIMS",
    "SeededNormals",
    "bernoulli_decoder",
    "load_library",
    "processor",
    "register_products",
    "seeded",
    "source",
    "standard_normals",
]

# The weights of a layer deeper than this leave the first-level cache while rows pass, and MKL is faster.
DEEPEST = 512
# From this many normal numbers on, our generator is worth a call: torch's own makes them one by one.
MANY = 2**16
# Rounding as written, except that a multiplication and an addition may be one instruction.
FLAGS = ("-fno-unsafe-math-optimizations", "-fno-finite-math-only", "-ffp-contract=fast")


def load_library() -> ctypes.CDLL | None:
    """The compiled C++ functions; ``None`` without them, with one warning that says why (none if they are switched off)."""
    return None if native_level() == "none" else _load_library((*FLAGS, *cxx_flags()))


@cache
def _load_library(flags: tuple[str, ...]) -> ctypes.CDLL | None:
    from torch._inductor import config
    from torch._inductor.codecache import CppCodeCache

    try:
        # Inductor would add its own instruction flags after ours; -march=native has them already.
        with config.patch({"cpp.simdlen": 1}):
            library = CppCodeCache.load(source(), extra_flags=flags)
    except Exception as error:  # whatever a compiler says, or its absence
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        note(
            "native",
            f"Compiled steps and scoring run a little slower, since pyrovae's C++ does not compile here ({reason[:200]}): "
            "install a C++ compiler, or set PYROVAE_NATIVE=none to do without.",
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.pyrovae_bernoulli_decoder.argtypes = [*[pointer, number] * 4, ctypes.c_bool]
    library.pyrovae_standard_normals.argtypes = [pointer, number, ctypes.c_uint64]
    library.pyrovae_bernoulli_decoder.restype = library.pyrovae_standard_normals.restype = None
    library.pyrovae_multiplies_bfloat16.restype = ctypes.c_bool
    return library


def source() -> str:
    """The files of ``native/`` as one source, since Inductor compiles one, with the processor's instructions in a comment.

    A folder of compiled code may be shared by machines with other instructions: the comment makes their sources differ.
    """
    included: set[str] = set()

    def expand(name: str) -> str:
        if name in included:
            return ""
        included.add(name)
        text = (Path(__file__).with_name("native") / name).read_text(encoding="utf-8")
        return re.sub(
            r'^#include "(.+)"$', lambda match: expand(match[1]), text.replace("#pragma once\n", ""), flags=re.MULTILINE
        )

    return "".join(map(expand, SOURCES)) + f"\n// {processor()}\n"


SOURCES = ("decoder.cpp", "normals.cpp", "products.cpp")


@cache
def processor() -> str:
    """The processor's instructions, as Linux lists them; elsewhere its name."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


def register_products() -> bool:
    """Whether graphs may call ``pyrovae.product``, after registering it with torch's dispatcher if need be.

    They may not if ``PYROVAE_NATIVE`` leaves products out, the C++ does not compile, or torch is too old to have stable C
    functions to register it with.
    """
    return native_level() == "all" and load_library() is not None and _register_products()


@cache
def _register_products() -> bool:
    if torch._C._dispatch_has_kernel_for_dispatch_key("pyrovae::product", "CPU"):
        return True  # registered before this module was loaded again
    library, torch_itself = load_library(), ctypes.CDLL(torch._C.__file__)
    assert library is not None
    try:
        functions = [getattr(torch_itself, f"aoti_torch_{name}") for name in STABLE]
        begin, add = torch_itself.aoti_torch_library_init_impl, torch_itself.aoti_torch_library_impl
    except AttributeError as error:
        note(
            "products",
            f"This torch has no stable C functions for products of our own ({error}): its own libraries multiply.",
            warn=False,
        )
        return False
    ctypes.CDLL(library._name, mode=ctypes.RTLD_GLOBAL)  # so that compiled graphs find what SHIMS names
    library.pyrovae_use_torch((ctypes.c_void_p * len(functions))(*[ctypes.cast(each, ctypes.c_void_p) for each in functions]))
    handle = ctypes.c_void_p()
    failed = begin(b"pyrovae", b"CPU", b"pyrovae/compile/native", ctypes.c_uint32(0), ctypes.byref(handle))
    failed = (
        failed
        or add(handle, b"product", library.pyrovae_product_of_tensors)
        or add(handle, b"product_and_squares", library.pyrovae_product_and_squares_of_tensors)
    )
    if failed:
        note("products", "torch refuses to register our own products: its own libraries multiply.")
    return not failed


# ``struct Torch`` of ``native/products.cpp``, in its order.
STABLE = ("get_data_ptr", "get_dtype", "get_dim", "get_sizes", "get_strides", "empty_strided", "delete_tensor_object")


class _ByName(dict[str, list[str]]):
    """A dictionary that finds operations by their names: Inductor's cache on disk takes only options that can be pickled."""

    def __contains__(self, operation: object) -> bool:
        return super().__contains__(str(operation))


_ARGUMENTS = "AtenTensorHandle, AtenTensorHandle, int64_t, int32_t, AtenTensorHandle*"
# What a compiled graph may call without torch's dispatcher, which takes longer than a small product itself.
SHIMS = _ByName(
    {
        f"pyrovae.{name}.default": [f"AOTITorchError aoti_torch_cpu_{name}({arguments})"]
        for name, arguments in [("product", _ARGUMENTS), ("product_and_squares", f"{_ARGUMENTS}, AtenTensorHandle*")]
    }
)


class _Layer(ctypes.Structure):
    """``struct Layer`` of ``native/decoder.cpp``."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("weights", "bias")] + [
        (name, ctypes.c_int64) for name in ("depth", "columns", "along_depth", "along_columns", "activation")
    ]


def bernoulli_decoder(
    left: Tensor, weights: list[Tensor], biases: list[Tensor], activations: list[int], x: Tensor, rounded: bool = False
) -> Tensor:
    r"""The sum :math:`\sum_d \log \mathrm{Bernoulli}(x_d \mid l_d)` of each row, without writing the logits l to memory.

    .. math:: h_0 = \text{left}, \quad h_i = a_i(h_{i-1} W_i + b_i), \quad l = h_{n-1} W_n + b_n

    Args:
        left: the decoder's inputs, (rows, depth), contiguous.
        weights: of each layer, (depth, columns), with any strides.
        biases: of each layer, (columns,), contiguous.
        activations: of each layer but the last, an index into ``ACTIVATIONS``.
        x: the data, (number of data, columns of the last layer), contiguous; row i has datum i modulo their number.
        rounded: whether the factors of products (inputs, weights, hidden values) are rounded to bfloat16.

    Returns:
        Log-likelihoods, (rows,), in nats.

    Raises:
        ValueError: a tensor has the wrong shape, dtype, strides or device, or an activation is unknown.
        RuntimeError: the C++ is switched off or does not compile here.

    Example:
        >>> import torch
        >>> from pyrovae.compile.kernels import bernoulli_decoder, load_library
        >>> z, weight, bias, x = torch.zeros(2, 3), torch.zeros(3, 4), torch.zeros(4), torch.ones(1, 4)
        >>> if load_library() is not None:
        ...     assert torch.allclose(bernoulli_decoder(z, [weight], [bias], [], x), torch.tensor(0.5).log() * 4)
    """
    library = load_library()
    if library is None:
        raise RuntimeError(
            "bernoulli_decoder needs pyrovae's C++, which is switched off or does not compile: see pyrovae doctor."
        )
    _check_decoder(left, weights, biases, activations, x)
    out = left.new_empty(left.shape[0])
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


def _check_decoder(left: Tensor, weights: list[Tensor], biases: list[Tensor], activations: list[int], x: Tensor) -> None:
    """Refuse what the C++ would misread: it gets nothing but addresses and sizes."""
    if not weights or len(biases) != len(weights) or len(activations) != len(weights) - 1:
        raise ValueError(
            "Layers must have a weight and a bias each, and an activation each but the last, "
            f"got {len(weights)} weights, {len(biases)} biases and {len(activations)} activations."
        )
    if any(activation not in range(len(ACTIVATIONS)) for activation in activations):
        raise ValueError(f"Activations must be 0 (tanh) or 1 (relu), got {activations}.")
    depths = [left.shape[-1] if left.dim() else 0, *[weight.shape[-1] for weight in weights]]
    wanted: list[tuple[str, Tensor, tuple[int, ...], bool]] = [("left", left, (len(left), depths[0]), True)]
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        wanted.append((f"weights[{layer}]", weight, (depths[layer], depths[layer + 1]), False))
        wanted.append((f"biases[{layer}]", bias, (depths[layer + 1],), True))
    wanted.append(("x", x, (max(len(x), 1), depths[-1]), True))
    for name, tensor, shape, contiguous in wanted:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"{name} must be float32 on the CPU, got {tensor.dtype} on {tensor.device}.")
        if contiguous and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}: call .contiguous().")


def standard_normals(shape: Sequence[int], seed: int) -> Tensor:
    """Draws of N(0, 1) in float32 that depend on the seed alone: not on the thread, the processor or the compiler.

    torch's own generator makes one number after the other, and takes four times as long.

    Args:
        shape: the shape of the draws.
        seed: from 0 to 2^64 - 1.

    Raises:
        RuntimeError: the C++ is switched off or does not compile here.

    References:
        Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011,
        https://doi.org/10.1145/2063384.2063405: Threefry-2x32 with 20 rounds.

    Example:
        >>> import torch
        >>> from pyrovae.compile.kernels import load_library, standard_normals
        >>> if load_library() is not None:
        ...     assert torch.equal(standard_normals((40,), 7)[:32], standard_normals((32,), 7))
    """
    library, out = load_library(), torch.empty(*shape, dtype=torch.float32)
    if library is None:
        raise RuntimeError(
            "standard_normals needs pyrovae's C++, which is switched off or does not compile: see pyrovae doctor."
        )
    library.pyrovae_standard_normals(out.data_ptr(), out.numel(), seed)
    return out


def seeded(draw: partial[Tensor]) -> Callable[[], Tensor]:
    """A function that gives a draw's numbers on another thread: few are drawn now, many are made from a seed drawn now."""
    shape = torch.Size(draw.args[0])
    if draw.func is torch.ops.aten.randn.default and _many(shape, draw.keywords.get("dtype")):
        return partial(standard_normals, shape, _seed())
    numbers = draw()
    return lambda: numbers


class SeededNormals(TorchDispatchMode):
    """Gives a function that runs without a graph the numbers that :func:`seeded` gives its graph."""

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
    return (dtype or torch.get_default_dtype()) is torch.float32 and shape.numel() >= MANY and load_library() is not None


def _seed() -> int:
    return int(torch.randint(2**63 - 1, ()))


ACTIVATIONS = (torch.ops.aten.tanh.default, torch.ops.aten.relu.default)


def _onednn_mm(left: Tensor, right: Tensor, transposed: bool) -> Tensor:
    """The product by oneDNN, computed as it is or as the transpose of right' left'."""
    linear = torch.ops.mkldnn._linear_pointwise  # x @ weight.T, whatever their layouts
    if transposed:
        return linear(right.t(), left, None, "none", [], "").t().contiguous()
    return linear(left, right.t(), None, "none", [], "")


OPERATIONS = {
    # The compiler does not look into an operation of our own, and so computes its value once, not again wherever it is read.
    "once(Tensor value) -> Tensor": (torch.clone, torch.empty_like),
    "mm(Tensor left, Tensor right, bool transposed) -> Tensor": (
        _onednn_mm,
        lambda left, right, transposed: left.new_empty(left.shape[0], right.shape[1]),
    ),
    "product(Tensor left, Tensor right, int threads, bool rounded) -> Tensor": (
        None,  # :func:`register_products` adds it, and the next
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
# Torch takes each operation once in a process, and forgets it with its library. So torch keeps the library, for when this
# module is loaded again, or the package imported anew in a notebook.
if "pyrovae_operations" not in vars(torch.library):
    _LIBRARY = torch.library.pyrovae_operations = torch.library.Library("pyrovae", "DEF")  # type: ignore[attr-defined]
    for _schema, (_function, _shape) in OPERATIONS.items():
        _LIBRARY.define(_schema)
        if _function is not None:
            _LIBRARY.impl(_schema.partition("(")[0], _function, "CPU")
        _LIBRARY.impl(_schema.partition("(")[0], _shape, "Meta")
