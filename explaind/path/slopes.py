"""Functions with kinks, and their average slopes between two arguments.

A function of slopes s_0, s_1, …, s_n with kinks at k_1 < … < k_n is c + s_0 z + Σ_i (s_i − s_{i−1}) relu(z − k_i).
While z goes straight from z_a to z_b, a ReLU is on for a part of the way
    m(z_a, z_b) = (relu(z_a) + relu(z_b)) / (|z_a| + |z_b|),
which is 1 or 0 where z keeps its sign, so that the average slope is
    s_0 + Σ_i (s_i − s_{i−1}) m(z_a − k_i, z_b − k_i).
Between kinks that a function is not straight between (ELU, SELU, Hardswish), s_i is its derivative at the node, so
that only the jump is averaged. Where the larger of two numbers counts, as max(x, y) = y + relu(x − y), and of more
numbers the largest, the winner at z_a gets the derivative until the winner at z_b overtakes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["KINKED", "Kinked", "share_above_zero"]

_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


@dataclass(frozen=True)
class Kinked:
    """A call of a function with kinks."""

    argument: Tensor
    """z, whose values at both ends of the way tell where the kinks are."""
    line: Callable[[Tensor, Tensor], Tensor]
    """From z_a and z_b, a new tensor with the function's average derivative; its values mean nothing."""


def share_above_zero(before: Tensor, after: Tensor) -> Tensor:
    """The part m of the straight way between two numbers on which they are positive, in [0, 1].

    Example:
        >>> share_above_zero(torch.tensor([-1.0, 1.0, -2.0]), torch.tensor([3.0, 2.0, -1.0]))
        tensor([0.7500, 1.0000, 0.0000])
    """
    above, length = torch.relu(before).add_(torch.relu(after)), before.abs().add_(after.abs())
    return above.div_(length.clamp_min_(torch.finfo(length.dtype).tiny)).nan_to_num_(1.0)  # ∞/∞ is 1


def _relu(z: Tensor) -> Kinked:
    return Kinked(z, lambda before, after: z * share_above_zero(before, after))


def _pieces(z: Tensor, kinks: Sequence[float], slopes: Sequence[float | Tensor]) -> Kinked:
    """A function of one number, with slopes `[kink + 1]` between its kinks."""

    def line(before: Tensor, after: Tensor) -> Tensor:
        jumps = [
            (right - left) * share_above_zero(before - kink, after - kink)
            for kink, left, right in zip(kinks, slopes[:-1], slopes[1:], strict=True)
        ]
        return z * sum(jumps, start=slopes[0])

    return Kinked(z, line)


