"""Gradients of single rows by the kernel of a convolution, as `explaind.path.factors` has those of other layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from explaind.path.factors import Rows, block_pays, block_products, by_row, in_place_pays, merged, times

__all__ = ["Convolved"]


_PATCH_BYTES = 1 << 21
"""Of patches that are laid out at once; they should stay in the cache until they are multiplied."""


@dataclass(frozen=True)
class Convolved(Rows):
    """Σ_t over the places t of images: of a convolution in one or two dimensions."""

    inputs: Tensor
    """`[row, image, channel, height, width]`"""
    deltas: Tensor
    """`[row, image, channel, height, width]`"""
    shape: tuple[int, ...]
    """Of the weight; `[out, in, length]` in one dimension, where the height is one."""
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def num_positions(self) -> int:
        """See `Factors.num_positions`."""
        return self.deltas[0, :, 0].numel()

    def gradients(self) -> Tensor:
        """See `Factors.gradients`."""
        images, deltas = self.inputs.flatten(end_dim=1), self.deltas.flatten(end_dim=1)
        patches = self._patches(images)
        left = deltas.reshape(len(images), self.groups, -1, deltas[0, 0].numel())
        right = patches.reshape(len(images), self.groups, -1, patches.shape[2])
        single = left @ right.transpose(2, 3)
        return single.reshape(*self.inputs.shape[:2], *self.shape).sum(dim=1)

    def add_to(self, total: Tensor, counts: Tensor) -> None:
        """See `Factors.add_to`."""
        if self.groups > 1 or not in_place_pays(total, self.deltas):
            super().add_to(total, counts)
            return
        matrices = total.unflatten(1, (self.shape[0], -1))
        images, deltas = self.inputs.flatten(end_dim=1), self.deltas.flatten(end_dim=1).flatten(start_dim=2)
        every = counts * self.inputs.shape[1]
        query = torch.arange(len(counts), device=counts.device).repeat_interleave(every)
        size, later = (
            max(1, _PATCH_BYTES // (matrices[0, 0].nbytes * deltas.shape[2])),
            torch.ones_like(query, dtype=torch.bool),
        )
        if bool((every > 0).all()):  # then the first image of each, all in one call
            first = every.cumsum(0) - every
            later[first] = False
            for some, own in zip(first.split(size), matrices.split(size), strict=True):
                own.baddbmm_(deltas[some], self._patches(images[some]).transpose(1, 2))
        for some in later.nonzero()[:, 0].split(size):
            patches = self._patches(images[some])
            for place, delta, patch in zip(query[some].tolist(), deltas[some], patches, strict=True):
                matrices[place].addmm_(delta, patch.T)

    def combined(self, weights: Tensor) -> Tensor:
        """See `Factors.combined`."""
        kernel = *self.shape[:2], *self._kernel
        images, deltas = self.inputs.flatten(end_dim=1), times(weights, self.deltas).flatten(end_dim=1)
        settings = self.stride, self.padding, self.dilation, self.groups
        total: Tensor = conv2d_weight(images, kernel, deltas, *settings)
        return total.reshape(self.shape)

    def products(self, vectors: Tensor) -> Tensor:
        """See `Factors.products`."""
        if block_pays(len(vectors), self.num_positions):
            return block_products(self, vectors)
        images, deltas = self.inputs.flatten(end_dim=1), self.deltas.flatten(end_dim=1)
        kernels = vectors.reshape(len(vectors), *self.shape[:2], *self._kernel)
        outputs = [
            (F.conv2d(images, kernel, None, self.stride, self.padding, self.dilation, self.groups) * deltas).sum(
                (1, 2, 3)
            )
            for kernel in kernels
        ]
        return by_row(torch.stack(outputs), self.num_rows)

    def scaled(self, weights: Tensor) -> Convolved:
        """See `Factors.scaled`."""
        return replace(self, deltas=times(weights, self.deltas))

    def merged(self, count: int) -> Convolved:
        """See `Factors.merged`."""
        return replace(self, inputs=merged(self.inputs, count), deltas=merged(self.deltas, count))

    def _patches(self, images: Tensor) -> Tensor:
        """What each place of the output is made of, `[image, channel · height · width of the kernel, place]`."""
        return F.unfold(images, self._kernel, stride=self.stride, padding=self.padding, dilation=self.dilation)

    @property
    def _kernel(self) -> tuple[int, int]:
        height, width = (1, *self.shape[2:])[-2:]
        return height, width
