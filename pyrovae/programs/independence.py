"""Checks that a datum's log-weight does not depend on other data or particles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .sites import Program, data_plate, latents_of, log_prob_of, per_datum, plates_of, sites_of
from .tracing import Substitute, explained, same_random_stream, trace_pair, trace_program

__all__ = ["COSTLY_DRAWS", "COVERAGE_DRAWS", "PROBED_ROWS", "ProbeError", "check_independence"]

# The number of data on which a pair is probed, unless its programs run on all data only.
PROBED_ROWS = 4
# The number of prior draws at which the guide is scored: in one pass, and if a flow inverts number by number.
COVERAGE_DRAWS, COSTLY_DRAWS = 64, 2
# The log-probability of each site of both programs, (K, B), with the number of values that it sums over.
Terms = dict[tuple[str, str], tuple[Tensor, int]]
Latents = dict[str, Tensor]


class ProbeError(ValueError):
    """A pair whose data or particles depend on each other; the message names the cause and the cure."""


class _Rows:
    """A pair on a few rows, each with two draws of the latents."""

    def __init__(self, model: Program, guide: Program, args: tuple[Tensor, ...], nesting: int):
        self.model, self.guide, self.args, self.nesting = model, guide, args, nesting
        self.num_data = len(args[0])
        self.sites, self.data = _latent_sites(model, guide, args)
        second, _ = _latent_sites(model, guide, args)
        self.draws: list[Latents] = [{name: site["value"] for name, site in sites.items()} for sites in (self.sites, second)]

    def terms(self, args: tuple[Tensor, ...], latents: Latents, num: int = 1) -> Terms:
        """The log-probability of each site at given latents."""
        found: Terms = {}
        with explained(num):
            for program in (self.guide, self.model):
                trace = trace_program(program, args, num, self.nesting, Substitute(latents))
                # What the guide observes is not a part of q(z|x).
                sites = list(sites_of(trace)) if program is self.model else latents_of(trace)
                data = _frame(sites, self.data.name)
                for site in sites:
                    try:
                        log_prob = log_prob_of(site)
                    except (NotImplementedError, KeyError):  # a flow that cannot be inverted
                        continue
                    key = ("guide" if program is self.guide else "model", site["name"])
                    found[key] = (
                        per_datum(site, log_prob, data, num, self.nesting),
                        max(1, site["value"].numel() // (num * self.num_data)) if isinstance(site["value"], Tensor) else 1,
                    )
        return found

    def alone(self, row: int) -> Terms:
        """The terms of one row alone, at the latents that it has among the others."""
        latents = {name: value.narrow(self._axis(name), row, 1) for name, value in self.draws[0].items()}
        return self.terms(tuple(arg[row : row + 1] for arg in self.args), latents)

    def mixed(self, changed: Tensor) -> Latents:
        """The first draw, with the second draw's latents in the changed rows."""
        first, second = self.draws
        return {name: torch.where(self._along(name, changed), second[name], first[name]) for name in first}

    def together(self, *draws: Latents) -> Latents:
        """Draws as the particles of one run."""
        return {name: torch.stack([self._full(name, draw[name]) for draw in draws]) for name in draws[0]}

    def _full(self, name: str, value: Tensor) -> Tensor:
        """A value with all plate dimensions of the pair, so that particles can stand to the left."""
        missing = self.nesting + self.sites[name]["fn"].event_dim - value.dim()
        return value.reshape((1,) * missing + value.shape)

    def _axis(self, name: str) -> int:
        return self.sites[name]["value"].dim() - self.sites[name]["fn"].event_dim + self.data.dim

    def _along(self, name: str, changed: Tensor) -> Tensor:
        axis, value = self._axis(name), self.sites[name]["value"]
        return changed.reshape([-1 if dim == axis else 1 for dim in range(value.dim())])


