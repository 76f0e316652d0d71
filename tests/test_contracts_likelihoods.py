"""What every likelihood must do: a new one is tested by being registered, with no list to edit.

pytest tests/test_contracts_likelihoods.py -k name_of_it
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from parts import LIKELIHOOD_SPECS, LIKELIHOOD_VARIANTS, SHAPE, draw_data, small_likelihood, small_vae_of
from scipy import integrate
from torch import Tensor

from pyrovae import distributions
from pyrovae.compile.step import Step
from pyrovae.estimators.elbo import ELBO
from pyrovae.likelihoods import Likelihood
from pyrovae.models.vae import VAE
from pyrovae.registry import build, describe

# Capture and training take a second each: by default for each class once, and for options that compute in another way.
DEFAULT = [
    table
    for table in LIKELIHOOD_SPECS
    if table not in LIKELIHOOD_VARIANTS
    or table.get("scale") == "optimal"
    or table.get("library") == "total"
    or "components" in table
    or table is LIKELIHOOD_VARIANTS[-1]
]


def _name(case: dict | bool) -> str:
    return " ".join(map(str, case.values()))[:60] if isinstance(case, dict) else "masked" if case else "complete"


over_specs = pytest.mark.parametrize("spec", LIKELIHOOD_SPECS, ids=_name)


def _column_law(likelihood: Likelihood) -> dist.Distribution:
    """p(x|z) at one z, before it is made one event: batch shape ``SHAPE``."""
    law = likelihood.given(torch.randn(3), torch.full(SHAPE, 2.4))
    if not isinstance(law, torch.distributions.Independent) or law.base_dist.event_shape:
        pytest.skip("its dimensions are not independent: test by hand that the density integrates to one")
    return law.base_dist


def _columns(likelihood: Likelihood, distribution: dist.Distribution) -> list[tuple[bool, float, float]]:
    """For each column whether it is discrete, and the ends of its support."""
    if isinstance(distribution, distributions.HeterogeneousIndependent):
        found: dict[int, tuple[bool, float, float]] = {}
        for part, columns in zip(distribution.distributions, distribution.columns, strict=True):
            (kind,) = set(_columns(likelihood, part))
            found |= dict.fromkeys(columns.tolist(), kind)
        return [found[column] for column in range(len(found))]
    grid = torch.tensor([-1e3, -0.5, 0.0, 0.5, 1.0, 3.0, 4.5, 1e3])
    inside = distribution.support.check(grid[:, None].expand(-1, *distribution.batch_shape))[:, 0].tolist()
    if distribution.support.is_discrete or not inside[3]:
        return [(True, 0, 6 if not inside[-1] else 3000)] * distribution.batch_shape[-1]
    low = -math.inf if inside[0] else 0.0
    high = math.inf if inside[-1] else 1.0 if not inside[5] else float(distribution.num_levels)
    return [(False, low, high)] * distribution.batch_shape[-1]


@over_specs
@pytest.mark.usefixtures("float64")
def test_every_column_sums_or_integrates_to_one(spec: dict) -> None:
    likelihood = small_likelihood(spec)
    distribution = _column_law(likelihood)
    fill_value = torch.as_tensor(likelihood.fill_value).expand(SHAPE)
    for column, (discrete, low, high) in list(enumerate(_columns(likelihood, distribution)))[
        :: 1 if spec["kind"] == "mixed" else 3
    ]:

        def density(value: Tensor, column: int = column) -> Tensor:
            x = fill_value.repeat(len(value), 1)
            x[:, column] = value
            inside = distribution.support.check(x + 1e-9 * (spec["kind"] == "dequantized"))[:, column]
            found = torch.zeros(len(value))
            found[inside] = distribution.log_prob(x[inside])[:, column].exp().detach()
            return found

        if discrete:
            total = density(torch.arange(low, high + 1.0)).sum().item()
        else:
            ends = (low, 0.5, high) if high <= 1 else (low, -3.0, 0.0, 3.0, high)
            ends = [end for end in ends if low <= end <= high]
            pieces = pairwise(ends)
            total = sum(
                integrate.quad(lambda v: density(torch.tensor([v])).item(), a, b, limit=200, epsabs=1e-10)[0] for a, b in pieces
            )
        assert total == pytest.approx(1.0, abs=1e-7), column


@over_specs
@pytest.mark.usefixtures("float64")
def test_samples_have_the_moments_of_the_law(spec: dict) -> None:
    distribution = _column_law(small_likelihood(spec))
    with torch.no_grad():
        mean, variance = distribution.mean, distribution.variance
        drawn = distribution.sample((20_000,))
    assert mean.shape == variance.shape == SHAPE
    assert distribution.support.check(drawn).all()
    error = (drawn.mean(0) - mean).abs() / (variance / len(drawn)).sqrt()
    assert error.max() < 5
    if spec.get("df") != "shared":  # four moments exist
        square = (drawn - mean).square()
        assert ((square.mean(0) - variance).abs() / (square.std(0) / len(drawn) ** 0.5)).max() < 5.5


@over_specs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_particles_stand_on_the_left_in_any_precision(spec: dict, dtype: torch.dtype) -> None:
    likelihood = small_likelihood(spec)
    x = draw_data(likelihood, 4).to(dtype)
    z = torch.randn(3, 4, 3, dtype=dtype)
    distribution, seen = likelihood.to(dtype).observe(z, x)
    assert (distribution.batch_shape, distribution.event_shape) == ((3, 4), SHAPE)
    assert distribution.sample().dtype == distribution.mean.dtype == distribution.log_prob(seen).dtype == dtype
    assert distribution.log_prob(seen).isfinite().all()
    one, _ = likelihood.eval().observe(z[1, 2], x[2])
    with torch.no_grad():
        together = likelihood.observe(z, x)[0].log_prob(x)[1, 2]
        torch.testing.assert_close(one.log_prob(x[2]), together, rtol=1e-5, atol=1e-6)
    # A plate may widen it.
    assert distribution.expand(torch.Size((2, 3, 4))).sample().shape == (2, 3, 4, *SHAPE)


@over_specs
def test_draws_lie_in_the_support(spec: dict) -> None:
    likelihood = small_likelihood(spec)
    x = draw_data(likelihood, 200)
    law = likelihood.given(torch.randn(200, 3), x)
    assert x.shape == (200, *SHAPE)
    assert law.support.check(x).all()
    assert law.log_prob(x).isfinite().all()


@over_specs
@torch.no_grad()
def test_what_a_mask_hides_changes_nothing(spec: dict) -> None:
    likelihood = small_likelihood(spec).eval()
    z, x = torch.randn(3, 7, 3), draw_data(likelihood, 7)
    law, value = likelihood.observe(z, x)
    complete = law.log_prob(value)
    if not isinstance(law, torch.distributions.Independent) or law.base_dist.event_shape:
        with pytest.raises(ValueError, match="independent"):
            likelihood.observe(z, x, torch.ones_like(x, dtype=torch.bool))
        return
    law, value = likelihood.observe(z, x, torch.ones_like(x, dtype=torch.bool))
    torch.testing.assert_close(law.log_prob(value), complete)
    mask = torch.rand(x.shape) < 0.5
    scores = []
    for filler in (math.nan, 0.0):
        law, value = likelihood.observe(z, torch.where(mask, x, filler), mask)
        scores.append(law.log_prob(value))
    assert scores[0].isfinite().all()
    assert torch.equal(*scores)


@over_specs
def test_data_that_are_not_numbers_are_refused_in_a_sentence(spec: dict) -> None:
    with pytest.raises(ValueError, match=r"[.?]$") as caught:
        small_vae_of(spec).fit(torch.full((4, *SHAPE), math.nan), epochs=1, progress=False)
    assert "\n" not in str(caught.value)


@over_specs
def test_gradient_reaches_every_parameter(spec: dict) -> None:
    likelihood = small_likelihood(spec)
    distribution, seen = likelihood.observe(torch.randn(20, 3), draw_data(likelihood, 20))
    (distribution.log_prob(seen) * torch.randn(20)).sum().backward()
    for name, parameter in likelihood.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@over_specs
def test_comes_back_from_its_description_and_its_state(spec: dict, tmp_path: Path) -> None:
    likelihood = small_likelihood(spec)
    again = build("likelihood", json.loads(json.dumps(describe(likelihood, "likelihood"))))
    again.load_state_dict(likelihood.state_dict())
    z, x = torch.randn(6, 3), draw_data(likelihood, 6)
    for built in (likelihood, again):
        built.eval()
    assert torch.equal(again.given(z, x).log_prob(x), likelihood.given(z, x).log_prob(x))
    vae = small_vae_of(spec)
    vae.save_pretrained(tmp_path)
    assert torch.equal(VAE.from_pretrained(tmp_path).decode(z[:, :2]).mean, vae.decode(z[:, :2]).mean)


def _outcomes(spec: dict, backend: str, masked: bool, num_steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    vae = small_vae_of(spec)
    x = draw_data(small_likelihood(spec), 8)
    batch = (x, torch.rand(x.shape) < 0.6) if masked else (x,)
    adam = torch.optim.Adam(vae.parameters(), lr=1e-2)
    step = Step(ELBO(), vae.model, vae.guide, adam, backend=backend)
    losses = [step(*batch).loss for _ in range(num_steps)]
    assert step.reason is None
    assert all(math.isfinite(loss) for loss in losses)
    return losses, vae.state_dict()


@pytest.mark.parametrize(
    ("spec", "masked"),
    [
        pytest.param(
            spec, index % 2 == 1, marks=[] if spec in DEFAULT or spec is LIKELIHOOD_VARIANTS[-1] else [pytest.mark.slow]
        )
        for index, spec in enumerate(LIKELIHOOD_SPECS)
    ],
    ids=_name,
)
def test_staged_equals_eager(spec: dict, masked: bool) -> None:
    eager, state = _outcomes(spec, "eager", masked)
    staged, staged_state = _outcomes(spec, "aten", masked)
    assert_allclose(staged, eager, rtol=1e-5)
    for name, tensor in state.items():  # what is learned, and what is kept
        torch.testing.assert_close(staged_state[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", DEFAULT, ids=_name)
def test_fit_trains_it(spec: dict) -> None:
    vae, x = small_vae_of(spec), draw_data(small_likelihood(spec), 12)
    before = {name: par.clone() for name, par in vae.named_parameters()}
    history = vae.fit(x, estimator="elbo", epochs=1, batch_size=4, lr=0.02, progress=False)
    assert math.isfinite(history.bound[0])
    for name, par in vae.named_parameters():
        assert not torch.equal(par, before[name]), name
