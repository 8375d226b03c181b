"""Scalars of a model's output that a query can explain, one per input row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from explaind.calls import named_tensors

__all__ = ["Output", "log_prob", "logit", "loss", "margin", "value"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """A function of one row of the model's output and that row's target."""

    name: str
    """What the numbers are, with their unit."""
    function: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    """Maps outputs `[row, …]` and targets `[row]` to scalars `[row]`, row by row."""
    targets: Tensor = field(repr=False)
    """One target per input row; zeros where the function needs none (length 0: any number of rows)."""
    num_classes: int = 0
    """Fewest classes that the model's output must have; 0 if it has none."""

    part: str = ""
    """Which tensor of the model's output is meant, if it returns several: a key, a position, or both, as in `"1.0"`."""

    def of(self, part: str | int) -> Output:
        """The same of one tensor of a model's output that has several, by its key or position.

        Example:
            >>> both = {"logits": torch.tensor([[0.5, 2.0]]), "hidden": torch.zeros(1, 8)}
            >>> outputs.logit([1]).of("logits")(both).item()
            2.0
        """
        return replace(self, part=str(part))

    def __call__(self, output: Any) -> Tensor:
        """The scalars `[row]` of a model output `[row, …]`.

        Raises:
            ValueError: the output or the targets have shapes or classes that do not fit.
        """
        tensor = self.pick(output)
        self.check(tensor)
        return self.function(tensor, self.targets_for(len(tensor)).to(tensor.device))

    def pick(self, output: Any) -> Tensor:
        """The tensor of the model's output that is meant.

        Raises:
            ValueError: there is none of that name.
        """
        found = dict(named_tensors(output))
        if self.part not in found:
            asked = f"no {self.part!r}" if self.part else "several tensors, or none"
            raise ValueError(
                f"the output '{self.name}' is of one tensor, and the model returns {asked}: {', '.join(found)}. Name "
                f"one, as in outputs.logit(targets).of({next(iter(found), 'logits')!r})."
            )
        return found[self.part]

    def check(self, output: Tensor) -> None:
        """Refuse an output that this function cannot pick from."""
        if self.num_classes and (output.ndim != 2 or output.shape[1] < self.num_classes):
            raise ValueError(
                f"the output '{self.name}' needs a model output [row, class] with at least {self.num_classes} classes; "
                f"the model's has shape {tuple(output.shape)}."
            )

    def targets_for(self, rows: int) -> Tensor:
        """The targets of this many rows.

        Raises:
            ValueError: there are more or fewer targets than rows.
        """
        if len(self.targets) == 0:
            return torch.zeros(rows, dtype=torch.int64)
        if len(self.targets) != rows:
            raise ValueError(
                f"the output '{self.name}' has {len(self.targets)} targets for {rows} inputs; give one target per "
                "input."
            )
        return self.targets


def logit(targets: Any) -> Output:
    """Raw output of the target class, f_y; the model's own unit (logits, or nats if it returns log-probabilities).

    Args:
        targets: class index per input, integers `[input]`.

    Example:
        >>> outputs.logit([1])(torch.tensor([[0.5, 2.0]])).item()
        2.0
    """
    return _of_class("logit", _pick, targets)


def log_prob(targets: Any) -> Output:
    """Log-probability of the target class, log softmax(f)_y, in nats.

    Example:
        >>> round(outputs.log_prob([0])(torch.tensor([[0.0, 0.0]])).item(), 4)
        -0.6931
    """
    return _of_class("log-probability (nats)", lambda out, target: _pick(F.log_softmax(out, dim=-1), target), targets)


def margin(targets: Any) -> Output:
    """Log-odds of the target class against all others, f_y − log Σ_{j≠y} exp f_j, in nats.

    Example:
        >>> outputs.margin([1])(torch.tensor([[0.5, 2.0]])).item()
        1.5
    """

    def function(out: Tensor, target: Tensor) -> Tensor:
        classes = torch.arange(out.shape[-1], device=out.device)
        others = torch.where(classes == target[..., None], -torch.inf, out)
        return _pick(out, target) - torch.logsumexp(others, dim=-1)

    return _of_class("margin (nats)", function, targets, least=2)


def loss(targets: Any, function: Callable[..., Tensor] = F.cross_entropy) -> Output:
    """Loss of each input, by default the cross-entropy of raw logits, in nats.

    Args:
        targets: what `function` compares with, one per input.
        function: takes `(output, target, reduction="none")`, as the losses of torch.nn.functional do.

    Example:
        >>> round(outputs.loss([0])(torch.tensor([[0.0, 0.0]])).item(), 4)
        0.6931
    """

    def per_row(out: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            target = target.to(out.dtype)
        if target.numel() == out.numel():  # else [row] against [row, 1] would be broadcast to every pair of rows
            target = target.reshape(out.shape)
        losses = function(out, target, reduction="none")
        return losses.reshape(len(out), -1).mean(dim=1)

    return Output(name="loss", function=per_row, targets=torch.as_tensor(targets))


def value(component: int = 0) -> Output:
    """One component of the model's output, for regression; in the unit of the model's target.

    Example:
        >>> outputs.value()(torch.tensor([[3.0], [4.0]])).tolist()
        [3.0, 4.0]
    """
    return Output(
        name="value",
        function=lambda out, _: out.reshape(len(out), -1)[:, component],
        targets=torch.empty(0, dtype=torch.int64),
    )


def _of_class(name: str, function: Callable[[Tensor, Tensor], Tensor], targets: Any, *, least: int = 1) -> Output:
    """An output that looks at one class per row."""
    classes = _classes(targets)
    if len(classes) == 0 or int(classes.min()) < 0:
        raise ValueError(f"targets are class indices, at least one and none negative; got {classes.tolist()[:5]}.")
    return Output(name=name, function=function, targets=classes, num_classes=max(least, int(classes.max()) + 1))


def _pick(out: Tensor, target: Tensor) -> Tensor:
    return out.gather(-1, target[..., None]).squeeze(-1)


def _classes(targets: Any) -> Tensor:
    classes = torch.as_tensor(targets)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool or classes.ndim != 1:
        raise TypeError(
            f"targets are class indices, a flat sequence of integers; got {classes.dtype} of shape "
            f"{tuple(classes.shape)}."
        )
    return classes.to(torch.int64)
