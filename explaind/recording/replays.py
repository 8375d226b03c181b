"""Calls of the step in progress, made again while it is recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.errors import RecordingError
from explaind.parameters import ParameterTable
from explaind.recording.forwards import ForwardCall
from explaind.recording.host import same_bits, to_numpy
from explaind.replay.batch import accumulate
from explaind.replay.call import SAME_GRADIENT, Replay
from explaind.replay.model import Forward, cast, dense
from explaind.rescaling import Rescaling

__all__ = ["StepReplays"]


class StepReplays:
    """Replays calls with the present parameters.

    Args:
        model: whose calls they are.
        tracked: the recorded parameters, by name.
        table: their order.
        objective: what stands for the model's calls, if anything.
        fixed_tensors: returns a version of the buffers and frozen parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        tracked: Mapping[str, nn.Parameter],
        table: ParameterTable,
        *,
        objective: Callable[[nn.Module, Any], Tensor] | None,
        fixed_tensors: Callable[[int], dict[str, Tensor]],
    ) -> None:
        self._model, self._tracked, self._table = model, tracked, table
        self._objective, self._fixed_tensors = objective, fixed_tensors
        self._separate: dict[Any, bool] = {}

    def widen(self, tracked: Mapping[str, nn.Parameter], table: ParameterTable) -> None:
        """Go on with more parameters."""
        self._tracked, self._table = tracked, table

    def example_grads(self, call: ForwardCall) -> NDArray[Any]:
        """g_k of all rows of a call, `[row, element]`."""
        replay = self._replay(call)
        mode = (call.kind.key, call.training.tobytes())
        if mode not in self._separate:
            self._separate[mode] = replay.is_separate()
        return to_numpy(torch.cat(list(replay.row_gradients(self._table, separate=self._separate[mode]))))

    def check_objective(
        self,
        calls: Sequence[ForwardCall],
        gradients: Mapping[str, Tensor | None],
        rescaling: Mapping[str, tuple[float, float]],
        step: int,
    ) -> None:
        """The sum of the objective's losses must have the gradient that the loop has computed.

        Args:
            calls: all calls of the step.
            gradients: what an optimizer is about to use, by parameter.
            rescaling: how the loop rescaled them since the backward pass, the pair (s, c) of each.
            step: the step in progress.

        Raises:
            RecordingError: it does not.
        """
        sums = [self._replay(call).summed() for call in calls]
        summed = self._table.flatten({name: torch.stack([one[name] for one in sums]).sum(dim=0) for name in gradients})
        recorded = self._table.flatten(gradients).double()
        pairs = [rescaling.get(name, (1.0, math.inf)) for name in self._table.names]
        scale, limit = ([pair[place] for pair in pairs] for place in (0, 1))
        computed = Rescaling.of(self._table, scale, limit, summed.double(), recorded).apply(summed)
        difference, size = float((computed - recorded).norm()), float(recorded.norm())
        if difference <= SAME_GRADIENT * size:
            return
        ratio = float(computed @ recorded) / max(float(computed @ computed), 1e-300)
        hint = (
            f"The loop's gradient is {ratio:.6g} times it: multiply the losses by that (a mean over a batch, say, "
            "divides by its size). Loss scaling (GradScaler) cannot be combined with an objective."
            if float((ratio * computed - recorded).norm()) <= SAME_GRADIENT * size
            else "The loop's loss must be the objective's sum, without a penalty on the parameters."
        )
        raise RecordingError(
            f"the objective's sum does not have the gradient of step {step}: ‖difference‖ / ‖gradient‖ = "
            f"{difference / max(size, 1e-300):.2g}. {hint}"
        )

    def reproduce(
        self, calls: Sequence[ForwardCall], gradients: Mapping[str, Tensor | None], flat: Tensor, rescaling: Rescaling
    ) -> bool:
        """Whether a reader will get the step's gradient from the record of its calls, bit for bit.

        Args:
            calls: all calls of the step.
            gradients: what an optimizer is about to use, by parameter.
            flat: the same, `[element]`.
            rescaling: how the loop rescaled them since the backward pass.
        """
        params = {name: p.detach().clone().requires_grad_() for name, p in self._tracked.items()}
        device = next(iter(params.values())).device
        for call in calls:
            recorded = call.recorded(self._table.names)
            forward = Forward(self._model, recorded.kind, self._objective)
            accumulate(forward, recorded, params, self._fixed_tensors(call.fixed_version), device)
        own = {n: dense(p.grad) for n, p in params.items() if gradients.get(n) is not None and p.grad is not None}
        replayed = rescaling.rounded(self._table, self._table.flatten(own))
        return same_bits(replayed.numpy(), flat.numpy())

    def _replay(self, call: ForwardCall) -> Replay:
        dtype, device = self._table.dtype, next(iter(self._tracked.values())).device
        return Replay(
            model=self._model,
            forward=Forward(self._model, call.kind, self._objective),
            reached=self._table.names if call.reached is None else call.reached,
            params=cast({name: parameter.detach() for name, parameter in self._tracked.items()}, dtype, device),
            fixed=cast(self._fixed_tensors(call.fixed_version), dtype, device),
            inputs=cast({name: torch.from_numpy(rows) for name, rows in call.inputs.items()}, dtype, device),
            output_grads=cast(call.output_grads, dtype, device),
            training=call.training,
            rng_state=call.rng_state,
        )
