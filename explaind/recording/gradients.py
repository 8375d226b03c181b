"""The gradients that the optimizer is about to use, beside what the backward pass had left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from explaind.errors import NonFiniteError
from explaind.parameters import ParameterTable
from explaind.replay.model import dense
from explaind.rescaling import find_rescaling

__all__ = ["Arrivals", "first_nonfinite", "skipped_by_scaler", "unscaled"]


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN or infinite entry, if there is one."""
    return next((name for name, t in tensors.items() if not bool(torch.isfinite(t.detach()).all())), None)


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Whether this call of `step` will do nothing: a GradScaler told a fused optimizer that the gradient overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def unscaled(gradient: Tensor | None, optimizer: Optimizer) -> Tensor | None:
    """The gradient that the optimizer uses, dense: a GradScaler leaves a fused one to divide by the loss scale."""
    scale = getattr(optimizer, "grad_scale", None)
    if gradient is None:
        return None
    return dense(gradient) if scale is None else dense(gradient) / scale.to(gradient)


class Arrivals:
    """Keeps every parameter's gradient as the last backward pass left it, to tell what the loop did to it since."""

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._hidden: set[str] = set()
        self._limits: set[float] = set()

    def note(self, name: str, parameter: Tensor) -> None:
        """Called by the recorder's own hook when a parameter's gradient has been accumulated."""
        if parameter.grad is None:
            return
        self._gradients[name] = dense(parameter.grad).detach().clone()
        # Hooks of the loop may have rescaled it before it could be seen.
        others = len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks) - 1
        if others:
            self._hidden.add(name)

    def rescaling(
        self, table: ParameterTable, gradients: Mapping[str, Tensor | None], step: int
    ) -> dict[str, tuple[float, float]]:
        """The pair (s, c) of each gradient G = clamp(s·g, −c, c), by parameter; see `explaind.rescaling`.

        It is NaN where g was not seen, as a hook changed it, or the loop has put G there by hand.

        Raises:
            NonFiniteError: g had NaN or infinite entries that the loop has replaced.
        """
        present = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        seen = {name: self._gradients[name] for name in present if name in self._gradients}
        different = [(seen[name] != present[name]).any() for name in seen]
        flags = torch.stack(different).tolist() if different else []
        changed = [name for name, flag in zip(seen, flags, strict=True) if flag and name not in self._hidden]
        found = dict.fromkeys(gradients, (1.0, math.inf))
        if changed:
            if bad := first_nonfinite({name: seen[name] for name in changed}):
                raise NonFiniteError(
                    f"the backward pass gave the gradient of '{bad}' NaN or infinite entries at step {step}, which the "
                    "loop has replaced since. What came from which example cannot be told; skip such steps instead."
                )
            before, now = table.flatten(seen), table.flatten(present)
            parameters = [parameter for parameter in table if parameter.name in changed]
            found |= find_rescaling(parameters, before, now, limits=sorted(self._limits))
            self._limits |= {limit for _, limit in found.values() if limit < math.inf}
        return found | dict.fromkeys(present.keys() & self._hidden | present.keys() - seen.keys(), (math.nan, math.nan))

    def forget(self, names: Iterable[str]) -> None:
        """These gradients have been used."""
        for name in names:
            self._gradients.pop(name, None)
            self._hidden.discard(name)
