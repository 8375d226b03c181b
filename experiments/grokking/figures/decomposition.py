"""Stage 3: the pictures of the study, one function each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # figures go to files, also where there is no screen

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from explaind import Attribution
from explaind.plots import plot_examples, plot_heatmap
from explaind.plots.style import line_styles

from ..measures import class_difference_profile, layer_influence, smooth, step_sizes
from ..phases import Phases
from ..task import Split

__all__ = ["draw_all"]

_BANDS = {"memorisation": "#f0e6d2", "circuit formation": "#dbe7f3", "generalisation": "#dff0e3"}


def draw_all(
    curves: pd.DataFrame, phases: Phases, classes: Attribution, examples: Attribution, split: Split, directory: Path
) -> list[Path]:
    """Draw and save every figure as PNG; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Callable[[], Figure]] = {
        "training_curves": lambda: training_curves(curves, phases),
        "data_and_decay": lambda: data_and_decay(classes, phases),
        "layer_influence": lambda: layers_over_steps(classes, phases),
        "top_examples": lambda: top_examples(examples, split),
        "kernel_by_class": lambda: kernel_by_class(classes, phases),
        "certificate": lambda: certificate(classes, phases),
    }
    files = []
    for name, draw in figures.items():
        figure = draw()
        files.append(directory / f"{name}.png")
        figure.savefig(files[-1], dpi=150)
        plt.close(figure)
    return files


def training_curves(curves: pd.DataFrame, phases: Phases) -> Figure:
    """Accuracy, loss and parameter norm before every step."""
    figure, (accuracy, loss, norm) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    for axes, what, label in ((accuracy, "accuracy", "accuracy"), (loss, "loss", "loss (nats)")):
        for name, style in line_styles(["train", "validation"]).items():
            axes.plot(curves.index, curves[f"{name}_{what}"], label={"train": "training"}.get(name, name), **style)
        axes.set_ylabel(label)
    loss.set_yscale("log")
    norm.plot(curves.index, curves["parameter_norm"], color="black")
    norm.set_ylabel("parameter norm ‖θ‖")
    norm.set_xlabel("optimizer step (= epoch, full batch)")
    for axes in (accuracy, loss, norm):
        shade(axes, phases)
    name_phases(accuracy, phases)
    accuracy.legend(loc="center right")
    figure.suptitle("First the training set is memorised, then validation follows: grokking")
    return figure


def data_and_decay(classes: Attribution, phases: Phases) -> Figure:
    """How much the gradients and the weight decay of each step moved the predictions."""
    sizes = step_sizes(classes.dataset)
    figure, (size, total) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, layout="constrained")
    styles = line_styles(["training examples", "weight decay"])
    for (name, style), term in zip(styles.items(), ("contribution", "decay"), strict=True):
        size.plot(sizes["step"], smooth(sizes[term]), label=name, **style)
        moved = classes.dataset[term]
        moved = moved.sum([dim for dim in moved.dims if dim not in ("query", "step")]).mean("query")
        total.plot(moved["step"], moved.cumsum("step"), label=name, **style)
    size.set_yscale("log")
    size.set_ylabel("mean |change| per step (nats)\n5-step mean")
    total.axhline(0, color="black", linewidth=0.8)
    total.set_ylabel("running total, mean over\nvalidation classes (nats)")
    total.set_xlabel("optimizer step")
    for axes in (size, total):
        shade(axes, phases)
    name_phases(size, phases)
    size.legend(loc="upper right")
    figure.suptitle("What the data and the weight decay did to the validation log-probabilities")
    return figure


