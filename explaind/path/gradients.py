"""Gradients of recorded steps: of the whole batch, and of each example on its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from explaind.calls import fingerprint_output, named_tensors
from explaind.errors import ModelMismatchError
from explaind.path.uses import Uses
from explaind.recorded_calls import RecordedCall
from explaind.replay.batch import cotangents, passed_forward
from explaind.replay.call import Replay
from explaind.replay.model import Forward, cast, dense
from explaind.rescaling import Rescaling
from explaind.run import Run

__all__ = [
    "ReplayedStep",
    "batch_gradient",
    "call_replay",
    "combined_rows",
    "recorded_rescaling",
    "replay_step",
    "rows_are_separate",
    "run_forward",
    "step_example_gradients",
]

_SAME_OUTPUT = 1e-3
_ROW_WEIGHTS = np.concatenate([2.0 ** np.arange(-4, 4), -(2.0 ** np.arange(-4, 4))])
"""All are used before one is used again: where there are few rows, each has its own."""


def call_replay(run: Run, step: int, call: RecordedCall, *, dtype: torch.dtype, device: torch.device) -> Replay:
    """A call of a run, ready to be made again in some type."""
    return Replay(
        model=run.model,
        forward=run_forward(run, call),
        params=run.table.unflatten(run.flat_params(step).to(device=device, dtype=dtype)),
        reached=call.reached,
        fixed=cast(run.fixed_version(call.fixed_version), dtype, device),
        inputs=cast(call.inputs, dtype, device),
        output_grads=cast(call.output_grads, dtype, device),
        training=call.training,
        rng_state=call.rng_state,
    )


def run_forward(run: Run, call: RecordedCall) -> Forward:
    """A call of a run as a function."""
    return Forward(run.model, call.kind, run.objective)


def batch_gradient(
    run: Run, step: int, *, dtype: torch.dtype | None = None, calls: Sequence[RecordedCall] | None = None
) -> Tensor:
    """Σ_k g_{k,step}, flat `[element]`; see `replay_step`."""
    return replay_step(run, step, dtype=dtype, calls=calls).gradient


@dataclass(frozen=True)
class ReplayedStep:
    """What the backward passes of a step gave."""

    gradient: Tensor
    """Σ_k g_k, flat `[element]`."""
    uses: list[Uses]
    """Of every call, what its rows' own gradients are made of."""


def replay_step(
    run: Run,
    step: int,
    *,
    dtype: torch.dtype | None = None,
    calls: Sequence[RecordedCall] | None = None,
    device: torch.device | None = None,
    watched: bool = False,
    trusted: Mapping[str, Tensor] | None = None,
) -> ReplayedStep:
    """Replay the forward and backward passes of a step as the loop made them: same batch, order and randomness.

    On the machine that recorded the run the gradient is the recorded one bit for bit, unless the loop rescaled it
    or added to it.

    Args:
        run: opened with its model.
        step: which step.
        dtype: compute in this type instead of the trained ones; then it is not bit for bit the same.
        calls: only what comes through these forward calls of the step; by default all.
        device: where to compute; by default where the run was recorded, if there is such a device.
        watched: collect the uses.
        trusted: Σ_k g_k of the step's one call by every parameter, if it is thought to be known. Then the rows are
            weighted in the one backward pass, and their gradients must add up to this; the gradient is not given.
    """
    if device is None:
        device = run.device_here

    trained = {name: tensor.to(device, copy=True) for name, tensor in run.params(step).items()}
    params = {n: t.requires_grad_() for n, t in (trained if dtype is None else cast(trained, dtype, device)).items()}
    uses = list[Uses]()
    for call in run.calls(step) if calls is None else calls:
        forward, fixed = run_forward(run, call), run.fixed_version(call.fixed_version)
        with passed_forward(forward, call, params, fixed, device, dtype) as output:
            if dtype is None and call.kind.part is not None:
                _check_output(step, call, output)
            rows = forward.named(output)
            outputs = forward.loss_terms(rows)
            back: Sequence[Tensor | None] = cotangents(outputs, call.output_grads)
            if not watched:
                torch.autograd.backward(list(outputs.values()), back)
                continue
            if trusted is not None:
                weights, back = _weighted(rows, params, call.output_grads, seed=(step, 0))
                uses.append(Uses(list(rows.values()), params, row_weights=weights))
                uses[-1].expect(torch.ones_like(weights), trusted)
            else:
                weights, combined = combined_rows(rows, params, call.output_grads, seed=(step, len(uses)))
                uses.append(Uses(list(outputs.values()), params))
                uses[-1].expect(weights, combined)
            uses[-1].backward(back, leaves=trusted is None)
    updated = dict(zip(run.table.names, run.updated[step], strict=True))
    gradients = {name: param.grad for name, param in params.items() if updated[name] and param.grad is not None}
    flat = run.table.flatten({name: dense(gradient) for name, gradient in gradients.items()}, dtype)
    return ReplayedStep(flat, uses)


