"""Who may import whom (the house of ARCHITECTURE.md), read off the source."""

from __future__ import annotations

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyrovae

ROOT = Path(pyrovae.__file__).parent
# Folders and files directly below the package, from the ground up: each may import the floors below, and its own files.
FLOORS: list[set[str]] = [
    {"_lazy", "_validation", "files", "tables"},
    {"registry", "plots", "data"},
    {"nn", "distributions", "programs"},
    {"priors", "encoders", "likelihoods", "compile", "estimators"},
    {"evidence"},
    {"training"},
    {"diagnostics"},
    {"models"},
    {"cli"},
    {"__main__"},
]
# Beyond what the floors say: these take programs and never import our components or models.
TAKE_CALLABLES = {"programs", "compile", "estimators", "evidence", "training", "diagnostics"}
COMPONENTS = {"nn", "distributions", "priors", "encoders", "likelihoods", "models"}
ONLY_IN = {
    "torchvision": ("data.vision",),
    "h5py": ("data.hdf5",),
    "PIL": ("data.images", "data.vision"),
    "arviz": ("evidence.psis",),
    "pyro.poutine": ("programs",),
    "torch.fx": ("compile",),
    "torch._inductor": ("compile",),
    "torch._dynamo": ("compile",),
    "ctypes": ("compile",),
}
FILES = sorted(path for path in ROOT.rglob("*.py"))


def _name(path: Path) -> str:
    """A file's dotted name below the package."""
    return ".".join(part for part in path.relative_to(ROOT).with_suffix("").parts if part != "__init__")


MODULES = {_name(path): path for path in FILES}


