"""Stage 2: decompose what the network learned, by class and layer, and by single training examples."""

from __future__ import annotations

from pathlib import Path

import torch

import explaind

from .model import layer_groups
from .recipes import Recipe

__all__ = ["TOLERANCE", "by_class", "by_example", "open_study"]

TOLERANCE = 1e-4
"""Wanted quadrature error, as a part of each query's path length."""

NUM_CHOSEN = 6
"""Single predictions that are explained by example."""


def open_study(recipe: Recipe, store: Path) -> explaind.Run:
    """The recorded run, with the paper's layer groups."""
    run = explaind.open_run(store, model=recipe.make_model())
    groups = layer_groups(run.model)
    # The paper's positional embedding is never read and never moves: no layer of its own.
    groups["embedding"] += groups.pop("positions", [])
    run.layers = groups
    return run


def by_class(run: explaind.Run, recipe: Recipe, *, progress: bool = True) -> explaind.Attribution:
    """Mean log-probability of the right answer per validation class, by training class, step and layer."""
    split = recipe.make_split()
    labels = split.validation_labels
    query = explaind.Query(split.validation_tokens, output=explaind.outputs.log_prob(labels))
    return run.attribute(
        query.mean(by_class=labels),
        by=("query", "group", "step", "layer"),
        groups=dict(enumerate(split.train_labels.tolist())),
        tolerance=TOLERANCE,
        progress=progress,
    )


def by_example(run: explaind.Run, recipe: Recipe, *, progress: bool = True) -> explaind.Attribution:
    """Log-probability of the right answer of a few validation pairs, by training example and step.

    The pairs are the first ones that the trained network gets right.
    """
    split = recipe.make_split()
    tokens, labels = split.validation_tokens, split.validation_labels
    trained = recipe.make_model()
    trained.load_state_dict(run.params(run.num_steps))
    with torch.no_grad():
        right = trained(tokens).argmax(dim=-1) == labels
    chosen = right.nonzero().flatten()[:NUM_CHOSEN]
    query = explaind.Query(
        tokens[chosen],
        output=explaind.outputs.log_prob(labels[chosen]),
        names=tuple(f"{a} + {b}" for a, _, b, _ in tokens[chosen].tolist()),
    )
    return run.attribute(
        query,
        by=("query", "example", "step"),
        tolerance=TOLERANCE,
        progress=progress,
    )
