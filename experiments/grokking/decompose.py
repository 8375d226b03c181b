"""The study's decompositions: by class and layer, by training example, and by single parameter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

import explaind

from .kernels import partition
from .model import layer_groups
from .phases import Phases
from .recipe import Recipe
from .scores import validation_pairs
from .sizes import Sizes

__all__ = ["by_class", "by_element", "by_example", "class_means", "kernel_machine", "open_study"]


def open_study(recipe: Recipe, store: Path) -> explaind.Run:
    """The recorded run, with the paper's layer groups."""
    run = explaind.open_run(store, model=recipe.make_model())
    run.layers = layer_groups(run.model)
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
    """Log-probability of the right answer of single validation pairs, by training example, window and layer.

    The windows hold every step, and some of them are the short ones of `kernels.windows_across`.
    """
    return run.attribute(
        validation_pairs(recipe, num=sizes.single_queries),
        by=("query", "example", "window", "layer"),
        windows=partition(phases.spans, num_steps=run.num_steps),
        tolerance=sizes.tolerance,
        out=out,
        progress=progress,
    )


def by_element(run: explaind.Run, recipe: Recipe, sizes: Sizes, out: Path, *, progress: bool) -> explaind.Attribution:
    """Log-probability of the right answer of single validation pairs, by window of steps and single parameter."""
    return run.attribute(
        validation_pairs(recipe, num=sizes.single_queries),
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
