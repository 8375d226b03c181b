"""Phases found by a statistic, over seeds: do the layers' shares change at the same time in all runs of a task?

Steps of two runs cannot be compared: one may take four times as many as another to generalise. They are compared on a
clock of each run's own accuracies, which reads 0 at the first step, 1 when the training set is memorised, 2 when half
of the validation pairs are known and 3 at the end, and runs evenly between: 1.5 is the middle of circuit formation.

Wide intervals meet often. So phases are called stable if every change point recurs in all other runs, and if intervals
as wide, each at any step of its run, would seldom meet as often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from explaind.analysis.change_points import change_points, number_of_change_points
from explaind.analysis.influence import layer_shares
from explaind.analysis.recurrence import is_stable, recurrence

__all__ = ["BOUNDARIES", "POINTS", "chance", "clock", "find_change_points", "points_of", "recurring", "verdicts"]

BOUNDARIES = ("memorised", "half_generalised", "generalised")
"""Steps at which accuracies were first reached."""

POINTS = ["task", "architecture", "seed", "step", "low", "high"]
"""Columns of the change points of several runs."""

LEVEL = 0.05
"""Phases are no more stable than by chance if more than this part of the draws meet as often."""


def find_change_points(steps: pd.DataFrame) -> pd.DataFrame:
    """The change points of one run's layer shares, as many as `number_of_change_points` chooses, with 95 % intervals.

    Args:
        steps: `influence` by `step` and `layer`, from `layer_tables.layers_by_step`; steps without any are left out.
    """
    influence = steps.pivot_table(index="step", columns="layer", values="influence", sort=False)
    shares = layer_shares(xr.DataArray(influence)).dropna("step")
    numbers = number_of_change_points(shares)
    return change_points(shares, int(numbers["number"][numbers["chosen"]].iloc[0]))


def clock(run: Mapping[str, float]) -> list[int]:
    """The steps at which a run's clock reads 0, 1, 2 and 3.

    Args:
        run: with `memorised`, `half_generalised` and `num_steps`; of the first two the later one is the turn, as in
            `Phases.spans`.

    Example:
        >>> clock({"memorised": 60, "half_generalised": 200, "num_steps": 300})
        [0, 60, 200, 300]
    """
    memorised, half, end = (int(run[name]) for name in ("memorised", "half_generalised", "num_steps"))
    return [0, memorised, max(memorised, half), end]


def points_of(points: pd.DataFrame, run: Mapping[str, Any]) -> pd.DataFrame:
    """Those of one run's `task`, `architecture` and `seed`."""
    task, architecture, seed = (points[name] == run[name] for name in ("task", "architecture", "seed"))
    own: pd.DataFrame = points[task & architecture & seed]
    return own


def recurring(points: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """When each change point is on the clock, and in which part of the task's other runs it recurs.

    Args:
        points: with the columns `POINTS`.
        runs: of `across`; those that did not grok are left out.

    Returns:
        The change points with `time` and `recurrence`, which is NaN where there is no other run.
    """
    parts = []
    for _, part in _grokked(runs).groupby(["task", "architecture"], sort=False):
        found, clocks = _by_seed(points, part)
        for seed, one in found.items():
            one.insert(len(one.columns), "time", np.interp(one["step"].astype(float), clocks[seed], range(4)))
        own = pd.concat(found.values(), ignore_index=True)
        parts.append(own.assign(recurrence=recurrence(found, clocks)["recurrence"] if len(found) > 1 else np.nan))
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame(columns=[*POINTS, "time", "recurrence"])


def verdicts(points: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Whether the phases of each task are stable over seeds.

    Args:
        points: from `recurring`.
        runs: of `across`; those that did not grok are left out.

    Returns:
        A row per task and architecture: `seeds`; `fewest` and `most` change points of a run; `points`, how many in all,
        and how many of these are `recurring` in all other runs; their mean `recurrence`, and that `by_chance`; its
        `p_value`, the part of the draws that meet as often; in how many runs an interval `holds_` each of `BOUNDARIES`;
        and the `verdict`: "stable", "not stable", "no change points", or "one run", of which nothing can be said.
    """
    rows = []
    for (task, architecture), part in _grokked(runs).groupby(["task", "architecture"], sort=False):
        found, clocks = _by_seed(points, part)
        own = pd.concat(found.values())
        row: dict[str, Any] = {
            "task": task,
            "architecture": architecture,
            "seeds": len(found),
            "fewest": min(map(len, found.values())),
            "most": max(map(len, found.values())),
            "points": len(own),
            "recurring": int((own["recurrence"] == 1).sum()),
            "recurrence": own["recurrence"].mean(),
            "by_chance": np.nan,
            "p_value": np.nan,
            "verdict": "no change points" if own.empty else "one run",
        }
        if len(found) > 1 and len(own):
            drawn = chance(found, clocks)
            row["by_chance"] = drawn.mean()
            row["p_value"] = (1 + (drawn >= row["recurrence"]).sum()) / (1 + len(drawn))
            row["verdict"] = "stable" if is_stable(own) and row["p_value"] <= LEVEL else "not stable"
        for name in BOUNDARIES:
            reached = part.set_index("seed")[name]
            row[f"holds_{name}"] = sum(
                bool(((one["low"] <= reached[seed]) & (one["high"] >= reached[seed])).any())
                for seed, one in found.items()
            )
        rows.append(row)
    return pd.DataFrame(rows)


def chance(
    found: Mapping[int, pd.DataFrame], clocks: Mapping[int, Sequence[int]], *, num_draws: int = 199
) -> NDArray[np.float64]:
    """Mean recurrences of intervals as wide as those found, each at a step of its run drawn uniformly, `[draw]`.

    Args:
        found: the change points of each run; one of them has some.
        clocks: of each run.
        num_draws: how often they are drawn.
    """
    rng, means = np.random.default_rng(0), []
    for _ in range(num_draws):
        moved = {}
        for seed, one in found.items():
            places = one[["step", "low", "high"]].astype(float)
            moved[seed] = places.add(rng.uniform(0, clocks[seed][-1], len(one)) - places["step"], axis=0)
        means.append(recurrence(moved, clocks)["recurrence"].mean())
    return np.array(means)


def _grokked(runs: pd.DataFrame) -> pd.DataFrame:
    return runs.dropna(subset=["generalised"])


def _by_seed(points: pd.DataFrame, runs: pd.DataFrame) -> tuple[dict[int, pd.DataFrame], dict[int, list[int]]]:
    """The change points and the clock of each run of one task and architecture."""
    rows = {int(row["seed"]): {str(name): row[name] for name in row} for row in runs.to_dict("records")}
    found = {seed: points_of(points, row).reset_index(drop=True) for seed, row in rows.items()}
    return found, {seed: clock(row) for seed, row in rows.items()}
