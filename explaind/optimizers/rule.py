"""The update of an optimizer as a linear filter on the gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["LinearFilter", "ParameterStep", "UpdateRule", "shrinkage"]


@dataclass(frozen=True, kw_only=True)
class ParameterStep:
    """What is recorded of one optimizer step s of one parameter tensor.

    Tensors with axes are float64. What is one number keeps the type that the optimizer had it in, so that arithmetic
    on it rounds as the optimizer's did: a setting that was a tensor is a tensor, and so is `state["step"]`.
    """

    settings: Mapping[str, Any]
    """The parameter group's settings in force, with the optimizer's names."""
    params: Tensor
    """θ_s, `[*shape]`."""
    gradient: Tensor
    """G_s as the optimizer saw it, `[*shape]`."""
    before: Mapping[str, Tensor]
    """The parameter's state before the step, with the optimizer's names; what it did not have yet is missing."""
    after: Mapping[str, Tensor]
    """The same just after the step."""
    dtype: torch.dtype
    """Type that the parameter is trained in."""

    @property
    def sign(self) -> float:
        """−1 where the setting `maximize` is on."""
        return -1.0 if self.settings.get("maximize") else 1.0

    @property
    def count(self) -> Any:
        """Number t of updates of this parameter, this one included: a number, or with `capturable` a tensor."""
        steps = self.after["step"]
        return steps if self.settings.get("capturable") else steps.item()


@dataclass(frozen=True, kw_only=True)
class LinearFilter:
    """One optimizer step s of one parameter tensor, once the optimizer's own state is known.

    u_s = sign · G_s + coupled_decay · θ_s
    m_s = retain ⊙ m_{s−1} + intake ⊙ u_s
    v_s = buffer_gain ⊙ m_s + previous_gain ⊙ m_{s−1} + gradient_gain ⊙ u_s
    Δ_s = − left · v_s · right − decoupled_decay · θ_s

    A tensor has θ's shape, a diagonal matrix on vec(θ), unless said otherwise. The defaults are those of a parameter
    that got no gradient: nothing moves and the buffer m is kept.
    """

    sign: float = 1.0
    """−1 where the optimizer maximizes."""
    coupled_decay: Tensor | float = 0.0
    """λ of a decay that is added to the gradient (L2 penalty) and filtered like it."""
    retain: Tensor | float = 1.0
    """Part of the momentum buffer that survives, β1 or μ."""
    intake: Tensor | float = 0.0
    """Part of u_s that enters the buffer, 1 − β1 or 1 − dampening."""
    buffer_gain: Tensor | float = 0.0
    """What the buffer after the step is multiplied with, such as η / ((1 − β1^t)(√v̂_s + ε))."""
    previous_gain: Tensor | float = 0.0
    """The same for the buffer before the step, as in Lion."""
    gradient_gain: Tensor | float = 0.0
    """The same for u_s itself, as in plain SGD and Nesterov momentum."""
    left: Tensor | None = None
    """Matrix `[row, row]` from the left, for parameters with two axes; None is the identity."""
    right: Tensor | None = None
    """Matrix `[column, column]` from the right, likewise."""
    decoupled_decay: Tensor | float = 0.0
    """ηλ of a decay that acts on the parameters directly (AdamW)."""
    buffer_roundoff: Tensor | float = 0.0
    """How far the optimizer's own m_s may be from this one by its arithmetic, beyond the rounding of θ's type."""
    update_roundoff: Tensor | float = 0.0
    """The same for Δ_s: where the optimizer computes in a coarser type, or divides by a difference that cancels."""


class UpdateRule(Protocol):
    """Tells the linear filter of one optimizer class from what is recorded of a step."""

    @property
    def buffer(self) -> str | None:
        """Name of the state tensor that is the momentum buffer m; None if no rule of the family needs one."""
        ...

    def filter(self, step: ParameterStep) -> LinearFilter:
        """The filter of one step of one parameter that had a gradient."""
        ...


def shrinkage(decay: Any) -> float:
    """The part of θ that `θ * (1 − decay)` takes away, as rounded by the type of a decay that is a tensor."""
    return 1.0 - float(1 - decay) if isinstance(decay, Tensor) else float(decay)
