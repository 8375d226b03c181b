"""How much of each analysis a study makes: all figures at any size, more of it where the run is larger."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PAPER", "QUICK", "Sizes"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Numbers of queries, repetitions and checkpoints."""

    tolerance: float
    """Wanted quadrature error, as a part of each query's path length."""
    single_queries: int
    """Validation pairs that are explained by every training example."""
    window: int
    """Steps of a window of parameter scores."""
    machine_inputs: int
    """Validation pairs whose every output the kernel machine predicts."""
    node_queries: int
    """Validation pairs on which the closure error is measured against the number of nodes."""
    node_steps: int
    """Steps of each phase on which it is."""
    checkpoints: int
    """Steps at which weights are swapped and progress is measured."""
    retrain_seeds: int
    """Random draws of what is not copied."""
    retrain_epochs: int
    """Epochs of each retraining."""
    draws: int
    """Series that change points are tested with."""
    perturbed: int
    """Examples, and parameters, that are removed of each kind: with the largest scores, and at random."""
    perturbed_queries: int
    """Validation pairs that are predicted without them."""
    perturbed_steps: tuple[int, ...]
    """Numbers of last steps of the run that are trained again without an example."""


QUICK = Sizes(
    tolerance=1e-3,
    single_queries=18,
    window=50,
    machine_inputs=1,
    node_queries=4,
    node_steps=2,
    checkpoints=40,
    retrain_seeds=3,
    retrain_epochs=250,
    draws=199,
    perturbed=50,
    perturbed_queries=5,
    perturbed_steps=(1, 10),
)
"""Minutes."""

PAPER = Sizes(
    tolerance=1e-4,
    single_queries=100,
    window=50,
    machine_inputs=3,
    node_queries=20,
    node_steps=10,
    checkpoints=100,
    retrain_seeds=5,
    retrain_epochs=500,
    draws=199,
    perturbed=200,
    perturbed_queries=10,
    perturbed_steps=(1, 10),
)
"""Hours."""
