"""What runs slower than it could, and why: each reason is warned about once and listed by ``pyrovae doctor``."""

from __future__ import annotations

import warnings

__all__ = ["forget", "note", "reasons"]

_reasons: dict[str, str] = {}
_warned: set[tuple[str, str]] = set()


def note(subject: str, reason: str, *, warn: bool = True) -> None:
    """Record a reason; warn about it if this process has not yet done so.

    Args:
        subject: what runs slower, such as ``"native"``; a subject keeps its latest reason.
        reason: one sentence.
        warn: whether to raise a ``RuntimeWarning`` the first time.
    """
    _reasons[subject] = reason
    if warn and (subject, reason) not in _warned:
        _warned.add((subject, reason))
        warnings.warn(reason, RuntimeWarning, stacklevel=3)


def reasons() -> dict[str, str]:
    """The reasons recorded in this process, by subject."""
    return dict(_reasons)


def forget() -> None:
    """Forget all reasons, so that they are warned about again."""
    _reasons.clear()
    _warned.clear()
