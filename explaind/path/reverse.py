"""The adjoint sweep: contributions by the step whose gradient is credited, without per-example momentum.

From the last step down, with a_s = buffer_gain, p_s = previous_gain and b_s = gradient_gain of `LinearFilter`, and
with φ'_s = leftᵀ · φ_s · rightᵀ, which is φ_s but for optimizers with a matrix factor:
    r_s = a_s ⊙ φ'_s + retain_{s+1} ⊙ r_{s+1} + p_{s+1} ⊙ φ'_{s+1},    ψ_s = intake_s ⊙ r_s + b_s ⊙ φ'_s
    contribution[q, k, s, l] = − ⟨ψ_s^{(l)}, g_{k,s}^{(l)}⟩
Memory is queries × D, whatever the number of examples and steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from explaind.errors import VerificationError
from explaind.path.products import ExampleProducts
from explaind.path.slices import complement, dot
from explaind.path.sources import Sources
from explaind.path.step import Step, StepTerms
from explaind.run import Run

__all__ = ["ReverseSweep"]

_SUMMED_UNITS = 1024
"""Rounding of a usual sum over examples, in units of its absolute sum."""
_LARGEST_LOSS = {torch.float64: 1e-5, torch.float32: 3e-3}
"""Of the absolute sum: more is no rounding, not even of layers that magnify it by normalising nearly equal rows."""
_CANCELLED_UNITS = 256
"""Rounding of the entries of a product that cancel, in units of their size: that of a few layers' backward pass."""
_VANISHED_UNITS = 1 << 14
"""Rounding of a gradient that is zero in exact numbers, in units of the largest: layers that normalise magnify it."""


