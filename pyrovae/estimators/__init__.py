"""Bounds on log p(x) and their gradients; each estimator is a class of a few lines that reduces log-weights."""

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from ..registry import find, names
from .base import Coefficients, Estimator, check_estimator, loss_and_grads, make_estimator
from .doubly_reparameterized import DReG, GDReG
from .elbo import ELBO, STL
from .importance_weighted import CIWAE, IWAE, JVI, MIWAE, PIWAE, Renyi, VRMax
from .score_function import OVIS, VIMCO, ScoreELBO
from .thermodynamic import TVO
from .wake_sleep import RWS

__all__ = [
    "CIWAE", "ELBO", "IWAE", "JVI", "MIWAE", "OVIS", "PIWAE", "RWS", "STL", "TVO", "VIMCO", "Coefficients", "DReG",
    "Estimator", "GDReG", "Renyi", "ScoreELBO", "VRMax", "check_estimator", "loss_and_grads", "make_estimator",
]  # fmt: skip

# Classes in a file that is not imported above are registered too.
for _file in iter_modules(__path__):
    import_module(f"{__name__}.{_file.name}")


if not TYPE_CHECKING:  # type checkers shall still find a misspelt name

    def __getattr__(name: str) -> type[Estimator]:
        """A registered class of one of these files that has no entry above."""
        if not name.startswith("_"):
            for cls in (find("estimator", each) for each in names("estimator")):
                if cls.__name__ == name and cls.__module__.startswith(f"{__name__}."):
                    return cls
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
