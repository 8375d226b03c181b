"""Stage 1: train the recipe with an ordinary loop, traced; an interrupted training goes on where it was."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import explaind

from .recipes import Recipe
from .task import Split

__all__ = ["Curves", "evaluate", "train"]

COLUMNS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "parameter_norm")


class Curves:
    """The learning curves of a run so far, kept with it: a row before each step and one after the last."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        """The rows as numbers."""
        return {"rows": torch.tensor([[row[name] for name in COLUMNS] for row in self.rows], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the rows over."""
        self.rows = [dict(zip(COLUMNS, row, strict=True)) for row in state["rows"].tolist()]

    @property
    def accuracies(self) -> list[tuple[float, float]]:
        """Training and validation accuracy after each step."""
        return [(row["train_accuracy"], row["validation_accuracy"]) for row in self.rows[1:]]


def train(recipe: Recipe, store: Path, *, progress: bool = True) -> pd.DataFrame:
    """Train once, recording every step; a run that is at `store` unfinished is continued.

    Args:
        recipe: what to train.
        store: where the recorded run goes.
        progress: show a progress bar.

    Returns:
        Loss (nats) and accuracy on both sets, and the parameter norm, before each step and after the last: one row
        per `step` from 0 to the number of steps.
    """
    split, model, curves = recipe.make_split(), recipe.make_model(), Curves()
    optimizer = recipe.make_optimizer(model)
    shuffle = torch.Generator().manual_seed(recipe.seed)
    with explaind.trace(
        model, optimizer, store, resume=True, snapshot_every=recipe.snapshot_every, metadata={"recipe": str(recipe)}
    ) as recorder:
        recorder.keep(shuffle, curves)
        first = recorder.restore()
        curves.rows = curves.rows[: first + 1] or [evaluate(model, split)]
        steps: Iterable[int] = range(first, recipe.max_steps)
        for _ in tqdm(steps, "train", recipe.max_steps, initial=first, unit="step", disable=None if progress else True):
            if recipe.stop.met(curves.accuracies):
                break
            order = torch.randperm(recipe.num_train, generator=shuffle)
            recorder.examples(order)
            optimizer.zero_grad()
            loss = F.nll_loss(model(split.train_tokens[order]), split.train_labels[order])
            loss.backward()
            recorder.log(loss=loss)
            optimizer.step()
            curves.rows.append(evaluate(model, split))
    return pd.DataFrame(curves.rows).rename_axis("step")


def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """One row of the learning curves."""
    sets: dict[str, tuple[Tensor, Tensor]] = {
        "train": (split.train_tokens, split.train_labels),
        "validation": (split.validation_tokens, split.validation_labels),
    }
    row: dict[str, float] = {}
    with torch.no_grad():
        for name, (tokens, labels) in sets.items():
            log_probs = model(tokens)
            row[f"{name}_loss"] = float(F.nll_loss(log_probs, labels))
            row[f"{name}_accuracy"] = float((log_probs.argmax(dim=-1) == labels).double().mean())
        row["parameter_norm"] = float(sum(parameter.square().sum() for parameter in model.parameters())) ** 0.5
    return row
