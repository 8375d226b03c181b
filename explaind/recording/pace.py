"""When the steps that were collected are published: as a block is full, or some time has passed."""

from __future__ import annotations

import time

from explaind.recording.loop_points import PointRows
from explaind.recording.writer import StoreWriter

__all__ = ["Pace"]

_FIRST_SECONDS, _SECONDS = 0.2, 10.0


class Pace:
    """Hands blocks to the writer, as a rule with a point at their last whole step, where the loop could go on.

    Args:
        writer: collects and writes them.
        points: the last points.
    """

    def __init__(self, writer: StoreWriter, points: PointRows) -> None:
        self._writer, self._points = writer, points
        self._last_flush, self._pause = time.monotonic(), _FIRST_SECONDS
        self._begun, self._begun_bytes = time.monotonic(), 0
        self._step_seconds, self._step_bytes = 0.0, 0
        self._has_waited = False

    @property
    def wants_point(self) -> bool:
        """Whether the step that begins will be the last one of a block, as far as the one before tells."""
        is_late = time.monotonic() + self._step_seconds - self._last_flush > self._pause
        return is_late or self._writer.will_want_flush(self._step_bytes)

    def begin_step(self, step: int) -> None:
        """A step begins, before which what is collected may be published."""
        now, num_bytes = time.monotonic(), self._writer.num_bytes
        self._step_seconds, self._step_bytes = now - self._begun, max(0, num_bytes - self._begun_bytes)
        # A block has as many snapshots as steps, so that it fills whole chunks of both: its last whole step is the one
        # before the last.
        is_late = now - self._last_flush > self._pause and not self._writer.is_writing
        if is_late or self._writer.wants_flush:
            if self._points.has(step - 1) or self._has_waited:
                self._writer.add(*self._points.rows(step - 1))
                self._writer.flush()
                self._last_flush, self._pause = time.monotonic(), min(2 * self._pause, _SECONDS)
                num_bytes, self._has_waited = 0, False
            else:
                self._has_waited = True
        self._begun, self._begun_bytes = now, num_bytes
