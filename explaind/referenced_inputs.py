"""Inputs that a run refers to by example, taken from the data set and compared with what was recorded of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.calls import named_tensors
from explaind.errors import DataMismatchError, NotRecordedError
from explaind.places import Place
from explaind.recording.host import to_numpy
from explaind.recording.references import row_digests
from explaind.row_cache import RowCache

__all__ = ["InputLayout", "ReferencedInputs", "Wanted"]

_CACHE_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class InputLayout:
    """What the tensors of a call are like, but for the number of rows."""

    shapes: Mapping[str, Sequence[int]]
    """Shape of a row, by name."""
    dtypes: Mapping[str, torch.dtype]
    """Types, by name."""
    num_inputs: int
    """Number of distinct inputs of this layout."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all of them."""
        return self.num_inputs * sum(math.prod(self.shapes[name]) * t.itemsize for name, t in self.dtypes.items())


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The inputs of a call."""

    step: int
    """The step that it belongs to."""
    layout: int
    """Number of their layout."""
    numbers: NDArray[np.int64]
    """Which inputs of the layout, `[row]`."""
    examples: NDArray[np.int64]
    """Example id of every row."""
    digests: Mapping[str, NDArray[np.uint8]]
    """What was recorded of their content, `[row, digest_byte]` by name."""


class ReferencedInputs:
    """Finds the inputs of calls in a data set.

    The tensors of a call are found among those of the examples' batch by their content, whatever their names and
    order, where they differ from it only by a conversion to another type or by the shape of a row. So they are those of
    the recording, or there is an error.

    Args:
        path: the run.
        layouts: what its inputs are like.
        source: takes example ids to their batch, as `explaind.data_source` makes it; None if there is no data set.
    """

    def __init__(self, path: Place, layouts: Sequence[InputLayout], source: Callable[[list[int]], Any] | None) -> None:
        self._path, self._layouts, self._source = path, layouts, source
        self._caches: dict[int, RowCache] = {}
        self._found_as: dict[tuple[int, str], str] = {}
        self._lock = RLock()
        """Steps are read ahead by a thread of their own."""

    @property
    def cached_bytes(self) -> int:
        """Most bytes of inputs that are kept in memory."""
        return min(_CACHE_BYTES, self._num_bytes)

    @property
    def _num_bytes(self) -> int:
        return sum(layout.num_bytes for layout in self._layouts)

    def of(self, wanted: Wanted) -> Mapping[str, Tensor]:
        """The inputs of a call by name, `[row, …]`; the data set is asked for them when they are first used."""
        return _Inputs(self._layouts[wanted.layout].dtypes, lambda: self._take(wanted))

    def _take(self, wanted: Wanted) -> dict[str, Tensor]:
        with self._lock:
            cache = self._cache(wanted.layout)
            known = cache.get(wanted.numbers)
            if known is None:
                known = self._fetch(wanted)
                cache.put(wanted.numbers, known)
            return known

    def _cache(self, number: int) -> RowCache:
        if number not in self._caches:
            layout = self._layouts[number]
            kept = min(1.0, _CACHE_BYTES / max(self._num_bytes, 1))
            self._caches[number] = RowCache(
                layout.num_inputs,
                capacity=int(kept * layout.num_inputs),
                layout={name: (layout.shapes[name], dtype) for name, dtype in layout.dtypes.items()},
            )
        return self._caches[number]

    def _fetch(self, wanted: Wanted) -> dict[str, Tensor]:
        if self._source is None:
            raise NotRecordedError(
                f"this needs the inputs of step {wanted.step}, which {self._path} only refers to: open it with "
                "explaind.open_run(path, model=…, data=dataset), the data set that it was recorded with."
            )
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            offered = dict(named_tensors(self._source(wanted.examples.tolist())))
        return {name: self._find(wanted, name, offered) for name in self._layouts[wanted.layout].dtypes}

    def _find(self, wanted: Wanted, name: str, offered: Mapping[str, Tensor]) -> Tensor:
        """The recorded rows of a tensor, from whichever of the offered ones have them.

        Raises:
            DataMismatchError: none has one of them.
        """
        layout = self._layouts[wanted.layout]
        shape, dtype, digests = layout.shapes[name], layout.dtypes[name], wanted.digests[name]
        missing, found = np.arange(len(digests)), None
        last = self._found_as.get((wanted.layout, name))
        for key in sorted(offered, key=lambda key: key != last):
            rows = _converted(offered[key], len(digests), shape, dtype)
            if rows is None:
                continue
            same = (row_digests(to_numpy(rows[missing], copy=False)) == digests[missing]).all(axis=1)
            if same.any():
                self._found_as[wanted.layout, name] = key
                found = torch.empty_like(rows) if found is None else found
                found[missing[same]] = rows[missing[same]]
                missing = missing[~same]
                if not len(missing):
                    return found
        there = "; ".join(f"'{key}' {_compared(tensor, len(digests), shape, dtype)}" for key, tensor in offered.items())
        raise _mismatch(wanted, f"'{name}' was {_described(dtype, shape)}", there, missing)


class _Inputs(Mapping[str, Tensor]):
    """Tensors by name that are loaded when the first of them is used."""

    def __init__(self, names: Mapping[str, Any], load: Callable[[], dict[str, Tensor]]) -> None:
        self._names, self._load = names, load
        self._loaded: dict[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _converted(tensor: Tensor, num_rows: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A tensor in another type and shape per row, on the host; None if it has other numbers of rows or entries."""
    if tensor.shape[:1] != (num_rows,) or tensor.numel() != num_rows * math.prod(shape) or tensor.is_complex():
        return None
    return tensor.detach().to(device="cpu", dtype=dtype).reshape(num_rows, *shape)


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _compared(tensor: Tensor, num_rows: int, shape: Sequence[int], dtype: torch.dtype) -> str:
    """How an offered tensor differs from what was recorded."""
    if tensor.shape[:1] != (num_rows,):
        return f"of shape {tuple(tensor.shape)} in all, which has no row for each of {num_rows} examples"
    is_alike = _converted(tensor, num_rows, shape, dtype) is not None
    return _described(tensor.dtype, tensor.shape[1:]) + (" with other content" if is_alike else "")


def _mismatch(wanted: Wanted, recorded: str, there: str, missing: NDArray[np.int64]) -> DataMismatchError:
    """What to say of rows that are not in the data set."""
    count = len(wanted.examples)
    others = "" if len(missing) == count else f" The other {count - len(missing)} of the call's {count} examples agree."
    return DataMismatchError(
        f"example {wanted.examples[missing[0]]} of the data set is not what the model was called with at step "
        f"{wanted.step}: its input {recorded}, the data set has {there or 'no tensor'}.{others} If this is the data "
        "set of the recording, its items are changed at random (augmentation), and the run must be recorded with "
        "inputs='stored'; or the loop changed the batch before it called the model: then give as data= a function that "
        "takes a list of ids to the inputs, changed likewise."
    )
