"""Write the lists of docs/components.md from the registry; with ``--check``, exit with 1 if they would change."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from pyrovae.registry import KINDS, find, names

PAGE = Path(__file__).with_name("components.md")
TITLES = {
    "prior": "Priors",
    "likelihood": "Likelihoods",
    "encoder": "Encoders",
    "body": "Bodies (networks)",
    "guide": "Guides of a hierarchy",
    "estimator": "Estimators",
    "model": "Kinds of models",
}


def summary(kind: str, name: str) -> str:
    """The first paragraph of a component's docstring, as Markdown."""
    cls = find(kind, name)
    if cls.__module__.startswith("pyro."):
        return f"Pyro's own `pyro.infer.{cls.__name__}`, unchanged."
    first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    code = re.sub(r":\w+:`~?\.?(?:[\w.]*\.)?([^`]*)`", r"`\1`", first).replace("``", "`")
    return code.replace("|", "\\|")


def table(kind: str) -> str:
    """The names of one kind with a line each."""
    rows = "\n".join(f"| `{name}` | {summary(kind, name)} |" for name in names(kind))
    return f"### {TITLES.get(kind, kind)}\n\n| name | what it is |\n|---|---|\n{rows}\n"


def page(text: str) -> str:
    """The page with its lists written anew; the text around them stays."""
    begin, end = "<!-- lists: written by docs/components.py -->\n", "<!-- end of the lists -->\n"
    before, rest = text.split(begin)
    lists = "\n".join(table(kind) for kind in KINDS)
    return f"{before}{begin}\n{lists}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if "--check" in sys.argv:
        sys.exit("docs/components.md is not up to date: run python docs/components.py" if new != old else 0)
    PAGE.write_text(new, encoding="utf-8")
