"""Peak memory of many queries, above the model and the record of one step."""

from __future__ import annotations

from typing import Any

import explaind
from tests.benchmarks.problems import modular_addition
from tests.benchmarks.queries import ALL_AXES
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import in_own_process, peak_memory

__all__ = ["memory"]


def memory(size: Size) -> list[dict[str, Any]]:
    """Measured in a process of its own, with everything imported and the run open before."""
    problem = modular_addition(size)
    run = next(iter(sections(problem, size, size.phases).values()))
    above, result = in_own_process(_peak, size)
    return [
        {
            "work": f"peak memory, {size.num_queries} queries",
            "case": f"{problem.name}, first steps",
            "unit": "GiB",
            "value": (above - _segment(run)) / 2**30,
            "must": 1.0,
            "stretch": 0.5,
            "result_gib": result / 2**30,
        }
    ]


def _peak(size: Size) -> tuple[int, int]:
    """Bytes in use at the peak above those before, and the bytes of the result."""
    problem = modular_addition(size)
    run = next(iter(sections(problem, size, size.phases).values()))
    query = problem.query(size.num_queries)
    above, result = peak_memory(lambda: run.attribute(query, by=ALL_AXES))
    return above, result.dataset.nbytes


def _segment(run: explaind.Run) -> int:
    """Bytes of a step's record: both snapshots with the optimizer's state, the gradient, inputs and cotangents."""
    last = run.num_steps - 1
    tensors = [run.flat_gradient(last)]
    for snapshot in (last, last + 1):
        tensors += [run.flat_params(snapshot), *(t for state in run.state(snapshot).values() for t in state.values())]
    for call in run.calls(last):
        tensors += [*call.inputs.values(), *call.output_grads.values()]
    return sum(tensor.nbytes for tensor in tensors)
