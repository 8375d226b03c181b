"""Names of the examples in a batch: data set indices, ids given by hand, or else their content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from explaind.errors import RecordingError
from explaind.recording.batches import with_indices

__all__ = ["ExampleNames"]


class ExampleNames:
    """Keeps the ids that the next forward calls' rows have, and refuses what would mix examples up."""

    def __init__(self) -> None:
        self.current: list[int] | None = None
        """Ids of the rows of the next calls, `[row]`; None if they have no names."""
        self._batch: Any = None
        self._by_hand = False
        self._used_by_hand: list[tuple[Sequence[int], str | None, NDArray[np.int64]]] = []
        self._ever: bool | None = None
        self._loaders: dict[int, tuple[DataLoader[Any], DataLoader[Any]]] = {}
        self._dataset: Any = None
        self._iterating = False

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
        return self._iterate(self._loaders[id(loader)][1])

    def _iterate(self, loader: DataLoader[Any]) -> Iterator[Any]:
        if self._iterating:
            raise RecordingError(
                "two loaders of recorder.batches are in use at once, so it is not known which batch a forward call is "
                "about. Name each batch with recorder.examples(ids) before its forward call."
            )
        self._iterating = True
        try:
            for indices, batch in loader:
                self.current, self._batch, self._by_hand = indices, batch, False
                yield batch
        finally:
            self.current, self._batch, self._iterating = None, None, False

    @property
    def batch(self) -> Any:
        """The batch that the next forward calls are about.

        Raises:
            RecordingError: it does not come from `batches`.
        """
        if self._batch is None:
            raise RecordingError(
                "an objective is a function of the batch, so it must be known: iterate over recorder.batches(loader), "
                "and call the model for other purposes under torch.no_grad()."
            )
        return self._batch

    def by_hand(self, ids: Sequence[int] | NDArray[Any] | Tensor) -> None:
        """Name the rows of the next calls with one batch, up to the end of the step."""
        values = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            raise TypeError(
                f"example ids are a flat sequence of integers, one per row of the batch; got {values.dtype} with "
                f"shape {values.shape}."
            )
        self.current, self._by_hand = [int(value) for value in values], True

    def end_step(self) -> None:
        """Forget ids that were given by hand: the next step's batch is another one."""
        if self._by_hand:
            self.current = None
        self._used_by_hand.clear()

    def resolve(
        self, given: Sequence[int] | None, content: NDArray[np.int64], step: int, part: str | None
    ) -> NDArray[np.int64]:
        """The ids of a call's rows: those given, or their content's number.

        Raises:
            RecordingError: some batches are named and others not, there is not one id per row, or ids that were given
                by hand once are those of two different batches.
        """
        if self._ever is None:
            self._ever = given is not None
        elif self._ever != (given is not None):
            raise RecordingError(
                f"step {step} has a batch whose examples are {'not named' if self._ever else 'named'}, unlike those "
                "before. Name the examples of every batch (recorder.batches, or recorder.examples in every step), "
                "or of none."
            )
        if given is None:
            return content
        if len(given) != len(content):
            raise RecordingError(
                f"{len(given)} example ids were given for a batch of {len(content)} rows at step {step}. Call "
                "recorder.examples(ids) with one id per row before each forward call."
            )
        if self._by_hand:
            for earlier, called, inputs in self._used_by_hand:
                if earlier is given and called == part and not np.array_equal(inputs, content):
                    raise RecordingError(
                        f"two different batches of step {step} have the ids of one call of recorder.examples(ids). "
                        "Call it before the forward pass of each micro-batch."
                    )
            self._used_by_hand.append((given, part, content))
        return np.array(given, dtype=np.int64)
