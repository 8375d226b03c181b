"""Checkpoints as other programs write them: a file's tensors, matched to those of a model."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from explaind.errors import ModelMismatchError

__all__ = ["matched", "read_tensors"]

_WITHIN = ("model", "state_dict", "model_state_dict")
"""Where checkpoints of a whole training keep the model's tensors."""
_PREFIXES = ("module.", "_orig_mod.")
"""What wrappers put before every name: DistributedDataParallel, torch.compile."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict, on the host; no object is ever unpickled.

    Args:
        path: a `.safetensors` file, or one that `torch.load(weights_only=True)` reads. The state dict may be the
            value of `model`, `state_dict` or `model_state_dict` in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or it is not clear what in it are the model's tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be loaded with torch.load(weights_only=True): it holds more than tensors and plain data, "
            "or is no whole file of torch.save. Objects are never unpickled; save model.state_dict() on its own."
        ) from error
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    if _is_state_dict(content):
        return dict(content)
    found = [key for key in _WITHIN if isinstance(content, Mapping) and _is_state_dict(content.get(key))]
    if len(found) != 1:
        keys = ", ".join(map(repr, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"{path} is neither a state dict nor a dict with one as 'model', 'state_dict' or 'model_state_dict'; it "
            f"has {keys}. Load it yourself, and give the mapping of names to tensors in place of the file."
        )
    return dict(content[found[0]])


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def matched(tensors: Mapping[str, Tensor], model: nn.Module, source: str) -> dict[str, Tensor]:
    """A checkpoint's tensor for every parameter and buffer of a model, under the name that comes first in the model.

    They get the model's types, which must hold their numbers exactly. Buffers that are no part of a state dict are the
    model's own.

    Args:
        tensors: the checkpoint's, by name.
        model: the model.
        source: what the checkpoint is called in errors.

    Raises:
        ModelMismatchError: a tensor is missing, has another shape or a wider type, or is not one of the model's.
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    kept = model.state_dict().keys()
    if extra := [name for name in kept if name not in own]:
        raise ModelMismatchError(f"the model keeps {extra[0]!r}, which is no parameter or buffer, in its state dict.")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors) and not any(name.startswith(prefix) for name in own):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    if unknown := [name for name in tensors if name not in own]:
        raise ModelMismatchError(
            f"{source} has {unknown[0]!r}, which the model has not; it has {', '.join(list(own)[:4])}, …."
        )
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(id(tensor), []).append(name)
    result = {}
    for name, *others in names.values():
        present = [other for other in (name, *others) if other in tensors]
        if not present and name not in kept:
            result[name] = own[name].detach().cpu()
            continue
        if not present:
            raise ModelMismatchError(f"{source} has no {name!r}, which the model has.")
        value = tensors[present[0]]
        if value.shape != own[name].shape:
            raise ModelMismatchError(
                f"{present[0]!r} has the shape {tuple(value.shape)} in {source}, and {tuple(own[name].shape)} in the "
                "model. Build the model as it was trained."
            )
        if torch.promote_types(value.dtype, own[name].dtype) != own[name].dtype:
            raise ModelMismatchError(
                f"{present[0]!r} is {value.dtype} in {source}, which {own[name].dtype}, as it is in the model, does "
                f"not hold exactly. Give a model of that type."
            )
        if differing := [other for other in present[1:] if not torch.equal(tensors[other], value)]:
            raise ModelMismatchError(
                f"{present[0]!r} and {differing[0]!r} are one tensor in the model, and differ in {source}."
            )
        result[name] = value.detach().to(device="cpu", dtype=own[name].dtype)
    return result
