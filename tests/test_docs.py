"""The documentation is true: its examples run, its lists are those of the registry, its links lead somewhere."""

from __future__ import annotations

import functools
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pyrovae

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pyrovae").rglob("*.md")])
# Where CONTRIBUTING.md says that each example belongs, and how many lines the example may have.
EXAMPLES = {
    "prior": ("priors.py", "Logistic", 15),
    "likelihood": ("likelihoods.py", "Gumbel", 20),
    "encoder": ("encoders.py", "DiagonalLaplace", 15),
    "estimator": ("estimators/elbo.py", "Median", 15),
}


# Where the walks of ARCHITECTURE.md lead, and a call that takes each.
WALKS: dict[str, Callable[..., Any]] = {
    "a log-weight": lambda model, guide, x: pyrovae.fit(model, guide, x, epochs=1, compile=False, progress=False),
    "an `Evidence`": lambda model, guide, x: pyrovae.log_marginal(model, guide, x, num_samples=100, proposal="guide"),
}


def _blocks() -> list[str]:
    """The Python blocks of CONTRIBUTING.md."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)


def _examples() -> dict[str, str]:
    """Those that register a class, by kind."""
    return {block.split('"')[1]: block for block in _blocks() if block.startswith("@register(")}


def _run(folder: Path, *arguments: str) -> str:
    """Run Python on the package in a folder, and return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "120"}
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def contributed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, to which the examples of CONTRIBUTING.md were added, each in its file."""
    folder = tmp_path_factory.mktemp("contributed")
    shutil.copytree(Path(pyrovae.__file__).parent, folder / "pyrovae", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "docs", folder / "docs")
    for kind, block in _examples().items():
        with (folder / "pyrovae" / EXAMPLES[kind][0]).open("a", encoding="utf-8") as file:
            file.write("\n\n" + block)
    own = "from torch import Tensor\n\nfrom ..programs.weights import LogWeights\nfrom ..registry import register\n"
    own += "from .base import Estimator\n\n\n" + _examples()["estimator"].replace("Median", "Quantile")
    (options,) = (block for block in _blocks() if block.startswith("    def __init__"))
    own = own.replace("    def reduce", options + "\n    def reduce")
    (folder / "pyrovae" / "estimators" / "quantile.py").write_text(own, encoding="utf-8")
    (method,) = (block for block in _blocks() if "-> Evidence:" in block)
    (folder / "pyrovae" / "evidence" / "halves.py").write_text(method, encoding="utf-8")
    return folder


def test_an_example_of_each_kind_is_a_few_lines() -> None:
    examples = _examples()
    assert examples.keys() == EXAMPLES.keys()
    for kind, (file, name, limit) in EXAMPLES.items():
        assert f"class {name}(" in examples[kind]
        assert len([line for line in examples[kind].splitlines() if line.strip()]) <= limit, f"{name}, in {file}"


def test_a_contributed_class_is_known_everywhere(contributed: Path) -> None:
    """In Python, to ``pyrovae list``, from TOML and the command line, and in the lists of the documentation."""
    np.save(contributed / "x.npy", np.random.default_rng(0).normal(size=(40, 3)).astype("float32"))
    (contributed / "run.toml").write_text(
        'estimator = "median"\n[data]\npath = "x.npy"\n'
        '[model]\nprior = "logistic"\nlikelihood = "gumbel"\nlatent_dim = 2\nhidden = [4]\n'
        '[train]\nepochs = 1\n[evaluate]\nnum_samples = 50\ndecompose = 0\nproposal = "guide"\n'
    )
    # One process for all, as each takes seconds to start.
    python = (
        "import runpy, torch, pyrovae as pv\n"
        "from pyrovae.cli import main\n"
        "parts = dict(prior='logistic', likelihood='gumbel', encoder='diagonal_laplace')\n"
        "vae = pv.make_vae(3, latent_dim=2, hidden=[4], **parts)\n"
        "vae.fit(torch.randn(8, 3), estimator='median', epochs=1, progress=False)\n"
        "assert pv.estimators.Median.__name__ == 'Median' and pv.priors.Logistic.__name__ == 'Logistic'\n"
        "assert pv.estimators.make_estimator({'kind': 'quantile', 'quantile': 0.2}).quantile == 0.2\n"
        "assert main(['list']) == 0\n"
        "assert main(['train', 'run.toml', '--model.encoder', 'diagonal_laplace', '--name', 'run']) == 0\n"
        "runpy.run_path('docs/components.py', run_name='__main__')\n"
    )
    listed = _run(contributed, "-c", python)
    assert all(
        re.search(rf"^  {name} ", listed, re.M) for name in ("logistic", "gumbel", "diagonal_laplace", "median", "quantile")
    )
    page = (contributed / "docs" / "components.md").read_text(encoding="utf-8")
    assert "| `logistic` | Independent logistic dimensions" in page
    assert "| `median` | The median of the log-weights" in page
    described = (contributed / "runs" / "run" / "run.toml").read_text(encoding="utf-8")
    assert "logistic" in described
    assert "diagonal_laplace" in described


def test_the_contract_tests_take_contributed_classes(contributed: Path) -> None:
    chosen = "logistic or gumbel or diagonal_laplace or median or quantile"
    tests = [str(ROOT / "tests" / name) for name in ("test_contracts.py", "test_contracts_likelihoods.py")]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    report = _run(contributed, "-m", "pytest", *options, "-k", chosen, *tests)
    assert int(re.search(r"(\d+) passed", report).group(1)) >= 30, report
    assert "skipped" not in report


def test_a_contributed_method_agrees_with_the_exact_answer(contributed: Path) -> None:
    python = (
        f"import sys; sys.path.insert(1, {str(ROOT / 'tests')!r})\n"
        "import numpy as np, pyrovae as pv\n"
        "from pairs import LinearGaussian\n"
        "from pyrovae.evidence.halves import halves\n"
        "pair = LinearGaussian(spread=1.3)\n"
        "x = pair.sample(50)\n"
        "evidence = halves(pair.model, pair.guide, x, num_samples=4000, seed=0)\n"
        "assert evidence.reliable.all() and evidence.num_samples == 4000\n"
        "assert (np.abs(evidence.log_px - pair.log_px(x)) < 4 * evidence.se).all()\n"
        "pv.compare({'halves': evidence, 'exact': pv.exact(pair.model, pair.guide, x)})\n"
    )
    _run(contributed, "-c", python)


@pytest.mark.parametrize("page", ["components", "papers"])
def test_pages_that_are_written_by_scripts_are_up_to_date(page: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / f"{page}.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            anchors = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name} links to {target}"


def test_files_that_are_named_exist() -> None:
    """Scripts, tests and modules that the pages name in backticks."""
    for page in PAGES:
        for name in re.findall(r"`((?:pyrovae|tests|experiments|docs|\.ci)/[\w./-]+\.\w+)", page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.name} names {name}"


def _walk(to: str) -> list[str]:
    """The functions, classes and modules that a walk of ARCHITECTURE.md names, in its order."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    walk = re.split(r"^#+ ", text[text.index(f"to {to}\n") :], flags=re.M)[0]
    return re.findall(r"`((?:\w+\.)+\w+)`", walk)


