"""The decomposition of log p(x) into bound and gap, and of the rate into information and aggregate KL."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._validation import positive_integer
from ..evidence.importance import log_marginal
from ..evidence.results import Evidence
from ..programs.sites import Program
from ..programs.state import in_own_scope
from ..tables import Table, Tabular
from .posterior import Array, PairOnData

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["Decomposition", "decompose"]


@dataclass(frozen=True)
class Decomposition(Tabular):
    r"""The parts of the gap between the ELBO and log p(x), and of the rate of the latents.

    .. math::
        \log p(x) &= \underbrace{-\text{distortion}(x) - \text{rate}(x)}_{\text{ELBO}(x)}
            + \underbrace{\mathrm{KL}(q(z|x) \,\|\, p(z|x))}_{\text{gap}(x)} \\
        \text{gap}(x) &= \underbrace{\log p(x) - \text{ELBO}^*(x)}_{\text{approximation}}
            + \underbrace{\text{ELBO}^*(x) - \text{ELBO}(x)}_{\text{amortisation}} \\
        \frac1N \sum_n \text{rate}(x_n) &= I_q(x; z) + \mathrm{KL}(q(z) \,\|\, p(z)), \quad q(z) = \frac1N \sum_n q(z|x_n)

    Here ELBO* is the bound of the guide's family fitted to each datum separately. Arrays are over N data, in nats.

    Attributes:
        evidence: log p(x), with its diagnostics.
        rate: KL(q(z|x) || p(z)), shape (N,).
        distortion: minus the expected log-likelihood under q(z|x), shape (N,).
        rate_se: the rate's standard error from sampling, shape (N,); zero if the rate has a closed form.
        distortion_se: the distortion's, shape (N,).
        elbo_se: the bound's, shape (N,).
        information: each datum's part of the mutual information, shape (N,). Its mean cannot exceed log N.
        mean_variances: by continuous site, the variance over data of each dimension's posterior mean.
        refined: ELBO* of each datum, shape (N,), if it was given.
        num_draws: draws per datum of the expectations.
        closed_form: sites whose rate has a closed form.
    """

    evidence: Evidence
    rate: Array
    distortion: Array
    rate_se: Array
    distortion_se: Array
    elbo_se: Array
    information: Array
    mean_variances: dict[str, Array]
    refined: Array | None
    num_draws: int
    closed_form: tuple[str, ...]

    def __len__(self) -> int:
        """N, the number of data."""
        return len(self.rate)

    @property
    def elbo(self) -> Array:
        """The evidence lower bound, minus rate minus distortion, shape (N,)."""
        return -self.rate - self.distortion

    @property
    def gap(self) -> Array:
        """An estimate of KL(q(z|x) || p(z|x)), shape (N,); noise may bring it below zero."""
        return self.evidence.log_px - self.elbo

    @property
    def approximation(self) -> Array | None:
        """The part of the gap that remains when the guide's family is fitted to each datum, shape (N,)."""
        return None if self.refined is None else self.evidence.log_px - self.refined

    @property
    def amortisation(self) -> Array | None:
        """The part of the gap that fitting the guide to the datum closes, shape (N,)."""
        return None if self.refined is None else self.refined - self.elbo

    @property
    def mutual_information(self) -> float:
        """I_q(x; z) between these data and their latents, in nats; at most log N."""
        return float(np.mean(self.information))

    @property
    def aggregate_kl(self) -> float:
        """KL(q(z) || p(z)) of the aggregate posterior over these data, in nats: the mean rate less the information."""
        return float(np.mean(self.rate)) - self.mutual_information

    @property
    def active_units(self) -> dict[str, int]:
        """By continuous site, the dimensions whose posterior mean varies over data by more than 0.01 (Burda 2016)."""
        return {name: int((variances > ACTIVE_VARIANCE).sum()) for name, variances in self.mean_variances.items()}

    def rows(self) -> list[tuple[str, float, float, str]]:
        """The rows of the table: a name, the mean in nats per datum, its standard error from sampling, and a description."""

        def error(values: Array) -> float:
            return float(np.sqrt(np.sum(values**2)) / len(self))

        from_data = float(np.std(self.information, ddof=1) / math.sqrt(len(self))) if len(self) > 1 else math.nan
        evidence, nan = self.evidence, math.nan
        noise = math.hypot(evidence.mean_se, error(self.elbo_se))
        limit = "up to " if evidence.drawn is not None else ""
        source = f"estimate, {limit}{evidence.num_samples:,} {'chains' if evidence.is_annealed else 'samples'}"
        rows = [
            ("log p(x)", evidence.mean, evidence.mean_se, "exact" if evidence.is_exact else source),
            ("ELBO", float(np.mean(self.elbo)), error(self.elbo_se), "lower bound, -rate - distortion"),
            ("gap", float(np.mean(self.gap)), noise, "KL(q(z|x) || p(z|x))"),
        ]
        if self.approximation is not None and self.amortisation is not None:
            rows += [
                ("  approximation", float(np.mean(self.approximation)), nan, "left by the guide's family"),
                ("  amortisation", float(np.mean(self.amortisation)), nan, "won by fitting each datum"),
            ]
        most = f"I_q(x; z), at most log N = {math.log(len(self)):.3f}"
        rows += [
            ("rate", float(np.mean(self.rate)), error(self.rate_se), "KL(q(z|x) || p(z))"),
            ("  mutual information", self.mutual_information, from_data, most),
            ("  aggregate KL", self.aggregate_kl, math.hypot(from_data, error(self.rate_se)), "KL(q(z) || p(z))"),
            ("distortion", float(np.mean(self.distortion)), error(self.distortion_se), "-E log p(x|z)"),
        ]
        return rows

    def __repr__(self) -> str:
        """One line: the means of the parts."""
        parts = ", ".join(f"{name.strip()}={mean:.4g}" for name, mean, _, _ in self.rows() if not name.startswith(" "))
        return f"Decomposition({parts} nats, {len(self)} data)"

    def __str__(self) -> str:
        """A table of 80 columns."""
        return self.table().text()

    def table(self) -> Table:
        """The parts as a table, with their standard errors from sampling."""
        rows = [
            [name, f"{mean:.3f}", "-" if math.isnan(error) else f"{error:.3f}", what] for name, mean, error, what in self.rows()
        ]
        notes = []
        for name, active in self.active_units.items():
            line = f"active units: {active} of {self.mean_variances[name].size} in {name}"
            notes.append(line if len(line) <= 80 else line[:79] + "…")
        bad = int((~self.evidence.reliable).sum())
        if bad:
            notes.append(f"{bad} of {len(self)} estimates of log p(x) are unreliable, so the gap is too small there")
        return Table(["nats per datum", "mean", "se", ""], rows, left=(0, 3), notes=notes)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the parts that add up to minus log p(x) as one bar: distortion, rate, and the gap taken off again.

        Args:
            ax: the axes to draw on; by default new ones, which Jupyter shows.
        """
        from ..plots import BLUE, ORANGE, _bare, _number, _plain_ticks, new_axes

        ax = new_axes(ax, (7, 2.6))
        distortion, rate, gap = (float(np.mean(part)) for part in (self.distortion, self.rate, self.gap))
        total = -self.evidence.mean
        bars = [
            ("distortion", 0.0, distortion, BLUE, ""),
            ("+ rate", distortion, rate, BLUE, "//"),
            ("− gap", total, gap, ORANGE, ".."),
            ("− log p(x)", 0.0, total, "0.55", ""),
        ]
        for row, (_, start, width, colour, hatch) in enumerate(bars):
            ax.barh(row, width, left=start, color=colour, hatch=hatch, edgecolor="white", height=0.62)
            ax.annotate(_number(width), (start + max(width, 0.0), row), (4, 0), textcoords="offset points", va="center")
        ax.set_yticks(range(len(bars)), [bar[0] for bar in bars])
        ax.invert_yaxis()
        ax.set_xlim(right=1.12 * (distortion + rate))
        ax.set_xlabel("nats per datum")
        _plain_ticks(ax.xaxis)
        _bare(ax, "x")
        return ax

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each datum: log p(x), the bound, the gap and its parts, the rate and the distortion, in nats."""
        import pandas

        columns = {
            "log_px": self.evidence.log_px, "elbo": self.elbo, "gap": self.gap, "approximation": self.approximation,
            "amortisation": self.amortisation, "rate": self.rate, "information": self.information,
            "distortion": self.distortion, "reliable": self.evidence.reliable,
        }  # fmt: skip
        frame = pandas.DataFrame({name: column for name, column in columns.items() if column is not None})
        frame.index.name = "datum"
        return frame


