"""The path kernel in a few short windows of steps, between pairs sorted by their sum."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import xarray as xr

import explaind

from .scores import validation_pairs
from .task import Split

__all__ = ["kernel_in_windows", "windows_across"]


def windows_across(phases: Mapping[str, range | slice], *, length: int = 5) -> dict[str, range]:
    """Short windows spread over the phases: the first steps, the middle of every phase, and the last steps.

    Args:
        phases: one after the other.
        length: steps of a window; one that is as long as its phase, or longer, is the phase.

    Raises:
        ValueError: the phases are too short for windows that share no step.

    Example:
        >>> windows_across({"memorisation": range(0, 60), "generalisation": range(60, 200)}, length=4)
        {'start': range(0, 4), 'memorisation': range(28, 32), 'generalisation': range(128, 132), 'end': range(196, 200)}
    """
    spans = list(phases.values())
    first, last = min(span.start for span in spans), max(span.stop for span in spans)
    windows = {"start": range(first, first + length)}
    for name, span in phases.items():
        start = max(span.start, (span.start + span.stop - length) // 2)
        windows[name] = range(start, min(start + length, span.stop))
    windows["end"] = range(last - length, last)
    ordered = sorted(windows.values(), key=lambda window: window.start)
    if any(one.stop > other.start for one, other in pairwise(ordered)):
        raise ValueError(f"windows of {length} steps overlap in these phases, {dict(phases)}; take a shorter length.")
    return windows


def kernel_in_windows(
    run: explaind.Run,
    split: Split,
    windows: Mapping[str, range],
    *,
    num_queries: int = 100,
    num_examples: int | None = None,
    tolerance: float = 1e-4,
    progress: bool = False,
) -> xr.DataArray:
    """The kernel per layer group and window, rows and columns sorted by a + b, then by a.

    Args:
        run: with the layer groups.
        split: its training and validation pairs.
        windows: `{name: range(start, stop)}`.
        num_queries: the first validation pairs.
        num_examples: the first training pairs; by default all.
        tolerance: of the path integral, as a part of a query's path.
        progress: show a progress bar.

    Returns:
        `[query, example, window, layer]` in nats, with coordinates `query_sum` and `example_sum`.
    """
    query = validation_pairs(split, num=num_queries)
    kernel = run.kernel(
        query,
        None if num_examples is None else range(min(num_examples, len(split.train_labels))),
        by=("query", "example", "window", "layer"),
        windows=windows,
        tolerance=tolerance,
        progress=progress,
    )
    sums = {
        "query": split.validation_tokens[: kernel.sizes["query"], [0, 2]].numpy(),
        "example": split.train_tokens.numpy()[kernel["example"].values][:, [0, 2]],
    }
    for axis, pairs in sums.items():
        kernel = kernel.assign_coords({f"{axis}_sum": (axis, pairs.sum(axis=1)), f"{axis}_a": (axis, pairs[:, 0])})
    return kernel.sortby(["query_sum", "query_a"]).sortby(["example_sum", "example_a"])
