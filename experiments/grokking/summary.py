"""The table over tasks and seeds as a page; every number is computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from .stability import BOUNDARIES, LEVEL, points_of

__all__ = ["in_markdown"]

RUN_COLUMNS = {
    "memorised": "training ≥ 0.99 at step",
    "half_generalised": "validation ≥ 0.5",
    "generalised": "validation ≥ 0.95",
    "num_steps": "steps",
}


def in_markdown(
    runs: pd.DataFrame, layers: pd.DataFrame, points: pd.DataFrame | None = None, stability: pd.DataFrame | None = None
) -> str:
    """The runs, the layers' shares in each phase and the phases that a statistic finds, as tables.

    Args:
        runs: One row for each task and seed, as `across` returns them.
        layers: One row for each task, seed, phase and layer; may be empty if no run grokked.
        points: Change points of the runs, from `stability.recurring`.
        stability: One row for each task, from `stability.verdicts`.

    Returns:
        Markdown.
    """
    lines = ["# Tasks and seeds", "", "## Runs", ""]
    lines += _table(
        ["task", "architecture", "seed", *RUN_COLUMNS.values(), "sum of terms − prediction", "quadrature / path"],
        [
            [
                str(row["task"]),
                str(row["architecture"]),
                str(row["seed"]),
                *(["did not grok"] + 5 * ["–"] if pd.isna(row.get("generalised")) else _run(row)),
            ]
            for row in runs.to_dict(orient="records")
        ],
    )
    if len(layers):
        names = list(dict.fromkeys(layers["layer"]))
        groups = layers.groupby(["task", "architecture", "phase"], sort=False)
        rows = []
        for (task, architecture, phase), part in groups:
            totals = part.groupby("seed")[["influence", "decay_influence"]].sum()
            ratio = totals["decay_influence"] / totals["influence"]
            shares = [_spread(100 * part.loc[part["layer"] == name, "mean_share"], ".1f", " %") for name in names]
            rows.append([str(task), str(architecture), str(phase), str(len(totals)), *shares, _spread(ratio, ".2f")])
        lines += [
            "",
            "## Through which layers",
            "",
            "Share of each layer group in a step's Σ |contribution| over validation classes, mean over the phase's "
            "steps; and decay / data, Σ |decay| by Σ |contribution| over the phase. Mean ± standard deviation over "
            "seeds.",
            "",
            *_table(["task", "architecture", "phase", "seeds", *names, "decay / data"], rows),
        ]
    if points is not None and stability is not None:
        lines += _found(runs, points, stability)
    return "\n".join([*lines, ""])


def _found(runs: pd.DataFrame, points: pd.DataFrame, stability: pd.DataFrame) -> list[str]:
    """Change points of every run beside the accuracies, and whether they are stable over seeds."""
    judged = [
        [
            str(row["task"]),
            str(row["architecture"]),
            str(row["seeds"]),
            "–".join(dict.fromkeys((str(row["fewest"]), str(row["most"])))),
            f"{row['recurring']} of {row['points']}" if row["seeds"] > 1 else "–",
            *("–" if pd.isna(row[name]) else f"{row[name]:.3f}" for name in ("recurrence", "by_chance", "p_value")),
            *(f"{row[f'holds_{name}']} of {row['seeds']}" for name in BOUNDARIES),
            f"**{row['verdict']}**",
        ]
        for row in stability.to_dict(orient="records")
    ]
    found = []
    for run in runs.dropna(subset=["generalised"]).to_dict(orient="records"):
        own = points_of(points, {str(name): value for name, value in run.items()})
        texts = [f"{p['step']} ({p['low']}–{p['high']}; {p['time']:.2f})" for p in own.to_dict(orient="records")]
        steps = [str(int(run[name])) for name in BOUNDARIES]
        found.append([str(run["task"]), str(run["architecture"]), str(run["seed"]), *steps, ", ".join(texts) or "none"])
    return [
        "",
        "## Phases found by a statistic",
        "",
        "Change points of the layers' shares, beside the steps at which accuracies were reached. Runs are compared "
        "on a clock of their own accuracies, which reads 1 when the training set is memorised, 2 when half of the "
        "validation pairs are known and 3 at the end. Phases are stable if every change point recurs in all other runs "
        "of the task, and if intervals as wide, each at a random step of its run, meet as often in at most "
        f"{LEVEL:.0%} of the draws (p).",
        "",
        *_table(
            [
                "task",
                "architecture",
                "seeds",
                "change points of a run",
                "that recur in all other runs",
                "mean recurrence",
                "by chance",
                "p",
                *(f"an interval holds {name}" for name in ("memorised", "half generalised", "generalised")),
                "phases",
            ],
            judged,
        ),
        "",
        "Each change point with its 95 % interval and its time on the clock:",
        "",
        *_table(
            [
                "task",
                "architecture",
                "seed",
                *(RUN_COLUMNS[name] for name in BOUNDARIES),
                "change points",
            ],
            found,
        ),
    ]


def _run(row: Mapping[Any, Any]) -> list[str]:
    steps = [str(int(row[name])) for name in RUN_COLUMNS]
    return [*steps, f"{row['closure_error']:.0e}", f"{row['quadrature_error']:.0e}"]


def _spread(values: pd.Series[float], form: str, unit: str = "") -> str:
    spread = f" ± {values.std():{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}{unit}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
