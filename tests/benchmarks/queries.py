"""Attribution to all examples and layers, in training steps per explained step."""

from __future__ import annotations

from functools import partial
from typing import Any

import explaind
from tests.benchmarks.problems import Loop, Problem, digits, modular_addition
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import ratios

__all__ = ["ALL_AXES", "queries"]

ALL_AXES = ("query", "example", "step", "layer")


def queries(size: Size) -> list[dict[str, Any]]:
    """One query, a mean, many, and many without examples; in each recorded section but the first.

    The first steps are violent, and few: `precision` shows what they cost.
    """
    records = []
    for problem, every in ((modular_addition(size), size.phases), (digits(size), size.digits_phases)):
        phases = dict(list(every.items())[1:])
        loop = Loop(problem)
        for phase, run in sections(problem, size, phases).items():
            records += _section(problem, loop, run, phase, size)
    return records


def _section(problem: Problem, loop: Loop, run: explaind.Run, phase: str, size: Size) -> list[dict[str, Any]]:
    one, many = problem.query(1), problem.query(size.num_queries)
    every = problem.query(size.num_averaged)
    asked = {
        "one query": (one, ALL_AXES, 3, 2),
        f"a mean of {every.num_inputs:,}": (every.mean(), ALL_AXES, 3, 2),
        f"{size.num_queries} queries": (many, ALL_AXES, 12, 8),
        f"{size.num_queries} queries, step × layer only": (many, ("query", "step", "layer"), 1.5, 0.7),
    }
    results: dict[str, explaind.Attribution] = {}

    tolerances = {name: _tolerance(problem, run, query) for name, (query, *_) in asked.items()}

    def attribute(name: str) -> None:
        query, by, *_ = asked[name]
        results[name] = run.attribute(query, by=by, tolerance=tolerances[name])

    measured = ratios(loop.step, {name: partial(attribute, name) for name in asked}, rounds=size.rounds)
    return [
        {
            "work": name,
            "case": f"{problem.name}, {phase}",
            "unit": "t per step",
            **measured[name].per(run.num_steps).record(),
            "must": asked[name][2],
            "stretch": asked[name][3],
            "steps": run.num_steps,
            "nodes_per_step": float(results[name].dataset.num_nodes.mean()),
            "error_per_step": float(abs(results[name].dataset.quadrature).mean()),
        }
        for name in asked
    ]


def _tolerance(problem: Problem, run: explaind.Run, query: explaind.Query) -> float:
    """The part of the path that is the error which the problem allows."""
    path = run.attribute(query, by=("query",), quadrature=explaind.quadrature.midpoint(1)).dataset.path_length
    return problem.error_per_step * run.num_steps / float(path.mean())
