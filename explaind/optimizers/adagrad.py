"""torch.optim.Adagrad, Adadelta and RMSprop: the gradient over a running size of it, element by element."""

from __future__ import annotations

import torch

from explaind.optimizers.rule import LinearFilter, ParameterStep

__all__ = ["AdadeltaRule", "AdagradRule", "RMSpropRule"]

_UNITS = 8
"""Operations behind a variance v − ḡ², each of which rounds."""


class AdagradRule:
    """h ← h + u²;  Δ = − η / (1 + (t − 1) lr_decay) · u / (√h + ε)."""

    buffer = None

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        rate = settings["lr"] / (1 + (step.count - 1) * settings["lr_decay"])
        return LinearFilter(
            sign=step.sign,
            coupled_decay=float(settings["weight_decay"]),
            gradient_gain=rate / (step.after["sum"].sqrt() + settings["eps"]),
        )


class AdadeltaRule:
    """v ← ρ v + (1 − ρ) u²;  d = √(a + ε) / √(v + ε) · u;  Δ = − η d;  then a ← ρ a + (1 − ρ) d²."""

    buffer = None

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        moved = step.before.get("acc_delta", torch.zeros_like(step.params))
        return LinearFilter(
            sign=step.sign,
            coupled_decay=float(settings["weight_decay"]),
            gradient_gain=settings["lr"]
            * (moved + settings["eps"]).sqrt()
            / (step.after["square_avg"] + settings["eps"]).sqrt(),
        )


class RMSpropRule:
    """v ← α v + (1 − α) u²;  Δ = − η u / (√v + ε), or with momentum m ← μ m + u / (√v + ε),  Δ = − η m.

    `centered` takes v − ḡ² in place of v, with ḡ ← α ḡ + (1 − α) u.
    """

    buffer = "momentum_buffer"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        rate, momentum = float(settings["lr"]), float(settings["momentum"])
        decay = float(settings["weight_decay"])
        variance, cancelled = step.after["square_avg"], torch.zeros(())
        if settings["centered"]:
            cancelled = _UNITS * torch.finfo(step.dtype).eps * variance
            variance = variance - step.after["grad_avg"] ** 2
        # The rounding of v and of ḡ² is all that is left where the two cancel.
        gain, least, most = (
            1 / (x.clamp(min=0).sqrt() + settings["eps"])
            for x in (variance, variance + cancelled, variance - cancelled)
        )
        roundoff = (most - least) * (step.sign * step.gradient + decay * step.params).abs()
        if momentum == 0:
            return LinearFilter(
                sign=step.sign, coupled_decay=decay, gradient_gain=rate * gain, update_roundoff=rate * roundoff
            )
        return LinearFilter(
            sign=step.sign,
            coupled_decay=decay,
            retain=momentum,
            intake=gain,
            buffer_gain=rate,
            buffer_roundoff=roundoff,
        )
