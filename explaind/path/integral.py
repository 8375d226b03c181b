"""Averages of the query gradient along one optimizer step, with the error measured.

The straight path of step s is θ_s + tΔ_s, t ∈ [0, 1]. A rule gives φ = Σ_j w_j ∇q(θ_s + t_jΔ_s). Its error is
known exactly from two forward passes, residual = q(θ_{s+1}) − q(θ_s) − ⟨φ, Δ_s⟩, on any sub-interval too:
that is what `adaptive` refines by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from explaind.path.intervals import PARTS, Candidate, Division, Estimate, Part, Wanted, alike, grouped
from explaind.quadrature import FixedRule, Quadrature

__all__ = ["PathFunction", "StepIntegral", "integrate"]

_NOISE = 4
"""Units of rounding that an error is told from: one within them is not the rule's."""
_AT_ONCE = 1 / 2
"""Part of what is left of the tolerance that the smallest errors may take while others are too large."""
_EXTRAPOLATION = 2.5
"""How much smaller than the sum of its parts' errors that of an extrapolation is expected to be."""
_MOST_NODES = 1 << 12
"""Of a query and step: gradients that are less exact than their type never reach the tolerance."""
_WAITING_BYTES = 32 << 20
"""Of average gradients of sub-intervals that may wait to be divided."""
_KEPT_BYTES = 64 << 20
"""Most of average gradients that are put together at once."""


class Averages(Protocol):
    """Average gradients of some queries, not yet put together."""

    def products(self, update: Tensor) -> Tensor:
        """Their products with Δ by parameter, float64 `[query, parameter]`."""
        ...

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        ...

    def rounding(self, update: Tensor, entries: Tensor) -> Tensor:
        """A unit of the rounding of these products' sum for some of the queries, float64 `[entry]`."""
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
    out: Tensor | None = None,
) -> StepIntegral:
    """Average the query gradients over the segment from `start` to `start + update`.

    Args:
        function: the queries.
        start: θ_s, float64 `[element]`.
        update: Δ_s, float64 `[element]`.
        change: q at both ends of the segment, float64 `[query]` each.
        tolerance: largest |residual| wanted for each query, `[query]`; fixed rules do not look at it.
        quadrature: the rule.
        out: where the gradient is put, `[query, element]`; by default in memory of its own.
    """
    phi = None if out is None else out.zero_()
    return _Integration(function, start, update, tolerance, quadrature, phi).over(change)


