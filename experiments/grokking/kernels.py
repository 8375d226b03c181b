"""The path kernel in a few short windows of steps, between pairs sorted by their answers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import xarray as xr

from .recipe import Recipe

__all__ = ["kernel_in_windows", "partition", "windows_across"]


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


def partition(phases: Mapping[str, range | slice], *, num_steps: int) -> dict[str, range]:
    """All steps of a run in windows: those of `windows_across`, and what lies between them.

    Example:
        >>> list(partition({"memorisation": range(0, 60)}, num_steps=60))
        ['start', 'to 27', 'memorisation', 'to 55', 'end']
    """
    windows, whole, position = windows_across(phases), dict[str, range](), 0
    for name, window in sorted(windows.items(), key=lambda entry: entry[1].start):
        if window.start > position:
            whole[f"to {window.start}"] = range(position, window.start)
        whole[name], position = window, window.stop
    return whole | ({f"to {num_steps}": range(position, num_steps)} if position < num_steps else {})


def kernel_in_windows(data: xr.Dataset, recipe: Recipe, phases: Mapping[str, range | slice]) -> xr.DataArray:
    """The kernel per layer group in the windows of `windows_across`, rows and columns sorted by the answer, then by a.

    Args:
        data: by query, example, window and layer, of the first validation pairs.
        recipe: that was trained.
        phases: of its run.

    Returns:
        `[query, example, window, layer]` in nats, with the answers as coordinates `query_class` and `example_class`.
    """
    split = recipe.make_split()
    kernel: xr.DataArray = data.contribution.sel(window=list(windows_across(phases))).load().rename("kernel")
    tokens = {
        "query": split.validation_tokens[: kernel.sizes["query"]],
        "example": split.train_tokens[torch.from_numpy(kernel["example"].values.copy())],
    }
    for axis, chosen in tokens.items():
        order = recipe.task.sort(chosen)
        answers = recipe.task.answer(*recipe.task.operands(chosen[order])).numpy()
        kernel = kernel.isel({axis: order.numpy()}).assign_coords({f"{axis}_class": (axis, answers)})
    return kernel
