"""Final weights in earlier networks: which layers are finished when, and which wait for others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

import explaind
from explaind.agreement import accuracy
from explaind.evaluation import evaluate
from explaind.interventions import swap

from .model import LAYER_GROUPS, OUTER, PIPELINE
from .task import Split

__all__ = ["LAYER_SETS", "swap_curves"]

LAYER_SETS: dict[str, tuple[str, ...]] = {
    **{group: (group,) for group in LAYER_GROUPS},
    "outer": OUTER,
    "pipeline": PIPELINE,
    "attention": ("attention encoders", "attention decoders"),
    "MLP": ("linear1", "linear2"),
}
"""What is swapped: each layer group, and the sets that the paper names."""


def swap_curves(
    run: explaind.Run,
    split: Split,
    *,
    sets: Mapping[str, Sequence[str]] = LAYER_SETS,
    num_checkpoints: int = 50,
) -> pd.DataFrame:
    """What final weights of a set do to the network of step s: accuracy(hybrid) − accuracy(plain) on validation.

    The hybrid has the weights of step S in the layers of the set, those of step s in all others, and is not trained.
    Above zero the set had still to learn what the rest of the network could already use.

    Args:
        run: the recorded run, with the layers that the sets name.
        split: the validation pairs.
        sets: names of the layers of each set.
        num_checkpoints: how many steps s, evenly spaced from 0 to S.

    Returns:
        One row per checkpoint and set: `step`, `set`, `plain_accuracy`, `accuracy` (of the hybrid) and `difference`.
    """

    def validated(params: Mapping[str, Tensor]) -> float:
        return accuracy(evaluate(run.model, params, split.validation_tokens), split.validation_labels)

    rows = []
    for step in np.unique(np.linspace(0, run.num_steps, num_checkpoints).round().astype(int)).tolist():
        plain = validated(run.params(step))
        for name, layers in sets.items():
            hybrid = validated(swap(run, layers, from_step=run.num_steps, into_step=step))
            rows.append(
                {"step": step, "set": name, "plain_accuracy": plain, "accuracy": hybrid, "difference": hybrid - plain}
            )
    return pd.DataFrame(rows)
