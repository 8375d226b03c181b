"""The terms of a step by single elements of the parameters, all examples together: no product is summed.

In the symbols of `path.reverse`, element i of query q has
    contribution = − ψ_{q,i} Σ_k g_{k,i},    decay = − φ_{q,i} (decoupled decay · θ)_i − ψ_{q,i} (coupled decay · θ)_i.
What the sums over elements miss of the layer's terms is rounding.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from explaind.path.step import Step, StepTerms

__all__ = ["split_by_element", "undivided_by_element"]


def split_by_element(terms: StepTerms, step: Step, phi: Tensor, psi: Tensor, elements: Tensor) -> StepTerms:
    """The same terms with an element axis in place of the layer axis, where they have one.

    Args:
        terms: of all elements together, `[query, 1]`.
        step: the step.
        phi: φ_s, `[query, element]`.
        psi: ψ_s, likewise.
        elements: which of the elements are kept.
    """
    f, phi, psi = step.filter, phi[:, elements].to(step.params), psi[:, elements].to(step.params)
    contribution = psi * -(f.sign * step.example_gradient_sum)[elements]
    decay = phi.mul_(-(f.decoupled_decay * step.params)[elements])
    decay -= psi.mul_((f.coupled_decay * step.params)[elements])
    lost = terms.contribution.sum(dim=(1, 2)) + terms.decay
    lost -= (contribution.sum(dim=1) + decay.sum(dim=1))[:, None]
    return replace(terms, contribution=contribution[:, None, None], decay=decay, rounding=terms.rounding + lost)


def undivided_by_element(terms: StepTerms, step: Step, phi: Tensor, elements: Tensor) -> StepTerms:
    """The same for ⟨φ_s, Δ_s⟩ of an optimizer without a rule."""
    change = phi[:, elements].to(step.update) * step.update[elements]
    lost = terms.contribution.sum(dim=(1, 2)) - change.sum(dim=1, keepdim=True)
    nothing = change.new_zeros(1, 1).expand_as(change)
    return replace(terms, contribution=change[:, None, None], decay=nothing, rounding=terms.rounding + lost)
