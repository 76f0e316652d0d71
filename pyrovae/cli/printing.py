"""What the commands print."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .. import registry
from .._validation import unknown
from ..registry import canonical, find, names
from ..tables import text_table
from .config import Run

if TYPE_CHECKING:
    import torch

    from ..data.datasets import Split
    from ..diagnostics.decomposition import Decomposition
    from ..evidence.results import Evidence
    from ..models.base import PairModule

__all__ = [
    "described_names", "device_name", "likelihood_reason", "print_evidence", "print_name", "print_names", "print_start",
]  # fmt: skip


def print_start(run: Run, split: Split, device: torch.device, vae: PairModule) -> None:
    """Print in a line what is trained, on what and where, and then the source of the data and the reason for the likelihood."""
    size, chosen = sum(each.numel() for each in vae.parameters()), _likelihoods(run, split)[0]
    print(f"{run.model.kind} of {split.name}, {chosen} likelihood, {size:,} parameters, on {device_name(device)}")
    print(textwrap.fill(f"Data: {split.note}.", 80, break_long_words=False, break_on_hyphens=False))
    print(textwrap.fill(f"Likelihood: {likelihood_reason(run, split)}.", 80))


def print_evidence(
    split: Split, quantity: str, evidence: Evidence, parts: Decomposition | None, labels: dict[str, str]
) -> None:
    """Print what was found on the test data."""
    from ..evidence.kinds import KINDS

    unit, units = split.unit, {"image": "images", "datum": "data"}[split.unit]
    reliable, size = int(evidence.reliable.sum()), len(evidence)
    who = "guide" if evidence.kind in (KINDS["guide"], KINDS["auto"]) else "proposal"
    print(f"\nHeld-out {split.name}, {size:,} {units}, in nats per {unit}:")
    width = max(8, len(quantity))

    def line(label: str, value: str, what: str = "") -> None:
        # Long findings go on below, in the same column.
        below = " " * (len(value) + 2 if what else 0)
        first, *rest = textwrap.wrap(f"{value}{what}", 76 - width, subsequent_indent=below, drop_whitespace=False) or [""]
        print(f"  {label:<{width}}  {first}".rstrip())
        for part in rest:
            print(f"{'':<{width + 4}}{below}{part.strip()}")

    if quantity != "log p(x)":
        line("scored", f"{quantity}, each of the {units} given its label")
    line("method", evidence.method)
    line("samples", evidence.effort)
    line("bound", f"{evidence.elbo.mean():9.2f}", f"  the {who}'s ELBO, which lies below {quantity}")
    line(quantity, f"{evidence.mean:9.2f}", f"  an estimate; its standard error is {_error(evidence.mean_se)} from")
    line("", " " * 9, f"  sampling and {evidence.data_se:.2f} from the choice of {units}")
    condition = quantity.removeprefix("log p(").removesuffix(")").replace("|", ",")
    line("gap", f"{evidence.gap:9.2f}", f"  what the {who} misses: its KL from p(z|{condition})")
    line("bits/dim", f"{evidence.bits_per_dim:9.3f}")
    line("reliable", f"{reliable:9d}", f"  of {size} estimates: {evidence.criterion}")
    if evidence.rungs:
        line("from", evidence.rungs)
    if reliable < size:
        line("", " " * 9, "  the others are probably too low; the report shows which")
    for name, text in labels.items():
        line(name, text)
    if parts is not None:
        beside = "" if quantity == "log p(x)" else ", given their labels,"
        print(f"\nWhere the nats of the first {len(parts)}{beside} go:\n{parts}\n")


def _error(value: float) -> str:
    """A standard error to two decimals; a smaller one to one digit, so that it does not look like zero.

    Example:
        >>> from pyrovae.cli.printing import _error
        >>> _error(0.63), _error(0.0013), _error(0.0)
        ('0.63', '0.001', '0.00')
    """
    return f"{value:.1g}" if 0.0001 < value < 0.005 else f"{value:.2f}"


def print_names() -> None:
    """Print every registered name with the first sentence of its class."""
    for kind in registry.KINDS:
        print(f"{kind}s" if kind != "body" else "bodies")
        _print_kind(kind)


def _print_kind(kind: str) -> None:
    print(text_table(None, [[f"  {name:<22}", _summary(find(kind, name))] for name in names(kind)], left=(0, 1), width=80))


def print_name(name: str) -> None:
    """Print what a registered name is, its options with their defaults, and its papers; or the names of a kind.

    Raises:
        ValueError: nothing has that name; the message has the nearest one.
    """
    if name.casefold() in _kinds():
        _print_kind(_kinds()[name.casefold()])
        return
    for kind, key in _named(name):
        cls = find(kind, key)
        print(textwrap.fill(f"{key}, {'an' if kind[0] in 'aeio' else 'a'} {kind}: {_summary(cls)}", 80))
        for option, default, meaning in _options(kind, cls):
            print(textwrap.fill(f"  {option}{default}  {meaning}".rstrip(), 80, subsequent_indent=" " * 6))
        for paper in _section(cls, "References"):
            print(textwrap.fill(paper, 80, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False))


def described_names(name: str | None) -> dict[str, Any]:
    """What :func:`print_names` and :func:`print_name` print, by kind and name.

    Raises:
        ValueError: nothing has that name.
    """
    if name is None or name.casefold() in _kinds():
        chosen = registry.KINDS if name is None else (_kinds()[name.casefold()],)
        return {kind: {each: _summary(find(kind, each)) for each in names(kind)} for kind in chosen}
    found: dict[str, Any] = {}
    for kind, key in _named(name):
        cls = find(kind, key)
        options = {
            option: {"default": default.removeprefix(" = ") or None, "meaning": said}
            for option, default, said in _options(kind, cls)
        }
        found[kind] = {key: {"summary": _summary(cls), "options": options, "references": _section(cls, "References")}}
    return found


def _kinds() -> dict[str, str]:
    """Kinds by the words for them, in the singular and the plural."""
    return {word: kind for kind in registry.KINDS for word in (kind, f"{kind}s", "bodies" if kind == "body" else kind)}


def _named(name: str) -> list[tuple[str, str]]:
    """The kinds and registered names that a name is for."""
    found = [(kind, canonical(kind, name)) for kind in registry.KINDS]
    found = [(kind, key) for kind, key in found if key in names(kind)]
    if not found:
        raise ValueError(unknown("name", name, [each for kind in registry.KINDS for each in names(kind)]))
    return found


def _options(kind: str, cls: type) -> Iterator[tuple[str, str, str]]:
    """The arguments of a component, or of a kind of model as they stand in [model]: name, default and meaning."""
    call = cls.from_names if kind == "model" else cls  # type: ignore[attr-defined]
    said = dict(line.split(": ", 1) for line in _section(cls, "Args") + _section(call, "Args") if ": " in line)
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in inspect.signature(call).parameters.values():
        if parameter.kind in variadic or parameter.name in ("data_shape", "name"):
            continue
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        meaning = re.sub(r"``([^`]*)``|:\w+:`~?\.?([^`]*)`", r"\1\2", said.get(parameter.name, ""))
        yield parameter.name, default, meaning


def _section(documented: Any, title: str) -> list[str]:
    """The entries of a section of a docstring, each on one line."""
    doc = inspect.getdoc(documented) or ""
    section = re.search(rf"^{title}:\n((?: {{4}}.*\n?|\n)*)", doc, re.MULTILINE)
    if section is None:
        return []
    entries = re.split(r"\n(?= {4}(?!https?:)\S)", "\n" + section[1].rstrip())
    return [" ".join(entry.split()) for entry in entries if entry.strip()]


def _summary(cls: type) -> str:
    own = not cls.__module__.startswith("pyro.")
    first = (inspect.getdoc(cls) or "").split("\n\n")[0] if own else f"Pyro's own pyro.infer.{cls.__name__}, as it is."
    return re.sub(r"``([^`]*)``|:\w+:`~?\.?([^`]*)`", r"\1\2", " ".join(first.split()))


def device_name(device: torch.device) -> str:
    """A processor or GPU in words."""
    import torch

    return "the CPU" if device.type == "cpu" else f"the GPU, an {torch.cuda.get_device_name(device)}"


def likelihood_reason(run: Run, split: Split) -> str:
    """The likelihood, and whether it is the one that fits the data's support."""
    chosen, fitting = _likelihoods(run, split)
    if chosen == fitting:
        return f"{chosen}, since {split.reason}"
    return f"{chosen}, as the settings say; {fitting} would be the choice here, since {split.reason}"


def _likelihoods(run: Run, split: Split) -> tuple[str, str]:
    """The names of the likelihood that was chosen, and of the one that fits the data."""
    chosen, fitting = (
        canonical("likelihood", table if isinstance(table, str) else table.get("kind"))
        for table in (run.model.likelihood or split.likelihood, split.likelihood)
    )
    return chosen, fitting
