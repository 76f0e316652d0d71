"""Ctrl-C and SIGTERM during training: the step is finished, the run is saved, and then it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

from .history import History

__all__ = ["Interrupted", "Signals"]


class Interrupted(KeyboardInterrupt):
    """Training was ended by Ctrl-C or SIGTERM, after a whole step.

    Attributes:
        signal: the number of the signal.
        history: the records of the epochs that were complete; ``None`` of a sweep, which has many.
    """

    def __init__(self, message: str, number: int, history: History | None = None):
        super().__init__(message)
        self.signal, self.history = number, history


class Signals:
    """A context that notes SIGINT, and SIGTERM if asked, in place of ending the process; a second signal ends it at once.

    Only the main thread receives signals. Handlers that a program has set for itself stay.

    Args:
        terminate: whether to note SIGTERM too.

    Attributes:
        received: the number of the signal that came, or ``None``.
    """

    def __init__(self, *, terminate: bool):
        wanted = {signal.SIGINT: signal.default_int_handler} | ({signal.SIGTERM: signal.SIG_DFL} if terminate else {})
        here = threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {
            number: usual for number, usual in wanted.items() if here and signal.getsignal(number) in (usual, None)
        }
        self.received: int | None = None

    def __enter__(self) -> Self:
        for number in self._before:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            signal.raise_signal(number)
        self.received = number

    def _restore(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