def combined_rows(
    outputs: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    output_grads: Mapping[str, Tensor],
    seed: tuple[int, int],
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Random weights w_k `[row]` and Σ_k w_k g_k by every parameter, in one backward pass."""
    weights, cotangents = _weighted(outputs, params, output_grads, seed)
    totals = torch.autograd.grad(
        list(outputs.values()), list(params.values()), cotangents, retain_graph=True, allow_unused=True
    )
    return weights, {n: None if t is None else dense(t) for n, t in zip(params, totals, strict=True)}


def _weighted(
    outputs: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    output_grads: Mapping[str, Tensor],
    seed: tuple[int, int],
) -> tuple[Tensor, list[Tensor]]:
    """Random weights of the rows `[row]`, and the outputs' cotangents times these.

    The weights are signed powers of two: scaling a row's cotangents by one scales all that comes of them exactly, so
    that whatever is compared with their sum is rounded alike. Of both signs, they do not add up to hide single rows.
    """
    first = next(iter(outputs.values()))
    random = np.random.default_rng(seed)
    sets = [random.permutation(_ROW_WEIGHTS) for _ in range(-(-len(first) // len(_ROW_WEIGHTS)))]
    drawn = np.concatenate(sets)[: len(first)]
    weights = torch.from_numpy(drawn).to(device=first.device, dtype=next(iter(params.values())).dtype)
    cotangents = []
    for name, output in outputs.items():
        own = output_grads[name].to(output) if name in output_grads else torch.ones_like(output)
        cotangents.append(own * weights.to(output.dtype).reshape(-1, *[1] * (output.ndim - 1)))
    return weights, cotangents


def recorded_rescaling(run: Run, step: int, gradient: Tensor) -> Rescaling:
    """What the loop did to the backward pass's gradient `[element]`, as recorded, or as found from the replayed one."""
    return Rescaling.of(run.table, *run.gradient_rescaling(step), gradient, run.flat_gradient(step).to(gradient.device))


def _check_output(step: int, call: RecordedCall, output: Any) -> None:
    """The replayed output must be the recorded one, up to the rounding of another machine."""
    norm, total = fingerprint_output(output).tolist()
    error = np.hypot(norm - call.output_fingerprint[0], total - call.output_fingerprint[1])
    count = sum(tensor.numel() for _, tensor in named_tensors(output))
    if not error <= _SAME_OUTPUT * call.output_fingerprint[0] * np.sqrt(count):
        raise ModelMismatchError(
            f"the model does not give the output that was recorded at step {step}: its norm and sum are {norm:.6g}, "
            f"{total:.6g}, recorded were {call.output_fingerprint[0]:.6g}, {call.output_fingerprint[1]:.6g}. Its "
            "parameters have the recorded names and shapes, but its forward pass computes something else: it is "
            "another model, or changes its input in place, draws random numbers other than torch's, or has settings "
            "(such as Dropout.p) or hooks that differ from those in the loop."
        )


def step_example_gradients(run: Run, step: int) -> dict[str, Tensor]:
    """g_{k,step} of every example of a step, `{name: [example, *shape]}`; their sum is the gradient's data part.

    The examples are those of `np.unique(run.call_examples(step))`, in that order; rows of one example are summed.
    """
    host = torch.device("cpu")
    separate = run.stores_example_grads or rows_are_separate(run, dtype=run.table.dtype, device=host)
    blocks = []
    for call in run.calls(step):
        if run.stores_example_grads:
            blocks.append(run.stored_example_grads(call.rows))
            continue
        replay = call_replay(run, step, call, dtype=run.table.dtype, device=host)
        blocks += replay.row_gradients(run.table, separate=separate)
    same_for_all = all(math.isinf(limit) for limit in run.gradient_rescaling(step)[1])
    batch = run.flat_gradient(step) if same_for_all else batch_gradient(run, step)
    rows = torch.cat(blocks)
    updated = run.table.expand(run.updated[step].tolist())  # what had no gradient took none from the examples
    flat = (updated * recorded_rescaling(run, step, batch).factor(batch)).to(rows) * rows
    examples, place = np.unique(run.call_examples(step), return_inverse=True)
    summed = flat.new_zeros(len(examples), flat.shape[1]).index_add_(0, torch.from_numpy(place), flat)
    return run.table.unflatten(summed)


def rows_are_separate(run: Run, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the rows' own gradients sum to the gradient of the batch; a call of every kind and mode tells."""
    return all(
        call_replay(run, step, run.calls(step)[number], dtype=dtype, device=device).is_separate()
        for step, number in run.call_samples()
    )
