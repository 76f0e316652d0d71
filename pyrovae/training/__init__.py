"""Training: one readable loop over any pair of programs, and what is looked at before its first step."""

from .loop import OPTIMIZERS, History, fit

__all__ = ["OPTIMIZERS", "History", "fit"]
