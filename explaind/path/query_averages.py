"""Average query gradients over a sub-interval of a step, kept as factors of the inputs' rows until they are needed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from explaind.parameters import ParameterTable
from explaind.path.factors import Factors, add_combined
from explaind.path.intervals import Part

__all__ = ["QueryAverages", "add_parts"]


class QueryAverages:
    """Σ_i w_{qi} g_i by every parameter: factors of the inputs' gradients g_i, and the weights of these in the queries.

    Args:
        table: the parameters.
        num_queries: of these queries.
    """

    def __init__(self, table: ParameterTable, num_queries: int) -> None:
        self._table, self._num_queries = table, num_queries
        self._terms: dict[str, list[tuple[Factors, Tensor]]] = {name: [] for name in table.names}
        self.num_bytes = 0
        """See `explaind.path.integral.Averages.num_bytes`."""

    def add(self, name: str, factors: Factors, weights: Tensor) -> None:
        """Add a parameter's rows with weights `[query, row]`."""
        self._terms[name].append((factors, weights))
        self.num_bytes += factors.num_bytes

    def products(self, update: Tensor) -> Tensor:
        """See `explaind.path.integral.Averages.products`."""
        return self._by_parameter(update, absolute=False)

    def rounding(self, update: Tensor) -> Tensor:
        """See `explaind.path.integral.Averages.rounding`."""
        dtype = next(weights.dtype for terms in self._terms.values() for _, weights in terms)
        return torch.finfo(dtype).eps * self._by_parameter(update.abs(), absolute=True).sum(dim=1)

    def _by_parameter(self, update: Tensor, *, absolute: bool) -> Tensor:
        total = torch.zeros(self._num_queries, len(self._table), dtype=torch.float64, device=update.device)
        for place, parameter in enumerate(self._table):
            for factors, weights in self._terms[parameter.name]:
                vector = update[parameter.slice].to(weights.dtype).reshape(1, *parameter.shape)
                own, weight = (factors.absolute(), weights.abs()) if absolute else (factors, weights)
                total[:, place] += weight.to(torch.float64) @ own.products(vector)[0].to(torch.float64)
        return total

    def terms(self, name: str) -> Sequence[tuple[Factors, Tensor]]:
        """A parameter's factors, with the rows' weights `[query, row]`."""
        return self._terms[name]


def add_parts(table: ParameterTable, total: Tensor, parts: Sequence[Part]) -> None:
    """Put the gradients of parts of a step together, in `total [query, element]`."""
    rows = _Rows()
    for parameter in table:
        found = [
            (factors, *rows.of(part, weights))
            for part in parts
            for factors, weights in part.averages.terms(parameter.name)
        ]
        add_combined(total[:, parameter.slice], found)


class _Rows:
    """The rows that queries are made of because of some parts; the same for all parameters that share weights."""

    def __init__(self) -> None:
        self._known = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]()

    def of(self, part: Part, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, rows and weights of the entries that are not zero, `[entry]` each."""
        key = id(part), id(weights)
        if key not in self._known:
            every = part.weights.to(weights.dtype)[:, None] * weights
            entry, row = every.nonzero(as_tuple=True)
            self._known[key] = part.which[entry], row, every[entry, row]
        return self._known[key]
