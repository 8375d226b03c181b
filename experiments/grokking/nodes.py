"""How many nodes the path integral needs: its measured error against what was spent, for three families of rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import explaind
from explaind.features import path_errors
from explaind.quadrature import Quadrature, adaptive, gauss_legendre, midpoint

__all__ = ["IN_WORDS", "RULES", "Rule", "closure_by_nodes"]

IN_WORDS = (
    "A step is integrated with one node (three if the model is smooth), where the slope of every kinked function is "
    "replaced by its average over the step. What that misses of the prediction's change is measured with two forward "
    "passes. If it is more than the step's part of the tolerance, which is the step's part of the query's path, the "
    "step is divided into 2, 4 or 8 parts, by how much it missed, for those queries only. The parts are extrapolated "
    "together with the whole (Richardson); parts for which that is not enough are divided in the same way."
)
"""The rule that is used wherever nothing else is said, `"adaptive"`."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A way to integrate."""

    family: str
    """Rules of one line in the figure."""
    quadrature: Quadrature
    tolerance: float = 1e-6
    """Wanted error as a part of the path; fixed rules do not look at it."""


RULES = (
    *(Rule(family="midpoint", quadrature=midpoint(num)) for num in (1, 4, 16, 64)),
    *(Rule(family="Gauss–Legendre", quadrature=gauss_legendre(num)) for num in (1, 4, 16, 64)),
    *(
        Rule(family="adaptive, averaged kinks", quadrature=adaptive(), tolerance=tolerance)
        for tolerance in (1e-2, 1e-3, 1e-4, 1e-5)
    ),
)
"""Those that the study compares."""


def closure_by_nodes(
    run: explaind.Run,
    query: explaind.Query,
    *,
    steps: Sequence[int] | None = None,
    rules: Sequence[Rule] = RULES,
    progress: bool = False,
) -> pd.DataFrame:
    """Σ over steps of |measured error of the step's path integral|, in float64.

    Args:
        run: any recorded run.
        query: predictions.
        steps: which updates; by default all.
        rules: what is compared.
        progress: show a progress bar.

    Returns:
        A row per rule: `family`, `rule`, `tolerance`, `num_steps`, `nodes` (mean per step and query), `mean_error` and
        `max_error` (over queries, in their unit).
    """
    rows = []
    for rule in tqdm(rules, "nodes", unit="rule", disable=None if progress else True, leave=False):
        data = path_errors(
            run,
            query,
            range(run.num_steps) if steps is None else steps,
            quadrature=rule.quadrature,
            tolerance=rule.tolerance,
            dtype=torch.float64,
        )
        errors = np.abs(data.quadrature).sum("update_step")
        rows.append(
            {
                "family": rule.family,
                "rule": rule.quadrature.name,
                "tolerance": rule.tolerance,
                "num_steps": data.sizes["update_step"],
                "nodes": float(data.num_nodes.mean()),
                "mean_error": float(errors.mean()),
                "max_error": float(errors.max()),
            }
        )
    return pd.DataFrame(rows)
