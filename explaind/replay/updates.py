"""Optimizer updates made again, by torch's own optimizers on copies of the parameters and of their state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Adagrad, Optimizer, SparseAdam

from explaind.parameters import ParameterTable
from explaind.recording.optimizers import Optimizers
from explaind.recording.state import StateHistory, StateSnapshot, StateTypes, state_in_loop

__all__ = ["UpdateReplay"]


class UpdateReplay:
    """The optimizers of a run at some moment of it, to be stepped with recorded gradients and settings.

    Args:
        table: the recorded parameters.
        classes: the optimizer class of each parameter group.
        device: where the run was trained.
    """

    def __init__(self, table: ParameterTable, classes: Sequence[type[Optimizer]], device: torch.device) -> None:
        self._table, self._classes = table, tuple(classes)
        self._params = {p.name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=device)) for p in table}
        self._optimizers: dict[type[Optimizer], Optimizer] = {}
        self._history: StateHistory | None = None

    @classmethod
    def of(cls, table: ParameterTable, names: Sequence[str], device: torch.device) -> Self | None:
        """Of the optimizers whose full class names these are, by group; None if torch.optim does not have one of them.

        A store cannot make us import anything else.
        """
        found = [getattr(torch.optim, name.rpartition(".")[2], None) for name in names]
        classes = [each for each in found if isinstance(each, type) and issubclass(each, Optimizer)]
        if [f"{each.__module__}.{each.__qualname__}" for each in classes] != list(names):
            return None
        return cls(table, classes, device)

    def may_be_sparse(self, parameter: str) -> bool:
        """Whether the parameter's optimizer treats sparse gradients otherwise than dense ones."""
        return self._class_of(parameter) in (SparseAdam, Adagrad)

    def needs_sparse(self, parameter: str) -> bool:
        """Whether the parameter's optimizer takes sparse gradients only."""
        return self._class_of(parameter) is SparseAdam

    def _class_of(self, parameter: str) -> type[Optimizer]:
        group: int = self._table[self._table.names.index(parameter)].group
        return self._classes[group]

    @property
    def params(self) -> Tensor:
        """The parameters of this moment, `[element]`, on the host."""
        return self._table.flatten(self._params)

    def state(self) -> StateSnapshot:
        """The optimizers' state of this moment."""
        assert self._history is not None
        return self._history.take()

    def load(
        self,
        params: Tensor,
        state: Mapping[str, Mapping[str, Tensor]],
        types: StateTypes,
        settings: Sequence[Mapping[str, Any]],
    ) -> None:
        """Go to a moment.

        Args:
            params: θ, `[element]`.
            state: the optimizers' state, as `read_state` gives it.
            types: of the state.
            settings: of every parameter group.
        """
        with torch.no_grad():
            for name, tensor in self._table.unflatten(params).items():
                self._params[name].copy_(tensor)
        self._optimizers = {}
        for kind in dict.fromkeys(self._classes):
            groups = [
                {"params": [self._params[p.name] for p in self._table if p.group == number], **own}
                for number, (each, own) in enumerate(zip(self._classes, settings, strict=True))
                if each is kind
            ]
            self._optimizers[kind] = kind(groups)  # type: ignore[call-arg]
        for name, entries in state.items():
            tensor = self._params[name]
            for key, value in entries.items():
                own = self._optimizers[self._class_of(name)].state[tensor]
                own[key] = state_in_loop(value, key, name, types, tensor.device)
        every = Optimizers(list(self._optimizers.values()))
        self._history = StateHistory(every, self._params, self._table, lambda **_: None)

    def step(self, gradients: Mapping[str, Tensor], settings: Sequence[Mapping[str, Any]]) -> None:
        """Make a step.

        Args:
            gradients: of the parameters that have one, `{name: [*shape]}`, in their own types.
            settings: of every parameter group.
        """
        for name, tensor in self._params.items():
            gradient = gradients.get(name)
            tensor.grad = None if gradient is None else gradient.to(tensor.device, copy=True)
        for kind, optimizer in self._optimizers.items():
            own = [group for each, group in zip(self._classes, settings, strict=True) if each is kind]
            for group, values in zip(optimizer.param_groups, own, strict=True):
                group.update(values)
            optimizer.step()
