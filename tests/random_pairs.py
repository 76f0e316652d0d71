"""Random small Pyro pairs with known log p(x): no estimate that is called reliable may be wrong, no sound pair refused.

Each seed makes one pair: one to three scalar latents of twenty families, each perhaps in a plate of two or depending on
earlier ones, a likelihood of five, perhaps a mask, a factor, float32, and a guide that covers the posterior or fails to.
The truth is summed or integrated on a grid in float64, by code that shares nothing with the package.

    python tests/random_pairs.py --pairs 2000 --out experiments/results/random_pairs.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import platform
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform

import pyrovae as pv

MOST_SE, MOST_NATS = 6.0, 0.05


@dataclass(frozen=True)
class Family:
    """A family of latents: how it is made from a location, and the grid that integrates it."""

    make: Callable[[Tensor], Any]
    kind: str  # real, positive, interval, circle, or finite: which grid and which guides fit
    most: int = 0  # largest value of a finite or truncated support


def _mixture(loc: Tensor) -> Any:
    ends = torch.stack([loc - 1.5, loc + 1.5], -1)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones_like(ends)), dist.Normal(ends, 0.6))


def _categorical(loc: Tensor) -> Any:
    return dist.Categorical(logits=torch.stack([0 * loc, loc, 0.5 * loc + 0.3, -loc], -1))


FAMILIES = {
    "normal": Family(lambda loc: dist.Normal(loc, 1.0), "real"),
    "student": Family(lambda loc: dist.StudentT(3.0, loc, 1.0), "real"),
    "laplace": Family(lambda loc: dist.Laplace(loc, 0.8), "real"),
    "gumbel": Family(lambda loc: dist.Gumbel(loc, 0.8), "real"),
    "cauchy": Family(lambda loc: dist.Cauchy(loc, 0.5), "real"),
    "mixture": Family(_mixture, "real"),
    "lognormal": Family(lambda loc: dist.LogNormal(0.5 * loc, 0.6), "positive"),
    "gamma": Family(lambda loc: dist.Gamma(2.0, torch.exp(-0.5 * loc)), "positive"),
    "exponential": Family(lambda loc: dist.Exponential(torch.exp(-0.5 * loc)), "positive"),
    "halfnormal": Family(lambda loc: dist.HalfNormal(torch.exp(0.3 * loc)), "positive"),
    "inversegamma": Family(lambda loc: dist.InverseGamma(3.0, torch.exp(0.5 * loc)), "positive"),
    "weibull": Family(lambda loc: dist.Weibull(torch.exp(0.3 * loc), 1.5), "positive"),
    "beta": Family(lambda loc: dist.Beta(1.0 + torch.exp(0.5 * loc), 2.0 + 0 * loc), "interval"),
    "kumaraswamy": Family(lambda loc: dist.Kumaraswamy(1.0 + torch.exp(0.3 * loc), 2.0 + 0 * loc), "interval"),
    "uniform": Family(lambda loc: dist.Uniform(loc - 1.5, loc + 1.5), "interval"),
    "vonmises": Family(lambda loc: dist.VonMises(torch.tanh(loc), torch.ones_like(loc)), "circle"),
    "bernoulli": Family(lambda loc: dist.Bernoulli(logits=loc), "finite", 1),
    "categorical": Family(_categorical, "finite", 3),
    "binomial": Family(lambda loc: dist.Binomial(5, logits=0.5 * loc), "finite", 5),
    "poisson": Family(lambda loc: dist.Poisson(torch.exp(0.3 * loc)), "finite", 40),
    "geometric": Family(lambda loc: dist.Geometric(torch.sigmoid(0.5 + 0.3 * loc)), "finite", 60),
}

LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda f: dist.Normal(f, 0.5),
    "student": lambda f: dist.StudentT(4.0, f, 0.5),
    "poisson": lambda f: dist.Poisson(torch.exp(f.clamp(-4, 3))),
    "bernoulli": lambda f: dist.Bernoulli(logits=2 * f),
    "binomial": lambda f: dist.Binomial(8, logits=f),
}

LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda z: torch.tanh(0.7 * z),
    "cos": torch.cos,
    "bump": lambda z: 2 * z * z / (1 + z * z) - 1,
}

# Guides that fit, guides that fit badly, and guides that cannot fit, which may be refused.
COVERING = ("fitted", "fitted", "wide", "prior", "narrow", "shifted")
BROKEN = ("truncated", "missing", "point", "relaxed")


@dataclass
class Site:
    """One latent of the specification."""

    name: str
    family: Family
    label: str
    copies: int
    offset: float
    slope: float
    weight: float
    link: str
    guide: str
    fit: dict[str, Tensor] = field(default_factory=dict)  # of its posterior, per datum and copy


@dataclass
class Case:
    """A pair, its data and the truth."""

    seed: int
    sites: list[Site]
    likelihood: str
    num_dims: int
    bonus: tuple[float, float] | None
    guide_factor: float | None
    dtype: torch.dtype
    x: Tensor
    mask: Tensor | None
    truth: np.ndarray
    covers: bool
    observes: str = "data"  # or "residual", what is left of them; or "stretched", which lacks a Jacobian and must be refused

    @property
    def data(self) -> Any:
        """What the scoring functions are given."""
        return self.x if self.mask is None else (self.x, self.mask)

    def describe(self) -> str:
        """One line that names what the pair is made of."""
        sites = ", ".join(f"{s.label}{'x2' if s.copies == 2 else ''} ({s.guide} guide)" for s in self.sites)
        extras = [self.likelihood, str(self.dtype)[6:]]
        extras += ["masked"] if self.mask is not None else []
        extras += [f"factor {self.bonus}"] if self.bonus else []
        extras += ["factor in the guide"] if self.guide_factor else []
        extras += [self.observes] if self.observes != "data" else []
        return f"seed {self.seed}: {sites}; {', '.join(extras)}"

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        """p(x, z)."""
        with pyro.plate("data", x.shape[0]):
            total = x.new_zeros(x.shape[0])
            for site in self.sites:
                total = total + self._draw(site, site.family.make(site.offset + site.slope * total))
            each = total[..., None].expand(*total.shape, self.num_dims)
            distribution = LIKELIHOODS[self.likelihood](each if self.observes == "data" else 0 * each)
            value = {"data": x, "residual": x - each, "stretched": x * (1 + each.square())}[self.observes]
            pyro.sample("x", (distribution if mask is None else distribution.mask(mask)).to_event(1), obs=value)
            if self.bonus is not None:
                pyro.factor("bonus", self.bonus[0] + self.bonus[1] * torch.tanh(total))

    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """q(z|x), by looking up what was fitted to each datum."""
        same = (x[:, None] == self.x).all(-1)
        if mask is not None:
            same = ((x[:, None] == self.x) | ~mask[:, None]).all(-1) & (mask[:, None] == self.mask).all(-1)
        rows = same.to(torch.long).argmax(1)
        with pyro.plate("data", x.shape[0]):
            total = x.new_zeros(x.shape[0])
            for site in self.sites:
                total = total + self._draw(site, self._guide_law(site, site.offset + site.slope * total, rows))
            if self.guide_factor is not None:
                pyro.factor("in_guide", torch.full_like(x[:, 0], self.guide_factor))

    def _draw(self, site: Site, distribution: Any) -> Tensor:
        if site.copies == 1:
            return site.weight * LINKS[site.link](pyro.sample(site.name, distribution).to(self.dtype))
        with pyro.plate(f"plate_{site.name}", 2, dim=-2):
            z = pyro.sample(site.name, distribution)
        return site.weight * LINKS[site.link](z.to(self.dtype)).sum(-2, keepdim=True)

    def _guide_law(self, site: Site, loc: Tensor, rows: Tensor) -> Any:
        fit = {name: (value[:, rows] if site.copies == 2 else value[0, rows]) for name, value in site.fit.items()}
        own = site.family.make(loc)
        return _guide_law(site, own, fit)


def _guide_law(site: Site, own: Any, fit: dict[str, Tensor]) -> Any:
    how, kind = site.guide, site.family.kind
    if how == "prior":
        return own
    mean, std = fit["mean"], fit["std"]
    if how == "point":
        return dist.Delta(mean if kind != "finite" else mean.round())
    if how == "relaxed":
        return dist.Normal(mean, std + 0.1) if kind == "finite" else dist.Poisson(mean.abs() + 0.1)
    if kind == "finite":
        return _finite_guide(site, fit)
    std = std * {"wide": 2.0, "narrow": 0.3}.get(how, 1.1)
    mean = mean + (2.5 * std if how == "shifted" else 0.0)
    if kind == "circle":
        return dist.VonMises(mean, 1 / std.square().clamp(min=0.02))
    if how == "truncated":
        base = dist.Uniform(mean - 1.5 * std, mean + 1.5 * std)
    else:
        base = dist.StudentT(5.0, mean, std) if site.name != "z2" or how == "wide" else dist.Normal(mean, std)
    if kind == "real":
        return base
    if kind == "positive":
        return dist.TransformedDistribution(base, [dist.transforms.ExpTransform()])
    low, high = _bounds(own)
    return dist.TransformedDistribution(base, [SigmoidTransform(), AffineTransform(low, high - low)])


def _finite_guide(site: Site, fit: dict[str, Tensor]) -> Any:
    how, probs, mean = site.guide, fit["probs"], fit["mean"]
    if site.label in ("bernoulli", "categorical"):
        flat = {"wide": 0.5, "fitted": 0.1, "shifted": 0.02, "narrow": 0.002}.get(how, 0.1)
        probs = (1 - flat) * probs + flat / probs.shape[-1]
        if how in ("missing", "truncated"):
            probs = torch.where(probs == probs.amax(-1, keepdim=True), 0.0, probs)
        return dist.Categorical(probs) if site.label == "categorical" else dist.Bernoulli(probs[..., 1])
    shift = {"shifted": 1.5, "narrow": -0.3}.get(how, 0.2)
    mean = (mean + shift).clamp(min=0.1)
    if site.label == "binomial":
        return dist.Binomial(3 if how in ("missing", "truncated") else 5, (mean / 5).clamp(0.05, 0.95))
    if how in ("missing", "truncated"):
        return dist.Binomial(2, (mean / 2).clamp(0.05, 0.95))
    return dist.Poisson(mean + 0.3) if site.label == "poisson" else dist.Geometric(1 / (1.3 + mean))


def _bounds(distribution: Any) -> tuple[Tensor, Tensor]:
    return (
        (distribution.low, distribution.high)
        if isinstance(distribution, dist.Uniform)
        else (torch.tensor(0.0), torch.tensor(1.0))
    )


# --- the truth ----------------------------------------------------------------------------------------------------------


def _rule(family: Family, distribution: Any, number: int) -> tuple[Tensor, Tensor]:
    """Values of one latent and the logarithms of their weights, both with the grid first."""
    shape = [1] * len(distribution.batch_shape)
    if family.kind == "finite":
        values = torch.arange(family.most + 1, dtype=torch.float64).reshape(-1, *shape)
        return values, torch.zeros_like(values)
    if family.kind in ("real", "positive"):
        t = torch.linspace(-12, 12, number, dtype=torch.float64)
        if family.kind == "real":
            values, slope = t.sinh(), t.cosh()
        else:
            s = 3 * (t / 4).sinh()  # reaches exp(-30) and exp(30)
            values, slope = s.exp(), s.exp() * 0.75 * (t / 4).cosh()
    elif family.kind == "circle":
        t = torch.linspace(-math.pi, math.pi, number, dtype=torch.float64)
        values, slope = t, torch.ones_like(t)
    else:
        t = torch.linspace(-30, 30, number, dtype=torch.float64)
        s = 3 * (t / 8).sinh()
        values, slope = torch.sigmoid(s), torch.sigmoid(s) * torch.sigmoid(-s) * 0.375 * (t / 8).cosh()
    weights = torch.full_like(t, float(t[1] - t[0])) * slope
    weights[[0, -1]] /= 2
    values, weights = values.reshape(-1, *shape), weights.reshape(-1, *shape)
    if family.kind == "interval":
        low, high = _bounds(distribution)
        values, weights = low + (high - low) * values, weights * (high - low)
    return values, weights.log()


def integrate(case: Case, number: int) -> tuple[Tensor, list[tuple[Site, int, Tensor, Tensor]]]:
    """Log p(x) of each datum, and for each scalar latent its grid and the posterior over it."""
    latents = [(site, copy) for site in case.sites for copy in range(site.copies)]
    axes = len(latents)
    total = torch.zeros([1] * (axes + 1), dtype=torch.float64)
    log_joint = torch.zeros_like(total)
    grids = []
    axis = 0
    for site in case.sites:
        distribution = site.family.make(site.offset + site.slope * total)
        added = torch.zeros_like(total)
        for _ in range(site.copies):
            values, log_weights = _rule(site.family, distribution, number)
            # The grid came first: put it at this latent's own axis, where its parents have one entry.
            values, log_weights = (v.transpose(0, axis + 1).squeeze(0) for v in (values, log_weights))
            log_prob = distribution.log_prob(values)
            log_prob = torch.where(log_prob.isnan(), -math.inf, log_prob)
            log_joint = log_joint + log_prob + log_weights
            added = added + site.weight * LINKS[site.link](values)
            grids.append(values)
            axis += 1
        total = total + added
    x = case.x.double().T  # (D, N)
    like = torch.zeros_like(log_joint)
    for column in range(case.num_dims):
        term = LIKELIHOODS[case.likelihood](total).log_prob(x[column])
        if case.observes == "stretched":
            stretch = 1 + total.square()
            term = LIKELIHOODS[case.likelihood](0 * total).log_prob(x[column] * stretch) + stretch.log()
        like = like + (term if case.mask is None else torch.where(case.mask[:, column], term, 0.0))
    if case.bonus is not None:
        like = like + case.bonus[0] + case.bonus[1] * torch.tanh(total)
    joint = log_joint + like
    over = tuple(range(axes))
    truth = torch.logsumexp(joint, over)
    posterior = torch.exp(joint - truth)
    found = []
    for place, (site, copy) in enumerate(latents):
        others = tuple(a for a in over if a != place)
        found.append((site, copy, grids[place], posterior.sum(others) if others else posterior))
        if grids[place].numel() != grids[place].shape[place]:  # the grid depends on earlier latents
            moved = (
                (posterior * _flat(site, grids[place], case)).sum(over),
                (posterior * _flat(site, grids[place], case).square()).sum(over),
            )
            found[-1] = (site, copy, torch.stack(moved), torch.empty(0))
    return truth, found


def _flat(site: Site, values: Tensor, case: Case) -> Tensor:
    """A latent's values on the whole line."""
    if site.family.kind == "positive":
        return values.log()
    if site.family.kind == "interval":
        low, high = (0.0, 1.0) if site.label != "uniform" else (values.amin(), values.amax())
        unit = ((values - low) / (high - low)).clamp(1e-12, 1 - 1e-12)
        return unit.log() - (-unit).log1p()
    return values


