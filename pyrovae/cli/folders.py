"""The folder of a run: taken before the work, filled while it trains, removed if the run is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Run, write_run
from .output import Output

if TYPE_CHECKING:
    from ..models.base import PairModule
    from ..training.callbacks import Callback

__all__ = ["RUNS", "Follower", "RunFolder", "alone", "check_name", "new_folder"]

RUNS = Path("runs")


class RunFolder:
    """Writes settings, curve and model of a run into its folder.

    Args:
        path: the folder, which exists.
        run: what is written there as ``run.toml``.
        resumed: whether the run goes on in a folder that it has written before.
    """

    def __init__(self, path: Path, run: Run, *, resumed: bool):
        self.path, self.run, self.resumed = path, run, resumed
        self.checkpoint = path / "checkpoint"
        self.records: list[dict[str, Any]] = []
        self._begun = False
        if resumed:
            self.records = self._records_before()

    def start(self, run: Run) -> None:
        """Write the settings, with what the data say of them."""
        self.run = run
        if not self.resumed:  # else when the checkpoint has been found to be theirs
            self._write_settings()

    def loggers(self) -> list[Callback]:
        """The callbacks that the settings ask for.

        Raises:
            ValueError: one of them is not installed.
        """
        from ..training.callbacks import MLflow, TensorBoard, WandB

        train, name = self.run.train, self.path.name
        found: list[Callback] = []
        if train.tensorboard:
            found.append(TensorBoard(self.path / "tensorboard"))
        if train.wandb:
            found.append(WandB(name=name))
        if train.mlflow:
            found.append(MLflow(run_name=name))
        return found

    def __call__(self, record: dict[str, Any]) -> None:
        """Write an epoch's record."""
        if not self._begun:
            self._begin()
        self.records.append(record)
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record) + "\n")

    def finish(self, vae: PairModule, records: list[dict[str, Any]]) -> None:
        """Write the model and the whole curve."""
        self.records = list(records)
        self._write_records()
        vae.save_pretrained(self.path)

    @contextmanager
    def training(self, vae: PairModule) -> Iterator[None]:
        """A context for ``fit``: whatever ends it, the model and the curve of the epochs so far are written.

        Raises:
            KeyboardInterrupt: as ``fit`` does; the message says how to go on.
        """
        from ..training.interrupts import Interrupted

        try:
            yield
        except BaseException as error:
            history = getattr(error, "history", None)
            if history is not None and (history.records or self.records):
                try:
                    self.finish(vae, history.records)
                except OSError as second:
                    error.add_note(str(second))
            if isinstance(error, Interrupted) and self.run.train.checkpoint:
                message = str(error).partition(": ")[0]
                raise Interrupted(
                    f"{message}: go on with pyrovae train --resume {self.path}", error.signal, error.history
                ) from None
            raise

    def _begin(self) -> None:
        """Now the run has been accepted, and what it wrote before may be changed."""
        self._begun = True
        if self.resumed:
            self._write_settings()
            self._write_records()

    def _write_settings(self) -> None:
        from .. import files

        files.write_text(self.path / "run.toml", write_run(self.run))

    def _write_records(self) -> None:
        from .. import files

        files.write_text(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.records))

    def _records_before(self) -> list[dict[str, Any]]:
        """The records of the checkpoint: the file may have one more, which will come again."""
        from ..training.checkpoint import load_checkpoint

        try:
            return list(load_checkpoint(self.checkpoint).history.records)
        except FileNotFoundError:
            return []


class Follower(RunFolder):
    """The folder of a run as processes other than the first see it: they write nothing."""

    def __init__(self, path: Path, run: Run, *, resumed: bool):
        super().__init__(path, run, resumed=False)
        self.resumed = resumed

    def start(self, run: Run) -> None:
        """Take the settings, with what the data say of them."""
        self.run = run

    def loggers(self) -> list[Callback]:
        """None: the first process has them."""
        return []

    def finish(self, vae: PairModule, records: list[dict[str, Any]]) -> None:
        """Nothing to write."""


@contextmanager
def alone(folder: Path, output: Output) -> Iterator[None]:
    """A context in which no other command works in a run's folder; a line says so if the last one there was killed.

    Raises:
        ValueError: another command works there; the message names its process.
    """
    from ..files import taken

    with taken(folder) as before:
        if before is not None:
            with output.words():
                print(f"{before[0].upper()}{before[1:]}, which was the last in {folder}, has ended: its work is taken over.")
        yield


def check_name(name: str) -> None:
    """Refuse a name that is not that of one folder.

    Raises:
        ValueError: it is empty, has slashes, or means another folder.
    """
    if name in ("", ".", "..") or Path(name).name != name or "\0" in name or "\\" in name:
        raise ValueError(f"A run's name must be that of one folder, got {name!r}: leave out slashes and dots.")


@contextmanager
def new_folder(name: str, *, chosen: bool) -> Iterator[Path]:
    """A new folder in ``runs/``, which no other run has; it is removed if the run fails before it has kept anything.

    Args:
        name: of the folder. If it is taken, a number is appended.
        chosen: whether the user chose the name, which is refused if it is taken.

    Raises:
        ValueError: the name is not that of a folder, or taken.
    """
    from ..files import taken

    check_name(name)
    made_runs = not RUNS.exists()
    folder, number = RUNS / name, 1
    while True:
        try:
            folder.mkdir(parents=True)  # another run may have removed the folder of all runs
            break
        except FileExistsError as error:
            if chosen:
                raise ValueError(f"{folder} exists already: choose another --name, or remove it first.") from error
            number += 1
            folder = RUNS / f"{name}-{number}"
    try:
        with taken(folder):
            yield folder
    except BaseException:
        if not (folder / "metrics.jsonl").exists() and not list(folder.glob("checkpoint/step-*")):
            shutil.rmtree(folder, ignore_errors=True)
            if made_runs:
                with suppress(OSError):  # another run has a folder there
                    RUNS.rmdir()
        raise
