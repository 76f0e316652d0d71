"""How far a training run is: a bar on a terminal and in a notebook, a line for an epoch elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, Self

from tqdm import tqdm

__all__ = ["Progress"]

# Lines in a log file: no more than one in so many seconds, and so many in all, besides the first epoch's and the last one's.
SECONDS_BETWEEN_LINES = 1.0
MOST_LINES = 15
# Without the steps and their rate, a terminal of 80 columns has room for the epoch, both bounds and a bar.
BAR = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


class Progress:
    """Shows steps and bounds on standard error.

    Args:
        total_steps: how many steps there will be, or ``None`` if that is not known.
        epochs: how many epochs there will be at most.
        enabled: whether to show anything.
        done: how many steps a run that is resumed has taken before.
    """

    def __init__(self, total_steps: int | None, epochs: int, *, enabled: bool, done: int = 0):
        interactive = sys.stderr.isatty() or "ipykernel" in sys.modules
        shown = enabled and interactive
        self._bar = tqdm(
            total=total_steps, initial=done, unit="step", disable=not shown, bar_format=BAR if total_steps else None
        )
        self._prints, self._epochs = enabled and not interactive, epochs
        self._printed_at = -SECONDS_BETWEEN_LINES
        self._waiting: str | None = None
        self._is_first = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._waiting is not None:
            print(self._waiting, file=sys.stderr)

    def step(self) -> None:
        """Count a step."""
        self._bar.update()

    def epoch(self, record: dict[str, Any]) -> None:
        """Show the bounds of an epoch."""
        validation = "" if record["validation"] is None else f", validation {record['validation']:.2f}"
        bounds = f"bound {record['bound']:.2f}{validation}"
        self._bar.set_postfix_str(f"epoch {record['epoch']}/{self._epochs}, {bounds}")
        if not self._prints:
            return
        line = f"epoch {record['epoch']} of {self._epochs}: {bounds} nats/datum, {record['seconds']:.0f} s"
        is_due = record["epoch"] % math.ceil(self._epochs / MOST_LINES) == 0 or self._is_first
        self._is_first = False
        if not is_due or time.monotonic() - self._printed_at < SECONDS_BETWEEN_LINES:
            self._waiting = line
            return
        print(line, file=sys.stderr)
        self._printed_at, self._waiting = time.monotonic(), None
