"""Where one step of a loop ends and the next begins, so that it can go on from there in another process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Boundaries"]

_SHARE = 0.01
"""Part of the time that may be spent on points which nobody has asked for."""


class Boundaries:
    """Finds the points at which nothing of a step is in progress, and has them taken down as often as is cheap.

    In a loop over `recorder.batches` that is where it asks for a batch, if nothing came after the last step. In others
    it is where the first forward pass of a step begins, with the random numbers of the end of the step before: what
    they draw between is mostly the next batch.

    Args:
        random_state: returns the states of all random number generators.
        is_asked_for: tells whether a point is needed now, whatever it takes.
        take: takes a point down, with these random states.
    """

    def __init__(
        self,
        random_state: Callable[[], dict[str, Any]],
        *,
        is_asked_for: Callable[[], bool],
        take: Callable[[dict[str, Any]], None],
    ) -> None:
        self._random_state, self._is_asked_for, self._take = random_state, is_asked_for, take
        self._is_clean = True
        self._random: dict[str, Any] | None = None
        self._random_seconds, self._is_first = 0.0, True
        self._seconds, self._ready = math.inf, -math.inf

    def end_step(self, *, within_batches: bool) -> None:
        """A step is finished."""
        self._is_clean, self._random = True, None
        if not within_batches and self._is_due:
            began = time.monotonic()
            self._random = self._random_state()
            self._random_seconds = time.monotonic() - began

    def request_batch(self) -> None:
        """The loop asks for a batch."""
        if self._is_clean and self._is_due:
            self._note()

    def begin_step(self) -> None:
        """Something of the next step begins."""
        if self._is_clean and (self._random is not None or self._is_first):
            self._note()
        self.get_batch()

    def get_batch(self) -> None:
        """A batch is there, or a forward pass begins: something of a step is in progress."""
        self._is_clean, self._is_first, self._random = False, False, None

    def leave(self) -> None:
        """The loop has come to its end."""
        if self._is_clean:
            self._note()

    @property
    def _is_due(self) -> bool:
        return time.monotonic() >= self._ready or self._is_asked_for()

    def _note(self) -> None:
        began = time.monotonic()
        if self._random is None:
            self._take(self._random_state())
        else:
            self._take(self._random)
            began -= self._random_seconds
        ended = time.monotonic()
        if self._ready > -math.inf:  # the first one is slow
            self._seconds = ended - began if math.isinf(self._seconds) else (self._seconds + ended - began) / 2
        self._ready = ended if math.isinf(self._seconds) else ended + self._seconds / _SHARE
