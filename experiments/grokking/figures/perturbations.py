"""Scores against what changes when their example or weight is taken away."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from explaind.plots.style import LOWERED, RAISED

from ..perturbations import correlations

__all__ = ["perturbed_predictions"]

_LETTERS_PER_INCH = 13
_CAPTION = (
    "Horizontal, the additive reading: what the gradients of the example, or the movement of the element, added to the "
    "prediction along the training as it was. Such parts of all steps, with weight decay and the initial value, sum to "
    "the prediction.",
    "Vertical, the counterfactual reading: the prediction minus that of the network without it, whose last steps were "
    "trained again with the example's loss at zero, or whose element was set to zero in the end.",
    "Grey, where both are equal. They part where the rest of the training answers to the removal, and where zero is "
    "far from where the element began.",
)


def perturbed_predictions(perturbed: pd.DataFrame, *, unit: str = "nats") -> Figure:
    """A scatter of score and change for every kind of perturbation, with its correlations.

    Args:
        perturbed: what `experiments.grokking.perturbations.perturb_examples` and `perturb_elements` returned, joined.
        unit: of the queries.
    """
    kinds = list(dict.fromkeys(zip(perturbed["kind"], perturbed["num_steps"], strict=True)))
    found = correlations(perturbed)
    every = found[found["chosen"] == "all"].set_index(["kind", "num_steps"])
    figure, panels = plt.subplots(1, len(kinds), figsize=(4.8 * len(kinds), 6), layout="constrained", squeeze=False)
    for axes, (kind, num_steps) in zip(panels[0], kinds, strict=True):
        part = perturbed[(perturbed["kind"] == kind) & (perturbed["num_steps"] == num_steps)]
        _scatter(axes, part)
        pearson, spearman = every.loc[(kind, num_steps), ["pearson", "spearman"]]
        what = (
            f"training examples, last {num_steps} step{'s' if num_steps > 1 else ''}"
            if kind == "example"
            else f"parameter elements, all {num_steps} steps"
        )
        axes.set_title(f"{what}\nPearson {pearson:.3f}, Spearman {spearman:.3f}", fontsize="medium")
        axes.set_xlabel(f"score ({unit})")
        axes.locator_params(axis="x", nbins=5)
    panels[0, 0].set_ylabel(f"change of the prediction: with − without ({unit})")
    panels[0, 0].legend(fontsize="small", markerscale=2)
    figure.suptitle("Do high scores matter? Each point is a prediction and what was taken away from it")
    width = round(_LETTERS_PER_INCH * figure.get_figwidth())
    caption = "\n".join(textwrap.fill(sentence, width) for sentence in _CAPTION)
    figure.supxlabel(caption, fontsize="small", x=0.01, ha="left")
    return figure


def _scatter(axes: Axes, part: pd.DataFrame) -> None:
    for chosen, colour, marker in (("top", LOWERED, "."), ("random", RAISED, "x")):
        points = part[part["chosen"] == chosen]
        label = f"{points['item'].nunique()} {chosen}" + ("" if chosen == "random" else "-scored")
        size = 12 if marker == "." else 8
        axes.scatter(
            points["score"], points["change"], s=size, c=colour, marker=marker, linewidth=0.6, label=label, alpha=0.6
        )
    axes.axline((0, 0), slope=1, color="0.6", linewidth=0.8, zorder=0)
    axes.axhline(0, color="black", linewidth=0.5, zorder=0)
    axes.axvline(0, color="black", linewidth=0.5, zorder=0)
    for set_limits, values in ((axes.set_xlim, part["score"]), (axes.set_ylim, part["change"])):
        limit = 1.05 * float(values.abs().max()) or 1.0
        set_limits(-limit, limit)
