"""Gradients of single rows in a form that is smaller than they are, and their products with vectors.

A layer's weight gradient is a sum over the rows k of the batch and the positions t within a row. What belongs to row k
is the gradient g_k of that row; to multiply it with a vector ψ there are two ways:

- *factors*: ⟨ψ, Σ_t δ_{k,t} a_{k,t}ᵀ⟩ = Σ_t δ_{k,t}ᵀ ψ a_{k,t}, without ever forming g_k;
- *block*: form g_k for a block of rows and multiply it with all vectors at once.

With m × n weights, q vectors and p positions the first costs 2·q·p·m·n operations a row, the second 2·(p + q)·m·n and
the traffic of writing and reading g_k. They are equal up to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

__all__ = [
    "Factors",
    "Outer",
    "Rows",
    "Summed",
    "block_pays",
    "block_products",
    "by_row",
    "in_place_pays",
    "merged",
    "strategy",
    "times",
]

_BLOCK_BYTES = 8 << 20
"""Of the gradients that are formed at once; they should stay in the cache until they are multiplied."""
_TRAFFIC = 16
"""Multiplications that take as long as writing and reading an entry of a formed gradient."""
_CALL_BYTES = 16 << 10
"""Of a matrix to which a product is added in as much time as a call takes."""
_FEW = 2
"""Rows for each query on average, which are worth no grouping by their number."""


class Factors(Protocol):
    """The gradients of all rows by one use of a parameter."""

    def take(self, rows: Tensor) -> Self:
        """Those of some rows, `[row]`."""
        ...

    def gradients(self) -> Tensor:
        """g_k, `[row, *shape]`."""
        ...

    def add_to(self, total: Tensor, counts: Tensor) -> None:
        """Add sums of as many consecutive rows as `counts [query]` says to `total [query, element]`, in place."""
        ...

    def combined(self, weights: Tensor) -> Tensor:
        """Σ_k w_k g_k for weights `[row]`, `[*shape]`."""
        ...

    def products(self, vectors: Tensor) -> Tensor:
        """⟨ψ_q, g_k⟩ for vectors ψ `[query, *shape]`, `[query, row]`."""
        ...

    def scaled(self, weights: Tensor) -> Self:
        """Each row times its weight `[row]`."""
        ...

    def absolute(self) -> Self:
        """With the sizes of all numbers that are multiplied and added."""
        ...

    def merged(self, count: int) -> Self:
        """Each `count` rows as one, whose gradient is the sum of theirs."""
        ...

    @property
    def num_bytes(self) -> int:
        """What they take in memory."""
        ...

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        ...

    @property
    def num_positions(self) -> int | None:
        """p, over which a row's gradient is a sum of products; None if it is not made of such."""
        ...

    @property
    def kind(self) -> Any:
        """What factors must have in common to be joined."""
        ...

    def joined(self, others: Sequence[Any]) -> Self:
        """The rows of several, one after the other."""
        ...


