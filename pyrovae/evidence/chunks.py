"""The division of draws into chunks, and chunks that are drawn ahead of their use."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ["ahead", "chunk_sizes", "parts_of", "runs_of", "side_by_side"]

Value = TypeVar("Value")


def parts_of(
    active: Tensor, step: int, chunk: int, first: int | None, group: int, whole: int | None = None
) -> Iterator[tuple[Tensor, int]]:
    """The rows that draw together, and how many draws each takes at once, to make ``step`` draws for all rows.

    Args:
        active: the rows, by their numbers.
        step: draws for each row.
        chunk: (sample, datum) pairs that are scored at once.
        first: the smallest number of draws, if there are several. Graphs are compiled for one shape, so there are few shapes
            then: many rows of ``first`` draws in the early rounds, one row of a power of two times as many in later ones.
            Without it chunks are as even as possible, for the same reason.
        group: the most rows that draw together.
        whole: rows that have to draw together.
    """
    if first is None:
        rows = whole or min(max(1, chunk // step), group)
        most = math.ceil(step / math.ceil(step / max(1, chunk // rows)))
        yield from ((chosen, most) for chosen in active.split(rows))
        return
    one_row_from = _doubled(first, chunk)
    for chosen in active.split(max(1, chunk // first) if step < one_row_from else 1):
        most = _doubled(first, chunk // len(chosen))
        yield chosen, most if most <= chunk else math.ceil(first / math.ceil(first / chunk))


def _doubled(number: int, limit: int) -> int:
    """The number times the largest power of two that stays within the limit, or the number itself."""
    return number << max(0, (limit // number).bit_length() - 1)


def chunk_sizes(number: int, most: int) -> Iterator[int]:
    """``number`` draws in chunks of ``most``; the last one may be smaller."""
    yield from [most] * (number // most)
    if number % most:
        yield number % most


def runs_of(parts: list[tuple[Tensor, int]], step: int, numbers: int) -> Iterator[list[tuple[Tensor, int]]]:
    """The parts in runs of at most ``numbers`` log-weights, which are reduced together."""
    number = max(1, numbers // (step * max(len(rows) for rows, _ in parts)))
    yield from (parts[place : place + number] for place in range(0, len(parts), number))


def side_by_side(blocks: Iterator[Tensor], parts: list[tuple[Tensor, int]], step: int) -> Iterator[Tensor]:
    """The blocks of one part in turn, or those of several parts as one block that holds the data of all."""
    if len(parts) == 1:
        return blocks
    columns = [torch.cat([next(blocks) for _ in chunk_sizes(step, most)]) for _, most in parts]
    return iter([torch.cat(columns, 1)])


def ahead(calls: Iterable[Callable[[], Value]], number: int) -> Iterator[Value]:
    """The values of the calls in order; ``number`` further calls are made before each value is waited for."""
    waiting: deque[Callable[[], Value]] = deque()
    for call in calls:
        waiting.append(call)
        if len(waiting) > number:
            yield waiting.popleft()()
    while waiting:
        yield waiting.popleft()()