def check_independence(
    model: Program,
    guide: Program,
    args: tuple[Tensor, ...],
    nesting: int,
    *,
    particles: bool,
    each: bool = True,
    others: tuple[Tensor, ...] | None = None,
) -> bool:
    """Check on a few rows that a datum's terms depend on its own latents and data only.

    Args:
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        args: the rows.
        nesting: plate dimensions that the pair uses.
        particles: whether several particles will run at once.
        each: whether each datum is scored separately; otherwise only particles are checked.
        others: equally many other rows, as replacements; ``None`` for a pair that runs on these rows only.

    Returns:
        Whether a datum's terms depend on its position among the rows.

    Raises:
        ProbeError: a layer draws numbers of its own, or mixes data or particles.
    """
    neighbours = tuple(arg.roll(1, 0) for arg in args) if others is None else others
    with _probing(args):
        rows = _Rows(model, guide, args, nesting)
        once, again = (rows.terms(args, rows.draws[0]) for _ in range(2))
        site = _differs(once, again, _tight)
        if site is not None and each:
            raise ProbeError(
                f"The programs give other numbers for the same latents at site {site!r}, so a dropout layer is in training "
                f"mode, or they draw random numbers outside pyro.sample: call eval() on their modules before scoring, and draw "
                f"random numbers by pyro.sample only."
            )
        mixed = _moved_by_others(rows, lambda changed: (_replaced(args, neighbours, changed), rows.mixed(changed)), once)
        if mixed is not None and each:
            raise ProbeError(
                f"The numbers of a datum depend on the other data of its batch at site {mixed!r}, so log p(x) is not "
                f"defined for one datum: a layer mixes data, such as batch norm in training mode (call eval() on it), "
                f"roll, attention over the batch, or a sum over it."
            )
        if site is not None or mixed is not None:
            return False
        in_place = each and others is not None and _depends_on_place(rows, once)
        if particles:
            _check_particles(rows, once, neighbours)
    return in_place


def _depends_on_place(rows: _Rows, once: Terms) -> bool:
    """Whether a row has other terms alone than in its position. It refuses a pair whose terms depend on the number of rows."""
    for row in (0, rows.num_data - 1) if rows.num_data > 1 else ():
        try:
            alone = rows.alone(row)
        except (ValueError, RuntimeError, IndexError):
            return row > 0
        site = _differs({key: (term[:, row : row + 1], size) for key, (term, size) in once.items()}, alone, _loose(rows, row))
        if site is not None and row == 0:
            raise ProbeError(
                f"A datum has other numbers alone than beside others at site {site!r}, so log p(x) depends on the size of the "
                f"batch: let each datum's distributions depend on its own row only."
            )
        if site is not None:
            return True
    return False


def _check_particles(rows: _Rows, once: Terms, others: tuple[Tensor, ...]) -> None:
    """Refuse a pair whose particles have other terms together than one by one."""
    first, second = rows.draws
    together, alone = rows.terms(rows.args, rows.together(first, second), 2), rows.terms(rows.args, second)
    # A flow that is not inverted has a density only where it has just drawn.
    known = [key for key in together if key in once and key in alone]
    by_itself = {key: (torch.cat([once[key][0], alone[key][0]]), together[key][1]) for key in known}
    site = _differs(together, by_itself, _loose(rows))
    if site is None:
        for particle, draw in enumerate(rows.draws):
            twice = rows.terms(rows.args, rows.together(draw, draw), 2)
            same = {key: (term[particle : particle + 1], size) for key, (term, size) in twice.items()}
            wanted = {key: (term[particle : particle + 1], size) for key, (term, size) in together.items()}
            site = site or _differs(wanted, same, _tight)
    if site is None:

        def change(changed: Tensor) -> tuple[tuple[Tensor, ...], Latents]:
            mixed = rows.mixed(changed)
            return _replaced(rows.args, others, changed), rows.together(mixed, rows.mixed(~changed))

        wanted = {key: (term[:1], size) for key, (term, size) in together.items()}
        site = _moved_by_others(rows, change, wanted, 2)
    if site is not None:
        raise ProbeError(
            f"Several particles at once give other numbers than one by one at site {site!r}, so a layer mixes particles or "
            f"data, as softmax(dim=1) does where particles stand on the left: count its dimensions from the right, such as "
            f"dim=-1, or pass vectorize_particles=False."
        )


