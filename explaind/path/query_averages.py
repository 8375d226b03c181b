"""Average query gradients over a sub-interval of a step, kept as factors of the inputs' rows until they are needed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from explaind.parameters import ParameterTable
from explaind.path.factors import Factors
from explaind.path.intervals import Part
from explaind.path.sums import Terms, add_combined

__all__ = ["QueryAverages", "add_parts"]


class QueryAverages:
    """Σ_i w_{qi} g_i by every parameter: factors of the inputs' gradients g_i, and the weights of these in the queries.

    Args:
        table: the parameters.
        num_queries: of these queries.
    """

    def __init__(self, table: ParameterTable, num_queries: int) -> None:
        self._table, self._num_queries = table, num_queries
        self._terms = dict[int, tuple[Tensor, list[tuple[int, Factors]]]]()
        """By identity of the weights, which parameters share: these, and the factors with the parameter's place."""
        self.num_bytes = 0
        """See `explaind.path.integral.Averages.num_bytes`."""

    def add(self, name: str, factors: Factors, weights: Tensor) -> None:
        """Add a parameter's rows with weights `[query, row]`."""
        self._terms.setdefault(id(weights), (weights, []))[1].append((self._table.names.index(name), factors))
        self.num_bytes += factors.num_bytes

    def products(self, update: Tensor) -> Tensor:
        """See `explaind.path.integral.Averages.products`."""
        total = torch.zeros(self._num_queries, len(self._table), dtype=torch.float64, device=update.device)
        for weights, terms in self._terms.values():
            vectors = self._table.unflatten(update.to(weights.dtype)[None])
            products = total.new_zeros(weights.shape[1], len(self._table))
            for place, factors in terms:
                products[:, place] += factors.products(vectors[self._table.names[place]])[0]
            total += weights.to(total.dtype) @ products
        return total

    def rounding(self, update: Tensor, entries: Tensor) -> Tensor:
        """See `explaind.path.integral.Averages.rounding`."""
        total = torch.zeros(len(entries), dtype=torch.float64, device=update.device)
        for weights, terms in self._terms.values():
            sizes, vectors = weights[entries].abs(), self._table.unflatten(update.to(weights.dtype).abs()[None])
            rows = sizes.any(dim=0).nonzero()[:, 0]
            if not len(rows):
                continue
            products = total.new_zeros(len(rows))
            for place, factors in terms:
                products += factors.take(rows).absolute().products(vectors[self._table.names[place]])[0]
            total += torch.finfo(weights.dtype).eps * sizes[:, rows].to(total.dtype) @ products
        return total

    def terms(self) -> Iterable[tuple[Tensor, Sequence[tuple[int, Factors]]]]:
        """Weights of rows `[query, row]`, and what they belong to: factors of the parameters at these places."""
        return self._terms.values()


def add_parts(table: ParameterTable, total: Tensor, parts: Sequence[Part]) -> None:
    """Put the gradients of parts of a step together, in `total [query, element]`."""
    found: list[list[tuple[Factors, Terms]]] = [[] for _ in table]
    for part in parts:
        for weights, own in part.averages.terms():
            every = part.weights.to(weights.dtype)[:, None] * weights
            entry, row = every.nonzero(as_tuple=True)
            terms = Terms(part.which[entry], row, every[entry, row], every.shape[1])
            for place, factors in own:
                found[place].append((factors, terms))
    together = functools.cache(Terms.together)  # parameters share what they are made of
    for parameter, each in zip(table, found, strict=True):
        add_combined(total[:, parameter.slice], each, together)
