"""How a query calls the model: as the loop did, or by a function of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import nn

from explaind.calls import tensor_names
from explaind.query import Query
from explaind.run import Run

__all__ = ["query_call"]


def query_call(run: Run, query: Query) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of the model that a query evaluates, and its arguments' template.

    Raises:
        ValueError: the model was not called with these inputs in the loop, or in several ways.
    """
    given, template = query.call
    if query.forward is not None:
        return query.forward, template
    if isinstance(run.model, (nn.ModuleList, nn.ModuleDict)):
        raise ValueError(
            "the run's model is a container of modules that the loop called one by one, so say how a prediction is "
            'made: Query(…, forward=lambda parts, x: parts["decoder"](parts["encoder"](x))).'
        )
    recorded = {json.dumps(kind.template): kind.template for kind in run.kinds_of("")}.values()
    fitting = [known for known in recorded if set(tensor_names(known)) == set(given)]
    if recorded and not fitting:
        names = " or ".join(", ".join(tensor_names(known)) for known in recorded)
        raise ValueError(
            f"the model was called with the inputs {names}, the query has {', '.join(given)} (numbers are positions). "
            "Give tensors for the same ones (plain arguments are taken from the recording), or forward=."
        )
    if len(fitting) > 1:
        raise ValueError(
            "the model was called with these inputs and different plain arguments, so say which are meant: "
            "Query(…, forward=lambda model, x: model(x, …))."
        )
    return _call_model, fitting[0] if fitting else template


def _call_model(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return model(*args, **kwargs)
