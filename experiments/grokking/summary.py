"""The table over tasks and seeds as a page; every number is computed from the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

__all__ = ["in_markdown"]

RUN_COLUMNS = {
    "memorised": "training ≥ 0.99 at step",
    "half_generalised": "validation ≥ 0.5",
    "generalised": "validation ≥ 0.95",
    "num_steps": "steps",
}


def in_markdown(runs: pd.DataFrame, layers: pd.DataFrame) -> str:
    """The runs and the layers' shares in each phase, as tables.

    Args:
        runs: One row for each task and seed, as `across` returns them.
        layers: One row for each task, seed, phase and layer; may be empty if no run grokked.

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
    return "\n".join([*lines, ""])


def _run(row: Mapping[Any, Any]) -> list[str]:
    steps = [str(int(row[name])) for name in RUN_COLUMNS]
    return [*steps, f"{row['closure_error']:.0e}", f"{row['quadrature_error']:.0e}"]


def _spread(values: pd.Series[float], form: str, unit: str = "") -> str:
    spread = f" ± {values.std():{form}}" if len(values) > 1 else ""
    return f"{values.mean():{form}}{spread}{unit}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
