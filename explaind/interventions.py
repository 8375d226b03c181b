"""Change the weights of a trained network: swap layers between steps, transplant them, prune.

A contribution says how training made a prediction; an intervention asks what the prediction would be with other
weights. Parameters come and go by name, as `run.params(step)` gives them; what a network computes with them is told by
`explaind.evaluation`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from explaind.evaluation import check_fit
from explaind.run import Run

__all__ = ["prune", "swap", "transplant"]


def swap(run: Run, layers: Sequence[str], *, from_step: int, into_step: int) -> dict[str, Tensor]:
    """A hybrid network: θ_into_step, with the layers named replaced by those of θ_from_step; nothing is trained.

    ExPLAIND (arXiv 2505.20076) swaps the final weights of a set of layers into the network of an earlier step:
    `from_step=run.num_steps, into_step=s`.

    Args:
        run: the recorded run; its `layers` say which parameters a layer has.
        layers: names of the layers to replace, any number of them.
        from_step: whose weights the layers named get, from 0 to S.
        into_step: whose weights all other parameters keep, from 0 to S.

    Returns:
        The parameters by name, in the order and types of `run.params`.

    Raises:
        ValueError: there is no such layer.
        IndexError: there is no such step.
    """
    members = _members(run, layers)
    source = run.params(from_step)
    return {name: source[name] if name in members else kept for name, kept in run.params(into_step).items()}


def transplant(run: Run, layers: Sequence[str], *, step: int, model: nn.Module) -> None:
    """Copy layers of θ_step into another model, in place; its other parameters stay as they are.

    Args:
        run: the recorded run; its `layers` say which parameters a layer has.
        layers: names of the layers to copy, any number of them.
        step: whose weights they are, from 0 to S.
        model: what they are copied into, such as a freshly drawn model to be trained again.

    Raises:
        ValueError: there is no such layer.
        IndexError: there is no such step.
        ModelMismatchError: the model has no parameter of the name, or one of another shape or type. It is left as it
            was.
    """
    source = {name: tensor for name, tensor in run.params(step).items() if name in _members(run, layers)}
    own = dict(model.named_parameters())
    check_fit(source, own, given_by="the run", of="the model", same_type=True)
    with torch.no_grad():
        for name, tensor in source.items():
            own[name].copy_(tensor)


def prune(params: Mapping[str, Tensor], scores: ArrayLike | xr.DataArray, *, fraction: float) -> dict[str, Tensor]:
    """Keep the fraction of all parameter elements that score highest, and set the others to zero.

    round(fraction · D) of the D elements are kept; of equal scores those that come first. With fraction 1 nothing
    changes, with 0 every weight is zero.

    Args:
        params: the parameters by name, as `run.params(step)` gives them.
        scores: one per element, `[element]`, none NaN: along the parameters one after the other, each flattened; or,
            as an `xarray.DataArray` with `element` as coordinate, in any order. So are sums over the other axes of
            `run.attribute(query, by=("query", "element"))`. To keep what matters either way, give absolute values.
        fraction: the part of the elements to keep, from 0 to 1.

    Returns:
        New parameters by name; those given are left as they were.

    Raises:
        ValueError: a fraction outside 0 … 1, or not one score, a number, for every element.

    Example:
        >>> weights = {"a": torch.tensor([3.0, -1.0]), "b": torch.tensor([[2.0], [0.5]])}
        >>> kept = prune(weights, [9.0, 0.0, 1.0, 1.0], fraction=0.5)
        >>> kept["a"].tolist(), kept["b"].tolist()
        ([3.0, 0.0], [[2.0], [0.0]])
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is the part of the elements to keep, from 0 to 1; got {fraction!r}.")
    total = sum(tensor.numel() for tensor in params.values())
    order = np.argsort(-_by_element(scores, total), kind="stable")
    keep = torch.zeros(total, dtype=torch.bool)
    keep[torch.from_numpy(order[: round(fraction * total)])] = True
    masks = keep.split([tensor.numel() for tensor in params.values()])
    return {
        name: torch.where(mask.reshape(tensor.shape).to(tensor.device), tensor, 0)
        for (name, tensor), mask in zip(params.items(), masks, strict=True)
    }


def _members(run: Run, layers: Iterable[str]) -> set[str]:
    """Names of the parameters of some layers."""
    if isinstance(layers, str):
        raise ValueError(f"layers is a list of names; got the string {layers!r}.")
    names = list(layers)
    if unknown := [name for name in names if name not in run.layers]:
        raise ValueError(f"there is no layer {unknown[0]!r}; the layers are {', '.join(run.layers)}.")
    members = {parameter for name in names for parameter in run.layers[name]}
    if strangers := sorted(members.difference(run.table.names)):
        raise ValueError(f"run.layers names {strangers[0]!r}, which is not a parameter of the run.")
    return members


def _by_element(scores: ArrayLike | xr.DataArray, total: int) -> NDArray[Any]:
    """The scores in the order of the flat parameters, checked."""
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (total,):
        raise ValueError(
            f"prune needs one score per parameter element, [element] of length {total}; got the shape {values.shape}. "
            "Sum the other axes out."
        )
    if np.isnan(values).any():
        raise ValueError(f"{int(np.isnan(values).sum())} scores are NaN, which no order is known of.")
    if not isinstance(scores, xr.DataArray) or "element" not in scores.coords:
        return values
    place = scores["element"].values
    if not np.array_equal(np.sort(place), np.arange(total)):
        raise ValueError(
            f"the element coordinate must name each of 0 … {total - 1} once; it goes from {place.min()} to "
            f"{place.max()}. Attribute all layers, without layers=…"
        )
    ordered = np.empty_like(values)
    ordered[place] = values
    return ordered
