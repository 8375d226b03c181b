"""Single predictions and the training pairs behind them."""

from __future__ import annotations

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from explaind import Attribution
from explaind.plots import plot_examples

from ..task import Split

__all__ = ["top_examples"]


def top_examples(examples: Attribution, split: Split) -> Figure:
    """The training pairs that raised and lowered each chosen prediction most.

    Args:
        examples: by query and example, with queries called "a + b".
        split: the tokens of the examples.
    """
    names = examples.dataset["query"].values.tolist()
    figure, grid = plt.subplots(2, -(-len(names) // 2), figsize=(13, 8.5), layout="constrained", squeeze=False)
    tokens, labels = split.train_tokens, split.train_labels

    def text(example: int) -> str:
        a, _, b, _ = tokens[int(example)].tolist()
        return f"{a} + {b} = {int(labels[int(example)])}"

    for axes, name in zip(grid.flat, names, strict=False):
        plot_examples(examples, query=name, num=6, label=text, ax=axes)
        axes.set_title(f"{name} = {answer(name, int(labels.max()) + 1)}")
        axes.set_xlabel("contribution to the\nlog-probability (nats)")
        axes.set_ylabel("")
    for axes in grid.flat[len(names) :]:
        axes.set_visible(False)
    figure.suptitle("Training pairs that raised (blue) and lowered (orange, hatched) a validation prediction most")
    return figure


def answer(name: str, modulus: int) -> int:
    """The right answer to a query called "a + b"."""
    a, b = (int(part) for part in name.split("+"))
    return (a + b) % modulus
