"""Which axes, steps and layers a decomposition keeps, checked before anything is computed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from operator import index

import torch
from torch import Tensor

from explaind.errors import ResultTooLargeError
from explaind.run import Run

__all__ = ["check_axes", "check_size", "select_elements", "select_layers", "select_steps"]

_AXES = ("query", "example", "group", "step", "update_step", "window", "token", "layer", "parameter", "element")
_EXCLUSIVE = (
    ("example", "group"),
    ("step", "update_step"),
    ("step", "window"),
    ("update_step", "window"),
    ("layer", "parameter"),
    ("layer", "element"),
    ("parameter", "element"),
)


def check_axes(by: Sequence[str]) -> tuple[str, ...]:
    """The axes named by the user.

    Raises:
        ValueError: one is not known, named twice, or two exclude each other.
    """
    axes = (by,) if isinstance(by, str) else tuple(by)
    for axis in axes:
        if axis not in _AXES:
            raise ValueError(f"by has the unknown axis {axis!r}; the axes are {', '.join(_AXES)}.")
    if len(set(axes)) < len(axes):
        raise ValueError(f"by={axes} names an axis twice.")
    for one, two in _EXCLUSIVE:
        if one in axes and two in axes:
            raise ValueError(
                f"by={axes} has both {one!r} and {two!r}: they are two ways to read one axis, ask for one."
            )
    if "token" in axes and "update_step" in axes:
        raise ValueError("by with 'token' goes with 'step', not 'update_step': tokens have no momentum buffers.")
    if "element" in axes and (others := {"example", "group", "token", "update_step"}.intersection(axes)):
        raise ValueError(
            f"by with 'element' goes with 'step' or 'window', for all examples together; not with {min(others)!r}."
        )
    return axes


def select_steps(run: Run, steps: range | Sequence[int] | None) -> list[int]:
    """The steps to keep, sorted; None means all.

    Raises:
        ValueError: none, or some that the run does not have.
    """
    if steps is None:
        return list(range(run.num_steps))
    try:
        chosen = sorted({index(step) for step in steps})
    except TypeError:
        raise ValueError(f"steps must be integers; got {list(steps)[:5]}….") from None
    if not chosen or chosen[0] < 0 or chosen[-1] >= run.num_steps:
        raise ValueError(f"steps must be between 0 and {run.num_steps - 1}, at least one; got {list(steps)[:5]}….")
    return chosen


def select_layers(run: Run, *, axis: str | None, layers: Sequence[str] | None) -> tuple[list[str], list[list[slice]]]:
    """Names and slices of the entries of the layer axis; a single entry for all of them without the axis.

    Raises:
        ValueError: unknown layers, or `run.layers` that do not hold every parameter once.
    """
    groups = {name: [name] for name in run.table.names} if axis == "parameter" else run.layers
    members = [parameter for group in groups.values() for parameter in group]
    unknown = [name for name in members if name not in run.table.names]
    missing = [name for name in run.table.names if name not in members]
    if unknown or missing or len(set(members)) < len(members):
        problem = (
            f"{unknown[0]!r} is not a parameter of the run"
            if unknown
            else f"{missing[0]!r} is in no layer"
            if missing
            else "a parameter is in two layers"
        )
        raise ValueError(f"run.layers must hold every parameter once: {problem}.")
    if isinstance(layers, str):
        raise ValueError(f"layers= is a list of names; got the string {layers!r}.")
    chosen = list(groups) if layers is None else list(dict.fromkeys(layers))
    if not chosen:
        raise ValueError("layers= is empty; name at least one layer, or leave it out to keep all.")
    if wrong := [name for name in chosen if name not in groups]:
        raise ValueError(f"there is no layer {wrong[0]!r}; the layers are {', '.join(groups)}.")
    place = {parameter.name: parameter.slice for parameter in run.table}
    slices = [_merge([place[name] for name in groups[layer]]) for layer in chosen]
    if axis is None:
        return ["all"], [_merge([part for layer in slices for part in layer])]
    return chosen, slices


def select_elements(slices: list[list[slice]], device: torch.device) -> Tensor:
    """The elements of all layers in their order in the flat vector, `[element]`."""
    return torch.cat([torch.arange(part.start, part.stop) for layer in slices for part in layer]).to(device)


def _merge(parts: list[slice]) -> list[slice]:
    """The same elements in as few slices as possible."""
    merged: list[slice] = []
    for part in sorted(parts, key=lambda part: part.start):
        if merged and merged[-1].stop == part.start:
            merged[-1] = slice(merged[-1].start, part.stop)
        else:
            merged.append(part)
    return merged


def check_size(sizes: Mapping[str, int], buffers: int, *, stored: bool) -> None:
    """Refuse what would take more than half of the machine's memory.

    Args:
        sizes: length of each axis of the result.
        buffers: number of entries of the momentum buffers.
        stored: whether the result is written to a store, so that it need not fit.

    Raises:
        ResultTooLargeError: with the size, and what to leave out.
    """
    limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    entries = math.prod(sizes.values())
    if 8 * entries > limit and not stored:
        shape = " × ".join(f"{size} {axis}" for axis, size in sizes.items())
        largest = max(sizes, key=lambda axis: sizes[axis])
        raise ResultTooLargeError(
            f"the result would have {shape} entries, {8 * entries / 2**30:.1f} GiB; half of this machine's memory is "
            f"{limit / 2**30:.1f} GiB. Write it to a store with out='result.zarr', leave {largest!r} out of by, or "
            "restrict it."
        )
    if 16 * buffers > limit:
        raise ResultTooLargeError(
            "examples by update_step need a momentum buffer each (and averaged weights a gradient for every query and "
            f"step), {16 * buffers / 2**30:.1f} GiB together; half of this machine's memory is "
            f"{limit / 2**30:.1f} GiB. Use 'step' in place of 'update_step', groups=, or examples=."
        )