def _imports(module: str) -> Iterator[str]:
    """Absolute names of all that a module imports: at once, later, or for types alone."""
    path = MODULES[module]
    package = ("pyrovae", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            parent = ".".join(part for part in (base, node.module) if part)
            # `from . import x` names modules; `from .x import y` names one.
            yield from (f"{parent}.{alias.name}" for alias in node.names)


def _imported_names(path: Path) -> Iterator[str]:
    """Absolute names that a script imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def _modules(module: str) -> set[str]:
    """The package's modules that a module imports."""
    found = set()
    for name in _imports(module):
        inner = name.removeprefix("pyrovae.").split(".") if name.startswith("pyrovae.") else []
        for length in range(len(inner), 0, -1):
            if ".".join(inner[:length]) in MODULES:
                found.add(".".join(inner[:length]))
                break
    return found - {module, ""}


def _room(module: str) -> str:
    return module.split(".")[0]


FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_down(module: str) -> None:
    assert _room(module) in FLOOR, f"{module} has no floor: give it its place in FLOORS and in ARCHITECTURE.md"
    for other in _modules(module):
        own = _room(module) == _room(other)
        assert own or FLOOR[_room(other)] < FLOOR[_room(module)], f"{module} imports {other}, which is no floor below"
        assert not (_room(module) in TAKE_CALLABLES and _room(other) in COMPONENTS), (
            f"{module} takes programs, and imports {other}"
        )


def test_no_cycle_of_imports() -> None:
    waiting = {module: _modules(module) for module in MODULES if module}
    while waiting:
        free = {module for module, others in waiting.items() if not others & waiting.keys()}
        assert free, f"a cycle among {sorted(waiting)}"
        waiting = {module: others for module, others in waiting.items() if module not in free}


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_special_libraries_have_one_door(module: str) -> None:
    for name in _imports(module):
        for library, doors in ONLY_IN.items():
            # arviz_stats and arviz_base are arviz.
            inside = name == library or name.startswith((f"{library}.", f"{library}_"))
            assert not inside or module.startswith(doors), f"{module} imports {name}, which belongs in {doors}"


def _is_registered(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether the registry or the command line has it, which find it by its name: a new component edits no list."""
    decorators = [each.func if isinstance(each, ast.Call) else each for each in node.decorator_list]
    return any(ast.unparse(each) in ("register", "app.command") for each in decorators)


def _names(path: Path) -> tuple[list[str] | None, set[str], set[str]]:
    """``__all__`` of a module, the names that it binds, and its own public classes and functions."""
    listed, bound, public = None, set(), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
            if not node.name.startswith("_") and not _is_registered(node):
                public.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = {each.id for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)}
            bound |= found
            if "__all__" in found:
                listed = ast.literal_eval(node.value)
    return listed, bound, public


# The index of the package itself is `__init__.pyi`.
@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_every_module_lists_its_public_names(module: str) -> None:
    listed, bound, public = _names(MODULES[module])
    assert listed is not None, f"{module} has no __all__"
    assert len(set(listed)) == len(listed), f"{module} lists a name twice"
    assert not set(listed) - bound, f"{module} lists names that it does not have"
    assert not public - set(listed), f"{module} has public names that are not in __all__: add them, or begin them with _"


CATALOGUES = {"nn", "distributions", "priors", "encoders", "likelihoods"}
MOST_LINES, MEDIAN_LINES, MOST_CODE_IN_A_FUNCTION = 400, 250, 60


def _lines(module: str) -> int:
    return len(MODULES[module].read_text(encoding="utf-8").splitlines())


def _code_lines(source: str) -> set[int]:
    """The numbers of the lines with code: without blank lines, comments and docstrings."""
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in no_code:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


@pytest.mark.parametrize("module", [module for module in MODULES if module not in CATALOGUES])
def test_files_are_short(module: str) -> None:
    assert _lines(module) <= MOST_LINES, f"{module} has {_lines(module)} lines: move one of its subjects to a file of its own"


def test_most_files_are_shorter() -> None:
    assert statistics.median(_lines(module) for module in MODULES) < MEDIAN_LINES


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module: str) -> None:
    source = MODULES[module].read_text(encoding="utf-8")
    code = _code_lines(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = len(code & set(range(node.lineno, (node.end_lineno or node.lineno) + 1)))
            assert length <= MOST_CODE_IN_A_FUNCTION, f"{module}.{node.name} has {length} lines of code: split it"


def test_the_reader_counts_code_alone() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    # three\n\n    return (\n        1\n    )\n'
    assert _code_lines(source) == {1, 8, 9, 10}


def test_the_reader_sees_imports_of_every_form() -> None:
    # Guards the guards: were nothing found, everything above would pass.
    assert _modules("models.base") >= {"registry", "training.loop", "evidence.importance"}
    assert "torch" in {name.split(".")[0] for name in _imports("nn")}


REFERENCES = re.compile(r"^( *)References:\n((?:\1 +\S.*\n)+)", re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_references_carry_links(module: str) -> None:
    # A paper is recognised by its year.
    for section in REFERENCES.finditer(MODULES[module].read_text(encoding="utf-8")):
        papers, links = re.findall(r",\s+(?:19|20)\d\d\b", section[2]), section[2].count("http")
        assert links >= max(1, len(papers)), f"{module}: give each paper a link (arXiv or DOI) in\n{section[2]}"


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = ["torch", "pyro", "arviz", "torchvision", "numpy", "matplotlib", "zuko"]
    code = f"import sys, pyrovae; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_index_keeps_what_it_promises() -> None:
    for name in pyrovae.__all__:
        assert getattr(pyrovae, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = pyrovae.nonsense


def test_tests_and_experiments_do_not_import_each_other() -> None:
    repository = ROOT.parent
    sides = {name: sorted((repository / name).rglob("*.py")) for name in ("tests", "experiments")}
    assert all(sides.values())
    for one, other in (("tests", "experiments"), ("experiments", "tests")):
        foreign = {path.stem for path in sides[other]} - {path.stem for path in sides[one]} | {other}
        for path in sides[one]:
            imported = {name.split(".")[0] for name in _imported_names(path)}
            assert not imported & foreign, f"{path} imports {imported & foreign}, which belongs to {other}/"


def test_modules_that_moved_can_still_be_imported() -> None:
    code = (
        "import warnings; warnings.simplefilter('error', DeprecationWarning)\n"
        "try:\n    import pyrovae.marginal\nexcept DeprecationWarning as warning:\n    print(warning)\n"
        "warnings.simplefilter('ignore')\n"
        "from pyrovae.vae import VAE; from pyrovae.traces import UnconstrainedPair; import pyrovae as pv; print(VAE is pv.VAE)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, same = done.stdout.strip().splitlines()
    assert "pyrovae.marginal moved to pyrovae.evidence.importance" in said
    assert same == "True"


# The first column of the table of rooms in ARCHITECTURE.md; a star marks a room that takes callables.
ROOM = re.compile(r"`(\w+)/?`(\*?)")


def test_the_page_has_the_same_floors() -> None:
    text = (ROOT.parent / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("| room |") : text.index("Some libraries")]
    rows = [ROOM.findall(line.split("|")[1]) for line in table.splitlines() if line.startswith("| `")]
    assert [{room for room, _ in row} for row in rows] == FLOORS
    assert {room for row in rows for room, star in row if star} == TAKE_CALLABLES
    (catalogues,) = re.findall(r"The catalogues \((.*?)\)", text)
    assert {room for room, _ in ROOM.findall(catalogues)} == CATALOGUES
    assert f"at most {MOST_LINES} lines" in text
    assert f"at most {MOST_CODE_IN_A_FUNCTION} lines of code" in text
