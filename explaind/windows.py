"""Windows of steps: the coarse step axis of a decomposition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from operator import index
from typing import Any

__all__ = ["Windows", "select_windows"]


@dataclass(frozen=True)
class Windows:
    """Successive steps that are summed, window by window in the order of the steps."""

    labels: list[Any]
    """A label per window: its first step, or the name that it was given."""
    steps: list[range]
    """The steps of each, disjoint and ascending."""

    @cached_property
    def place(self) -> dict[int, int]:
        """Position of the window of every step."""
        return {step: place for place, steps in enumerate(self.steps) for step in steps}

    def of(self, wanted: Sequence[int]) -> tuple[Windows, list[int]]:
        """The windows that have any of the wanted steps, and those of these that lie in one.

        Raises:
            ValueError: there is none.
        """
        inside = [step for step in wanted if step in self.place]
        if not inside:
            raise ValueError(f"none of the steps lies in a window; the windows are {self.steps}.")
        places = [place for place, steps in enumerate(self.steps) if not set(inside).isdisjoint(steps)]
        return Windows([self.labels[place] for place in places], [self.steps[place] for place in places]), inside


def select_windows(windows: int | Mapping[Any, range | slice] | None, *, num_steps: int, asked: bool) -> Windows | None:
    """The windows that the user named; None without the axis.

    Args:
        windows: their length in steps, counted from step 0, or `{label: range(first, stop)}`.
        num_steps: of the run.
        asked: whether `by` has the axis.

    Raises:
        ValueError: the axis without windows, or windows without the axis, that overlap or that the run does not have.
    """
    if (windows is not None) != asked:
        raise ValueError(
            "by has 'window', so say which: windows=50 for 50 steps each, or windows={'memorising': range(0, 60), …}."
            if asked
            else "windows= is given, so name their axis: by=('query', 'window', …)."
        )
    if windows is None:
        return None
    if isinstance(windows, Mapping):
        spans = {label: _span(label, span, num_steps) for label, span in windows.items()}
        ordered = sorted(spans.items(), key=lambda entry: entry[1].start)
        for (one, before), (other, after) in pairwise(ordered):
            if before.stop > after.start:
                raise ValueError(f"windows must not share steps: {one!r} is {before} and {other!r} is {after}.")
        if not ordered:
            raise ValueError("windows= is empty; name at least one.")
        return Windows([label for label, _ in ordered], [span for _, span in ordered])
    try:
        length = index(windows)
    except TypeError:
        length = 0
    if length < 1:
        raise ValueError(f"windows= is a number of steps, or a mapping of labels to ranges; got {windows!r}.")
    firsts = range(0, num_steps, length)
    return Windows(list(firsts), [range(first, min(first + length, num_steps)) for first in firsts])


def _span(label: Any, span: range | slice, num_steps: int) -> range:
    steps = range(num_steps)[span] if isinstance(span, slice) else span
    if not isinstance(steps, range) or steps.step != 1 or not steps or steps.start < 0 or steps.stop > num_steps:
        raise ValueError(
            f"window {label!r} must be successive steps of the run's {num_steps}, such as range(0, 50); got {span!r}."
        )
    return steps
