"""Which priors and encoders go together, read off the registry, and the likelihoods that they are combined with."""

from __future__ import annotations

from typing import Any

from pyrovae.registry import find, names

# Arguments that keep a class small in tests. A class that is not here is built by its name alone.
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("prior", "vamp"): {"components": 4},
    ("prior", "mixture"): {"components": 3},
    ("prior", "flow"): {"hidden": [8], "depth": 2},
    ("encoder", "flow"): {"hidden": [8], "depth": 1},
    ("encoder", "low_rank_normal"): {"rank": 1},
}
# Every likelihood, for data of six numbers, with the options that change what it is made of.
LIKELIHOODS = [
    "bernoulli",
    {"kind": "binomial", "total_count": 4},
    "normal",
    {"kind": "normal", "scale": "shared"},
    {"kind": "normal", "scale": "per_dimension"},
    {"kind": "normal", "scale": "decoder"},
    {"kind": "normal", "scale": "optimal"},
    "beta",
    {"kind": "beta_binomial", "total_count": 4},
    {"kind": "categorical", "num_levels": 4},
    "continuous_bernoulli",
    {"kind": "dequantized", "likelihood": {"kind": "normal", "scale": "shared"}},
    {"kind": "discretized_logistic", "num_levels": 4, "components": 2},
    "laplace",
    {"kind": "mixed", "parts": [[[0, 2, 4], "normal"], [[1, 3], "bernoulli"], [[5], "beta"]]},
    "negative_binomial",
    "poisson",
    "student_t",
    "zero_inflated_negative_binomial",
]


def spec(kind: str, name: str, **options: Any) -> dict[str, Any]:
    """A table for the registry."""
    return {"kind": name} | SMALL.get((kind, name), {}) | options


def fit_together(prior: str, encoder: str) -> bool:
    """Whether both live on one set."""
    wanted = find("prior", prior).support
    return wanted is None or str(wanted) == str(find("encoder", encoder).support)


COMBINATIONS = [(prior, encoder) for prior in names("prior") for encoder in names("encoder") if fit_together(prior, encoder)]


def encoder_for(prior: str) -> str:
    """An encoder that fits a prior, the simplest where there are many."""
    fitting = [encoder for name, encoder in COMBINATIONS if name == prior]
    return "diagonal_normal" if "diagonal_normal" in fitting else fitting[0]


def prior_for(encoder: str) -> str:
    """A prior that fits an encoder, the simplest where there are many."""
    fitting = [prior for prior, name in COMBINATIONS if name == encoder and prior != "vamp"]
    return "standard_normal" if "standard_normal" in fitting else fitting[0]


def parts_for(kind: str, name: str) -> dict[str, Any]:
    """A prior and an encoder, one of them the named one."""
    prior, encoder = (name, encoder_for(name)) if kind == "prior" else (prior_for(name), name)
    return {"prior": spec("prior", prior), "encoder": spec("encoder", encoder)}
