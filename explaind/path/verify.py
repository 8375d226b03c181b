"""Replays a recorded run: is what the store holds, bit for bit, what the training loop did?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from explaind.errors import VerificationError
from explaind.optimizers.sparse_adam import touched_rows
from explaind.path.gradients import batch_gradient, recorded_rescaling
from explaind.replay.model import sparse_weights
from explaind.replay.updates import UpdateReplay
from explaind.run import Run
from explaind.store import decoding

__all__ = ["VerifyReport", "verify"]

_ROUNDING = 1e-3


@dataclass(frozen=True, kw_only=True, repr=False)
class VerifyReport:
    """What replaying every step gave."""

    num_steps: int
    """Steps replayed."""
    exact_gradients: int
    """Steps whose replayed gradient is the recorded one, bit for bit."""
    exact_updates: int | None
    """Steps from which torch's own optimizer makes the recorded next parameters, bit for bit; None if they
    were not replayed, as the optimizer is not one of torch.optim or has state that is not recorded."""
    first_inexact: str | None
    """The first step and tensor that differ, if any."""
    largest_gradient_difference: float
    """Largest ‖G_replayed − G_recorded‖ / ‖G_recorded‖ over the steps: rounding, or a gradient that does not
    come from the recorded examples alone (then it is in the term `other`)."""
    largest_update_difference: float
    """Largest ‖θ_replayed − θ_recorded‖ / ‖θ_recorded‖ over the steps."""

    @property
    def bit_exact(self) -> bool:
        """Whether every gradient and every update was reproduced bit for bit."""
        return self.exact_gradients == self.num_steps and self.exact_updates == self.num_steps

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        updates = (
            "not replayed (not a torch.optim optimizer, or state that is not recorded)"
            if self.exact_updates is None
            else f"{self.exact_updates:,} of {self.num_steps:,} bit for bit, largest difference "
            f"{self.largest_update_difference:.1e}"
        )
        lines = [
            f"gradients: {self.exact_gradients:,} of {self.num_steps:,} bit for bit, largest difference "
            f"{self.largest_gradient_difference:.1e}",
            f"updates:   {updates}",
        ]
        if self.first_inexact:
            lines.append(f"first difference: {self.first_inexact}")
        return "\n".join(lines)


def verify(run: Run, *, progress: bool = False) -> VerifyReport:
    """Replay each step from the record: the gradient from its batch, the update through the real optimizer.

    Raises:
        VerificationError: an update does not lead to the recorded parameters, beyond rounding.
        DamagedStoreError: an array of the store is missing or fails its checksum.
        ValueError: the run was opened without a model.
    """
    exact_gradients = exact_updates = 0
    gradient_difference = update_difference = 0.0
    first: str | None = None
    updates = None if run.unrecorded_state else UpdateReplay.of(run.table, run.group_optimizers, run.device_here)
    for step in tqdm(range(run.num_steps), desc="verify", unit="step", disable=None if progress else True):
        recorded = run.flat_gradient(step)
        replayed = batch_gradient(run, step)
        replayed = recorded_rescaling(run, step, replayed).apply(replayed).to(recorded.dtype)
        gradient_difference = max(gradient_difference, _relative(replayed - recorded, recorded))
        if torch.equal(replayed, recorded):
            exact_gradients += 1
        elif first is None:
            first = f"the gradient of {_first_difference(run, replayed, recorded)} at step {step}"
        if updates is None:
            continue
        target = run.flat_params(step + 1)
        reached = _replay_update(run, step, updates)
        difference = _relative(reached - target, target)
        update_difference = max(update_difference, difference)
        if torch.equal(reached, target):
            exact_updates += 1
            continue
        where = f"{_first_difference(run, reached, target)} after step {step}"
        if difference > _ROUNDING:
            raise VerificationError(
                f"the replayed {run.optimizer} does not reach the recorded parameters: {where} differs, ‖difference‖ / "
                f"‖θ‖ = {difference:.1e}. The parameters were changed between the steps, or the store is not that run."
            )
        first = first or where
    return VerifyReport(
        num_steps=run.num_steps,
        exact_gradients=exact_gradients,
        exact_updates=None if updates is None else exact_updates,
        first_inexact=first,
        largest_gradient_difference=gradient_difference,
        largest_update_difference=update_difference,
    )


def _replay_update(run: Run, step: int, replay: UpdateReplay) -> Tensor:
    """θ_{step+1} as torch's optimizers make it from the recorded θ, state, settings and gradient."""
    settings = [run.settings(step, group) for group in range(run.num_groups)]
    state, sparse = run.state(step), sparse_weights(run.model)
    gradients = run.table.unflatten(run.flat_gradient(step), trained_dtype=True)
    gradients = {name: gradients[name] for name, has in zip(gradients, run.updated[step], strict=True) if has}
    for name, gradient in gradients.items():
        if replay.needs_sparse(name) or (replay.may_be_sparse(name) and name in sparse):
            rows = touched_rows(gradient, state[name], run.state(step + 1)[name]).any(dim=1).nonzero()
            gradients[name] = torch.sparse_coo_tensor(
                rows.T, gradient[rows[:, 0]], gradient.shape, is_coalesced=True, check_invariants=True
            )
    params = run.flat_params(step)
    with decoding(f"the optimizer at step {step}", run.path):
        replay.load(params, state, run.state_types, settings)
        replay.step(gradients, settings)
    return replay.params


def _relative(difference: Tensor, reference: Tensor) -> float:
    """‖difference‖ / ‖reference‖ in float64."""
    size = float(difference.to(torch.float64).norm())
    return size / max(float(reference.to(torch.float64).norm()), 1e-300) if size else 0.0


def _first_difference(run: Run, one: Tensor, other: Tensor) -> str:
    position = int((one != other).nonzero()[0])
    return next(f"'{p.name}'" for p in run.table if p.slice.start <= position < p.slice.stop)
