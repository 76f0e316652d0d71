"""Data from torch's loaders: in the order of the data set, with checks for streams that can be read only once."""

from __future__ import annotations

import dis
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

__all__ = ["Stream", "in_order", "is_one_pass", "of_one_shape"]

_RANDOM = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
# Data of the first batch on which a collate_fn is tried.
PROBED_ITEMS = 16


class Stream(IterableDataset):
    """An iterable whose first items can be read in advance; the next pass gives them again.

    Args:
        dataset: any iterable, such as an ``IterableDataset`` or a ``DataLoader``.
    """

    def __init__(self, dataset: Iterable[Any]):
        self.dataset = dataset
        self._items: Iterator[Any] | None = None

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        items, self._items = self._items, None
        return iter(self.dataset) if items is None else items

    def take(self, count: int) -> list[Any]:
        """The first items, at most ``count``."""
        items = iter(self)
        taken = [item for _, item in zip(range(count), items, strict=False)]
        self._items = _after(taken, items)
        return taken

    def forget(self) -> None:
        """Let the next pass begin anew."""
        self._items = None


@contextmanager
def of_one_shape() -> Iterator[None]:
    """Say what to do where torch cannot stack the data of a batch.

    Raises:
        ValueError: data of one batch differ in shape.
    """
    try:
        yield
    except RuntimeError as error:
        shapes = re.search(
            r"stack expects each tensor to be equal size, but got (\[.*?\]) at entry \d+ and (\[.*?\]) at", str(error)
        )
        if shapes is None:
            raise
        raise ValueError(
            f"The data set must give data of one shape, got {shapes[1]} and {shapes[2]} in one batch: resize or pad them, or "
            f"give the DataLoader a collate_fn that does."
        ) from error


def _after(taken: list[Any], items: Iterator[Any]) -> Iterator[Any]:
    """The items taken from an iterator, then the remaining ones. ``iter`` would restart an iterator that is a data set."""
    yield from taken
    while True:
        try:
            yield next(items)
        except StopIteration:
            return


def in_order(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader of all data in the order of the data set, or in its sampler's fixed order.

    It replaces a loader that shuffles or drops its last batch.

    Raises:
        ValueError: the sampler draws some of the data at random, or ``collate_fn`` changes the order of rows, so that it is
            unknown.
    """
    batches = loader.batch_sampler
    size = loader.batch_size if loader.batch_size is not None else getattr(batches, "batch_size", None)
    complete = not loader.drop_last and not getattr(batches, "drop_last", False)
    if loader.num_workers and not getattr(loader, "in_order", True):
        complete = False  # workers give batches in any order
    if isinstance(loader.dataset, IterableDataset):
        return loader if complete else _like(loader, batch_size=size)
    _refuse_permuting(loader, size)
    sampler = batches.sampler if type(batches) is BatchSampler else loader.sampler if batches is None else batches
    if isinstance(sampler, SequentialSampler):
        return loader if complete else _like(loader, batch_size=size)
    if isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise ValueError(
            "The DataLoader's DistributedSampler gives this process a part of the data, in an order of its own: pass the data "
            "set itself, which pyrovae divides among the processes."
        )
    num_data = len(loader.dataset)  # type: ignore[arg-type]
    whole = isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == num_data
    drawn = list(range(num_data)) if whole else _indices(sampler)
    if not whole and not isinstance(sampler, _RANDOM) and drawn == _indices(sampler):
        return loader if complete else _like(loader, batch_size=size, sampler=drawn)
    if sorted(drawn) != list(range(num_data)):
        raise ValueError(
            f"The DataLoader's {type(sampler).__name__} draws {len(drawn)} of {num_data} data at random, so the rows "
            f"of the answers would not be those of the data: pass the data set, or torch.utils.data.Subset(dataset, indices)."
        )
    return _like(loader, batch_size=size if batches is None or size is not None else 100)


def is_one_pass(dataset: Any) -> bool:
    """Whether an iterable data set can be read only once, as far as can be told without reading it."""
    if not isinstance(dataset, IterableDataset):
        return False
    first, second = iter(dataset), iter(dataset)
    code = getattr(type(first if first is second else dataset).__iter__, "__code__", None)
    if first is second:
        # An ``__iter__`` that does more than return the object may restart it.
        return _cannot_restart(first) or (code is not None and not code.co_names)
    if code is None or any(callable(getattr(type(dataset), name, None)) for name in code.co_names):
        return False
    renewed = {each.argval for each in dis.get_instructions(code) if each.opname == "STORE_ATTR"}
    read = set(code.co_names) - renewed
    return any(_cannot_restart(value) for name, value in vars(dataset).items() if name in read)


def _cannot_restart(value: Any) -> bool:
    """Whether a value is an iterator that gives each item once, such as a generator, a ``map`` or a ``zip``."""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


def _refuse_permuting(loader: DataLoader[Any], size: int | None) -> None:
    """Refuse a ``collate_fn`` that gives the rows of a batch in another order than their data."""
    if loader.collate_fn in (default_collate, default_convert) or size is None:
        return
    with torch.random.fork_rng(devices=[]):
        items = [loader.dataset[place] for place in range(min(size, len(loader.dataset), PROBED_ITEMS))]  # type: ignore[arg-type]
        try:
            together, alone = (
                _first_array(loader.collate_fn(items)),
                [_first_array(loader.collate_fn([item])) for item in items],
            )
        except (RuntimeError, ValueError, TypeError, LookupError):  # it needs more than one datum
            return
    if together is None or any(row is None or len(row) != 1 or row.shape[1:] != together.shape[1:] for row in alone):
        return
    rows, expected = together.tolist(), torch.cat([row for row in alone if row is not None]).tolist()
    if rows != expected and sorted(map(repr, rows)) == sorted(map(repr, expected)):
        raise ValueError(
            "The DataLoader's collate_fn must keep the order of its data, got one that changes it, so that the rows of the "
            "answers would not be those of the data: leave the order as it is, or pass the data set."
        )


def _first_array(batch: Any) -> Tensor | None:
    """The first tensor of a collated batch, if there is one."""
    first = batch[0] if isinstance(batch, tuple | list) and batch else batch
    return first if isinstance(first, Tensor) and first.dim() else None


def _indices(sampler: Any) -> list[int]:
    """The indices that a sampler gives in one pass, in batches or not, without moving the random stream."""
    with torch.random.fork_rng(devices=[]):
        return [int(index) for each in sampler for index in (each if isinstance(each, list | tuple) else [each])]


def _like(loader: DataLoader[Any], **options: Any) -> DataLoader[Any]:
    """A loader of the same data with the same options, without shuffling or dropping."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"The {type(loader).__name__} shuffles its data or drops some, so the order of the answers would not be "
            f"that of the data: pass the data set, or a loader that does neither."
        )
    workers: dict[str, Any] = {}
    if loader.num_workers:
        workers = {
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": loader.worker_init_fn,
            "timeout": loader.timeout,
        }
    return DataLoader(
        loader.dataset,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        **workers,
        **options,
    )
