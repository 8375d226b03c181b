"""Sums of single rows' gradients: which rows are added up, with which weights, for which queries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind.path.factors import Factors

__all__ = ["Terms", "add_combined"]


@dataclass(frozen=True, eq=False)
class Terms:
    """Which rows are added up, with which weights, to which queries' sums."""

    query: Tensor
    """`[term]`"""
    row: Tensor
    """`[term]`"""
    weights: Tensor
    """`[term]`"""
    num_rows: int
    """Of the factors whose rows they are."""

    @staticmethod
    def together(*several: Terms) -> Terms:
        """Those of factors whose rows come one after the other, by ascending query."""
        query = torch.cat([each.query for each in several])
        first = itertools.accumulate((each.num_rows for each in several[:-1]), initial=0)
        row = torch.cat([each.row + start for each, start in zip(several, first, strict=True)])
        weights, order = torch.cat([each.weights for each in several]), query.argsort(stable=True)
        return Terms(query[order], row[order], weights[order], sum(each.num_rows for each in several))


def add_combined(
    total: Tensor, parts: Sequence[tuple[Factors, Terms]], together: Callable[..., Terms] = Terms.together
) -> None:
    """Add sums of rows' gradients to `total [query, element]`.

    Args:
        total: changed in place.
        parts: factors, and what is added up of their rows.
        together: `Terms.together`, as it is or remembering what it made for other parameters.
    """
    alike: dict[Any, list[tuple[Factors, Terms]]] = {}
    for part in parts:
        alike.setdefault(part[0].kind, []).append(part)
    for group in alike.values():
        assert all(factors.num_rows == terms.num_rows for factors, terms in group)
        first, *others = [factors for factors, _ in group]
        terms = together(*(terms for _, terms in group))
        if not len(terms.row):
            continue
        chosen = first.joined(others).take(terms.row).scaled(terms.weights)
        chosen.add_to(total, torch.bincount(terms.query, minlength=len(total)))
