"""Where a loop is in its data loaders, and how one that is resumed comes there again."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from explaind.recording.contents import RecordedBatch
from explaind.recording.generators import (
    generators_of,
    plain_random_state,
    put_random_state,
    put_states,
    random_state,
    states_of,
)
from explaind.recording.same_data import check_again, check_batch, check_exhausted

__all__ = ["Iterations", "Place"]

_LAST_ITERATIONS = 4
"""Of so many the loaders' generators are known: a loop may take turns with loaders."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a loop is in its data loaders."""

    iteration: int = 0
    """Number of the iteration over a loader that is in progress, or comes next."""
    used: int = 0
    """How many batches of it were used."""
    start: dict[str, Any] | None = None
    """Random states when it began; None if it has not."""
    generators: list[list[Any]] = field(default_factory=list)
    """States of the loaders' own generators now, `[iteration, [state, …]]` of the last few."""

    def plain(self) -> dict[str, Any]:
        """The same as plain data and tensors."""
        start = self.start and self.start | {"random": plain_random_state(self.start["random"])}
        return {"iteration": self.iteration, "used": self.used, "start": start, "generators": self.generators}


@dataclass(frozen=True, kw_only=True)
class _Goal:
    """Where a loop that is resumed goes on."""

    place: dict[str, Any]
    batches: list[RecordedBatch]
    go_on: Callable[[], None]


class Iterations:
    """Counts the iterations over data loaders and the batches of each.

    Args:
        device: where the model is.
        at_request: called before a batch is asked for.
        handed_out: called with the number of the iteration, the indices and the batch.
    """

    def __init__(
        self, device: torch.device, *, at_request: Callable[[], None], handed_out: Callable[[int, list[int], Any], None]
    ) -> None:
        self._device, self._at_request, self._handed_out = device, at_request, handed_out
        self.in_progress = False
        """Whether a loader is iterated over."""
        self._begun = 0
        self._used = 0
        self._start: dict[str, Any] | None = None
        self._generators: dict[int, list[torch.Generator]] = {}
        self._is_left, self._leaves_early = False, False
        self._goal: _Goal | None = None

    @property
    def place(self) -> Place:
        """Where the loop is."""
        # Who leaves a loader early may go on with it, but not if that is how all of its iterations end.
        if self.in_progress or (self._is_left and not self._leaves_early):
            return Place(
                iteration=self._begun - 1, used=self._used, start=self._start, generators=self._generator_states()
            )
        return Place(iteration=self._begun, generators=self._generator_states())

    @property
    def is_waiting(self) -> bool:
        """Whether a loop that was resumed has not come yet to where it goes on."""
        return self._goal is not None

    def resume(self, place: dict[str, Any], batches: list[RecordedBatch], go_on: Callable[[], None]) -> None:
        """Give no batches before a place.

        Args:
            place: what `Place.plain` gave.
            batches: those of that iteration that were used; if there were none, some that came before.
            go_on: called there, before the next batch is asked for.
        """
        self._goal = _Goal(place=place, batches=batches, go_on=go_on)

    def arrive(self) -> None:
        """The loop goes on here."""
        self._goal = None

    def batches(
        self, loader: DataLoader[Any], indexed: DataLoader[Any]
    ) -> Generator[tuple[list[int], Any], None, None]:
        """The indices and batches of a loader, but for those that were used before the loop was resumed.

        Args:
            loader: the loader.
            indexed: what `with_indices` made of it.
        """
        number, goal = self._begun, self._goal
        own = self._generators[number] = generators_of(loader)
        self._generators.pop(number - _LAST_ITERATIONS, None)
        if goal is not None and number < goal.place["iteration"]:
            self._begun += 1
            return
        self._leaves_early |= self._is_left
        self._used, self._is_left = 0, False
        if goal is not None and goal.place["used"]:
            batches = self._skip(loader, indexed, own, goal)
        else:
            if goal is None:
                self._at_request()
            else:
                check_again(loader, goal.batches)
                self._arrive(goal)
            self._start = {"random": random_state(self._device), "generators": states_of(own)}
            batches = iter(indexed)
        self._begun += 1
        self._goal, self.in_progress = None, True
        try:
            while (found := next(batches, None)) is not None:
                self._used += 1
                self._handed_out(number, *found)
                self._is_left = True
                yield found
                self._is_left = False
                self._at_request()
        finally:
            self.in_progress = False

    def _generator_states(self) -> list[list[Any]]:
        """States of the generators of the last loaders, of each generator once."""
        states, known = list[list[Any]](), set[int]()
        for iteration, generators in reversed(self._generators.items()):
            if not known.issuperset(map(id, generators)):
                states.append([iteration, states_of(generators)])
                known.update(map(id, generators))
        return states

    def _arrive(self, goal: _Goal) -> None:
        """Bring all to where the loop goes on."""
        for iteration, states in reversed(goal.place["generators"]):
            if len(generators := self._generators.get(iteration, [])) == len(states):
                put_states(generators, states)
        goal.go_on()

    def _skip(
        self, loader: DataLoader[Any], indexed: DataLoader[Any], generators: list[torch.Generator], goal: _Goal
    ) -> Iterator[tuple[list[int], Any]]:
        """Begin an iteration as it was begun, and leave out what was used of it."""
        start = goal.place["start"]
        put_random_state(start["random"], self._device)
        put_states(generators, start["generators"])
        self._start = {"random": random_state(self._device), "generators": start["generators"]}
        batches = iter(indexed)
        for number, recorded in enumerate(goal.batches):
            found = next(batches, None)
            if found is None:
                check_exhausted(recorded, number)
            else:
                check_batch(loader, recorded, *found)
            self._used += 1
        self._arrive(goal)
        return batches
