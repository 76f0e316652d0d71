"""Settings of the documentation site, which ``python -m sphinx -W -d build/doctrees docs build/docs`` builds."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Pages of the site that are files elsewhere in the repository.
OUTSIDE = {
    "architecture": "ARCHITECTURE.md",
    "changelog": "CHANGELOG.md",
    "compiler": "pyrovae/compile/README.md",
    "contributing": "CONTRIBUTING.md",
}

project = "pyrovae"
author = "The pyrovae developers"
project_copyright = "the pyrovae developers, Apache-2.0"
version = release = re.search(r'__version__ = "(.*)"', (ROOT / "pyrovae" / "__init__.py").read_text(encoding="utf-8"))[1]

sys.path.insert(0, str(Path(__file__).parent))  # for mathml.py, beside this file
extensions = ["mathml", "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
templates_path: list[str] = []
exclude_patterns = ["build"]
# Packages whose names are text in our pages, since their indices would come over the network.
EXTERNAL = {"arviz", "matplotlib", "numpy", "pandas", "pyro", "torch", "xarray", "zuko"}
nitpicky = True  # a reference in a docstring that leads nowhere is an error

html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"pyrovae {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False

myst_enable_extensions = ["amsmath", "attrs_block", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3  # headings have the anchors that GitHub gives them
myst_dmath_double_inline = True

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# The notebooks' kernels inherit these.
os.environ.setdefault("MPLCONFIGDIR", tempfile.gettempdir())
os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # bars are off


def _public_names(app: Any, name: str, source: list[str]) -> None:
    """Document each name of the package's index that comes from a room where a page says ``.. public:: room``."""
    index = (ROOT / "pyrovae" / "__init__.pyi").read_text(encoding="utf-8")

    def directives(match: re.Match[str]) -> str:
        found = re.findall(rf"^from \.{match[1]}(?:\.\w+)* import (\w+) as", index, re.M)
        kinds = {each: "class" if each[0].isupper() else "function" for each in found}
        # Inherited methods, such as ``vae.fit``, but not those of torch's modules.
        inherited = {"class": "\n   :inherited-members: Module, tuple", "function": ""}
        return "\n\n".join(f".. auto{kind}:: pyrovae.{each}{inherited[kind]}" for each, kind in kinds.items())

    source[0] = re.sub(r"^\.\. public:: (\w+)$", directives, source[0], flags=re.M)


def _moved_links(app: Any, name: str, source: list[str]) -> None:
    """Put files of the repository in the place of their pages, and lead links to these files to the pages."""
    file = ROOT / OUTSIDE[name] if name in OUTSIDE else Path(app.env.doc2path(name))
    page = Path(app.srcdir, name)
    if name in OUTSIDE:
        app.env.note_dependency(str(file))
        source[0] = file.read_text(encoding="utf-8")
    pages = {(ROOT / path).resolve(): f"{docname}.md" for docname, path in OUTSIDE.items()}

    def moved(match: re.Match[str]) -> str:
        target = (file.parent / match[1]).resolve()
        new = Path(app.srcdir, pages[target]) if target in pages else target
        return f"]({os.path.relpath(new, page.parent)}{match[2] or ''})" if target.exists() else match[0]

    source[0] = re.sub(r"\]\(([\w./-]+)(#[^)\s]*)?\)", moved, source[0])


def _whole_sentences(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep napoleon from taking what stands before a colon in the docstring of a property for its type."""
    if what in ("attribute", "property") and lines:
        lines[:0] = ["..", ""]


def _no_lists(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Keep reStructuredText from taking an argument that is "K." for the first point of a list."""
    lines[:] = [re.sub(r"^(:\w+ \w+: [A-Z])\.$", r"\1\\.", line) for line in lines]


def _unlinked(app: Any, env: Any, node: Any, contents: Any) -> Any:
    """Leave types in signatures as text if no page has them, those of other packages too: only roles must lead somewhere."""
    external = node.get("reftarget", "").split(".")[0] in EXTERNAL
    return contents if "refwarn" not in node or external else None


def setup(app: Any) -> None:
    """Connect the functions above."""
    app.connect("source-read", _public_names)
    app.connect("source-read", _moved_links)
    app.connect("autodoc-process-docstring", _whole_sentences, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _no_lists, priority=600)  # after napoleon
    app.connect("missing-reference", _unlinked)
