"""The quadrature error that a number of gradient evaluations buys."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import explaind
from explaind import quadrature
from explaind.quadrature import Quadrature
from tests.benchmarks.problems import Problem, modular_addition, modular_addition_gelu
from tests.benchmarks.runs import sections, whole
from tests.benchmarks.sizes import Size

__all__ = ["precision", "whole_run_error"]

_TOLERANCES = tuple(10.0**-power for power in range(2, 7))
_WHOLE_RUN_TOLERANCES = (1e-4, 5e-5, 3e-5)
_MOST_NODES = 6


def precision(size: Size) -> list[dict[str, Any]]:
    """Every rule on the first steps of modular addition, the violent ones, with ReLU and with GELU."""
    records = []
    for problem in (modular_addition(size), modular_addition_gelu(size)):
        run = sections(problem, size, {"first steps": 0})["first steps"]
        for family, rule, tolerance in _rules(size.nodes):
            records.append({"run": problem.name, "rule": family, **_spend(problem, run, rule, tolerance, size)})
    return records


def whole_run_error(size: Size) -> list[dict[str, Any]]:
    """The adaptive rule on a whole run: the smallest error for at most six gradient evaluations per step."""
    problem = modular_addition(size)
    run = whole(problem, size)
    spent = [_spend(problem, run, quadrature.adaptive(), tolerance, size) for tolerance in _WHOLE_RUN_TOLERANCES]
    affordable = [record for record in spent if record["evaluations"] <= _MOST_NODES] or [spent[0]]
    best = min(affordable, key=lambda record: record["error"])
    return [
        {
            "work": f"error with at most {_MOST_NODES} nodes per step",
            "case": f"{problem.name}, whole run",
            "unit": "nats",
            "value": best["error"],
            "must": 1.5e-3,
            "stretch": 1e-5,
            "nodes_per_step": best["evaluations"],
            "steps": run.num_steps,
            "all_tolerances": spent,
        }
    ]


def _rules(most: int) -> Iterator[tuple[str, Quadrature, float]]:
    """Name of the curve, rule and tolerance of each point."""
    for number in itertools.takewhile(lambda n: n <= most, (2**power for power in itertools.count())):
        yield "midpoint", quadrature.midpoint(number), 0.0
        yield "Gauss–Legendre", quadrature.gauss_legendre(number), 0.0
        # Without a tolerance every sub-interval is halved to the end, with averaged slopes on each.
        yield "kink-aware", quadrature.adaptive(1, max_depth=number.bit_length() - 1), 0.0
    for tolerance in _TOLERANCES:
        yield "adaptive", quadrature.adaptive(), tolerance


def _spend(problem: Problem, run: explaind.Run, rule: Quadrature, tolerance: float, size: Size) -> dict[str, Any]:
    """Mean over queries of the summed |residual| per step, and gradient evaluations per query and step."""
    query = problem.query(size.num_errors)
    data = run.attribute(query, by=("query", "step"), quadrature=rule, tolerance=tolerance).dataset
    return {
        "name": rule.name,
        "tolerance": tolerance,
        "evaluations": float(data.num_nodes.mean()),
        "error": float(abs(data.quadrature).sum("update_step").mean()),
        "path_length": float(data.path_length.mean()),
    }
