"""The optimizer's hyperparameters, per parameter group and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.errors import RecordingError
from explaind.parameters import named_dtype
from explaind.recording.optimizers import Optimizers

__all__ = ["GroupHistory", "group_settings"]


class GroupHistory:
    """Splits `optimizer.param_groups` into numbers, written at every step, and constants, written once."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        groups = self._settings()
        self.num_groups = len(groups)
        self.constants = [{key: _plain(value) for key, value in group.items()} for group in groups]
        """Every group's settings at the start, as plain data."""
        self.keys = list(dict.fromkeys(key for group in groups for key, value in group.items() if _is_numeric(value)))
        """Names of the hyperparameters that are numbers, or fixed-length tuples of numbers, in some group."""
        self.types = [{key: dtype for key, value in group.items() if (dtype := _dtype(value))} for group in groups]
        """For every group, the types of those that are tensors."""
        self._widths = _widths(self.constants, self.keys)
        self._last_settings: list[dict[str, Any]] = []
        self._last_values: NDArray[np.float64] = np.empty(0)

    def go_on(self, constants: list[dict[str, Any]], keys: list[str], types: list[dict[str, str]]) -> None:
        """Go on with a history that has begun with these constants, keys and types."""
        self.constants, self.keys, self.types = constants, keys, types
        self._widths = _widths(constants, keys)

    def widened(self, places: Sequence[int]) -> GroupHistory:
        """The history with groups that were added since; `places` is where each of the earlier ones is now."""
        wide = GroupHistory(self._optimizers)
        for group, place in enumerate(places):
            wide.constants[place], wide.types[place] = self.constants[group], self.types[group]
        found = (key for group in wide.constants for key, value in group.items() if _is_numeric(value))
        wide.keys = list(dict.fromkeys([*self.keys, *found]))
        wide._widths = _widths(wide.constants, wide.keys)
        return wide

    def rearrange(self, rows: NDArray[np.float64], narrow: GroupHistory, places: Sequence[int]) -> NDArray[np.float64]:
        """Rows `[step, group, hyperparameter]` that `narrow` has written, with the later groups at their start."""
        columns, narrow_columns = _columns(self._widths), _columns(narrow._widths)
        wide = np.full((len(rows), self.num_groups, sum(self._widths.values())), np.nan)
        for group, constants in enumerate(self.constants):
            for key in columns:
                if _is_numeric(constants.get(key)):
                    numbers = _numbers(constants[key])
                    wide[:, group, columns[key]][:, : len(numbers)] = numbers
        for group, place in enumerate(places):
            for key, its_columns in narrow_columns.items():
                written = rows[:, group, its_columns]
                wide[:, place, columns[key]][:, : written.shape[1]] = written
        return wide

    def values(self) -> NDArray[np.float64]:
        """The current numbers `[group, hyperparameter]`; tuples are spread over consecutive columns.

        Raises:
            RecordingError: a setting that is no number has changed, or has become one.
        """
        settings = self._settings()
        if settings == self._last_settings:
            return self._last_values.copy()
        rows = np.full((self.num_groups, sum(self._widths.values())), np.nan)
        for number, (group, constants) in enumerate(zip(settings, self.constants, strict=True)):
            self._check_kinds(number, group)
            column = 0
            for key, width in self._widths.items():
                if _is_numeric(constants.get(key)):
                    numbers = _numbers(group[key])
                    rows[number, column : column + len(numbers)] = numbers
                column += width
        if all(_is_immutable(value) for group in settings for value in group.values()):
            self._last_settings, self._last_values = settings, rows.copy()
        return rows

    def settings(self, values: NDArray[np.float64]) -> list[dict[str, Any]]:
        """The settings of all groups with the numbers `[group, hyperparameter]`, as a reader gets them."""
        every = range(self.num_groups)
        return [group_settings(self.constants, self.keys, self.types, values, group) for group in every]

    def _settings(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in group.items() if k != "params"} for group in self._optimizers.param_groups]

    def _check_kinds(self, number: int, group: Mapping[str, Any]) -> None:
        for key, start in self.constants[number].items():
            now = group.get(key)
            if _is_numeric(start):
                same = _is_numeric(now) and len(_numbers(now)) == len(_numbers(start))
                same = same and _dtype(now) == self.types[number].get(key)
            else:
                same = _plain(now) == start
            if not same:
                raise RecordingError(
                    f"the optimizer's setting '{key}' of parameter group {number} was {start!r} when the recording "
                    f"began and is {now!r} now. Numbers may change from step to step, as the same type of number; set "
                    "what is something else before explaind.trace."
                )


def group_settings(
    constants: Sequence[dict[str, Any]],
    keys: Sequence[str],
    types: Sequence[Mapping[str, str]],
    values: NDArray[np.float64],
    group: int,
) -> dict[str, Any]:
    """One group's settings at one step: its constants with the recorded numbers `[group, hyperparameter]` filled in."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in constants[group].items()}
    column = 0
    for key, width in _widths(constants, keys).items():
        start, first = constants[group].get(key), column
        column += width
        if not _is_numeric(start):
            continue
        starts = start if isinstance(start, list) else [start]
        numbers = values[group, first : first + len(starts)]
        found = [_restore(float(x), like, types[group].get(key)) for x, like in zip(numbers, starts, strict=True)]
        settings[key] = tuple(found) if isinstance(start, list) else found[0]
    return settings


def _restore(number: float, like: bool | int | float, dtype: str | None) -> Any:
    if dtype is not None:
        return torch.tensor(number, dtype=named_dtype(dtype))
    return type(like)(number) if number.is_integer() else number


def _widths(constants: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> dict[str, int]:
    """Number of columns of each hyperparameter: as many as the group with the most numbers needs."""
    starts = {key: [group[key] for group in constants if _is_numeric(group.get(key))] for key in keys}
    return {key: max(len(_numbers(start)) for start in found) for key, found in starts.items()}


def _columns(widths: Mapping[str, int]) -> dict[str, slice]:
    """Where the numbers of each hyperparameter are."""
    stops = np.cumsum(list(widths.values())).tolist()
    return {key: slice(stop - width, stop) for (key, width), stop in zip(widths.items(), stops, strict=True)}


def _is_numeric(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_numeric(x) and not isinstance(x, (tuple, list)) for x in value)
    return isinstance(value, (bool, int, float))


def _is_immutable(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_immutable, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _numbers(value: Any) -> list[float]:
    return [float(x) for x in value] if isinstance(value, (tuple, list)) else [float(value)]


def _dtype(value: Any) -> str | None:
    """The type of a setting that is a tensor, or a tuple of them."""
    first = value[0] if isinstance(value, (tuple, list)) and value else value
    return str(first.dtype).removeprefix("torch.") if isinstance(first, Tensor) else None


def _plain(value: Any) -> Any:
    """JSON-able form of a setting; what has none is kept as its text, for people."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
