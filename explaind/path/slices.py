"""Products of flat vectors, layer by layer; a layer is the list of slices of the flat vector that belong to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from explaind.parameters import Parameter

__all__ = ["Slices", "complement", "dot", "layer_of", "layer_products", "product"]

_CONVERTED_ELEMENTS = 1 << 18

Slices = Sequence[Sequence[slice]]
"""For each layer the parts of the flat vector that belong to it."""


def layer_products(left: Tensor, right: Tensor, slices: Slices) -> Tensor:
    """⟨v_q^{(l)}, w_k^{(l)}⟩ of `left [query, element]` and `right [row, element]`, `[query, row, layer]`."""
    nothing = left.new_zeros(len(left), len(right))
    by_layer = [sum((left[:, part] @ right[:, part].T for part in layer), start=nothing) for layer in slices]
    return torch.stack(by_layer, dim=-1)


def dot(vectors: Tensor, flat: Tensor, slices: Slices) -> Tensor:
    """⟨v_q^{(l)}, w^{(l)}⟩ of `vectors [query, element]` and one flat vector in its type, `[query, layer]`."""
    result = flat.new_zeros(len(vectors), len(slices))
    for layer, parts in enumerate(slices):
        for part in parts:
            result[:, layer] += product(vectors[:, part], flat[part])
    return result


def product(vectors: Tensor, flat: Tensor) -> Tensor:
    """⟨v_q, w⟩ of `vectors [query, element]` and `w [element]` in the type of w, `[query]`."""
    if vectors.dtype == flat.dtype:
        return vectors @ flat
    # In parts that stay in the cache, so that not all vectors are converted at once.
    size = max(1, _CONVERTED_ELEMENTS // max(1, len(vectors)))
    parts = zip(vectors.split(size, dim=1), flat.split(size), strict=True)
    return torch.stack([part.to(flat.dtype) @ own for part, own in parts]).sum(dim=0)


def layer_of(parameter: Parameter, slices: Slices) -> int | None:
    """Which layer a parameter belongs to; None if to none."""
    for layer, parts in enumerate(slices):
        for part in parts:
            first, last, _ = part.indices(parameter.slice.stop)
            if first <= parameter.slice.start and parameter.slice.stop <= last:
                return layer
    return None


def complement(slices: Slices, num_elements: int) -> list[slice]:
    """The parts of the flat vector that no layer covers."""
    free, position = [], 0
    for part in sorted((part for layer in slices for part in layer), key=lambda part: part.start):
        if part.start > position:
            free.append(slice(position, part.start))
        position = part.stop
    return [*free, slice(position, num_elements)] if position < num_elements else free
