"""Whether the same change points are found in several runs, such as seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

__all__ = ["is_stable", "recurrence"]


def recurrence(
    found: Mapping[Any, pd.DataFrame], clock: Mapping[Any, Sequence[float]], *, tolerance: float = 0.1
) -> pd.DataFrame:
    """Of every change point the part of the other runs that have one at the same time.

    Steps of different runs are compared on a common clock: it reads i at a run's i-th landmark, and runs evenly between
    two. Two change points are at the same time if their intervals `low`…`high` come within `tolerance` of each other.

    Args:
        found: the change points of each run, from `change_points`.
        clock: landmarks of each run, ascending steps, as many in all: `[0, num_steps]` for parts of the run, or with
            events between them, such as the steps at which accuracies were reached.
        tolerance: on the clock.

    Returns:
        A row per run and change point: `run`, `point`, `step`, `time` (on the clock) and `recurrence` in 0…1.

    Raises:
        ValueError: fewer than two runs, or landmarks that do not fit.

    Example:
        >>> one, other = (pd.DataFrame({"step": [s], "low": [s], "high": [s]}) for s in (50, 104))
        >>> recurrence({"a": one, "b": other}, {"a": [0, 100], "b": [0, 200]})["recurrence"].tolist()
        [1.0, 1.0]
    """
    if len(found) < 2:
        raise ValueError(f"whether change points recur takes at least two runs, got {len(found)}.")
    if set(clock) != set(found) or len({len(landmarks) for landmarks in clock.values()}) != 1:
        raise ValueError(
            "every run needs the same number of landmarks on its clock; got "
            f"{ {run: list(clock.get(run, [])) for run in found} }."
        )
    for run, landmarks in clock.items():
        if len(landmarks) < 2 or list(landmarks) != sorted(landmarks):
            raise ValueError(f"the landmarks of run {run!r} must be at least two ascending steps, got {landmarks}.")

    def times(run: Any) -> dict[str, np.ndarray]:
        landmarks = clock[run]
        return {
            name: np.interp(found[run][name].to_numpy(float), landmarks, np.arange(len(landmarks)))
            for name in ("step", "low", "high")
        }

    rows = []
    at = {run: times(run) for run in found}
    for run, own in at.items():
        others = [at[other] for other in found if other != run]
        for point, step in enumerate(found[run]["step"].tolist()):
            low, high = own["low"][point] - tolerance, own["high"][point] + tolerance
            met = [bool(((other["low"] <= high) & (other["high"] >= low)).any()) for other in others]
            rows.append((run, point, step, own["step"][point], sum(met) / len(met)))
    return pd.DataFrame(rows, columns=["run", "point", "step", "time", "recurrence"])


def is_stable(recurrences: pd.DataFrame, *, least: float = 1.0) -> bool:
    """Whether every change point recurs in at least this part of the other runs; also true if no run has any.

    Args:
        recurrences: from `recurrence`.
        least: in 0…1.

    Example:
        >>> is_stable(pd.DataFrame({"recurrence": [1.0, 0.75]})), is_stable(pd.DataFrame({"recurrence": [1.0]}))
        (False, True)
    """
    return bool((recurrences["recurrence"] >= least).all())
