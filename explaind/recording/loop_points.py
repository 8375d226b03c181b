"""Points between two steps from which a loop can go on, as rows of the store.

A point holds what the rows about steps do not say: random states, the place in the data loaders, the settings of the
optimizers, the state of what was kept. What they do say, such as the optimizer's state, is not in it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from explaind.recording.plain import pack, unpack
from explaind.recording.writer import Later, Rows
from explaind.store import StoreReader, decoding

__all__ = ["LoopPoint", "PointRows", "point_steps", "read_point"]

_ROW_BYTES = 4096


@dataclass(eq=False, kw_only=True)
class LoopPoint:
    """A point between two steps."""

    step: int
    """Number of finished steps."""
    content: Callable[[], dict[str, Any]]
    """Gives all that is in it, as plain data and tensors that nobody changes any more."""
    params: NDArray[Any] | None
    """The parameters `[element]`; None if they are those that the next step begins with."""
    is_sure: bool
    """Whether `params` are known to be those of the point; if not, they are those at the end of the step before."""


class PointRows:
    """Keeps the last points, and writes down those that are published with their step."""

    def __init__(self) -> None:
        self._points: list[LoopPoint] = []
        self.wants_params = False
        """Whether the loop changes parameters between steps, so that points need their own copy."""
        self._written: LoopPoint | None = None

    def hold(self, point: LoopPoint) -> None:
        """Keep one more point; of those of one step the last counts."""
        self._points = [*self._points[-1:], point] if not self.has(point.step) else [*self._points[:-1], point]

    def has(self, step: int) -> bool:
        """Whether the last point, or the one before it, is at a step."""
        return any(point.step == step for point in self._points)

    def begin(self, step: int, params: NDArray[Any]) -> None:
        """A step begins with these parameters `[element]`, of which the point before it need not say anything then."""
        for point in self._points:
            if point.step == step and point.params is not None:
                if _same_bits(point.params, params):
                    point.params, point.is_sure = None, True
                elif not point.is_sure:  # They were changed before the point or after it.
                    self.wants_params = True
        self._points = [point for point in self._points if point.is_sure or point.step != step]

    def release(self) -> None:
        """The parameters are others than those of the points that are kept."""
        for point in self._points:
            point.params, point.is_sure = None, True

    def rows(self, step: int) -> list[Later]:
        """Rows of the last point that is not behind a step, if they are not written yet."""
        known = [point for point in self._points if point.step <= step and point.is_sure]
        point = known[-1] if known else None
        if point is None or point is self._written:
            return []
        self._written = point
        num_bytes = _ROW_BYTES if point.params is None else _ROW_BYTES + point.params.nbytes
        return [Later(lambda: _rows(point), num_bytes)]


def _same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    return np.array_equal(one.view(f"i{one.itemsize}"), other.view(f"i{other.itemsize}"))


def _rows(point: LoopPoint) -> list[Rows]:
    params = None if point.params is None else torch.from_numpy(point.params)
    packed = pack(point.content() | {"params": params})
    blocks = np.zeros((-(-len(packed) // _ROW_BYTES), _ROW_BYTES), np.uint8)
    blocks.reshape(-1)[: len(packed)] = np.frombuffer(packed, np.uint8)
    about = np.array([[point.step, len(packed)]], np.int64)
    return [
        ("loop_point", about, ("loop_point", "loop_point_entry")),
        ("loop_state", blocks, ("loop_block", "loop_byte")),
    ]


def point_steps(store: StoreReader) -> NDArray[np.int64]:
    """The steps before which a store has points, `[loop_point]`."""
    return store.read("loop_point")[:, 0] if store.has("loop_point") else np.zeros(0, np.int64)


def read_point(store: StoreReader, number: int) -> tuple[dict[str, Any], int]:
    """A point of a store, and where its rows end.

    Raises:
        DamagedStoreError: it is not what was written.
    """
    sizes = store.read("loop_point", 0, number + 1)[:, 1]
    ends = np.cumsum(-(-sizes // _ROW_BYTES))
    with decoding(f"the point before step {point_steps(store)[number]}", store.path):
        start = int(ends[-2]) if number else 0
        raw = store.read("loop_state", start, int(ends[-1])).tobytes()
        content: dict[str, Any] = unpack(raw[: int(sizes[-1])])
        return content, int(ends[-1])
