"""One forward call of the traced model, as the loop made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.calls import CallKind
from explaind.errors import RecordingError
from explaind.parameters import named_dtype
from explaind.replay.batch import BatchCall

__all__ = ["ForwardCall", "check_rows"]


@dataclass(eq=False, kw_only=True)
class ForwardCall:
    """One forward call with gradients enabled; with an objective, all calls about one batch."""

    step: int
    """Number of optimizer steps that were finished when it ran."""
    part: str | None
    """Name of the module that was called, `""` for the model itself; None where an objective stands for it."""
    inputs: dict[str, NDArray[Any]]
    """Its tensors `[row, …]` by name, see `explaind.calls.take_apart`."""
    input_dtypes: dict[str, str]
    """Their types, as some widen when they are stored."""
    template: dict[str, Any]
    """Its arguments without the tensors."""
    autocast: str | None
    """The type that autocast lowered to, None if it was off."""
    training: NDArray[np.bool_]
    """`module.training` of every module, in the order of `model.modules()`."""
    rng_state: NDArray[np.uint8]
    """State of the random number generators just before it, `[byte]`."""
    fixed_version: int
    """Which version of the buffers and frozen parameters it began with."""
    parameter_versions: dict[str, int]
    """How often each parameter that requires gradients had been changed in place, by name."""
    output_fingerprint: Tensor
    """Norm and sum of its output, `[2]`: tells whether a replay is of the same model."""
    example_ids: Sequence[int] | NDArray[np.int64] | RecordingError | None
    """Names given to its rows by the user, if any, or why they are not known."""
    reached: frozenset[str] | None = None
    """Names of the parameters whose gradients it entered; None if all that it depends on."""
    output_grads: dict[str, Tensor] = field(default_factory=dict)
    """∂L/∂f of each output tensor that the loss depends on, summed over the backward passes that made the step's
    gradient, `[row, …]`; empty before the step, and with an objective."""

    @property
    def kind(self) -> CallKind:
        """What it has in common with other calls."""
        return CallKind(
            part=self.part, template=self.template, outputs=tuple(self.output_grads), autocast=self.autocast
        )

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))

    def recorded(self, parameters: Sequence[str]) -> BatchCall:
        """The call as a reader of the record gets it; `parameters` names all that are recorded."""
        return BatchCall(
            kind=self.kind,
            inputs={n: torch.from_numpy(rows).to(named_dtype(self.input_dtypes[n])) for n, rows in self.inputs.items()},
            output_grads=self.output_grads,
            training=self.training,
            rng_state=self.rng_state,
            reached=frozenset(parameters) if self.reached is None else self.reached,
            fixed_version=self.fixed_version,
        )

    def first_changed(self, parameters: Mapping[str, Tensor]) -> str | None:
        """Name of the first of the model's parameters that has been changed since, if one has."""
        versions = self.parameter_versions.items()
        return next((name for name, version in versions if parameters[name]._version != version), None)


def check_rows(inputs: Mapping[str, NDArray[Any]], output: Any) -> None:
    """All tensors of a call must have the examples along their first axis.

    Raises:
        RecordingError: they do not.
    """
    shapes = {f"input '{name}'": rows.shape for name, rows in inputs.items()}
    if isinstance(output, Tensor):
        shapes = {"output": tuple(output.shape), **shapes}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if not shape or shape[:1] != shapes[first][:1]:
            raise RecordingError(
                f"the examples of a batch cannot be told apart: the model's {name} has shape {shape} and its {first} "
                f"{shapes[first]}. All must have the examples along their first axis; keep what is shared by all "
                "examples as a buffer of the model."
            )
