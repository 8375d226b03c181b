"""Which parameters a recording covers: those of the model that the optimizer owns, all of them and no others."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.errors import RecordingError
from explaind.recording.optimizers import Optimizers

__all__ = ["GroupMembers", "check_model_and_optimizers", "owning_groups", "tracked_parameters"]


def check_model_and_optimizers(model: object, optimizers: Optimizers) -> None:
    """Refuse what cannot be traced, naming it."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"trace expects a torch.nn.Module, got {type(model).__name__}.")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"trace expects a torch.optim.Optimizer, got {type(optimizer).__name__}.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates its closure several times within a step, so a step has no single gradient to split. "
                "Any other torch.optim optimizer can be traced."
            )
    if len(optimizers) == 0:
        raise TypeError("trace expects a torch.optim.Optimizer, got none.")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    every = [id(parameter) for group in optimizers.param_groups for parameter in group["params"]]
    owned = set(every)
    if len(owned) < len(every):
        twice = next(number for number in every if every.count(number) > 1)
        raise ValueError(
            f"the parameter '{names.get(twice)}' belongs to two optimizers, so neither makes its update alone. Give "
            "each parameter to one of them."
        )
    if foreign := len(owned - names.keys()):
        raise ValueError(
            f"the optimizer owns {foreign} parameter{'s' if foreign > 1 else ''} that the model does not have; what "
            "they do cannot be recorded. Trace the module that contains all parameters of the optimizer, or a "
            "torch.nn.ModuleDict of the modules that the loop calls."
        )
    left_out = [
        name for name, parameter in model.named_parameters() if parameter.requires_grad and id(parameter) not in owned
    ]
    if left_out:
        raise ValueError(
            f"the optimizer does not own the parameter '{left_out[0]}' of the model"
            + (f" (nor {len(left_out) - 1} others)" if len(left_out) > 1 else "")
            + ". Give it to the optimizer, or freeze it with requires_grad_(False)."
        )
    if any(parameter.is_complex() for parameter in model.parameters()):
        raise TypeError("complex parameters are not supported; use pairs of real ones.")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise TypeError(
                f"the layer '{name}' has max_norm={module.max_norm}: it rewrites its weight in every forward pass, "
                "beside the optimizer. Use max_norm=None, and torch.nn.utils.parametrize or F.normalize(layer(x), "
                "dim=-1) for rows of bounded length."
            )


def tracked_parameters(model: nn.Module, optimizers: Optimizers) -> dict[str, nn.Parameter]:
    """The model's parameters that the optimizers own, by name, each once."""
    owned = {id(parameter) for group in optimizers.param_groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in owned}


def owning_groups(tracked: Mapping[str, Tensor], optimizers: Optimizers) -> dict[str, int]:
    """Index of the parameter group that owns each parameter."""
    group_of = {id(p): index for index, group in enumerate(optimizers.param_groups) for p in group["params"]}
    return {name: group_of[id(parameter)] for name, parameter in tracked.items()}


class GroupMembers:
    """Which parameters each group of each optimizer has; more may be added, but none taken away."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._ids = self._present()

    def have_changed(self) -> bool:
        """Whether they are not what they were."""
        return self._ids != self._present()

    def check(self, step: int) -> None:
        """Refuse changes while a step is in progress.

        Raises:
            RecordingError: there is one.
        """
        if self.have_changed():
            raise RecordingError(
                f"a parameter group was added between the steps of two optimizers in step {step}. Add it after both "
                "or before both."
            )

    def places(self) -> list[int]:
        """Number of each earlier group among the present ones, whose new members become known.

        Raises:
            RecordingError: groups or parameters were removed, or exchanged.
        """
        present, places, start = self._present(), [], 0
        for before, now in zip(self._ids, present, strict=True):
            for number, members in enumerate(before):
                if number >= len(now) or now[number][: len(members)] != members:
                    raise RecordingError(
                        f"parameters were taken out of group {number} of an optimizer while it was traced, or it was "
                        "replaced. Groups may be added to it with add_param_group; to stop training a parameter, set "
                        "its lr to 0 or freeze it with requires_grad_(False)."
                    )
                places.append(start + number)
            start += len(now)
        self._ids = present
        return places

    def _present(self) -> list[list[list[int]]]:
        return [[list(map(id, group["params"])) for group in optimizer.param_groups] for optimizer in self._optimizers]
