"""Comparison of estimators, decomposition of the evidence, and draws from the posterior."""

from .decomposition import Decomposition, decompose
from .estimator_comparison import EstimatorComparison
from .gradients import compare_estimators, train_estimators
from .posterior import posterior_draws

__all__ = [
    "Decomposition",
    "EstimatorComparison",
    "compare_estimators",
    "decompose",
    "posterior_draws",
    "train_estimators",
]
