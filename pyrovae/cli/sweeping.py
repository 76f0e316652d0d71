"""The runs of a sweep, trained in this process or in others, and their table."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import folders
from .config import read_run, run_name, run_of
from .folders import RunFolder, alone, check_name
from .grid import Cell
from .output import Output

if TYPE_CHECKING:
    from ..evidence.results import Evidence

__all__ = ["finish", "planned_folder", "threads_each", "train_all", "train_one"]

LOGS, SECONDS_BETWEEN_LOOKS = "logs", 0.1


def planned_folder(base: dict[str, Any], name: str | None) -> Path:
    """The folder of a sweep, by its name or its settings.

    Raises:
        ValueError: the name is not that of a folder, or a run has it.
    """
    name = f"{run_name(run_of(dict(base), {}))}-sweep" if name is None else name
    check_name(name)
    folder = folders.RUNS / name
    if (folder / "run.toml").exists():
        raise ValueError(f"{folder} is the folder of a run: choose another --name.")
    return folder


def threads_each(jobs: int) -> int:
    """The threads of each of so many processes: what OMP_NUM_THREADS says, or an equal part of the cores."""
    # Processes that each take all cores hinder one another.
    said = os.environ.get("OMP_NUM_THREADS", "")
    return int(said) if said.isdecimal() and int(said) > 0 else max(1, (os.cpu_count() or 1) // jobs)


def train_one(folder: Path, cell: Cell, output: Output) -> None:
    """Train and score one run of a sweep in this process; nothing if that is done, and from its checkpoint if there is one."""
    from .app import _train

    path = folder / cell.name
    if _is_done(path):
        return
    with alone(path, output):
        resumed = _has_checkpoint(path)
        if not resumed:
            _empty(path)
        try:
            _train(RunFolder(path, cell.run, resumed=resumed), output)
        except BaseException:
            if not (path / "metrics.jsonl").exists() and not _has_checkpoint(path):
                shutil.rmtree(path, ignore_errors=True)
            raise


def train_all(folder: Path, cells: Sequence[Cell], jobs: int, threads: int) -> dict[str, tuple[int, str]]:
    """Train the runs that are not done, so many at once, each in a process of its own.

    Returns:
        The exit code and the sentence of each run that failed, by name.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM. The processes have saved their runs and ended.
    """
    from ..training.interrupts import Interrupted, Signals

    waiting = [(place, cell) for place, cell in enumerate(cells) if not _is_done(folder / cell.name)]
    done, running, failed = len(cells) - len(waiting), dict[Cell, subprocess.Popen](), dict[str, tuple[int, str]]()
    if done:
        print(f"{done} of {len(cells)} are done", flush=True)
    (folder / LOGS).mkdir(exist_ok=True)
    try:
        with Signals(terminate=True) as signals:
            while (waiting or running) and signals.received is None:
                while waiting and len(running) < jobs:
                    place, cell = waiting.pop(0)
                    running[cell] = _start(folder, place, cell, threads)
                ended = [cell for cell, process in running.items() if process.poll() is not None]
                for cell in ended:
                    code, done = running.pop(cell).returncode, done + 1
                    if code:
                        failed[cell.name] = (code, _last_line(folder / LOGS / f"{cell.name}.log", code))
                    print(f"[{done}/{len(cells)}] {cell.name}: {_said(folder / cell.name, failed.get(cell.name))}", flush=True)
                if not ended:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            if signals.received is not None:
                for process in running.values():
                    process.send_signal(signals.received)
            for process in running.values():
                process.wait()
    finally:
        for process in running.values():
            process.kill()
    if signals.received is not None:
        raise Interrupted(f"The sweep was interrupted: go on with pyrovae sweep --resume {folder}", signals.received)
    return failed


def finish(folder: Path, cells: Sequence[Cell], failed: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """Print the table of what is done, write it as ``sweep.json`` and compare the models on a page; what was found."""
    from .. import files
    from ..evidence.comparison import compare
    from ..evidence.results import Evidence
    from .comparison_page import write_comparison
    from .output import json_text

    for cell in cells:  # one may have been scored again, and that call killed
        files.settle(folder / cell.name)
    done = [cell for cell in cells if _is_done(folder / cell.name)]
    groups: dict[str, list[Cell]] = {}
    for cell in done:
        groups.setdefault(cell.model, []).append(cell)
    evidence = {
        model: [Evidence.load(folder / cell.name / "evidence.safetensors") for cell in group] for model, group in groups.items()
    }
    ranked = sorted(evidence, key=lambda model: -_sortable(_mean(evidence[model])))
    models = [{"name": model, **_numbers(evidence[model])} for model in ranked]
    runs = [_run(folder, cell, failed.get(cell.name)) for cell in cells]
    found: dict[str, Any] = {"folder": str(folder), "models": models, "runs": runs, "comparison": None, "page": None}
    if models:
        print(f"\nHeld-out log p(x), nats per datum, with standard errors:\n{_table(models)}")
    if len(evidence) > 1:
        try:
            comparison = compare(evidence)
        except ValueError as error:  # a grid over data, or over kinds of likelihoods
            print(f"\nNo differences: {error}")
        else:
            page = folder / "comparison.html"
            settings = {model: read_run(folder / groups[model][0].name / "run.toml") for model in comparison.names}
            records = {model: files.read_lines(folder / groups[model][0].name / "metrics.jsonl") for model in comparison.names}
            write_comparison(page, comparison, evidence, runs=settings, records=records)
            print(f"\nPaired differences to the best:\n{comparison}\nPage: {page}")
            found |= {"comparison": comparison.to_dict(), "page": str(page)}
    files.write_text(folder / "sweep.json", json_text(found) + "\n")
    return found


def _start(folder: Path, place: int, cell: Cell, threads: int) -> subprocess.Popen:
    """A process that trains a run; what it prints is in its log."""
    command = [sys.executable, "-m", "pyrovae", "sweep", "--resume", str(folder), "--index", str(place)]
    package = str(Path(__file__).parents[2])
    paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / LOGS / f"{cell.name}.log").open("ab") as log:
        # Ctrl-C reaches the sweep alone, which passes it on.
        return subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": paths},
            start_new_session=True,
        )


def _is_done(path: Path) -> bool:
    return all((path / name).is_file() for name in ("summary.json", "evidence.safetensors", "run.toml"))


def _has_checkpoint(path: Path) -> bool:
    return any(path.glob("checkpoint/step-*"))


def _empty(path: Path) -> None:
    """Remove what a run that was killed before its first checkpoint has left."""
    from ..files import LOCK, OWNER

    for each in path.iterdir():
        if each.name in (LOCK, OWNER):
            continue
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def _last_line(log: Path, code: int) -> str:
    """The sentence with which a process ended."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = [line.removeprefix("pyrovae: ") for line in lines if line.startswith("pyrovae: ")]
    by = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
    return said[-1] if said and code > 0 else f"its process was ended by {by}."


