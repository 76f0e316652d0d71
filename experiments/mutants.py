"""Which single changes to the formulas no test notices.

Each mutant changes one expression: a sign swapped, a factor or a term dropped, a comparison turned, a constant moved, a root or
a detach left out. A first run of the tests records which of them pass through which line; a mutant then meets those alone, the
fast ones first, in a fork of a process that has imported torch already. Run from the repository's root:

    python experiments/mutants.py --number 80 --seed 0

``results/mutants.json`` lists every mutant with what became of it. Those that survive are changes that do not matter (a chunk's
size, say) or ask for a test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results/mutants.json"
MODULES = "traces weights pairs estimators evidence marginal diagnostics annealing proposals integration".split()
TESTS = "weights estimators evidence marginal diagnostics annealing proposals integration".split()
SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
DROPPED_CALLS = {"sqrt", "detach", "clamp", "log", "exp", "abs", "square"}
QUIET = ("__str__", "plot", "__repr__", "explained")  # what these say and draw is no formula
GUARDS = (ast.Raise, ast.JoinedStr, ast.Assert, ast.arguments, ast.AnnAssign)


class Mutant(NamedTuple):
    """One change: where, from what, to what."""

    module: str
    line: int
    old: str
    new: str
    source: str  # of the whole module


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """Expressions to stand in a node's place."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        yield node.left
        if isinstance(node.op, ast.Mult | ast.Add):
            yield node.right
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        yield ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) < 100:
        yield ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.5 * (node.value == 0))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_CALLS:
        yield node.args[0] if ast.unparse(node.func.value) in ("math", "np", "torch") else node.func.value
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that compute something: no messages, annotations, defaults or docstrings."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, GUARDS) or getattr(child, "name", "") in QUIET:
            continue
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(node, ast.FunctionDef) and child in node.decorator_list:
            continue
        yield child
        yield from expressions(child)


def mutants(module: str) -> list[Mutant]:
    """All single changes to a module."""
    source = (ROOT / "pyrovae" / f"{module}.py").read_text()
    lines = source.splitlines(keepends=True)
    found = []
    for node in expressions(ast.parse(source)):
        for new in variants(node):
            # ast counts columns in bytes; what is replaced spans whole tokens.
            start = sum(len(text.encode()) for text in lines[: node.lineno - 1]) + node.col_offset  # type: ignore[attr-defined]
            end = sum(len(text.encode()) for text in lines[: node.end_lineno - 1]) + node.end_col_offset  # type: ignore[attr-defined]
            text = source.encode()
            replaced = text[:start] + f"({ast.unparse(copy.deepcopy(new))})".encode() + text[end:]
            old = " ".join(text[start:end].decode().split())
            found.append(Mutant(module, node.lineno, old, ast.unparse(new), replaced.decode()))  # type: ignore[attr-defined]
    return found


class Touched:
    """A plugin for pytest that records which lines of the package each test runs, and how long it takes."""

    def __init__(self, package: Path):
        self.package, self.lines, self.seconds = str(package), {}, {}  # type: ignore[var-annotated]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: Any) -> Any:
        seen: set[tuple[str, int]] = set()

        def trace(frame: Any, event: str, argument: Any) -> Any:
            path = frame.f_code.co_filename
            if not path.startswith(self.package):
                return None
            seen.add((Path(path).stem, frame.f_lineno))
            return trace

        began = time.perf_counter()
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = time.perf_counter() - began
            self.lines[item.nodeid] = seen


class Outcome:
    """A plugin that records the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid


def run(folder: Path, tests: list[str], plugin: Any, report: Any, timeout: float) -> Any:
    """Run tests in a fork, and return what ``report`` says of the plugin there; None past the timeout."""
    sent = folder / "report.json"
    sent.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        signal.alarm(int(timeout))  # ends this fork alone
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1), os.dup2(silence, 2)
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-m", "not slow"]
        os.chdir(folder)
        code = pytest.main([*options, *tests], plugins=[plugin])
        sent.write_text(json.dumps(report(plugin, int(code))))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(sent.read_text()) if sent.exists() else None


def lines_of(plugin: Touched, code: int) -> Any:
    if code != 0:
        return {"code": code}
    return {"seconds": plugin.seconds, "lines": {test: sorted(seen) for test, seen in plugin.lines.items()}}


def prepare(folder: Path) -> None:
    """A copy of the repository that may be broken, and the imports that every fork shares."""
    for name in ("pyrovae", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    sys.path[:] = [str(folder)] + [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "experiments")]
    sys.dont_write_bytecode = True
    import arviz_stats  # noqa: F401
    import pyro.infer  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch

    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="*", default=MODULES)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    options = parser.parse_args()
    began = time.monotonic()
    every = [mutant for module in options.modules for mutant in mutants(module)]
    chosen = random.Random(options.seed).sample(every, min(options.number, len(every)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder)
        files = [f"tests/test_{test}.py" for test in TESTS]
        first = run(folder, files, Touched(folder / "pyrovae"), lines_of, 1800)
        if first is None or "code" in first:
            sys.exit(f"The tests must pass before anything is changed: {first}")
        print(f"{len(first['seconds'])} tests, {time.monotonic() - began:.0f} s; {len(chosen)} of {len(every)} mutants", flush=True)
        touching: dict[tuple[str, int], list[str]] = {}
        for test, seen in first["lines"].items():
            for module, line in seen:
                touching.setdefault((module, line), []).append(test)
        results = []
        for mutant in chosen:
            if time.monotonic() - began > 60 * options.minutes:
                break
            results.append(judge(folder, mutant, touching, first["seconds"], options.budget))
            print(results[-1], flush=True)
            summary = {"seed": options.seed, "all": len(every), "tried": len(results)}
            summary["survived"] = sum(result["outcome"] == "survived" for result in results)
            RESULTS.write_text(json.dumps({**summary, "mutants": results}, indent=1) + "\n")


def judge(folder: Path, mutant: Mutant, touching: dict, seconds: dict[str, float], budget: float) -> dict[str, Any]:
    """Run the tests that pass through a mutant's line, the fast ones first, until one fails."""
    tests = sorted(touching.get((mutant.module, mutant.line), []), key=seconds.__getitem__)
    some, total = [], 0.0
    for test in tests:
        total += seconds[test]
        if some and total > budget:
            break
        some.append(test)
    result: dict[str, Any] = {"at": f"{mutant.module}.py:{mutant.line}", "old": mutant.old, "new": mutant.new}
    if not some:
        return result | {"outcome": "survived", "tests": 0, "why": "no test of these files runs the line"}
    path = folder / "pyrovae" / f"{mutant.module}.py"
    kept = path.read_text()
    path.write_text(mutant.source)
    try:
        failed = run(folder, some, Outcome(), lambda plugin, code: plugin.failed or ("" if code == 0 else f"exit {code}"), 60 + 3 * budget)
    finally:
        path.write_text(kept)
    if failed is None:
        return result | {"outcome": "killed", "by": "timeout or crash"}
    return result | ({"outcome": "killed", "by": failed} if failed else {"outcome": "survived", "tests": len(some), "of": len(tests)})


if __name__ == "__main__":
    main()
