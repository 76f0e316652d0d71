"""The command line: ``pyrovae train | evaluate | compare | estimators | list | doctor``.

Only cyclopts is imported at once; torch, Pyro and ArviZ take seconds, so each command imports what it needs.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import textwrap
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from .config import Run

if TYPE_CHECKING:
    import torch

    from ..data.datasets import Split
    from ..diagnostics.decomposition import Decomposition
    from ..evidence.results import Evidence
    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

RUNS = Path("runs")
app = App(
    name="pyrovae",
    help="Variational autoencoders as honest probabilistic programs.",
    version=lambda: _version("pyrovae"),
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
    suppress_keyboard_interrupt=False,  # main says so in a line, and returns 130
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 2 with one line on standard error."""
    try:
        app(argv, exit_on_error=False, print_error=False, result_action="return_value")
    except KeyboardInterrupt:
        print("pyrovae: interrupted.", file=sys.stderr)
        return 130
    except Exception as error:  # the one place where a user's terminal begins: never a traceback there
        if os.environ.get("PYROVAE_DEBUG"):
            raise
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if isinstance(error, ValueError | OSError | FloatingPointError | CycloptsError) else _BUG
        print(f"pyrovae: {line.strip()}{hint}", file=sys.stderr)
        return 2
    return 0


_BUG = " (this is no fault of yours that we foresaw; PYROVAE_DEBUG=1 shows where)"


@app.command(sort_key=0)
def train(
    run: Path | None = None,
    /,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    settings: Annotated[Run | None, Parameter(name="*")] = None,
) -> None:
    """Train a model, score it on held-out data, and write a report.

    With no argument: scikit-learn's handwritten digits, in under two minutes.

    Args:
        run: A TOML file that describes the run; options below win over it.
        device: Short for --train.device.
        settings: The run's settings.
    """
    del device, settings  # Declared for the help page and the spelling of options; what was given is in _given.
    from .config import build_vae, load_split, read_run, run_device, run_name, with_likelihood, write_run

    described = read_run(run, _given)
    import torch

    from .. import files
    from ..estimators.base import make_estimator
    from ..training.loop import fit

    where = run_device(described)
    split = load_split(described)
    described = with_likelihood(described, split)
    torch.manual_seed(described.seed)
    vae = build_vae(described, split).to(where)
    estimator = make_estimator(described.estimator)
    folder = _new_folder(run_name(described), described.name is not None)
    records: list[dict[str, Any]] = []
    writer = _tensorboard() if described.train.tensorboard else None
    board: Any = None

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal board
        if not records:
            # Only now is it sure that the run is sound, so that a refused one leaves no folder behind.
            files.write_text(folder / "run.toml", write_run(described))
            board = None if writer is None else writer(str(folder / "tensorboard"))
        records.append(record)
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")
        if board is not None:
            for name in ("bound", "validation", "lr"):
                if record[name] is not None:
                    board.add_scalar(name, record[name], record["step"])

    settings_of = described.train
    print(f"On {_device_name(where)}.")
    print(textwrap.fill(f"Data: {split.note}.", 80, break_long_words=False, break_on_hyphens=False))
    print(textwrap.fill(f"Likelihood: {_likelihood_said(described, split)}.", 80))
    fit(
        vae.model,
        vae.guide,
        split.train,
        estimator=estimator,
        epochs=settings_of.epochs,
        batch_size=settings_of.batch_size,
        lr=settings_of.lr,
        optimizer=settings_of.optimizer,
        schedule=settings_of.schedule,
        clip_norm=settings_of.clip_norm,
        validation=settings_of.validation or None,
        patience=settings_of.patience,
        compile=settings_of.compile,
        precision=settings_of.precision,
        transform=split.transform,
        seed=described.seed,
        on_epoch=on_epoch,
    )
    if board is not None:
        board.close()
    vae.save_pretrained(folder)
    _score(folder, described, split, vae, records)


@app.command(sort_key=1)
def evaluate(
    run: Path,
    /,
    *,
    num_samples: int | None = None,
    target_se: float | None = None,
    proposal: str | None = None,
    limit: int | None = None,
    decompose: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    seed: int | None = None,
) -> None:
    """Score a trained run again, with other samples or more of them, and write its report anew.

    Args:
        run: The run's folder.
        num_samples: Importance samples per datum; the most that one gets where --target-se is given.
        target_se: Aim at this standard error of each datum's estimate, in nats.
        proposal: What the samples come from: guide, refined (fitted to each datum), mixture or prior.
        limit: Score only the first so many test data.
        decompose: Split the gap and the rate of the first so many; 0 leaves it out.
        device: Where to score: a GPU if there is one, or the run's own.
        seed: Seeds the draws; by default the run's.
    """
    from .. import files
    from .config import load_split, load_vae, run_device

    given = {"num_samples": num_samples, "target_se": target_se, "proposal": proposal, "limit": limit, "decompose": decompose}
    overrides: dict[str, Any] = {"evaluate": {name: value for name, value in given.items() if value is not None}}
    overrides |= {} if device is None else {"train": {"device": device}}
    described = _described(run, overrides | ({} if seed is None else {"seed": seed}))
    vae = load_vae(run).to(run_device(described))
    records = files.read_lines(run / "metrics.jsonl")
    _score(run, described, load_split(described), vae, records)


