"""The optimizers' linear filter of one step, for all parameters at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor

from explaind.optimizers import LinearFilter
from explaind.parameters import ParameterTable

__all__ = ["FIELDS", "FlatFilter"]

FIELDS = [field.name for field in fields(LinearFilter) if field.name not in ("left", "right")]
"""What a filter has for every element."""


@dataclass(frozen=True, kw_only=True)
class FlatFilter:
    """`LinearFilter` of all parameters at one step; every tensor is float64 `[element]`."""

    sign: Tensor
    coupled_decay: Tensor
    retain: Tensor
    intake: Tensor
    buffer_gain: Tensor
    previous_gain: Tensor
    gradient_gain: Tensor
    decoupled_decay: Tensor
    buffer_roundoff: Tensor
    update_roundoff: Tensor
    table: ParameterTable
    factors: dict[str, tuple[Tensor | None, Tensor | None]]
    """The matrices on the left and on the right of the parameters that have any, by name."""

    def multiplied(self, vector: Tensor) -> Tensor:
        """The products left · v · right of every parameter, for v `[…, element]`."""
        return self._between(vector, lambda factor: factor)

    def adjoint(self, phi: Tensor) -> Tensor:
        """leftᵀ · φ · rightᵀ of every parameter, for φ `[…, element]`: ⟨φ, left · v · right⟩ = ⟨adjoint(φ), v⟩."""
        return self._between(phi, lambda factor: factor.T)

    def _between(self, vectors: Tensor, turned: Callable[[Tensor], Tensor]) -> Tensor:
        """The products of every parameter's part with its factors, as they are or transposed."""
        products = vectors.clone() if self.factors else vectors
        for name, (left, right) in self.factors.items():
            parameter = self.table[self.table.names.index(name)]
            matrix = vectors[..., parameter.slice].unflatten(-1, parameter.shape)
            matrix = matrix if left is None else turned(left).to(matrix.dtype) @ matrix
            matrix = matrix if right is None else matrix @ turned(right).to(matrix.dtype)
            products[..., parameter.slice] = matrix.flatten(start_dim=-2)
        return products
