"""The slow, obvious twin: every gradient written out, every momentum term followed by hand.

It shares nothing with the fast path but the recorded numbers: per-example gradients are computed one example
at a time with plain autograd, the path integral with a dense Gauss–Legendre rule, and the optimizer's response
A_{s,i} by following each gradient from the step i that it was taken at to every step s that applied it, with all that
the optimizer divides by recomputed from the recorded gradients. Cost: steps² × examples × queries × D; for tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from explaind.averages import Average
from explaind.query import Query
from explaind.reference.filters import History
from explaind.reference.gradients import example_gradients
from explaind.reference.paths import adjoint_gradients, end_values
from explaind.run import Run

__all__ = ["Reference", "decompose"]


@dataclass(frozen=True)
class Reference:
    """The full decomposition, with both step axes at once."""

    contribution: xr.DataArray
    """−⟨φ_s, A_{s,i} g_{k,i}⟩, `[query, example, token, step i, update_step s, parameter]`; without `by_token` there is
    one token, the whole row"""
    decay: xr.DataArray
    """The same for weight decay, `[query, step, update_step, parameter]`"""
    initial: xr.DataArray
    """q(θ_0), `[query]`"""
    prediction: xr.DataArray
    """q(θ_S), `[query]`"""


def decompose(
    run: Run, query: Query, *, num_nodes: int = 6, by_token: bool = False, average: Average | None = None
) -> Reference:
    """Decompose the predictions of a float64 run of a dense optimizer of `torch.optim` by brute force.

    Args:
        run: opened with its model, in which examples do not interact.
        query: one query per input.
        num_nodes: Gauss–Legendre nodes per step.
        by_token: tell the entries of the axis after the examples apart.
        average: explain averaged weights in place of the last ones.
    """
    steps, names = range(run.num_steps), run.table.names
    examples = {int(example): place for place, example in enumerate(run.examples)}
    phi = adjoint_gradients(run, query, num_nodes, average)
    initial, prediction = end_values(run, query, average)
    num_queries = len(initial)
    shape = (num_queries, run.num_steps, run.num_steps, len(names))
    per_step = [example_gradients(run, i, by_token=by_token) for i in steps]
    num_tokens = max(token for gradients in per_step for _, token, _ in gradients) + 1
    contribution = np.zeros((num_queries, len(examples), num_tokens, *shape[1:]))
    decay = np.zeros(shape)
    for p, name in enumerate(names):
        history = History(run, p)
        for i in history.updates:
            every = [gradient[name] for _, _, gradient in per_step[i]]
            shares = history.follow({i: history.entering(i, torch.stack(every))}) if every else {}
            for s, share in shares.items():
                for q in range(num_queries):
                    products = (phi[s][q][name] * share).reshape(len(every), -1).sum(dim=1)
                    for (example, token, _), product in zip(per_step[i], products.tolist(), strict=True):
                        contribution[q, examples[example], token, i, s, p] -= product
            for s, share in history.follow({i: history.coupled_decay(i)}).items():
                for q in range(num_queries):
                    decay[q, i, s, p] -= float((phi[s][q][name] * share).sum())
            for q in range(num_queries):
                decay[q, i, i, p] -= float((phi[i][q][name] * history.decoupled_decay(i)).sum())
    coords = {
        "query": range(num_queries),
        "example": list(examples),
        "token": range(num_tokens),
        "step": steps,
        "update_step": steps,
        "parameter": list(names),
    }
    decay_dims = [name for name in coords if name not in ("example", "token")]
    return Reference(
        contribution=xr.DataArray(contribution, coords, dims=list(coords)),
        decay=xr.DataArray(decay, {name: coords[name] for name in decay_dims}, decay_dims),
        initial=xr.DataArray(initial, dims="query"),
        prediction=xr.DataArray(prediction, dims="query"),
    )
