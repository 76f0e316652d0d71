"""The command line: ``pyrovae train | evaluate | compare | estimators | list | doctor``; the rest is in :mod:`.uses`.

Only cyclopts is imported at once; torch, Pyro and ArviZ take seconds, so each command imports what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Parameter

from .arguments import collect, given
from .config import Run
from .exits import explain
from .output import Output, json_text

if TYPE_CHECKING:
    from .folders import RunFolder

__all__ = ["app", "main"]

app = App(
    name="pyrovae",
    help="Variational autoencoders as honest probabilistic programs.",
    version=lambda: _version(),
    default_parameter=Parameter(consume_multiple=True, negative_iterable=()),
    suppress_keyboard_interrupt=False,  # main prints a line, and returns 130
)

app.register_install_completion_command(help="Let bash, zsh or fish complete commands and options.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or one line on standard error and a code that says the cause, of :mod:`.exits`."""
    try:
        app(argv, exit_on_error=False, print_error=False, result_action="return_value")
        sys.stdout.flush()
    except BrokenPipeError:  # `pyrovae list | head` closes the pipe: discard the rest, and what Python flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # the code of a process that SIGPIPE ended
    except KeyboardInterrupt as error:  # the message of fit's Interrupted names the signal, and how to go on
        print(f"pyrovae: {(str(error) or 'interrupted').rstrip('.')}.", file=sys.stderr)
        return 128 + getattr(error, "signal", 2)
    except Exception as error:  # users of the command line see one line, never a traceback
        if os.environ.get("PYROVAE_DEBUG"):
            raise
        code, line = explain(error)
        print(f"pyrovae: {line}", file=sys.stderr)
        return code
    return 0


@app.command(sort_key=0)
def train(
    run: Path | None = None,
    /,
    *,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: Path | None = None,
    output: Annotated[Output | None, Parameter(name="*")] = None,
    settings: Annotated[Run | None, Parameter(name="*")] = None,
) -> None:
    """Train a model, score it on held-out data, and write a report.

    With no argument: scikit-learn's handwritten digits, in under two minutes. A run that was ended goes on with --resume.

    Example: pyrovae train counts.csv --model.latent-dim 8

    Args:
        run: A TOML file that describes the run, or the data: a file or a folder of images. Options below win over it.
        device: Short for --train.device.
        resume: The folder of a run that was ended: go on from its last checkpoint, to the same numbers.
        output: What is printed.
        settings: The run's settings.
    """
    del device, settings  # Declared for the help page and the spelling of options; what was given is in arguments.given.
    from .config import read_run, run_device, run_name
    from .folders import Follower, RunFolder, alone, new_folder

    output, follows = output or Output(), _joined() > 0
    if resume is not None:
        if run is not None:
            raise ValueError(f"A run is resumed from its own settings, so give {run} or --resume {resume}, and not both.")
        described = _described(resume, given)
        if follows:
            _train(Follower(resume, described, resumed=True), output)
            return
        with alone(resume, output):
            _train(RunFolder(resume, described, resumed=True), output)
        return
    described = read_run(run, given)
    run_device(described)
    if follows:
        _train(Follower(Path(_told(None)), described, resumed=False), output)
        return
    with new_folder(run_name(described), chosen=described.name is not None) as path:
        _told(str(path))
        _train(RunFolder(path, described, resumed=False), output)


def _joined() -> int:
    """The number of this process among those that ``torchrun`` started; 0 if it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    from ..training.processes import join

    return int(os.environ["RANK"]) if join() else 0


def _told(path: str | None) -> Any:
    """The folder that the first process has made."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return path
    from ..training.processes import told

    return told(path)


def _train(folder: RunFolder, output: Output) -> None:
    """Train the model of a run's folder, and score it."""
    from .config import build_model, load_split, run_device, with_data

    where = run_device(folder.run)
    split = load_split(folder.run)
    described = with_data(folder.run, split)
    folder.start(described)
    import torch

    from ..estimators.base import make_estimator
    from ..training.loop import fit
    from .folders import Follower
    from .printing import print_start
    from .scoring import score

    torch.manual_seed(described.seed)
    vae = build_model(described, split).to(where)
    estimator = make_estimator(described.estimator)
    options = described.train
    if not isinstance(folder, Follower):
        with output.words():
            print_start(described, split, where, vae)
    callbacks = folder.loggers()
    with folder.training(vae):
        history = fit(
            vae.model,
            vae.guide,
            vae.train_inputs(split.train, split.train_labels, **split.beside("train")),
            estimator=estimator,
            transform=split.transform,
            seed=described.seed,
            progress=not output.quiet,
            on_epoch=folder,
            callbacks=callbacks,
            checkpoint=folder.checkpoint if options.checkpoint else None,
            resume="auto" if folder.resumed and options.checkpoint else None,
            **options.fit_keywords(),
        )
    folder.finish(vae, history.records)
    score(folder.path, described, split, vae, history.records, output)


