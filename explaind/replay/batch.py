"""Recorded forward and backward passes of a batch, made again as the loop made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.calls import CallKind
from explaind.parameters import named_dtype
from explaind.replay.model import Forward, cast, modes, restored_rng

__all__ = ["BatchCall", "accumulate", "cotangents", "passed_forward"]


@dataclass(frozen=True, kw_only=True)
class BatchCall:
    """A forward call of the model, and what came back to its outputs: all that its gradient depends on beside θ."""

    kind: CallKind
    """What was called, and how."""
    inputs: Mapping[str, Tensor]
    """Its tensors `[row, …]` by name."""
    output_grads: dict[str, Tensor]
    """c_{k,s} = ∂L_s/∂f(x_k) of every output that the loss depends on, `[row, …]`; none with an objective."""
    training: NDArray[np.bool_]
    """`module.training` of every module."""
    rng_state: NDArray[np.uint8]
    """Random number generators just before it."""
    reached: frozenset[str]
    """Names of the parameters whose gradients the cotangents entered, all but those that were frozen in that pass."""
    fixed_version: int
    """Version of the buffers and frozen parameters just before it."""


@contextmanager
def passed_forward(
    forward: Forward,
    call: BatchCall,
    params: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> Iterator[Any]:
    """A call's forward pass with gradients; in the block are the modes and the randomness of the loop.

    Args:
        forward: the call as a function.
        call: the call.
        params: θ by name, with gradients to be had.
        fixed: the model's other tensors before the call.
        device: where to compute.
        dtype: compute in this type instead of the trained ones, and without autocast.

    Yields:
        The output as the model returns it.
    """
    inputs = _load(call.inputs, device, dtype)  # of a data set, perhaps, which is to know nothing of what follows
    with modes(forward.model, call.training.tolist()), restored_rng(call.rng_state, device), torch.enable_grad():
        with _autocast(call, device if dtype is None else None):
            reachable = {n: p if n in call.reached else p.detach() for n, p in params.items()}
            output = forward.raw(_load(fixed, device, dtype) | reachable, inputs)
        yield output


def accumulate(
    forward: Forward,
    call: BatchCall,
    params: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Add a call's part of the step's gradient to `.grad` of the parameters, as the loop's backward pass did."""
    with passed_forward(forward, call, params, fixed, device) as output:
        outputs = forward.loss_terms(forward.named(output))
        torch.autograd.backward(list(outputs.values()), cotangents(outputs, call.output_grads))


def cotangents(outputs: Mapping[str, Tensor], output_grads: Mapping[str, Tensor]) -> list[Tensor | None]:
    """What came back to each output; None to one that is a loss itself."""
    return [output_grads[name].to(out) if name in output_grads else None for name, out in outputs.items()]


def _autocast(call: BatchCall, device: torch.device | None) -> AbstractContextManager[Any]:
    """Autocast as it was in the loop, where a device to replay it on is given."""
    if device is None or call.kind.autocast is None:
        return nullcontext()
    return torch.autocast(device.type, dtype=named_dtype(call.kind.autocast))


def _load(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Copies of tensors on a device, in their own types or those with floating point in another one."""
    copies = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
    return copies if dtype is None else cast(copies, dtype, device)