# Burda's threshold: a unit is active if the variance of its posterior mean over data exceeds it.
ACTIVE_VARIANCE = 0.01


@in_own_scope()
def decompose(
    model: Program,
    guide: Program,
    x: Any,
    *,
    num_samples: int = 1000,
    num_draws: int = 100,
    mixture_draws: int = 1,
    evidence: Evidence | None = None,
    refined: Any = None,
    vectorize_particles: bool = True,
    seed: int | None = None,
    progress: bool = False,
) -> Decomposition:
    r"""Decompose the gap of the ELBO, and the rate, of any pair.

    The mutual information is :math:`\frac1N \sum_n E_{q(z|x_n)}[\log q(z|x_n) - \log q(z)]` with the exact mixture
    :math:`q(z) = \frac1N \sum_m q(z|x_m)` over all N data, which costs N^2 densities. The rate's other part is the difference,
    so the two add up exactly. Rates use the closed form of KL(q || p) for sites that have one.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: an array or tensor (N, ...), a tuple of them, a Dataset or a DataLoader; all of it is kept in memory.
        num_samples: S, importance samples per datum for log p(x).
        num_draws: draws per datum for rate, distortion and posterior means, at least 2.
        mixture_draws: the number of those draws at which the mixture is evaluated.
        evidence: log p(x) of these data in this order, by any method; by default importance sampling with
            ``proposal="auto"`` estimates it.
        refined: the ELBO of a guide fitted to each datum separately, shape (N,), in nats.
        vectorize_particles: as in :func:`pyrovae.log_weights`.
        seed: a seed, with which the result is reproducible and the global random stream untouched.
        progress: show bars.

    Returns:
        The decomposition, in nats, with arrays over the N data.

    Raises:
        ValueError: bad data, a pair that :func:`pyrovae.log_weights` refuses, or arrays of another length.

    References:
        Hoffman and Johnson, ELBO Surgery, 2016, https://approximateinference.org/2016/accepted/HoffmanJohnson2016.pdf.
        Cremer, Li and Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018, https://arxiv.org/abs/1801.03558.
        Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016, https://arxiv.org/abs/1509.00519.
        Alemi et al., Fixing a Broken ELBO, 2018, https://arxiv.org/abs/1711.00464.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae, x = pv.make_vae(9, latent_dim=2, hidden=[16]), torch.eye(9)
        >>> parts = pv.decompose(vae.model, vae.guide, x, num_samples=100, seed=0)
        >>> bool(abs(parts.rate.mean() - parts.mutual_information - parts.aggregate_kl) < 1e-9)
        True
    """
    num_draws, mixture_draws = positive_integer(num_draws, "num_draws"), positive_integer(mixture_draws, "mixture_draws")
    if num_draws < 2 or mixture_draws > num_draws:
        raise ValueError(f"num_draws must be at least 2 and at least mixture_draws = {mixture_draws}, got {num_draws}.")
    pair = PairOnData(model, guide, x, vectorize_particles)
    if evidence is None:
        evidence = log_marginal(
            model,
            guide,
            pair.arrays,
            num_samples=num_samples,
            proposal="auto",
            seed=seed,
            vectorize_particles=vectorize_particles,
            progress=progress,
        )
    refined = None if refined is None else np.asarray(refined, dtype=float)
    for name, values in (("evidence", evidence.log_px), ("refined", refined)):
        if values is not None and np.shape(values) != (pair.num_data,):
            raise ValueError(f"{name} must have shape ({pair.num_data},), one value for each datum, got {np.shape(values)}.")
    with pair.scoring(None if seed is None else seed + 1):
        parts = [pair.expectations(batch, num_draws, mixture_draws) for batch in pair.batches(num_draws, progress)]
        sites = list(parts[0].latents)
        latents = {site: torch.cat([part.latents[site] for part in parts], 1) for site in sites}
        log_own = torch.cat([part.log_guide for part in parts], 1)
        information = (log_own - pair.log_aggregate(latents, parts[0], progress)).mean(0)
    terms = {name: torch.cat([part.terms[name] for part in parts], 1) for name in parts[0].terms}

    def array(values: Tensor) -> Array:
        return values.double().cpu().numpy()

    return Decomposition(
        evidence=evidence,
        rate=array(terms["rate"][0]),
        distortion=array(terms["distortion"][0]),
        rate_se=array(terms["rate"][1]),
        distortion_se=array(terms["distortion"][1]),
        elbo_se=array(terms["elbo"][1]),
        information=array(information),
        mean_variances={
            name: array(_variance(torch.cat([part.means[name] for part in parts]), torch.cat(noise)))
            for name, noise in ((name, [part.mean_variances[name] for part in parts]) for name in parts[0].means)
        },
        refined=refined,
        num_draws=num_draws,
        closed_form=parts[0].closed_form,
    )


def _variance(means: Tensor, spreads: Tensor) -> Tensor:
    """Variance over data (N, ...) of the means, without what their own sampling noise of variance ``spreads`` adds."""
    if len(means) < 2:
        return torch.zeros_like(means[0])
    return (means.double().var(0) - spreads.double().mean(0)).clamp(min=0)