@app.command(sort_key=1)
def evaluate(
    run: Path,
    /,
    *,
    num_samples: int | None = None,
    target_se: float | None = None,
    proposal: str | None = None,
    second: int | None = None,
    limit: int | None = None,
    decompose: int | None = None,
    device: Literal["auto", "cpu", "cuda"] | None = None,
    seed: int | None = None,
    output: Path | None = None,
    printed: Annotated[Output | None, Parameter(name="*")] = None,
) -> None:
    """Score a trained run again, with other samples or more of them, and write its report anew.

    The old evidence, summary and report stay until the new ones are complete. An interrupted call goes on if it is repeated.

    Example: pyrovae evaluate runs/digits-dreg-4 --num-samples 20000

    Args:
        run: The run's folder.
        num_samples: Importance samples per datum; the most that one gets where --target-se is given.
        target_se: Aim at this standard error of each datum's estimate, in nats.
        proposal: What the samples come from: auto (repaired where the guide fails), guide, refined, mixture or prior.
        second: Check so many estimates by annealing from the prior.
        limit: Score only the first so many test data.
        decompose: Split the gap and the rate of the first so many; 0 leaves it out.
        device: Where to score: a GPU if there is one, or the run's own.
        seed: Seeds the draws; by default the run's.
        output: Another folder for the results, which "compare" takes like the run's own; the run's folder is left alone.
        printed: What is printed.
    """
    from .. import files
    from .config import load_model, load_split, run_device, write_run
    from .scoring import score

    options = {"num_samples": num_samples, "target_se": target_se, "proposal": proposal, "second": second}
    options |= {"limit": limit, "decompose": decompose}
    overrides: dict[str, Any] = {"evaluate": {name: value for name, value in options.items() if value is not None}}
    overrides |= {} if device is None else {"train": {"device": device}}
    _joined()
    described = _described(run, overrides | ({} if seed is None else {"seed": seed}))
    vae = load_model(run).to(run_device(described))
    records, split = files.read_lines(run / "metrics.jsonl"), load_split(described)
    if output is not None and (output / "model.json").exists():
        raise ValueError(f"--output must not be the folder of a run, got {output}: choose another folder.")
    texts = {}
    if output is not None:
        texts = {"run.toml": write_run(described), "metrics.jsonl": (run / "metrics.jsonl").read_text(encoding="utf-8")}
    score(run if output is None else output, described, split, vae, records, printed or Output(), run, texts)


