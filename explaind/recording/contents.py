"""What the batches of data loaders held, so that a loop that is resumed can tell whether it gets them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.calls import named_tensors
from explaind.recording.writer import Rows
from explaind.store import StoreReader

__all__ = ["RecordedBatch", "batch_rows", "first_difference", "read_batches", "row_contents"]

_SHIFT = np.uint64(29)


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedBatch:
    """A batch that a data loader gave."""

    iteration: int
    """Number of the iteration over a loader that it was in."""
    step: int
    """Number of optimizer steps that were finished before it."""
    examples: NDArray[np.int64]
    """Index of every row in the data set, `[row]`."""
    contents: NDArray[np.int64]
    """A number that tells what each row held, `[row]`."""


def batch_rows(batch: RecordedBatch) -> list[Rows]:
    """The rows of the store that note a batch."""
    about = np.array([[batch.iteration, batch.step, len(batch.examples)]], np.int64)
    rows = np.stack([batch.examples, batch.contents], axis=1)
    return [("batch", about, ("batch", "batch_entry")), ("batch_row", rows, ("batch_row", "batch_row_entry"))]


def read_batches(store: StoreReader, first: int, stop: int) -> list[RecordedBatch]:
    """Some of the batches that a store notes."""
    if first >= stop:
        return []
    about = store.read("batch", 0, stop)
    ends = np.cumsum(about[:, 2])
    rows = store.read("batch_row", int(ends[first] - about[first, 2]), int(ends[-1]))
    parts = np.split(rows, ends[first:-1] - ends[first] + about[first, 2])
    return [
        RecordedBatch(iteration=int(iteration), step=int(step), examples=part[:, 0], contents=part[:, 1])
        for (iteration, step, _), part in zip(about[first:], parts, strict=True)
    ]


def row_contents(batch: Any, num_rows: int) -> NDArray[np.int64]:
    """A number for each row of a batch that depends on every bit of its tensors, `[row]`.

    Tensors without a row for each example count for all of them.
    """
    contents = np.zeros(num_rows, np.uint64)
    for _, tensor in named_tensors(batch):
        if tensor.layout == torch.strided and tensor.numel():
            contents = contents * _multipliers(1)[0] + _sums(tensor, num_rows)
    return contents.view(np.int64)


def _sums(tensor: Tensor, num_rows: int) -> NDArray[np.uint64]:
    has_rows = tensor.ndim and len(tensor) == num_rows
    flat = tensor.detach().cpu().contiguous().reshape(num_rows if has_rows else 1, -1)
    raw: NDArray[Any] = flat.view(torch.uint8).numpy()
    if raw.shape[1] % 8 == 0:
        words = raw.view(np.uint64)
        words = words ^ (words >> _SHIFT)  # so that no pair of bits cancels in the sum
    else:
        words = raw.astype(np.uint64)
    sums: NDArray[np.uint64] = words @ _multipliers(words.shape[1])
    return sums


@lru_cache(maxsize=16)
def _multipliers(number: int) -> NDArray[np.uint64]:
    """Odd numbers of 64 bits that look random."""
    return np.random.default_rng(number).integers(1 << 63, size=number, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def first_difference(one: Sequence[int] | NDArray[Any], other: Sequence[int] | NDArray[Any]) -> int | None:
    """The first place at which two sequences differ, in an entry or because one ends there."""
    for place, (first, second) in enumerate(zip(one, other, strict=False)):
        if first != second:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))
