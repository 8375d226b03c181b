"""torch.optim.SparseAdam: Adam on the rows of an embedding that were looked up; the others stand still."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from explaind.optimizers.rule import LinearFilter, ParameterStep

__all__ = ["SparseAdamRule", "touched_rows"]


class SparseAdamRule:
    """m ← β1 m + (1 − β1) u;  Δ = − η √(1 − β2^t) / (1 − β1^t) · m / (√v + ε), in the rows that were touched.

    In the other rows m, v and θ stay as they are, while t counts on.
    """

    buffer = "exp_avg"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings, t = step.settings, step.count
        beta1, beta2 = settings["betas"]
        rate = settings["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        touched = touched_rows(step.gradient, step.before, step.after)
        return LinearFilter(
            sign=step.sign,
            retain=torch.where(touched, beta1, torch.ones_like(step.params)),
            intake=torch.where(touched, 1 - beta1, torch.zeros_like(step.params)),
            buffer_gain=torch.where(touched, rate / (step.after["exp_avg_sq"].sqrt() + settings["eps"]), 0.0),
        )


def touched_rows(gradient: Tensor, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
    """The rows of an embedding that a sparse update was about, `[row, 1]`: with a gradient, or with other state since.

    A row that was looked up may have a gradient of zero. Then its moments shrink, which tells, and it moves on with
    them; where they are zero as well, it stands still either way.

    Args:
        gradient: of the embedding's weight, `[row, column]`.
        before: its state before the update; what is missing there was zero.
        after: its state after the update.
    """
    touched = gradient != 0
    for key, value in after.items():
        if value.shape == gradient.shape:
            touched = touched | (value != before.get(key, torch.zeros_like(value)))
    return touched.any(dim=-1, keepdim=True)