@app.command(sort_key=2)
def compare(*runs: Path) -> None:
    """Rank trained runs by held-out log p(x), with paired differences.

    Args:
        runs: Two or more run folders, scored on the same test data.
    """
    from ..evidence.comparison import compare as compare_evidence
    from ..evidence.results import Evidence

    if len(set(runs)) < 2:
        raise ValueError("A comparison takes two or more run folders: pyrovae compare runs/one runs/other.")
    if len({repr(_described(run).data) for run in runs}) > 1:
        raise ValueError("The runs were scored on different data, so their log p(x) cannot be compared.")
    print(compare_evidence({str(run): Evidence.load(run / "evidence.safetensors") for run in runs}))


@app.command(sort_key=3)
def estimators(
    run: Path,
    /,
    *,
    names: list[str] | None = None,
    num_particles: int = 8,
    batch_size: int = 100,
    num_draws: int = 100,
    reference_particles: int = 512,
    train_seconds: float | None = None,
) -> None:
    """Compare estimators on a trained run: bound, gradient bias, noise and cost.

    Args:
        run: The run's folder; estimators.png and estimators.json are written into it.
        names: The estimators; by default elbo, stl, iwae, dreg, miwae and vimco.
        num_particles: K of the estimators that take more than one.
        batch_size: Training data in the batch.
        num_draws: Gradient draws of each estimator.
        reference_particles: K of the DReG gradient that biases are against.
        train_seconds: Also train each from one fresh start for so long, and score the test data.
    """
    import torch

    from .. import files
    from ..diagnostics.gradients import compare_estimators, train_estimators
    from .config import build_vae, load_split, load_vae, run_device

    described = _described(run)
    split = load_split(described)
    vae = load_vae(run).to(run_device(described))
    torch.manual_seed(described.seed)
    x = split.train[torch.randperm(len(split.train))[:batch_size]]
    x = x.to(run_device(described)) if split.transform is None else split.transform(x).to(run_device(described))
    chosen = {name: _with_particles(name, num_particles) for name in names or _SELECTION}
    reference = {"kind": "dreg", "num_particles": reference_particles}
    options: dict[str, Any] = {"num_draws": num_draws, "reference": reference, "seed": described.seed}
    result = compare_estimators(vae.model, vae.guide, x, chosen, progress=True, **options)
    result.plot().savefig(run / "estimators.png", dpi=150)
    files.write_text(run / "estimators.json", _json(result.to_dataset().to_dict()) + "\n")
    print(result)
    print(f"Figure: {run / 'estimators.png'}")
    if train_seconds is not None:
        torch.manual_seed(described.seed)
        fresh = build_vae(described, split).to(run_device(described))
        ranking = train_estimators(
            fresh.model,
            fresh.guide,
            split.train,
            chosen,
            seconds=train_seconds,
            held_out=split.test[: described.evaluate.limit],
            seed=described.seed,
            batch_size=described.train.batch_size,
            lr=described.train.lr,
            transform=split.transform,
        )
        print(f"\nHeld-out log p(x) after {train_seconds:g} s of training each, from the same start:")
        print(ranking)


_SELECTION = ("elbo", "stl", "iwae", "dreg", "miwae", "vimco")


def _with_particles(name: str, num_particles: int) -> Any:
    """The estimator of that name with K particles, where its default takes more than one."""
    from ..estimators.base import make_estimator

    return {"kind": name, "num_particles": num_particles} if make_estimator(name).num_particles > 1 else name


@app.command(name="list", sort_key=4)
def list_names() -> None:
    """List priors, likelihoods, encoders, bodies, guides and estimators by name, with a line each."""
    import inspect

    from ..registry import KINDS, find, names

    for kind in KINDS:
        print(f"{kind}s" if kind != "body" else "bodies")
        for name in names(kind):
            cls = find(kind, name)
            own = not cls.__module__.startswith("pyro.")
            first = (inspect.getdoc(cls) or "").split("\n\n")[0] if own else f"Pyro's own pyro.infer.{cls.__name__}, as it is."
            plain = re.sub(r":\w+:`~?\.?([^`]*)`", r"\1", " ".join(first.split()))
            print(textwrap.fill(plain, 80, initial_indent=f"  {name:<24}", subsequent_indent=" " * 26))


