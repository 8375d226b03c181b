"""All that a training loop needs to go on from between two steps: taken down, and put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.recording.companions import Companions
from explaind.recording.fixed import fixed_tensors
from explaind.recording.generators import plain_random_state, put_random_state, random_state
from explaind.recording.iterations import Place
from explaind.recording.optimizers import Optimizers
from explaind.recording.plain import copied
from explaind.recording.state import StateTypes, state_in_loop

__all__ = ["LoopState", "RecordedMoment"]


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedMoment:
    """The numbers of a model and its optimizers at a moment of a recorded run."""

    params: Mapping[str, Tensor]
    """The recorded parameters, by name."""
    state: Mapping[str, Mapping[str, Tensor]]
    """The optimizers' state, as `read_state` gives it."""
    state_types: StateTypes
    """Its types."""
    fixed: Mapping[str, Tensor]
    """Buffers and frozen parameters, by name."""


class LoopState:
    """What a loop changes from step to step, beside the numbers of a `RecordedMoment`.

    Args:
        model: the model.
        optimizers: all that train it.
        companions: what else is kept.
    """

    def __init__(self, model: nn.Module, optimizers: Optimizers, companions: Companions) -> None:
        self._model, self._optimizers = model, optimizers
        self.companions = companions
        """What else is kept."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self._model.parameters()).device

    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters of the model, by name."""
        return dict(self._model.named_parameters())

    def random_state(self) -> dict[str, Any]:
        """States of all generators that are known but for those of data loaders."""
        return random_state(self.device) | {"own": self.companions.generator_states()}

    def take(self, random: dict[str, Any], place: Place) -> Callable[[], dict[str, Any]]:
        """Take it down.

        Args:
            random: what `random_state` gave when the step before had ended.
            place: where the loop is in its data loaders.

        Returns:
            What gives it as plain data and tensors; that takes longer, and may be called from another thread.
        """
        parameters = self.parameters()
        content: dict[str, Any] = {
            "training": [module.training for module in self._model.modules()],
            "requires_grad": {name: parameter.requires_grad for name, parameter in parameters.items()},
            "has_gradient": [name for name, parameter in parameters.items() if _has_dense_gradient(parameter)],
            "groups": [_settings(group) for group in self._optimizers.param_groups],
            "companions": self.companions.states(),
        }
        return lambda: content | {"random": plain_random_state(random), "place": place.plain()}

    def put(self, content: Mapping[str, Any], moment: RecordedMoment) -> None:
        """Put back what `take` gave, and the numbers of the moment."""
        parameters = self.parameters()
        fixed = fixed_tensors(self._model, moment.params.keys())
        with torch.no_grad():
            for name, value in moment.params.items():
                parameters[name].copy_(value)
            for name, value in moment.fixed.items():
                fixed[name].copy_(value)
        for name, parameter in parameters.items():
            parameter.requires_grad_(content["requires_grad"][name])
            # Of a parameter with a gradient of zero the optimizer takes more notice than of one without.
            parameter.grad = torch.zeros_like(parameter) if name in content["has_gradient"] else None
        for module, training in zip(self._model.modules(), content["training"], strict=True):
            module.training = training
        for group, settings in zip(self._optimizers.param_groups, content["groups"], strict=False):
            _put_settings(group, settings)
        names = {id(parameter): name for name, parameter in parameters.items()}
        for optimizer in self._optimizers:
            _put_state(optimizer, names, moment)
        self.companions.load(content["companions"], content["random"]["own"])
        put_random_state(content["random"], self.device)


def _has_dense_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and not parameter.grad.is_sparse


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's settings, but for those that are no plain data and do not change."""
    found = {}
    for key, value in group.items():
        if key != "params":
            try:
                found[key] = copied(value, key)
            except TypeError:
                continue
    return found


def _put_settings(group: dict[str, Any], settings: Mapping[str, Any]) -> None:
    for key, value in settings.items():
        if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
            with torch.no_grad():
                group[key].copy_(value)  # others may hold the same tensor
        else:
            group[key] = copied(value, key)


def _put_state(optimizer: Optimizer, names: Mapping[int, str], moment: RecordedMoment) -> None:
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            if entries := moment.state.get(name):
                optimizer.state[parameter] = {
                    key: state_in_loop(value, key, name, moment.state_types, parameter.device)
                    for key, value in entries.items()
                }
    optimizer._opt_called = True  # type: ignore[attr-defined]  # else a scheduler warns that it is ahead of it