@pytest.mark.parametrize("to", WALKS)
def test_the_walks_of_the_architecture_name_what_there_is(to: str) -> None:
    names = _walk(to)
    assert len(names) > 10
    for name in names:
        assert _exists(name), f"ARCHITECTURE.md names {name}, which is not there"


def _exists(name: str) -> bool:
    """Whether the package has a function, class or module, by its full name or, if it is of a class, by the name of that."""
    first, rest = name.split(".", 1)
    if first[0].isupper():
        return any(hasattr(pkgutil.resolve_name(f"pyrovae.{full}"), rest) for full in _classes() if full.endswith(f".{first}"))
    try:
        pkgutil.resolve_name(f"pyrovae.{name}")
    except (ImportError, AttributeError):
        return False
    return True


@functools.cache
def _classes() -> list[str]:
    """The full names of all classes."""
    found = []
    for path in sorted(Path(pyrovae.__file__).parent.rglob("*.py")):
        module = ".".join(path.relative_to(Path(pyrovae.__file__).parent).with_suffix("").parts)
        found += [f"{module}.{name}" for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.M)]
    return found


def _calls() -> list[str]:
    """The functions of the package that are being called, the first one first, without the models that are called."""
    found, frame = [], sys._getframe()
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if Path(pyrovae.__file__).parent in path.parents:
            module = ".".join(path.relative_to(Path(pyrovae.__file__).parent).with_suffix("").parts)
            found.append(f"{module}.{frame.f_code.co_qualname}")
        frame = frame.f_back
    return [name for name in reversed(found) if not name.startswith("models.")]


@pytest.mark.parametrize("to", WALKS)
def test_the_walks_of_the_architecture_are_those_of_the_code(to: str) -> None:
    """The guide, where it draws, is reached by what the walk names, in that order."""
    vae = pyrovae.make_vae(3, latent_dim=2, hidden=[4])
    calls: list[list[str]] = []

    def guide(x: torch.Tensor) -> torch.Tensor:
        calls.append(_calls())
        return vae.guide(x)

    WALKS[to](vae.model, guide, torch.ones(4, 3))
    end = [each for each in calls if "programs.log_weights.log_weights" in each][-1]
    classes = {full.rpartition(".")[2]: full for full in _classes()}
    names = [name if name[0].islower() else f"{classes[name.split('.')[0]]}.{name.split('.', 1)[1]}" for name in _walk(to)]
    places = [[place for place, call in enumerate(end) if f"{call}.".startswith(f"{name}.")] for name in names]
    reached = [found[0] for found in places if found]
    assert len(reached) >= 8
    assert reached == sorted(reached), f"ARCHITECTURE.md has another order than {end}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_the_citation_has_the_version() -> None:
    assert f"version: {pyrovae.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
