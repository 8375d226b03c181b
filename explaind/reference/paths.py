"""The path of the explained weights, and every update's share in each of its segments, written out as a matrix.

For the trained weights p_s = θ_s. For averaged ones p_s is a mean of θ_0 … θ_s, kept here weight by weight as
`torch.optim.swa_utils.AveragedModel` would make it, and so an update moves all later points.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.averages import Average
from explaind.query import Query
from explaind.reference.gradients import average_query_gradient, query_values
from explaind.run import Run

__all__ = ["adjoint_gradients", "end_values", "point_weights"]


def point_weights(num_steps: int, average: Average | None) -> NDArray[np.float64]:
    """Which part of each θ_j is in p_s, `[snapshot s, snapshot j]`.

    Example:
        >>> import explaind
        >>> point_weights(3, explaind.averages.swa(start=1)).tolist()
        [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    own = np.eye(num_steps + 1)
    if average is None:
        return own
    points = own.copy()
    updates = list(average.updates(num_steps))
    for step in range(updates[0] + 1, num_steps):
        points[step + 1] = points[step]
        if step in updates:
            keep = average.keep(updates.index(step))
            points[step + 1] = keep * points[step] + (1 - keep) * own[step + 1]
    return points


def adjoint_gradients(run: Run, query: Query, num_nodes: int, average: Average | None) -> list[list[dict[str, Tensor]]]:
    """Σ_t φ_t · ∂(p_{t+1} − p_t)/∂Δ_s of every step s and query; φ_s itself if nothing is averaged."""
    weights = point_weights(run.num_steps, average)
    # Δ_s is in every θ_j with j > s, so this much of it is in p_t: [snapshot t, step s]
    shares = np.flip(np.flip(weights, axis=1).cumsum(axis=1), axis=1)[:, 1:]
    points, fixed = explained_points(run, weights), explained_fixed(run, average)
    phi = [average_query_gradient(run, query, points[t], points[t + 1], fixed, num_nodes) for t in range(run.num_steps)]
    moved = np.diff(shares, axis=0)
    return [
        [
            {name: sum(moved[t, s] * phi[t][q][name] for t in range(run.num_steps)) for name in run.table.names}
            for q in range(len(phi[s]))
        ]
        for s in range(run.num_steps)
    ]


def end_values(run: Run, query: Query, average: Average | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """q(p_0) and q(p_S), two `[query]`."""
    points = explained_points(run, point_weights(run.num_steps, average))
    fixed = explained_fixed(run, average)
    return query_values(run, query, points[0], fixed), query_values(run, query, points[-1], fixed)


def explained_points(run: Run, weights: NDArray[np.float64]) -> list[dict[str, Tensor]]:
    """p_0 … p_S by parameter name, in float64."""
    snapshots = torch.stack([run.flat_params(s).double() for s in range(run.num_steps + 1)])
    return [run.table.unflatten(torch.from_numpy(row) @ snapshots) for row in weights]


def explained_fixed(run: Run, average: Average | None) -> dict[str, Tensor]:
    """Buffers and frozen parameters that the explained weights are used with."""
    return run.fixed(run.num_steps if average is None else average.updates(run.num_steps)[-1])