def _rrelu(z: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Kinked | None:
    return None if training else _pieces(z, [0], [(lower + upper) / 2, 1])


def _prelu(z: Tensor, weight: Tensor) -> Kinked:
    slope = weight.detach()
    if weight.numel() > 1:
        slope = slope.reshape(-1, *[1] * (z.ndim - 2))  # along the channels, dimension 1
    pieces = _pieces(z, [0], [slope, 1])
    return Kinked(z, lambda before, after: pieces.line(before, after) + F.prelu(z.detach(), weight))


def _clamp(z: Tensor, min: float | Tensor | None = None, max: float | Tensor | None = None) -> Kinked | None:
    if isinstance(min, Tensor) or isinstance(max, Tensor) or (min is not None and max is not None and min > max):
        return None
    bounds, slopes = [], [1]
    if min is not None:
        bounds, slopes = [min], [0, 1]
    if max is not None:
        bounds, slopes = [*bounds, max], [*slopes, 0]
    return _pieces(z, bounds, slopes)


def _threshold(z: Tensor, threshold: float, value: float) -> Kinked | None:
    return _pieces(z, [threshold], [0, 1]) if threshold == value else None  # else it jumps


def _hardswish(z: Tensor) -> Kinked:
    return _pieces(z, [-3, 3], [0, z.detach().clamp(-3, 3) / 3 + 0.5, 1])


def _elu(z: Tensor, alpha: float = 1.0) -> Kinked | None:
    return None if alpha == 1 else _pieces(z, [0], [alpha * z.detach().clamp(max=0).exp(), 1])  # else it has no kink


def _selu(z: Tensor) -> Kinked:
    return _pieces(z, [0], [_SELU_SCALE * _SELU_ALPHA * z.detach().clamp(max=0).exp(), _SELU_SCALE])


def _maximum(x: Tensor, other: Tensor) -> Kinked:
    ahead = x - other

    def line(before: Tensor, after: Tensor) -> Tensor:
        return other + ahead * share_above_zero(before, after)

    return Kinked(ahead, line)


def _minimum(x: Tensor, other: Tensor) -> Kinked:
    behind = other - x

    def line(before: Tensor, after: Tensor) -> Tensor:
        return other - behind * share_above_zero(before, after)

    return Kinked(behind, line)


def _winners(z: Tensor, rows: Callable[[Tensor], Tensor], winners: Callable[[Tensor], Tensor], sign: int = 1) -> Kinked:
    """The largest (sign 1) or smallest (sign −1) numbers of `rows(z)` `[…, number]`, at `winners(z)` `[…, window]`."""

    def line(before: Tensor, after: Tensor) -> Tensor:
        first, last = winners(before), winners(after)
        ahead = [sign * (row.gather(-1, last) - row.gather(-1, first)) for row in (rows(before), rows(after))]
        share, row = share_above_zero(*ahead), rows(z)
        return row.gather(-1, first) * (1 - share) + row.gather(-1, last) * share

    return Kinked(z, line)


def _pooling(pool: Callable[..., Any], num_dims: int) -> Callable[..., Kinked]:
    def kinked(z: Tensor, *args: Any, **options: Any) -> Kinked:
        def winners(at: Tensor) -> Tensor:
            indices: Tensor = pool(at, *args, **{**options, "return_indices": True})[1]
            return indices.flatten(-num_dims)

        return _winners(z, lambda at: at.flatten(-num_dims), winners)

    return kinked


def _reduction(z: Tensor, dims: int | Sequence[int], sign: int) -> Kinked:
    dims = (dims,) if isinstance(dims, int) else tuple(dims)

    def rows(at: Tensor) -> Tensor:
        return at.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims)) if dims else at.flatten()

    return _winners(z, rows, lambda at: (sign * rows(at)).argmax(-1, keepdim=True), sign)


def _extremum(sign: int) -> Callable[..., Kinked]:
    """torch.max or torch.min: over everything, over a dimension, or of two tensors."""

    def kinked(
        z: Tensor, dim: int | Tensor | None = None, keepdim: bool = False, *, other: Tensor | None = None
    ) -> Kinked:
        if isinstance(dim, Tensor):
            dim, other = None, dim
        if other is not None:
            return _maximum(z, other) if sign > 0 else _minimum(z, other)
        return _reduction(z, () if dim is None else dim, sign)

    return kinked


_POOLS = {
    f"{kind}max_pool{n}d": _pooling(getattr(F, f"{kind}max_pool{n}d"), n)
    for kind in ("", "adaptive_")
    for n in (1, 2, 3)
}

KINKED: Mapping[str, Callable[..., Kinked | None]] = {
    "relu": _relu,
    "relu6": lambda z: _clamp(z, 0, 6),
    "leaky_relu": lambda z, negative_slope=0.01: _pieces(z, [0], [negative_slope, 1]),
    "rrelu": _rrelu,
    "prelu": _prelu,
    "abs": lambda z: _pieces(z, [0], [-1, 1]),
    "absolute": lambda z: _pieces(z, [0], [-1, 1]),
    "hardtanh": lambda z, min_val=-1, max_val=1: _clamp(z, min_val, max_val),
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda z, min: _clamp(z, min),
    "clamp_max": lambda z, max: _clamp(z, max=max),
    "threshold": _threshold,
    "softshrink": lambda z, lambd=0.5: _pieces(z, [-lambd, lambd], [1, 0, 1]),
    "hardsigmoid": lambda z: _pieces(z, [-3, 3], [0, 1 / 6, 0]),
    "hardswish": _hardswish,
    "elu": _elu,
    "selu": _selu,
    "maximum": _maximum,
    "fmax": _maximum,
    "minimum": _minimum,
    "fmin": _minimum,
    "max": _extremum(1),
    "min": _extremum(-1),
    "amax": lambda z, dim=(), keepdim=False: _reduction(z, dim, 1),
    "amin": lambda z, dim=(), keepdim=False: _reduction(z, dim, -1),
    **_POOLS,
    **{f"{name}_with_indices": pool for name, pool in _POOLS.items()},
}
"""By the function's name and of its arguments, the call; None if this one has no kinks, or jumps."""
