"""pyrovae: variational autoencoders as honest probabilistic programs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import checkpoint, config, data, encoders, estimators, evidence, likelihoods, nn, priors, registry, report, weights
    from .annealing import Sandwich, ais, bdmc
    from .evidence import Comparison, Evidence, compare
    from .integration import exact
    from .marginal import log_marginal
    from .proposals import Refinement, refine
    from .training import History, fit
    from .vae import VAE, make_vae
    from .weights import LogWeights, log_weights

# Names load on first use, because torch, Pyro and ArviZ take seconds to import and `pyrovae --help` must not wait.
_NAMES = {
    "Comparison": "evidence",
    "EstimatorComparison": "diagnostics",
    "Evidence": "evidence",
    "History": "training",
    "LogWeights": "weights",
    "Refinement": "proposals",
    "Sandwich": "annealing",
    "VAE": "vae",
    "ais": "annealing",
    "bdmc": "annealing",
    "compare": "evidence",
    "compare_estimators": "diagnostics",
    "exact": "integration",
    "fit": "training",
    "log_marginal": "marginal",
    "log_weights": "weights",
    "make_vae": "vae",
    "refine": "proposals",
    "train_estimators": "diagnostics",
}

__all__ = [
    "VAE",
    "Comparison",
    "EstimatorComparison",
    "Evidence",
    "History",
    "LogWeights",
    "Refinement",
    "Sandwich",
    "ais",
    "annealing",
    "bdmc",
    "checkpoint",
    "compare",
    "compare_estimators",
    "config",
    "data",
    "diagnostics",
    "encoders",
    "estimators",
    "evidence",
    "exact",
    "fit",
    "integration",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "make_vae",
    "marginal",
    "nn",
    "pairs",
    "priors",
    "proposals",
    "refine",
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
