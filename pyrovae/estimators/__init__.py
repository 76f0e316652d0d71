"""Bounds on log p(x) and their gradients; each estimator is a class of a few lines that reduces log-weights."""

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