def layers_over_steps(classes: Attribution, phases: Phases) -> Figure:
    """Absolute contributions through each layer group, and their shares."""
    influence = layer_influence(classes.dataset)
    figure, (size, share) = plt.subplots(2, 1, figsize=(8, 7.5), sharex=True, layout="constrained")
    names = influence["layer"].values.tolist()
    shares = smooth(influence) / smooth(influence).sum("layer")
    for name, style in line_styles(names).items():
        size.plot(influence["step"], smooth(influence).sel(layer=name), label=name, **style)
        share.plot(influence["step"], shares.sel(layer=name), **style)
    size.set_yscale("log")
    size.set_ylabel("Σ |contribution| (nats)\nper step, 5-step mean")
    share.set_ylabel("share of the layer group")
    share.set_ylim(0, None)
    share.set_xlabel("optimizer step")
    for axes in (size, share):
        shade(axes, phases)
    name_phases(size, phases)
    size.legend(fontsize="small", ncols=2, loc="upper right")
    figure.suptitle("Through which layers the training examples act")
    return figure


def top_examples(examples: Attribution, split: Split) -> Figure:
    """The training pairs that raised and lowered each chosen prediction most."""
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


def kernel_by_class(classes: Attribution, phases: Phases) -> Figure:
    """Kernel mass between validation and training classes, in each phase, and its profile over differences."""
    kernel = classes.dataset.contribution.sum("layer")
    spans = phases.spans
    figure, grid = plt.subplots(2, len(spans), figsize=(4.6 * len(spans), 8), layout="constrained", squeeze=False)
    for column, (name, span) in enumerate(spans.items()):
        part = kernel.sel(step=slice(span.start, span.stop - 1)).sum("step")
        part = part.rename({"query": "validation class (a + b) mod p", "group": "training class (a + b) mod p"})
        heat, profile = grid[:, column]
        plot_heatmap(part.rename("contribution (nats)"), ax=heat)
        heat.set_title(f"{name}\nsteps {span.start}–{span.stop - 1}")
        differences = class_difference_profile(kernel.sel(step=slice(span.start, span.stop - 1)).sum("step"))
        profile.bar(differences["difference"], differences, color="#0072B2", width=0.8)
        profile.axhline(0, color="black", linewidth=0.8)
        profile.set_xlabel("training class − validation class (mod p)")
        profile.set_ylabel("mean contribution (nats)" if column == 0 else "")
    figure.suptitle(
        "Path kernel between classes, weighted as in the run: examples of the right class raise, the others lower"
    )
    return figure


def certificate(classes: Attribution, phases: Phases) -> Figure:
    """The measured error of every step's path integral, beside the change that it explains."""
    data = classes.dataset
    residual = abs(data.quadrature).mean("query")
    terms = [data[name] for name in ("contribution", "decay", "other", "rounding")]
    change = sum(abs(term.sum([d for d in term.dims if d not in ("query", "step")])).mean("query") for term in terms)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    styles = line_styles(["explained: Σ |terms|", "unexplained: |measured quadrature error|"])
    for (name, style), line in zip(styles.items(), (change, residual), strict=True):
        axes.plot(line[line.dims[0]], line, label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("nats per step, mean over queries")
    shade(axes, phases)
    axes.legend()
    closure = classes.closure
    axes.set_title(
        f"The certificate: terms sum to the prediction within {closure.error:.0e} of their absolute sum,\n"
        f"total quadrature error at most {closure.quadrature:.0e} of a query's path"
    )
    return figure


def shade(axes: Axes, phases: Phases) -> None:
    """Colour the phases behind a curve."""
    for name, span in phases.spans.items():
        axes.axvspan(span.start, span.stop, color=_BANDS[name], zorder=0, linewidth=0)
    axes.set_xlim(0, phases.end)


def name_phases(axes: Axes, phases: Phases) -> None:
    """Write each phase's name above its band."""
    for name, span in phases.spans.items():
        axes.annotate(
            name.replace(" ", "\n"),
            ((span.start + span.stop) / 2, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="small",
        )


def answer(name: str, modulus: int) -> int:
    """The right answer to a query called "a + b"."""
    a, b = (int(part) for part in name.split("+"))
    return (a + b) % modulus
