"""What a row of the table is: a training loop, and what is then asked of the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import explaind


@dataclass(frozen=True)
class Traced:
    """A finished recording, and a prediction of the trained model to explain."""

    store: Path
    model: nn.Module
    query: explaind.Query
    by_token: bool = False
    average: Any = None
    objective: Any = None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One loop, model or optimizer; `run(example_grads=…)` trains it, traced, in the present directory."""

    name: str
    run: Callable[..., Traced | Sequence[Traced]]
    refused: type[Exception] | None = None
    """The kind of refusal that is expected, if this cannot be split exactly."""
    foreign: bool = False
    """Whether the loop puts something into the gradients that comes from no example."""
    dtype: torch.dtype = torch.float64
    """Type that the gradients are computed in while training, and so that stored ones are rounded to."""

    def __str__(self) -> str:
        return self.name


class Rows(list[Row]):
    """Rows of one kind, in the order of the page."""

    def row(self, name: str, **properties: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorate a function that trains and returns what it traced."""

        def add(run: Callable[..., Any]) -> Callable[..., Any]:
            self.append(Row(name=name, run=run, **properties))
            return run

        return add
