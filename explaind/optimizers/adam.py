"""torch.optim.Adam, AdamW, NAdam, RAdam, Adamax: a running mean of the gradients over a running size of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from explaind.optimizers.rule import LinearFilter, ParameterStep, shrinkage

__all__ = ["AdamRule", "AdamaxRule", "NAdamRule", "RAdamRule"]

_UNITS = 8
"""Operations on the bias corrections, each of which rounds."""


@dataclass(frozen=True)
class AdamRule:
    """m ← β1 m + (1 − β1) u;  Δ = − η / (1 − β1^t) · m / (√v̂ + ε), with v̂ taken after the step's own update.

    Adam adds λθ to G (coupled decay); AdamW moves θ by − ηλθ instead (decoupled decay).
    """

    decoupled: bool
    """Whether the decay acts on the parameters directly, where the settings do not say."""

    buffer = "exp_avg"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings, t = step.settings, step.count
        rate, (beta1, beta2) = settings["lr"], settings["betas"]
        second = step.after["max_exp_avg_sq" if settings["amsgrad"] else "exp_avg_sq"]
        size = second.sqrt() / (1 - beta2**t) ** 0.5 + settings["eps"]
        return averaging(
            step,
            buffer_gain=(rate / (1 - beta1**t)) / size,
            decoupled=settings.get("decoupled_weight_decay", self.decoupled),
        )


class NAdamRule:
    """Adam with Nesterov's look-ahead: Δ = − η (μ_{t+1} m / (1 − Π_{t+1}) + (1 − μ_t) u / (1 − Π_t)) / (√v̂ + ε).

    μ_t = β1 (1 − ½ · 0.96^{t ψ}) with ψ the `momentum_decay`, and Π_t = μ_1 ⋯ μ_t, which is recorded.
    """

    buffer = "exp_avg"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings, t = step.settings, step.count
        rate, (beta1, beta2) = settings["lr"], settings["betas"]
        product = step.after["mu_product"] if settings["capturable"] else step.after["mu_product"].item()
        now, following = (beta1 * (1 - 0.5 * 0.96 ** (n * settings["momentum_decay"])) for n in (t, t + 1))
        size = (step.after["exp_avg_sq"] / (1 - beta2**t)).sqrt() + settings["eps"]
        return averaging(
            step,
            buffer_gain=(rate * following / (1 - product * following)) / size,
            gradient_gain=(rate * (1 - now) / (1 - product)) / size,
            decoupled=settings["decoupled_weight_decay"],
        )


class RAdamRule:
    """Adam that leaves v out of the first steps: Δ = − η / (1 − β1^t) · m · (ρ_t > 5 ? r_t √(1 − β2^t) / (√v + ε) : 1).

    ρ_∞ = 2/(1 − β2) − 1, ρ_t = ρ_∞ − 2 t β2^t / (1 − β2^t), r_t² = (ρ_t−4)(ρ_t−2)ρ_∞ / ((ρ_∞−4)(ρ_∞−2)ρ_t).
    """

    buffer = "exp_avg"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings, t = step.settings, step.count
        rate, (beta1, beta2) = settings["lr"], settings["betas"]
        gain: Any = float(rate) / float(1 - beta1**t)
        limit = 2 / (1 - beta2) - 1
        length = limit - 2 * t * beta2**t / (1 - beta2**t)
        if length > 5.0:
            rectified = ((length - 4) * (length - 2) * limit / ((limit - 4) * (limit - 2) * length)) ** 0.5
            gain = gain * rectified * (1 - beta2**t) ** 0.5 / (step.after["exp_avg_sq"].sqrt() + settings["eps"])
        return averaging(step, buffer_gain=gain, decoupled=settings["decoupled_weight_decay"])


class AdamaxRule:
    """Δ = − η / (1 − β1^t) · m / n, with the running maximum n ← max(β2 n, |u| + ε)."""

    buffer = "exp_avg"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        beta1, _ = step.settings["betas"]
        gain = (step.settings["lr"] / (1 - beta1**step.count)) / step.after["exp_inf"]
        return averaging(step, buffer_gain=gain, decoupled=False)


def averaging(
    step: ParameterStep, *, buffer_gain: Any, decoupled: bool, gradient_gain: Tensor | float = 0.0
) -> LinearFilter:
    """The filter around the buffer m ← β1 m + (1 − β1) u, with the decay that the settings ask for."""
    settings = step.settings
    beta1, decay = float(settings["betas"][0]), settings["weight_decay"]
    return LinearFilter(
        sign=step.sign,
        coupled_decay=0.0 if decoupled else float(decay),
        retain=beta1,
        intake=1 - beta1,
        buffer_gain=buffer_gain,
        gradient_gain=gradient_gain,
        decoupled_decay=shrinkage(settings["lr"] * decay) if decoupled else 0.0,
        update_roundoff=_correction_roundoff(step) * (buffer_gain * step.after["exp_avg"]).abs(),
    )


def _correction_roundoff(step: ParameterStep) -> float:
    """Relative rounding of η / (1 − β^t) where any of them is a tensor: every variant has its own order then."""
    settings = step.settings
    tensors = [x for x in (settings["lr"], *settings["betas"], step.count) if isinstance(x, Tensor)]
    smallest = min(1 - float(beta) ** float(step.count) for beta in settings["betas"])
    return max((_UNITS * torch.finfo(x.dtype).eps / smallest for x in tensors), default=0.0)
