"""Whether the attributes of a run describe one: they may be damaged, or made up by a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from explaind.parameters import ParameterTable, named_dtype
from explaind.recording.calls import input_array
from explaind.recording.fixed import fixed_bytes
from explaind.store import StoreReader

__all__ = ["check_description"]

_MOST_THREADS = 4096
_OPTIONAL: Mapping[str, type] = {
    "group_optimizers": list,
    "group_types": list,
    "state_types": dict,
    "unrecorded_state": list,
    "metadata": dict,
    "versions": dict,
    "machine": str,
}


def check_description(store: StoreReader, table: ParameterTable) -> None:
    """Compare the attributes with each other, and with the arrays.

    Args:
        store: the store.
        table: the parameters that its attributes name.

    Raises:
        ValueError: they do not fit together.
        KeyError, TypeError, AttributeError, RuntimeError: they are of other types than they should.
    """
    attributes = store.attributes
    groups, fixed = attributes["groups"], attributes["fixed"]
    for name, kind in _OPTIONAL.items():
        if not isinstance(attributes.get(name, kind()), kind):
            raise TypeError(f"'{name}' is no {kind.__name__}")
    optimizers = attributes.get("group_optimizers", [attributes["optimizer"]] * len(groups))
    group_types = attributes.get("group_types", [{}] * len(groups))
    for entry in fixed:
        if not isinstance(entry["name"], str) or fixed_bytes(entry) < 0:
            raise ValueError(f"'fixed' has {entry!r}")
    expected = {
        "parameters that each belong to a group": all(0 <= parameter.group < len(groups) for parameter in table),
        "a text for each module": _texts(attributes["modules"].items()),
        "groups of settings": isinstance(groups, list) and all(isinstance(group, dict) for group in groups),
        "no settings named params": not any("params" in group for group in groups),
        "names of settings": _texts([attributes["group_keys"]]),
        "an optimizer for each group": _texts([optimizers]) and len(optimizers) == len(groups),
        "types for each group": len(group_types) == len(groups)
        and all(isinstance(named_dtype(dtype), torch.dtype) for types in group_types for dtype in types.values()),
        "a type and a place for each state": all(
            named_dtype(dtype) and isinstance(place, str)
            for types in attributes.get("state_types", {}).values()
            for dtype, place in types.values()
        ),
        "as many bytes as the fixed tensors have": not store.has("fixed")
        or store.row_shape("fixed") == (sum(map(fixed_bytes, fixed)),),
        "as many elements as the parameters have": not store.has("params")
        or store.row_shape("params") == (table.num_elements,),
        "as many moments as steps": store.length("moment") > store.commit.num_steps
        or not any(store.has_along(name, "moment") for name in store.commit.arrays),
        "inputs of the types that they are stored in": all(
            _is_stored_as(named_dtype(dtype), store.layout(input_array(number, name)).dtype)
            for number, layout in enumerate(attributes.get("input_layouts", []))
            for name, dtype in layout.items()
            if store.has(input_array(number, name))
        ),
        "calls of modules that there are, with names of outputs": all(
            (kind["part"] is None or (kind["part"] in attributes["modules"] and kind["outputs"]))
            and _texts([kind["outputs"]])
            and (kind["autocast"] is None or named_dtype(kind["autocast"]).is_floating_point)
            for kind in attributes.get("call_kinds", [])
        ),
        "a number of threads": type(attributes.get("threads", 1)) is int
        and 1 <= attributes.get("threads", 1) <= _MOST_THREADS,
        "a number of steps between snapshots": type(attributes.get("snapshot_every", 1)) is int
        and attributes.get("snapshot_every", 1) >= 1,
        "a device with memory": torch.device(attributes["device"]).type != "meta",
    }
    for what, fulfilled in expected.items():
        if not fulfilled:
            raise ValueError(f"expected {what}")


def _is_stored_as(dtype: torch.dtype, stored: str) -> bool:
    """Whether tensors of a type are written as arrays of another; narrow floating-point types widen."""
    narrow = dtype in (torch.bfloat16, torch.float16)
    return stored == ("float32" if narrow else str(dtype).removeprefix("torch."))


def _texts(lists: Any) -> bool:
    return all(isinstance(text, str) for texts in lists for text in texts)