@app.command(sort_key=5)
def doctor() -> None:
    """Print versions, what is compiled on this machine and why, and what to do about it."""
    from ..compile.doctor import report

    lines = report()
    width = min(max(len(subject) for subject, _ in lines), 24)
    for subject, said in lines:
        print(textwrap.fill(f"{subject:<{width}}  {said}", 120, subsequent_indent=" " * (width + 2), break_on_hyphens=False))


def _device_name(device: torch.device) -> str:
    """A processor or GPU in words."""
    import torch

    return "the CPU" if device.type == "cpu" else f"the GPU, an {torch.cuda.get_device_name(device)}"


def _tensorboard() -> Any:
    """TensorBoard's writer, an optional extra."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError('TensorBoard is not installed: pip install "pyrovae[tensorboard]".') from error
    return SummaryWriter


def _described(folder: Path, overrides: dict[str, Any] | None = None) -> Run:
    """The run behind a folder that ``train`` wrote."""
    from .config import read_run

    if not (folder / "run.toml").is_file():
        raise FileNotFoundError(f"There is no run folder {folder}: give one that pyrovae train wrote, with its run.toml.")
    return read_run(folder / "run.toml", overrides)


def _score(folder: Path, run: Run, split: Split, vae: VAE | HierarchicalVAE, records: list[dict[str, Any]]) -> None:
    """Score the test data, write evidence, summary and report, and say what was found."""
    from .. import files
    from .config import write_run
    from .report import write_report

    test = split.test[: run.evaluate.limit]
    began = time.perf_counter()
    scoring = run.evaluate
    evidence = vae.log_marginal(
        test,
        num_samples=scoring.num_samples,
        target_se=scoring.target_se,
        proposal=scoring.proposal,
        seed=run.seed,
        progress=True,
    )
    scored = time.perf_counter() - began
    facts = _facts(run, split, records, scored)
    evidence.save(folder / "evidence.safetensors")
    parts = _decomposed(vae, test[: scoring.decompose], evidence, run.seed) if scoring.decompose else None
    files.write_text(folder / "summary.json", _json(_summary(run, evidence, parts, facts)) + "\n")
    few = test[:10]
    write_report(
        folder / "report.html",
        title=folder.name,
        evidence=evidence,
        records=records,
        settings=write_run(run),
        facts=facts,
        originals=few.cpu().numpy(),
        reconstructions=vae.reconstruct(few).cpu().numpy(),
        samples=_mean_samples(vae, 40, run.seed).cpu().numpy(),
        latents=vae.embed(test).detach().cpu().numpy(),
        labels=None if split.test_labels is None else split.test_labels[: len(test)].numpy(),
        decomposition=parts,
    )
    _say(folder, split, evidence, parts)


def _decomposed(vae: VAE | HierarchicalVAE, x: Any, evidence: Evidence, seed: int) -> Decomposition | None:
    """Where the nats of these data go; the gap is split in two where the guide is of a family that can be fitted to a datum."""
    from ..diagnostics.decomposition import decompose
    from ..encoders import DiagonalNormal, FullCovarianceNormal
    from ..evidence.refine import refine

    families: dict[type, str] = {DiagonalNormal: "diagonal", FullCovarianceNormal: "full"}
    covariance = families.get(type(getattr(vae, "encoder", None)))
    try:
        refined = None
        if covariance is not None:
            options: Any = {"covariance": covariance, "seed": seed, "progress": True}
            refined = refine(vae.model, vae.guide, x, **options).elbo
        return decompose(
            vae.model, vae.guide, x, evidence=evidence.rows(slice(len(x))), refined=refined, seed=seed, progress=False
        )
    except ValueError as error:  # a pair that has a log p(x) but no such parts
        print(f"No decomposition: {error}")
        return None


def _mean_samples(vae: VAE | HierarchicalVAE, count: int, seed: int) -> Any:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return vae.sample(count, mean=True)


def _likelihood_said(run: Run, split: Split) -> str:
    """The likelihood, and whether it is the one that fits the data's support."""
    given, fitting = run.model.likelihood or split.likelihood, split.likelihood
    kinds = [table if isinstance(table, str) else table.get("kind") for table in (given, fitting)]
    if kinds[0] == kinds[1]:
        return f"{kinds[0]}, since {split.reason}"
    return f"{kinds[0]}, as the settings say; {kinds[1]} would be the choice here, since {split.reason}"