class ReverseSweep:
    """Carries r from step to step; feed it the steps from last to first.

    Args:
        run: the run.
        products: strategy for the products with per-example gradients; None if no row is needed.
        sources: the example axis.
        num_tokens: length of the token axis, 1 without it.
        slices: the layers.
        first: the last step to be fed in; what the momentum brought there from before is accounted for.
    """

    def __init__(
        self,
        run: Run,
        *,
        products: ExampleProducts | None,
        sources: Sources,
        num_tokens: int,
        slices: list[list[slice]],
        first: int,
    ) -> None:
        self._run, self._products, self._sources, self._slices = run, products, sources, slices
        self._num_tokens = num_tokens
        self._rest = [complement(slices, run.table.num_elements)]
        self._first = first
        self._carried: Tensor | float = 0.0

    def skip(self, step: Step, phi: Tensor) -> Tensor:
        """Pass a step whose terms are not asked for; returns their sum `[query]`."""
        adjoint, psi = self._advance(step, phi)
        return self._undivided(step, phi, adjoint, psi, [[slice(None)]])

    def terms(self, step: Step, phi: Tensor) -> StepTerms:
        """The terms of a step, from φ_s `[query, element]`."""
        f, slices = step.filter, self._slices
        adjoint, psi = self._advance(step, phi)
        signed = psi * f.sign
        decay = -dot(psi, f.coupled_decay * step.params, slices)
        decay -= dot(phi, f.decoupled_decay * step.params, slices)
        other, rounding = (
            dot(phi, update, slices) - dot(adjoint, buffer, slices) - dot(signed, gradient, slices)
            for update, buffer, gradient in zip(
                step.update_error, step.buffer_error, step.foreign_gradient, strict=True
            )
        )
        omitted = self._undivided(step, phi, adjoint, psi, self._rest)
        from_examples = -dot(signed, step.example_gradient_sum, slices)
        contribution = from_examples[:, None, None]
        if self._products is not None:
            contribution, spread = self._contributions(step, signed * step.gradient_scale)
            lost = from_examples - contribution.sum(dim=(1, 2))
            if self._sources.restricted:
                omitted += lost.sum(dim=1)
            else:
                check_example_sum(step, lost, spread, signed * step.gradient_scale, slices, self._products.precision)
                rounding = rounding + lost
        if step.index == self._first and isinstance(self._carried, Tensor):
            # The buffer as it was before: it belongs to earlier steps, or to before the recording.
            brought = -dot(self._carried, step.buffer_before, slices)
            omitted -= dot(self._carried, step.buffer_before, self._rest).sum(dim=1)
            if self._first == 0:
                other = other + brought
            else:
                omitted += brought.sum(dim=1)
        return StepTerms(contribution=contribution, decay=decay, other=other, rounding=rounding, omitted=omitted)

    @staticmethod
    def _undivided(step: Step, phi: Tensor, adjoint: Tensor, psi: Tensor, slices: list[list[slice]]) -> Tensor:
        """Sum of all terms of a step over some slices, without telling them apart, `[query]`."""
        f = step.filter
        change = -dot(psi, f.sign * step.gradient + f.coupled_decay * step.params, slices)
        change += dot(
            phi, sum(step.update_error, start=torch.zeros_like(step.params)) - f.decoupled_decay * step.params, slices
        )
        change -= dot(adjoint, sum(step.buffer_error, start=torch.zeros_like(step.params)), slices)
        return change.sum(dim=1)

    def _advance(self, step: Step, phi: Tensor) -> tuple[Tensor, Tensor]:
        """r_s and ψ_s."""
        f = step.filter
        phi = f.adjoint(phi)
        adjoint = f.buffer_gain * phi + self._carried
        self._carried = f.retain * adjoint + f.previous_gain * phi
        return adjoint, f.intake * adjoint + f.gradient_gain * phi

    def _contributions(self, step: Step, psi: Tensor) -> tuple[Tensor, Tensor]:
        """−⟨ψ, g_k⟩ gathered by source, `[query, source, token, layer]`, and Σ_k |⟨ψ, g_k⟩| `[query, layer]`."""
        total = psi.new_zeros(len(psi), len(self._sources), self._num_tokens, len(self._slices))
        spread = psi.new_zeros(len(psi), len(self._slices))
        for source, products in self._row_products(step, psi):
            total.index_add_(1, source.to(psi.device), -products)
            spread += products.abs().sum(dim=(1, 2))
        return total, spread

    def _row_products(self, step: Step, psi: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._products is not None
        for call in self._run.calls(step.index):
            rows, source = self._sources.locate(call.examples)
            if len(rows):
                products = self._products.products(step.index, call, rows, psi, self._slices)
                yield source, products.to(torch.float64)


def check_example_sum(
    step: Step, lost: Tensor, spread: Tensor, weights: Tensor, slices: list[list[slice]], dtype: torch.dtype
) -> None:
    """Every step: the per-example parts must sum to the batch's gradient, up to the rounding of the training.

    Args:
        step: the step.
        lost: what they miss of the replayed gradient, `[query, layer]`.
        spread: sum of their absolute values, `[query, layer]`.
        weights: what the gradients were multiplied with, `[query, element]`.
        slices: the layers.
        dtype: type that the parts are exact to.

    Raises:
        VerificationError: they do not.
    """
    unit, trained, total = torch.finfo(dtype).eps, torch.finfo(step.recorded_dtype).eps, spread.sum(dim=1)
    # Where the entries of every single product cancel, its parts are nothing but their rounding.
    size = dot(weights.abs(), step.replayed_gradient.abs(), slices).sum(dim=1)
    cancelled = _CANCELLED_UNITS * unit * size + 1e-300
    if bool((lost.sum(dim=1).abs() <= _SUMMED_UNITS * max(unit, trained) * total + cancelled).all()):
        return
    # Gradients of nearly fitted examples are rounded coarsely in float32: their parts may be nearer to the exact sum.
    exact = step.exact_example_gradient_sum
    correction = dot(weights, exact - step.replayed_gradient, slices)
    missing = torch.minimum(lost.sum(dim=1).abs(), (lost - correction).sum(dim=1).abs())
    # Gradients of a batch that a normalisation maps to a constant are nothing but rounding, whatever they weigh.
    largest, noise = exact.abs().max(), _VANISHED_UNITS * unit
    vanished = (exact.abs() <= _VANISHED_UNITS * torch.finfo(torch.float64).eps * largest) & (exact != 0)
    cancelled += noise * largest * dot(weights.abs(), vanished.to(weights.dtype), slices).sum(dim=1)
    if not bool((missing <= _LARGEST_LOSS.get(dtype, 3e-3) * total + cancelled).all()):
        raise VerificationError(
            f"the examples' parts of step {step.index} do not sum to its gradient (off by "
            f"{float((missing / (total + cancelled)).max()):.1e} of their absolute sum). The model couples its batch "
            "in some calls only, and not in the largest one, or it is not the model that was recorded; run.verify() "
            "tells which. Without 'example' in by, the steps and layers still add up."
        )
