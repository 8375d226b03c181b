"""Averages of the query gradient along one optimizer step, with the error measured.

The straight path of step s is θ_s + tΔ_s, t ∈ [0, 1]. A rule gives φ = Σ_j w_j ∇q(θ_s + t_jΔ_s). Its error is
known exactly from two forward passes, residual = q(θ_{s+1}) − q(θ_s) − ⟨φ, Δ_s⟩, on any sub-interval too:
that is what `adaptive` refines by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Adaptive", "FixedRule", "Quadrature", "adaptive", "gauss_legendre", "integrate", "midpoint"]


_NOISE = 4
"""Refining stops at this many rounding units of the gradients' own type."""


_BY_LENGTH = 3 / 4
"""Part of the tolerance that sub-intervals have by their length."""
_MOST_NODES = 1 << 12
"""Of a query and step: gradients that are less exact than their type never reach the tolerance."""
_KEPT_PARTS = 32
"""Sub-intervals whose gradients are put together at once."""
_MOST_PARTS = 8
"""That a sub-interval is divided into at once."""
_PART_ELEMENTS = 1 << 18
"""Of what is converted at once: it should stay in the cache."""


class Averages(Protocol):
    """Average gradients of some queries, not yet put together."""

    def products(self, update: Tensor) -> Tensor:
        """Their products with Δ, float64 `[query]`."""
        ...

    def rounding(self, update: Tensor) -> Tensor:
        """A unit of the rounding of these products, float64 `[query]`."""
        ...


class PathFunction(Protocol):
    """The queries along the segment θ + tΔ."""

    @property
    def kinked(self) -> bool:
        """Whether the model computes functions whose slopes jump."""
        ...

    def values(self, start: Tensor, update: Tensor, position: float, which: Tensor) -> Tensor:
        """q(θ + tΔ) of some queries, float64 `[query]`."""
        ...

    def averages(
        self, start: Tensor, update: Tensor, ends: tuple[float, float], which: Tensor, rule: FixedRule, *, kinks: bool
    ) -> Any:
        """The `Averages` of ∇q over a sub-interval of the segment, times its length.

        Args:
            start: θ, float64 `[element]`.
            update: Δ, float64 `[element]`.
            ends: the sub-interval of [0, 1].
            which: the queries, `[query]`.
            rule: nodes and weights on it.
            kinks: differentiate kinked functions by their average slopes over the sub-interval.
        """
        ...

    def gathered(self, parts: Sequence[tuple[Any, Tensor, Tensor]], total: Tensor | None) -> Tensor:
        """The sum of all averages, `[query, element]`.

        Args:
            parts: averages, which of their entries count, and the queries of those.
            total: what to add to, in place.
        """
        ...


@dataclass(frozen=True)
class FixedRule:
    """Nodes and weights on [0, 1], the same for every query and step."""

    name: str
    nodes: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Adaptive:
    """A rule applied to the whole step, then to parts of those sub-intervals that miss the tolerance."""

    rule: FixedRule | None
    """None for one node where slopes jump, and three where they do not."""
    max_depth: int
    """A sub-interval of 2^−max_depth of a step is not divided."""

    @property
    def name(self) -> str:
        """How it is called in a result's attributes."""
        return f"adaptive({self.rule.name + ', ' if self.rule else ''}max_depth={self.max_depth})"

    def rule_for(self, function: PathFunction) -> FixedRule:
        """The rule on each sub-interval."""
        return self.rule or gauss_legendre(1 if function.kinked else 3)


Quadrature = FixedRule | Adaptive


def midpoint(num_nodes: int = 1) -> FixedRule:
    """Composite midpoint rule: equal weights at t = (j + 1/2)/n; error O(n⁻²) on smooth paths.

    `midpoint(100)` is the rule of the ExPLAIND paper (arXiv 2505.20076, section 4).

    Example:
        >>> midpoint(2).nodes
        (0.25, 0.75)
    """
    _check_positive(num_nodes)
    nodes = (np.arange(num_nodes) + 0.5) / num_nodes
    return FixedRule(f"midpoint({num_nodes})", tuple(nodes.tolist()), (1 / num_nodes,) * num_nodes)


def gauss_legendre(num_nodes: int = 3) -> FixedRule:
    """Gauss–Legendre rule: exact for polynomials of degree 2n − 1; error O(h^2n) on smooth paths.

    Example:
        >>> rule = gauss_legendre(2)
        >>> round(sum(w * t**3 for t, w in zip(rule.nodes, rule.weights)), 12)
        0.25
    """
    _check_positive(num_nodes)
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return FixedRule(f"gauss_legendre({num_nodes})", tuple(((nodes + 1) / 2).tolist()), tuple((weights / 2).tolist()))


