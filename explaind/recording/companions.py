"""Objects beside model and optimizer that a loop changes as it goes: schedulers, scalers, averages, generators."""

from __future__ import annotations

from typing import Any

import torch

from explaind.errors import ResumeError
from explaind.recording.plain import copied

__all__ = ["Companions"]


class Companions:
    """What is kept with a recording so that it can be resumed, in the order in which it was given."""

    def __init__(self) -> None:
        self._objects: list[Any] = []
        self._earlier: list[list[Any]] | None = None

    def add(self, companion: Any) -> None:
        """Keep one more; if the recording was resumed it is brought to where it was.

        Raises:
            TypeError: its state cannot be taken down, or not without pickle.
            ResumeError: the recording that was resumed kept no such object.
        """
        copied(_state(companion), f"the state of {type(companion).__name__}")
        place = len(self._objects)
        if self._earlier is not None:
            self._check(place, companion, self._earlier)
            _load(companion, self._earlier[place][1])
        self._objects.append(companion)

    def states(self) -> list[list[Any]]:
        """Class name and state of each; None for generators."""
        named = [(type(companion).__name__, companion) for companion in self._objects]
        return [
            [
                name,
                None if isinstance(companion, torch.Generator) else copied(_state(companion), f"the state of {name}"),
            ]
            for name, companion in named
        ]

    def generator_states(self) -> list[torch.Tensor]:
        """States of the generators among them."""
        return [companion.get_state() for companion in self._objects if isinstance(companion, torch.Generator)]

    def load(self, states: list[list[Any]], generator_states: list[torch.Tensor]) -> None:
        """Bring them all to what `states` and `generator_states` gave, also those that are added later."""
        of_generators = iter(generator_states)
        states = [[name, next(of_generators) if state is None else state] for name, state in states]
        self._earlier = states
        for place, companion in enumerate(self._objects):
            self._check(place, companion, states)
            _load(companion, states[place][1])

    def check(self) -> None:
        """Nothing may be missing that was kept in a recording that was resumed.

        Raises:
            ResumeError: something is.
        """
        if self._earlier is not None and len(self._objects) < len(self._earlier):
            raise ResumeError(
                f"the recording has kept a {self._earlier[len(self._objects)][0]}, which is missing now: call "
                "recorder.keep(…) with the same objects in the same order before the first step."
            )

    def _check(self, place: int, companion: Any, earlier: list[list[Any]]) -> None:
        expected = earlier[place][0] if place < len(earlier) else "no other object"
        if type(companion).__name__ != expected:
            raise ResumeError(
                f"recorder.keep got a {type(companion).__name__} where the recording has kept {expected}, so its state "
                "is not known. Keep the same objects in the same order as in the recording."
            )


def _state(companion: Any) -> Any:
    if isinstance(companion, torch.Generator):
        return companion.get_state()
    if not callable(getattr(companion, "state_dict", None)) or not callable(
        getattr(companion, "load_state_dict", None)
    ):
        raise TypeError(
            "recorder.keep expects objects with state_dict() and load_state_dict(), such as a scheduler, or a "
            f"torch.Generator; got {type(companion).__name__}."
        )
    return companion.state_dict()


def _load(companion: Any, state: Any) -> None:
    state = copied(state, "a state")  # an object may keep what it is given
    if isinstance(companion, torch.Generator):
        companion.set_state(state.cpu())
    else:
        companion.load_state_dict(state)