class _Integration:
    """Estimates a step, and divides the sub-intervals of those queries whose error is too large."""

    def __init__(
        self,
        function: PathFunction,
        start: Tensor,
        update: Tensor,
        tolerance: Tensor,
        quadrature: Quadrature,
        phi: Tensor | None,
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
        self._unit = torch.full_like(tolerance, torch.nan, dtype=torch.float64)
        """Of the rounding of the whole segment's estimate, `[query]`; NaN where it was not asked for yet."""
        self._left = tolerance.to(torch.float64, copy=True)
        """Of the tolerance, that what is kept does not take, `[query]`."""
        self._products: Tensor | None = None
        self._phi = phi
        self._parts = dict[int, Part]()
        """By identity, so that one that counts for several reasons is there once."""

    def over(self, change: tuple[Tensor, Tensor]) -> StepIntegral:
        """The integral over the whole step."""
        every = torch.arange(len(self._tolerance), device=self._start.device)
        (whole,) = self._estimates([Wanted((0.0, 1.0), every, *change, False)])
        self._whole = whole
        candidates = [Candidate.alone(whole)]
        while candidates:
            inaccurate, again = self._judge(candidates)
            counts = self._counts(inaccurate)
            waiting, divided = self._next(self._affordable(inaccurate, counts))
            candidates = [Candidate.alone(estimate) for estimate in waiting + self._estimates(again)]
            candidates += self._divided(
                Division(estimate.of(chosen), count)
                for estimate in divided
                for count, chosen in grouped(counts[estimate.which].clamp_max(self._most(estimate)))
            )
        phi = self._function.gathered(list(self._parts.values()), self._phi)
        assert self._products is not None
        return StepIntegral(phi, self._products, change[1] - change[0] - self._products.sum(dim=1), self._spent)

    @staticmethod
    def _next(inaccurate: list[Estimate]) -> tuple[list[Estimate], list[Estimate]]:
        """Those that go on waiting, and those that are divided: all, as they share passes, or the last if too many."""
        held = {id(each.part): each.part.averages.num_bytes for each in inaccurate}
        place = 0 if sum(held.values()) <= _WAITING_BYTES else len(inaccurate) - 1
        return inaccurate[:place], inaccurate[place:]

    def _estimates(self, wanted: Sequence[Wanted]) -> list[Estimate]:
        """Estimates in the order of what is wanted, with one pass for all queries that need the same sub-interval."""
        found = dict[int, Estimate]()
        for (ends, exact), places in alike((each.ends, each.exact) for each in wanted).items():
            which = torch.cat([wanted[place].which for place in places])
            averages = self._function.averages(
                self._start, self._update, ends, which, self._rule, kinks=self._kinks, exact=exact
            )
            self._spent[which] += len(self._rule.nodes)
            part = Part(averages, which, torch.zeros_like(self._tolerance[which]))
            products = averages.products(self._update)
            entries, first = torch.arange(len(which), device=which.device), 0
            for place in places:
                own, each = slice(first, first + len(wanted[place].which)), wanted[place]
                found[place] = Estimate(**vars(each), part=part, entries=entries[own], products=products[own])
                first = own.stop
        return [found[place] for place in range(len(wanted))]

    def _values(self, positions: Sequence[float], which: Sequence[Tensor]) -> list[Tensor]:
        """Values of some queries at each of some positions, with one pass for all that need the same position."""
        found = dict[int, Tensor]()
        for position, places in alike(positions).items():
            every = torch.cat([which[place] for place in places])
            values = self._function.values(self._start, self._update, position, every)
            found |= zip(places, values.split([len(which[place]) for place in places]), strict=True)
        return [found[place] for place in range(len(which))]

    def _judge(self, candidates: Sequence[Candidate]) -> tuple[list[Estimate], list[Wanted]]:
        """Keep what is accurate enough.

        Returns:
            Estimates that are not, and what is to be estimated in float64 as its error is nothing but rounding.
        """
        again, single = list[Wanted](), list[Candidate]()
        for candidate in self._rejected(candidates):
            noisy = self._noisy(candidate)
            if noisy.any():
                again.append(candidate.whole.of(noisy).exactly())
            if not noisy.all():
                left = candidate.of(~noisy)
                single += [Candidate.alone(part) for part in left.parts or [left.whole]]
        if any(candidate.parts for candidate in candidates):
            single = self._rejected(single)
        return [candidate.whole for candidate in single], again

    def _rejected(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Keep candidates, from the smallest error on, as far as the tolerance goes; returns the others."""
        errors = torch.zeros(len(self._tolerance), len(candidates), dtype=torch.float64, device=self._start.device)
        final = torch.zeros_like(errors, dtype=torch.bool)
        for place, candidate in enumerate(candidates):
            errors[candidate.whole.which, place] = candidate.error
            final[candidate.whole.which, place] = self._final(candidate)
        errors[final] = 0.0
        ascending, order = errors.sort(dim=1)
        limit = torch.where(errors.sum(dim=1) <= self._left, self._left, _AT_ONCE * self._left)
        kept = torch.zeros_like(final).scatter_(1, order, ascending.cumsum(dim=1) <= limit[:, None])
        self._left -= (errors * kept).sum(dim=1)
        rejected = []
        for place, candidate in enumerate(candidates):
            keep = kept[candidate.whole.which, place]
            if keep.any():
                for estimate, weight in candidate.weighted:
                    self._keep(estimate.of(keep), weight)
            if not keep.all():
                rejected.append(candidate.of(~keep))
        return rejected

    def _final(self, candidate: Candidate) -> Tensor:
        """Where a candidate is as accurate as it gets, `[query]`."""
        estimate = candidate.whole
        if candidate.parts:
            return torch.zeros_like(estimate.which, dtype=torch.bool)
        final = torch.full_like(estimate.which, self._most(estimate) < 2, dtype=torch.bool)
        return final | (candidate.error <= self._noise(estimate)) if estimate.exact else final

    def _noisy(self, candidate: Candidate) -> Tensor:
        """Where an error is that of float32, `[query]`."""
        estimate = candidate.whole
        if estimate.exact:
            return torch.zeros_like(estimate.which, dtype=torch.bool)
        return candidate.error <= self._noise(estimate)

    def _noise(self, estimate: Estimate) -> Tensor:
        """Errors of a sub-interval that are nothing but rounding, `[query]`."""
        if estimate.exact:
            unit: Tensor = estimate.part.averages.rounding(self._update, estimate.entries)
        else:  # its part of the whole's
            unit = estimate.length * self._unit_of_whole(estimate.which)
        return _NOISE * unit

    def _unit_of_whole(self, which: Tensor) -> Tensor:
        """A unit of the rounding of the whole segment's estimate, computed for those queries that it is asked of."""
        unknown = which[self._unit[which].isnan()]
        if len(unknown):
            self._unit[unknown] = self._whole.part.averages.rounding(self._update, unknown)
        return self._unit[which]

    def _most(self, estimate: Estimate) -> int:
        """Parts that a sub-interval may be divided into."""
        return math.floor(estimate.length * 2.0**self._depth)

    def _counts(self, inaccurate: Sequence[Estimate]) -> Tensor:
        """Into how many parts each query's inaccurate sub-intervals are divided, `[query]`."""
        errors = torch.zeros_like(self._left)
        for estimate in inaccurate:
            errors.index_add_(0, estimate.which, estimate.error.abs())
        excess = (errors / self._left.clamp_min(torch.finfo(errors.dtype).tiny)).log2()
        reached = torch.tensor([math.log2(_EXTRAPOLATION) + self._order * math.log2(count) for count in PARTS[:-1]])
        return torch.tensor(PARTS, device=errors.device)[torch.bucketize(excess, reached.to(excess))]

    def _affordable(self, inaccurate: list[Estimate], counts: Tensor) -> list[Estimate]:
        """Those that there are nodes for, the worst of each query first; the others are kept as they are."""
        errors = torch.full((len(counts), len(inaccurate)), -1.0, dtype=torch.float64, device=counts.device)
        for place, estimate in enumerate(inaccurate):
            errors[estimate.which, place] = estimate.error.abs()
        most = (_MOST_NODES - self._spent).clamp_min(0) // (counts * len(self._rule.nodes))
        if bool(((errors >= 0).sum(dim=1) <= most).all()):
            return inaccurate
        rank, affordable = errors.argsort(dim=1, descending=True).argsort(dim=1), []
        for place, estimate in enumerate(inaccurate):
            worst = rank[estimate.which, place] < most[estimate.which]
            if worst.any():
                affordable.append(estimate.of(worst))
            if not worst.all():
                self._keep(estimate.of(~worst), 1.0)
        return affordable

    def _divided(self, divisions: Iterable[Division]) -> list[Candidate]:
        """Estimate the parts of sub-intervals."""
        every = list(divisions)
        places = [(cut, division.whole.which) for division in every for cut in division.cuts[1:-1]]
        values = iter(self._values([cut for cut, _ in places], [which for _, which in places]))
        wanted = [part for each in every for part in each.parts([next(values) for _ in range(each.count - 1)])]
        found = iter(self._estimates(wanted))
        return [
            Candidate.extrapolated(each.whole, [next(found) for _ in range(each.count)], self._order) for each in every
        ]

    def _keep(self, estimate: Estimate, weight: float) -> None:
        """Make an estimate a part of the integral."""
        which, products = estimate.which, weight * estimate.products
        if self._products is None:
            self._products = products.new_zeros(len(self._tolerance), products.shape[1])
        self._products.index_add_(0, which, products)
        estimate.part.weights[estimate.entries] += weight
        self._parts[id(estimate.part)] = estimate.part
        if sum(part.averages.num_bytes for part in self._parts.values()) > _KEPT_BYTES:
            self._phi = self._function.gathered(list(self._parts.values()), self._phi)
            for part in self._parts.values():
                part.weights.zero_()  # other queries of it may be kept yet
            self._parts = {}
