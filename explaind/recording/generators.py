"""Random number generators: the states of those that a loop draws from, and how to put them back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = [
    "generators_of",
    "plain_random_state",
    "put_random_state",
    "put_states",
    "random_state",
    "states_of",
]

_PARTS_OF_A_LOADER = ("sampler", "batch_sampler")


def random_state(device: torch.device) -> dict[str, Any]:
    """States of the process's own generators: torch's on the host and on the model's device, Python's and NumPy's."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": np.random.get_state()}  # noqa: NPY002
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def plain_random_state(state: dict[str, Any]) -> dict[str, Any]:
    """What `random_state` gave as plain data and tensors; this takes longer than that."""
    version, words, gauss = state["python"]
    name, numpy_words, *rest = state["numpy"]
    return state | {
        "python": [version, torch.tensor(words), gauss],
        "numpy": [name, torch.from_numpy(numpy_words.astype(np.int64)), *rest],
    }


def put_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Go on from what `plain_random_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, numpy_words, *rest = state["numpy"]
    np.random.set_state((name, numpy_words.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a data loader and its samplers bring along, each once."""
    return list({id(generator): generator for generator in _generators(loader, set())}.values())


def _generators(part: Any, seen: set[int]) -> Iterator[torch.Generator]:
    if part is None or id(part) in seen:
        return
    seen.add(id(part))
    generator = getattr(part, "generator", None)
    if isinstance(generator, torch.Generator):
        yield generator
    for name in _PARTS_OF_A_LOADER:
        yield from _generators(getattr(part, name, None), seen)


def states_of(generators: list[torch.Generator]) -> list[torch.Tensor]:
    """State of each."""
    return [generator.get_state() for generator in generators]


def put_states(generators: list[torch.Generator], states: list[torch.Tensor]) -> None:
    """Go on from what `states_of` gave."""
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.cpu())
