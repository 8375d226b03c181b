"""Plain data and tensors as bytes and back, without pickle: a safetensors file whose metadata says what goes where."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

__all__ = ["copied", "pack", "unpack"]

_NOTE = "content"
_HEADER_BYTES = 8


def copied(content: Any, what: str) -> Any:
    """A copy of plain data that nothing else will change: numbers, texts, None, tensors, and containers of them.

    Raises:
        TypeError: it has something else.
    """
    if isinstance(content, Tensor):
        return content.detach().clone(memory_format=torch.contiguous_format)
    if content is None or isinstance(content, (bool, int, float, str)):
        return content
    if isinstance(content, Counter):
        return Counter({key: copied(entry, what) for key, entry in content.items()})
    if isinstance(content, Mapping):
        return {copied(key, what): copied(entry, f"{what}[{key!r}]") for key, entry in content.items()}
    if isinstance(content, (list, tuple)):
        entries = [copied(entry, f"{what}[{place}]") for place, entry in enumerate(content)]
        return entries if isinstance(content, list) else tuple(entries)
    raise TypeError(
        f"{what} is a {type(content).__name__}, which cannot be kept without pickle: expected numbers, texts, None, "
        "tensors, and lists, tuples and dicts of them."
    )


def pack(content: Any) -> bytes:
    """The bytes of what `copied` gave.

    Example:
        >>> unpack(pack({"best": math.inf, 3: (torch.eye(2), [None, True])}))
        {'best': inf, 3: (tensor([[1., 0.],
                [0., 1.]]), [None, True])}
    """
    tensors: dict[str, Tensor] = {}

    def encode(part: Any) -> Any:
        if isinstance(part, Tensor):
            tensors[str(len(tensors))] = part.cpu()
            return {"tensor": [str(len(tensors) - 1), str(part.device)]}
        if isinstance(part, float) and not math.isfinite(part):
            return {"float": str(part)}
        if isinstance(part, dict):
            kind = "counter" if isinstance(part, Counter) else "dict"
            return {kind: [[encode(key), encode(entry)] for key, entry in part.items()]}
        if isinstance(part, (list, tuple)):
            entries = [encode(entry) for entry in part]
            return entries if isinstance(part, list) else {"tuple": entries}
        return part

    text = json.dumps(encode(content))
    packed: bytes = safetensors.torch.save(tensors, {_NOTE: text})
    return packed


def unpack(packed: bytes) -> Any:
    """What `pack` was given; tensors are on the host if there is no such device as they were on.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    size = int.from_bytes(packed[:_HEADER_BYTES], "little")
    text = json.loads(packed[_HEADER_BYTES : _HEADER_BYTES + size])["__metadata__"][_NOTE]
    tensors = safetensors.torch.load(packed)

    def decode(part: Any) -> Any:
        if isinstance(part, list):
            return [decode(entry) for entry in part]
        if not isinstance(part, dict):
            return part
        ((kind, entries),) = part.items()
        if kind == "tensor":
            name, device = entries
            is_there = torch.device(device).type == "cpu" or torch.cuda.is_available()
            return tensors[name].to(device if is_there else "cpu")
        if kind == "float":
            return float(entries)
        if kind == "tuple":
            return tuple(decode(entry) for entry in entries)
        pairs = {decode(key): decode(entry) for key, entry in entries}
        return Counter(pairs) if kind == "counter" else pairs

    return decode(json.loads(text))
