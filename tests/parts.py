"""Small components of every kind, built from the registry, and which priors and encoders go together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyrovae.likelihoods import Likelihood
from pyrovae.models.vae import VAE, make_vae
from pyrovae.nn import MLP
from pyrovae.registry import build, find, names

# Arguments that keep a class small in tests. A class that is not here is built by its name alone.
SMALL: dict[tuple[str, str], dict[str, Any]] = {
    ("prior", "vamp"): {"components": 4},
    ("prior", "mixture"): {"components": 3},
    ("prior", "flow"): {"hidden": [8], "depth": 2},
    ("encoder", "flow"): {"hidden": [8], "depth": 1},
    ("encoder", "low_rank_normal"): {"rank": 1},
}
# Likelihoods for data of six numbers, with the options that change what they are made of; others are added by name below.
LIKELIHOODS: list[Any] = [
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
# Arguments that the caller gives: sizes, shapes and networks.
GIVEN = {"latent_dim", "data_shape", "event_shape", "in_shape", "out_shape", "decoder", "body", "name"}
# A required argument of a class that no table here names has this value, by its annotation.
BY_TYPE: dict[Any, Any] = {"int": 4, int: 4, "float": 0.5, float: 0.5}


def spec(kind: str, name: str, **options: Any) -> dict[str, Any]:
    """A table for the registry, with a value for every argument that the class requires."""
    table = {"kind": name} | SMALL.get((kind, name), {}) | options
    for argument in inspect.signature(find(kind, name)).parameters.values():
        required = argument.default is argument.empty and argument.name not in table and argument.name not in GIVEN
        if required and argument.annotation in BY_TYPE:
            table[argument.name] = BY_TYPE[argument.annotation]
    return table


def _listed(tables: list[Any]) -> set[str]:
    return {table if isinstance(table, str) else table["kind"] for table in tables}


LIKELIHOODS += [spec("likelihood", name) for name in names("likelihood") if name not in _listed(LIKELIHOODS)]


def same_set(one: Any, other: Any) -> bool:
    """Whether two constraints describe the same set."""
    if type(one) is not type(other):
        return False
    if isinstance(one, constraints.independent):
        same_dims = one.reinterpreted_batch_ndims == other.reinterpreted_batch_ndims
        return same_dims and same_set(one.base_constraint, other.base_constraint)
    return vars(one) == vars(other)


def fit_together(prior: str, encoder: str) -> bool:
    """Whether both have the same support."""
    wanted = find("prior", prior).support
    return wanted is None or same_set(wanted, find("encoder", encoder).support)


COMBINATIONS = [(prior, encoder) for prior in names("prior") for encoder in names("encoder") if fit_together(prior, encoder)]


def encoder_for(prior: str) -> str:
    """An encoder that fits a prior, the simplest if there are several."""
    fitting = [encoder for name, encoder in COMBINATIONS if name == prior]
    assert fitting, f"no encoder has the support of the prior {prior}, {find('prior', prior).support}: write one"
    return "diagonal_normal" if "diagonal_normal" in fitting else fitting[0]


def prior_for(encoder: str) -> str:
    """A prior that fits an encoder, the simplest if there are several."""
    fitting = [prior for prior, name in COMBINATIONS if name == encoder and prior != "vamp"]
    assert fitting, f"no prior has the support of the encoder {encoder}, {find('encoder', encoder).support}: write one"
    return "standard_normal" if "standard_normal" in fitting else fitting[0]


def parts_for(kind: str, part: str | dict[str, Any]) -> dict[str, Any]:
    """A prior and an encoder, one of them the given one, by its name or its table."""
    table = spec(kind, part) if isinstance(part, str) else part
    if kind == "prior":
        return {"prior": table, "encoder": spec("encoder", encoder_for(table["kind"]))}
    return {"prior": spec("prior", prior_for(table["kind"])), "encoder": table}


# -- likelihoods of data of five numbers, for the contract tests -----------------------------------------------------------

SHAPE = (5,)
MIXED_PARTS = [[[0, 3], "normal"], [[2], {"kind": "binomial", "total_count": 3}], [[1], "beta"], [[4], "poisson"]]
# What a name needs that has no default, or is too large for a test by its default.
LIKELIHOOD_OPTIONS: dict[str, dict[str, Any]] = {
    "beta_binomial": {"total_count": 6},
    "binomial": {"total_count": 6},
    "categorical": {"num_levels": 6},
    "dequantized": {"num_levels": 6, "likelihood": {"kind": "normal", "scale": "shared"}},
    "discretized_logistic": {"num_levels": 6},
    "mixed": {"parts": MIXED_PARTS},
    "student_t": {"df": 9.0},
}
LIKELIHOOD_VARIANTS: list[dict[str, Any]] = [
    *({"kind": "normal", "scale": scale} for scale in ("shared", "per_dimension", "decoder", "optimal")),
    {"kind": "laplace", "scale": "decoder"},
    {"kind": "student_t", "df": "shared", "scale": "decoder"},
    {"kind": "negative_binomial", "dispersion": "decoder", "library": 12},
    {"kind": "negative_binomial", "dispersion": "shared", "library": "total"},
    {"kind": "zero_inflated_negative_binomial", "dispersion": "decoder", "library": None},
    {"kind": "discretized_logistic", "num_levels": 6, "components": 3},
    {"kind": "dequantized", "num_levels": 6, "likelihood": "beta"},
    {"kind": "dequantized", "num_levels": 6, "likelihood": "continuous_bernoulli"},
    {
        "kind": "mixed",
        "parts": [[[1, 0], {"kind": "dequantized", "num_levels": 4}], [[4, 3, 2], "zero_inflated_negative_binomial"]],
    },
]
LIKELIHOOD_SPECS = [spec("likelihood", name, **LIKELIHOOD_OPTIONS.get(name, {})) for name in names("likelihood")]
LIKELIHOOD_SPECS += LIKELIHOOD_VARIANTS


def small_likelihood(table: dict[str, Any], latent_dim: int = 3) -> Likelihood:
    """A likelihood with its parameters moved at random."""
    out_shape = find("likelihood", table["kind"]).decoder_shape(SHAPE, table)
    likelihood = build("likelihood", table, decoder=MLP(latent_dim, [6], out_shape, activation="tanh"))
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return likelihood


@torch.no_grad()
def draw_data(likelihood: Likelihood, num: int, latent_dim: int = 3) -> Tensor:
    """Data in the support: draws, for a library of 12 where it is the datum's."""
    z = torch.randn(num, latent_dim)
    return likelihood.given(z, torch.full((num, *SHAPE), 2.4)).sample()


def small_vae_of(table: dict[str, Any]) -> VAE:
    """A VAE with this likelihood."""
    return make_vae(SHAPE, latent_dim=2, hidden=[6], likelihood=table)
