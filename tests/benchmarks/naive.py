"""The published algorithm beside `run.attribute`, on one recorded run at equal accuracy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import explaind
from tests.benchmarks.problems import Problem, modular_addition
from tests.benchmarks.published import published_contributions
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import seconds

__all__ = ["naive"]

_TOLERANCES = tuple(2.0**-power for power in range(1, 30))


def naive(size: Size) -> list[dict[str, Any]]:
    """Operations and wall time for the log-probability of each query's right answer, by example and layer."""
    small = replace(size, recipe=size.naive_recipe, section=size.naive_steps)
    problem = modular_addition(small)
    problem = replace(problem, name=f"{problem.name} of width {size.naive_recipe.width}")
    run = sections(problem, small, {"first steps": 0})["first steps"]
    inputs, labels = (t[: size.naive_queries] for t in (problem.query_inputs, problem.query_labels))

    found: dict[str, Any] = {}
    slow = _Work(lambda: found.update(slow=published_contributions(run, inputs, num_nodes=size.naive_nodes)))
    contributions, changes = (_of_label(part, labels) for part in found["slow"])
    tolerance = _equal_tolerance(run, problem, size.naive_queries, changes)

    def attribute() -> None:
        found["fast"] = run.attribute(
            problem.query(size.naive_queries), by=("query", "example", "layer"), tolerance=tolerance
        )

    attribute()  # what is loaded by the first call does not count
    fast = _Work(attribute)
    data = found["fast"].dataset
    ours = torch.from_numpy(data.contribution.values)
    return [
        {
            "work": f"{what} of the published algorithm, for {size.naive_queries} queries",
            "case": f"{problem.name}, {run.num_steps} steps",
            "unit": "times ours",
            "value": ratio,
            **goal,
            "more_is_better": True,
        }
        for what, ratio, goal in (
            ("operations", slow.operations / fast.operations, {"must": 1000.0}),
            ("time", slow.seconds / fast.seconds, {}),
        )
    ] + [
        {
            "work": "side by side",
            "case": problem.name,
            "queries": size.naive_queries,
            "examples": problem.batch_size,
            "outputs": found["slow"][0].shape[1],
            "steps": run.num_steps,
            "published": {
                "nodes": size.naive_nodes,
                "error": _mean_error(run, problem, size.naive_queries, changes),
                "operations": slow.operations,
                "seconds": slow.seconds,
            },
            "ours": {
                "nodes": float(data.num_nodes.mean()),
                "error": float(abs(data.quadrature).sum("update_step").mean()),
                "operations": fast.operations,
                "seconds": fast.seconds,
            },
            "largest_difference": float((ours - contributions).abs().max() / contributions.abs().max()),
        }
    ]


class _Work:
    """Wall time of a call, and the floating-point operations of its matrix products, from a second one."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.seconds = seconds(call)
        with _Operations() as counted:
            call()
        self.operations = counted.total


class _Operations(TorchDispatchMode):
    """Sums what torch's own formulas say of each call; its FlopCounterMode keeps the graphs of all calls in memory."""

    total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _of_label(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of `[query, output, …]` each query's own, `[query, …]`."""
    return outputs[torch.arange(len(labels)), labels].double()


def _mean_error(run: explaind.Run, problem: Problem, number: int, changes: torch.Tensor) -> float:
    """Mean over queries of Σ_s |q(θ_{s+1}) − q(θ_s) − ⟨φ_s, Δ_s⟩|."""
    model = problem.make_model().double()
    values = []
    for step in range(run.num_steps + 1):
        model.load_state_dict(run.params(step))
        with torch.no_grad():
            output = model(problem.query_inputs[:number])
        values.append(_of_label(output, problem.query_labels[:number]))
    return float((torch.stack(values, dim=-1).diff(dim=-1) - changes).abs().sum(dim=-1).mean())


def _equal_tolerance(run: explaind.Run, problem: Problem, number: int, changes: torch.Tensor) -> float:
    """The loosest tolerance with which ours is as accurate."""
    allowed = _mean_error(run, problem, number, changes)
    for tolerance in _TOLERANCES:
        data = run.attribute(problem.query(number), by=("query",), tolerance=tolerance).dataset
        if float(abs(data.quadrature).sum("update_step").mean()) <= allowed:
            return tolerance
    raise RuntimeError(f"no tolerance down to {_TOLERANCES[-1]:.0e} is as accurate as {allowed:.1e}.")
