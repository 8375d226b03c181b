"""The textbook sweep: contributions by the step that applied them, with a momentum buffer per source.

With sources k (examples, groups, or all data in one) the buffers follow the optimizer's own filter,
    m_{k,s} = retain_s ⊙ m_{k,s−1} + intake_s ⊙ g_{k,s},
    contribution[q, k, s, l] = − ⟨φ'_s^{(l)}, a_s ⊙ m_{k,s} + p_s ⊙ m_{k,s−1} + b_s ⊙ g_{k,s}⟩,
in the symbols of `path.reverse`.
Memory is sources × D: the price of keeping `update_step` and examples at once.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from explaind.path.averaged import Adjoint
from explaind.path.products import ExampleGradients
from explaind.path.reverse import check_example_sum
from explaind.path.slices import complement, dot, layer_products
from explaind.path.sources import Sources
from explaind.path.step import Step, StepTerms
from explaind.run import Run

__all__ = ["ForwardSweep"]


@dataclass(frozen=True)
class _Parts:
    """A buffer m or an input u, in parts: each `[1, element]`, the examples' one `[source, element]`."""

    contribution: Tensor
    decay: Tensor
    other: Tensor
    rounding: Tensor
    omitted: Tensor

    def filtered(self, retain: Tensor, intake: Tensor, entering: _Parts) -> _Parts:
        """The buffer retain ⊙ m + intake ⊙ u, part by part."""
        return _Parts(*(retain * getattr(self, x) + intake * getattr(entering, x) for x in _PARTS))


_PARTS = [field.name for field in fields(_Parts)]


class ForwardSweep:
    """Carries the buffers from step to step; feed it the steps from first to last.

    Args:
        run: the run.
        products: computes per-example gradients; None if no row is needed.
        sources: the example axis.
        slices: the layers.
        device: where to compute.
    """

    def __init__(
        self,
        run: Run,
        *,
        products: ExampleGradients | None,
        sources: Sources,
        slices: list[list[slice]],
        device: torch.device,
    ) -> None:
        self._run, self._products, self._sources, self._slices = run, products, sources, slices
        self._rest = [complement(slices, run.table.num_elements)]
        zeros = torch.zeros(len(sources), run.table.num_elements, dtype=torch.float64, device=device)
        self._buffer = _Parts(zeros, *(zeros.new_zeros(1, zeros.shape[1]) for _ in _PARTS[1:]))

    def advance(self, step: Step) -> tuple[_Parts, _Parts]:
        """Let the buffer take in a step's gradient; returns the buffer before that, and what entered."""
        f = step.filter
        if step.index == 0:
            self._buffer = replace(self._buffer, other=step.buffer_before[None])
        gradients = f.sign * self._source_gradients(step)
        lost = f.sign * step.example_gradient_sum - gradients.sum(dim=0)
        other, rounding = (f.sign * part for part in step.foreign_gradient)
        if not self._sources.restricted:
            rounding, lost = rounding + lost, torch.zeros_like(lost)
        entering = _Parts(gradients, *(x[None] for x in (f.coupled_decay * step.params, other, rounding, lost)))
        before, buffer = self._buffer, self._buffer.filtered(f.retain, f.intake, entering)
        other, rounding = (
            part + error for part, error in zip((buffer.other, buffer.rounding), step.buffer_error, strict=True)
        )
        self._buffer = replace(buffer, other=other, rounding=rounding)
        return before, entering

    def applied(self, step: Step) -> Tensor:
        """Advance by a step, and give the part of −Δ_s that came from each source's gradients, `[source, element]`."""
        f = step.filter
        before, entering = self.advance(step)
        gained = f.buffer_gain * self._buffer.contribution + f.gradient_gain * entering.contribution
        gained += f.previous_gain * before.contribution
        return f.multiplied(gained)

    def terms(self, step: Step, adjoint: Adjoint) -> StepTerms:
        """Advance by a step and give its terms, from φ_s, which of averaged weights is λ_s."""
        f, slices = step.filter, self._slices
        before, entering = self.advance(step)
        phi = adjoint.vectors.to(torch.float64)
        seen = f.adjoint(phi)
        filtered = [(seen * f.buffer_gain, self._buffer), (seen * f.gradient_gain, entering)]
        if f.previous_gain.any():
            filtered.append((seen * f.previous_gain, before))

        def applied(part: str) -> Tensor:
            products = [layer_products(weights, getattr(parts, part), slices) for weights, parts in filtered]
            return -torch.stack(products).sum(dim=0)

        if self._products is not None and not self._sources.restricted:
            lost = step.example_gradient_sum - f.sign * entering.contribution.sum(dim=0)
            spread = dot(phi.abs(), entering.contribution.abs().sum(dim=0), slices)
            weights = phi * f.sign * step.gradient_scale
            check_example_sum(step, -dot(phi, f.sign * lost, slices), spread, weights, slices, self._products.precision)
        return StepTerms(
            contribution=applied("contribution")[:, :, None],
            decay=applied("decay")[:, 0] - dot(phi, f.decoupled_decay * step.params, slices),
            other=applied("other")[:, 0] + dot(phi, step.update_error[0], slices),
            rounding=applied("rounding")[:, 0] + dot(phi, step.update_error[1], slices),
            omitted=applied("omitted")[:, 0].sum(dim=1) + dot(phi, step.update, self._rest).sum(dim=1),
        )

    def _source_gradients(self, step: Step) -> Tensor:
        """Σ g_{k,s} over the rows of each source, rescaled as recorded, `[source, element]`."""
        if self._products is None:
            return step.example_gradient_sum[None]
        total = torch.zeros_like(self._buffer.contribution)
        for number, call in enumerate(self._run.calls(step.index)):
            rows, source = self._sources.locate(call.examples)
            if len(rows):
                blocks = torch.cat(self._products.gradients(step, number, rows))
                total.index_add_(0, source.to(total.device), blocks.to(torch.float64))
        # What a parameter that had no gradient could have taken in, it did not.
        updated = self._run.table.expand(torch.from_numpy(self._run.updated[step.index])).to(total.device)
        return step.gradient_scale * updated * total