def _fit(case: Case, found: list[tuple[Site, int, Tensor, Tensor]]) -> None:
    """What the guides are made of: moments of the posterior of each latent."""
    for site in case.sites:
        parts = [(values, weights) for at, _, values, weights in found if at is site]
        means, stds, probs = [], [], []
        for values, weights in parts:
            if not weights.numel():
                mean, square = values
                means.append(mean)
                stds.append((square - mean.square()).clamp(min=0.01).sqrt())
                continue
            flat = _flat(site, values.flatten(), case)[:, None]
            if site.family.kind == "circle":
                mean = torch.atan2((weights * flat.sin()).sum(0), (weights * flat.cos()).sum(0))
                apart = torch.remainder(flat - mean + math.pi, 2 * math.pi) - math.pi
            else:
                mean = (weights * flat).sum(0)
                apart = flat - mean
            means.append(mean)
            stds.append((weights * apart.square()).sum(0).clamp(min=1e-3).sqrt().clamp(max=20))
            probs.append(weights)
        site.fit = {"mean": torch.stack(means).to(case.dtype), "std": torch.stack(stds).to(case.dtype)}
        if site.family.kind == "finite":
            site.fit["probs"] = torch.stack(probs).movedim(1, -1).to(case.dtype)  # (copies, N, values)


