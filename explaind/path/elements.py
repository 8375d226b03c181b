"""The terms of a step by single elements of the parameters, all examples together: no product is summed.

In the symbols of `path.reverse`, element i of query q has
    contribution = − ψ_{q,i} Σ_k g_{k,i},    decay = − φ_{q,i} (decoupled decay · θ)_i − ψ_{q,i} (coupled decay · θ)_i.
What the sums over elements miss of the layer's terms is rounding, and must be no more than that.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from explaind.errors import VerificationError
from explaind.path.step import Step, StepTerms

__all__ = ["split_by_element", "undivided_by_element"]

_ROUNDING_UNITS = 1024
"""Of a product of vectors, in units of the sum of its absolute parts."""


def split_by_element(terms: StepTerms, step: Step, phi: Tensor, psi: Tensor, elements: Tensor) -> StepTerms:
    """The same terms with an element axis in place of the layer axis, where they have one.

    Args:
        terms: of all elements together, `[query, 1]`.
        step: the step.
        phi: φ_s, `[query, element]`.
        psi: ψ_s, likewise.
        elements: which of the elements are kept.
    """
    precision = phi.dtype
    f, phi, psi = step.filter, phi[:, elements].to(step.params), psi[:, elements].to(step.params)
    contribution = psi * -(f.sign * step.example_gradient_sum)[elements]
    decay = phi.mul_(-(f.decoupled_decay * step.params)[elements])
    decay -= psi.mul_((f.coupled_decay * step.params)[elements])
    together = terms.contribution.sum(dim=(1, 2)) + terms.decay
    lost = _rounding(together, contribution, decay, step, precision)
    return replace(terms, contribution=contribution[:, None, None], decay=decay, rounding=terms.rounding + lost)


def undivided_by_element(terms: StepTerms, step: Step, phi: Tensor, elements: Tensor) -> StepTerms:
    """The same for ⟨φ_s, Δ_s⟩ of an optimizer without a rule."""
    change = phi[:, elements].to(step.update) * step.update[elements]
    nothing = change.new_zeros(1, 1).expand_as(change)
    lost = _rounding(terms.contribution.sum(dim=(1, 2)), change, nothing, step, phi.dtype)
    return replace(terms, contribution=change[:, None, None], decay=nothing, rounding=terms.rounding + lost)


def _rounding(together: Tensor, contribution: Tensor, decay: Tensor, step: Step, dtype: torch.dtype) -> Tensor:
    """What the sums over elements miss of the terms of all of them, `[query, 1]`.

    Raises:
        VerificationError: it is more than the products were rounded.
    """
    lost = together - (contribution.sum(dim=1) + decay.sum(dim=1))[:, None]
    size = (contribution.abs().sum(dim=1) + decay.abs().sum(dim=1))[:, None]
    if not bool((lost.abs() <= _ROUNDING_UNITS * torch.finfo(dtype).eps * size).all()):
        raise VerificationError(
            f"the elements' parts of step {step.index} miss its terms by {float((lost.abs() / size).max()):.1e} of "
            "their size, more than rounding."
        )
    return lost
