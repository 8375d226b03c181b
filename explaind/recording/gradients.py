"""The gradients that the optimizer is about to use, beside what the backward pass had left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from explaind.errors import NonFiniteError
from explaind.parameters import ParameterTable
from explaind.recording.memory import CopyMemory
from explaind.replay.model import dense
from explaind.rescaling import Rescaling, find_rescaling

__all__ = ["Arrivals", "all_finite", "first_nonfinite", "skipped_by_scaler", "unscaled"]


def first_nonfinite(tensors: Mapping[str, Tensor | None]) -> str | None:
    """Name of the first tensor with a NaN or infinite entry, if there is one."""
    return next((n for n, t in tensors.items() if t is not None and not bool(torch.isfinite(t.detach()).all())), None)


def all_finite(flat: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # A sum is finite only if all its terms are; that of large terms may be infinite all the same.
    return math.isfinite(flat.sum().item()) or bool(torch.isfinite(flat).all())


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether this call of `step` will do nothing: a GradScaler told a fused optimizer that the gradient overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscaled(gradients: Mapping[str, Tensor | None], optimizer: Optimizer) -> dict[str, Tensor | None]:
    """The gradients that the optimizer uses, dense: a GradScaler leaves a fused one to divide by the loss scale."""
    scale = getattr(optimizer, "grad_scale", None)
    full = {name: None if gradient is None else dense(gradient) for name, gradient in gradients.items()}
    if scale is None:
        return full
    return {name: None if gradient is None else gradient / scale.to(gradient) for name, gradient in full.items()}


_UNTOUCHED = (1.0, math.inf)


class Arrivals:
    """Keeps every parameter's gradient as the last backward pass left it, to tell what the loop did to it since.

    Args:
        tracked: the recorded parameters, by name.
        table: their order.
    """

    def __init__(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable) -> None:
        self.widen(tracked, table)
        self.is_exact = True
        """Whether the last gradients are, bit for bit, what the backward pass had left, rescaled as was found."""
        self._memory = CopyMemory()
        self._coming: list[set[str]] = []
        self._seen: list[tuple[set[str], Tensor]] = []
        self._hidden: set[str] = set()
        self._limits: set[float] = set()

    def widen(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable) -> None:
        """Go on with more parameters, between two steps."""
        self._tracked, self._table = tracked, table

    def expect(self, names: set[str]) -> None:
        """Called in a backward pass that brings the gradients of some parameters; the set grows until its end."""
        self._coming.append(names)
        # One copy of all gradients, once the pass is over, takes a fraction of the time of a copy of each.
        Variable._execution_engine.queue_callback(lambda: self._take(names))

    def _take(self, names: set[str]) -> None:
        self._coming = [others for others in self._coming if others is not names]
        gradients = {name: dense(grad) for name in names if (grad := self._tracked[name].grad) is not None}
        self._forget_seen(names)
        flat = self._memory.empty((self._table.num_elements,), self._table.dtype)
        self._seen.append((set(gradients), self._table.flatten(gradients, out=flat)))
        # Hooks of the loop may have rescaled it before it could be seen.
        self._hidden |= {name for name in names if _num_hooks(self._tracked[name]) > 1}

    def rescaling(
        self, gradients: Mapping[str, Tensor | None], flat: Tensor, step: int
    ) -> dict[str, tuple[float, float]]:
        """The pair (s, c) of each gradient G = clamp(s·g, −c, c), by parameter; see `explaind.rescaling`.

        It is NaN where g was not seen, as a hook changed it, or the loop has put G there by hand.

        Args:
            gradients: what an optimizer is about to use, by name.
            flat: the same, `[element]`.
            step: the step in progress.

        Raises:
            NonFiniteError: g had NaN or infinite entries that the loop has replaced.
        """
        found = dict.fromkeys(gradients, _UNTOUCHED)
        present = {name for name, gradient in gradients.items() if gradient is not None}
        for names in self._coming:  # A pass that an error has stopped leaves gradients that nobody saw.
            self._forget_seen(names)
        seen = {name for names, _ in self._seen for name in names & present}
        before = flat
        for names, earlier in self._seen:
            if names == present:
                before = earlier
                continue
            before = before.clone()
            for parameter in self._table:
                if parameter.name in names & present:
                    before[parameter.slice] = earlier[parameter.slice]
        self.is_exact = np.array_equal(before.numpy(), flat.numpy())  # five times as fast as torch.equal
        if not self.is_exact:
            visible = [parameter for parameter in self._table if parameter.name in seen - self._hidden]
            if bad := first_nonfinite({parameter.name: before[parameter.slice] for parameter in visible}):
                raise NonFiniteError(
                    f"the backward pass gave the gradient of '{bad}' NaN or infinite entries at step {step}, which the "
                    "loop has replaced since. What came from which example cannot be told; skip such steps instead."
                )
            found |= find_rescaling(visible, before, flat, limits=sorted(self._limits))
            self._limits |= {limit for _, limit in found.values() if limit < math.inf}
            if len(before) == len(flat):  # else parameters were added since
                rescaled = Rescaling.of_pairs(self._table, found).rounded(self._table, before)
                own = [parameter.slice for parameter in self._table if parameter.name in present]
                self.is_exact = all(np.array_equal(rescaled[part].numpy(), flat[part].numpy()) for part in own)
        unknown = present & self._hidden | present - seen
        self.is_exact &= not unknown
        return found | dict.fromkeys(unknown, (math.nan, math.nan))

    def forget(self, names: Iterable[str]) -> None:
        """These gradients have been used."""
        self._coming.clear()
        self._forget_seen(set(names))
        self._hidden.difference_update(names)

    def _forget_seen(self, names: set[str]) -> None:
        self._seen = [(left, flat) for seen, flat in self._seen if (left := seen - names)]


def _num_hooks(parameter: nn.Parameter) -> int:
    return len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks)
