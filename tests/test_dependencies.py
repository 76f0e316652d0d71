"""What is imported is declared, and what is declared is imported; what is heavy is imported where it is used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pyrovae

ROOT = Path(pyrovae.__file__).parent
# Distributions whose import has another name, and what comes with one of them.
DISTRIBUTIONS = {"pyro": "pyro-ppl", "sklearn": "scikit-learn", "tomli_w": "tomli-w"}
OPTIONAL = {"arviz_stats", "arviz_base", "onnxruntime", "tensorboard", "wandb", "mlflow", "schedulefree", "cuda", "triton"}
READERS = {"h5py": "h5py", "pandas": "pandas", "PIL": "pillow", "pyarrow": "pyarrow", "scipy": "scipy", "polars": "polars"}


def _imported() -> set[str]:
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(str(node.module).split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
                first = node.args[0]
                if isinstance(first, ast.Constant) and not str(first.value).startswith("."):
                    found.add(str(first.value).split(".")[0])
    return found - set(sys.stdlib_module_names) - {"pyrovae"}


def test_imports_and_declared_dependencies_agree() -> None:
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[ <>=]", requirement)[0] for requirement in project["dependencies"]}
    imported = {DISTRIBUTIONS.get(name, name) for name in _imported() - OPTIONAL - set(READERS)}
    assert imported == declared
    extras = project["optional-dependencies"]
    assert {READERS[name] for name in _imported() & set(READERS)} == {*extras["data"], "polars"}
    assert {"pyrovae[data]", "polars"} <= set(extras["test"]), "so that the tests read every format"


@pytest.mark.parametrize("use", ["", "pv.make_vae(4, latent_dim=2).fit(torch.ones(9, 4), epochs=1, progress=False)"])
def test_heavy_dependencies_wait_for_their_use(use: str) -> None:
    heavy = [
        "matplotlib",
        "jinja2",
        "sklearn",
        "cyclopts",
        "pandas",
        "tensorboard",
        "arviz",
        "xarray",
        "rich",
        "torchvision",
        "h5py",
        "PIL",
    ]
    code = (
        f"import sys, torch, pyrovae as pv; pv.fit, pv.log_marginal, pv.compare, pv.decompose, pv.ais, pv.make_vae; {use}\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
