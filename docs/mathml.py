"""Formulas of the site as MathML, which browsers lay out without a script and without a request to another server.

Sphinx and the converter are imported where they are used, since pytest looks for doctests here without them.
"""

from __future__ import annotations

import re
from typing import Any, Literal

__all__ = ["setup"]


# Names of functions need a space before an argument without parentheses, which the converter leaves out.
FUNCTION = re.compile(r"(<mi[^>]*>(?:log|max|min|exp|var|sd|se|ess)</mi>)(?!<mo[^>]*>(?:\(|&#x00028;))")


def _mathml(latex: str, display: Literal["inline", "block"]) -> str:
    from latex2mathml.converter import convert

    relation = convert(latex, display=display).replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")  # \sim
    return FUNCTION.sub(r'\1<mspace width="0.17em"/>', relation)


def _inline(translator: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    translator.body.append(_mathml(node.astext(), "inline"))
    raise SkipNode


def _block(translator: Any, node: Any) -> None:
    from docutils.nodes import SkipNode

    latex = node.astext().strip()
    if r"\\" in latex or "&" in latex:
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    translator.body.append(translator.starttag(node, "div", CLASS="math notranslate nohighlight"))
    translator.body.append(_mathml(latex, "block") + "</div>\n")
    raise SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Register the renderer, which ``html_math_renderer = "mathml"`` chooses."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
