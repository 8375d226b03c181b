"""torch.optim.Muon: momentum whose matrix is made nearly orthogonal by a polynomial."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from explaind.optimizers.rule import LinearFilter, ParameterStep, shrinkage

__all__ = ["MuonRule", "newton_schulz_factor"]

_TIMES = 8
"""How much larger an entry's rounding may be on another machine, in units of its own and the typical one here."""


class MuonRule:
    """m ← μ m + (1 − μ) G;  M = m, or μ m + (1 − μ) G with Nesterov;  Δ = − η' p(M Mᵀ) M − ηλθ.

    p(M Mᵀ), of the Newton–Schulz iteration, stands as a factor at the shorter side of M, where torch has it:
    M p(Mᵀ M) if M has more rows than columns. It is exact here. Torch computes in bfloat16, and small singular values
    multiply that rounding, so how much it comes to is measured: by doing the same.
    """

    buffer = "momentum_buffer"

    def filter(self, step: ParameterStep) -> LinearFilter:
        """See `UpdateRule.filter`."""
        settings = step.settings
        momentum = float(settings["momentum"])
        rate = float(settings["lr"]) * _adjustment(settings["adjust_lr_fn"], *step.params.shape)
        matrix = step.after[self.buffer]
        if settings["nesterov"]:
            matrix = momentum * matrix + (1 - momentum) * step.gradient
        coefficients, repeats = settings["ns_coefficients"], int(settings["ns_steps"])
        tall = matrix.shape[0] > matrix.shape[1]
        wide = matrix.T if tall else matrix
        size = matrix.norm().clamp(min=float(settings["eps"]))
        factor = newton_schulz_factor(wide / size, coefficients, repeats) / size
        roundoff = (_newton_schulz(wide.to(torch.bfloat16), coefficients, repeats) - factor @ wide).abs()
        roundoff = _TIMES * rate * (roundoff + roundoff.norm() / math.sqrt(roundoff.numel()))
        return LinearFilter(
            sign=step.sign,
            retain=momentum,
            intake=1 - momentum,
            buffer_gain=rate * momentum if settings["nesterov"] else rate,
            gradient_gain=rate * (1 - momentum) if settings["nesterov"] else 0.0,
            left=None if tall else factor,
            right=factor if tall else None,
            decoupled_decay=shrinkage(settings["lr"] * settings["weight_decay"]),
            update_roundoff=roundoff.T if tall else roundoff,
        )


def newton_schulz_factor(matrix: Tensor, coefficients: tuple[float, float, float], repeats: int) -> Tensor:
    """p(X Xᵀ), for which p(X Xᵀ) X is what repeating X ← (a + b X Xᵀ + c (X Xᵀ)²) X makes of a matrix X.

    Example: one step with (a, b, c) = (1.5, −0.5, 0) leaves orthonormal rows as they are.
        >>> newton_schulz_factor(torch.eye(1, 2), (1.5, -0.5, 0.0), 1)
        tensor([[1.]])
    """
    a, b, c = coefficients
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    gram, factor = matrix @ matrix.T, identity
    for _ in range(repeats):
        polynomial = a * identity + b * gram + c * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    return factor


def _newton_schulz(matrix: Tensor, coefficients: tuple[float, float, float], repeats: int) -> Tensor:
    """The iteration itself on M / ‖M‖, operation by operation as torch has it, in the matrix's own type."""
    a, b, c = coefficients
    matrix = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    for _ in range(repeats):
        gram = matrix @ matrix.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        matrix = torch.addmm(matrix, polynomial, matrix, beta=a)
    return matrix.to(torch.float64)


def _adjustment(name: str | None, rows: int, columns: int) -> float:
    """By what torch multiplies the learning rate of a matrix of this shape."""
    if name == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
