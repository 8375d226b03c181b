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
from explaind.recording.writer import Later, Rows
from explaind.store import StoreReader

__all__ = ["RecordedBatch", "batch_rows", "first_difference", "read_batches", "row_contents", "tensors_of"]

_SHIFT, _WORD = np.uint64(29), 8
"""By the shift no pair of bits cancels in a sum of multiples of words."""


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


def batch_rows(iteration: int, step: int, examples: Sequence[int], batch: Any) -> Later:
    """Rows of the store that note a batch: its iteration, its step, the indices of its examples, and what they hold."""
    copies = [tensor.detach().clone() for tensor in tensors_of(batch)]  # which the loop may change

    def make() -> list[Rows]:
        about = np.array([[iteration, step, len(examples)]], np.int64)
        rows = np.stack([np.array(examples, np.int64), row_contents(copies, len(examples))], axis=1)
        return [("batch", about, ("batch", "batch_entry")), ("batch_row", rows, ("batch_row", "batch_row_entry"))]

    return Later(make, sum(tensor.nbytes for tensor in copies))


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


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch by which it is told from another one."""
    return [tensor for _, tensor in named_tensors(batch) if tensor.layout == torch.strided]


def row_contents(tensors: Sequence[Tensor], num_rows: int) -> NDArray[np.int64]:
    """A number for each row of a batch that depends on every bit of its tensors, `[row]`.

    Tensors without a row for each example count for all of them.
    """
    parts = [_bytes(tensor, num_rows) for tensor in tensors]
    width = sum(part.shape[1] for part in parts)
    if missing := -width % _WORD:
        parts.append(np.zeros((num_rows, missing), np.uint8))
    if not parts:
        return np.zeros(num_rows, np.int64)
    raw = np.concatenate(parts, axis=1) if len(parts) > 1 else np.ascontiguousarray(parts[0])
    words = raw.view(np.uint64)
    contents: NDArray[np.uint64] = (words ^ (words >> _SHIFT)) @ _multipliers(words.shape[1])
    return contents.view(np.int64)


def _bytes(tensor: Tensor, num_rows: int) -> NDArray[np.uint8]:
    """The bytes of a tensor `[row, byte]`."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    raw: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    if tensor.ndim and len(tensor) == num_rows:
        return raw.reshape(num_rows, -1)
    return np.broadcast_to(raw, (num_rows, len(raw)))


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