def _moved_by_others(
    rows: _Rows, change: Callable[[Tensor], tuple[tuple[Tensor, ...], Latents]], wanted: Terms, num: int = 1
) -> str | None:
    """The first site whose terms change when only other rows do."""
    odd = torch.arange(rows.num_data, device=rows.args[0].device) % 2 == 1
    for changed in (odd, ~odd) if rows.num_data > 1 else ():
        try:
            moved = rows.terms(*change(changed), num)
        except (ValueError, RuntimeError, IndexError):  # such as a program of sequences that must be sorted by length
            continue
        kept = {key: (term[:1, ~changed], size) for key, (term, size) in moved.items()}
        site = _differs({key: (term[:, ~changed], size) for key, (term, size) in wanted.items()}, kept, _tight)
        if site is not None:
            return site
    return None


def _replaced(args: tuple[Tensor, ...], others: tuple[Tensor, ...], changed: Tensor) -> tuple[Tensor, ...]:
    pairs = zip(args, others, strict=True)
    return tuple(torch.where(changed.reshape(-1, *[1] * (arg.dim() - 1)), other, arg) for arg, other in pairs)


def _differs(wanted: Terms, found: Terms, tolerance: Callable[[tuple[str, str], Tensor, int], Tensor]) -> str | None:
    """The first site whose terms differ by more than the tolerance."""
    for key, (term, size) in wanted.items():
        if key not in found:
            continue
        other = found[key][0]
        same = (term == other) | (term.isnan() & other.isnan()) | ((term - other).abs() <= _tight(key, term, size))
        if not bool(same.all()) and not bool((same | ((term - other).abs() <= tolerance(key, term, size))).all()):
            return key[1]
    return None


def _tight(_: tuple[str, str], term: Tensor, size: int) -> Tensor:
    # The shapes are the same, and so is rounding, unless shapes inside a program depend on its data.
    return 256 * torch.finfo(term.dtype).eps * (term.abs() + size)


def _loose(rows: _Rows, row: int | None = None) -> Callable[[tuple[str, str], Tensor, int], Tensor]:
    """A tolerance for terms computed in other shapes: a multiple of the effect of rounding latents and data."""
    nudged: dict[tuple[str, str], Tensor] = {}

    def tolerance(key: tuple[str, str], term: Tensor, size: int) -> Tensor:
        if not nudged:
            for draw in rows.draws:
                latents, plain = {name: _nudged(value) for name, value in draw.items()}, rows.terms(rows.args, draw)
                for each, (value, _) in rows.terms(tuple(map(_nudged, rows.args)), latents).items():
                    if each not in plain:
                        continue
                    moved = (value - plain[each][0]).abs()
                    moved = torch.where(moved.isfinite(), moved, torch.inf)
                    nudged[each] = torch.maximum(nudged.get(each, moved), moved)
        moved = nudged.get(key, torch.zeros_like(term))
        moved = moved if row is None or key not in nudged else moved[:, row : row + 1]
        return torch.finfo(term.dtype).eps ** 0.5 * (term.abs() + size) + 1000 * moved

    return tolerance


def _nudged(value: Tensor) -> Tensor:
    # Towards zero, so that counts, positive numbers and probabilities stay valid.
    return value * (1 - 8 * torch.finfo(value.dtype).eps) if value.is_floating_point() else value


def _latent_sites(model: Program, guide: Program, args: tuple[Tensor, ...]) -> tuple[dict[str, dict], Any]:
    """The guide's latent sites from one run, with the values on which the model ran, and the data plate."""
    traces = trace_pair(model, guide, args, {}, 1, None)
    latents = {site["name"]: site for site in sites_of(traces.guide) if not site["is_observed"]}
    for name in set(latents).intersection(traces.model.nodes):
        latents[name] = {**latents[name], "value": traces.model.nodes[name]["value"]}
    return latents, data_plate([*sites_of(traces.model), *sites_of(traces.guide)])


def _frame(sites: list[dict], name: str) -> Any:
    """The plate of this name at the sites."""
    return next(frame for site in sites for frame in plates_of(site) if frame.name == name)


@contextmanager
def _probing(args: tuple[Tensor, ...]) -> Iterator[None]:
    with torch.no_grad(), same_random_stream(args), pyro.validation_enabled(False), poutine.block():
        yield
