"""A data set that is asked for the inputs of some examples, in whichever form a user has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate

from explaind.errors import DataMismatchError

__all__ = ["data_source"]


def data_source(data: Any) -> Callable[[list[int]], Any]:
    """A function from example ids `[row]` to their batch: tensors with a row per id, one or in any container.

    Args:
        data: a map-style data set, whose items are collated as a DataLoader does by default; a DataLoader, of which the
            data set and the `collate_fn` are used; a tensor of all inputs; or such a function itself.

    Raises:
        TypeError: it is nothing of this kind.

    Example:
        >>> data_source([(torch.zeros(2), 7), (torch.ones(2), 8)])([1, 0])
        [tensor([[1., 1.],
                [0., 0.]]), tensor([8, 7])]
    """
    if isinstance(data, Tensor):
        return _Examples(data.__getitem__)
    dataset, collate = (data.dataset, data.collate_fn) if isinstance(data, DataLoader) else (data, _collate)
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "data= must find an example by its id, which an IterableDataset cannot: give a map-style data set, or a "
            "function that takes a list of ids to their inputs."
        )
    if isinstance(data, DataLoader) and data.batch_sampler is None:  # the data set makes batches itself
        return _Examples(lambda ids: collate(dataset[ids]))
    if hasattr(dataset, "__getitem__") and not isinstance(dataset, (str, bytes, type)):
        return _Examples(lambda ids: collate(_items(dataset, ids)))
    if callable(data) and not isinstance(data, type):
        return _Examples(data)
    raise TypeError(
        "data= is a map-style data set, a DataLoader of one, a tensor of all inputs, or a function that takes a list "
        f"of ids to their inputs; got {data!r:.200}."
    )


class _Examples:
    """Gives the batch of some ids, or says which ones there are not."""

    def __init__(self, batch: Callable[[list[int]], Any]) -> None:
        self._batch = batch

    def __call__(self, ids: list[int]) -> Any:
        try:
            return self._batch(ids)
        except LookupError as error:
            raise DataMismatchError(
                f"the data set does not have all of the examples {_listed(ids)}: {error!r:.300}. It must be the one "
                "that the run was recorded with."
            ) from error


def _items(dataset: Any, ids: list[int]) -> list[Any]:
    many = getattr(dataset, "__getitems__", None)
    items: list[Any] = many(ids) if many is not None else [dataset[example] for example in ids]
    return items


def _collate(items: Any) -> Any:
    try:
        return default_collate(items)
    except (RuntimeError, TypeError) as error:
        raise DataMismatchError(
            f"the data set's items do not make a batch by torch's default_collate: {error!r:.300}. Give as data= the "
            "DataLoader, whose collate_fn is used, or a function that takes a list of ids to their inputs."
        ) from error


def _listed(ids: list[int], most: int = 5) -> str:
    return ", ".join(map(str, ids[:most])) + (", …" if len(ids) > most else "")
