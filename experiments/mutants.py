"""Which single changes to the formulas no test notices.

Each mutant changes one expression or statement in ``programs``, ``estimators``, ``evidence`` or ``diagnostics``: an operator
swapped, a factor or a term dropped, a comparison turned, a constant moved, a flag flipped, a root, a detach or a whole call
left out. A first run of the default tests of these folders records with coverage.py (in the extra ``dev``) which of them
pass through which line. A mutant then meets those alone, the fast ones first, until one fails. Run from the repository's root:

    python experiments/mutants.py --number 300 --seed 0    # a random sample of those not tried before
    python experiments/mutants.py --again                  # the survivors once more, after a test was written
    python experiments/mutants.py --number 0               # the result file alone, with the verdicts of mutant_verdicts.py

``results/mutants.json`` lists every mutant with what became of it; another run adds its own. Survivors that cannot matter have
a reason in ``mutant_verdicts.py``; each of the others asks for a test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import fcntl
import gc
import hashlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments/results/mutants.json"
KEPT = ROOT / "build/mutants"  # which test runs which lines, kept for the next run
ROOMS = "programs estimators evidence diagnostics".split()
TESTS = """annealing checks diagnostics door estimators evidence integration marginal preflight probes proposals psis
random_pairs reachable streaming weights""".split()
SWAPPED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
DROPPED_CALLS = {"sqrt", "detach", "clamp", "log", "exp", "abs", "square"}
QUIET = ("__str__", "__repr__", "plot", "explained")  # what these say and draw is no formula
SILENT = (ast.Raise, ast.JoinedStr, ast.Assert, ast.arguments)
STAMPS = itertools.count(1)
MEMORY = 10 * 2**30  # bytes of address space for the tests of one mutant


class Mutant(NamedTuple):
    """One change: where, from what, to what."""

    file: str  # below the package
    function: str  # "" where the change runs on import
    line: int
    lines: range  # of the statement
    text: str  # the first line, by which the change is known again when lines have moved
    old: str
    new: str
    nth: int  # of the equal changes in equal lines of one function
    place: tuple[int, int]  # in the file's bytes
    replacement: str

    @property
    def key(self) -> tuple[Any, ...]:
        return self.file, self.function, self.text, self.old, self.new, self.nth

    @property
    def record(self) -> dict[str, Any]:
        names = ("function", "in", "old", "new", "nth")
        return {"at": f"{self.file}:{self.line}"} | dict(zip(names, self.key[1:], strict=True))


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """The key of the mutant that a record of the result file is about."""
    return record["at"].split(":")[0], *(record[name] for name in ("function", "in", "old", "new", "nth"))


def variants(node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
    """Parts of a node, each with what is to stand in its place."""
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
        yield node, ast.BinOp(node.left, SWAPPED[type(node.op)](), node.right)
        yield node, node.left
        if isinstance(node.op, ast.Mult | ast.Add):
            yield node, node.right
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPPED:
        yield node, ast.AugAssign(node.target, SWAPPED[type(node.op)](), node.value)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPPED:
        yield node, ast.Compare(node.left, [SWAPPED[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(SWAPPED[type(node.op)](), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) < 100:
        yield node, ast.Constant(node.value + 1 if isinstance(node.value, int) else 2 * node.value + 0.5 * (node.value == 0))
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in DROPPED_CALLS:
        of_module = ast.unparse(node.func.value) in ("math", "np", "torch")
        if node.args or not of_module:
            yield node, node.args[0] if of_module else node.func.value
    elif isinstance(node, ast.IfExp):
        yield node, node.body
        yield node, node.orelse
    elif isinstance(node, ast.If | ast.While) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield node, ast.Expr(ast.Constant(None))


def parts(node: ast.AST) -> list[Any]:
    """What a node computes with: no messages, annotations, defaults or decorators."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.body
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value else []
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
        return []
    return list(ast.iter_child_nodes(node))


def walk(node: ast.AST, function: str = "", lines: range = range(0)) -> Iterator[tuple[ast.AST, str, range]]:
    """All nodes that compute something, each with its function and the lines of its statement."""
    for child in parts(node):
        if isinstance(child, SILENT) or getattr(child, "name", "") in QUIET:
            continue
        own, inside = lines, function
        if isinstance(child, ast.stmt):
            body = getattr(child, "body", None)
            own = range(child.lineno, max(body[0].lineno, child.lineno + 1) if body else (child.end_lineno or child.lineno) + 1)
        if isinstance(child, ast.FunctionDef) or (isinstance(child, ast.ClassDef) and function):
            inside = f"{function}.{child.name}".lstrip(".")
        yield child, function, own
        yield from walk(child, inside, own)