@app.command(sort_key=2)
def compare(*runs: Path, output: Annotated[Output | None, Parameter(name="*")] = None) -> None:
    """Rank trained runs by held-out log p(x), with paired differences, and write a page beside them: comparison.html.

    Runs that differ in nothing but their seed are one model, whose error from training is then known too.

    Example: pyrovae compare runs/one runs/other

    Args:
        runs: Two or more run folders, scored on the same test data.
        output: What is printed.
    """
    from .. import files
    from ..evidence.comparison import compare as compare_evidence
    from ..evidence.results import Evidence
    from .comparison_page import grouped, write_comparison

    if len(set(runs)) < 2:
        raise ValueError("A comparison takes two or more run folders: pyrovae compare runs/one runs/other.")
    described = {str(run): _described(run) for run in runs}
    if len({repr(each.data) for each in described.values()}) > 1:
        raise ValueError("The runs were scored on different data, so their log p(x) cannot be compared.")
    models = grouped(described)
    evidence = {
        model: [Evidence.load(Path(name) / "evidence.safetensors") for name in names] for model, names in models.items()
    }
    comparison = compare_evidence(evidence)
    page = runs[0].parent / "comparison.html"
    records = {model: files.read_lines(Path(names[0]) / "metrics.jsonl") for model, names in models.items()}
    settings = {model: described[names[0]] for model, names in models.items()}
    write_comparison(page, comparison, evidence, runs=settings, records=records)
    output = output or Output()
    with output.words():
        print(comparison)
        print(f"Page: {page}")
    output.findings(comparison.to_dict() | {"page": str(page)})


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
    output: Annotated[Output | None, Parameter(name="*")] = None,
) -> None:
    """Compare estimators on a trained run: bound, gradient bias, noise and cost.

    Example: pyrovae estimators runs/digits-dreg-4 --names elbo iwae dreg

    Args:
        run: The run's folder; estimators.png and estimators.json are written into it.
        names: The estimators; by default elbo, stl, iwae, dreg, miwae and vimco.
        num_particles: K of the estimators that take more than one.
        batch_size: Training data in the batch.
        num_draws: Gradient draws of each estimator.
        reference_particles: K of the DReG gradient that biases are against.
        train_seconds: Also train each from one fresh start for so long, and score the test data.
        output: What is printed.
    """
    import torch
    from matplotlib.figure import Figure

    from .. import files
    from ..diagnostics.gradients import compare_estimators, train_estimators
    from .config import build_model, load_model, load_split, run_device

    output, described = output or Output(), _described(run)
    split, device = load_split(described), run_device(described)
    vae = load_model(run).to(device)
    torch.manual_seed(described.seed)
    train = vae.train_inputs(split.train, split.train_labels, **split.beside("train"))
    rows = torch.randperm(len(split.train))[:batch_size]
    x, *labels = (each[rows] for each in train)
    x = x if split.transform is None else split.transform(x)
    batch = tuple(each.to(device) for each in (x, *labels))
    chosen = {name: _with_particles(name, num_particles) for name in names or _SELECTION}
    reference = {"kind": "dreg", "num_particles": reference_particles}
    options: dict[str, Any] = {"num_draws": num_draws, "reference": reference, "seed": described.seed}
    result = compare_estimators(vae.model, vae.guide, batch, chosen, progress=output.bars, **options)
    figure = Figure(figsize=(13, 1.6 + 0.42 * len(result.names)), layout="constrained")
    result.plot(figure.subplots(1, 4, sharey=True))
    figure.savefig(run / "estimators.png", dpi=150)
    found = result.to_dataset().to_dict()
    files.write_text(run / "estimators.json", json_text(found) + "\n")
    with output.words():
        print(result)
        print(f"Figure: {run / 'estimators.png'}")
    if train_seconds is not None:
        torch.manual_seed(described.seed)
        fresh = build_model(described, split).to(device)
        held_out = fresh.score_inputs(split.test, split.test_labels, **split.beside("test"))
        ranking = train_estimators(
            fresh.model,
            fresh.guide,
            train,
            chosen,
            seconds=train_seconds,
            held_out=tuple(each[: described.evaluate.limit] for each in held_out),
            seed=described.seed,
            batch_size=described.train.batch_size,
            lr=described.train.lr,
            transform=split.transform,
        )
        with output.words():
            print(f"\nHeld-out {fresh.quantity} after {train_seconds:g} s of training each, from the same start:")
            print(ranking)
        found |= {"ranking": ranking.to_dict()}
    output.findings(found | {"figure": str(run / "estimators.png")})


_SELECTION = ("elbo", "stl", "iwae", "dreg", "miwae", "vimco")


def _with_particles(name: str, num_particles: int) -> Any:
    """The estimator of that name with K particles, where its default takes more than one."""
    from ..estimators.base import make_estimator

    return {"kind": name, "num_particles": num_particles} if make_estimator(name).num_particles > 1 else name


@app.command(sort_key=5)
def doctor(*, output: Annotated[Output | None, Parameter(name="*")] = None) -> None:
    """Print versions, what is compiled on this machine and why, and what to do about it.

    Example: pyrovae doctor

    Args:
        output: What is printed.
    """
    import textwrap

    from ..compile.doctor import report

    lines, output = report(), output or Output()
    width = min(max(len(subject) for subject, _ in lines), 24)
    with output.words():
        for subject, said in lines:
            print(
                textwrap.fill(f"{subject:<{width}}  {said}", 120, subsequent_indent=" " * (width + 2), break_on_hyphens=False)
            )
    output.findings(dict(lines))


def _described(folder: Path, overrides: dict[str, Any] | None = None) -> Run:
    """The run behind a folder that ``train`` wrote."""
    from ..files import settle
    from .config import read_run

    settle(folder)
    if not (folder / "run.toml").is_file():
        raise FileNotFoundError(f"There is no run folder {folder}: give one that pyrovae train wrote, with its run.toml.")
    return read_run(folder / "run.toml", overrides)


def _version() -> str:
    from .. import __version__

    return __version__


app.config = (collect,)
