"""Who may import whom (DESIGN section 2), read off the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyrovae

ROOT = Path(pyrovae.__file__).parent
ROOMS = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")

# Leaves import no room but each other here, and any room may import them.
LEAVES = {"registry", "checkpoint", "data", "evidence", "staging", "reachable", "cuda"}
_BODIES = {"nn", "distributions"}
_PARTS = {"priors", "likelihoods", "encoders"}
_TRACES = {"sites", "state", "traces", "checks", "weights", "probes", "pairs"}
_SCORING = _TRACES | {"estimators", "proposals", "marginal", "integration", "annealing", "diagnostics", "training"}
ALLOWED: dict[str, set[str]] = {
    "nn": set(),
    "distributions": set(),
    **dict.fromkeys(_PARTS, _BODIES),
    "vae": _BODIES | _PARTS,
    # What all models of ours do the same way is in vae.
    **dict.fromkeys(("hierarchical", "conditional"), _BODIES | _PARTS | {"vae"}),
    # One room in the page: sites unwraps, traces reads, checks compares, weights reduces, pairs inspects; state is what
    # a pair leaves behind, and probes what is checked before it is believed.
    "sites": set(),
    "state": set(),
    "traces": {"sites", "state"},
    "checks": {"sites", "traces"},
    "weights": {"sites", "traces", "checks"},
    "probes": {"sites", "traces"},
    "pairs": {"sites", "state", "traces", "checks", "weights", "probes"},
    "estimators": _TRACES,
    # Beyond the page: what importance sampling draws from, and what needs no sampling, have rooms of their own.
    "proposals": _TRACES,
    "marginal": _TRACES | {"proposals", "psis"},
    "psis": set(),
    "integration": _TRACES | {"quadrature"},
    "quadrature": set(),
    "annealing": _TRACES,
    # Beyond the page's arrow from weights: a comparison trains and scores, with estimators found by name.
    "diagnostics": _TRACES | {"estimators", "marginal", "training"},
    "training": _TRACES | {"estimators", "preflight"},
    "preflight": _TRACES,
    **{leaf: set() for leaf in LEAVES},
    # What the data door is made of: which array goes where, and what comes from torch's loaders.
    "matching": set(),
    "streams": set(),
    "support": set(),
    "data": {"matching", "streams", "support"},
    # Beyond the page: what is done to a graph between capture and compiler.
    "kernels": set(),
    "rewrites": {"kernels"},
    "staging": {"kernels", "rewrites", "reachable", "cuda"},
    "config": set(ROOMS) - {"report", "cli"},
    "report": set(ROOMS) - {"cli"},
    "cli": set(ROOMS),
}
# The convenience methods of a VAE call into the second and third chain, inside the method.
# A History plots itself, and plots live in report.
LAZY: dict[str, set[str]] = {**dict.fromkeys(("vae", "hierarchical", "conditional"), _SCORING), "training": {"report"}}
ONLY_IN = {"torchvision": {"data"}, "arviz": {"evidence"}, "torch.fx": {"staging", "rewrites"}, "torch._dynamo": {"staging"}}


def _imports(room: str) -> Iterator[tuple[str, bool]]:
    """Absolute names of what a room imports, and whether it does when it is imported itself."""
    tree = ast.parse((ROOT / f"{room}.py").read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) not in later) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(part for part in ("pyrovae" if node.level else "", node.module or "") if part)
            # `from . import x` names rooms; `from .x import y` names one.
            yield from ((f"{parent}.{alias.name}", id(node) not in later) for alias in node.names)


def _rooms(room: str, *, now: bool) -> set[str]:
    found = {name.split(".")[1] for name, at_once in _imports(room) if name.startswith("pyrovae.") and at_once == now}
    return found & set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_keep_to_the_design(room: str) -> None:
    assert room in ALLOWED, f"{room}.py is no room of DESIGN section 2: give it its place in ALLOWED"
    allowed = ALLOWED[room] | (LEAVES - {room} if room not in LEAVES else {"registry", "checkpoint"} - {room})
    assert _rooms(room, now=True) <= allowed
    assert _rooms(room, now=False) <= allowed | LAZY.get(room, set())


@pytest.mark.parametrize("room", ROOMS)
def test_special_libraries_have_one_door(room: str) -> None:
    for name, _ in _imports(room):
        for library, doors in ONLY_IN.items():
            # arviz_stats and arviz_base are arviz.
            inside = name == library or name.startswith((f"{library}.", f"{library}_"))
            assert not inside or room in doors, f"{room}.py imports {name}, which belongs in {doors}"


def test_the_reader_sees_imports_of_every_form() -> None:
    # Guards the guards: were nothing found, everything above would pass.
    assert _rooms("vae", now=True) >= {"checkpoint", "encoders", "likelihoods", "nn", "priors", "registry"}
    assert _rooms("vae", now=False) >= {"training", "marginal"}
    assert "torch" in {name.split(".")[0] for name, _ in _imports("nn")}


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "pyro", "arviz", "torchvision", "numpy", "matplotlib", "zuko"]
    code = f"import sys, pyrovae; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_index_keeps_what_it_promises() -> None:
    for name in pyrovae.__all__:
        assert (ROOT / f"{name}.py").exists() or name in pyrovae._NAMES
    assert set(pyrovae._NAMES) <= set(pyrovae.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = pyrovae.nonsense