def _say(folder: Path, split: Split, evidence: Evidence, parts: Decomposition | None) -> None:
    from ..evidence.kinds import KINDS

    unit, units = split.unit, {"image": "images", "datum": "data"}[split.unit]
    reliable, size = int(evidence.reliable.sum()), len(evidence)
    print(f"\nHeld-out {split.name}, {size:,} {units}, in nats per {unit}:")
    print(f"  method    {evidence.method}")
    print(f"  samples   {evidence.effort}")
    who = "guide" if evidence.kind == KINDS["guide"] else "proposal"
    print(f"  bound     {evidence.elbo.mean():9.2f}  the {who}'s ELBO, which lies below log p(x)")
    print(f"  log p(x)  {evidence.mean:9.2f}  an estimate; its standard error is {evidence.mean_se:.2f} from")
    print(f"                       sampling and {evidence.data_se:.2f} from the choice of {units}")
    print(f"  gap       {evidence.gap:9.2f}  what the {who} misses: its KL from p(z|x)")
    print(f"  bits/dim  {evidence.bits_per_dim:9.3f}")
    print(f"  reliable  {reliable:9d}  of {size} estimates: {evidence.criterion}")
    if reliable < size:
        print("                       the others are probably too low; the report shows which")
    if parts is not None:
        print(f"\nWhere the nats of the first {len(parts)} go:\n{parts}\n")
    print(f"Report: {folder / 'report.html'}")


def _summary(run: Run, evidence: Evidence, parts: Decomposition | None, facts: dict[str, str]) -> dict[str, Any]:
    return {
        "log_px": evidence.mean,
        "log_px_kind": f"estimate by {evidence.method}, nats per datum",
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


def _json(value: Any) -> str:
    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: plain(held) for key, held in item.items()}
        if isinstance(item, list | tuple):
            return [plain(held) for held in item]
        # JSON has no infinity and no NaN.
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return json.dumps(plain(value), indent=1, allow_nan=False)


def _facts(run: Run, split: Split, records: list[dict[str, Any]], scored: float) -> dict[str, str]:
    import platform
    from datetime import UTC, datetime

    import torch

    from .config import run_device

    packages = ("pyrovae", "pyro-ppl", "arviz", "arviz-stats", "numpy")
    return {
        "data": split.note,
        "likelihood": _likelihood_said(run, split),
        "seed": str(run.seed),
        "trained": f"{len(records)} epochs, {records[-1]['step']} steps, {records[-1]['seconds']:.1f} s",
        "scored": f"{scored:.1f} s",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {platform.system()}",
        "device": _device_name(run_device(run)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    } | {package: version for package in packages if (version := _version(package))}


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _new_folder(name: str, chosen: bool) -> Path:
    """A run folder that does not exist yet; a name that the user chose is refused if it is taken."""
    if Path(name).name != name:
        raise ValueError(f"A run's name is one folder name, not {name!r}: leave out slashes.")
    folder = RUNS / name
    if folder.exists() and chosen:
        raise ValueError(f"{folder} exists already: choose another --name, or remove it first.")
    number = 1
    while folder.exists():
        number += 1
        folder = RUNS / f"{name}-{number}"
    return folder


# The settings of this command line as nested tables: cyclopts would fill in defaults, and only what was given may win over
# the run's file.
_given: dict[str, Any] = {}


def _collect(_app: App, commands: tuple[str, ...], arguments: Any) -> None:
    """Keep the settings given to ``train`` for one validation together with the file's."""
    _given.clear()
    for argument in arguments if commands[-1:] == ("train",) else ():
        if not argument.name.startswith("--"):
            continue
        for token in argument.tokens:
            name = {"--device": "--train.device"}.get(argument.name, argument.name)
            path: list[str] = [*name.removeprefix("--").replace("-", "_").split("."), *token.keys]
            table, last = _given, path[-1]
            for parent in path[:-1]:
                table = table.setdefault(parent, {})
            if argument.hint is bool:
                table[last] = token.value.lower() in ("", "true", "1", "yes") and ".no-" not in str(token.keyword)
            elif "list" in str(argument.hint):
                table.setdefault(last, []).append(_literal(token.value) if token.value[:1] == "[" else token.value)
            else:
                table[last] = _literal(token.value) if token.keys or token.value[:1] == "{" else token.value
        argument.tokens.clear()


def _literal(text: str) -> Any:
    """A TOML value, or the text itself: a component's options have no declared type."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


app.config = (_collect,)
