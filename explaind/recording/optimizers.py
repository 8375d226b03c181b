"""One optimizer, or several that together train a model, seen as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Optimizers"]


class Optimizers:
    """Parameter groups and state of some optimizers, one after the other, in the manner of `torch.optim.Optimizer`.

    A step of them is a round in which each steps at most once.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = tuple(optimizers)

    def __iter__(self) -> Iterator[Optimizer]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """All parameter groups."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State of every parameter that has some."""
        if len(self._optimizers) == 1:
            return self._optimizers[0].state
        return {tensor: own for optimizer in self._optimizers for tensor, own in optimizer.state.items()}

    @property
    def group_classes(self) -> list[str]:
        """Full class name of the optimizer that each parameter group belongs to."""
        return [
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
            for optimizer in self._optimizers
            for _ in optimizer.param_groups
        ]

    @property
    def name(self) -> str:
        """Full class names of all, for people."""
        return " + ".join(dict.fromkeys(self.group_classes))
