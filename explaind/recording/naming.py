"""Names of the examples in a batch: data set indices, ids given by hand, or else their content."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from explaind.calls import named_tensors
from explaind.errors import RecordingError
from explaind.recording.batches import with_indices
from explaind.recording.iterations import Iterations

__all__ = ["ExampleNames", "NamedBatch"]


@dataclass(frozen=True, eq=False, kw_only=True)
class NamedBatch:
    """A batch whose rows have names."""

    ids: Sequence[int] | NDArray[np.int64]
    """Example id of every row."""
    batch: Any = None
    """The batch itself, as the loader gave it; None if it was named by hand."""

    def is_shown(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether one of a call's tensors is one of the batch's."""
        return any(_same(one, other) for one, other in self._pairs(inputs))

    def is_permuted(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether one of a call's tensors has the rows of one of the batch's in another order."""
        own = {id(tensor) for _, tensor in named_tensors(self.batch)}
        if all(id(given) in own for given in inputs.values()):
            return False
        return any(not _same(one, other) and _same_rows(one, other) for one, other in self._pairs(inputs))

    def _pairs(self, inputs: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for _, own in named_tensors(self.batch):
            for given in inputs.values():
                if own.shape == given.shape and own.ndim and own.numel():
                    yield given.detach().cpu(), own.detach().to(device="cpu", dtype=given.dtype)


class ExampleNames:
    """Keeps the ids that the next forward calls' rows have, and refuses what would mix examples up."""

    def __init__(self) -> None:
        self._current: NamedBatch | None = None
        self._used = False
        self._ahead: list[NamedBatch] = []
        self._by_hand = False
        self._used_by_hand: list[tuple[Any, str | None, Mapping[str, NDArray[Any]]]] = []
        self._ever: bool | None = None
        self._loaders: dict[int, tuple[DataLoader[Any], DataLoader[Any]]] = {}
        self._dataset: Any = None
        self._iterating = False
        self.iterations: Iterations | None = None
        """Counts the iterations over loaders; set by who records."""

    @property
    def are_given(self) -> bool | None:
        """Whether examples have names; None if that is not known yet."""
        return self._ever

    def go_on(self, are_given: bool | None) -> None:
        """Go on where examples had names, or had none."""
        self._ever = are_given

    def batches(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield a loader's batches; while one is in use, its rows are named by data set index."""
        if id(loader) not in self._loaders:
            self._loaders[id(loader)] = (loader, with_indices(loader))
        if self._dataset is None:
            self._dataset = loader.dataset
        if self._dataset is not loader.dataset:
            raise RecordingError(
                "recorder.batches was given loaders of two data sets, whose indices would be mixed up. Iterate over "
                "loaders for evaluation without it, or name examples by hand with recorder.examples(ids)."
            )
        return self._iterate(*self._loaders[id(loader)])

    def _iterate(self, loader: DataLoader[Any], indexed: DataLoader[Any]) -> Iterator[Any]:
        if self._iterating:
            raise RecordingError(
                "two loaders of recorder.batches are in use at once, so it is not known which batch a forward call is "
                "about. Name each batch with recorder.examples(ids) before its forward call."
            )
        assert self.iterations is not None
        self._iterating = True
        self._ahead = []
        try:
            with closing(self.iterations.batches(loader, indexed)) as found:
                for indices, batch in found:
                    self._leave_current()
                    self._current, self._by_hand = NamedBatch(ids=indices, batch=batch), False
                    yield batch
        finally:
            self._leave_current()
            self._iterating = False

    def _leave_current(self) -> None:
        """The current batch gives way to the next one; if no call was about it yet, that may still come."""
        if self._current is not None and not self._used and not self._by_hand:
            self._ahead.append(self._current)
        self._current, self._used = None, False

    def named(self, inputs: Mapping[str, Tensor]) -> NamedBatch | RecordingError | None:
        """The batch that a call with these tensors is about; None if it has no name, or why it is not known."""
        found = self._current
        if self._ahead and not self._by_hand:
            found = next((batch for batch in [*self._ahead, found] if batch and batch.is_shown(inputs)), None)
            if found is None:
                return RecordingError(
                    "recorder.batches was asked for a batch before a forward call was about the one before it, and the "
                    "model's input is none of these as it came, so it is not known which one it is. Name the rows of "
                    "each call with recorder.examples(ids) before it."
                )
            self._ahead = self._ahead[self._ahead.index(found) :] if found in self._ahead else []
        self._used = self._used or found is self._current
        if found is not None and found.is_permuted(inputs):
            return RecordingError(
                "the rows of the model's input are those of the batch in another order, which recorder.batches cannot "
                "know. Name them with recorder.examples(ids) before the forward call."
            )
        return found

    def by_hand(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> None:
        """Name the rows of the next calls with one batch, up to the end of the step."""
        values = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TypeError(
                f"example ids are a flat sequence of integers, one per row of the batch; got {values.dtype} with "
                f"shape {values.shape}."
            )
        self._current, self._by_hand = NamedBatch(ids=values.astype(np.int64)), True

    def whole(self, batch: Any) -> None:
        """The next calls are about this batch, whose examples are numbered in its order."""
        num_rows = len(next(tensor for _, tensor in named_tensors(batch)))
        self._current, self._by_hand = NamedBatch(ids=np.arange(num_rows), batch=batch), True

    def end_step(self) -> None:
        """Forget ids that were given by hand: the next step's batch is another one."""
        if self._by_hand:
            self._current = None
        self._used_by_hand.clear()

    def resolve(
        self,
        given: Sequence[int] | NDArray[np.int64] | RecordingError | None,
        inputs: Mapping[str, NDArray[Any]],
        step: int,
        part: str | None,
    ) -> NDArray[np.int64] | None:
        """The ids of a call's rows; None if they were not given, so that their content tells them apart.

        Raises:
            RecordingError: it is not known which batch it is; some batches are named and others not; there is not one
                id per row; or ids that were given by hand once are those of two different batches.
        """
        if isinstance(given, RecordingError):
            raise given
        if self._ever is None:
            self._ever = given is not None
        elif self._ever != (given is not None):
            raise RecordingError(
                f"step {step} has a batch whose examples are {'not named' if self._ever else 'named'}, unlike those "
                "before. Name the examples of every batch (recorder.batches, or recorder.examples in every step), "
                "or of none."
            )
        if given is None:
            return None
        num_rows = len(next(iter(inputs.values())))
        if len(given) != num_rows:
            raise RecordingError(
                f"{len(given)} example ids were given for a batch of {num_rows} rows at step {step}. Call "
                "recorder.examples(ids) with one id per row before each forward call."
            )
        if self._by_hand:
            for earlier, called, others in self._used_by_hand:
                if earlier is given and called == part and not _same_bytes(inputs, others):
                    raise RecordingError(
                        f"two different batches of step {step} have the ids of one call of recorder.examples(ids). "
                        "Call it before the forward pass of each micro-batch."
                    )
            self._used_by_hand.append((given, part, inputs))
        return np.array(given, dtype=np.int64)


def _same_bytes(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(rows, other[name]) for name, rows in one.items()]
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _same_rows(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same rows in any order."""
    if not torch.isclose(one.double().sum(), other.double().sum()):  # spares the rows of most batches the comparison
        return False
    flat = (tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy() for tensor in (one, other))
    first, second = (sorted(row.tobytes() for row in rows) for rows in flat)
    return first == second
