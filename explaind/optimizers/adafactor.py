"""torch.optim.Adafactor: second moments of a matrix from its row and column means."""

from __future__ import annotations

import math

import torch

from explaind.optimizers.rule import LinearFilter, ParameterStep, shrinkage

__all__ = ["AdafactorRule"]


class AdafactorRule:
    """Δ = − α / max(1, rms(U) / d) · U − ηλθ, with U = G / √max(v̂, ε1²) and α = max(ε2, rms(θ)) · min(η, 1/√t).

    v̂ is r c / mean(r) from the mean squares of the rows and columns of a matrix, the variance itself for a vector.
    """

    buffer = None

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        smallest, least_size = settings["eps"]
        if smallest is None:
            smallest = torch.finfo(step.dtype).eps
        if "variance" in step.after:
            variance = step.after["variance"]
        else:
            rows, columns = step.after["row_var"], step.after["col_var"]
            variance = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=smallest)
        gain = variance.clamp(min=smallest * smallest).rsqrt()
        step_size = max(least_size, _rms(step.params)) * min(settings["lr"], 1 / step.count**0.5)
        excess = max(1.0, _rms(gain * step.gradient) / settings["d"])
        return LinearFilter(
            sign=step.sign,
            gradient_gain=step_size / excess * gain,
            decoupled_decay=shrinkage(settings["lr"] * settings["weight_decay"]),
        )


def _rms(tensor: torch.Tensor) -> float:
    """Root mean square of the entries."""
    return float(tensor.norm()) / math.sqrt(tensor.numel())
