"""Layers and phases over tasks and seeds: `python -m experiments.grokking.across --recipe quick --out DIR`."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import explaind
from explaind.plots import save_figure
from explaind.plots.saving import Data
from explaind.threads import num_threads

from .decompose import open_study
from .figures.across import layer_shares
from .figures.stability import change_points_over_seeds
from .layer_tables import layers_by_phase, layers_by_step
from .phases import Phases, find_phases
from .recipe import Recipe
from .recipes import RECIPES
from .stability import BOUNDARIES, POINTS, find_change_points, recurring, verdicts
from .summary import in_markdown
from .task import TASKS
from .training import train

__all__ = ["across", "by_layer", "follow", "main", "run_row"]

TOLERANCE = 1e-2
"""Wanted quadrature error, as a part of each query's path length; shares of layers need no more."""

CLASSES, PAIRS_PER_CLASS = 31, 3
"""At most so many answers, evenly spaced, and validation pairs for each, on average: the cost grows with them."""


def by_layer(recipe: Recipe, store: Path) -> explaind.Attribution:
    """Mean log-probability of the right answer per validation class, by step and layer group."""
    split, cycle = recipe.make_split(), torch.tensor(recipe.task.cycle)
    spaced = torch.linspace(0, len(cycle) - 1, min(CLASSES, len(cycle))).round().to(torch.int64)
    chosen = torch.isin(split.validation_labels, cycle[spaced]).nonzero()[: PAIRS_PER_CLASS * len(spaced), 0]
    tokens, labels = split.validation_tokens[chosen], split.validation_labels[chosen]
    query = explaind.Query(tokens, output=explaind.outputs.log_prob(labels)).mean(by_class=labels)
    return open_study(recipe, store).attribute(query, by=("query", "step", "layer"), tolerance=TOLERANCE)


def run_row(curves: pd.DataFrame, phases: Phases, result: explaind.Attribution) -> pd.DataFrame:
    """When one run reached what, and the certificate of its decomposition: one row."""
    closure = result.closure
    return pd.DataFrame(
        [
            {
                "memorised": phases.memorised,
                "half_generalised": phases.half_generalised,
                "generalised": phases.generalised,
                "num_steps": phases.end,
                "validation_accuracy_when_memorised": curves["validation_accuracy"].iloc[phases.memorised],
                "final_validation_accuracy": curves["validation_accuracy"].iloc[-1],
                "closure_error": closure.error,
                "quadrature_error": closure.quadrature,
                "other": closure.other,
                "rounding": closure.rounding,
            }
        ]
    )


