"""What an attribution will cost, as `Run.plan` finds it out before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from explaind.units import readable_size

__all__ = ["Plan"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts, sizes and times of an attribution; all are totals unless they say otherwise."""

    strategies: Mapping[str, str]
    """How the products with examples' gradients are made in each layer (or parameter): by *factors* of these gradients,
    forming a *block* of them at a time, by *vmap*, from those *stored*, or by *tangents*."""
    sampled: tuple[int, ...]
    """The steps that were tried out; everything that differs from step to step is their mean."""
    steps: int
    """Steps over which the path integral is taken."""
    sweeps: int
    """Sweeps over the run: one for every part of the queries that the memory holds."""
    queries_at_once: int
    """Queries that share a sweep."""
    batch_passes: int
    """Forward and backward passes of training batches."""
    query_values: int
    """Forward passes of all queries, in float64, at the ends of the steps."""
    query_gradients: int
    """Nodes of the path integral, each a gradient of one query."""
    operations: Mapping[str, int]
    """Floating-point operations of matrix products and convolutions, by part of the work."""
    bytes_read: int
    """Of the store, after they are decompressed."""
    bytes_result: int
    """Of the result, in memory, or before they are compressed in the store."""
    stored: bool
    """Whether the result goes to a store."""
    memory: Mapping[str, int]
    """Bytes that are in use at once during a sweep, by what uses them."""
    peak_memory: int
    """Most bytes in use at once, with the result if it is not stored."""
    seconds: Mapping[str, float]
    """Time, by part of the work."""

    @property
    def total_seconds(self) -> float:
        """Time of everything together."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        sweeps = "1 sweep" if self.sweeps == 1 else f"{self.sweeps} sweeps, {self.queries_at_once} queries in each,"
        by_way: dict[str, list[str]] = {}
        for layer, way in self.strategies.items():
            by_way.setdefault(way, []).append(layer)
        rows = [
            ("time", f"{_time(self.total_seconds)}, estimated from steps {', '.join(map(str, self.sampled))}"),
            *((f"  {part}", _time(seconds)) for part, seconds in self.seconds.items() if seconds),
            ("operations", _number(sum(self.operations.values()))),
            *((f"  {part}", _number(number)) for part, number in self.operations.items() if number),
            ("training batch", f"{self.batch_passes:,} forward and backward passes"),
            ("queries", f"{self.query_values:,} forward passes of all, {self.query_gradients:,} gradients of one"),
            ("memory", f"{readable_size(self.peak_memory)} at most"),
            *((f"  {part}", readable_size(size)) for part, size in self.memory.items()),
            ("result", f"{readable_size(self.bytes_result)} {'in the store' if self.stored else 'in memory'}"),
            ("read", readable_size(self.bytes_read)),
            *((f"products by {way}", ", ".join(layers)) for way, layers in by_way.items()),
        ]
        width = max(len(name) for name, _ in rows) + 2
        head = f"{self.steps:,} steps in {sweeps} over the run"
        return "\n".join([head, *(f"{name:<{width}}{value}" for name, value in rows)])


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _number(count: int) -> str:
    return f"{count:.3g} FLOP"