def mutants(path: Path) -> list[Mutant]:
    """All single changes to a file."""
    source = path.read_text(encoding="utf-8")
    text, starts, shown = source.encode(), [0], source.splitlines()
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))  # ast counts columns in bytes
    found, equals = [], Counter()  # type: ignore[var-annotated]
    for node, function, lines in walk(ast.parse(source)):
        for part, new in variants(node):
            place = starts[part.lineno - 1] + part.col_offset, starts[part.end_lineno - 1] + part.end_col_offset  # type: ignore[attr-defined]
            old, to, in_line = " ".join(text[slice(*place)].decode().split()), ast.unparse(new), shown[part.lineno - 1].strip()  # type: ignore[attr-defined]
            key = (function, in_line, old, to)
            rest = "\n" * (part.end_lineno - part.lineno)  # type: ignore[attr-defined]  # later lines keep their numbers
            replacement = f"({to}{rest})" if isinstance(new, ast.expr) else to + rest
            name = str(path.relative_to(ROOT / "pyrovae"))
            found.append(Mutant(name, function, part.lineno, lines, in_line, old, to, equals[key], place, replacement))  # type: ignore[attr-defined]
            equals[key] += 1
    return found


class Touched:
    """A plugin for pytest that records which lines of the package each test runs, and its seconds of processor time."""

    def __init__(self, package: Path):
        import coverage

        self.package, self.seconds = package, {}  # type: ignore[var-annotated]
        rooms = [str(package / room / "*") for room in ROOMS]
        self.coverage = coverage.Coverage(data_file=None, include=rooms, config_file=False, messages=False)
        self.coverage.start()

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        self.coverage.switch_context(item.nodeid)
        began = time.process_time()
        yield
        self.seconds[item.nodeid] = time.process_time() - began

    def report(self, code: int) -> dict[str, Any]:
        self.coverage.stop()
        data, lines = self.coverage.get_data(), {}
        for path in data.measured_files():
            contexts = data.contexts_by_lineno(path)
            lines[str(Path(path).relative_to(self.package))] = {line: sorted(filter(None, of)) for line, of in contexts.items()}
        return {"code": code, "seconds": self.seconds, "lines": lines}


class Outcome:
    """A plugin that records the first test that fails."""

    def __init__(self) -> None:
        self.failed = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    pytest_collectreport = pytest_runtest_logreport

    def report(self, code: int) -> str:
        return self.failed or ("" if code == 0 else f"exit {code}")


def fork(folder: Path, work: Callable[[], Any], seconds: float) -> tuple[Any, int]:
    """Do something in a fork. Return its result, and the signal that ended it: SIGXCPU past its processor time."""
    sent = folder / "report.json"
    sent.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(20 * int(seconds))  # for what waits and computes nothing; ends this fork alone
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        os.chdir(folder)
        result: Any = {"error": 1}
        try:
            result = work()
        finally:
            sent.write_text(json.dumps(result))
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what the tests left running
    return json.loads(sent.read_text()) if sent.exists() else None, os.WTERMSIG(status)


OPTIONS = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", "-m", "not slow"]


def run(folder: Path, tests: list[str], make_plugin: Callable[[], Any], seconds: float) -> tuple[Any, int]:
    """Run tests in a fork, which imports the package anew, and return its plugin's report."""

    def work() -> Any:
        plugin = make_plugin()
        return plugin.report(int(pytest.main([*OPTIONS, *tests], plugins=[plugin])))

    return fork(folder, work, seconds)


