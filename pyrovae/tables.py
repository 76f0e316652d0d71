"""Tables as plain text."""

from __future__ import annotations

import io
from collections.abc import Sequence

__all__ = ["text_table"]


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
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=header is not None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for number in range(len(rows[0]) if header is None else len(header)):
        name = "" if header is None else header[number]
        table.add_column(Text(name), justify="left" if number in left else "right", no_wrap=width is None)
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=width or 10_000, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
