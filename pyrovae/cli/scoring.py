"""A trained model scored: evidence, summary and report, written into the run's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Run, run_device, write_run
from .output import Output, json_text
from .printing import device_name, likelihood_reason, print_evidence

if TYPE_CHECKING:
    from torch import Tensor

    from ..data.datasets import Split
    from ..diagnostics.decomposition import Decomposition
    from ..evidence.results import Evidence
    from ..models.base import PairModule
    from .shown import Shown

__all__ = ["bound_name", "decomposed", "package_version", "remake_report", "score"]


def score(
    folder: Path,
    run: Run,
    split: Split,
    vae: PairModule,
    records: list[dict[str, Any]],
    output: Output,
    earlier: Path | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Score the test data, print what was found, and write evidence, summary and report, together at the end.

    Scores are kept in ``scoring-*.safetensors`` until then, so that an interrupted call goes on where it was.

    Args:
        folder: where the files go.
        run: the run's settings.
        split: its data.
        vae: its model.
        records: its learning curve.
        output: what is printed.
        earlier: the folder of the run, if it may have been scored before.
        texts: further files that are written together with the others, by name.

    Raises:
        ValueError: the data are not those that were scored before, or another command works in the folder.
        OSError: the folder cannot be written; before the work begins.
    """
    from .. import files
    from ..training.processes import is_first
    from .folders import alone

    inputs = vae.score_inputs(split.test, split.test_labels, **split.beside("test"))
    inputs = tuple(each[: run.evaluate.limit] for each in inputs)
    if earlier is not None and (earlier / "evidence.safetensors").exists():
        _refuse_changed(earlier, inputs)
    first = is_first()
    # A run that was just trained has its folder still.
    place = alone(folder, output) if first and earlier is not None else nullcontext()
    with output.words():
        with place, files.together(folder) if first else nullcontext(folder) as staged:
            for name, text in (texts or {}).items() if first else ():
                files.write_text(staged / name, text)
            summary = _score(staged, folder, run, split, vae, records, inputs, output.bars)
        if summary is None:
            return
        for unfinished in folder.glob("scoring-*.safetensors"):
            unfinished.unlink()
        print(f"Report: {folder / 'report.html'}")
    output.findings(summary | {"folder": str(folder)})


def _refuse_changed(folder: Path, inputs: tuple[Tensor, ...]) -> None:
    """Refuse data that are not those behind a run's evidence; their number may differ."""
    import numpy as np

    from ..data.batches import fingerprints
    from ..evidence.results import Evidence

    before = Evidence.load(folder / "evidence.safetensors").fingerprint
    if before is None:
        return
    shared = min(len(before), len(inputs[0]))
    changed = np.flatnonzero(before[:shared] != fingerprints((inputs[0][:shared],)))
    if len(changed):
        raise ValueError(
            f"The test data of {folder} are not those that it was scored on before (first in row {changed[0]}, "
            f"{len(changed)} of {shared} rows): restore the data, or train again."
        )


def _score(
    staged: Path,
    folder: Path,
    run: Run,
    split: Split,
    vae: PairModule,
    records: list[dict[str, Any]],
    inputs: tuple[Tensor, ...],
    bars: bool,
) -> dict[str, Any] | None:
    """Score inputs, print what was found, and write the files into a folder that they are moved from.

    Returns:
        The summary; ``None`` if another process writes the files.
    """
    from .. import files
    from ..training.processes import leave

    scoring, labels = run.evaluate, split.test_labels
    began = time.perf_counter()
    evidence = vae.log_marginal(
        inputs,
        num_samples=scoring.num_samples,
        target_se=scoring.target_se,
        proposal=scoring.proposal,
        second=scoring.second,
        seed=run.seed,
        progress=bars,
        resume=folder / f"scoring-{_settings_hash(run)}.safetensors",
    )
    if leave():  # the processes have shared the work, and the first one writes what they found
        return None
    seconds = time.perf_counter() - began
    labels = None if labels is None else labels[: len(evidence)]
    findings = vae.label_findings(inputs[0], labels)
    facts = _facts(run, split, records, f"{vae.quantity}, in {seconds:.1f} s") | _hash(evidence) | findings
    first = tuple(each[: scoring.decompose] for each in inputs)
    parts = decomposed(vae, first, evidence, run.seed, bars) if scoring.decompose else None
    print_evidence(split, vae.quantity, evidence, parts, findings)
    evidence.save(staged / "evidence.safetensors")
    summary = _summary(run, vae.quantity, evidence, parts, facts) | _known(split, evidence) | {"names": split.names()}
    files.write_text(staged / "summary.json", json_text(summary) + "\n")
    _report(staged / "report.html", folder.name, run, split, vae, records, inputs, evidence, facts, parts)
    return summary


