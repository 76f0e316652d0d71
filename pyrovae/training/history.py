"""What happened in a training run, one record for each epoch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["History"]


@dataclass
class History:
    """What happened in training, one record an epoch.

    Attributes:
        estimator: the name of the objective's class.
        num_particles: K.
        records: dictionaries with ``epoch``, ``step``, ``bound`` and ``validation`` (nats per datum; ``None`` without
            validation data), ``lr`` and ``seconds`` since the start.
        stopped: why training ended.
        precision: of matrix products and convolutions.
        skipped: steps that were skipped, since their loss or gradient was not finite.
    """

    estimator: str
    num_particles: int
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "all epochs done"
    precision: str = "float32"
    skipped: int = 0

    @property
    def bound(self) -> list[float]:
        """The training bound of each epoch, averaged while the parameters moved, in nats per datum."""
        return [record["bound"] for record in self.records]

    @property
    def validation(self) -> list[float]:
        """The validation bound of each epoch, in nats per datum; empty without validation data."""
        return [record["validation"] for record in self.records if record["validation"] is not None]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the learning curve, on new axes unless given some."""
        from ..plots import learning_curve

        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(figsize=(6, 4), layout="constrained").subplots()
        return learning_curve(self.records, ax)
