"""Phases of a run behind curves over its steps."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from explaind.plots.style import axes_or_new

__all__ = ["plot_phases"]

_BANDS = ("#f0e6d2", "#dbe7f3", "#dff0e3", "#f3e0e8", "#e8e8e8")


def plot_phases(phases: Mapping[str, range | slice], *, names: bool = True, ax: Axes | None = None) -> Axes:
    """Shaded bands with their names above; a dotted line where one phase follows another.

    Args:
        phases: first step and the one after the last of each, `{name: range(start, stop)}`.
        names: write them.
        ax: where to draw; its limits become those of the phases.

    Raises:
        ValueError: there is none, or one has no first or last step.

    Example:
        >>> axes = plot_phases({"memorisation": range(0, 60), "generalisation": range(60, 200)})
        >>> axes.get_xlim()
        (np.float64(0.0), np.float64(200.0))
    """
    for name, span in phases.items():
        if span.start is None or span.stop is None:
            raise ValueError(f"phase {name!r} needs a first and a last step, such as range(0, 60); got {span!r}.")
    if not phases:
        raise ValueError("there are no phases to draw.")
    ax = axes_or_new(ax)
    first = min(span.start for span in phases.values())
    for place, (name, span) in enumerate(phases.items()):
        ax.axvspan(span.start, span.stop, color=_BANDS[place % len(_BANDS)], zorder=0, linewidth=0)
        if span.start > first:
            ax.axvline(span.start, color="0.4", linewidth=0.8, linestyle=":", zorder=0.5)
        if names:
            ax.annotate(
                name.replace(" ", "\n"),
                ((span.start + span.stop) / 2, 1.01),
                xycoords=("data", "axes fraction"),
                ha="center",
                va="bottom",
                fontsize="small",
            )
    ax.set_xlim(first, max(span.stop for span in phases.values()))
    return ax
