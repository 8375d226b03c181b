"""Buffers and frozen parameters: tensors of the model that the optimizer does not move."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.parameters import named_dtype

__all__ = [
    "FixedTensors",
    "decode_fixed",
    "encode_fixed",
    "fixed_bytes",
    "fixed_layout",
    "fixed_tensors",
    "module_types",
]


def fixed_tensors(model: nn.Module, tracked: Collection[str]) -> dict[str, Tensor]:
    """All buffers, and the parameters that are not in `tracked`, by name."""
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in tracked}
    return frozen | dict(model.named_buffers())


def module_types(model: nn.Module) -> dict[str, str]:
    """Class name of every module, by its name in the model."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


class FixedTensors:
    """Writes these tensors as bytes, anew only when one of them has changed (running statistics, for instance)."""

    def __init__(self, model: nn.Module, tracked: Collection[str]) -> None:
        self._model, self._tracked = model, tracked
        self.layout = fixed_layout(fixed_tensors(model, tracked))
        """Names, shapes and types, in the order of the bytes."""
        self._version = -1
        self._last: NDArray[np.uint8] | None = None
        self._recent: dict[int, NDArray[np.uint8]] = {}

    def version(self) -> tuple[int, NDArray[np.uint8] | None]:
        """Number of the current version, and its bytes `[1, byte]` if it is a new one."""
        if not self.layout:
            return 0, None
        now = encode_fixed(fixed_tensors(self._model, self._tracked))
        if self._last is not None and np.array_equal(now, self._last):
            return self._version, None
        self._last = now
        self._version += 1
        self._recent[self._version] = now
        return self._version, now[None]

    def look(self) -> tuple[int, NDArray[np.uint8] | None]:
        """Number of the last version, and the bytes `[byte]` of what is there now if it is not that."""
        if not self.layout:
            return 0, None
        now = encode_fixed(fixed_tensors(self._model, self._tracked))
        return self._version, None if self._last is not None and np.array_equal(now, self._last) else now

    def go_on(self, version: int, raw: NDArray[np.uint8]) -> None:
        """Number what comes after a version with these bytes `[byte]`."""
        self._version, self._last, self._recent = version, raw, {version: raw}

    def recent(self, version: int) -> dict[str, Tensor]:
        """The tensors of the last version, or of one since `forget`."""
        return decode_fixed(self.layout, self._recent[version]) if self.layout else {}

    def release(self, tracked: Collection[str], shorten: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
        """Leave out what is in `tracked` from now on; `shorten` takes its bytes out of those of a version."""
        self._tracked = tracked
        self.layout = [entry for entry in self.layout if entry["name"] not in tracked]
        self._last = None if self._last is None else shorten(self._last)
        self._recent = {version: shorten(raw) for version, raw in self._recent.items()}

    def forget(self) -> None:
        """Keep only the last version at hand."""
        self._recent = {version: raw for version, raw in self._recent.items() if version == self._version}


def fixed_layout(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Names, shapes and types of tensors, in the order of their bytes."""
    return [
        {"name": name, "shape": list(t.shape), "dtype": str(t.dtype).removeprefix("torch.")}
        for name, t in tensors.items()
    ]


def encode_fixed(tensors: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """The bytes of tensors, one after the other."""
    parts = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    encoded: NDArray[np.uint8] = torch.cat(parts).numpy()
    return encoded


def fixed_bytes(entry: dict[str, Any]) -> int:
    """Number of bytes of a tensor of the layout."""
    return torch.Size(entry["shape"]).numel() * named_dtype(entry["dtype"]).itemsize


def decode_fixed(layout: list[dict[str, Any]], raw: NDArray[np.uint8]) -> dict[str, Tensor]:
    """Read back the tensors of one version."""
    tensors, start = {}, 0
    for entry in layout:
        stop = start + fixed_bytes(entry)
        raw_tensor = torch.from_numpy(raw[start:stop].copy())
        tensors[entry["name"]] = raw_tensor.view(named_dtype(entry["dtype"])).reshape(entry["shape"])
        start = stop
    return tensors
