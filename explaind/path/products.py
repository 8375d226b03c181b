"""⟨ψ, g_k⟩: products of adjoint vectors with every example's gradient, split over parameter slices.

All ways are equal to rounding; `explaind.path.strategy` picks one. Another way is another class with `products`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from explaind.path.gradients import call_replay
from explaind.path.slices import Slices, layer_products
from explaind.path.step import Step
from explaind.run import Run

__all__ = [
    "ExampleGradients",
    "ExampleProducts",
    "GradientProducts",
    "TangentProducts",
]


class ExampleProducts(Protocol):
    """A strategy for the products of section 4 of the derivation."""

    name: str
    precision: torch.dtype
    """Type that they are exact to, up to rounding."""

    def products(self, step: Step, number: int, rows: Tensor, psi: Tensor, slices: Slices) -> Tensor:
        """⟨ψ_q^{(l)}, g_k^{(l)}⟩ for the given rows of a call.

        Args:
            step: the step s whose parameters the gradients are taken at.
            number: which of its forward calls.
            rows: which of its rows, `[row]`.
            psi: `[query, element]`.
            slices: the layers l.

        Returns:
            `[query, row, token, layer]`, with one token where they are summed.
        """
        ...


class ExampleGradients(ExampleProducts, Protocol):
    """A strategy that can also give the gradients themselves."""

    def gradients(self, step: Step, number: int, rows: Tensor) -> list[Tensor]:
        """g_k of the given rows, in blocks `[row, element]`."""
        ...


class GradientProducts:
    """Per-example gradients in blocks, each block then one matrix product per slice.

    The gradients are those stored, or come from one backward pass per row through the recorded batch, for models whose
    rows cannot be evaluated alone.
    """

    def __init__(self, run: Run, *, dtype: torch.dtype, device: torch.device) -> None:
        stored, narrower = run.stores_example_grads, run.table.dtype.itemsize < dtype.itemsize
        self.name = "stored" if stored else "rows of the batch"
        self.precision = run.table.dtype if stored and narrower else dtype
        self._run, self._dtype, self._device = run, dtype, device

    def products(self, step: Step, number: int, rows: Tensor, psi: Tensor, slices: Slices) -> Tensor:
        """See `ExampleProducts.products`."""
        psi = psi.to(self._dtype)
        blocks = [layer_products(psi, gradients, slices) for gradients in self.gradients(step, number, rows)]
        return torch.cat(blocks, dim=1)[:, :, None]

    def gradients(self, step: Step, number: int, rows: Tensor) -> list[Tensor]:
        """See `ExampleGradients.gradients`."""
        call = self._run.calls(step.index)[number]
        if self._run.stores_example_grads:
            stored = self._run.stored_example_grads(call.rows)[rows]
            return [stored.to(device=self._device, dtype=self._dtype)]
        replay = call_replay(self._run, step.index, call, dtype=self._dtype, device=self._device)
        return list(replay.row_gradients(self._run.table, rows, separate=False))


class TangentProducts:
    """⟨c_k, ∂f_k/∂θ · ψ⟩ on the whole recorded batch: for models whose rows cannot be evaluated alone, and for tokens.

    With dropout the recorded masks are drawn again; where layers couple the batch (BatchNorm in training), row k gets
    the part of the gradient that enters at its own output. The batch's forward and backward run once: the backward
    pass u ↦ Jᵀu is linear in u, and differentiating ⟨Jᵀu, ψ⟩ by u gives Jψ for one query and layer after another.

    Args:
        run: the run.
        num_tokens: length of the axis after the rows that is kept; None to sum it.
        dtype, device: type and place of the computation.
    """

    name = "tangents"

    def __init__(self, run: Run, *, num_tokens: int | None = None, dtype: torch.dtype, device: torch.device) -> None:
        self._run, self._num_tokens, self._dtype, self._device = run, num_tokens, dtype, device
        self.precision = dtype

    def products(self, step: Step, number: int, rows: Tensor, psi: Tensor, slices: Slices) -> Tensor:
        """See `ExampleProducts.products`."""
        psi = psi.to(self._dtype)
        call = self._run.calls(step.index)[number]
        flat = self._run.flat_params(step.index).to(device=self._device, dtype=self._dtype).requires_grad_()
        replay = call_replay(self._run, step.index, call, dtype=self._dtype, device=self._device)
        with replay.conditions(), torch.enable_grad():
            outputs = replay.outputs(self._run.table.unflatten(flat))
            u = [torch.zeros_like(output, requires_grad=True) for output in outputs.values()]
            (transposed,) = torch.autograd.grad(list(outputs.values()), flat, u, create_graph=True)
        # An objective's losses enter the loss with weight one each.
        cotangents = [replay.output_grads.get(name, torch.ones_like(output)) for name, output in outputs.items()]
        result = flat.new_zeros(len(psi), len(rows), self._num_tokens or 1, len(slices))
        for query, vector in enumerate(psi):
            for layer, parts in enumerate(slices):
                scalar = torch.stack([transposed[part] @ vector[part] for part in parts]).sum()
                changes = torch.autograd.grad(scalar, u, retain_graph=True, materialize_grads=True)
                for change, cotangent in zip(changes, cotangents, strict=True):
                    result[query, :, :, layer] += self._sum_outputs(change * cotangent)[rows]
        return result.detach()

    def _sum_outputs(self, products: Tensor) -> Tensor:
        """Sum over all axes but rows and tokens, `[row, token]`.

        Raises:
            ValueError: there is no axis of that many tokens.
        """
        if self._num_tokens is None:
            return products.reshape(len(products), -1).sum(dim=1, keepdim=True)
        if products.ndim < 2 or products.shape[1] != self._num_tokens:
            raise ValueError(
                f"by has 'token', the axis after the examples of the model's output or of the objective's losses, with "
                f"{self._num_tokens} entries in this run's first call; a call has an output of shape "
                f"{tuple(products.shape)}."
            )
        return products.reshape(*products.shape[:2], -1).sum(dim=2)
