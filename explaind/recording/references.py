"""What a store has of inputs that stay in the data set: their digests; and whether ids lead back to them."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from explaind.errors import RecordingError
from explaind.places import Place
from explaind.recording.forwards import ForwardCall

__all__ = ["DIGEST_BYTES", "References", "digest_array", "row_digests"]

DIGEST_BYTES = 16
"""Length of a digest."""
_NOBODY = np.iinfo(np.int64).min


def row_digests(rows: NDArray[Any]) -> NDArray[np.uint8]:
    """BLAKE2b of the bytes of every row, little-endian and row-major, `[row, 16]`.

    Example:
        >>> row_digests(np.eye(3))[:, :2].tolist()
        [[210, 182], [122, 139], [154, 202]]
    """
    plain = np.ascontiguousarray(rows.astype(rows.dtype.newbyteorder("<"), copy=False))
    made = [hashlib.blake2b(row.data, digest_size=DIGEST_BYTES).digest() for row in plain.reshape(len(plain), -1)]
    return np.frombuffer(b"".join(made), np.uint8).reshape(len(made), DIGEST_BYTES)


def digest_array(layout: int, name: str) -> str:
    """Name of the array of digests of an input tensor; inputs of one layout are named and shaped alike."""
    return f"input_digests-{layout}/{quote(name, safe='')}" if layout else f"input_digests/{quote(name, safe='')}"


class References:
    """Sees to it that a data set can give again what the model is called with.

    The id of an example leads back to one item, so an example must always come with the same inputs: those of the first
    step that it is in, which may be several if the model is called several times. Calls of other layouts, such as
    batches that are padded to another length, count apart.

    Args:
        path: directory of the store.
    """

    def __init__(self, path: Place) -> None:
        self._path = path
        self._owners: dict[int, NDArray[np.int64]] = {}
        self._first: dict[int, dict[int, int]] = {}
        self._others: set[tuple[int, int, int]] = set()
        self._new: set[tuple[int, int]] = set()
        self._step = -1
        self._changed: tuple[int, int] | None = None
        self._told = False

    def check_call(self, call: ForwardCall, ids: NDArray[np.int64] | None) -> None:
        """What a call was made with must be found again by its examples' ids.

        Raises:
            RecordingError: they have none, or it is made of what other modules gave.
        """
        if call.part:
            raise RecordingError(
                "inputs='by_reference' keeps no inputs, but the modules of a container are called with each other's "
                f"outputs, as '{call.part}' may be, and no data set has those. Record with inputs='stored'."
            )
        if ids is None:
            raise RecordingError(
                "inputs='by_reference' keeps the ids of examples in place of their inputs, but the examples of step "
                f"{call.step} have none. Iterate over recorder.batches(loader), or call recorder.examples(ids) in "
                "every step; or record with inputs='stored', where examples can be told by their content."
            )

    def note(self, ids: NDArray[np.int64], inputs: NDArray[np.int64], layout: int, step: int) -> None:
        """Look at which input of a layout each example of a call comes with, `[row]`; called by the writer's thread."""
        owners, first = self._room_for(int(inputs.max()), layout), self._first.setdefault(layout, {})
        new = owners[inputs] != ids
        if not new.any():
            return
        if step != self._step:
            self._step = step
            self._new.clear()
        for example, number in zip(ids[new].tolist(), inputs[new].tolist(), strict=True):
            if example not in first:
                first[example] = number
                self._new.add((layout, example))
            elif number != first[example] and (layout, example, number) not in self._others:
                if (layout, example) not in self._new:
                    self._changed = self._changed or (example, step)
                    return
                self._others.add((layout, example, number))
            owners[number] = example

    def _room_for(self, number: int, layout: int) -> NDArray[np.int64]:
        """The last example that came with each input of a layout, as many as there are or more."""
        owners = self._owners.get(layout, np.empty(0, np.int64))
        if number >= len(owners):
            more = np.full(max(len(owners), number + 1 - len(owners)), _NOBODY)
            owners = self._owners[layout] = np.concatenate([owners, more])
        return owners

    def check(self) -> None:
        """Raise, once, if an example came with other inputs than before.

        Raises:
            RecordingError: one did.
        """
        if self._changed is None or self._told:
            return
        self._told = True
        example, step = self._changed
        raise RecordingError(
            f"example {example} came with another input at step {step} than in an earlier step, as with random "
            "augmentation, so its item in the data set cannot stand for both. Record with inputs='stored'. What was "
            f"recorded until now is in {self._path}; the steps before {step} can still be attributed to examples."
        )
