"""pyrovae: variational autoencoders as honest probabilistic programs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoint, config, data, encoders, estimators, evidence, likelihoods, nn, priors, registry, report, weights
    from .evidence import Comparison, Evidence, compare
    from .marginal import log_marginal
    from .training import History, fit
    from .vae import VAE, make_vae
    from .weights import LogWeights, log_weights

# Names load on first use, because torch, Pyro and ArviZ take seconds to import and `pyrovae --help` must not wait.
_NAMES = {
    "Comparison": "evidence",
    "Decomposition": "diagnostics",
    "Draws": "evidence",
    "EstimatorComparison": "diagnostics",
    "Evidence": "evidence",
    "History": "training",
    "LogWeights": "weights",
    "VAE": "vae",
    "compare": "evidence",
    "compare_estimators": "diagnostics",
    "decompose": "diagnostics",
    "fit": "training",
    "log_marginal": "marginal",
    "log_weights": "weights",
    "make_vae": "vae",
    "posterior_draws": "diagnostics",
    "train_estimators": "diagnostics",
}

__all__ = [
    "VAE",
    "Comparison",
    "Decomposition",
    "Draws",
    "EstimatorComparison",
    "Evidence",
    "History",
    "LogWeights",
    "checkpoint",
    "compare",
    "compare_estimators",
    "config",
    "data",
    "decompose",
    "diagnostics",
    "encoders",
    "estimators",
    "evidence",
    "fit",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "make_vae",
    "marginal",
    "nn",
    "pairs",
    "posterior_draws",
    "priors",
    "registry",
    "report",
    "traces",
    "train_estimators",
    "training",
    "vae",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f".{_NAMES[name]}", __name__), name)
    if name in __all__:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
