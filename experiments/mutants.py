"""Which single changes to the formulas no test notices.

Each mutant changes one expression: a sign swapped, a factor or a term dropped, a comparison turned, a constant moved, a root or
a detach left out. A first run of the tests records which of them pass through which line; a mutant then meets those alone, the
fast ones first, in a fork of a process that has imported torch already. Run from the repository's root:

    python experiments/mutants.py --number 80 --seed 0

``results/mutants.json`` lists every mutant with what became of it; another run adds new ones, ``--again`` tries the survivors
once more. Those that survive are changes that do not matter (a chunk's size, say) or ask for a test.
"""

from __future__ import annotations

import argparse
import ast
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
MODULES = (
    "traces weights pairs support estimators evidence marginal diagnostics annealing proposals integration quadrature".split()
)
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
    end: int
    inside: bool  # in a function, not run on import
    text: str  # the line as it is, by which the change is known again when lines have moved
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
    text, starts = source.encode(), [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))  # ast counts columns in bytes
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found = []
    for node in expressions(tree):
        for new in variants(node):
            line, end = node.lineno, node.end_lineno  # type: ignore[attr-defined]
            start, stop = starts[line - 1] + node.col_offset, starts[end - 1] + node.end_col_offset  # type: ignore[attr-defined]
            replaced = text[:start] + f"({ast.unparse(new)})".encode() + text[stop:]
            old = " ".join(text[start:stop].decode().split())
            inside = any(function.lineno <= line <= (function.end_lineno or 0) for function in functions)
            shown = source.splitlines()[line - 1].strip()
            found.append(Mutant(module, line, end, inside, shown, old, ast.unparse(new), replaced.decode()))
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
    sys.path[:] = [str(folder)] + [
        path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "experiments")
    ]
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
    parser.add_argument("--tests", nargs="*", default=TESTS, help="test files")
    parser.add_argument("--again", action="store_true", help="try those that survived, not new ones")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    options = parser.parse_args()
    began = time.monotonic()
    every = [mutant for module in options.modules for mutant in mutants(module)]
    results = json.loads(RESULTS.read_text())["mutants"] if RESULTS.exists() else []
    known = {(result["in"], result["old"], result["new"]): result["outcome"] for result in results}
    if options.again:
        chosen = [mutant for mutant in every if known.get((mutant.text, mutant.old, mutant.new)) == "survived"]
    else:
        new = [mutant for mutant in every if (mutant.text, mutant.old, mutant.new) not in known]
        chosen = random.Random(options.seed).sample(new, min(options.number, len(new)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder)
        first = run(folder, [f"tests/test_{test}.py" for test in options.tests], Touched(folder / "pyrovae"), lines_of, 1800)
        if first is None or "code" in first:
            sys.exit(f"The tests must pass before anything is changed: {first}")
        print(f"{len(first['seconds'])} tests, {len(chosen)} of {len(every)} mutants", flush=True)
        for mutant in chosen:
            if time.monotonic() - began > 60 * options.minutes:
                break
            found = judge(folder, mutant, first, options.budget)
            key = (mutant.text, mutant.old, mutant.new)
            results = [r for r in results if (r["in"], r["old"], r["new"]) != key] + [found]
            print(found, flush=True)
    survived = [result for result in results if result["outcome"] == "survived"]
    sys.path.insert(0, str(ROOT / "experiments"))
    import record

    record.write("mutants", {"possible": len(every), "tried": len(results), "survived": len(survived), "mutants": results})


def judge(folder: Path, mutant: Mutant, first: dict[str, Any], budget: float) -> dict[str, Any]:
    """Run the tests that pass through a mutant's lines, the fast ones first, until one fails."""
    seconds, some, total = first["seconds"], [], 0.0
    for test in sorted(touching(mutant, first["lines"]), key=seconds.__getitem__):
        total += seconds[test]
        if some and total > budget:
            break
        some.append(test)
    result: dict[str, Any] = {
        "at": f"{mutant.module}.py:{mutant.line}",
        "in": mutant.text,
        "old": mutant.old,
        "new": mutant.new,
    }
    if not some:
        return result | {"outcome": "survived", "tests": 0}
    path = folder / "pyrovae" / f"{mutant.module}.py"
    kept = path.read_text()
    path.write_text(mutant.source)
    try:
        failed = run(folder, some, Outcome(), failure_of, 30 + 3 * min(total, budget))
    finally:
        path.write_text(kept)
    if failed == "":
        return result | {"outcome": "survived", "tests": len(some)}
    return result | {"outcome": "killed", "by": failed or "timeout or crash"}


def touching(mutant: Mutant, lines: dict[str, list[list[Any]]]) -> list[str]:
    """The tests that run the mutant's lines; all of them for what is computed on import."""
    own = range(mutant.line, mutant.end + 1)
    found = [test for test, seen in lines.items() if any(module == mutant.module and line in own for module, line in seen)]
    return found if mutant.inside else list(lines)


def failure_of(plugin: Outcome, code: int) -> str:
    return plugin.failed or ("" if code == 0 else f"exit {code}")


if __name__ == "__main__":
    main()
