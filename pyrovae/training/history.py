"""What happened in a training run, one record for each epoch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..tables import Table, Tabular

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes

__all__ = ["History"]

# Rows of the table: more epochs are thinned out.
_MOST_ROWS = 12


@dataclass
class History(Tabular):
    """What happened in training, one record an epoch.

    Attributes:
        estimator: the name of the objective's class.
        num_particles: K.
        records: dictionaries with ``epoch``, ``step``, ``bound`` and ``validation`` (nats per datum; ``None`` without
            validation data), ``lr`` and ``seconds`` since the start.
        stopped: why training ended.
        precision: of matrix products and convolutions.
        skipped: steps that were skipped, since their loss or gradient was not finite.

    Example:
        >>> import torch, pyrovae as pv
        >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
        >>> history = vae.fit(torch.ones(50, 9), estimator="iwae", epochs=3, seed=0, progress=False)
        >>> history.bound_name, len(history.bound), history.stopped
        ('IWAE, K = 5', 3, 'all epochs done')
    """

    estimator: str
    num_particles: int
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "all epochs done"
    precision: str = "float32"
    skipped: int = 0

    def __repr__(self) -> str:
        """One line: the estimator, the epochs and the last bounds."""
        last = f", bound={self.records[-1]['bound']:.4g} nats per datum" if self.records else ""
        held = f", validation={self.validation[-1]:.4g}" if self.validation else ""
        return f"History({self.bound_name}, {len(self.records)} epochs{last}{held}, {self.stopped})"

    @property
    def bound_name(self) -> str:
        """The bound in words, such as ``"IWAE, K = 50"``."""
        return self.estimator if self.num_particles == 1 else f"{self.estimator}, K = {self.num_particles}"

    @property
    def bound(self) -> list[float]:
        """The training bound of each epoch, averaged while the parameters moved, in nats per datum."""
        return [record["bound"] for record in self.records]

    @property
    def validation(self) -> list[float]:
        """The validation bound of each epoch, in nats per datum; empty without validation data."""
        return [record["validation"] for record in self.records if record["validation"] is not None]

    def table(self) -> Table:
        """The epochs as a table, at most twelve of them."""
        count = len(self.records)
        shown = sorted({round(i * (count - 1) / max(min(count, _MOST_ROWS) - 1, 1)) for i in range(min(count, _MOST_ROWS))})
        rows = [
            [
                str(record["epoch"]),
                f"{record['bound']:.3f}",
                "-" if record["validation"] is None else f"{record['validation']:.3f}",
                f"{record['lr']:.2g}",
                f"{record['seconds']:.1f}",
            ]
            for record in (self.records[row] for row in shown)
        ]
        return Table(
            ["epoch", "bound", "validation", "lr", "seconds"],
            rows,
            left=(),
            caption=f"Training by {self.bound_name}, in nats per datum; {self.stopped}",
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the learning curve.

        Args:
            ax: the axes to draw on; by default new ones, which Jupyter shows.
        """
        from ..plots import learning_curve

        return learning_curve(self.records, ax, bound=f"bound, {self.bound_name}")

    def to_pandas(self) -> pandas.DataFrame:
        """One row for each epoch."""
        import pandas

        frame = pandas.DataFrame(self.records)
        return frame.set_index("epoch") if len(frame) else frame

    def save(self, path: str | Path) -> None:
        """Write the history as JSON, atomically."""
        files.write_text(path, json.dumps({"history": asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> History:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is truncated, or holds something else.

        Example:
            >>> import tempfile, pyrovae as pv
            >>> history = pv.History("ELBO", 1, [{"epoch": 1, "bound": -9.5, "validation": None, "lr": 1e-3, "seconds": 2.0}])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     history.save(f"{folder}/history.json")
            ...     pv.History.load(f"{folder}/history.json") == history
            True
        """
        content = files.read_json(path)
        record = content.get("history") if isinstance(content, dict) else None
        if not isinstance(record, dict) or set(record) != {each.name for each in fields(cls)}:
            raise ValueError(f"{path} must be a file that History.save wrote, got one that holds no history.")
        return cls(**record)
