"""torch.optim.SGD and ASGD: the gradient itself, with momentum or a decaying step size."""

from __future__ import annotations

import torch

from explaind.optimizers.rule import LinearFilter, ParameterStep

__all__ = ["ASGDRule", "SGDRule"]


class SGDRule:
    """u = G + λθ;  m ← μ m + (1 − τ) u  (the first time m ← u);  Δ = − η m, or − η (u + μ m) with Nesterov."""

    buffer = "momentum_buffer"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        rate, momentum = float(step.settings["lr"]), float(step.settings["momentum"])
        decay = float(step.settings["weight_decay"])
        if momentum == 0:
            return LinearFilter(sign=step.sign, coupled_decay=decay, gradient_gain=rate)
        first, nesterov = self.buffer not in step.before, step.settings["nesterov"]
        return LinearFilter(
            sign=step.sign,
            coupled_decay=decay,
            retain=0.0 if first else momentum,
            intake=1.0 if first else 1.0 - float(step.settings["dampening"]),
            buffer_gain=rate * momentum if nesterov else rate,
            gradient_gain=rate if nesterov else 0.0,
        )


class ASGDRule:
    """u = G + λθ;  Δ = − η_s u − lambd η_s θ, with η_s as the step before left it, at first η.

    The averaged parameters `ax` are another point than θ; they enter no update.
    """

    buffer = None

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        before = step.before.get("eta", torch.as_tensor(settings["lr"], dtype=step.after["eta"].dtype))
        rate, shrinking = before.item(), float(settings["lambd"]) * before.item()
        # With `capturable`, one of the variants has 1 − lambd η_s in the type of η_s.
        coarse = torch.finfo(before.dtype).eps if settings["capturable"] else 0.0
        return LinearFilter(
            sign=step.sign,
            coupled_decay=float(settings["weight_decay"]),
            gradient_gain=rate,
            decoupled_decay=shrinking,
            update_roundoff=coarse * step.params.abs(),
        )
