"""Why a change that no test notices cannot matter: the verdicts of ``mutants.py``.

Each entry names a file below the package, the line as it is, the expression in it and what stood in its place.
"""

from __future__ import annotations

from typing import Any

VERDICTS: dict[tuple[str, str, str, str], str] = {
    (
        "evidence/latent_quadrature.py",
        "before = integrate(log_f, middle, torch.diag_embed(((high - low) / 1.35).clamp(min=1e-6)), target / 2)",
        "(high - low) / 1.35",
        "high - low",
    ): "where the first cells are finest, in an adaptive rule that two later grids must confirm to the same tolerance",
    (
        "evidence/quadrature.py",
        "from_left = values[..., 1:4] + slope[..., :3].clamp(min=0) * gap[1:]",
        "slope[..., :3].clamp(min=0)",
        "slope[..., :3]",
    ): "equivalent: only a reach above the cell's peak counts, and where the slope is negative neither form is above it",
}


def reason(record: dict[str, Any]) -> str | None:
    """The verdict on a mutant of the result file, where there is one."""
    return VERDICTS.get((record["at"].split(":")[0], record["in"], record["old"], record["new"]))
