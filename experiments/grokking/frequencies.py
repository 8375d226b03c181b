"""Which Fourier frequencies a network computes with, and which ones show in the similarity of its predictions.

Operands and answers are put in the order of the cyclic group that they form (:attr:`ModularTask.cycle`): of residues
for addition and subtraction, of discrete logarithms for multiplication and division. A frequency f stands for the waves
cos(2π f k / n) and sin(2π f k / n) over places k = 0 … n-1, which are the characters of that group; f = 1 … n // 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import Lasso
from torch import nn

from explaind import Run

from .pairs import ModularTask
from .recipe import Recipe

__all__ = [
    "fit_frequencies",
    "frequency_shares",
    "key_frequencies",
    "similarity_profile",
    "spectra",
    "spectra_over_steps",
    "weight_on",
]


def frequency_shares(values: NDArray[np.float64], *, num_axes: int) -> NDArray[np.float64]:
    """Share of the variance that each single frequency accounts for, ``[frequency]`` from 1 to n // 2.

    With F the discrete Fourier transform over the cyclic axes, frequency f has the power |F|² at all index tuples made
    of 0, f and −f; the constant is left out. What is a product of two different frequencies is in none of them, so with
    two axes the shares sum to less than one; with one axis to one.

    Args:
        values: ``[place, …, channel]``; the first ``num_axes`` axes are cyclic, of one length n.
        num_axes: How many axes are cyclic.

    Examples:
        >>> places = np.arange(8)
        >>> wave = np.cos(2 * np.pi * 3 * (places[:, None] + places) / 8)  # a function of a + b
        >>> frequency_shares(wave[..., None], num_axes=2).round(12).tolist()
        [0.0, 0.0, 1.0, 0.0]
    """
    axes = tuple(range(num_axes))
    power = np.abs(np.fft.fftn(values, axes=axes)) ** 2
    power = power.reshape(*power.shape[:num_axes], -1).sum(-1)
    constant, total = power[(0,) * num_axes], power.sum()
    n = len(power)
    of_one = [power[np.ix_(*[np.unique([0, f, n - f])] * num_axes)].sum() for f in range(1, n // 2 + 1)]
    shares: NDArray[np.float64] = (np.array(of_one) - constant) / (total - constant)
    return shares


def spectra(model: nn.Module, task: ModularTask) -> pd.DataFrame:
    """The frequencies of a network's embedding, neurons and logits.

    Args:
        model: One of the two architectures.
        task: The task that it was trained for.

    Returns:
        ``share`` (:func:`frequency_shares`) by ``frequency`` and ``of``: ``"embedding"`` of the (first) operands,
        ``"neurons"`` after the ReLU of linear1 and ``"logits"``, both over all ordered pairs. Logits are those of the
        answers, less their mean over answers, which no probability depends on.
    """
    layer, embedding = model.get_submodule("linear1"), model.get_submodule("embedding")
    cycle = list(task.cycle)
    seen: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        tokens, _ = task.table()
        logits = model(tokens.flatten(0, 1))[:, cycle].unflatten(0, tokens.shape[:2])
        vectors = embedding(torch.tensor(cycle))
    hook.remove()
    parts = {
        "embedding": (vectors, 1),
        "neurons": (torch.relu(seen[0]).unflatten(0, tokens.shape[:2]), 2),
        "logits": (logits - logits.mean(dim=-1, keepdim=True), 2),
    }
    frames = []
    for of, (values, num_axes) in parts.items():
        shares = frequency_shares(values.double().numpy(), num_axes=num_axes)
        frames.append(pd.DataFrame({"of": of, "frequency": np.arange(1, len(shares) + 1), "share": shares}))
    return pd.concat(frames, ignore_index=True)


def spectra_over_steps(recipe: Recipe, run: Run, steps: Sequence[int]) -> pd.DataFrame:
    """:func:`spectra` of the parameters before each of some steps, with a column ``step``."""
    model, frames = recipe.make_model(), []
    for step in steps:
        model.load_state_dict(run.params(step))
        frames.append(spectra(model, recipe.task).assign(step=step))
    return pd.concat(frames, ignore_index=True)


def key_frequencies(shares: pd.DataFrame, *, of: str = "logits", covering: float = 0.9) -> list[int]:
    """The network's key frequencies: the fewest that carry most of what single frequencies account for, sorted.

    Args:
        shares: Of one network, from :func:`spectra`.
        of: Where to look.
        covering: Which part they carry, of the sum over all frequencies.

    Examples:
        >>> shares = pd.DataFrame({"of": "logits", "frequency": [1, 2, 3], "share": [0.5, 0.03, 0.3]})
        >>> key_frequencies(shares)
        [1, 3]
    """
    ranked = shares[shares["of"] == of].set_index("frequency")["share"].sort_values(ascending=False)
    covered = ranked.cumsum() / ranked.sum()
    return sorted(int(frequency) for frequency in ranked.index[: int((covered < covering).sum()) + 1])


def similarity_profile(similarity: xr.DataArray, cycle: Sequence[int]) -> pd.Series[float]:
    """Mean similarity of predictions by the difference of their classes, by ``difference`` 0 … n-1.

    Args:
        similarity: ``[query, other]``, both labelled by class; NaN where an entry should not count, such as that of a
            prediction with itself.
        cycle: The classes in cyclic order; a difference is one of places in it.

    Raises:
        ValueError: If a label is no class.
    """
    place = {label: k for k, label in enumerate(cycle)}
    labels = [similarity[axis].values.tolist() for axis in ("query", "other")]
    if strangers := {label for axis in labels for label in axis} - set(place):
        raise ValueError(
            f"similarity must be labelled by classes, here {min(cycle)} to {max(cycle)}; got {strangers.pop()!r}."
        )
    rows, columns = (np.array([place[label] for label in axis]) for axis in labels)
    difference = (rows[:, None] - columns[None, :]) % len(cycle)
    entries = pd.Series(similarity.transpose("query", "other").values.ravel(), name="similarity")
    return entries.groupby(pd.Series(difference.ravel(), name="difference")).mean().dropna()


def fit_frequencies(
    similarity: xr.DataArray, cycle: Sequence[int], *, penalty: float = 0.1, equal_classes: bool = True
) -> pd.DataFrame:
    """The paper's frequency fit: Lasso weights of cosines that together give the similarity by difference of classes.

        similarity(d) ≈ constant + Σ_f weight_f cos(2π f d / n),    d = place of c − place of c' mod n

    Similarities are symmetric, so sines have no weight and are left out.

    Args:
        similarity: ``[query, other]`` labelled by class, as in :func:`similarity_profile`.
        cycle: The classes in cyclic order.
        penalty: Of the Lasso, as a part of the least one that leaves no weight at all; on a whole profile it removes
            the frequencies whose amplitude is below this part of the largest.
        equal_classes: Whether pairs of one class count, as in the paper. If these are alike beyond any wave, that peak
            at d = 0 gives the same weight to all frequencies; without them only what is cyclic is fitted.

    Returns:
        ``weight`` by ``frequency`` from 1 to n // 2.

    Raises:
        ValueError: If a label is no class.
    """
    profile = similarity_profile(similarity, cycle)
    if not equal_classes:
        profile = profile.drop(0, errors="ignore")
    frequencies = np.arange(1, len(cycle) // 2 + 1)
    waves = np.cos(2 * np.pi * np.outer(profile.index.to_numpy(), frequencies) / len(cycle))
    centred = profile.to_numpy() - profile.mean()
    largest = float(np.abs((waves - waves.mean(axis=0)).T @ centred).max()) / len(profile)
    fit = Lasso(alpha=penalty * largest, max_iter=100_000).fit(waves, profile.to_numpy())
    return pd.DataFrame({"frequency": frequencies, "weight": fit.coef_})


def weight_on(fit: pd.DataFrame, key: Sequence[int]) -> float:
    """Part of Σ |weight| of a fit that lies on the key frequencies; by chance it would be theirs among all."""
    weights = fit.set_index("frequency")["weight"].abs()
    return float(weights.loc[list(key)].sum() / weights.sum())
