"""Training: one readable loop over any pair of programs, and what is checked before its first step."""

from .history import History
from .loop import fit
from .options import OPTIMIZERS

__all__ = ["OPTIMIZERS", "History", "fit"]
