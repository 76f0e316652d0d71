"""Why a change that no test notices cannot matter: the verdicts of ``mutants.py``.

Each entry names a file below the package, the line as it is, the expression in it and what stood in its place.
"""

from __future__ import annotations

from typing import Any

VERDICTS: dict[tuple[str, str, str, str], str] = {}


def reason(record: dict[str, Any]) -> str | None:
    """The verdict on a mutant of the result file, where there is one."""
    return VERDICTS.get((record["at"].split(":")[0], record["in"], record["old"], record["new"]))
