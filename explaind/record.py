"""The record of a run, step by step: what the recorder wrote, as the tensors it was made of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.data_source import data_source
from explaind.description import check_description
from explaind.errors import DamagedStoreWarning, StoreFormatError, UnknownUpdateRuleError
from explaind.matching import check_calls, check_model
from explaind.moments import Moments
from explaind.optimizers import RULES, UpdateRule
from explaind.parameters import ParameterTable
from explaind.places import Place
from explaind.recorded_calls import RecordedCalls
from explaind.recording.fixed import decode_fixed
from explaind.recording.groups import group_settings
from explaind.recording.state import StateTypes
from explaind.store import StoreReader, decoding

__all__ = ["Record"]


class Record(RecordedCalls):
    """The published steps of a store, and the model that they belong to, if it was given."""

    def __init__(
        self,
        path: Place,
        model: nn.Module | None,
        objective: Callable[[nn.Module, Any], Tensor] | None = None,
        data: Any = None,
    ) -> None:
        source = None if data is None else data_source(data)
        store = StoreReader(path)
        store.check_arrays()
        attributes, commit = store.attributes, store.commit
        with decoding("the attributes", path):
            super().__init__(store, ParameterTable.from_json(attributes["parameters"]), commit.num_steps, source)
            self.optimizer: str = attributes["optimizer"]
            modules: dict[str, str] = attributes["modules"]
            self._fixed_layout: list[dict[str, Any]] = attributes["fixed"]
            self._group_keys: list[str] = attributes["group_keys"]
            self._group_constants: list[dict[str, Any]] = attributes["groups"]
            self._group_optimizers: list[str] = attributes.get(
                "group_optimizers", [self.optimizer] * len(self._group_constants)
            )
            self._group_types: list[dict[str, str]] = attributes.get("group_types", [{}] * len(self._group_constants))
            self.device = torch.device(attributes["device"])
            check_description(store, self.table)
        self.path = path
        if self.num_steps < 1:
            reason = (
                "Was optimizer.step() called inside the traced block?"
                if commit.complete
                else "It is still being recorded, or was stopped before its first step was written."
            )
            raise StoreFormatError(f"{path} has no finished optimizer step. {reason}")
        if store.lost is not None:
            warnings.warn(store.lost, DamagedStoreWarning, stacklevel=4)
        self.complete = commit.complete
        """Whether the recording ended in an orderly way; False while it goes on or if it was killed."""
        self.metadata: dict[str, Any] = attributes.get("metadata", {})
        self.stores_example_grads = attributes.get("example_grads") == "stored"
        self.unrecorded_state: list[str] = attributes.get("unrecorded_state", [])
        """Names of optimizer state that is neither a number nor a real tensor, or changed its shape."""
        self.state_types: StateTypes = attributes.get("state_types", {})
        """Types and places of the state that does not have the usual ones."""
        self.snapshot_every: int = attributes.get("snapshot_every", 1)
        """Number of steps from one stored snapshot of the parameters to the next; those between are replayed."""
        self._moments = Moments(self, store)
        self.objective = objective
        """The per-example losses `objective(model, batch)` that were recorded in place of cotangents, if any."""
        self._model = getattr(model, "_orig_mod", model)  # of a compiled model the one that it was made of
        if model is not None:
            if not isinstance(model, nn.Module):
                raise TypeError(f"model must be a torch.nn.Module such as make_model() returns; got {model!r}.")
            check_model(self.model, self.table, self._fixed_layout, modules, path)
            check_calls(self.model, (kind for kind, _ in self._kinds), path)

    @property
    def model(self) -> nn.Module:
        """The model given to `open_run`.

        Raises:
            ValueError: none was given.
        """
        if self._model is None:
            raise ValueError("this needs the model: open the run with explaind.open_run(path, model=make_model()).")
        return self._model

    @property
    def group_optimizers(self) -> list[str]:
        """Full name of the optimizer class that owns each parameter group, `[group]`."""
        return self._group_optimizers

    @property
    def rules(self) -> list[UpdateRule | None]:
        """Update rule of each parameter group's optimizer, None if it is not known, `[group]`."""
        return [RULES.get(name) for name in self.group_optimizers]

    def require_rules(self) -> list[UpdateRule]:
        """The update rules of all parameter groups.

        Raises:
            UnknownUpdateRuleError: an optimizer has none.
        """
        rules = self.rules
        unknown = [name for name, rule in zip(self.group_optimizers, rules, strict=True) if rule is None]
        if unknown:
            raise UnknownUpdateRuleError(
                f"the update of {', '.join(dict.fromkeys(unknown))} is not known as a linear filter, so it cannot be "
                f"split over gradients and no example can be credited. Known are {', '.join(RULES)}; "
                "explaind.optimizers.register adds one. by=('query', 'step', 'layer') works for any optimizer."
            )
        return [rule for rule in rules if rule is not None]

    @property
    def num_groups(self) -> int:
        """Number of the optimizer's parameter groups."""
        return len(self._group_constants)

    @property
    def cached_bytes(self) -> int:
        """Most bytes of the record that are kept in memory between reads."""
        referred_to = 0 if self._references is None else self._references.cached_bytes
        return self._store.cached_bytes + self._moments.cached_bytes + referred_to

    @property
    def replays_gradients(self) -> bool:
        """Whether the model is run to know parameters and gradients, as they are not all stored."""
        return self._moments.replays_gradients

    @property
    def device_here(self) -> torch.device:
        """Where the run was trained, or the host if there is no such device."""
        return self.device if self.device.type == "cpu" or torch.cuda.is_available() else torch.device("cpu")

    @contextmanager
    def reads(self) -> Iterator[set[str]]:
        """Names of the arrays that are read from inside the block, known after it."""
        before, names = self._store.reads.copy(), set[str]()
        yield names
        names |= set(self._store.reads - before)

    def bytes_of(self, names: set[str], first: int, sweeps: int, *, before: set[str], num_before: int) -> int:
        """Bytes to read for sweeps from the last step to the first that is needed, and over all parameters before.

        Args:
            names: the arrays that a step is read from.
            first: the step.
            sweeps: how many; what is still in memory of the last one is not read again.
            before: the arrays that single steps are read from before the sweeps.
            num_before: how many steps.
        """
        some = sum(
            min(self._store.num_bytes(name), num_before * self._store.chunk_bytes(name)) for name in before - names
        )
        params = self._store.num_bytes("params")
        swept = {name: self._store.num_bytes(name, first / self.num_steps) for name in names}
        once = params + sum(swept.values()) - swept.get("params", 0)
        return some + (once if once <= self.cached_bytes else sweeps * (params + sum(swept.values())))

    def flat_params(self, step: int) -> Tensor:
        """θ_step as one vector `[element]`."""
        self._check_step(step, self.num_steps)
        return self._moments.params(step)

    def flat_gradient(self, step: int) -> Tensor:
        """G_step as the optimizer saw it, `[element]`."""
        self._check_step(step, self.num_steps - 1)
        return self._moments.gradient(step)

    def state(self, snapshot: int) -> dict[str, dict[str, Tensor]]:
        """The optimizer's state `{parameter: {name: tensor}}` before step `snapshot`, with torch's names.

        A parameter has only the entries that it had in the loop.
        """
        self._check_step(snapshot, self.num_steps)
        return self._moments.state(snapshot)

    def state_row(self, name: str, snapshot: int) -> NDArray[Any] | None:
        """The row `[1, …]` of an array of state before step `snapshot`; None if there is nothing to put in it."""
        self._check_step(snapshot, self.num_steps)
        return self._moments.state_row(name, snapshot)

    def replayed_gradient(self, step: int) -> Tensor:
        """What a replay of the recorded calls gives for G_step, `[element]`."""
        self._check_step(step, self.num_steps - 1)
        return self._moments.replayed_gradient(step)

    def settings(self, step: int, group: int) -> dict[str, Any]:
        """Hyperparameters of a parameter group at a step, with torch's names."""
        self._check_step(step, self.num_steps - 1)
        with decoding(f"the settings of step {step}", self.path):
            values = self._store.read("hyperparameters", step, step + 1)[0]
            return group_settings(self._group_constants, self._group_keys, self._group_types, values, group)

    def gradient_rescaling(self, step: int) -> tuple[list[float], list[float]]:
        """The numbers s and c of every parameter, by which G_step = clamp(s·g, −c, c) of the backward pass's g.

        They are NaN where the recorder did not see g, so that only a replay can tell.
        """
        with decoding(f"the rescaling of the gradient of step {step}", self.path):
            scale = self._store.read("gradient_scale", step, step + 1)[0]
            has_limit = self._store.has("gradient_limit")
            limit = self._store.read("gradient_limit", step, step + 1)[0] if has_limit else np.inf
            scales, limits = np.broadcast_arrays(scale, limit, np.empty(len(self.table)))[:2]
            return scales.tolist(), limits.tolist()

    @cached_property
    def updated(self) -> NDArray[np.bool_]:
        """Whether each parameter had a gradient at each step, `[step, parameter]`."""
        return self._store.read("updated", 0, self.num_steps)

    def fixed(self, snapshot: int) -> dict[str, Tensor]:
        """Buffers and frozen parameters before step `snapshot`, by name."""
        if not self._fixed_layout:
            return {}
        self._check_step(snapshot, self.num_steps)
        return self.fixed_version(self._moment_fixed(snapshot))

    def fixed_version(self, version: int) -> dict[str, Tensor]:
        """A version of the buffers and frozen parameters, by name."""
        if not self._fixed_layout:
            return {}
        with decoding(f"version {version} of the fixed tensors", self.path):
            return decode_fixed(self._fixed_layout, self._store.read("fixed", version, version + 1)[0])
