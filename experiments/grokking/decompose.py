"""Stage 2: what the network learned as sums: by class and layer, by training example, and by single parameter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

import explaind

from .model import layer_groups
from .phases import Phases
from .recipes import Recipe
from .sizes import Sizes

__all__ = ["by_class", "by_element", "by_example", "kernel_machine", "open_study", "right_pairs"]


def open_study(recipe: Recipe, store: Path) -> explaind.Run:
    """The recorded run, with the paper's layer groups."""
    run = explaind.open_run(store, model=recipe.make_model())
    groups = layer_groups(run.model)
    # The paper's positional embedding is never read and never moves: no layer of its own.
    groups["embedding"] += groups.pop("positions", [])
    run.layers = groups
    return run


def by_class(run: explaind.Run, recipe: Recipe, sizes: Sizes, out: Path, *, progress: bool) -> explaind.Attribution:
    """Mean log-probability of the right answer per validation class, by training class, step and layer."""
    return run.attribute(
        class_means(recipe),
        by=("query", "group", "step", "layer"),
        groups=dict(enumerate(recipe.make_split().train_labels.tolist())),
        tolerance=sizes.tolerance,
        out=out,
        progress=progress,
    )


def by_example(
    run: explaind.Run, recipe: Recipe, sizes: Sizes, phases: Phases, out: Path, *, progress: bool
) -> explaind.Attribution:
    """Log-probability of the right answer of single validation pairs, by training example, phase and layer."""
    split, chosen = recipe.make_split(), right_pairs(run, recipe, sizes.single_queries)
    return run.attribute(
        explaind.Query(
            split.validation_tokens[chosen],
            output=explaind.outputs.log_prob(split.validation_labels[chosen]),
            names=chosen.tolist(),
        ),
        by=("query", "example", "window", "layer"),
        windows=phases.spans,
        tolerance=sizes.tolerance,
        out=out,
        progress=progress,
    )


def by_element(run: explaind.Run, recipe: Recipe, sizes: Sizes, out: Path, *, progress: bool) -> explaind.Attribution:
    """Mean log-probability of the right answer per validation class, by window of steps and single parameter."""
    return run.attribute(
        class_means(recipe),
        by=("query", "window", "element"),
        windows=sizes.window,
        tolerance=sizes.tolerance,
        out=out,
        progress=progress,
    )


def kernel_machine(run: explaind.Run, recipe: Recipe, sizes: Sizes) -> pd.DataFrame:
    """How far the kernel machine of the run is from the network: one row."""
    pairs = recipe.make_split().validation_tokens[: sizes.machine_inputs]
    fit = explaind.PathKernelModel(run, tolerance=sizes.tolerance).compare(pairs)
    return pd.DataFrame([vars(fit)])


def class_means(recipe: Recipe) -> explaind.Query:
    """The mean log-probability of the right answer, a query per validation class."""
    split = recipe.make_split()
    labels = split.validation_labels
    return explaind.Query(split.validation_tokens, output=explaind.outputs.log_prob(labels)).mean(by_class=labels)


def right_pairs(run: explaind.Run, recipe: Recipe, number: int) -> torch.Tensor:
    """The first validation pairs that the trained network gets right, as positions `[query]`."""
    split, trained = recipe.make_split(), recipe.make_model()
    trained.load_state_dict(run.params(run.num_steps))
    with torch.no_grad():
        right = trained(split.validation_tokens).argmax(dim=-1) == split.validation_labels
    return right.nonzero().flatten()[:number]
