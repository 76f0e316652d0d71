"""Priors against SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import stats
from torch import Tensor

from pyrovae.priors import Prior, StandardNormal
from pyrovae.registry import build, names

pytestmark = pytest.mark.usefixtures("float64")

# One independent density for each prior: a new one brings its own.
REFERENCE: dict[str, Callable[[Prior, np.ndarray], np.ndarray]] = {
    "standard_normal": lambda prior, z: stats.norm.logpdf(z).sum(-1),
}


@pytest.mark.parametrize("name", names("prior"))
def test_log_prob_is_the_reference(name: str) -> None:
    prior = build("prior", name, latent_dim=4)
    z: Tensor = 2 * torch.randn(3, 5, 4)
    assert name in REFERENCE, f"add the density of {name} from SciPy, or by hand, to REFERENCE"
    assert_allclose(prior().log_prob(z).detach(), REFERENCE[name](prior, z.numpy()), rtol=1e-12)


def test_standard_normal_samples() -> None:
    z = StandardNormal(2)().sample((4000,))
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(z.T.numpy())[0, 1]) < 5 / 4000**0.5


def test_standard_normal_moves_with_its_module_and_stores_nothing() -> None:
    prior = StandardNormal(3)
    assert prior.to(torch.float32)().sample().dtype == torch.float32
    assert not prior.state_dict()


@pytest.mark.parametrize("latent_dim", [0, -1, 2.5, "50", None])
def test_latent_dim_is_a_positive_integer(latent_dim: object) -> None:
    with pytest.raises(ValueError, match="latent_dim is a positive integer, not"):
        StandardNormal(latent_dim)


def test_base_class_says_what_is_missing() -> None:
    with pytest.raises(TypeError, match=r"Prior must implement forward\(\)"):
        Prior(2)()
