"""What the study's figures over steps have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes

from explaind.plots import plot_phases

__all__ = ["Phases", "over_steps"]

Phases = Mapping[str, range | slice]
"""First step and the one after the last of every phase, by its name."""


def over_steps(rows: Sequence[Axes], phases: Phases) -> None:
    """Phases behind every row, named above the first; steps and their name below the last alone."""
    for place, ax in enumerate(rows):
        plot_phases(phases, names=place == 0, ax=ax)
        ax.set_xlabel("optimizer step (= epoch, full batch)" if place == len(rows) - 1 else "")
