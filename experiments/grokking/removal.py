"""The last steps of the training made again, with or without an example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import explaind

from .recipes import Recipe

__all__ = ["replay_difference", "retrain_window"]

_NO_LABEL = -100
"""A target that `nll_loss` leaves out."""


def retrain_window(
    recipe: Recipe, run: explaind.Run, *, num_steps: int, without: int | None = None
) -> dict[str, Tensor]:
    """θ_S of another training: the last steps made again from the snapshot, in the same order, without an example.

    Weights and optimizer state before step S − num_steps are those recorded. The example's term of the loss is zero in
    every batch, whose divisor stays. Without a removal these are the recorded weights; see `replay_difference`.

    Args:
        recipe: that the run was trained by.
        run: the recorded run.
        num_steps: how many of the last steps.
        without: id of the example to leave out, its place in the training set.

    Raises:
        ValueError: the run has not so many steps, or no example of that id.
    """
    if not 1 <= num_steps <= run.num_steps:
        raise ValueError(f"num_steps must be from 1 to the run's {run.num_steps}; got {num_steps}.")
    if without is not None and without not in run.examples:
        raise ValueError(f"there is no example {without} in the run; its ids go up to {run.examples.max()}.")
    split, model = recipe.make_split(), recipe.make_model()
    optimizer = recipe.make_optimizer(model)
    first = run.num_steps - num_steps
    parameters, weights = dict(model.named_parameters()), run.params(first)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for name, entries in run.state(first).items():
        optimizer.state[parameters[name]] = {key: entry.clone() for key, entry in entries.items()}
    for step in range(first, run.num_steps):
        order = torch.from_numpy(run.call_examples(step))
        targets = split.train_labels[order]
        if without is not None:
            targets = targets.masked_fill(order == without, _NO_LABEL)
        optimizer.zero_grad()
        losses = F.nll_loss(model(split.train_tokens[order]), targets, ignore_index=_NO_LABEL, reduction="sum")
        (losses / len(order)).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


def replay_difference(recipe: Recipe, run: explaind.Run, *, num_steps: int) -> float:
    """Largest difference between the recorded final weights and those of the last steps made again, removing nothing.

    It is 0, bit for bit, on the machine and with the number of threads that the run was trained with.
    """
    again, recorded = retrain_window(recipe, run, num_steps=num_steps), run.params(run.num_steps)
    return max(float((again[name] - recorded[name]).abs().max()) for name in recorded)
