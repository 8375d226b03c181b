"""Attribution to all examples and layers, in training steps per explained step."""

from __future__ import annotations

from functools import partial
from typing import Any

import explaind
from tests.benchmarks.problems import (
    Loop,
    Problem,
    digits,
    modular_addition,
    modular_addition_last_position,
)
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import ratios

__all__ = ["ALL_AXES", "queries"]

ALL_AXES = ("query", "example", "step", "layer")


def queries(size: Size) -> list[dict[str, Any]]:
    """One query, a mean, many, and many without examples; in each recorded section but the first.

    The first steps are violent, and few: `precision` shows what they cost. What is done once for all steps is not
    counted as any step's: a step's time is what the others take beyond the last one alone.
    """
    later = dict(list(size.phases.items())[1:])
    last = dict(list(size.phases.items())[-1:])
    digits_phases = dict(list(size.digits_phases.items())[1:])
    records = []
    for problem, phases, is_goal in (
        (modular_addition(size), later, True),
        (modular_addition_last_position(size), last, False),
        (digits(size), digits_phases, True),
        (digits(size, full_batch=True), digits_phases, True),
    ):
        loop = Loop(problem)
        for phase, run in sections(problem, size, phases).items():
            records += _section(problem, loop, run, phase, size, is_goal=is_goal)
    return records


def _section(
    problem: Problem, loop: Loop, run: explaind.Run, phase: str, size: Size, *, is_goal: bool
) -> list[dict[str, Any]]:
    one, many = problem.query(1), problem.query(size.num_queries)
    every = problem.query(size.num_averaged)
    asked = {
        "one query": (one, ALL_AXES, 3, 2),
        f"a mean of {every.num_inputs:,}": (every.mean(), ALL_AXES, 3, 2),
        f"{size.num_queries} queries": (many, ALL_AXES, 12, 8),
        f"{size.num_queries} queries, step × layer only": (many, ("query", "step", "layer"), 1.5, 0.7),
    }
    records, last = [], run.num_steps - 1
    for name, (query, by, must, stretch) in asked.items():
        attribute = partial(run.attribute, query, by=by, tolerance=_tolerance(problem, run, query))
        measured = ratios(
            loop.step,
            {"all": attribute, "last": partial(attribute, steps=[last]), "pass": partial(_pass, loop, query)},
            rounds=size.rounds,
        )
        more = measured["all"].minus(measured["last"]).per(last)
        data = attribute().dataset
        nodes = float(data.num_nodes.mean())
        case = f"{problem.name}, {phase}"
        records.append(
            {
                "work": name,
                "unit": "t per step",
                "case": case,
                **more.record(),
                **({"must": must, "stretch": stretch} if is_goal else {}),
                "steps": run.num_steps,
                "nodes_per_step": nodes,
                "gradients_alone": nodes * measured["pass"].value + ("example" in by),
                "error_per_step": float(abs(data.quadrature).mean()),
            }
        )
        alone = measured["last"].record()
        records.append(
            {"work": f"{name}, the last step alone, with all preparation", "unit": "t", "case": case, **alone}
        )
    return records


def _pass(loop: Loop, query: explaind.Query) -> None:
    """A plain forward and backward pass of all of a query's inputs: the least that a node can take."""
    loop.model.zero_grad()
    loop.model(query.inputs).sum().backward()


def _tolerance(problem: Problem, run: explaind.Run, query: explaind.Query) -> float:
    """The part of the path that is the error which the problem allows."""
    path = run.attribute(query, by=("query",), quadrature=explaind.quadrature.midpoint(1)).dataset.path_length
    return problem.error_per_step * run.num_steps / float(path.mean())
