"""What is to be explained: scalars of the model's predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from explaind.calls import take_apart, tensor_names
from explaind.outputs import Output

__all__ = ["Query"]


@dataclass(frozen=True, eq=False, repr=False)
class Query:
    """Scalars q(x; θ) of a model's output, one per input, or means of them.

    Args:
        inputs: what the model is called with, rows first: a tensor, a tuple of positional arguments, or a
            mapping of keyword arguments.
        output: one of `explaind.outputs`, or a function from the model's output to scalars `[query]`.
        forward: `forward(model, *inputs, **inputs)`, where the prediction is not simply what `model(…)` returns: of a
            ModuleDict for instance `lambda parts, x: parts["decoder"](parts["encoder"](x))`.

    Raises:
        TypeError, ValueError: inputs without rows, of different lengths, or not matched by the output's targets.

    Example:
        >>> query = explaind.Query(torch.eye(2), output=explaind.outputs.value())
        >>> query.mean().names
        ('mean',)
    """

    inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]
    output: Output | Callable[[Any], Tensor]
    forward: Callable[..., Any] | None = None
    names: Sequence[Any] | None = None
    """A label per query; by default their positions."""
    weights: Tensor | None = None
    """Row j holds the weight of every input's scalar in query j, `[query, input]`; None is one query per input."""

    def __repr__(self) -> str:
        what = getattr(self.output, "name", getattr(self.output, "__name__", "function"))
        count = self.num_inputs if self.weights is None else len(self.weights)
        return f"<Query of {what}: {count} {'queries' if count > 1 else 'query'} from {self.num_inputs} inputs>"

    def __post_init__(self) -> None:
        if self.names is not None:
            object.__setattr__(self, "names", tuple(self.names))
        rows = {name: len(tensor) if tensor.ndim else -1 for name, tensor in self.arguments.items()}
        if not rows or len(set(rows.values())) != 1 or min(rows.values()) < 1:
            raise ValueError(
                f"a query needs inputs with the same number of rows, at least one, along their first axis; got {rows}."
            )
        if not callable(self.output):
            raise TypeError(
                f"output must be one of explaind.outputs or a function of the model's output; got {self.output!r}."
            )
        if isinstance(self.output, Output):
            self.output.targets_for(self.num_inputs)

    @property
    def arguments(self) -> dict[str, Tensor]:
        """The input tensors by name: `"0"`, `"1"`, … by position, or the keyword."""
        return self.call[0]

    @property
    def call(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and how the model is called with them; see `explaind.calls.take_apart`."""
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            tensors, template = take_apart((), inputs)
        else:
            tensors, template = take_apart(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})
        for name, entry in {**dict(enumerate(template["args"])), **template["kwargs"]}.items():
            if not tensor_names({"args": [entry], "kwargs": {}}):
                raise TypeError(f"the query's input '{name}' must be a tensor, or a list, tuple or dict of tensors.")
        return tensors, template

    @property
    def num_inputs(self) -> int:
        """Number of input rows."""
        return len(next(iter(self.arguments.values())))

    def mean(self, by_class: Sequence[int] | Tensor | None = None) -> Query:
        """Mean over all inputs as one query; with `by_class` labels `[input]`, one mean per class.

        Raises:
            ValueError: this is a mean already, or there is not one label per input.
        """
        if self.weights is not None:
            raise ValueError("this query is a mean already.")
        if by_class is None:
            return replace(
                self,
                weights=torch.full((1, self.num_inputs), 1 / self.num_inputs, dtype=torch.float64),
                names=("mean",),
            )
        labels = torch.as_tensor(by_class)
        if labels.shape != (self.num_inputs,):
            raise ValueError(f"by_class needs one label per input, {self.num_inputs}; got shape {tuple(labels.shape)}.")
        classes = labels.unique()
        members = (labels == classes[:, None]).to(torch.float64)
        return replace(self, weights=members / members.sum(dim=1, keepdim=True), names=tuple(classes.tolist()))
