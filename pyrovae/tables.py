"""Tables as plain text, HTML and LaTeX."""

from __future__ import annotations

import html
import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Table", "Tabular", "text_table"]


@dataclass(frozen=True)
class Table:
    r"""The cells of a table, to be printed as text, shown in a notebook or set by LaTeX.

    Attributes:
        header: the names of the columns.
        rows: the cells as text, one sequence for each row.
        left: the columns that are flush left; the others are flush right.
        caption: one line above the table.
        notes: lines below it.

    Example:
        >>> from pyrovae.tables import Table
        >>> print(Table(["model", "nats"], [["one", "-86.3"]]).latex())
        \begin{tabular}{lr}
        \toprule
        model & nats \\
        \midrule
        one & $-$86.3 \\
        \bottomrule
        \end{tabular}
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[int] = (0,)
    caption: str = ""
    notes: Sequence[str] = ()

    def text(self) -> str:
        """The table as plain text, with the notes below it."""
        return "\n".join([text_table(self.header, self.rows, left=self.left), *self.notes])

    def html(self) -> str:
        """The table as HTML; each cell is escaped, and each heading says of what it is the heading."""
        sides = ["left" if column in self.left else "right" for column in range(len(self.header))]

        def cell(tag: str, side: str, text: str) -> str:
            return f'<{tag} style="text-align: {side}">{html.escape(text)}</{tag.split()[0]}>'

        head = "".join(cell('th scope="col"', side, text) for side, text in zip(sides, self.header, strict=True))
        body = "".join(
            "<tr>"
            + cell('th scope="row"', sides[0], row[0])
            + "".join(cell("td", side, text) for side, text in zip(sides[1:], row[1:], strict=True))
            + "</tr>"
            for row in self.rows
        )
        caption = f'<caption style="text-align: left">{html.escape(self.caption)}</caption>' if self.caption else ""
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"

    def latex(self) -> str:
        r"""The table for LaTeX with ``\usepackage{booktabs}``, without caption and notes."""
        columns = "".join("l" if column in self.left else "r" for column in range(len(self.header)))
        lines = [[_latex(text) for text in row] for row in [self.header, *self.rows]]
        head, *body = [" & ".join(cells) + r" \\" for cells in lines]
        return "\n".join(
            [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
        )


class Tabular(ABC):
    """A result that is shown as a table: in Jupyter, and as LaTeX."""

    @abstractmethod
    def table(self) -> Table:
        """The result as a table of text."""

    def to_latex(self) -> str:
        r"""The table for LaTeX, with ``\usepackage{booktabs}``."""
        return self.table().latex()

    def _repr_html_(self) -> str:
        """What Jupyter shows."""
        return self.table().html()


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "|": r"$\mid$", "<": r"$<$", ">": r"$>$", "−": "$-$",
}  # fmt: skip


def _latex(text: str) -> str:
    escaped = "".join(_LATEX.get(letter, letter) for letter in text.strip())
    return f"$-${escaped[1:]}" if escaped[:1] == "-" and escaped[1:2].isdigit() else escaped


def text_table(
    header: Sequence[str] | None, rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,), width: int | None = None
) -> str:
    """Lay out cells in columns, two blanks apart.

    Args:
        header: the columns' names, or ``None`` for none.
        rows: the cells, as text; the last column may hold sentences, which are wrapped if there is a ``width``.
        left: columns that are flush left; the others are flush right.
        width: columns of the terminal; by default as many as the table needs.

    Example:
        >>> from pyrovae.tables import text_table
        >>> print(text_table(["model", "nats"], [["one", "-86.3"], ["other", "-90"]]))
        model   nats
        one    -86.3
        other    -90
    """
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable(box=None, show_header=header is not None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for number in range(len(rows[0]) if header is None else len(header)):
        name = "" if header is None else header[number]
        table.add_column(Text(name), justify="left" if number in left else "right", no_wrap=width is None)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width or 10_000, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
