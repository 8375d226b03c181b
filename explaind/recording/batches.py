"""Dataset indices for the batches of any map-style DataLoader, without touching its order or its RNG draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

__all__ = ["only_indices", "with_indices"]


class _IndexedDataset(Dataset[Any]):
    """Returns `(index, item)` or `(indices, items)` for an item or many; its attributes are those of the data set."""

    _dataset: Dataset[Any]

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.__dict__["_dataset"] = dataset

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # asked for while it is being unpickled
            raise AttributeError(name)
        return getattr(self._dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._dataset, name, value)

    def __getitem__(self, index: Any) -> tuple[Any, Any]:
        return index, self._dataset[index]

    def __getitems__(self, indices: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        many = getattr(self._dataset, "__getitems__", None)
        return indices, many(indices) if many is not None else [self._dataset[index] for index in indices]


class _IndexedCollate:
    """Collates the items as the loader would, and keeps the indices beside them."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, indexed: tuple[Any, Any]) -> tuple[list[int], Any]:
        index, items = indexed
        indices = [int(i) for i in index] if isinstance(index, (list, tuple)) else [int(index)]
        return indices, self._collate(items)


def with_indices(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A loader with the same sampler, workers and generator that yields `(indices, batch)`.

    The sampler objects are shared and iterating draws the same random numbers, so the batches are those that
    `loader` itself would have yielded.

    Raises:
        TypeError: not a DataLoader, or its data set is iterable-style and has no indices.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(
            f"recorder.batches expects a torch.utils.data.DataLoader, got {type(loader).__name__}. For a hand-made "
            "loop call recorder.examples(ids) before each forward pass, or name nothing: examples are then told "
            "apart by their content."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise TypeError(
            "recorder.batches needs a map-style data set: an IterableDataset has no indices. Iterate over the loader "
            "itself; call recorder.examples(ids) if its items carry ids, else they are told apart by content."
        )
    arguments = _settings(loader) | {"generator": loader.generator, "persistent_workers": loader.persistent_workers}
    if loader.batch_sampler is not None:
        arguments["batch_sampler"] = loader.batch_sampler
    else:
        arguments |= {"batch_size": None, "sampler": loader.sampler}
    return _indexed(loader, arguments)


def only_indices(loader: DataLoader[Any], indices: list[int], generator: torch.Generator) -> DataLoader[Any]:
    """A loader with the same data set and workers that yields `(indices, batch)` once, for some indices."""
    arguments = _settings(loader) | {"generator": generator}
    if loader.batch_sampler is not None:
        arguments["batch_sampler"] = [indices]
    else:  # without batches, an item is fetched by one index, unless the sampler batches them
        arguments |= {"batch_size": None, "sampler": indices if len(indices) == 1 else [indices]}
    return _indexed(loader, arguments)


def _settings(loader: DataLoader[Any]) -> dict[str, Any]:
    """How a loader fetches batches."""
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
    }
    if hasattr(loader, "in_order"):  # since torch 2.6
        settings["in_order"] = loader.in_order
    return settings


def _indexed(loader: DataLoader[Any], arguments: dict[str, Any]) -> DataLoader[Any]:
    collate: Callable[[Any], Any] = _IndexedCollate(loader.collate_fn)
    return DataLoader(_IndexedDataset(loader.dataset), collate_fn=collate, **arguments)
