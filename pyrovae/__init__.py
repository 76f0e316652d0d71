"""pyrovae: variational autoencoders as honest probabilistic programs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (
        annealing,
        checkpoint,
        conditional,
        config,
        data,
        diagnostics,
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
    from .annealing import Sandwich, ais, bdmc
    from .conditional import ConditionalVAE, SemiSupervisedVAE, make_conditional_vae, make_semi_supervised_vae
    from .diagnostics import (
        Decomposition,
        EstimatorComparison,
        compare_estimators,
        decompose,
        posterior_draws,
        train_estimators,
    )
    from .evidence import Comparison, Draws, Evidence, compare
    from .hierarchical import HierarchicalVAE, make_hierarchical_vae
    from .integration import exact
    from .marginal import log_marginal
    from .proposals import Refinement, refine
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
    "Refinement": "proposals",
    "Sandwich": "annealing",
    "VAE": "vae",
    "ais": "annealing",
    "bdmc": "annealing",
    "compare": "evidence",
    "compare_estimators": "diagnostics",
    "decompose": "diagnostics",
    "exact": "integration",
    "fit": "training",
    "log_marginal": "marginal",
    "log_weights": "weights",
    "make_conditional_vae": "conditional",
    "make_hierarchical_vae": "hierarchical",
    "make_semi_supervised_vae": "conditional",
    "make_vae": "vae",
    "stage": "staging",
    "posterior_draws": "diagnostics",
    "refine": "proposals",
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
    "Refinement",
    "Sandwich",
    "SemiSupervisedVAE",
    "ais",
    "annealing",
    "bdmc",
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
    "exact",
    "fit",
    "hierarchical",
    "integration",
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
    "proposals",
    "refine",
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
