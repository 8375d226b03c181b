"""Whether a data loader gives what it gave before: the examples, in their order, and what is in them."""

from __future__ import annotations

import random
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from explaind.errors import ResumeError
from explaind.recording.batches import only_indices
from explaind.recording.contents import RecordedBatch, first_difference, row_contents, tensors_of

__all__ = ["check_again", "check_batch", "check_exhausted"]

_ADVICE = "Resume with the data set, the batch size and the seeds of the recording, or record to another path."


def check_batch(loader: DataLoader[Any], recorded: RecordedBatch, indices: list[int], batch: Any) -> None:
    """A batch that is left out must be the one that was used.

    Raises:
        ResumeError: it has other examples, or something else in them.
    """
    place = first_difference(recorded.examples.tolist(), indices)
    if place is not None:
        before, now = (
            f"example {ids[place]}" if place < len(ids) else f"no more than {len(ids)} examples"
            for ids in (recorded.examples, indices)
        )
        raise ResumeError(
            f"the data loader does not give what was recorded: in the batch of step {recorded.step}, row {place} was "
            f"{before} and is {now}. {_ADVICE}"
        )
    _check_contents(loader, recorded, recorded.contents != row_contents(tensors_of(batch), len(indices)))


def check_again(loader: DataLoader[Any], batches: list[RecordedBatch]) -> None:
    """Examples of earlier batches must be in the data set as they were.

    Raises:
        ResumeError: they are not.
    """
    for recorded in batches:
        _check_contents(loader, recorded, np.ones(len(recorded.examples), np.bool_))


def check_exhausted(recorded: RecordedBatch, number: int) -> NoReturn:
    """There are fewer batches than were used.

    Raises:
        ResumeError: always.
    """
    raise ResumeError(
        f"the data loader does not give what was recorded: it has {number} batches, and there was another one in step "
        f"{recorded.step}, with example {recorded.examples[0]}. {_ADVICE}"
    )


def _check_contents(loader: DataLoader[Any], recorded: RecordedBatch, may_differ: NDArray[np.bool_]) -> None:
    """Rows that may differ must not, as far as the data set gives the same for an example whenever it is asked."""
    if not may_differ.any():
        return
    # What is augmented at random differs from draw to draw, and nothing follows from that.
    one, other = (_drawn(loader, recorded, seed) for seed in (1, 2))
    differ = np.flatnonzero(may_differ & (one == other) & (one != recorded.contents))
    if len(differ):
        more = f" (and {len(differ) - 1} more of that batch)" if len(differ) > 1 else ""
        raise ResumeError(
            f"the data set is not the one that was recorded: example {recorded.examples[differ[0]]}{more}, which was "
            f"in the batch of step {recorded.step}, holds something else now. {_ADVICE}"
        )


def _drawn(loader: DataLoader[Any], recorded: RecordedBatch, seed: int) -> NDArray[np.int64]:
    """Contents of the examples of a batch as the loader gives them with some random numbers."""
    examples = recorded.examples.tolist()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        _, batch = next(iter(only_indices(loader, examples, torch.Generator().manual_seed(seed))))
    except (IndexError, KeyError) as error:
        raise ResumeError(
            f"the data set is not the one that was recorded: it does not have all examples of the batch of step "
            f"{recorded.step}, {examples[:8]} ({error!r}). {_ADVICE}"
        ) from error
    return row_contents(tensors_of(batch), len(examples))