# --- one case -----------------------------------------------------------------------------------------------------------


def make_case(seed: int, num_data: int = 4) -> Case:
    """The pair of a seed."""
    rng = random.Random(seed)
    numbers = rng.choice([1, 1, 2, 2, 3])
    broken = rng.random() < 0.25
    sites: list[Site] = []
    scalars = 0
    for index in range(numbers):
        label = rng.choice(list(FAMILIES))
        copies = 2 if scalars + 2 <= 3 and numbers - index <= 2 and rng.random() < 0.2 else 1
        if scalars + copies > 3:
            break
        scalars += copies
        link = "cos" if label == "vonmises" else rng.choice(["tanh", "tanh", "bump"])
        sites.append(
            Site(
                f"z{index}",
                FAMILIES[label],
                label,
                copies,
                rng.uniform(-0.5, 0.5),
                rng.choice([0.0, 0.5, 1.0]) if index else 0.0,
                rng.uniform(0.5, 1.5) * rng.choice([-1, 1]),
                link,
                rng.choice(COVERING),
            )
        )
    if broken:
        rng.choice(sites).guide = rng.choice(BROKEN)
    likelihood, num_dims = rng.choice(list(LIKELIHOODS)), rng.choice([1, 1, 2, 3])
    bonus = (rng.choice([0.0, -3.0, -1e4, -1e6]), rng.choice([0.0, 0.5])) if rng.random() < 0.2 else None
    guide_factor = 1.5 if rng.random() < 0.05 else None
    dtype = torch.float32 if rng.random() < 0.5 else torch.float64
    masked = rng.random() < 0.2
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_data, num_dims, generator=generator) < 0.7 if masked else None
    covers = not broken and guide_factor is None
    chance = (
        random.Random(seed + 3).random() if likelihood == "normal" else 1.0
    )  # apart, so that other seeds stay the same pairs
    case = Case(
        seed, sites, likelihood, num_dims, bonus, guide_factor, dtype, torch.zeros(num_data, num_dims, dtype=dtype), mask,
        np.zeros(num_data), covers,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        case.x = (
            pyro.poutine.trace(pyro.poutine.uncondition(case.model))
            .get_trace(*_args(case))
            .nodes["x"]["value"]
            .reshape(num_data, num_dims)
            .to(dtype)
        )
    if chance < 0.3:
        case.observes = "residual" if chance < 0.2 else "stretched"
        case.covers = covers and case.observes == "residual"
    coarse, fine = {1: (401, 801), 2: (241, 401), 3: (81, 121)}[sum(site.copies for site in sites)]
    with pyro.validation_enabled(False):  # a grid may reach the edge of a support
        before, _ = integrate(case, coarse)
        truth, found = integrate(case, fine)
    case.truth = truth.numpy()
    if float((truth - before).abs().max()) > 5e-3 or not bool(torch.isfinite(truth).all()):
        return make_case(seed + 10**6, num_data)  # a truth that is not one judges nothing
    _fit(case, found)
    return case


def _args(case: Case) -> tuple[Tensor, ...]:
    return (case.x,) if case.mask is None else (case.x, case.mask)


def methods(case: Case) -> dict[str, Callable[[], pv.Evidence]]:
    """The ways in which this pair is scored."""
    rng = random.Random(case.seed + 1)
    pair: tuple[Any, ...] = (case.model, case.guide, case.data)
    ways: dict[str, Callable[[], pv.Evidence]] = {
        "guide": lambda: pv.log_marginal(*pair, num_samples=2000, seed=case.seed, compile=False)
    }
    if rng.random() < 0.3:
        ways["mixture"] = lambda: pv.log_marginal(*pair, num_samples=2000, proposal="mixture", seed=case.seed, compile=False)
    if rng.random() < 0.15:
        ways["target"] = lambda: pv.log_marginal(*pair, num_samples=4000, target_se=0.03, seed=case.seed, compile=False)
    finite = all(site.family.kind == "finite" for site in case.sites)
    listed = all(site.label in ("bernoulli", "categorical", "binomial") for site in case.sites)
    continuous = all(site.family.kind != "finite" for site in case.sites)
    scalars = sum(site.copies for site in case.sites)
    if rng.random() < 0.3 and ((finite and listed) or (continuous and scalars <= 2)):
        ways["exact"] = lambda: pv.exact(*pair)
    if rng.random() < 0.05 and continuous:
        ways["refined"] = lambda: pv.log_marginal(*pair, num_samples=2000, proposal="refined", seed=case.seed, compile=False)
    if rng.random() < 0.3:
        ways["auto"] = lambda: pv.log_marginal(*pair, num_samples=2000, proposal="auto", seed=case.seed, compile=False)
    return ways


def judge(seed: int) -> list[dict[str, Any]]:
    """Score a seed's pair in its ways; one record each, with the violation if there is one."""
    case = make_case(seed)
    records = []
    for name, score in methods(case).items():
        record: dict[str, Any] = {"seed": seed, "method": name, "pair": case.describe()}
        pyro.clear_param_store()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                evidence = score()
        except ValueError as error:
            record |= {"outcome": "refused", "why": str(error)}
            if case.covers:
                record["violation"] = "a sound pair is refused"
        except Exception as error:  # the record is what a crash of any kind is for
            record |= {"outcome": "crashed", "why": f"{type(error).__name__}: {error}", "violation": "it crashed"}
        else:
            off = np.abs(evidence.log_px - case.truth)
            wrong = evidence.reliable & ~(off <= np.maximum(MOST_NATS, MOST_SE * evidence.se))
            record |= {"outcome": "scored", "reliable": int(evidence.reliable.sum()), "data": len(off)}
            if wrong.any():
                record["violation"] = "reliable and wrong"
                record |= {
                    "row": int(wrong.argmax()), "off": (evidence.log_px - case.truth)[wrong].tolist(),
                    "se": evidence.se[wrong].tolist(), "khat": evidence.khat[wrong].tolist(),
                }  # fmt: skip
        records.append(record)
    return records


def main() -> None:
    """Judge many seeds, print what is wrong, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, records = time.time(), []
    seeds = range(options.first, options.first + options.pairs)
    with multiprocessing.get_context("spawn").Pool(options.processes, torch.set_num_threads, (1,)) as pool:
        for found in pool.imap(judge, seeds):
            records += found
            for record in found:
                if "violation" in record:
                    print(json.dumps(record), flush=True)
    outcomes = Counter(f"{record['method']}: {record['outcome']}" for record in records)
    violations = [record for record in records if "violation" in record]
    data = sum(record.get("data", 0) for record in records)
    reliable = sum(record.get("reliable", 0) for record in records)
    summary = {
        "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began), "machine": platform.machine(),
        "torch": torch.__version__, "pyro": pyro.__version__, "pyrovae": pv.__version__,
        "pairs": options.pairs, "first_seed": options.first, "outcomes": dict(outcomes), "estimates": data,
        "reliable": reliable, "violations": violations,
    }  # fmt: skip
    print(f"{options.pairs} pairs, {data} estimates, {reliable} reliable, {len(violations)} violations; {dict(outcomes)}")
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
