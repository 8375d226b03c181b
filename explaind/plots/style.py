"""Colours and small helpers that all figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.axes import Axes

__all__ = [
    "CYCLIC",
    "DIVERGING",
    "LOWERED",
    "MARKERS",
    "RAISED",
    "axes_or_new",
    "layer_styles",
    "line_styles",
    "one_query",
]

DIVERGING = "PuOr_r"
"""Colour map of signed values: white at zero, told apart with any colour vision."""
CYCLIC = "twilight_shifted"
"""Colour map of classes that follow one another in a circle: the last is next to the first."""

# Okabe and Ito's palette: told apart with any colour vision; line styles tell the same in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = "osD^vP*"
"""By position, where points are drawn."""
RAISED, LOWERED = _COLOURS[0], _COLOURS[1]


def line_styles(names: list[Any]) -> dict[Any, dict[str, Any]]:
    """Colour and line style of each name, by its position in the list."""
    return {
        name: {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[(i + i // 7) % len(_DASHES)]}
        for i, name in enumerate(names)
    }


def layer_styles(layers: Sequence[Any], study: Sequence[Any] | None = None) -> dict[Any, dict[str, Any]]:
    """Colour and line style of each layer, by its position among all layers of the study.

    Args:
        layers: those that are drawn.
        study: all of them, in the order of `run.layers`; by default those that are drawn.

    Raises:
        ValueError: a layer is none of the study's.

    Example:
        >>> layer_styles(["decoder"], ["embedding", "decoder"])["decoder"]["linestyle"]
        '--'
    """
    styles = line_styles(list(layers if study is None else study))
    if missing := [layer for layer in layers if layer not in styles]:
        raise ValueError(f"{missing[0]!r} is none of the study's layers, which are {', '.join(map(str, styles))}.")
    return {layer: styles[layer] for layer in layers}


def axes_or_new(ax: Axes | None, *, width: float = 7.0, height: float = 4.0) -> Axes:
    """The given Axes, or those of a new figure."""
    if ax is not None:
        return ax
    _, new = plt.subplots(figsize=(width, height), layout="constrained")
    return new


def one_query(term: xr.DataArray, query: Any | None) -> tuple[xr.DataArray, str]:
    """A term of one query, or its mean over all, with a caption that says which.

    Raises:
        ValueError: there is no such query.
    """
    if "query" not in term.dims:
        return term, "sum over queries"
    if query is None:
        count = term.sizes["query"]
        return term.mean("query"), "the query" if count == 1 else f"mean over {count} queries"
    if query not in term.indexes["query"]:
        raise ValueError(f"there is no query {query!r} in this result; it has {term.indexes['query'].tolist()}.")
    return term.sel(query=query), f"query {query}"