def follow(recipe: Recipe, directory: Path) -> None:
    """Train one run, decompose it and leave `run.csv`, `steps.csv` and `layers.csv`; the recorded run is not kept.

    A run that does not grok leaves a `run.csv` that only says why not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    store = directory / "run.zarr"
    curves = train(recipe, store, progress=False)
    try:
        phases = find_phases(curves)
    except ValueError as failure:
        row = pd.DataFrame([{"failure": str(failure)}])
    else:
        result = by_layer(recipe, store)
        result.check()
        row = run_row(curves, phases, result)
        steps = layers_by_step(result)
        steps.to_csv(directory / "steps.csv", index=False)
        named(layers_by_phase(steps, phases), recipe).to_csv(directory / "layers.csv", index=False)
    shutil.rmtree(store)
    write(named(row, recipe), directory / "run.csv")


def named(table: pd.DataFrame, recipe: Recipe) -> pd.DataFrame:
    """The table with the run that it is of in front of every row."""
    for name, value in (("seed", recipe.seed), ("architecture", recipe.architecture), ("task", recipe.operation)):
        table.insert(0, name, value)
    return table


def across(
    recipe: str, tasks: Sequence[str], seeds: int, directory: Path, *, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Follow every task and seed that has not been followed yet.

    Args:
        recipe: Name of a recipe.
        tasks: Names of tasks.
        seeds: How many, from 0.
        directory: Where each run's tables are kept.
        progress: Show a progress bar.

    Returns:
        The runs, one row for each task and seed; what was done through the layers, one for each task, seed, phase and
        layer; and the change points of the layers' shares, one for each task, seed and change point.

    Raises:
        ValueError: a directory holds a run of another recipe.
    """
    recipes = [RECIPES[recipe](seed, task=task) for seed in range(seeds) for task in tasks]
    places = [directory / f"{chosen.operation}-{chosen.seed}" for chosen in recipes]
    for chosen, place in zip(recipes, places, strict=True):
        mark = place / "recipe.txt"
        if mark.is_file() and mark.read_text() != str(chosen):
            raise ValueError(f"{place} holds a run of another recipe. Choose another --out.")
        place.mkdir(parents=True, exist_ok=True)
        mark.write_text(str(chosen))
    bar = tqdm(list(zip(recipes, places, strict=True)), desc="runs", disable=None if progress else True)
    for chosen, place in bar:
        bar.set_postfix_str(place.name)
        if not (place / "run.csv").is_file():
            follow(chosen, place)
        if (place / "steps.csv").is_file() and not (place / "change_points.csv").is_file():
            found = find_change_points(pd.read_csv(place / "steps.csv"))
            write(named(found, chosen), place / "change_points.csv")
    points = joined(places, "change_points.csv").reindex(columns=POINTS)
    return joined(places, "run.csv"), joined(places, "layers.csv"), points


def joined(places: Sequence[Path], name: str) -> pd.DataFrame:
    """The tables of this name of all runs that have one, below each other; without rows if none has any."""
    tables = [pd.read_csv(place / name) for place in places if (place / name).is_file()]
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else pd.DataFrame()


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a table so that it is whole if it is there."""
    unfinished = path.with_suffix(".partial")
    table.to_csv(unfinished, index=False)
    unfinished.rename(path)


def save(figure: Figure, path: Path, data: Data | dict[str, Data]) -> None:
    """Save a figure with its data, and let go of it."""
    save_figure(figure, path, data=data)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Follow what is left, and write `across.md`, `runs.csv` and `layers.csv`, and the figures with their data."""
    options = parse(arguments)
    directory: Path = options.out
    try:
        with num_threads(1):  # as no run should depend on the number of cores
            runs, layers, points = across(
                options.recipe, options.tasks, options.seeds, directory, progress=not options.quiet
            )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on with the run that was interrupted.\n")
        return 130
    runs.to_csv(directory / "runs.csv", index=False)
    if len(layers):
        layers.to_csv(directory / "layers.csv", index=False)
        points = recurring(points, runs)
        stability = verdicts(points, runs)
        page = in_markdown(runs, layers, points, stability)
        reached = runs[["task", "architecture", "seed", *BOUNDARIES, "num_steps"]]
        found: dict[str, Data] = {"found": points, "reached": reached, "stability": stability}
        save(layer_shares(layers), directory / "layer_shares", layers)
        save(change_points_over_seeds(points, runs, stability), directory / "change_points", found)
    else:
        page = in_markdown(runs, layers)
    (directory / "across.md").write_text(page)
    sys.stdout.write(f"read {directory / 'across.md'}\n")
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.grokking.across",
        description="Train every task with several seeds, say through which layers the training examples acted in each "
        "phase, and whether the phases that a statistic finds are the same for all seeds. Runs that are done already "
        "are not run again.",
    )
    parser.add_argument("--recipe", choices=RECIPES, default="quick", help="what to train (default: quick)")
    parser.add_argument("--tasks", type=names, default=list(TASKS), help=f"with commas (default: {','.join(TASKS)})")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds, from 0 (default: 5)")
    parser.add_argument("--out", type=Path, required=True, help="directory for tables and figure")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def names(text: str) -> list[str]:
    """Names of tasks out of `addition,division`."""
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"there is no task {unknown[0]!r}; the tasks are {', '.join(TASKS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