class Rows(ABC):
    """What all dataclasses of tensors `[row, …]` share."""

    @abstractmethod
    def gradients(self) -> Tensor:
        """See `Factors.gradients`."""

    @abstractmethod
    def merged(self, count: int) -> Self:
        """See `Factors.merged`."""

    def take(self, rows: Tensor) -> Self:
        """See `Factors.take`."""
        return self._with({name: tensor[rows] for name, tensor in self._tensors.items()})

    def joined(self, others: Sequence[Self]) -> Self:
        """See `Factors.joined`."""
        if not others:
            return self
        return self._with({n: torch.cat([t, *(getattr(o, n) for o in others)]) for n, t in self._tensors.items()})

    def add_to(self, total: Tensor, counts: Tensor) -> None:
        """See `Factors.add_to`."""
        if self._adds_one_by_one(total):
            query = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
            total.index_add_(0, query, self.gradients().reshape(len(query), -1))
            return
        first = counts.cumsum(0) - counts
        for count in counts[counts > 0].unique().tolist():
            chosen = (counts == count).nonzero()[:, 0]
            rows = first[chosen, None] + torch.arange(count, device=counts.device)
            sums = self.take(rows.flatten()).merged(count).gradients().reshape(len(chosen), -1)
            if len(chosen) == len(total):
                total += sums
            else:
                total[chosen] += sums

    def _adds_one_by_one(self, total: Tensor) -> bool:
        """Whether rows, small and few, are added in less time than it takes to sum some of them first."""
        is_small = total[0].nbytes < _CALL_BYTES and self.num_rows <= _FEW * len(total)
        same = all(tensor.dtype == total.dtype for tensor in self._tensors.values() if tensor.is_floating_point())
        return is_small and same and total.device.type == "cpu"

    @property
    def kind(self) -> Any:
        """See `Factors.kind`."""
        settings = tuple(value for value in vars(self).values() if not isinstance(value, Tensor))
        return type(self), settings, tuple((tensor.dtype, tensor.shape[1:]) for tensor in self._tensors.values())

    def absolute(self) -> Self:
        """See `Factors.absolute`."""
        return self._with({n: t.abs() if t.is_floating_point() else t for n, t in self._tensors.items()})

    @property
    def num_bytes(self) -> int:
        """See `Factors.num_bytes`."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    @property
    def num_positions(self) -> int | None:
        """See `Factors.num_positions`."""
        return None

    @property
    def num_rows(self) -> int:
        """See `Factors.num_rows`."""
        return len(next(iter(self._tensors.values())))

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Tensor]) -> Self:
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class Summed(Rows):
    """Gradients that are as small as the parameter: biases, gains of norms, parameters by which outputs are scaled."""

    rows: Tensor
    """g_k, `[row, *shape]`"""

    def gradients(self) -> Tensor:
        """See `Factors.gradients`."""
        return self.rows

    def combined(self, weights: Tensor) -> Tensor:
        """See `Factors.combined`."""
        total: Tensor = torch.tensordot(weights, self.rows, dims=1)
        return total

    def products(self, vectors: Tensor) -> Tensor:
        """See `Factors.products`."""
        return vectors.reshape(len(vectors), -1) @ self.rows.reshape(len(self.rows), -1).T

    def scaled(self, weights: Tensor) -> Summed:
        """See `Factors.scaled`."""
        return Summed(times(weights, self.rows))

    def merged(self, count: int) -> Summed:
        """See `Factors.merged`."""
        return Summed(self.rows.unflatten(0, (-1, count)).sum(dim=1))


@dataclass(frozen=True)
class Outer(Rows):
    """Σ_t left_{k,t} right_{k,t}ᵀ: of a Linear layer, with δ on the left and its input on the right."""

    left: Tensor
    """`[row, position, m]`"""
    right: Tensor
    """`[row, position, n]`"""

    @property
    def num_positions(self) -> int:
        """See `Factors.num_positions`."""
        return self.left.shape[1]

    def gradients(self) -> Tensor:
        """See `Factors.gradients`."""
        return self.left.transpose(1, 2) @ self.right

    def add_to(self, total: Tensor, counts: Tensor) -> None:
        """See `Factors.add_to`."""
        if not in_place_pays(total, self.left):
            super().add_to(total, counts)
            return
        matrices = total.unflatten(1, (self.left.shape[2], self.right.shape[2]))
        sides = (side.split(counts.tolist()) for side in (self.left, self.right))
        for matrix, left, right in zip(matrices, *sides, strict=True):
            if len(left):
                matrix.addmm_(left.flatten(end_dim=1).T, right.flatten(end_dim=1))

    def combined(self, weights: Tensor) -> Tensor:
        """See `Factors.combined`."""
        left: Tensor = times(weights, self.left).flatten(end_dim=1)
        return left.T @ self.right.flatten(end_dim=1)

    def products(self, vectors: Tensor) -> Tensor:
        """See `Factors.products`."""
        if block_pays(len(vectors), self.num_positions):
            return block_products(self, vectors)
        # The longer side is contracted first, so that the shorter one is left.
        short, long = sorted((self.left, self.right), key=lambda side: side.shape[2])
        matrices = vectors if long is self.left else vectors.transpose(1, 2)
        flat, other = long.flatten(end_dim=1), short.flatten(end_dim=1)
        positions = torch.stack([(flat @ matrix).mul_(other).sum(dim=1) for matrix in matrices])
        return by_row(positions, self.num_rows)

    def scaled(self, weights: Tensor) -> Outer:
        """See `Factors.scaled`."""
        return replace(self, left=times(weights, self.left))

    def merged(self, count: int) -> Outer:
        """See `Factors.merged`."""
        return Outer(merged(self.left, count), merged(self.right, count))


def strategy(factors: Factors, num_vectors: int) -> str:
    """Which of the two ways `products` goes; gradients that have no factors are multiplied as they are.

    Args:
        factors: the gradients.
        num_vectors: the number of vectors.
    """
    positions = factors.num_positions
    return "block" if positions is not None and block_pays(num_vectors, positions) else "factors"


def times(weights: Tensor, rows: Tensor) -> Tensor:
    """Each row times its weight `[row]`."""
    return weights.reshape(-1, *[1] * (rows.ndim - 1)) * rows


def merged(rows: Tensor, count: int) -> Tensor:
    """`[row, position, …]` as `[row / count, count · position, …]`."""
    return rows.reshape(len(rows) // count, count * rows.shape[1], *rows.shape[2:])


def by_row(products: Tensor, num_rows: int) -> Tensor:
    """Sum `[query, row · position]` over positions, `[query, row]`."""
    return products.reshape(len(products), num_rows, products.shape[1] // num_rows).sum(dim=2)


def block_pays(num_vectors: int, num_positions: int) -> bool:
    """Whether gradients that are sums over so many positions are formed before they are multiplied."""
    return num_vectors * num_positions > num_vectors + num_positions + _TRAFFIC


def in_place_pays(total: Tensor, factors: Tensor) -> bool:
    """Whether the sums of `total [query, element]` are added to one by one, not made first and added at once.

    Each then takes a call of its own. In another type than that of its factors a sum is rounded, not its terms.
    """
    return total.device.type == "cpu" and total.dtype == factors.dtype and total[0].nbytes >= _CALL_BYTES


def block_products(factors: Any, vectors: Tensor) -> Tensor:
    """See `Factors.products`; the gradients are formed, some rows at a time."""
    flat = vectors.flatten(start_dim=1)
    size = max(1, _BLOCK_BYTES // (flat.shape[1] * flat.itemsize))
    rows = torch.arange(factors.num_rows, device=flat.device).split(size)
    return torch.cat([flat @ factors.take(part).gradients().flatten(start_dim=1).T for part in rows], dim=1)
