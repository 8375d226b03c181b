"""Averages of the query gradient along one optimizer step, with the error measured.

The straight path of step s is θ_s + tΔ_s, t ∈ [0, 1]. A rule gives φ = Σ_j w_j ∇q(θ_s + t_jΔ_s). Its error is
known exactly from two forward passes, residual = q(θ_{s+1}) − q(θ_s) − ⟨φ, Δ_s⟩, on any sub-interval too:
that is what `adaptive` refines by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from explaind.quadrature import FixedRule, Quadrature

__all__ = ["PARTS", "Part", "PathFunction", "StepIntegral", "integrate"]

_NOISE = 4
"""Units of rounding that an error is told from: one within them is not the rule's."""
_BY_LENGTH = 3 / 4
"""Part of the tolerance that sub-intervals have by their length."""
_EXTRAPOLATION = 2.5
"""How much smaller than the sum of its parts' errors that of an extrapolation is expected to be."""
PARTS = (2, 4, 8)
"""Numbers of parts that a sub-interval is divided into at once."""
_PASS_QUERIES = 30
"""Queries whose gradients take as long as what every pass through a model takes, however few there are."""
_MOST_NODES = 1 << 12
"""Of a query and step: gradients that are less exact than their type never reach the tolerance."""
_WAITING_BYTES = 32 << 20
"""Of average gradients of sub-intervals that may wait to be divided."""
_KEPT_PARTS, _KEPT_BYTES = 32, 64 << 20
"""Most sub-intervals whose gradients are put together at once, and most of their average gradients."""


class Averages(Protocol):
    """Average gradients of some queries, not yet put together."""

    def products(self, update: Tensor) -> Tensor:
        """Their products with Δ by parameter, float64 `[query, parameter]`."""
        ...

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        ...

    def rounding(self, update: Tensor) -> Tensor:
        """A unit of the rounding of these products' sum, float64 `[query]`."""
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
        self,
        start: Tensor,
        update: Tensor,
        ends: tuple[float, float],
        which: Tensor,
        rule: FixedRule,
        *,
        kinks: bool,
        exact: bool,
    ) -> Any:
        """The `Averages` of ∇q over a sub-interval of the segment, times its length.

        Args:
            start: θ, float64 `[element]`.
            update: Δ, float64 `[element]`.
            ends: the sub-interval of [0, 1].
            which: the queries, `[query]`.
            rule: nodes and weights on it.
            kinks: differentiate kinked functions by their average slopes over the sub-interval.
            exact: compute in float64.
        """
        ...

    def gathered(self, parts: Sequence[Part], total: Tensor | None) -> Tensor:
        """The weighted sum of all parts' averages, `[query, element]`, added to `total` in place if there is one."""
        ...


@dataclass(frozen=True)
class Part:
    """Average gradients over a sub-interval, as far as they count."""

    averages: Any
    entries: Tensor
    """Which of its entries count, `[query]`."""
    which: Tensor
    """The queries of these, `[query]`."""
    weight: float


@dataclass(frozen=True)
class StepIntegral:
    """∫∇q over one step for every query."""

    gradient: Tensor
    """φ = ∫_0^1 ∇q(θ + tΔ) dt, `[query, element]`."""
    products: Tensor
    """⟨φ, Δ⟩ by parameter before φ was rounded to its type, float64 `[query, parameter]`."""
    residual: Tensor
    """q(θ + Δ) − q(θ) − Σ products, float64 `[query]`: the measured error of the rule."""
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
    return _Integration(function, start, update, tolerance, quadrature).over(change)


