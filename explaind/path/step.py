"""One recorded step as the derivation sees it: its filter on the gradient, and what the filter does not explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from explaind.errors import ModelMismatchError
from explaind.optimizers import LinearFilter, ParameterStep
from explaind.parameters import ParameterTable
from explaind.path.flat_filter import FIELDS, FlatFilter
from explaind.path.gradients import ReplayedStep, recorded_rescaling, replay_step
from explaind.path.uses import Uses
from explaind.replay.call import SAME_GRADIENT
from explaind.rescaling import Rescaling
from explaind.run import Run

__all__ = ["Step", "StepTerms"]

_ROUNDING_UNITS = 64
"""An error of up to this many units in the last place of its operands is rounding; a larger one has a cause."""


@dataclass(frozen=True, kw_only=True)
class StepTerms:
    """What one step adds to each query; every sum over them is the change of the query."""

    contribution: Tensor
    """`[query, source, token, layer]`"""
    decay: Tensor
    """`[query, layer]`"""
    other: Tensor
    """`[query, layer]`"""
    rounding: Tensor
    """`[query, layer]`"""
    omitted: Tensor
    """What restrictions left out, `[query]`"""


class Step:
    """Step s of a run in float64: vectors of the derivation, each `[element]`.

    Args:
        run: the run.
        index: s.
        device: where to compute.
        rows_dtype: type of what the rows' gradients are made of, where they are needed.
        without_rows: nothing is asked of single rows. Then G_s counts as Σ_k g_{k,s} once a replay of the batch has
            shown that it is, up to rounding; the run remembers that.
    """

    def __init__(
        self,
        run: Run,
        index: int,
        device: torch.device,
        *,
        rows_dtype: torch.dtype | None = None,
        without_rows: bool = False,
    ) -> None:
        self._run, self._device, self._rows_dtype, self._without_rows = run, device, rows_dtype, without_rows
        self.is_trusted = False
        """Whether G_s is taken for Σ_k g_{k,s} as long as the products with the rows' gradients agree."""
        self.index = index
        self.params = self._load(run.flat_params(index))
        """θ_s"""
        self.next_params = self._load(run.flat_params(index + 1))
        """θ_{s+1}"""
        self.update = self.next_params - self.params
        """Δ_s"""

    def read(self) -> None:
        """Read from the store now what else would be read when it is first used."""
        if not all(self._run.rules):  # then only the update is
            return
        self.gradient  # noqa: B018
        self._states  # noqa: B018
        self._run.calls(self.index)

    def trust(self) -> None:
        """Take G_s for Σ_k g_{k,s}, which saves a backward pass, if it came from one call and was not rescaled."""
        scales, limits = self._run.gradient_rescaling(self.index)
        unscaled = all(scale == 1 and limit == math.inf for scale, limit in zip(scales, limits, strict=True))
        single = len(self._run.calls(self.index)) == 1
        self.is_trusted = unscaled and single and self._is_trained_in(self._rows_dtype)

    def distrust(self) -> None:
        """Replay the batch after all, as the products have shown that G_s is not Σ_k g_{k,s}."""
        self.is_trusted = False
        for name in ("uses", "example_gradient_sum", "gradient_scale", "is_unscaled", "foreign_gradient"):
            vars(self).pop(name, None)

    @property
    def is_the_examples(self) -> bool:
        """Whether G_s is Σ_k g_{k,s} up to rounding."""
        return self.is_trusted or not bool(self.foreign_gradient[0].any() or (self.gradient_scale != 1).any())

    @property
    def table(self) -> ParameterTable:
        """The parameters, and where they lie."""
        return self._run.table

    @property
    def recorded_dtype(self) -> torch.dtype:
        """Type that parameters and gradients are recorded in."""
        return self._run.table.dtype

    def _load(self, flat: Tensor) -> Tensor:
        return flat.to(device=self._device, dtype=torch.float64)

    @cached_property
    def gradient(self) -> Tensor:
        """G_s, as the optimizer saw it."""
        return self._load(self._run.flat_gradient(self.index))

    @cached_property
    def example_gradient_sum(self) -> Tensor:
        """The part of G_s that comes from the examples, Σ_k g_{k,s}, replayed and rescaled as recorded."""
        if self.is_trusted or self.stands_for_examples:
            return self.gradient
        return self._rescaling.apply(self.replayed_gradient)

    @property
    def stands_for_examples(self) -> bool:
        """Whether G_s may stand for Σ_k g_{k,s}: nothing is asked of rows, and a replay has shown that it is that."""
        if not self._without_rows:
            return False
        known = self._run.examples_alone
        if self.index not in known:
            known[self.index] = not bool(self._replayed_foreign_gradient[0].any())
        return known[self.index]

    @cached_property
    def replayed_gradient(self) -> Tensor:
        """Σ_k of the examples' gradients in the training's own type, before they were rescaled."""
        return self._load(self._replayed.gradient)

    @cached_property
    def exact_example_gradient_sum(self) -> Tensor:
        """Σ_k g_{k,s} in float64, without the rounding of the training's own type and without its rescaling."""
        return self._load(self._exactly_replayed.gradient)

    @cached_property
    def uses(self) -> list[Uses]:
        """Of every forward call, what its rows' own gradients are made of, in the type `rows_dtype`."""
        if self.is_trusted:
            expected = self._run.table.unflatten(self.gradient.to(self._rows_dtype))
            return replay_step(self._run, self.index, watched=True, trusted=expected).uses
        if self._is_trained_in(self._rows_dtype):
            return self._replayed.uses
        if self._rows_dtype == torch.float64:
            return self._exactly_replayed.uses
        replayed = replay_step(self._run, self.index, dtype=self._rows_dtype, device=self._device, watched=True)
        return replayed.uses

    @cached_property
    def _replayed(self) -> ReplayedStep:
        return replay_step(self._run, self.index, watched=self._is_trained_in(self._rows_dtype))

    @cached_property
    def _exactly_replayed(self) -> ReplayedStep:
        watched = self._rows_dtype == torch.float64
        return replay_step(self._run, self.index, dtype=torch.float64, device=self._device, watched=watched)

    def _is_trained_in(self, dtype: torch.dtype | None) -> bool:
        """Whether the loop computed this step in one type only, and in the one place."""
        return (
            {parameter.dtype for parameter in self._run.table} == {dtype}
            and self._run.device.type == self._device.type
            and not any(call.kind.autocast for call in self._run.calls(self.index))
        )

    @cached_property
    def gradient_scale(self) -> Tensor:
        """By which factor clipping or loss scaling multiplied each entry of the backward pass's gradient."""
        return torch.ones_like(self.gradient) if self.is_trusted else self._rescaling.factor(self.replayed_gradient)

    @cached_property
    def is_unscaled(self) -> bool:
        """Whether the optimizer took the backward pass's gradient as it was."""
        return bool((self.gradient_scale == 1).all()) and bool((self.filter.sign == 1).all())

    @cached_property
    def _rescaling(self) -> Rescaling:
        return recorded_rescaling(self._run, self.index, self.replayed_gradient)

    @cached_property
    def filter(self) -> FlatFilter:
        """The optimizers' linear filter.

        Raises:
            UnknownUpdateRuleError: an optimizer has no rule.
        """
        rules, table = self._run.require_rules(), self._run.table
        settings = [self._run.settings(self.index, group) for group in range(self._run.num_groups)]
        params, gradients = (table.unflatten(flat) for flat in (self.params, self.gradient))
        filters = [
            rules[parameter.group].filter(
                ParameterStep(
                    settings=settings[parameter.group],
                    params=params[parameter.name],
                    gradient=gradients[parameter.name],
                    before=self._states[0][parameter.name],
                    after=self._states[1][parameter.name],
                    dtype=parameter.dtype,
                )
            )
            if self._run.updated[self.index, number]
            else LinearFilter()
            for number, parameter in enumerate(table)
        ]
        return FlatFilter(
            **{field: self._flatten([getattr(own, field) for own in filters]) for field in FIELDS},
            table=table,
            factors={
                parameter.name: (own.left, own.right)
                for parameter, own in zip(table, filters, strict=True)
                if own.left is not None or own.right is not None
            },
        )

    def _flatten(self, values: Sequence[Tensor | float]) -> Tensor:
        """Numbers and tensors of each parameter's shape as one vector."""
        vector = torch.empty_like(self.params)
        if all(isinstance(value, float) and value == values[0] for value in values):
            return vector.fill_(values[0])
        for parameter, value in zip(self._run.table, values, strict=True):
            tensor = torch.as_tensor(value, dtype=torch.float64, device=self._device)
            vector[parameter.slice] = tensor.reshape(-1)
        return vector

    @cached_property
    def _states(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
        """The optimizers' state before and after the step; what has axes in float64."""

        def load(snapshot: int) -> dict[str, dict[str, Tensor]]:
            return {
                name: {key: self._load(tensor) if tensor.ndim else tensor for key, tensor in own.items()}
                for name, own in self._run.state(snapshot).items()
            }

        return load(self.index), load(self.index + 1)

    @cached_property
    def buffer_before(self) -> Tensor:
        """The momentum buffer m_{s−1} before the step."""
        return self._buffer(self._states[0])

    @cached_property
    def buffer_after(self) -> Tensor:
        """The momentum buffer m_s after the step."""
        return self._buffer(self._states[1])

    def _buffer(self, state: dict[str, dict[str, Tensor]]) -> Tensor:
        """The tensor that each parameter's rule has for its buffer; what has none yet is zero."""
        names = [rule.buffer for rule in self._run.require_rules()]
        own = {p.name: state[p.name].get(names[p.group] or "") for p in self._run.table}
        return self._run.table.flatten(own, dtype=torch.float64).to(self._device)

    @cached_property
    def foreign_gradient(self) -> tuple[Tensor, Tensor]:
        """G_s − Σ_k g_{k,s}, what comes from no example: as the pair (other, rounding).

        Raises:
            ModelMismatchError: an objective's gradient is not the recorded one.
        """
        if self.is_trusted or self.stands_for_examples:
            return torch.zeros_like(self.gradient), torch.zeros_like(self.gradient)
        return self._replayed_foreign_gradient

    @cached_property
    def _replayed_foreign_gradient(self) -> tuple[Tensor, Tensor]:
        replayed = self._rescaling.apply(self.replayed_gradient)
        other, rounding = self._split(self.gradient - replayed, self.gradient.abs() + replayed.abs())
        if self._run.uses_objective and other.norm() > SAME_GRADIENT * self.gradient.norm():
            raise ModelMismatchError(
                f"the objective's sum does not have the gradient that was recorded at step {self.index}: they differ "
                f"by {float(other.norm() / self.gradient.norm()):.1e} of its norm. The model or the objective is not "
                "that of the recording, or the loop's loss was another one in that step."
            )
        return other, rounding

    @cached_property
    def buffer_error(self) -> tuple[Tensor, Tensor]:
        """m_s − (retain·m_{s−1} + intake·u_s): as the pair (other, rounding)."""
        f, after = self.filter, self.buffer_after
        kept, taken = f.retain * self.buffer_before, f.intake * self._filtered_input
        return self._split(after - kept - taken, after.abs() + kept.abs() + taken.abs(), f.buffer_roundoff)

    @cached_property
    def update_error(self) -> tuple[Tensor, Tensor]:
        """e_s, the update beyond the filter's: as the pair (other, rounding)."""
        f = self.filter
        gained = f.buffer_gain * self.buffer_after + f.gradient_gain * self._filtered_input
        gained = f.multiplied(gained + f.previous_gain * self.buffer_before)
        decayed = f.decoupled_decay * self.params
        size = self.params.abs() + self.next_params.abs() + gained.abs()
        return self._split(self.update + gained + decayed, size, f.update_roundoff)

    @cached_property
    def _filtered_input(self) -> Tensor:
        """What enters the filter, u_s."""
        return self.filter.sign * self.gradient + self.filter.coupled_decay * self.params

    def _split(self, error: Tensor, size: Tensor, roundoff: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        """Entries beyond the rounding of operands of this size and the optimizer's own, and those within it."""
        within = error.abs() <= _ROUNDING_UNITS * self._unit * size + roundoff
        return torch.where(within, 0.0, error), torch.where(within, error, 0.0)

    @cached_property
    def _unit(self) -> Tensor | float:
        """Unit in the last place of numbers of about one, in the parameters' types; `[element]` if these differ."""
        units = [torch.finfo(parameter.dtype).eps for parameter in self._run.table]
        return units[0] if len(set(units)) == 1 else self._run.table.expand(units).to(self._device)
