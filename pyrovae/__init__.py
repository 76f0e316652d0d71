"""pyrovae: variational autoencoders as honest probabilistic programs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (
        checkpoint,
        conditional,
        config,
        data,
        encoders,
        estimators,
        evidence,
        hierarchical,
        likelihoods,
        nn,
        priors,
        registry,
        report,
        weights,
    )
    from .conditional import ConditionalVAE, SemiSupervisedVAE, make_conditional_vae, make_semi_supervised_vae
    from .evidence import Comparison, Evidence, compare
    from .hierarchical import HierarchicalVAE, make_hierarchical_vae
    from .marginal import log_marginal
    from .staging import stage
    from .training import History, fit
    from .vae import VAE, make_vae
    from .weights import LogWeights, log_weights

# Names load on first use, because torch, Pyro and ArviZ take seconds to import and `pyrovae --help` must not wait.
_NAMES = {
    "Comparison": "evidence",
    "ConditionalVAE": "conditional",
    "Decomposition": "diagnostics",
    "Draws": "evidence",
    "EstimatorComparison": "diagnostics",
    "Evidence": "evidence",
    "HierarchicalVAE": "hierarchical",
    "History": "training",
    "LogWeights": "weights",
    "SemiSupervisedVAE": "conditional",
    "VAE": "vae",
    "compare": "evidence",
    "compare_estimators": "diagnostics",
    "decompose": "diagnostics",
    "fit": "training",
    "log_marginal": "marginal",
    "log_weights": "weights",
    "make_conditional_vae": "conditional",
    "make_hierarchical_vae": "hierarchical",
    "make_semi_supervised_vae": "conditional",
    "make_vae": "vae",
    "stage": "staging",
    "posterior_draws": "diagnostics",
    "train_estimators": "diagnostics",
}

__all__ = [
    "VAE",
    "Comparison",
    "ConditionalVAE",
    "Decomposition",
    "Draws",
    "EstimatorComparison",
    "Evidence",
    "HierarchicalVAE",
    "History",
    "LogWeights",
    "SemiSupervisedVAE",
    "checkpoint",
    "compare",
    "compare_estimators",
    "conditional",
    "config",
    "data",
    "decompose",
    "diagnostics",
    "encoders",
    "estimators",
    "evidence",
    "fit",
    "hierarchical",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "make_conditional_vae",
    "make_hierarchical_vae",
    "make_semi_supervised_vae",
    "make_vae",
    "marginal",
    "nn",
    "pairs",
    "posterior_draws",
    "priors",
    "registry",
    "report",
    "stage",
    "staging",
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
