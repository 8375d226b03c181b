"""torch.optim.Rprop: a step size of its own for every element, and only the sign of the gradient."""

from __future__ import annotations

import torch

from explaind.optimizers.rule import LinearFilter, ParameterStep

__all__ = ["RpropRule"]


class RpropRule:
    """Δ = − h sign(G) with the recorded step size h; as sign(G) = G / |G|, the diagonal is h / |G|.

    Where the gradient turned back, torch takes it for zero, and nothing moves.
    """

    buffer = None

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        counted = step.after["prev"] != 0
        gain = torch.where(counted, step.after["step_size"] / step.gradient.abs(), 0.0)
        return LinearFilter(sign=step.sign, gradient_gain=gain)
