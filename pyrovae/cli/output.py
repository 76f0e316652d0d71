"""What a command prints: its findings in words, as JSON, or nothing."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

__all__ = ["Output", "json_text"]


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """How a command says what it found.

    Attributes:
        json: Print the findings as one JSON object and nothing else; progress and errors go to standard error.
        quiet: Print errors alone.
    """

    json: Annotated[bool, Parameter(negative="")] = False
    quiet: Annotated[bool, Parameter(negative="")] = False

    @property
    def bars(self) -> bool:
        """Whether to show progress bars."""
        return sys.stderr.isatty() and not self.quiet

    @contextlib.contextmanager
    def words(self) -> Iterator[None]:
        """A context whose printed words are left out if JSON or nothing is asked for."""
        with contextlib.redirect_stdout(io.StringIO()) if self.json or self.quiet else contextlib.nullcontext():
            yield

    def findings(self, found: dict[str, Any]) -> None:
        """Print the findings, if JSON is asked for."""
        if self.json:
            print(json_text(found))


def json_text(value: Any) -> str:
    """A value as JSON, with ``null`` for infinities and NaN, which JSON lacks."""

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [plain(each) for each in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1, allow_nan=False)
