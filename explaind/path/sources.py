"""The rows of the contribution's example axis: single examples, groups of them, or all in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Sources", "select_sources"]


@dataclass(frozen=True)
class Sources:
    """Which examples are credited, and to which entry of the axis each one counts."""

    dimension: str | None
    """`"example"`, `"group"`, or None if the axis is summed out."""
    labels: NDArray[Any]
    """Coordinate of the axis, `[source]`."""
    _ids: NDArray[np.int64]
    _source_of: NDArray[np.int64]
    restricted: bool
    """Whether some of the run's examples are left out."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def needs_rows(self) -> bool:
        """Whether products with single examples are needed at all."""
        return self.dimension is not None or self.restricted

    def locate(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Positions of the rows that are credited, and the source of each: two `[row]`."""
        place = np.searchsorted(self._ids, ids).clip(max=len(self._ids) - 1)
        rows = np.flatnonzero(self._ids[place] == ids)
        return torch.from_numpy(rows), torch.from_numpy(self._source_of[place[rows]])


def select_sources(
    known: NDArray[np.int64],
    *,
    axis: str | None,
    examples: Sequence[int] | None,
    groups: Mapping[int, Any] | Sequence[Any] | None,
) -> Sources:
    """Build the axis from what the user asked for.

    Args:
        known: ids of the run's examples, sorted.
        axis: `"example"`, `"group"` or None.
        examples: ids to credit; None means all.
        groups: a label per example id, or a sequence aligned with `known`.

    Raises:
        ValueError: unknown ids, or labels that do not match the examples.
    """
    asked = known if examples is None else np.asarray(examples)
    if asked.dtype.kind not in "iu" and len(asked):
        raise ValueError(f"examples= are integer ids; got {asked[:5].tolist()}….")
    chosen = np.unique(asked.astype(np.int64))
    if len(unknown := np.setdiff1d(chosen, known)) or not (examples is None or len(chosen)):
        raise ValueError(
            f"examples={unknown[:5].tolist()}… are not in the run. It has {len(known)} examples with ids from "
            f"{known[0]} to {known[-1]}; see run.examples."
        )
    restricted = len(chosen) < len(known)
    if axis is None:
        return Sources(None, np.zeros(1), chosen, np.zeros(len(chosen), dtype=np.int64), restricted)
    if axis == "example":
        return Sources("example", chosen, chosen, np.arange(len(chosen)), restricted)
    labels = _label_each(known, groups)
    kept = [labels[int(id_)] for id_ in chosen]
    if not (all(isinstance(x, str) for x in kept) or all(isinstance(x, (bool, int, float, np.number)) for x in kept)):
        raise ValueError(f"groups= needs labels that are all texts or all numbers; got {kept[:5]}….")
    names, source_of = np.unique(np.array(kept), return_inverse=True)
    return Sources("group", names, chosen, source_of.astype(np.int64), restricted)


def _label_each(known: NDArray[np.int64], groups: Mapping[int, Any] | Sequence[Any] | None) -> dict[int, Any]:
    if groups is None:
        raise ValueError("by has 'group', so give groups= a label per example.")
    if isinstance(groups, Mapping):
        missing = [int(id_) for id_ in known if id_ not in groups]
        if missing:
            raise ValueError(f"groups has no label for {len(missing)} examples, the first is {missing[0]}.")
        return {int(id_): groups[id_] for id_ in known}
    labels = np.asarray(groups)
    if labels.shape != known.shape:
        raise ValueError(f"groups needs one label per example of run.examples, {len(known)}; got shape {labels.shape}.")
    return {int(id_): label for id_, label in zip(known, labels.tolist(), strict=True)}
