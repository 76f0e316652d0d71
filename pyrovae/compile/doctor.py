"""What compilation does on this machine, and why: the lines that ``pyrovae doctor`` prints."""

from __future__ import annotations

import platform
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from . import kernels, matmul
from .choices import answers, choices_folder
from .graph import Staged
from .notes import reasons
from .settings import cxx_flags, limit_backend, native_level

__all__ = ["TESTED_TORCH", "report"]

# The versions of torch that the tests of this folder have passed on.
TESTED_TORCH = ("2.8", "2.13")


def report() -> list[tuple[str, str]]:
    """Subjects and what is true of each, after compiling a small graph and our C++, which takes some seconds the first time.

    Returns:
        Pairs of a subject and a sentence: versions, compiler, GPU, what is on and why, and last what to do.

    Raises:
        ValueError: one of the variables of :mod:`pyrovae.compile.settings` has a value that it must not have.

    Example:
        >>> from pyrovae.compile.doctor import report
        >>> subjects = [subject for subject, _ in report()]  # doctest: +SKIP
        >>> subjects[:3]  # doctest: +SKIP
        ['pyrovae', 'Python', 'torch']
    """
    backend, level = limit_backend("inductor"), native_level()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the reasons below say the same
        failure = _try_to_compile()
        library = kernels.load_library()
        unused = "off, since only compiled graphs call it" if backend != "inductor" or failure is not None else ""
        captured = "" if backend == "native" else unused
        lines = [
            *_versions(),
            ("processor", f"{_processor_name()}, {torch.get_num_threads()} threads of torch"),
            ("C++ compiler", _compiler()),
            ("GPU", torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch can use"),
            ("compile backend", _backend_line(backend, failure)),
            ("native decoder", captured or _native_line(level, library is not None)),
            ("native normals", captured or _native_line(level, library is not None)),
            ("native products", unused or _products_line(level, library is not None)),
            ("choices", _choices_line()),
        ]
    lines += [(f"choice: {question}", _ratios(ratios)) for question, ratios in answers().items()]
    lines += [(f"slower: {subject}", reason) for subject, reason in reasons().items()]
    return [*lines, ("what to do", _advice(backend, level, failure, library is not None))]


def _versions() -> list[tuple[str, str]]:
    found = [("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for package in ("torch", "pyro-ppl", "numpy"):
        found.append((package, _version(package)))
    tested = ".".join(torch.__version__.split(".")[:2]) in TESTED_TORCH
    if not tested:
        found[1] = ("torch", f"{torch.__version__}; compilation was tested on {', '.join(TESTED_TORCH)} only")
    return [("pyrovae", _version("pyrovae")), *found]


def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _processor_name() -> str:
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def _compiler() -> str:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except (InvalidCxxCompiler, OSError) as error:
        return f"none that Inductor finds ({type(error).__name__})"


def _try_to_compile() -> str | None:
    """Compile a small graph as a step is compiled; the reason if that fails."""

    def sum_of_sines(x: Tensor) -> tuple[Tensor, ...]:
        return (x.sin().sum(),)

    staged, x = Staged(sum_of_sines), torch.ones(8)
    for _ in range(3):  # the first captures, the second compiles
        staged(x)
    return staged.reason


def _backend_line(backend: str, reason: str | None) -> str:
    if backend != "inductor":
        return f"{backend}, since PYROVAE_COMPILE={backend} is set"
    if reason is not None:
        return f"not inductor: {reason}"
    return "inductor: a small graph compiles here and gives the right numbers"


def _native_line(level: str, compiles: bool) -> str:
    if level == "none":
        return "off, since PYROVAE_NATIVE=none is set"
    if not compiles:
        return "off, since the C++ does not compile here"
    library = kernels.load_library()
    assert library is not None
    rounds = "has" if library.pyrovae_multiplies_bfloat16() else "has no"
    flags = f", with PYROVAE_CXX_FLAGS={' '.join(cxx_flags())}" if cxx_flags() else ""
    return f"on: vectors of {library.pyrovae_lanes()} numbers; the processor {rounds} bfloat16 multiplication{flags}"


def _products_line(level: str, compiles: bool) -> str:
    if level != "all":
        return f"off, since PYROVAE_NATIVE={level} is set"
    if not compiles:
        return "off, since the C++ does not compile here"
    if not kernels.register_products():
        return "off, since torch does not take them"
    faster = matmul.native_is_faster(torch.get_num_threads(), rounded=False)
    limit = matmul.NATIVE_CLEARLY_FASTER
    if faster:
        return f"on: they take less than {limit} of the time of torch's library here"
    return f"available, not used for float32: they take more than {limit} of the time of torch's library here"


def _choices_line() -> str:
    return f"measured once and kept in {choices_folder()}; delete the folder to measure again"


def _ratios(ratios: dict[str, float]) -> str:
    if not ratios:
        return "cannot be used"
    return ", ".join(f"{name} takes {ratio:.2f} of MKL's time" for name, ratio in ratios.items())


def _advice(backend: str, level: str, reason: str | None, compiles: bool) -> str:
    if backend != "inductor":
        return "Unset PYROVAE_COMPILE to let steps be compiled."
    if reason is not None or (not compiles and level != "none"):
        return "Install a C++ compiler that Inductor finds (g++ or clang++; CXX names another one), and run this again."
    if level != "all":
        return "Unset PYROVAE_NATIVE to let compiled steps use all of pyrovae's C++."
    return "Nothing: all that this machine can use is on."
