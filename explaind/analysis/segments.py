"""Piecewise linear fits of several series at once, and new series with the same residuals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from explaind.analysis.extras import optional

__all__ = ["FEWEST", "Segmentation", "Series", "fitted", "line_errors", "resampled", "segmentations"]

Series = NDArray[np.float64]
"""`[place, layer]`."""

FEWEST = 3
"""Places of a segment: a line through fewer has no residuals."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """A series cut into segments, each fitted by a line."""

    stops: tuple[int, ...]
    """Where the segments end; the last is the length of the series."""
    error: float
    """Σ ‖series − its line‖² over all places."""


def segmentations(series: Series, *, most: int, shortest: int) -> list[Segmentation]:
    """The best segmentations with 0, 1, … `most` change points, by the least `error`.

    All segmentations with segments of at least `shortest` places are searched, by dynamic programming (`Dynp` of the
    library ruptures) over the errors of all lines, which are known in closed form.

    Raises:
        ImportError: ruptures is not installed.

    Example:
        >>> ramp_and_step = np.array([[0.0], [1.0], [2.0], [3.0], [9.0], [9.0], [9.0]])
        >>> [(one.stops, round(one.error, 12)) for one in segmentations(ramp_and_step, most=1, shortest=3)][1]
        ((4, 7), 0.0)
    """
    ruptures = optional("ruptures", purpose="looking for change points", package="ruptures")
    table: list[list[float]] = line_errors(series).tolist()

    base: Any = ruptures.base.BaseCost

    class LineCost(base):  # type: ignore[misc]
        """Squared error of the line through a segment."""

        model, min_size = "line", FEWEST

        def fit(self, signal: Series) -> LineCost:
            self.signal = signal
            return self

        def error(self, start: int, end: int) -> float:
            return table[start][end]

    search = ruptures.Dynp(custom_cost=LineCost(), min_size=max(shortest, FEWEST), jump=1).fit(series)
    best = []
    for number in range(most + 1):
        stops = tuple(int(stop) for stop in search.predict(n_bkps=number)) if number else (len(series),)
        best.append(Segmentation(stops=stops, error=sum(table[start][stop] for start, stop in pairwise((0, *stops)))))
    return best


def line_errors(series: Series) -> NDArray[np.float64]:
    """Σ ‖series − line‖² of the least-squares line through the places start…stop, `[start, stop]`; zero below two."""
    centred = series - series.mean(axis=0)
    places = np.arange(len(series), dtype=np.float64) - len(series) / 2

    def between(values: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.concatenate([np.zeros_like(values[:1]), values.cumsum(axis=0)])
        differences: NDArray[np.float64] = sums[None] - sums[:, None]
        return differences

    count = np.maximum(between(np.ones_like(places)), 1)
    y, ty, yy = between(centred), between(places[:, None] * centred), between(np.square(centred).sum(axis=1))
    t, tt = between(places), between(np.square(places))
    spread = tt - np.square(t) / count
    covariance = ty - (t / count)[..., None] * y
    slope = np.square(covariance).sum(axis=-1) / np.where(spread > 0, spread, np.inf)
    errors: NDArray[np.float64] = np.maximum(yy - np.square(y).sum(axis=-1) / count - slope, 0)
    return np.triu(errors)


def fitted(series: Series, stops: Sequence[int]) -> Series:
    """The lines of the segments, `[place, layer]`."""
    lines = np.empty_like(series)
    for start, stop in pairwise((0, *stops)):
        places = np.stack([np.ones(stop - start), np.arange(stop - start)], axis=1)
        lines[start:stop] = places @ np.linalg.lstsq(places, series[start:stop], rcond=None)[0]
    return lines


def resampled(series: Series, stops: Sequence[int], *, block: int, rng: np.random.Generator) -> Series:
    """The fitted lines with other residuals: moving blocks (Künsch 1989) of all, in each segment's own size."""
    lines = fitted(series, stops)
    residuals = series - lines
    size = np.empty((len(series), 1))
    for start, stop in pairwise((0, *stops)):
        freedom = max(stop - start - 2, 1)
        size[start:stop] = np.sqrt(np.square(residuals[start:stop]).sum() / freedom)
    residuals /= np.where(size > 0, size, 1)
    firsts = rng.integers(0, len(series) - block + 1, size=-(-len(series) // block))
    rows = (firsts[:, None] + np.arange(block)).ravel()[: len(series)]
    drawn: Series = lines + size * residuals[rows]
    return drawn
