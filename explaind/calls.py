"""How a model was called: tensors by name, and a template of everything around them that JSON can hold."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from explaind.errors import RecordingError

__all__ = [
    "CallKind",
    "autocast_type",
    "fingerprint_output",
    "map_tensors",
    "model_parts",
    "named_tensors",
    "rebuild",
    "take_apart",
    "tensor_names",
]


@dataclass(frozen=True, kw_only=True)
class CallKind:
    """What all calls of one kind have in common, besides the shapes of their tensors."""

    part: str | None
    """Name of the module that was called, `""` for the model itself; None where an objective was evaluated."""
    template: dict[str, Any]
    """The arguments, or the objective's batch: see `take_apart`."""
    outputs: tuple[str, ...]
    """Names of the output tensors that a cotangent came back to; none for an objective."""
    autocast: str | None
    """The type that autocast lowered to, None if it was off."""

    @property
    def key(self) -> str:
        """A text that is equal for equal kinds."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read back what `dataclasses.asdict` made of it."""
        return cls(
            part=content["part"],
            template=content["template"],
            outputs=tuple(content["outputs"]),
            autocast=content["autocast"],
        )


def tensor_names(template: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a template."""

    def visit(part: Mapping[str, Any]) -> Iterator[str]:
        ((kind, content),) = part.items()
        if kind == "tensor":
            yield content
        elif kind != "value":
            for entry in content.values() if kind == "dict" else content:
                yield from visit(entry)

    return [name for part in [*template["args"], *template["kwargs"].values()] for name in visit(part)]


def model_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the loop calls, by name: the model, or those of a mere container."""
    if not isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        return {"": model}
    # What has no parameters is just a function between the calls of those that have.
    return {
        f"{name}.{inner}" if inner else name: part
        for name, child in model.named_children()
        for inner, part in model_parts(child).items()
        if any(True for _ in part.parameters())
    }


def take_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split arguments into their tensors by name and a JSON-able template in which the names stand for them.

    Names are `"0"`, `"1"`, … by position or the keyword; those within containers continue it, as in `"0.mask"`.

    Raises:
        RecordingError: an argument is neither a tensor, plain data, nor a container of them.
    """
    tensors: dict[str, Tensor] = {}

    def describe(name: str, value: Any) -> dict[str, Any]:
        if isinstance(value, Tensor):
            tensors[name] = value
            return {"tensor": name}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"dict": {key: describe(f"{name}.{key}", entry) for key, entry in value.items()}}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [describe(f"{name}.{i}", entry) for i, entry in enumerate(value)]}
        raise RecordingError(
            f"the argument '{name}' is a {type(value).__name__}; explaind records tensors with a row per example, "
            "plain numbers, strings, booleans and None, and lists, tuples and dicts of them."
        )

    positional = [describe(str(place), value) for place, value in enumerate(args)]
    keywords = {name: describe(name, value) for name, value in kwargs.items()}
    return tensors, {"args": positional, "kwargs": keywords}


def rebuild(template: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments that `take_apart` split, with other tensors of the same names."""

    def make(part: Mapping[str, Any]) -> Any:
        ((kind, content),) = part.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "value":
            return content
        if kind == "dict":
            return {key: make(entry) for key, entry in content.items()}
        entries = [make(entry) for entry in content]
        return entries if kind == "list" else tuple(entries)

    return tuple(make(part) for part in template["args"]), {k: make(part) for k, part in template["kwargs"].items()}


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model's output with their names: `""` for a bare tensor, `"logits"`, `"0"`, `"1.0"`, …."""
    if isinstance(output, Tensor):
        yield name, output
    for key, entry in _entries(output):
        yield from named_tensors(entry, f"{name}.{key}" if name else str(key))


def fingerprint_output(output: Any) -> Tensor:
    """Norm and sum of all floating-point tensors of a model's output, `[2]`."""
    tensors = [tensor.detach() for _, tensor in named_tensors(output) if tensor.is_floating_point()]
    if not tensors:
        return torch.zeros(2, dtype=torch.float64)
    wide = [tensor.float() if tensor.itemsize < 4 else tensor for tensor in tensors]
    numbers = wide[0] if len(wide) == 1 else torch.cat([tensor.reshape(-1) for tensor in wide])
    return torch.stack([torch.linalg.vector_norm(numbers), numbers.sum()]).double()


def map_tensors(output: Any, function: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """A model's output with every tensor replaced; containers are copied and keep their types."""
    if isinstance(output, Tensor):
        return function(name, output)
    replaced = {
        key: map_tensors(entry, function, f"{name}.{key}" if name else str(key)) for key, entry in _entries(output)
    }
    if not replaced:
        return output
    if isinstance(output, tuple):
        return type(output)(*replaced.values()) if hasattr(output, "_fields") else tuple(replaced.values())
    result = copy.copy(output)
    for key, entry in replaced.items():
        if isinstance(output, (Mapping, list)):
            result[key] = entry
        else:
            object.__setattr__(result, str(key), entry)
    return result


def _entries(output: Any) -> list[tuple[Any, Any]]:
    """What a container holds, by key, position or field."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, (list, tuple)):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    return []


def autocast_type(device: torch.device) -> str | None:
    """Name of the type that autocast lowers to on a device at present; None if it is off."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")
