"""How large everything is that gets measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.grokking.recipes import Recipe, paper, quick

__all__ = ["FULL", "Size", "toy"]


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of all benchmarks."""

    folder: Path
    """Where recorded runs are kept between benchmarks; what is there is used again."""
    recipe: Recipe
    """Of modular addition."""
    phases: Mapping[str, int]
    """First step of each recorded section of modular addition, ascending."""
    section: int
    """Steps of a section."""
    recording_rounds: int
    """How often recorded and unrecorded steps take turns."""
    recorded_steps: int
    """Steps of a block in which recording is timed."""
    num_digits: int
    """Training images of the digits network."""
    width: int
    """Channels of its first convolution."""
    digits_batch: int
    """Images of a step."""
    digits_phases: Mapping[str, int]
    """First step of each of its sections, ascending."""
    num_queries: int
    """Of the many queries."""
    num_averaged: int
    """Inputs of the mean, or all there are."""
    num_errors: int
    """Queries that errors are averaged over."""
    rounds: int
    """How often a measured work and the training step take turns."""
    scaling_base: int
    """Width and number of examples from which the scaling curves begin; the other sizes are parts of it."""
    stored_networks: tuple[tuple[int, int, int], ...]
    """Width, training examples and recorded steps of the networks whose stores are measured."""
    points: int
    """Sizes along each scaling curve, each twice the one before."""
    nodes: int
    """Largest number of nodes of the work-precision diagram's fixed rules."""
    machine_steps: int
    """Steps of the digits' runs whose kernel machines are compared with the networks."""
    machine_queries: int
    """About how many outputs these predict, of all their inputs together."""
    naive_recipe: Recipe
    """Of the run that the published algorithm is tried on: modular addition with all its outputs, else small."""
    naive_steps: int
    """Steps of that run."""
    naive_queries: int
    """Queries that the published algorithm explains."""
    naive_nodes: int
    """Nodes of its midpoint rule."""


FULL = Size(
    folder=Path("storage/benchmarks"),
    recipe=paper(),
    phases={"first steps": 0, "step 400": 400, "step 800": 800},
    section=10,
    recording_rounds=5,
    recorded_steps=60,
    num_digits=1437,
    width=8,
    digits_batch=96,
    digits_phases={"first steps": 0, "step 100": 100},
    num_queries=100,
    num_averaged=2000,
    num_errors=20,
    rounds=3,
    scaling_base=64,
    stored_networks=((64, 1000, 200), (304, 256, 100), (968, 64, 16)),
    points=4,
    nodes=32,
    machine_steps=150,
    machine_queries=120,
    naive_recipe=replace(paper(), num_train=8, width=32, hidden=128, unused_positions=0),
    naive_steps=24,
    naive_queries=8,
    naive_nodes=100,
)


def toy(folder: Path) -> Size:
    """All benchmarks in seconds; what they measure then means nothing."""
    return replace(
        FULL,
        folder=folder,
        # Such short steps cross few kinks, so that few nodes do.
        recipe=replace(quick(), modulus=7, num_train=20, width=8, heads=2, hidden=8, max_steps=4, learning_rate=1e-4),
        phases={"first steps": 0, "step 2": 2},
        section=2,
        recording_rounds=1,
        recorded_steps=1,
        num_digits=30,
        width=2,
        digits_batch=5,
        digits_phases={"first steps": 0, "step 2": 2},
        num_queries=2,
        num_averaged=2,
        num_errors=2,
        rounds=1,
        scaling_base=16,
        stored_networks=((8, 5, 2),),
        points=2,
        nodes=2,
        machine_steps=2,
        machine_queries=10,
        naive_recipe=replace(quick(), modulus=7, num_train=4, width=8, heads=2, hidden=8),
        naive_steps=2,
        naive_queries=2,
        naive_nodes=40,
    )