def _report(
    path: Path,
    title: str,
    run: Run,
    split: Split,
    vae: PairModule,
    records: list[dict[str, Any]],
    inputs: tuple[Tensor, ...],
    evidence: Evidence,
    facts: dict[str, str],
    parts: Decomposition | None,
) -> None:
    """Write the report of what was found."""
    from .report import write_report

    bound = bound_name(run)
    labels = None if split.test_labels is None else split.test_labels[: len(evidence)]
    write_report(
        path,
        title=title,
        evidence=evidence,
        quantity=vae.quantity,
        records=records,
        settings=write_run(run),
        facts=facts,
        trained=_trained(run, split, vae, bound, records),
        bound=bound,
        shown=_shown(vae, inputs, evidence, split, labels, run.seed),
        decomposition=parts,
    )


def remake_report(folder: Path, run: Run, split: Split, vae: PairModule, bars: bool) -> Path:
    """Write the report of a run that has been scored anew, and nothing else.

    Args:
        folder: of the run.
        run: its settings.
        split: its data.
        vae: its model.
        bars: whether to show progress.

    Raises:
        FileNotFoundError: the run has not been scored.
        ValueError: the data are not those that were scored.
    """
    from .. import files
    from ..evidence.results import Evidence

    evidence = Evidence.load(folder / "evidence.safetensors")
    inputs = vae.score_inputs(split.test, split.test_labels, **split.beside("test"))
    inputs = tuple(each[: len(evidence)] for each in inputs)
    _refuse_changed(folder, inputs)
    first = tuple(each[: run.evaluate.decompose] for each in inputs)
    parts = decomposed(vae, first, evidence, run.seed, bars) if run.evaluate.decompose else None
    records, facts = files.read_lines(folder / "metrics.jsonl"), files.read_json(folder / "summary.json")["facts"]
    _report(folder / "report.html", folder.name, run, split, vae, records, inputs, evidence, facts, parts)
    return folder / "report.html"


def _shown(
    vae: PairModule, inputs: tuple[Tensor, ...], evidence: Evidence, split: Split, labels: Tensor | None, seed: int
) -> Shown:
    """What the report shows of the model and the data."""
    import torch

    from .shown import gather

    train = split.train if isinstance(split.train, torch.Tensor) else None
    names: dict[str, Any] = {"columns": split.columns or None, "classes": split.classes}
    return gather(vae, inputs, evidence, labels=labels, train=train, seed=seed, **names)


def _settings_hash(run: Run) -> str:
    """A short hash of what decides the scores, by which an interrupted call with the same settings is found."""
    import hashlib

    scoring = run.evaluate
    decides = (scoring.num_samples, scoring.target_se, scoring.proposal, scoring.limit, run.seed, run.train.device)
    return hashlib.sha256(repr(decides).encode()).hexdigest()[:8]


def _known(split: Split, evidence: Evidence) -> dict[str, float]:
    """The true log p(x) of the data that were scored, if their distribution is known."""
    return {} if split.test_log_px is None else {"true_log_px": float(split.test_log_px[: len(evidence)].mean())}


def decomposed(
    vae: PairModule, inputs: tuple[Tensor, ...], evidence: Evidence, seed: int, bars: bool = False
) -> Decomposition | None:
    """Where the nats of data go; the gap is split in two if the guide is of a family that can be fitted to a datum."""
    from ..diagnostics.decomposition import decompose
    from ..encoders import DiagonalNormal, FullCovarianceNormal
    from ..evidence.refine import refine

    families: dict[type, str] = {DiagonalNormal: "diagonal", FullCovarianceNormal: "full"}
    covariance = families.get(type(getattr(vae, "encoder", None)))
    num_data = len(inputs[0])
    try:
        refined = None
        if covariance is not None:
            options: Any = {"covariance": covariance, "seed": seed, "progress": bars}
            refined = refine(vae.model, vae.guide, inputs, **options).elbo
        return decompose(
            vae.model, vae.guide, inputs, evidence=evidence.rows(slice(num_data)), refined=refined, seed=seed, progress=False
        )
    except ValueError as error:  # a pair that has a log p(x) but no such parts
        print(f"No decomposition: {error}")
        return None


def bound_name(run: Run) -> str:
    """The bound that a run trains on, such as ``"IWAE, K = 10"``."""
    from ..estimators.base import make_estimator

    estimator = make_estimator(run.estimator)
    name, particles = type(estimator).__name__, getattr(estimator, "num_particles", 1)
    return name if particles == 1 else f"{name}, K = {particles}"


