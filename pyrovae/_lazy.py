"""Names of the package that load on first use, and modules that moved.

Importing torch, Pyro and ArviZ takes seconds, and ``pyrovae --help`` must not wait for them.
"""

from __future__ import annotations

import ast
import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "attach"]

# Modules of version 0.1, and where their contents live now. They can be imported until version 0.3.
MOVED: dict[str, tuple[str, ...]] = {
    "annealing": ("evidence.annealing", "evidence.bdmc"),
    "checkpoint": ("files",),
    "conditional": ("models.conditional",),
    "config": ("cli.config",),
    "hierarchical": ("models.hierarchical", "models.guides"),
    "integration": ("evidence.exact", "evidence.enumeration", "evidence.linear_gaussian", "evidence.latent_quadrature"),
    "kernels": ("compile.kernels",),
    "marginal": ("evidence.importance", "evidence.sampler", "evidence.planning", "evidence.store"),
    "pairs": ("programs.inspect", "programs.parameters"),
    "proposals": ("evidence.refine", "evidence.proposals"),
    "report": ("cli.report", "cli.figures", "plots"),
    "rewrites": ("compile.rewrites", "compile.matmul", "compile.patterns"),
    "staging": ("compile.step", "compile.graph", "compile.inductor", "compile.optimizer"),
    "traces": ("programs.sites", "programs.tracing", "programs.checks", "programs.unconstrained"),
    "vae": ("models.vae", "models.base", "models.parts"),
    "weights": ("programs.weights", "programs.log_weights", "programs.wake_sleep"),
}


def attach(package: str, path: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package, from the stub that stands beside its ``__init__.py``."""
    homes: dict[str, str] = {}
    for node in ast.parse(Path(path).with_suffix(".pyi").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                homes[alias.name] = f".{node.module}" if node.module else ""

    def get(name: str) -> Any:
        if name in homes:
            home = homes[name]
            return (
                getattr(importlib.import_module(home, package), name) if home else importlib.import_module(f".{name}", package)
            )
        if name in MOVED:
            return importlib.import_module(f".{name}", package)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
    return get, lambda: sorted([*homes, "__version__"]), sorted(homes)


class _MovedModules(MetaPathFinder, Loader):
    """Imports ``pyrovae.<old name>`` as what it became, with a warning."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, module = name.partition(".")
        return ModuleSpec(name, self) if package == "pyrovae" and module in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        package, _, name = module.__name__.partition(".")
        homes = [f"{package}.{home}" for home in MOVED[name]]
        warnings.warn(
            f"{module.__name__} moved to {', '.join(homes)} and will be gone in version 0.3: import from there.",
            DeprecationWarning,
            stacklevel=2,
        )

        def get(wanted: str) -> Any:
            # inspect.getmodule asks every module for its __file__, also while torch is half imported.
            for home in homes if not wanted.startswith("__") else ():
                found = importlib.import_module(home)
                if hasattr(found, wanted):
                    return getattr(found, wanted)
            raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")

        module.__dict__["__getattr__"] = get
