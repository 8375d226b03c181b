"""What the operations of autograd's graph bring to the single rows of a batch, by what they save.

Each takes the graph's node, the gradient δ at its output, the shape of the parameter at one of its edges, and whether
that was transposed on the way; and gives a function that makes `Factors` of them, once it is known where the rows lie.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from explaind.path.convolved import Convolved
from explaind.path.factors import Factors, Outer, Summed
from explaind.path.gathered import Gathered

__all__ = ["OPERATIONS", "Make", "NotByRowError", "Operation", "Split", "matrix"]

Split = Callable[[Tensor], Tensor]
"""Gives a tensor the axes `[row, position, …]`."""
Make = Callable[[Split], Factors]


class NotByRowError(ValueError):
    """Why a parameter is not covered: an operation has no axis that the rows of the batch could lie along."""


Operation = Callable[[Any, Tensor, tuple[int, ...], bool], Make]


def _summed_to(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Sum `[row, position, …]` over positions and what was broadcast, `[row, *shape]`."""
    inner = rows.ndim - 2
    own = shape[1:] if len(shape) == inner + 1 and shape[0] == 1 else shape
    if len(own) > inner:
        raise NotByRowError(f"a parameter of shape {shape} has entries for single rows")
    own = (1,) * (inner - len(own)) + own
    broadcast = [axis + 2 for axis, size in enumerate(own) if size == 1]
    return rows.sum(dim=(1, *broadcast)).reshape(len(rows), *shape)


def _live(delta: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Leave out positions at which no row has a gradient, such as all but the last token of a sequence."""
    if delta.shape[1] > 1:
        by_position = delta.flatten(start_dim=2)
        live = by_position[0].any(dim=1)
        for position in (~live).nonzero()[:, 0].tolist():
            live[position] = by_position[:, position].any()
        if not bool(live.all()):
            return tuple(tensor[:, live] for tensor in (delta, *others))
    return (delta, *others)


def matrix(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    """The second factor W of a matrix product, a @ W or a @ Wᵀ, with or without a bias added."""
    if node.name() == "AddmmBackward0" and (node._saved_alpha != 1 or node._saved_beta != 1):
        raise NotByRowError("a scaled matrix product")
    inputs = (node._saved_mat1 if node.name() == "AddmmBackward0" else node._saved_self).detach()

    def make(split: Split) -> Factors:
        deltas, entering = _live(split(delta), split(inputs))
        return Outer(deltas, entering) if transposed else Outer(entering, deltas)

    return make


def _added(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    """A term of a sum, as far as it is broadcast over the rows."""
    if getattr(node, "_saved_alpha", 1) != 1:
        raise NotByRowError("a scaled term")
    return lambda split: Summed(_summed_to(split(delta), shape))


def _multiplied(other: str) -> Operation:
    """A factor of an elementwise product; `other` names the saved other one."""

    def operation(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
        product = delta * getattr(node, other).detach()
        return lambda split: Summed(_summed_to(split(product), shape))

    return operation


def _embedding(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    """The table of an embedding; its padding row takes no gradient."""
    if node._saved_scale_grad_by_freq:
        raise NotByRowError("gradients divided by the batch's frequencies")
    indices = node._saved_indices.unsqueeze(-1)
    found = delta * (indices != node._saved_padding_idx) if node._saved_padding_idx < shape[0] else delta

    def make(split: Split) -> Factors:
        deltas, looked_up = _live(split(found).flatten(1, -2), split(indices).flatten(start_dim=1))
        return Gathered(looked_up, deltas, shape[0])

    return make


def _convolution(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    """The kernel of a convolution in one or two dimensions."""
    if node._saved_transposed or len(shape) not in (3, 4):
        raise NotByRowError("a transposed convolution, or one in three dimensions")
    inputs = node._saved_input.detach()
    settings = {
        "stride": _pair(1, node._saved_stride),
        "padding": _pair(0, node._saved_padding),
        "dilation": _pair(1, node._saved_dilation),
        "groups": node._saved_groups,
    }
    return lambda split: Convolved(_images(inputs, split), _images(delta, split), shape, **settings)


def _pair(missing: int, values: tuple[int, ...]) -> tuple[int, int]:
    """A setting for height and width, from that of one dimension or two."""
    height, width = (missing, *values)[-2:]
    return height, width


def _images(tensor: Tensor, split: Split) -> Tensor:
    """`[row, image, channel, height, width]`; the height of a line is one."""
    sizes = (tensor.shape[1], *(1, *tensor.shape[2:])[-2:])
    rows = split(tensor.flatten(start_dim=1))
    return rows.reshape(*rows.shape[:2], *sizes)


def _channel_bias(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    """The bias of a convolution."""
    summed = delta.flatten(start_dim=2).sum(dim=2)
    return lambda split: Summed(_summed_to(split(summed), shape))


def _layer_norm_gain(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    product = delta * (node._saved_input.detach() - node._saved_result1) * node._saved_result2
    return lambda split: Summed(_summed_to(split(product), shape))


def _group_norm_gain(node: Any, delta: Tensor, shape: tuple[int, ...], transposed: bool) -> Make:
    grouped = node._saved_input.detach().unflatten(1, (node._saved_group, -1)).flatten(start_dim=2)
    normal = (grouped - node._saved_result1[..., None]) * node._saved_result2[..., None]
    summed = (delta * normal.view_as(delta)).flatten(start_dim=2).sum(dim=2)
    return lambda split: Summed(_summed_to(split(summed), shape))


OPERATIONS: dict[tuple[str, int], Operation] = {
    ("AddmmBackward0", 0): _added,
    ("AddmmBackward0", 2): matrix,
    ("MmBackward0", 1): matrix,
    ("EmbeddingBackward0", 0): _embedding,
    ("ConvolutionBackward0", 1): _convolution,
    ("ConvolutionBackward0", 2): _channel_bias,
    ("NativeLayerNormBackward0", 1): _layer_norm_gain,
    ("NativeLayerNormBackward0", 2): _added,
    ("NativeGroupNormBackward0", 1): _group_norm_gain,
    ("NativeGroupNormBackward0", 2): _channel_bias,
    ("AddBackward0", 0): _added,
    ("AddBackward0", 1): _added,
    ("MulBackward0", 0): _multiplied("_saved_other"),
    ("MulBackward0", 1): _multiplied("_saved_self"),
}
"""By the name of the graph's node and the number of its edge."""