@dataclass(frozen=True)
class _Estimate:
    """The rule's estimate over a sub-interval, for some queries."""

    ends: tuple[float, float]
    which: Tensor
    """The queries, `[query]`."""
    before: Tensor
    """q at the left end, `[query]`."""
    after: Tensor
    """q at the right end, `[query]`."""
    averages: Any
    entries: Tensor
    """Places of the queries among those of the averages, `[query]`."""
    products: Tensor
    """`[query, parameter]`"""
    exact: bool
    """Whether it was computed in float64."""

    @property
    def length(self) -> float:
        return self.ends[1] - self.ends[0]

    @property
    def change(self) -> tuple[Tensor, Tensor]:
        return self.before, self.after

    @property
    def error(self) -> Tensor:
        """What it misses of the change of q, `[query]`."""
        return self.after - self.before - self.products.sum(dim=1)

    def of(self, chosen: Tensor) -> _Estimate:
        """That of some of its queries, by a mask `[query]`."""
        fields = ("which", "before", "after", "entries", "products")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})


def _grouped(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Queries that are divided together, and into how many parts; a few join those that are divided further.

    Args:
        counts: the parts that each needs, zero for none, `[query]`.
    """
    waiting, needed = torch.zeros_like(counts, dtype=torch.bool), counts.unique().tolist()
    for count, larger in zip(needed, [*needed[1:], None], strict=True):
        if count:
            waiting |= counts == count
            if larger is None or int(waiting.sum()) * (larger - count) > _PASS_QUERIES * count:
                yield count, waiting
                waiting = torch.zeros_like(waiting)


class _Integration:
    """Estimates a step, and divides the sub-intervals of those queries whose error is too large."""

    def __init__(
        self, function: PathFunction, start: Tensor, update: Tensor, tolerance: Tensor, quadrature: Quadrature
    ) -> None:
        self._function, self._start, self._update, self._tolerance = function, start, update, tolerance
        if isinstance(quadrature, FixedRule):
            self._kinks, self._rule, self._depth = False, quadrature, 0
        else:
            self._kinks, self._rule, self._depth = (
                True,
                quadrature.rule_for(kinked=function.kinked),
                quadrature.max_depth,
            )
        self._order = 2 if self._kinks and function.kinked else 2 * len(self._rule.nodes)
        self._spent = torch.zeros(len(tolerance), dtype=torch.int64, device=start.device)
        self._extra = torch.zeros_like(tolerance)
        """Error of sub-intervals that took more than their share, `[query]`."""
        self._products: Tensor | None = None
        self._phi: Tensor | None = None
        self._parts = list[Part]()

    def over(self, change: tuple[Tensor, Tensor]) -> StepIntegral:
        """The integral over the whole step."""
        every = torch.arange(len(self._tolerance), device=self._start.device)
        waiting = [self._estimate((0.0, 1.0), every, change, exact=False)]
        while waiting:
            estimate = waiting.pop(self._next(waiting))
            counts, noisy = self._judge(estimate)
            for count, chosen in _grouped(counts):
                waiting += self._divide(estimate.of(chosen), count)
            if noisy.any():
                part = estimate.of(noisy)
                waiting.append(self._estimate(part.ends, part.which, part.change, exact=True))
        phi = self._function.gathered(self._parts, self._phi)
        assert self._products is not None
        return StepIntegral(phi, self._products, change[1] - change[0] - self._products.sum(dim=1), self._spent)

    def _next(self, waiting: Sequence[_Estimate]) -> int:
        """The worst, so that of what there are no nodes for the error is small; the last, if too much is in memory."""
        if sum(estimate.averages.num_bytes for estimate in waiting) > _WAITING_BYTES:
            return len(waiting) - 1
        errors = [float((each.error.abs() / self._tolerance[each.which]).max()) for each in waiting]
        return errors.index(max(errors))

    def _estimate(
        self, ends: tuple[float, float], which: Tensor, change: tuple[Tensor, Tensor], *, exact: bool
    ) -> _Estimate:
        averages = self._function.averages(
            self._start, self._update, ends, which, self._rule, kinks=self._kinks, exact=exact
        )
        self._spent[which] += len(self._rule.nodes)
        entries = torch.arange(len(which), device=which.device)
        return _Estimate(ends, which, *change, averages, entries, averages.products(self._update), exact)

    def _judge(self, estimate: _Estimate) -> tuple[Tensor, Tensor]:
        """Keep what is accurate enough.

        Returns:
            Into how many parts to divide the others, zero for none, `[query]`, and for which to compute the same in
            float64 instead, as its error is nothing but rounding, `[query]`.
        """
        which, error, length = estimate.which, estimate.error.abs(), estimate.length
        wanted, most = self._tolerance[which], math.floor(length * 2.0**self._depth)
        share = error / (_BY_LENGTH * wanted * length).clamp_min(torch.finfo(error.dtype).tiny)
        # A kink spoils one short sub-interval only, which may have more than its share.
        spare = (1 - _BY_LENGTH) * wanted
        more = (share > 1) & (error <= spare / max(PARTS)) & (self._extra[which] + error <= spare)
        self._extra[which] += torch.where(more, error, 0.0)
        done = (share <= 1) | more | (self._spent[which] >= _MOST_NODES) | (most < 2)
        noisy = torch.zeros_like(done)
        if not done.all():
            noise = ~done & (error <= _NOISE * estimate.averages.rounding(self._update)[estimate.entries])
            done, noisy = (done | noise, noisy) if estimate.exact else (done, noise)
        if done.any():
            self._keep(estimate.of(done), 1.0)
        reached = [math.log2(_EXTRAPOLATION) + self._order * math.log2(count) for count in PARTS[:-1]]
        wide = torch.bucketize(share.log2(), torch.tensor(reached).to(share))
        counts = torch.tensor(PARTS, device=share.device)[wide].clamp_max(most)
        return torch.where(done | noisy, 0, counts), noisy

    def _divide(self, estimate: _Estimate, count: int) -> list[_Estimate]:
        """Estimate parts of a sub-interval; returns them for those queries that they do not suffice for.

        The error of the whole is count^order times that of the parts together, as far as it is of the rule's order.
        The combination in which this cancels (Richardson's extrapolation) is taken where its own error, measured like
        any other, is small enough.
        """
        (left, right), which = estimate.ends, estimate.which
        cuts = [left + estimate.length * part / count for part in range(count)] + [right]
        inner = [self._function.values(self._start, self._update, cut, which) for cut in cuts[1:-1]]
        values = [estimate.before, *inner, estimate.after]
        parts = [
            self._estimate((cuts[i], cuts[i + 1]), which, (values[i], values[i + 1]), exact=estimate.exact)
            for i in range(count)
        ]
        left_out = 2.0 ** (-self._order * math.log2(count))
        weight = left_out / (1 - left_out)
        weighted = [(part, 1 + weight) for part in parts] + [(estimate, -weight)]
        error = torch.stack([weight * part.error for part, weight in weighted]).sum(dim=0)
        enough = error.abs() <= _BY_LENGTH * self._tolerance[which] * estimate.length
        if enough.any():
            for part, weight in weighted:
                self._keep(part.of(enough), weight)
        if enough.all():
            return []
        if not estimate.exact:
            noise = torch.stack([part.averages.rounding(self._update) for part in parts]).sum(dim=0)
            if (noisy := ~enough & (error.abs() <= _NOISE * noise)).any():
                whole = estimate.of(noisy)
                again = self._estimate(whole.ends, whole.which, whole.change, exact=True)
                return [again, *(part.of(~enough & ~noisy) for part in parts if not (enough | noisy).all())]
        return [part.of(~enough) for part in parts]

    def _keep(self, estimate: _Estimate, weight: float) -> None:
        """Make an estimate a part of the integral."""
        which, products = estimate.which, weight * estimate.products
        if self._products is None:
            self._products = products.new_zeros(len(self._tolerance), products.shape[1])
        self._products.index_add_(0, which, products)
        self._parts.append(Part(estimate.averages, estimate.entries, which, weight))
        kept = sum(part.averages.num_bytes for part in self._parts)
        if len(self._parts) == _KEPT_PARTS or kept > _KEPT_BYTES:
            self._phi, self._parts = self._function.gathered(self._parts, self._phi), []
