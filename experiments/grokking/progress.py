"""Nanda et al.'s progress measures (2023, arXiv 2301.05217): losses with and without the key frequencies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind import Run

from .pairs import ModularTask, Split
from .recipe import Recipe

__all__ = ["progress_measures", "progress_over_steps", "wave_of_answer"]


def wave_of_answer(logits: NDArray[np.float64], places: NDArray[np.int64], key: Sequence[int]) -> NDArray[np.float64]:
    """The part of the logits that is a wave of a key frequency in the answer.

    The orthogonal projection, over all pairs, of every output onto cos(2π f k / n) and sin(2π f k / n), k the place of
    the pair's answer: for addition the directions cos(w(a+b)) and sin(w(a+b)) of the paper.

    Args:
        logits: ``[first, second, output]`` of all ordered pairs, in cyclic order.
        places: Place of each pair's answer in the cycle, ``[first, second]``.
        key: Frequencies; 0 is the constant.

    Returns:
        ``[first, second, output]``.

    Examples:
        >>> places = (np.arange(5)[:, None] + np.arange(5)) % 5
        >>> wave = np.cos(2 * np.pi * places / 5)[..., None]
        >>> np.allclose(wave_of_answer(wave + 7.0, places, [1]), wave)
        True
        >>> np.allclose(wave_of_answer(wave + 7.0, places, [2]), 0)
        True
    """
    n = len(logits)
    of_answer = np.zeros((n, logits.shape[-1]))
    np.add.at(of_answer, places.ravel(), logits.reshape(n * n, -1) / n)  # every answer has n ordered pairs
    transform = np.fft.fft(of_answer, axis=0)
    kept = np.isin(np.minimum(np.arange(n), n - np.arange(n)), list(key))
    part: NDArray[np.float64] = np.fft.ifft(transform * kept[:, None], axis=0).real[places]
    return part


def progress_measures(model: nn.Module, task: ModularTask, split: Split, key: Sequence[int]) -> pd.DataFrame:
    """Losses of a network and of its logits with only, and without, the key frequencies.

    Args:
        model: One of the two architectures.
        task: The task that it was trained for.
        split: Its training and validation pairs.
        key: The key frequencies of the trained network.

    Returns:
        ``loss`` (nats) by ``measure``: ``"training"`` and ``"validation"``, the network's own; ``"restricted"``, on
        validation data with nothing but the constant and the key frequencies left in the logits; ``"excluded"``, on
        training data with the key frequencies removed.
    """
    tokens, places = task.table()
    with torch.no_grad():
        logits = model(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2]).double().numpy()
    only = wave_of_answer(logits, places.numpy(), [0, *key])
    without = logits - wave_of_answer(logits, places.numpy(), key)

    def loss(values: NDArray[np.float64], examples: Tensor, labels: Tensor) -> float:
        a, b = (task.places(operand) for operand in task.operands(examples))
        return float(F.cross_entropy(torch.from_numpy(values)[a, b], labels))

    training, validation = (split.train_tokens, split.train_labels), (split.validation_tokens, split.validation_labels)
    losses = {
        "training": loss(logits, *training),
        "validation": loss(logits, *validation),
        "restricted": loss(only, *validation),
        "excluded": loss(without, *training),
    }
    return pd.DataFrame({"measure": list(losses), "loss": list(losses.values())})


def progress_over_steps(
    recipe: Recipe, run: Run, split: Split, key: Sequence[int], steps: Sequence[int]
) -> pd.DataFrame:
    """:func:`progress_measures` of the parameters before each of some steps, with a column ``step``."""
    model, frames = recipe.make_model(), []
    for step in steps:
        model.load_state_dict(run.params(step))
        frames.append(progress_measures(model, recipe.task, split, key).assign(step=step))
    return pd.concat(frames, ignore_index=True)
