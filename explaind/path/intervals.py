"""Sub-intervals of a step's segment: what is estimated over them, and how they are divided."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["PARTS", "Candidate", "Division", "Estimate", "Part", "Wanted", "alike", "grouped"]

PARTS = (2, 4, 8)
"""Numbers of parts that a sub-interval is divided into at once."""
_PASS_QUERIES = 50
"""Queries whose gradients take as long as what every pass through a model takes, however few there are."""

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class Part:
    """Average gradients over a sub-interval, as far as they count."""

    averages: Any
    which: Tensor
    """The queries, `[query]`."""
    weights: Tensor
    """How much each counts, zero if not, float64 `[query]`."""


@dataclass(frozen=True)
class Wanted:
    """A sub-interval that is to be estimated for some queries."""

    ends: tuple[float, float]
    which: Tensor
    """The queries, `[query]`."""
    before: Tensor
    """q at the left end, `[query]`."""
    after: Tensor
    """q at the right end, `[query]`."""
    exact: bool
    """Whether in float64."""

    @property
    def length(self) -> float:
        """Of the sub-interval, as a part of the segment."""
        return self.ends[1] - self.ends[0]


@dataclass(frozen=True)
class Estimate(Wanted):
    """The rule's estimate over a sub-interval, for some queries."""

    part: Part
    """The gradients of these and perhaps of other queries."""
    entries: Tensor
    """Places of the queries among those of the gradients, `[query]`."""
    products: Tensor
    """`[query, parameter]`"""

    @property
    def error(self) -> Tensor:
        """What it misses of the change of q, `[query]`."""
        return self.after - self.before - self.products.sum(dim=1)

    def of(self, chosen: Tensor) -> Estimate:
        """That of some of its queries, by a mask `[query]`."""
        fields = ("which", "before", "after", "entries", "products")
        return replace(self, **{name: getattr(self, name)[chosen] for name in fields})

    def exactly(self) -> Wanted:
        """The same, to be estimated in float64."""
        return Wanted(self.ends, self.which, self.before, self.after, exact=True)


@dataclass(frozen=True)
class Division:
    """A sub-interval that is divided for some queries into equal parts."""

    whole: Estimate
    count: int

    @property
    def cuts(self) -> list[float]:
        """Ends of the parts."""
        left, right = self.whole.ends
        return [left + self.whole.length * part / self.count for part in range(self.count)] + [right]

    def parts(self, inner: Sequence[Tensor]) -> list[Wanted]:
        """What is to be estimated, given q at the cuts between the parts, `[query]` each."""
        whole, cuts = self.whole, self.cuts
        values = [whole.before, *inner, whole.after]
        return [
            Wanted((cuts[i], cuts[i + 1]), whole.which, values[i], values[i + 1], whole.exact)
            for i in range(self.count)
        ]


@dataclass(frozen=True)
class Candidate:
    """What may stand for a sub-interval in the integral of some queries: weighted estimates, and their error."""

    weighted: Sequence[tuple[Estimate, float]]
    error: Tensor
    """Its size, `[query]`."""
    whole: Estimate
    """Of the sub-interval."""
    parts: Sequence[Estimate]
    """Of its parts, if it is divided."""

    @classmethod
    def alone(cls, estimate: Estimate) -> Candidate:
        """The estimate itself."""
        return cls([(estimate, 1.0)], estimate.error.abs(), estimate, [])

    @classmethod
    def extrapolated(cls, whole: Estimate, parts: Sequence[Estimate], order: int) -> Candidate:
        """Richardson's extrapolation.

        The error of the whole is count^order times that of the parts together, as far as it is of the rule's order;
        in this combination it cancels.
        """
        left_out = float(len(parts)) ** -order
        weight = left_out / (1 - left_out)
        weighted = [(part, 1 + weight) for part in parts] + [(whole, -weight)]
        error = torch.stack([weight * estimate.error for estimate, weight in weighted]).sum(dim=0).abs()
        return cls(weighted, error, whole, parts)

    def of(self, chosen: Tensor) -> Candidate:
        """That of some of its queries, by a mask `[query]`."""
        return Candidate(
            [(estimate.of(chosen), weight) for estimate, weight in self.weighted],
            self.error[chosen],
            self.whole.of(chosen),
            [part.of(chosen) for part in self.parts],
        )


def alike(keys: Iterable[_Key]) -> dict[_Key, list[int]]:
    """Places of equal keys."""
    places = dict[_Key, list[int]]()
    for place, key in enumerate(keys):
        places.setdefault(key, []).append(place)
    return places


def grouped(counts: Tensor) -> Iterator[tuple[int, Tensor]]:
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
