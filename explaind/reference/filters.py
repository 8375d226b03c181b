"""What a gradient taken at one step does to that and every later update, by each optimizer's textbook.

Every textbook goes through the updates of one parameter tensor and says what share of −Δ_s comes from a part of the
gradients: the same recurrences as the whole gradient's, with every size that is divided by taken from the whole
gradient. Nothing is read from the optimizer's recorded state. With the whole gradient for the part, the share is
−Δ_s itself, but for decay that acts on the parameters directly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.run import Run

__all__ = ["History"]


@dataclass(frozen=True, kw_only=True)
class Update:
    """One update of a parameter tensor; tensors are `[*shape]`."""

    count: int
    """Number t of the update, from 1."""
    settings: Mapping[str, Any]
    """The group's settings in force."""
    params: Tensor
    """θ_s."""
    whole: Tensor
    """The gradient u_s that is filtered: with its sign, and with decay where that is coupled."""
    part: Tensor
    """The part of u_s that is followed, `[…, *shape]`."""
    moved: Tensor
    """Whether each entry of θ_{s+1} is another than that of θ_s."""


Textbook = Callable[[Iterable[Update]], Iterator[Tensor]]


class History:
    """All updates of one parameter tensor in float64, from its settings, parameters and gradients alone.

    Args:
        run: the run.
        parameter: number of the parameter tensor.

    Raises:
        ValueError: the optimizer had been at work before the recording, so its moments do not follow from it.
    """

    def __init__(self, run: Run, parameter: int) -> None:
        name, group = run.table[parameter].name, run.table[parameter].group
        start = run.state(0)[name]
        if float(start.get("step", 0.0)) or "momentum_buffer" in start:
            raise ValueError(
                f"the optimizer had moved '{name}' before the recording began. The reference follows its moments from "
                "zero: record from the first step on."
            )
        self._optimizer = run.group_optimizers[group].rpartition(".")[2]
        self.updates: dict[int, Update] = {}
        """By step."""
        for s in np.flatnonzero(run.updated[:, parameter]).tolist():
            params, settings = run.params(s)[name].double(), run.settings(s, group)
            gradient = run.table.unflatten(run.flat_gradient(s).double())[name]
            self.updates[s] = Update(
                count=len(self.updates) + 1,
                settings=settings,
                params=params,
                whole=(-gradient if settings.get("maximize") else gradient) + self._coupled(settings) * params,
                part=torch.zeros_like(gradient),
                moved=run.params(s + 1)[name].double() != params,
            )

    def follow(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """The share of −Δ_s that comes from parts `[…, *shape]` of the filtered u_i, for every s from the first i on.

        Args:
            parts: for some steps i a part of u_i: from a gradient (see `entering`) or from a coupled decay.
        """
        nothing = torch.zeros_like(next(iter(parts.values())))
        updates = [replace(update, part=parts.get(s, nothing)) for s, update in self.updates.items()]
        shares = zip(self.updates, TEXTBOOKS[self._optimizer](updates), strict=True)
        return {s: share for s, share in shares if s >= min(parts)}

    def entering(self, step: int, gradient: Tensor) -> Tensor:
        """The part of u_s that a part of the gradient is: −1 times it where the optimizer maximizes."""
        return -gradient if self.updates[step].settings.get("maximize") else gradient

    def coupled_decay(self, step: int) -> Tensor:
        """The part λθ_s of u_s where the optimizer adds it to the gradient, else zero."""
        x = self.updates[step]
        return self._coupled(x.settings) * x.params

    def decoupled_decay(self, step: int) -> Tensor:
        """The share of −Δ_s that the optimizer takes away from θ_s directly."""
        x = self.updates[step]
        if self._optimizer == "ASGD":
            rates = dict(zip(self.updates, asgd_rates(self.updates.values()), strict=True))
            return float(x.settings["lambd"]) * rates[step] * x.params
        if not self._decays_directly(x.settings):
            return torch.zeros_like(x.params)
        return float(x.settings["lr"]) * float(x.settings["weight_decay"]) * x.params

    def _coupled(self, settings: Mapping[str, Any]) -> float:
        return 0.0 if self._decays_directly(settings) else float(settings.get("weight_decay", 0.0))

    def _decays_directly(self, settings: Mapping[str, Any]) -> bool:
        always = self._optimizer in ("AdamW", "Adafactor", "Muon")
        return always or bool(settings.get("decoupled_weight_decay"))


def sgd(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Plain, with momentum, with Nesterov's."""
    velocity: Tensor | None = None
    for x in updates:
        rate, momentum = x.settings["lr"], x.settings["momentum"]
        if momentum == 0:
            yield rate * x.part
            continue
        velocity = x.part if velocity is None else momentum * velocity + (1 - x.settings["dampening"]) * x.part
        yield rate * (x.part + momentum * velocity if x.settings["nesterov"] else velocity)


def asgd(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Plain, with a rate that falls."""
    updates = list(updates)
    for x, rate in zip(updates, asgd_rates(updates), strict=True):
        yield rate * x.part


def asgd_rates(updates: Iterable[Update]) -> Iterator[float]:
    """The rate of each update, decided one update before; torch keeps it in single precision."""
    rate: Any = None
    for x in updates:
        learning = x.settings["lr"]
        yield float(np.float32(learning if rate is None else rate))
        # With `foreach`, torch has the count itself in single precision.
        count = torch.tensor(float(x.count), dtype=torch.float32) if x.settings["foreach"] else x.count
        rate = learning / (1 + x.settings["lambd"] * learning * count) ** x.settings["alpha"]


def adam(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Kingma and Ba's Algorithm 1, and AMSGrad."""
    mean = square = largest = torch.zeros((), dtype=torch.float64)
    for x in updates:
        beta1, beta2 = x.settings["betas"]
        mean = beta1 * mean + (1 - beta1) * x.part
        square = beta2 * square + (1 - beta2) * x.whole**2
        largest = torch.maximum(largest, square) if x.settings["amsgrad"] else square
        unbiased, size = mean / (1 - beta1**x.count), (largest / (1 - beta2**x.count)).sqrt()
        yield x.settings["lr"] * unbiased / (size + x.settings["eps"])


def nadam(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Dozat's momentum schedule; torch keeps its running product in single precision."""
    mean = square = torch.zeros((), dtype=torch.float64)
    product = np.float32(1)
    for x in updates:
        (beta1, beta2), decay = x.settings["betas"], x.settings["momentum_decay"]
        now, following = (beta1 * (1 - 0.96 ** (n * decay) / 2) for n in (x.count, x.count + 1))
        product = product * np.float32(now)
        mean = beta1 * mean + (1 - beta1) * x.part
        square = beta2 * square + (1 - beta2) * x.whole**2
        ahead = following * mean / (1 - float(product) * following) + (1 - now) * x.part / (1 - float(product))
        yield x.settings["lr"] * ahead / ((square / (1 - beta2**x.count)).sqrt() + x.settings["eps"])


def radam(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Liu and others' Algorithm 2; torch adds ε before the bias correction."""
    mean = square = torch.zeros((), dtype=torch.float64)
    for x in updates:
        (beta1, beta2), t = x.settings["betas"], x.count
        mean = beta1 * mean + (1 - beta1) * x.part
        square = beta2 * square + (1 - beta2) * x.whole**2
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * t * beta2**t / (1 - beta2**t)
        step = x.settings["lr"] * mean / (1 - beta1**t)
        if length > 5:
            variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
            step = step * np.sqrt(variance * (1 - beta2**t)) / (square.sqrt() + x.settings["eps"])
        yield step


def adamax(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Kingma and Ba's Algorithm 2."""
    mean = largest = torch.zeros((), dtype=torch.float64)
    for x in updates:
        beta1, beta2 = x.settings["betas"]
        mean = beta1 * mean + (1 - beta1) * x.part
        largest = torch.maximum(beta2 * largest, x.whole.abs() + x.settings["eps"])
        yield x.settings["lr"] / (1 - beta1**x.count) * mean / largest


def sparse_adam(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Adam that leaves alone, moments and all, the rows of an embedding that were not looked up."""
    mean = square = torch.zeros((), dtype=torch.float64)
    for x in updates:
        beta1, beta2 = x.settings["betas"]
        looked_up = ((x.whole != 0) | x.moved).any(dim=1, keepdim=True)  # a moment moves a row without gradient, too
        mean = torch.where(looked_up, beta1 * mean + (1 - beta1) * x.part, mean)
        square = torch.where(looked_up, beta2 * square + (1 - beta2) * x.whole**2, square)
        size = square.sqrt() + x.settings["eps"]
        rate = x.settings["lr"] * (1 - beta2**x.count) ** 0.5 / (1 - beta1**x.count)
        yield torch.where(looked_up, rate * mean / size, 0.0)


def adagrad(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Duchi and others, with a rate that may fall."""
    total: Tensor | None = None
    for x in updates:
        start = x.settings["initial_accumulator_value"]
        total = (start if total is None else total) + x.whole**2
        rate = x.settings["lr"] / (1 + (x.count - 1) * x.settings["lr_decay"])
        yield rate * x.part / (total.sqrt() + x.settings["eps"])


def adadelta(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Zeiler's Algorithm 1."""
    square = moved = torch.zeros((), dtype=torch.float64)
    for x in updates:
        rho, eps = x.settings["rho"], x.settings["eps"]
        square = rho * square + (1 - rho) * x.whole**2
        gain = ((moved + eps) / (square + eps)).sqrt()
        moved = rho * moved + (1 - rho) * (gain * x.whole) ** 2
        yield x.settings["lr"] * gain * x.part


def rmsprop(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Hinton's, Graves' centered one, and with momentum."""
    square = mean = velocity = torch.zeros((), dtype=torch.float64)
    for x in updates:
        alpha = x.settings["alpha"]
        square = alpha * square + (1 - alpha) * x.whole**2
        mean = alpha * mean + (1 - alpha) * x.whole
        size = (square - mean**2 if x.settings["centered"] else square).sqrt() + x.settings["eps"]
        velocity = x.settings["momentum"] * velocity + x.part / size
        yield x.settings["lr"] * velocity


def rprop(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Riedmiller and Braun: a step size per element, and no step where the gradient turned back."""
    size: Tensor | None = None
    previous = torch.zeros((), dtype=torch.float64)
    for x in updates:
        shorter, longer = x.settings["etas"]
        least, most = x.settings["step_sizes"]
        turned, kept = x.whole * previous < 0, x.whole * previous > 0
        size = torch.full_like(x.whole, x.settings["lr"]) if size is None else size
        size = torch.where(turned, shorter * size, torch.where(kept, longer * size, size)).clamp(least, most)
        previous = torch.where(turned, 0.0, x.whole)
        yield torch.where(previous == 0, 0.0, size * x.part / x.whole.abs())


def adafactor(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Shazeer and Stern's Algorithms 4 and 5."""
    square = torch.zeros((), dtype=torch.float64)
    for x in updates:
        forgotten = x.count ** x.settings["beta2_decay"]
        square = (1 - forgotten) * square + forgotten * x.whole**2
        floor, least = x.settings["eps"]
        floor = np.finfo(np.float64).eps if floor is None else floor
        estimate = square
        if square.ndim > 1:
            # The means of rows and columns are linear in the squares: they can be taken at the end.
            rows, columns = square.mean(dim=-1, keepdim=True), square.mean(dim=-2, keepdim=True)
            estimate = rows * columns / rows.mean(dim=-2, keepdim=True).clamp(min=floor)
        size = estimate.clamp(min=floor**2).sqrt()
        clipping = max(1.0, float((x.whole / size).square().mean().sqrt()) / x.settings["d"])
        rate = min(x.settings["lr"], x.count**-0.5) * max(least, float(x.params.square().mean().sqrt()))
        yield rate / clipping * x.part / size


def muon(updates: Iterable[Update]) -> Iterator[Tensor]:
    """Jordan's, by singular values: the iteration multiplies each one, on the shorter side of the matrix."""
    mean = entire = torch.zeros((), dtype=torch.float64)
    for x in updates:
        momentum, nesterov = x.settings["momentum"], x.settings["nesterov"]
        mean = momentum * mean + (1 - momentum) * x.part
        entire = momentum * entire + (1 - momentum) * x.whole
        followed = momentum * mean + (1 - momentum) * x.part if nesterov else mean
        matrix = momentum * entire + (1 - momentum) * x.whole if nesterov else entire
        rows, columns = matrix.shape
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        values = values / max(float(matrix.norm()), x.settings["eps"])
        gains = torch.full_like(values, 1 / max(float(matrix.norm()), x.settings["eps"]))
        a, b, c = x.settings["ns_coefficients"]
        for _ in range(int(x.settings["ns_steps"])):
            gain = a + b * values**2 + c * values**4
            values, gains = values * gain, gains * gain
        basis = right.T if rows > columns else left
        factor = basis * gains @ basis.T
        adjusted = 0.2 * max(rows, columns) ** 0.5 if x.settings["adjust_lr_fn"] == "match_rms_adamw" else 1.0
        if x.settings["adjust_lr_fn"] in (None, "original"):
            adjusted = max(1.0, rows / columns) ** 0.5
        yield x.settings["lr"] * adjusted * (followed @ factor if rows > columns else factor @ followed)


TEXTBOOKS: dict[str, Textbook] = {
    "SGD": sgd,
    "ASGD": asgd,
    "Adam": adam,
    "AdamW": adam,
    "NAdam": nadam,
    "RAdam": radam,
    "Adamax": adamax,
    "SparseAdam": sparse_adam,
    "Adagrad": adagrad,
    "Adadelta": adadelta,
    "RMSprop": rmsprop,
    "Rprop": rprop,
    "Adafactor": adafactor,
    "Muon": muon,
}
"""By the optimizer's class name."""