def _said(path: Path, failure: tuple[int, str] | None) -> str:
    if failure is not None:
        return failure[1]
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return f"log p(x) {summary['log_px']:.3f}" if summary["log_px"] is not None else "log p(x) is not finite"


def _run(folder: Path, cell: Cell, failure: tuple[int, str] | None) -> dict[str, Any]:
    """A run's place, settings and numbers."""
    path = folder / cell.name
    record: dict[str, Any] = {"name": cell.name, "model": cell.model, "seed": cell.run.seed, "folder": str(path)}
    if _is_done(path):
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        kept = ("log_px", "monte_carlo_se", "data_se", "bits_per_dim", "num_data", "num_reliable")
        return record | {"state": "done"} | {name: summary[name] for name in kept}
    return record | {"state": "open" if failure is None else "failed", "error": None if failure is None else failure[1]}


def _mean(runs: Sequence[Evidence]) -> float:
    return sum(run.mean for run in runs) / len(runs)


def _sortable(number: float) -> float:
    return number if not math.isnan(number) else -math.inf


def _numbers(runs: Sequence[Evidence]) -> dict[str, Any]:
    """The mean of a model's runs and what is uncertain about it, in nats per datum."""
    import numpy as np

    from ..evidence.comparison import sampling_error, training_error

    log_px = np.mean([run.log_px for run in runs], 0)
    return {
        "num_runs": len(runs),
        "log_px": _mean(runs),
        "monte_carlo_se": sampling_error(runs),
        "data_se": float(np.std(log_px, ddof=1) / math.sqrt(len(log_px))) if len(log_px) > 1 else math.nan,
        "training_se": training_error(runs),
        "bits_per_dim": sum(run.bits_per_dim for run in runs) / len(runs),
        "unreliable": int(np.any([~run.reliable for run in runs], 0).sum()),
        "num_data": len(log_px),
    }


def _table(models: Sequence[dict[str, Any]]) -> str:
    from ..tables import text_table

    header = ["model", "runs", "log p(x)", "sampling", "data", "training", "unrel."]
    keys = ("monte_carlo_se", "data_se", "training_se")
    rows = [
        [each["name"], str(each["num_runs"]), f"{each['log_px']:.3f}"]
        + [f"{each[key]:.3f}" if math.isfinite(each[key]) else "-" for key in keys]
        + [str(each["unreliable"])]
        for each in models
    ]
    return text_table(header, rows)
