"""Quadrature rules for the path integral: fixed ones, and one that divides a step where its measured error is large."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

__all__ = ["Adaptive", "FixedRule", "Quadrature", "adaptive", "gauss_legendre", "midpoint"]


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

    def rule_for(self, *, kinked: bool) -> FixedRule:
        """The rule on each sub-interval, for functions whose slopes jump or not."""
        return self.rule or gauss_legendre(1 if kinked else 3)


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


@cache
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
