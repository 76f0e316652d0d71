"""Training: one readable loop over any pair of programs, and what is checked before its first step."""

from .callbacks import Callback
from .history import History
from .loop import fit
from .schedules import OPTIMIZERS, SCHEDULES

__all__ = ["OPTIMIZERS", "SCHEDULES", "Callback", "History", "fit"]
