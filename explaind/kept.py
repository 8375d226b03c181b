"""Which moments and gradients of a run have to be stored, so that the others can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from explaind.errors import StoreFormatError, VerificationError
from explaind.record import Record
from explaind.recording.host import same_bits
from explaind.recording.snapshots import digests
from explaind.replay.model import sparse_weights
from explaind.replay.updates import UpdateReplay
from explaind.store import StoreReader

__all__ = ["Kept", "as_stored", "recorded_params", "thinned"]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What is stored of a run, by step."""

    params: list[int]
    """Steps before which the parameters are stored."""
    states: list[int]
    """Steps before which the optimizer's state is."""
    gradients: list[int] | None
    """Steps whose gradient is; None for all, one after the other."""


def as_stored(store: StoreReader, steps: range) -> Kept:
    """What a store has of some steps, and both ends of them."""

    def places(name: str) -> list[int]:
        recorded = [step for step in store.read(name).tolist() if steps.start <= step <= steps.stop]
        return sorted({steps.start, *recorded, steps.stop})

    gradients = None
    if store.has("gradient_step"):
        gradients = [step for step in store.read("gradient_step").tolist() if step in steps]
    return Kept(
        params=places("snapshot_step"),
        states=places("state_step") if store.has("state_step") else [],
        gradients=gradients,
    )


def recorded_params(record: Record, store: StoreReader, step: int) -> NDArray[Any]:
    """θ_step, `[element]`, as it was in the loop.

    Raises:
        VerificationError: it has to be replayed, and that gives something else here.
    """
    params: NDArray[Any] = record.flat_params(step).numpy()
    if store.has("digest"):
        recorded = store.read("digest", step, step + 1)[0]
        differ = (digests(record.table, params) != recorded) & (recorded >= 0)
        if differ.any():
            raise VerificationError(
                f"the parameter '{record.table.names[int(differ.argmax())]}' before step {step} has to be replayed, "
                "which gives other bits here than where it was recorded. Export the run there, or from a step before "
                "which its parameters are stored."
            )
    return params


def thinned(record: Record, store: StoreReader, steps: range, every: int, *, progress: bool) -> Kept:
    """Every K-th moment of some steps, both ends, and what a replay does not give bit for bit.

    Raises:
        StoreFormatError: the updates cannot be replayed.
        VerificationError: a step gives something else here than where it was recorded.
    """
    table = record.table
    replay = UpdateReplay.of(table, record.group_optimizers, record.device_here)
    if replay is None or record.unrecorded_state or sparse_weights(record.model):
        raise StoreFormatError(
            f"the updates of {record.optimizer} cannot be replayed, so all moments have to be stored: export the run "
            "without every=."
        )
    moments, gradients = [steps.start], list[int]()
    for step in tqdm(steps, desc="replay", unit="step", disable=None if progress else True, leave=False):
        gradient = record.flat_gradient(step)
        is_led_to = _leads_on(record, store, replay, step, gradient, from_record=step == moments[-1])
        if not is_led_to or not same_bits(record.replayed_gradient(step).numpy(), gradient.numpy()):
            gradients.append(step)
        if not is_led_to or step + 1 == steps.stop or (step + 1 - steps.start) % every == 0:
            moments.append(step + 1)
    return Kept(params=moments, states=moments, gradients=gradients)


def _leads_on(
    record: Record, store: StoreReader, replay: UpdateReplay, step: int, gradient: Tensor, *, from_record: bool
) -> bool:
    """Make an update again; returns whether it leads to the next recorded moment, bit for bit.

    Args:
        record: the run.
        store: where it is.
        replay: the optimizers, at the moment before the step.
        step: which step.
        gradient: G_s, `[element]`.
        from_record: bring them to that moment first.
    """
    table, types = record.table, record.state_types
    settings = [record.settings(step, group) for group in range(record.num_groups)]
    has = dict(zip(table.names, record.updated[step], strict=True))
    parts = table.unflatten(gradient, trained_dtype=True)
    params, target = (recorded_params(record, store, moment) for moment in (step, step + 1))
    try:
        if from_record:
            replay.load(torch.from_numpy(params), record.state(step), types, settings)
        replay.step({name: part for name, part in parts.items() if has[name]}, settings)
    except (RuntimeError, TypeError, ValueError):  # settings that JSON does not hold
        return False
    state = replay.state().decoded(table, types)
    return same_bits(replay.params.numpy(), target) and _same(state, record.state(step + 1))


def _same(one: Mapping[str, Mapping[str, Tensor]], other: Mapping[str, Mapping[str, Tensor]]) -> bool:
    """Whether two states are the same, bit for bit."""
    if any(own.keys() != other[name].keys() for name, own in one.items()):
        return False
    pairs = [(value, other[name][key]) for name, own in one.items() for key, value in own.items()]
    return all(
        a.dtype == b.dtype and same_bits(torch.atleast_1d(a).numpy(), torch.atleast_1d(b).numpy()) for a, b in pairs
    )
