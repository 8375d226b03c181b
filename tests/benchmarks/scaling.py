"""How time and memory grow with examples, steps, parameters, queries and outputs."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import explaind
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import in_own_process, peak_memory, seconds

__all__ = ["scaling"]

_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Point:
    """Sizes of a run of a small network on random data, and of the attribution."""

    examples: int
    steps: int
    width: int
    queries: int
    outputs: int


def scaling(size: Size) -> list[dict[str, Any]]:
    """One process per point, so that its memory is its own."""
    base = size.scaling_base
    common = Point(examples=8 * base, steps=base // 8, width=base, queries=base // 2, outputs=base // 8)
    curves = {  # where each begins; every next point has twice as much of what it is named after
        "examples": replace(common, examples=16 * base),
        "steps": replace(common, steps=base // 4),
        "parameters": common,
        "queries": replace(common, queries=base),
        "outputs": replace(common, outputs=base),
    }
    records = []
    for axis, first in curves.items():
        field = "width" if axis == "parameters" else axis
        for doublings in range(size.points):
            point = replace(first, **{field: getattr(first, field) << doublings})
            records.append({"axis": axis, **asdict(point), **in_own_process(_measure, point)})
    return records


def _measure(point: Point) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        _train(point, path)
        run = explaind.open_run(path, model=_model(point))
        inputs, labels = torch.randn(point.queries, 32), torch.randint(point.outputs, (point.queries,))
        query = explaind.Query(inputs, output=explaind.outputs.log_prob(labels))

        def attribute() -> explaind.Attribution:
            return run.attribute(
                query, by=("query", "example", "layer"), quadrature=explaind.quadrature.gauss_legendre(3)
            )

        attribute()  # what the first call loads does not count
        above, result = peak_memory(attribute)
        elapsed = statistics.median(seconds(attribute) for _ in range(_ROUNDS))
    return {
        "parameters": run.table.num_elements,
        "seconds": elapsed,
        "bytes": max(above - result.dataset.nbytes, 1),
    }


def _model(point: Point) -> nn.Module:
    """The last layer is not trained, so that the number of outputs changes nothing else."""
    last = nn.Linear(point.width, point.outputs).requires_grad_(False)
    first, second = nn.Linear(32, point.width), nn.Linear(point.width, point.width)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last)


def _train(point: Point, path: Path) -> None:
    model = _model(point)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    inputs, labels = torch.randn(point.examples, 32), torch.randint(point.outputs, (point.examples,))
    with explaind.trace(model, optimizer, path) as recorder:
        for _ in range(point.steps):
            recorder.examples(torch.arange(point.examples))
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
