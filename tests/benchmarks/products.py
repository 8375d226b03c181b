"""Where the time of many queries goes: their matrix products against a bare one, and the hottest operations."""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tests.benchmarks.problems import modular_addition
from tests.benchmarks.queries import ALL_AXES
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import seconds

__all__ = ["products"]

_MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
_LARGE = 0.05
"""A product of one shape belongs to the queries × examples if it has this part of the nominal operations."""
_NUM_HOT = 12


def products(size: Size) -> list[dict[str, Any]]:
    """Profile the last step of a section, with the bare product before and after."""
    problem = modular_addition(size)
    run = next(iter(sections(problem, size, size.phases).values()))
    query, last = problem.query(size.num_queries), [run.num_steps - 1]
    result = run.attribute(query, by=ALL_AXES, steps=last)
    dtype = getattr(torch, result.dataset.attrs["dtype"])

    shape = (query.num_inputs, run.table.num_elements, problem.batch_size)
    nominal = 2.0 * math.prod(shape)
    bare = _bare_product(shape, dtype, size.rounds)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        start = time.perf_counter()
        run.attribute(query, by=ALL_AXES, steps=last)
        wall = time.perf_counter() - start
    bare += _bare_product(shape, dtype, size.rounds)

    large = [
        entry
        for entry in profiler.key_averages(group_by_input_shape=True)
        if entry.key in _MATRIX_PRODUCTS and entry.flops >= _LARGE * nominal
    ]
    rates = [nominal / elapsed for elapsed in bare]
    rate = sum(entry.flops for entry in large) / max(1e-6 * sum(entry.self_cpu_time_total for entry in large), 1e-9)
    case = f"{problem.name}, first steps"
    return [
        {
            "work": f"matrix products of {size.num_queries} queries, against torch.mm",
            "case": case,
            "unit": "of its speed",
            "value": rate / statistics.median(rates),
            "low": rate / max(rates),
            "high": rate / min(rates),
            "must": 0.6,
            "stretch": 0.8,
            "more_is_better": True,
            "dtype": result.dataset.attrs["dtype"],
            "bare_gigaflops": statistics.median(rates) / 1e9,
            "share_of_nominal_operations": sum(entry.flops for entry in large) / nominal,
        },
        {"work": "hot operations", "case": case, "wall_seconds": wall, "shares": _shares(profiler, wall)},
    ]


def _bare_product(shape: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> list[float]:
    """Seconds of torch.mm of `[rows, inner]` and `[inner, columns]`, each round."""
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    torch.mm(left, right)
    return [seconds(lambda: torch.mm(left, right)) for _ in range(rounds)]


def _shares(profiler: profile, wall: float) -> dict[str, float]:
    """Part of the time spent in each of the hottest operations, and outside of all, which is Python."""
    own = {entry.key: 1e-6 * entry.self_cpu_time_total / wall for entry in profiler.key_averages()}
    hottest = sorted(own, key=lambda name: own[name], reverse=True)[:_NUM_HOT]
    shares = {name: own[name] for name in hottest}
    return shares | {"other operations": sum(own.values()) - sum(shares.values()), "Python": 1 - sum(own.values())}
