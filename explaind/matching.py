"""Whether a model is the one that a run was recorded of."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from explaind.calls import CallKind, rebuild, tensor_names
from explaind.errors import ModelMismatchError
from explaind.parameters import ParameterTable, named_dtype
from explaind.places import Place
from explaind.recording.fixed import fixed_tensors, module_types

__all__ = ["check_calls", "check_model"]


def check_model(
    model: nn.Module,
    table: ParameterTable,
    fixed_layout: Sequence[Mapping[str, Any]],
    recorded_modules: dict[str, str],
    path: Place,
) -> None:
    """Names, shapes and types of parameters and buffers, and the modules' classes, must be those of the run.

    Args:
        model: the model that was given.
        table: the recorded parameters.
        fixed_layout: names, shapes and types of the buffers and frozen parameters.
        recorded_modules: class name of every module.
        path: where the run is.

    Raises:
        ModelMismatchError: they are not.
    """
    given = {name: (tuple(p.shape), p.dtype) for name, p in model.named_parameters()}
    given |= {name: (tuple(t.shape), t.dtype) for name, t in fixed_tensors(model, table.names).items()}
    recorded = {p.name: (p.shape, p.dtype) for p in table}
    recorded |= {entry["name"]: (tuple(entry["shape"]), named_dtype(entry["dtype"])) for entry in fixed_layout}
    for name in recorded:
        if name not in given:
            raise ModelMismatchError(f"the model has no '{name}', which the run at {path} recorded.")
        if recorded[name] != given[name]:
            raise ModelMismatchError(
                f"'{name}' was recorded with (shape, type) {recorded[name]}, the model's has {given[name]}. "
                "Build the model as it was trained."
            )
    if extra := [name for name in given if name not in recorded]:
        raise ModelMismatchError(f"the model has '{extra[0]}', which the run at {path} did not record.")
    modules = module_types(model)
    for name in recorded_modules | modules:
        recorded_type, given_type = (types.get(name, "absent") for types in (recorded_modules, modules))
        if given_type != recorded_type:
            raise ModelMismatchError(
                f"the module '{name}' is {given_type} in the model and {recorded_type} in the run at {path}. "
                "Build the model as it was trained."
            )


def check_calls(model: nn.Module, kinds: Iterable[CallKind], path: Place) -> None:
    """The model's modules must take the arguments that they were recorded with.

    Args:
        model: the model that was given.
        kinds: the ways in which its modules were called.
        path: where the run is.

    Raises:
        ModelMismatchError: they do not.
    """
    for kind in kinds:
        module = None if kind.part is None else model.get_submodule(kind.part)
        if module is None or module._forward_pre_hooks:  # which may change the arguments
            continue
        args, kwargs = rebuild(kind.template, dict.fromkeys(tensor_names(kind.template), torch.empty(0)))
        try:
            inspect.signature(module.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ModelMismatchError(
                f"{type(module).__name__}.forward cannot be called as it was in the run at {path}: {error}."
            ) from error
