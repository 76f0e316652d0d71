"""The TOML file that ``pyrovae init`` writes: every setting of a run, with its meaning."""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING, Any

from .config import Run
from .printing import likelihood_reason
from .sections import DataSection

if TYPE_CHECKING:
    from ..data.datasets import Split

__all__ = ["template"]

WIDTH = 100
# Keys that say which data these are stand without "#", and so does the likelihood that fits them.
_SET = ("path", "kind", "likelihood")


def template(run: Run, split: Split) -> str:
    """The commented TOML text of a run for a data set.

    Args:
        run: the run, with what the data say of it.
        split: its data.
    """
    lines = [
        *_comment('A run of pyrovae train. A line such as "# lr = 0.002" shows a default: remove the "#" to change it.'),
        *_comment(f"The data: {split.note}."),
        "",
        *_keys(run, [name for name in run.__dataclass_fields__ if name not in ("data", "model", "train", "evaluate")]),
    ]
    for name in ("data", "model", "train", "evaluate"):
        section = getattr(run, name)
        keys = [key for key in section.__dataclass_fields__ if _shown(run, name, key)]
        lines += [f"[{name}]", *_keys(section, keys, {"likelihood": f"Chosen by the data: {likelihood_reason(run, split)}."})]
    return "\n".join(lines).rstrip() + "\n"


def _shown(run: Run, section: str, key: str) -> bool:
    """Whether a key is one of this run: a model's keys are those of its kind, and data have a name or a path."""
    value = getattr(getattr(run, section), key)
    if section == "data":
        return key != ("name" if run.data.path is not None else "path")
    return section != "model" or value is not None


def _keys(section: Any, keys: list[str], reasons: dict[str, str] | None = None) -> list[str]:
    """A line for each key, below its meaning."""
    import tomli_w

    meanings = _meanings(type(section))
    lines: list[str] = []
    for key in keys:
        value = getattr(section, key)
        lines += _comment((reasons or {}).get(key) or meanings[key])
        if value is None:
            lines += [f"# {key}: not set", ""]
            continue
        # A component with its name alone is written by it.
        value = value["kind"] if isinstance(value, dict) and set(value) == {"kind"} else value
        text = tomli_w.dumps({key: value}) if not isinstance(value, dict) else _inline(key, value)
        text = " ".join(text.split()) if isinstance(value, list) else text.strip()
        is_set = key in _SET or (isinstance(section, DataSection) and key == "name")
        lines += [text if is_set else f"# {text}", ""]
    return lines


def _inline(key: str, table: dict[str, Any]) -> str:
    """A component with its options as one line of TOML."""
    import tomli_w

    pairs = ", ".join(" ".join(tomli_w.dumps({name: value}).split()) for name, value in table.items())
    return f"{key} = {{ {pairs} }}"


def _meanings(section: type) -> dict[str, str]:
    """The sentences on each attribute in a section's docstring."""
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section.__doc__ or "", re.MULTILINE)
    return {key: " ".join(text.split()) for key, text in found}


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
