"""Where a loop can go on after an interruption, and where it does go on if it was resumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from explaind.errors import RecordingError
from explaind.recording.boundaries import Boundaries
from explaind.recording.iterations import Iterations
from explaind.recording.loop_state import LoopState
from explaind.recording.naming import ExampleNames
from explaind.recording.resumption import Resumption
from explaind.recording.steps import StepRows

__all__ = ["Continuation"]


class Continuation:
    """Has points taken down from which the loop can go on, and brings it to the one at which it was resumed.

    Args:
        state: takes down what the loop changes, and puts it back.
        rows: what is written.
        names: knows the examples of the batches.
        resumption: where the loop goes on; None if it begins.
        keeps_gradients: tells whether gradients are stored because they cannot be replayed.
    """

    def __init__(
        self,
        state: LoopState,
        rows: StepRows,
        names: ExampleNames,
        resumption: Resumption | None,
        *,
        keeps_gradients: Callable[[], bool],
    ) -> None:
        self._state, self._rows, self._keeps_gradients = state, rows, keeps_gradients
        self._resumption, self._num_batches, self._first = resumption, 0, rows.num_steps
        self._boundaries = Boundaries(
            state.random_state, is_asked_for=lambda: rows.pace.wants_point, take=self._take_point
        )
        self._iterations = names.iterations = Iterations(
            state.device, at_request=self._boundaries.request_batch, handed_out=self._get_batch
        )
        if resumption is not None:
            self._num_batches = resumption.point["num_batches"]
            self._iterations.resume(resumption.point["place"], resumption.batches(), self._go_on)
            self.put_back()

    @property
    def goes_on(self) -> bool:
        """Whether a step has begun since the recording began, or was resumed."""
        return self._rows.num_steps > self._first or self._rows.unfinished

    def put_back(self) -> None:
        """Bring the loop to where it goes on, if it was resumed."""
        if self._resumption is not None:
            self._state.put(self._resumption.point, self._resumption.moment)
            self._rows.take_state()

    def keep(self, companion: Any) -> None:
        """Keep the state of another object."""
        self._state.companions.add(companion)

    # ------------------------------------------------------------------ what the loop does

    def begin_step(self) -> None:
        """A forward pass begins, or examples are named by hand: outside of a data loader that begins a step."""
        if not self._iterations.in_progress:
            self._check_goes_on()
            self._boundaries.begin_step()

    def end_step(self) -> None:
        """A step is finished."""
        self._resumption = None  # what was read for it takes memory
        self._boundaries.end_step(within_batches=self._iterations.in_progress)

    def leave(self, *, in_order: bool) -> None:
        """The loop has come to its end, or an error has stopped it."""
        if self._iterations.is_waiting and not self.goes_on:
            self.put_back()
        elif in_order:
            self._boundaries.leave()

    # ------------------------------------------------------------------ points

    def _take_point(self, random: dict[str, Any]) -> None:
        state = self._state.take(random, self._iterations.place)
        own = {"num_batches": self._num_batches, "keeps_gradients": self._keeps_gradients()}
        self._rows.take_point(lambda: own | state())

    def _get_batch(self, iteration: int, indices: list[int], batch: Any) -> None:
        self._boundaries.get_batch()
        self._rows.add_batch(iteration, indices, batch)
        self._num_batches += 1

    # ------------------------------------------------------------------ where it goes on

    def _go_on(self) -> None:
        """The loop has come to the batch that is next."""
        self.put_back()
        self._state.companions.check()

    def _check_goes_on(self) -> None:
        """The first step after a recording was resumed must begin where it goes on, also outside of a data loader.

        Raises:
            RecordingError: it does not.
        """
        if self._resumption is None or not self._iterations.is_waiting:
            return
        place, path = self._resumption.point["place"], self._resumption.path
        if place["iteration"] or place["used"]:
            raise RecordingError(
                f"the run at {path} goes on at batch {place['used']} of iteration {place['iteration']} of "
                "recorder.batches, and a step began before that. Resume with the loop that was recorded."
            )
        self._state.companions.check()
        parameters = self._state.parameters()
        for name, value in self._resumption.moment.params.items():
            if not torch.equal(parameters[name].detach().cpu(), value.cpu()):
                raise RecordingError(
                    f"the parameter '{name}' is not what it was after {self._first} steps of the run at {path}. "
                    "Entering the block and recorder.restore() bring it there; leave it so until the next step."
                )
        self._iterations.arrive()
