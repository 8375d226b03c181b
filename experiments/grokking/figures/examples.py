"""Single predictions and the training pairs behind them."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from explaind import Attribution
from explaind.plots import plot_examples

from ..recipe import Recipe

__all__ = ["top_examples"]


def top_examples(examples: Attribution, recipe: Recipe, *, most: int = 6) -> Figure:
    """The training pairs that raised and lowered each chosen prediction most.

    Args:
        examples: by query and example, of the first validation pairs.
        recipe: that was trained.
        most: how many predictions.
    """
    split, task = recipe.make_split(), recipe.task
    names = examples.dataset["query"].values.tolist()[:most]
    figure, grid = plt.subplots(2, -(-len(names) // 2), figsize=(13, 8.5), layout="constrained", squeeze=False)

    def text(example: int) -> str:
        return f"{task.text(split.train_tokens[int(example)])} = {int(split.train_labels[int(example)])}"

    answers = split.validation_labels.tolist()
    for axes, name, answer in zip(grid.flat, names, answers, strict=False):
        plot_examples(examples, query=name, num=6, label=text, ax=axes)
        axes.set_title(f"{name} = {answer}")
        axes.set_xlabel("contribution to the\nlog-probability (nats)")
        axes.set_ylabel("")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.suptitle("Training pairs that raised (blue) and lowered (orange, hatched) a validation prediction most")
    return figure
