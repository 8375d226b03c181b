"""Gradients of single rows by an embedding, as `explaind.path.factors` has those of other layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from explaind.path.factors import Rows, by_row, merged, times

__all__ = ["Gathered"]

_SHORT_SEGMENT = 8
"""Fewer rows than this for each distinct index are gathered, not sorted."""


@dataclass(frozen=True)
class Gathered(Rows):
    """Σ_t δ_{k,t} in the row of an embedding that position t looked up."""

    indices: Tensor
    """`[row, position]`"""
    deltas: Tensor
    """`[row, position, width]`"""
    num_embeddings: int

    def gradients(self) -> Tensor:
        """See `Factors.gradients`."""
        num_rows, width = len(self.indices), self.deltas.shape[2]
        place = self.indices + self.num_embeddings * torch.arange(num_rows, device=self.indices.device)[:, None]
        flat = self.deltas.new_zeros(num_rows * self.num_embeddings, width)
        flat.index_add_(0, place.flatten(), self.deltas.flatten(end_dim=1))
        return flat.view(num_rows, self.num_embeddings, width)

    def combined(self, weights: Tensor) -> Tensor:
        """See `Factors.combined`."""
        flat = self.deltas.new_zeros(self.num_embeddings, self.deltas.shape[2])
        return flat.index_add_(0, self.indices.flatten(), times(weights, self.deltas).flatten(end_dim=1))

    def products(self, vectors: Tensor) -> Tensor:
        """See `Factors.products`."""
        order = self.indices.flatten().argsort(stable=True)
        found, counts = self.indices.flatten()[order].unique_consecutive(return_counts=True)
        deltas = self.deltas.flatten(end_dim=1)
        products = deltas.new_empty(len(vectors), len(deltas))
        if len(deltas) < _SHORT_SEGMENT * len(found):
            for query, vector in enumerate(vectors):
                products[query] = (vector[self.indices.flatten()] * deltas).sum(dim=1)
        else:
            segments = zip(found.tolist(), order.split(counts.tolist()), strict=True)
            for index, places in segments:
                products[:, places] = vectors[:, index] @ deltas[places].T
        return by_row(products, self.num_rows)

    def scaled(self, weights: Tensor) -> Gathered:
        """See `Factors.scaled`."""
        return replace(self, deltas=times(weights, self.deltas))

    def merged(self, count: int) -> Gathered:
        """See `Factors.merged`."""
        return replace(self, indices=merged(self.indices, count), deltas=merged(self.deltas, count))
