"""The page of all rows: written from measurements, and read back to be held against new ones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

from tests.loops.batches import BATCHES
from tests.loops.gradients import GRADIENTS
from tests.loops.language import LANGUAGE
from tests.loops.losses import LOSSES
from tests.loops.measure import Measurement
from tests.loops.models import MODELS
from tests.loops.optimizers import OPTIMIZERS
from tests.loops.passes import PASSES
from tests.loops.row import Row
from tests.loops.setups import SETUPS

__all__ = ["PAGE", "ROWS", "SECTIONS", "bounds", "cells", "committed", "page"]

SECTIONS: dict[str, list[Row]] = {
    "Loops": [*BATCHES, *PASSES, *GRADIENTS, *SETUPS, *LOSSES],
    "Optimizers": OPTIMIZERS,
    "Models": MODELS,
    "Language models": LANGUAGE,
}
ROWS: tuple[Row, ...] = tuple(row for rows in SECTIONS.values() for row in rows)
PAGE = Path(__file__).parents[2] / "docs" / "coverage.md"

SMALLEST_EXPONENT = -12
_NUMBERS = ("difference", "stored_difference", "closure", "other", "rounding")
_INTRODUCTION = """\
# What is exact, and what is refused

Every row is a training loop as a user writes it, with `explaind.trace(…)` around it and nothing else changed
(`tests/loops/`). This page is written by `python -m tests.loops`, and the tests measure every row again and hold the
page to it.

- **difference**: the worst of all contributions and decay terms by query, example, step and parameter, against the slow
  reference `explaind.reference` on the same quadrature nodes, relative to that very entry (entries smaller than 1e-6 of
  the largest one: relative to 1e-6 of it). The reference computes one example at a time in float64.
- **stored**: the same between `example_grads="stored"` and `"replayed"`. Stored gradients have the precision that the
  model was trained in.
- **closure**: how far the sum of all terms is from the prediction, relative to the summed absolute terms.
- **other**: what comes from no example, relative to the length of the query's path: nothing, unless the loop adds
  something.
- **rounding**: the floating-point error of the training itself, relative to the same: large where it computes in
  bfloat16, as autocast and Muon do.
- **examples by**: `factors`, what one forward and backward pass of the recorded batch brings to every layer, with the
  recorded random numbers (and `vmap` for parameters that other operations use); `tangents`, a derivative of the
  batch's backward pass for each query and layer, for models that couple their batch or tokens. Where rows are coupled,
  a row gets the part of the batch's gradient that enters at its own output.

A refused row shows the message that the user gets.
"""


def page(measurements: Mapping[str, Measurement]) -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    for title, rows in SECTIONS.items():
        lines = [
            f"## {title}\n",
            "| row | difference | stored | closure | other | rounding | examples by |",
            "|---|---|---|---|---|---|---|",
            *(f"| {' | '.join(cells(row, measurements[row.name]))} |" for row in rows),
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def cells(row: Row, measurement: Measurement) -> list[str]:
    """One row of the page."""
    if measurement.refusal:
        return [row.name, f"refused: {_in_table(measurement.refusal)}", "", "", "", "", ""]
    numbers = {name: bound(getattr(measurement, name)) for name in _NUMBERS}
    if row.foreign:
        numbers["other"] = "what the loop adds"
    return [row.name, *numbers.values(), measurement.products]


def bounds(line: list[str]) -> dict[str, float]:
    """The numbers that a row of the page promises to stay below."""
    limits = zip(_NUMBERS, line[1:], strict=False)
    return {name: float(cell.removeprefix("< ")) for name, cell in limits if cell.startswith("< ")}


def committed() -> dict[str, list[str]]:
    """The rows of the page as it is, in order."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {row[0]: row for row in rows if row[0] != "row"}


def bound(number: float) -> str:
    """A power of ten well above a number, so that other machines' rounding stays below it too."""
    exponent = SMALLEST_EXPONENT if number == 0 else max(SMALLEST_EXPONENT, math.ceil(math.log10(10 * number)))
    return f"< 1e{exponent}"


def _in_table(message: str) -> str:
    return message.replace("\n", " ").replace("|", "\\|")
