"""How far what `run.plan` says is from what then happens."""

from __future__ import annotations

from typing import Any

import explaind
from tests.benchmarks.problems import Problem, digits, modular_addition
from tests.benchmarks.queries import ALL_AXES
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import in_own_process, peak_memory, seconds

__all__ = ["plans"]

_PROBLEMS = {"modular addition": modular_addition, "digits": digits}
_TOLERANCE = 1e-4


def plans(size: Size) -> list[dict[str, Any]]:
    """Many queries by all axes, in the last recorded section of each problem; a process of its own for the memory."""
    return [record for name in _PROBLEMS for record in in_own_process(_compare, name, size)]


def _compare(name: str, size: Size) -> list[dict[str, Any]]:
    problem, run = _last_section(name, size)
    # The convolutional network takes more nodes, and several times as long.
    query = problem.query(size.num_errors if name == "digits" else size.num_queries)
    plan = run.plan(query, by=ALL_AXES, tolerance=_TOLERANCE)
    elapsed = seconds(lambda: run.attribute(query, by=ALL_AXES, tolerance=_TOLERANCE))
    memory, result = peak_memory(lambda: run.attribute(query, by=ALL_AXES, tolerance=_TOLERANCE))
    both = {
        "time": (plan.total_seconds, elapsed),
        "peak memory": (plan.peak_memory, memory),
        "gradients of queries": (plan.query_gradients, int(result.dataset.num_nodes.sum())),
    }
    return [
        {
            "work": f"{what} that a plan says, {query.num_inputs} queries",
            "case": problem.name,
            "unit": "times too much or too little",
            "value": max(estimated / max(actual, 1e-9), actual / estimated),
            "must": 1.5,
            "estimated": estimated,
            "actual": actual,
        }
        for what, (estimated, actual) in both.items()
    ]


def _last_section(name: str, size: Size) -> tuple[Problem, explaind.Run]:
    problem = _PROBLEMS[name](size)
    phases = size.digits_phases if name == "digits" else size.phases
    return problem, list(sections(problem, size, phases).values())[-1]
