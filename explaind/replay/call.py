"""A recorded forward call, made again at its parameters: the gradients of its rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import grad, vmap

from explaind.errors import ExplaindError
from explaind.parameters import ParameterTable
from explaind.replay.model import Forward, modes, restored_rng, vectorizable

__all__ = ["SAME_GRADIENT", "Replay"]

SAME_GRADIENT = 1e-2
"""Largest difference, relative to its norm, of the loop's gradient from that of an objective's sum."""
_BLOCK_BYTES = 128 << 20


@dataclass(frozen=True, kw_only=True)
class Replay:
    """All that a call's gradients depend on, in one type and on one device."""

    model: nn.Module
    """Left as it is."""
    forward: Forward
    """The call as a function."""
    params: Mapping[str, Tensor]
    """The parameters θ to differentiate by."""
    reached: Collection[str]
    """Names of those whose gradients the cotangents entered; the others' are zero."""
    fixed: Mapping[str, Tensor]
    """The model's other tensors, as they were before the call."""
    inputs: Mapping[str, Tensor]
    """The call's tensors `[row, …]`."""
    output_grads: Mapping[str, Tensor]
    """Cotangents c `[row, …]` by output; none with an objective."""
    training: NDArray[np.bool_]
    """`module.training` of every module."""
    rng_state: NDArray[np.uint8]
    """Random number generators before the call."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the batch."""
        return len(next(iter(self.inputs.values())))

    @contextmanager
    def conditions(self) -> Iterator[None]:
        """The modes and the randomness of the recorded call; attention by its defining operations."""
        device = next(iter(self.inputs.values())).device
        with modes(self.model, self.training.tolist()), restored_rng(self.rng_state, device), vectorizable(self.model):
            yield

    def outputs(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """f(x; θ) of the whole batch, to be called under `conditions`; buffers that it changes are copies."""
        copies = {name: tensor.clone() for name, tensor in self.fixed.items()}
        return self.forward({**copies, **self._reachable(params)}, self.inputs)

    def _reachable(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor if name in self.reached else tensor.detach() for name, tensor in params.items()}

    def summed(self) -> dict[str, Tensor]:
        """Σ_k g_k, `{name: [*shape]}`."""
        params = {name: tensor.detach().requires_grad_() for name, tensor in self.params.items()}
        with self.conditions(), torch.enable_grad():
            scalar = self.forward.scalar(self.outputs(params), self.output_grads)
            gradients = torch.autograd.grad(scalar, list(params.values()), materialize_grads=True)
        return dict(zip(params, gradients, strict=True))

    def separate_rows(self, rows: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """g_k = J_k(θ)ᵀ c_k of some rows, each evaluated on its own, `{name: [row, *shape]}`; by vmap(grad).

        Args:
            rows: which rows, `[row]`.
            names: which parameters; by default all.

        Raises:
            RuntimeError, ValueError: the model draws random numbers, or changes buffers.
        """

        def scalar(params: dict[str, Tensor], row: dict[str, Tensor], cotangents: dict[str, Tensor]) -> Tensor:
            batch = {name: value.unsqueeze(0) for name, value in row.items()}
            outputs = self.forward({**copies, **others, **self._reachable(params)}, batch)
            return self.forward.scalar({name: tensor.squeeze(0) for name, tensor in outputs.items()}, cotangents)

        copies = {name: tensor.clone() for name, tensor in self.fixed.items()}
        wanted = {name: tensor for name, tensor in self.params.items() if names is None or name in names}
        others = {name: tensor for name, tensor in self.params.items() if name not in wanted}
        chosen = ({name: tensor[rows] for name, tensor in side.items()} for side in (self.inputs, self.output_grads))
        with modes(self.model, self.training.tolist()), vectorizable(self.model):
            gradients: dict[str, Tensor] = vmap(grad(scalar), in_dims=(None, 0, 0))(wanted, *chosen)
        return gradients

    def batch_rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """g_k of some rows as far as the gradient enters at their own output, `{name: [row, *shape]}`.

        One backward pass per row through the batch: for models that draw random numbers or couple its rows.
        """
        params = {name: tensor.detach().requires_grad_() for name, tensor in self.params.items()}
        gradients = []
        with self.conditions(), torch.enable_grad():
            outputs = self.outputs(params)
            for row in rows:
                own = {name: tensor[row] for name, tensor in outputs.items()}
                scalar = self.forward.scalar(own, {name: c[row] for name, c in self.output_grads.items()})
                gradients.append(
                    torch.autograd.grad(scalar, list(params.values()), retain_graph=True, materialize_grads=True)
                )
        return {name: torch.stack(parts) for name, parts in zip(params, zip(*gradients, strict=True), strict=True)}

    def row_gradients(self, table: ParameterTable, rows: Tensor | None = None, *, separate: bool) -> Iterator[Tensor]:
        """g_k of all rows, or some, as flat vectors, in blocks `[block, element]`.

        Args:
            table: order of the elements.
            rows: which rows, `[row]`.
            separate: evaluate each row on its own, else in its batch with the recorded randomness.
        """
        itemsize = next(iter(self.params.values())).itemsize
        block = max(1, _BLOCK_BYTES // (table.num_elements * itemsize))
        for part in (torch.arange(self.num_rows) if rows is None else rows).split(block):
            yield table.flatten_rows(self.separate_rows(part) if separate else self.batch_rows(part.tolist()))

    def couples_rows(self) -> bool:
        """Whether the first row's output depends on what is in the other rows, as with BatchNorm in training."""
        alike = {name: tensor[:1].expand_as(tensor).clone() for name, tensor in self.inputs.items()}
        with torch.no_grad(), self.conditions():
            outputs = self.outputs(self.params)
        with torch.no_grad(), self.conditions():
            others = replace(self, inputs=alike).outputs(self.params)
        return any(not torch.allclose(tensor[0], others[name][0]) for name, tensor in outputs.items())

    def draws_random_numbers(self) -> bool:
        """Whether the forward pass uses torch's random numbers, as with dropout in training."""
        device = next(iter(self.inputs.values())).device

        def state() -> list[Tensor]:
            return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

        with torch.no_grad(), self.conditions():
            before = state()
            self.outputs(self.params)
            return any(not torch.equal(old, new) for old, new in zip(before, state(), strict=True))

    def is_separate(self) -> bool:
        """Whether the gradients of rows on their own sum to that of the batch."""
        try:
            rows = self.separate_rows(torch.arange(self.num_rows))
        except (ExplaindError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError):
            return False  # how vmap and batch layers say that a row cannot be evaluated alone
        error = size = 0.0
        for name, total in self.summed().items():
            error += float((rows[name].sum(dim=0) - total).square().sum())
            size += float(rows[name].abs().sum(dim=0).square().sum())
        dtype = next(iter(self.params.values())).dtype
        return math.sqrt(error) <= 1e4 * torch.finfo(dtype).eps * math.sqrt(size)
