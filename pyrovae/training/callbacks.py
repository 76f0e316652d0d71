"""Callbacks of a training run, and those that log it with TensorBoard, Weights & Biases or MLflow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..programs.sites import Program
from .history import History

__all__ = ["Callback", "MLflow", "TensorBoard", "Training", "WandB"]

# What loggers write of each epoch's record.
LOGGED = ("bound", "validation", "lr")


@dataclass
class Training:
    """What a callback sees of a run.

    Attributes:
        model: p(x, z).
        guide: q(z|x).
        optimizer: its learning rates and other options may be changed.
        history: the records so far.
        options: the arguments of ``fit`` that are numbers or text.
        epoch: the present one, from 1 on.
        step: the number of steps that have been taken.
        stopped: why a callback ended the run, or ``None``.
    """

    model: Program
    guide: Program
    optimizer: torch.optim.Optimizer
    history: History
    options: dict[str, Any]
    epoch: int = 1
    step: int = 0
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """End the run after this step or epoch; ``history.stopped`` becomes the reason."""
        self.stopped = reason


class Callback:
    """The base class of callbacks; each method may be overridden.

    On a GPU, steps are queued, and their losses are known at the end of an epoch. What a callback keeps is not part of
    a checkpoint.

    Example:
        >>> import torch, pyrovae as pv
        >>> class EnoughSteps(pv.Callback):
        ...     def step(self, training):
        ...         if training.step == 3:
        ...             training.stop("three steps are enough")
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> vae.fit(torch.ones(50, 9), batch_size=10, progress=False, callbacks=[EnoughSteps()]).stopped
        'three steps are enough'
    """

    def start(self, training: Training) -> None:
        """Before the first step, or the first after a checkpoint."""

    def step(self, training: Training) -> None:
        """After each step."""

    def epoch(self, training: Training, record: dict[str, Any]) -> None:
        """After each epoch, with its record."""

    def end(self, training: Training) -> None:
        """After the last step, however the run ended."""


class TensorBoard(Callback):
    """Logs the curves for TensorBoard.

    Args:
        folder: where its files go.

    Raises:
        ValueError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError('TensorBoard is not installed: pip install "pyrovae[tensorboard]".') from error
        self._make = SummaryWriter
        self._board: Any = None

    def start(self, training: Training) -> None:
        """Open the file, and hide what an interrupted run wrote after its last checkpoint."""
        self._board = self._make(str(self.folder), purge_step=training.step + 1 if training.step else None)

    def epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Write a record."""
        for name in LOGGED:
            if record[name] is not None:
                self._board.add_scalar(name, record[name], record["step"])

    def end(self, training: Training) -> None:
        """Close the file."""
        if self._board is not None:
            self._board.close()


class WandB(Callback):
    """Logs the curves with Weights & Biases.

    Args:
        **options: of ``wandb.init``, such as ``project="vae"``; ``resume="allow"`` with an ``id`` goes on with a run.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, **options: Any):
        try:
            import wandb
        except ImportError as error:
            raise ValueError('Weights & Biases is not installed: pip install "pyrovae[wandb]".') from error
        self._wandb: Any = wandb
        self.options = options
        self._run: Any = None

    def start(self, training: Training) -> None:
        """Open a run with the options of ``fit``."""
        self._run = self._wandb.init(**{"config": training.options} | self.options)

    def epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Log a record."""
        self._run.log({name: record[name] for name in LOGGED if record[name] is not None}, step=record["step"])

    def end(self, training: Training) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()


class MLflow(Callback):
    """Logs the curves with MLflow.

    Args:
        **options: of ``mlflow.start_run``, such as ``run_name="vae"``; ``run_id`` goes on with a run.

    Raises:
        ValueError: mlflow is not installed.
    """

    def __init__(self, **options: Any):
        try:
            import mlflow
        except ImportError as error:
            raise ValueError('MLflow is not installed: pip install "pyrovae[mlflow]".') from error
        self._mlflow: Any = mlflow
        self.options = options
        self._open = False

    def start(self, training: Training) -> None:
        """Open a run with the options of ``fit``."""
        self._mlflow.start_run(**self.options)
        self._open = True
        self._mlflow.log_params(training.options)

    def epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Log a record."""
        metrics = {name: record[name] for name in LOGGED if record[name] is not None}
        self._mlflow.log_metrics(metrics, step=record["step"])

    def end(self, training: Training) -> None:
        """End the run."""
        if self._open:
            self._mlflow.end_run()
            self._open = False
