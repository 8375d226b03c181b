"""What a fresh network learns when some of its layers are given: which part of a grokked network is the hard one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F

import explaind
from explaind.agreement import accuracy
from explaind.evaluation import evaluate
from explaind.interventions import transplant

from .model import OUTER, PIPELINE
from .phases import Phases
from .recipes import Recipe

__all__ = ["Condition", "conditions", "first_epochs", "retrain"]


@dataclass(frozen=True, kw_only=True)
class Condition:
    """Which layers the fresh network is given."""

    name: str
    """Name in tables and legends."""
    layers: tuple[str, ...]
    """The layers that are copied; none for the control."""
    step: int
    """The checkpoint that they come from."""


def conditions(curves: pd.DataFrame, phases: Phases) -> tuple[Condition, ...]:
    """The paper's two directions, and controls that tell grokked layers from trained ones, and from none.

    Modulo 113, validation accuracy rises before all training pairs are memorised; when half of them are, not yet.

    Args:
        curves: learning curves, one row per step; gives when training accuracy first was 0.5.
        phases: of the same run.
    """
    half = int((curves["train_accuracy"] >= 0.5).to_numpy().argmax())
    return (
        Condition(name="grokked outer layers", layers=OUTER, step=phases.end),
        Condition(name="grokked pipeline", layers=PIPELINE, step=phases.end),
        Condition(name="memorised outer layers", layers=OUTER, step=phases.memorised),
        Condition(name="half-memorised outer layers", layers=OUTER, step=half),
        Condition(name="nothing", layers=(), step=0),
    )


def retrain(recipe: Recipe, run: explaind.Run, condition: Condition, *, seed: int, epochs: int) -> pd.DataFrame:
    """Copy layers of a checkpoint, draw all other weights from 0.1 · N(0, 1), and train everything by the recipe.

    The same seed draws the same weights in every condition. Every epoch is one step on the whole training set.

    Args:
        recipe: gives task, architecture and optimizer.
        run: the recorded run that the layers come from.
        condition: which layers, of which step.
        seed: of the drawn weights.
        epochs: how long to train; always to the end, so that the seeds can be averaged.

    Returns:
        One row per epoch and part of the data: `condition`, `seed`, `epoch` (0 is before the first step), `split`
        ("train" or "validation") and `accuracy`.
    """
    split, model = recipe.make_split(), recipe.make_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    transplant(run, condition.layers, step=condition.step, model=model)
    optimizer = recipe.make_optimizer(model)
    rows = []
    for epoch in range(epochs + 1):
        optimizer.zero_grad()
        log_probs = model(split.train_tokens)
        validation = evaluate(model, {}, split.validation_tokens)
        for name, outputs, labels in (
            ("train", log_probs, split.train_labels),
            ("validation", validation, split.validation_labels),
        ):
            rows.append({"epoch": epoch, "split": name, "accuracy": accuracy(outputs, labels)})
        if epoch < epochs:
            F.nll_loss(log_probs, split.train_labels).backward()
            optimizer.step()
    curves = pd.DataFrame(rows)
    curves.insert(0, "seed", seed)
    curves.insert(0, "condition", condition.name)
    return curves


def first_epochs(parts: Iterable[pd.DataFrame], *, least: float = 0.99) -> pd.DataFrame:
    """When each network first reached a validation accuracy, and where it ended.

    Returns:
        One row per `condition` and `seed`: the `last_accuracy`, and the first `epoch` (NaN if there is none).
    """
    joined = pd.concat(list(parts), ignore_index=True)
    validation = joined[joined["split"] == "validation"].sort_values("epoch", kind="stable")
    networks = validation.groupby(["condition", "seed"], sort=False)
    last = networks["accuracy"].last().rename("last_accuracy").reset_index()
    reached = validation[validation["accuracy"] >= least].groupby(["condition", "seed"])["epoch"].first()
    return last.merge(reached.reset_index(), how="left", on=["condition", "seed"])
