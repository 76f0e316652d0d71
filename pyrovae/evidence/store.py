"""Groups of data that have been scored, in memory and in a file."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import files
from ..data.batches import content_hash
from ..data.matching import Batch
from ..programs.inspect import FirstBatch
from ..programs.log_weights import log_weights
from ..programs.sites import Program
from ..programs.tracing import evaluation_mode

__all__ = ["PairIdentity", "Store", "agreed_seed", "state_hash"]


def agreed_seed(seed: int | None) -> int:
    """The seed, or one from the global stream; the same in all processes."""
    chosen = [int(torch.randint(2**62, ())) if seed is None else int(seed)]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(chosen)
    return chosen[0]


def state_hash(model: Program, guide: Program, first: FirstBatch) -> str:
    """A hash of a pair's parameters and buffers."""
    state = {id(parameter): parameter for parameter in first.parameters}
    for owner in (getattr(program, "__self__", program) for program in (model, guide)):
        if isinstance(owner, torch.nn.Module):
            state |= {id(value): value for value in (*owner.parameters(), *owner.buffers())}
    return content_hash(state.values())


class PairIdentity(NamedTuple):
    """What identifies a pair in a file."""

    state: str  # a hash of its parameters and buffers
    datum: str  # a hash of the first datum
    terms: list[float]  # the parts of one log-weight of it, which show any other change

    @classmethod
    def of(cls, model: Program, guide: Program, first: FirstBatch, one: Batch) -> PairIdentity:
        """The pair's identity: hashes of its state, and one draw from a fixed random stream."""
        devices = [first.device] if first.device.type == "cuda" else []
        with torch.no_grad(), evaluation_mode(model, guide), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            weights = log_weights(model, guide, *one, num_particles=1, max_plate_nesting=0)
        terms = torch.stack([weights.log_likelihood, weights.log_prior, weights.log_guide])
        return cls(state_hash(model, guide, first), content_hash(one), terms.double().flatten().tolist())

    def differs(self, state: str, datum: str, terms: list[float]) -> bool:
        """Whether a file was made by another pair. Terms may differ by rounding, and are compared for the same datum only."""
        same = self.datum != datum or np.allclose(self.terms, terms, rtol=1e-4, atol=1e-4, equal_nan=True)
        return self.state != state or not same


class Store:
    """Groups of data that have been scored: by this process, by others, and by an interrupted call."""

    def __init__(self, path: str | Path | None, seed: int, settings: dict[str, Any], pair: PairIdentity | None, chosen: bool):
        self.path, self.seed, self.settings = None if path is None else Path(path), seed, settings
        self.pair, self.chosen = pair, chosen
        self.groups: dict[int, dict[str, np.ndarray]] = {}
        self.hashes: dict[str, str] = {}
        joined = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank, self.world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if joined else (0, 1)
        if self.path is not None and self.world > 1:
            self.path = self.path.with_name(f"{self.path.stem}.{self.rank}of{self.world}{self.path.suffix}")
        self.turn = itertools.count()
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        arrays, notes = files.read_arrays(path)
        record, cure = notes.get("scored"), "remove it, or resume from a file of its own."
        if not isinstance(record, dict) or not {"settings", "pair", "hashes", "seed"} <= set(record):
            raise ValueError(f"{path} keeps something else, or was written by an earlier version: {cure}")
        settings = record["settings"]
        for name, value in self.settings.items():
            if settings.get(name) != value:
                raise ValueError(f"{path} keeps another evaluation ({name} was {settings.get(name)!r}, not {value!r}): {cure}")
        if self.chosen and int(record["seed"]) != self.seed:
            raise ValueError(f"{path} keeps another evaluation (seed was {record['seed']}, not {self.seed}): {cure}")
        if self.pair is not None and self.pair.differs(*record["pair"]):
            raise ValueError(f"{path} keeps an evaluation of another pair, or of other parameters or buffers: {cure}")
        self.seed, self.hashes = int(record["seed"]), record["hashes"]
        for name, tensor in arrays.items():
            start, _, field = name.partition(".")
            self.groups.setdefault(int(start), {})[field] = tensor.numpy()

    def compare(self, what: dict[str, Any]) -> None:
        """Refuse to mix the answers of processes that score something else.

        Args:
            what: is scored, and how, by name.

        Raises:
            ValueError: processes differ; all raise it.
        """
        if self.world == 1:
            return
        everyone: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(everyone, what)
        for rank, other in enumerate(everyone):
            wrong = [name for name in everyone[0] if everyone[0][name] != other.get(name)]
            if wrong:
                raise ValueError(
                    f"Ranks 0 and {rank} must score the same model on the same data with the same settings, but they differ in "
                    f"{' and '.join(wrong)}: pass all data to each process, and load the same model."
                )

    def seed_of(self, start: int) -> int:
        """The seed of the group that starts there: the same whatever was scored before it."""
        return int(np.random.SeedSequence([self.seed, start]).generate_state(1, np.uint64)[0] >> 1)

    def wants(self, start: int, batch: Batch) -> bool:
        """Whether this process has to score the group that starts there."""
        mine = next(self.turn) % self.world == self.rank
        checksum = "" if self.path is None and self.world == 1 else content_hash(batch)
        if self.hashes.setdefault(str(start), checksum) != checksum:
            raise ValueError(
                f"{self.path} keeps an evaluation of other data, or of the same in another order (from row {start}): remove "
                f"it, or resume from a file of its own."
            )
        return mine and start not in self.groups

    def add(self, start: int, arrays: dict[str, np.ndarray]) -> None:
        """Keep a group's answer."""
        self.groups[start] = arrays
        if self.path is not None:
            flat = {
                f"{start}.{name}": torch.as_tensor(array)
                for start, group in self.groups.items()
                for name, array in group.items()
            }
            notes = {"seed": self.seed, "settings": self.settings, "pair": self.pair, "hashes": self.hashes}
            files.write_arrays(self.path, flat, {"scored": notes})

    @property
    def mean(self) -> float:
        """Mean estimate over the data so far."""
        return float(np.concatenate([group["log_px"] for group in self.groups.values()]).mean())

    def gathered(self, num_data: int) -> dict[str, Any]:
        """All groups of all processes, in the data's order.

        Raises:
            ValueError: the file goes on beyond the data.
        """
        if max(self.groups, default=0) >= num_data:
            raise ValueError(f"{self.path} keeps an evaluation of more data: remove it, or resume from a file of its own.")
        everyone: list[Any] = [self.groups]
        if self.world > 1:
            self.compare({"data": self.hashes})
            everyone = [None] * self.world
            torch.distributed.all_gather_object(everyone, self.groups)
        groups: dict[int, dict[str, np.ndarray]] = {start: group for part in everyone for start, group in part.items()}
        ordered = [groups[start] for start in sorted(groups)]
        return {name: np.concatenate([group[name] for group in ordered]) for name in ordered[0]}