def adaptive(num_nodes: int | None = None, max_depth: int = 14) -> Adaptive:
    """Gauss–Legendre, dividing the step further for those queries only that are above tolerance.

    Kinks that torch has by name, such as those of ReLUs and max-pooling, are averaged over each sub-interval; dividing
    finds the others.

    Args:
        num_nodes: nodes on each sub-interval; by default one for models with such kinks (their error is of second
            order, whatever the rule), and three for smooth ones.
        max_depth: a sub-interval of 2^−max_depth of a step is not divided.
    """
    if max_depth < 0:
        raise ValueError(f"max_depth is the number of halvings, zero or more; got {max_depth}.")
    return Adaptive(None if num_nodes is None else gauss_legendre(num_nodes), max_depth)


def _check_positive(num_nodes: int) -> None:
    if num_nodes < 1:
        raise ValueError(f"a quadrature rule needs at least one node, got {num_nodes}.")


@dataclass(frozen=True)
class StepIntegral:
    """∫∇q over one step for every query."""

    gradient: Tensor
    """φ = ∫_0^1 ∇q(θ + tΔ) dt, `[query, element]`."""
    residual: Tensor
    """q(θ + Δ) − q(θ) − ⟨φ, Δ⟩, float64 `[query]`: the measured error of the rule."""
    num_nodes: Tensor
    """Gradient evaluations spent, `[query]`."""


def integrate(
    function: PathFunction,
    start: Tensor,
    update: Tensor,
    *,
    change: tuple[Tensor, Tensor],
    tolerance: Tensor,
    quadrature: Quadrature,
) -> StepIntegral:
    """Average the query gradients over the segment from `start` to `start + update`.

    Args:
        function: the queries.
        start: θ_s, float64 `[element]`.
        update: Δ_s, float64 `[element]`.
        change: q at both ends of the segment, float64 `[query]` each.
        tolerance: largest |residual| wanted for each query, `[query]`; fixed rules do not look at it.
        quadrature: the rule.
    """
    if isinstance(quadrature, FixedRule):
        kinks, rule, depth = False, quadrature, 0
    else:
        kinks, rule, depth = True, quadrature.rule_for(function), quadrature.max_depth
    order = 2 if kinks and function.kinked else 2 * len(rule.nodes)
    every = torch.arange(len(tolerance), device=start.device)
    spent, extra, parts = torch.zeros_like(every), torch.zeros_like(tolerance), list[tuple[Any, Tensor, Tensor]]()
    phi: Tensor | None = None
    waiting = [(0.0, 1.0, every, *change)]
    while waiting:
        left, right, query, before, after = waiting.pop()
        averages = function.averages(start, update, (left, right), query, rule, kinks=kinks)
        spent[query] += len(rule.nodes)
        error = (after - before - averages.products(update)).abs()
        length, wanted = right - left, tolerance[query]
        share = error / (_BY_LENGTH * wanted * length).clamp_min(torch.finfo(error.dtype).tiny)
        # A kink spoils one short sub-interval only, which may have more than its share.
        more = (error <= (1 - _BY_LENGTH) * wanted / _MOST_PARTS) & (extra[query] + error <= (1 - _BY_LENGTH) * wanted)
        last = length <= 2.0**-depth or int(spent.max()) >= _MOST_NODES
        done = (share <= 1) | more | torch.full_like(more, last)
        extra[query] += torch.where(more & (share > 1), error, 0.0)
        if not done.all():
            done |= error <= _NOISE * averages.rounding(update)
        if done.any():
            parts.append((averages, done.nonzero()[:, 0], query[done]))
        if len(parts) == _KEPT_PARTS:
            phi, parts = function.gathered(parts, phi), []
        if done.all():
            continue
        query, before, after, share = (entries[~done] for entries in (query, before, after, share))
        useful = math.ceil(min(float(share.max()) ** (1 / order), _MOST_PARTS))
        count = min(max(useful, 2), math.ceil(length * 2.0**depth))
        cuts = [left + length * part / count for part in range(count)] + [right]
        values = [before, *(function.values(start, update, cut, query) for cut in cuts[1:-1]), after]
        inner = zip(cuts, cuts[1:], [query] * count, values, values[1:], strict=False)
        waiting += reversed(list(inner))
    phi = function.gathered(parts, phi)
    residual = change[1] - change[0] - _dot(phi, update)
    return StepIntegral(phi, residual, spent)


def _dot(vectors: Tensor, flat: Tensor) -> Tensor:
    """Products with a float64 vector in its type, `[query]`; in parts, so that no copy of all is made."""
    size = max(1, _PART_ELEMENTS // max(1, len(vectors)))
    parts = zip(vectors.split(size, dim=1), flat.split(size), strict=True)
    return torch.stack([part.to(flat.dtype) @ own for part, own in parts]).sum(dim=0)