class Collected:
    """A plugin that collects the tests once and runs some of them in forks, where functions have a mutant's code.

    Importing the package and collecting the tests takes longer than most mutants live.
    """

    def __init__(self, folder: Path, work: Callable[[Collected], None]):
        self.folder, self.work = folder, work
        self.items: dict[str, Any] = {}
        self.functions: dict[str, list[FunctionType]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        for function in gc.get_objects():
            if type(function) is FunctionType:
                self.functions.setdefault(function.__code__.co_filename, []).append(function)
        gc.freeze()
        self.work(self)
        return True

    def put(self, path: Path) -> bool:
        """Give the file's functions the code that the file has now; whether that changed one, or will when it is imported."""
        codes = codes_of(compile(path.read_text(encoding="utf-8"), str(path), "exec", dont_inherit=True))
        changed = False
        for function in self.functions.get(str(path), []):
            code = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if code is not None and code != function.__code__:
                if code.co_freevars != function.__code__.co_freevars:
                    return False
                function.__code__, changed = code, True
        return changed or str(path) not in self.functions

    def run(self, path: Path, tests: list[str], seconds: float) -> tuple[Any, int]:
        """Run tests with the file's present code. The report is ``None`` where only a new import would show the change."""

        def work() -> Any:
            if not self.put(path):
                return None
            outcome, items = Outcome(), [self.items[test] for test in tests]
            items[0].config.pluginmanager.register(outcome)
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
                if outcome.failed:
                    break
            return outcome.failed

        return fork(self.folder, work, seconds)


def codes_of(code: CodeType) -> dict[tuple[str, int], CodeType]:
    """The code of all functions within, by name and line; none where two on one line have one name."""
    found: dict[tuple[str, int], CodeType] = {}
    twice = set()
    waiting = [code]
    while waiting:
        one = waiting.pop()
        key = one.co_qualname, one.co_firstlineno
        twice |= {key} if key in found else set()
        found[key] = one
        waiting += [each for each in one.co_consts if isinstance(each, CodeType)]
    return {key: each for key, each in found.items() if key not in twice}


def prepare(folder: Path) -> None:
    """A copy of the repository that may be broken, and the imports that every fork shares."""
    for name in ("pyrovae", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    sys.path[:] = [str(folder)] + [path for path in sys.path if path and Path(path).resolve() != ROOT]
    os.environ["PYTHONPATH"] = str(folder)  # of what the tests start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz  # noqa: F401
        import scipy.integrate
        import scipy.stats  # noqa: F401
        import torch

    torch.set_num_threads(1)


def first_run(folder: Path, names: list[str]) -> tuple[dict[str, float], dict[str, dict[str, list[str]]]]:
    """The seconds of each test, and the tests of each line; kept for test files that stay as they are."""
    KEPT.mkdir(parents=True, exist_ok=True)
    rooms = [path for room in ROOMS for path in sorted((folder / "pyrovae" / room).rglob("*.py"))]
    helpers = [path for path in sorted((folder / "tests").glob("*.py")) if not path.name.startswith("test_")]
    seconds: dict[str, float] = {}
    lines: dict[str, dict[str, list[str]]] = {}
    for name in names:
        file, _, one = name.partition("::")
        test, kept = folder / f"tests/test_{file}.py", KEPT / f"{name.replace('::', '-')}.json"
        state = hashlib.sha256(b"".join(path.read_bytes() for path in [*rooms, *helpers, test])).hexdigest()
        found = json.loads(kept.read_text()) if kept.exists() else {}
        if found.get("state") != state:
            chosen = str(test.relative_to(folder)) + (f"::{one}" if one else "")
            found, ended = run(folder, [chosen], lambda: Touched(folder / "pyrovae"), 1200)
            if found is None or found["code"] != 0:
                sys.exit(f"{chosen} must pass before anything is changed, got {found and found['code']}, signal {ended}")
            kept.write_text(json.dumps(found | {"state": state}))
            print(f"{chosen}: {len(found['seconds'])} tests, {sum(found['seconds'].values()):.0f} s", flush=True)
        seconds |= found["seconds"]
        for file, of_lines in found["lines"].items():
            for line, tests in of_lines.items():
                lines.setdefault(file, {}).setdefault(line, []).extend(tests)
    if run(folder, ["--collect-only", *seconds], Outcome, 1200)[0] != "":
        sys.exit("Some test cannot be run alone by its name: rename its parameters")
    return seconds, lines


def touching(folder: Path, mutant: Mutant, lines: dict[str, dict[str, list[str]]]) -> set[str]:
    """The tests that run a mutant's statement; for a constant of a module or a class, those of the lines that name it."""
    own = lines.get(mutant.file, {})
    if mutant.function:
        return {test for line in mutant.lines for test in own.get(str(line), [])}
    texts = {file: (folder / "pyrovae" / file).read_text(encoding="utf-8").splitlines() for file in {*lines, mutant.file}}
    target = re.split(r"[:=]", texts[mutant.file][mutant.lines.start - 1])[0]
    names = re.compile("|".join(rf"\b{name}\b" for name in re.findall(r"[A-Za-z_]\w*", target)) or "$^")
    found: set[str] = set()
    for file, of_lines in lines.items():
        named = [number for number, line in enumerate(texts[file], 1) if names.search(line)]
        found |= {test for number in named for test in of_lines.get(str(number), [])}
    return found or {test for tests in own.values() for test in tests}


def judge(
    folder: Path,
    mutant: Mutant,
    seconds: dict[str, float],
    touched: set[str],
    budget: float,
    collected: Collected | None = None,
) -> dict[str, Any] | None:
    """Run the tests that pass through a mutant's lines, the fast ones first, until one fails.

    Returns:
        What became of the mutant; ``None`` where it shows in a new import only and the tests are collected already.
    """
    some, total = [], 0.0
    for test in sorted(touched, key=lambda test: (seconds[test], test)):
        total += seconds[test]
        if some and total > budget:
            break
        some.append(test)
    found = mutant.record | {"tests": len(some), "of": len(touched), "date": time.strftime("%Y-%m-%d")}
    if not some:
        return found | {"outcome": "survived"}
    path = folder / "pyrovae" / mutant.file
    kept, stat = path.read_bytes(), path.stat()
    start, stop = mutant.place
    path.write_bytes(kept[:start] + mutant.replacement.encode() + kept[stop:])
    changed = next(STAMPS)
    os.utime(path, (changed, changed))  # bytecode is known by its source's time and size
    limit = 15 + 3 * min(total, budget)
    try:
        run_some = partial(run, folder, some, Outcome) if collected is None else partial(collected.run, path, some)
        failed, ended = run_some(limit)
    finally:
        path.write_bytes(kept)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    if failed is None and not ended:
        return None
    if failed == "":
        return found | {"outcome": "survived"}
    by = signal.Signals(ended).name if failed is None else failed if isinstance(failed, str) else "crash"
    return found | {"outcome": "killed", "by": by}


def known() -> list[dict[str, Any]]:
    """The records of earlier runs."""
    return json.loads(RESULTS.read_text())["mutants"] if RESULTS.exists() else []


def write(new: list[dict[str, Any]], possible: int) -> dict[str, int]:
    """Put records into the result file, beside those that another run may have put there meanwhile, and count."""
    import mutant_verdicts
    import record

    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        records = {key_of(one): one for one in known()}
        for one in new:
            before = records.get(key_of(one), {})
            closed = one["outcome"] == "killed" and (before.get("outcome") == "survived" or "closed" in before)
            records[key_of(one)] = one | ({"closed": True} if closed else {})
        for one in records.values():
            one.pop("verdict", None)
            reason = mutant_verdicts.reason(one) if one["outcome"] == "survived" else None
            one |= {"verdict": reason} if reason else {}
        survived = [one for one in records.values() if one["outcome"] == "survived"]
        counts = {
            "possible": possible,
            "tried": len(records),
            "killed": len(records) - len(survived),
            "closed": sum("closed" in one for one in records.values()),  # of these, by tests written since they survived
            "harmless": sum("verdict" in one for one in survived),
            "left": sum("verdict" not in one for one in survived),
        }
        record.write("mutants", counts | {"mutants": sorted(records.values(), key=key_of)})
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="*", default=[], help="such as evidence/psis.py; all if none is named")
    parser.add_argument("--tests", nargs="*", default=TESTS, help="such as marginal or marginal::test_of_one_name")
    parser.add_argument("--again", action="store_true", help="try those that survived and have no verdict, not new ones")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of tests for each mutant")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so long")
    options = parser.parse_args()
    began = time.monotonic()
    paths = [path for room in ROOMS for path in sorted((ROOT / "pyrovae" / room).rglob("*.py"))]
    every = [mutant for path in paths for mutant in mutants(path)]
    records = {key_of(one): one for one in known()}
    among = [mutant for mutant in every if not options.files or mutant.file in options.files]
    if options.again:
        left = {key for key, one in records.items() if one["outcome"] == "survived" and "verdict" not in one}
        chosen = [mutant for mutant in among if mutant.key in left]
    else:
        shuffled = random.Random(options.seed).sample(among, len(among))
        chosen = [mutant for mutant in shuffled if mutant.key not in records][: options.number]
    print(f"{len(chosen)} of {len(every)} mutants", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        if chosen:
            prepare(folder)
            seconds, lines = first_run(folder, options.tests)

        def try_all(some: list[Mutant], minutes: float, collected: Collected | None = None) -> None:
            for mutant in some:
                if time.monotonic() - began > 60 * minutes:
                    break
                found = judge(folder, mutant, seconds, touching(folder, mutant, lines), options.budget, collected)
                before = records.get(mutant.key, {"tests": 0})
                if found is not None and (found["outcome"] == "killed" or found["tests"] >= before["tests"]):
                    write([found | {"seed": options.seed}], len(every))
                    print(found, flush=True)

        if chosen and not options.again and os.fork() == 0:
            os.chdir(folder)
            # The last tenth of the time is for changes to what runs on import.
            plugin = Collected(folder, lambda tests: try_all(chosen, 0.9 * options.minutes, tests))
            code = pytest.main([*OPTIONS, "-s", *(f"tests/test_{test}.py" for test in options.tests)], plugins=[plugin])
            os._exit(int(code))
        if chosen and not options.again:
            os.wait()
        records = {key_of(one): one for one in known()}
        try_all([mutant for mutant in chosen if options.again or mutant.key not in records], options.minutes)
    print(write([], len(every)))


if __name__ == "__main__":
    main()