def _trained(run: Run, split: Split, vae: PairModule, bound: str, records: list[dict[str, Any]]) -> dict[str, str]:
    """What was trained, in words, by name."""
    names = {part: type(getattr(vae, part)).__name__ for part in ("likelihood", "prior", "encoder") if hasattr(vae, part)}
    sizes = " x ".join(map(str, vae.data_shape)) or "1"
    latents = run.model.latent_dims or run.model.latent_dim
    epochs, train = records[-1]["epoch"] if records else 0, len(split.train)
    hidden = getattr(getattr(getattr(vae, "encoder", None), "body", None), "hidden", None) or run.model.hidden or []
    networks = [str(run.model.body or "mlp"), "-".join(map(str, hidden)), run.model.activation or ""]
    options = run.train
    return {
        "Data": f"{split.name}: {train:,} to train, {len(split.test):,} to score, each {sizes}",
        "Likelihood": f"{names.get('likelihood', '')}{_options(run.model.likelihood or split.likelihood)}",
        "Prior": f"{names.get('prior', '')}{_options(run.model.prior)}, {latents} latents",
        "Guide": f"{names.get('encoder') or run.model.guide or type(vae).__name__}{_options(run.model.encoder)}",
        "Networks": " ".join(word for word in networks if word),
        "Estimator": bound,
        "Training": f"{epochs} epochs, {options.optimizer} at {options.lr:g}, batches of {options.batch_size}, seed {run.seed}",
        "Parameters": f"{sum(each.numel() for each in vae.parameters()):,}",
    }


def _options(component: Any) -> str:
    """The options of a component beside its name, as in ``(total_count = 16)``."""
    options = {key: value for key, value in component.items() if key != "kind"} if isinstance(component, dict) else {}
    return f" ({', '.join(f'{key} = {value}' for key, value in options.items())})" if options else ""


def _summary(run: Run, quantity: str, evidence: Evidence, parts: Decomposition | None, facts: dict[str, str]) -> dict[str, Any]:
    of_labels = "" if quantity == "log p(x)" else f" of {quantity}"
    return {
        "log_px": evidence.mean,
        "log_px_kind": f"estimate{of_labels} by {evidence.method}, nats per datum",
        "monte_carlo_se": evidence.mean_se,
        "data_se": evidence.data_se,
        "bound": float(evidence.elbo.mean()),
        "bound_kind": "ELBO, a lower bound, nats per datum",
        "gap": evidence.gap,
        "bits_per_dim": evidence.bits_per_dim,
        "num_data": len(evidence),
        "num_samples": evidence.num_samples,
        "target_se": run.evaluate.target_se,
        "samples_drawn": evidence.effort,
        "num_reliable": int(evidence.reliable.sum()),
        "khat_threshold": evidence.khat_threshold,
        "findings": evidence.summary(),
        "decomposition": None if parts is None else _parts(parts),
        "seed": run.seed,
        "facts": facts,
    }


def _parts(parts: Decomposition) -> dict[str, Any]:
    means = {name.strip(): {"nats": mean, "se": error, "what": what} for name, mean, error, what in parts.rows()}
    return {"num_data": len(parts), "active_units": parts.active_units} | means


def _facts(run: Run, split: Split, records: list[dict[str, Any]], scored: str) -> dict[str, str]:
    import platform
    from datetime import UTC, datetime

    import torch

    packages = ("pyrovae", "pyro-ppl", "arviz", "arviz-stats", "numpy")
    numbers = {"core": os.cpu_count() or 1, "thread": torch.get_num_threads()}
    cores = ", ".join(f"{number} {noun}{'' if number == 1 else 's'}" for noun, number in numbers.items())
    return {
        "data": split.note,
        "likelihood": likelihood_reason(run, split),
        "seed": str(run.seed),
        "trained": f"{len(records)} epochs, {records[-1]['step']} steps, {records[-1]['seconds']:.1f} s",
        "scored": scored,
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {cores}, {platform.system()}",
        "device": device_name(run_device(run)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | {package: version for package in packages if (version := package_version(package))}


def _hash(evidence: Evidence) -> dict[str, str]:
    """A hash of the scored data, which tells whether two runs were scored on the same."""
    import hashlib

    if evidence.fingerprint is None:
        return {}
    return {"hash of the scored data": hashlib.sha256(evidence.fingerprint.tobytes()).hexdigest()[:16]}


def package_version(package: str) -> str:
    """An installed distribution's version, or nothing."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""
