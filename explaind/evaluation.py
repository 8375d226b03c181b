"""What a network computes with other parameters than its own: its outputs, and the values of queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.errors import ModelMismatchError
from explaind.path.budget import check_memory
from explaind.path.queries import QueryFunction
from explaind.query import Query
from explaind.replay.model import exchanged, modes
from explaind.run import Run

__all__ = ["check_fit", "evaluate", "predict"]


def evaluate(model: nn.Module, params: Mapping[str, Tensor], *inputs: Any, **named_inputs: Any) -> Any:
    """What `model(*inputs, **named_inputs)` returns with other parameters, in eval mode and without a gradient.

    Args:
        model: the architecture; its own parameters and its modes are the same afterwards.
        params: parameters or buffers by name, in place of the model's own. What is not named is the model's own:
            to a run that has buffers or frozen parameters belongs `run.params(s) | run.fixed(s)`.
        inputs: what the model is called with.
        named_inputs: likewise, by keyword.

    Raises:
        ModelMismatchError: the model has no parameter or buffer of the name, or one of another shape.

    Example:
        >>> double = torch.nn.Linear(1, 1, bias=False)
        >>> evaluate(double, {"weight": torch.tensor([[2.0]])}, torch.tensor([[3.0]])).item()
        6.0
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    check_fit(params, own, given_by="params=", of="the model")
    with torch.no_grad(), modes(model, False), exchanged(model, params):
        return model(*inputs, **named_inputs)


def predict(run: Run, query: Query, networks: Iterable[Mapping[str, Tensor]]) -> xr.DataArray:
    """q(θ) of every query for any parameters θ, `[network, query]`, float64, in the unit of the query.

    For `run.params(run.num_steps)` it is the `prediction` of `run.attribute`. Buffers and frozen parameters are those
    at the end of the run.

    Args:
        run: opened with its model.
        query: as in `Run.attribute`.
        networks: the parameters of each network by name, as `run.params(step)` gives them; taken one after the other.

    Raises:
        ModelMismatchError: a network's parameters are not those of the run, by name and shape.
        ValueError: the query does not fit the model.
    """
    host = torch.device("cpu")
    function = QueryFunction(
        run,
        query,
        fixed=run.fixed(run.num_steps),
        combined=False,
        dtype=torch.float64,
        device=host,
        memory=check_memory(None, host),
    )
    own, values = run.params(run.num_steps), list[NDArray[Any]]()
    for params in networks:
        check_fit(own, params, given_by="the run", of="the network")
        values.append(function.at(run.table.flatten(params, torch.float64)).numpy())
    return xr.DataArray(
        np.array(values).reshape(len(values), function.num_queries),
        {"query": list(function.names)},
        ("network", "query"),
        name="prediction",
    )


def check_fit(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], *, given_by: str, of: str, same_type: bool = False
) -> None:
    """Refuse tensors that have no place among others.

    Args:
        given: tensors by name.
        own: those they are to stand in for.
        given_by: what gives them, in errors.
        of: what has the others, likewise.
        same_type: also refuse another data type.

    Raises:
        ModelMismatchError: `own` has not one of the names, or with another shape (or type).
    """
    for name, tensor in given.items():
        if name not in own:
            raise ModelMismatchError(
                f"{given_by} has {name!r}, which {of} has not; it has {', '.join(list(own)[:4])}, …. "
                "Give the parameters that the model was built with."
            )
        if tensor.shape != own[name].shape:
            raise ModelMismatchError(
                f"{name!r} has the shape {tuple(tensor.shape)} in {given_by}, and {tuple(own[name].shape)} in {of}. "
                "Build the model as it was trained."
            )
        if same_type and tensor.dtype != own[name].dtype:
            raise ModelMismatchError(
                f"{name!r} is {tensor.dtype} in {given_by}, and {own[name].dtype} in {of}. Convert it with "
                f".to({tensor.dtype})."
            )
