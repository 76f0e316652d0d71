"""The settings of a command line as nested tables."""

from __future__ import annotations

import tomllib
from typing import Any

from cyclopts import App

__all__ = ["collect", "given", "literal"]

# Settings that may be given without their section.
SHORT = {"--device": "--train.device", "--data": "--data.path"}

# Options of the command, not settings of the run.
OWN = ("--resume", "--json", "--quiet", "--grid", "--seeds", "--jobs", "--index")

# The setting whose elements may be lists themselves: of several lists each is an element, and one alone is the whole.
NESTED = "hidden"

# cyclopts would fill in defaults, and only what was given may win over the run's file.
given: dict[str, Any] = {}


def collect(_app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Keep the settings given to ``train`` or ``sweep`` in :data:`given`, for one validation together with the file's."""
    given.clear()
    for argument in arguments if commands[-1:] in (("train",), ("sweep",)) else ():
        if not argument.name.startswith("--") or argument.name in OWN:
            continue
        for token in argument.tokens:
            name = SHORT.get(argument.name, argument.name)
            name = argument.name if token.keys or token.value[:1] == "{" else name
            path: list[str] = [*name.removeprefix("--").replace("-", "_").split("."), *_options(token.keys)]
            table, last = given, path[-1]
            for parent in path[:-1]:
                table = table.setdefault(parent, {})
            if argument.hint is bool:
                table[last] = token.value.lower() in ("", "true", "1", "yes") and ".no-" not in str(token.keyword)
            elif "list" in str(argument.hint):
                value = literal(token.value) if token.value[:1] == "[" else token.value
                whole = isinstance(value, list) and (last != NESTED or len(argument.tokens) == 1)
                table.setdefault(last, []).extend(value if whole else [value])
            else:
                table[last] = literal(token.value) if token.keys or token.value[:1] == "{" else token.value
        argument.tokens.clear()


def _options(keys: tuple[str, ...]) -> list[str]:
    """The option of a component, which may be spelt with dashes as all others are; what lies deeper may name columns."""
    return [*(key.replace("-", "_") for key in keys[:1]), *keys[1:]]


def literal(text: str) -> Any:
    """A TOML value, or the text itself: a component's options have no declared type.

    Example:
        >>> from pyrovae.cli.arguments import literal
        >>> literal("[8, 4]"), literal("iwae")
        ([8, 4], 'iwae')
    """
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
