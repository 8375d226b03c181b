"""Recorded runs to measure on, made when they are first asked for and kept under `Size.folder`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

import explaind
from tests.benchmarks.problems import Loop, Problem
from tests.benchmarks.sizes import Size

__all__ = ["first_steps", "sections", "whole"]


def sections(problem: Problem, size: Size, phases: Mapping[str, int]) -> dict[str, explaind.Run]:
    """A few steps from each phase of one training run, each a recorded run of its own.

    The momentum that a section begins with is from before its recording, and counted as such.
    """
    paths = {phase: _place(problem, size, f"from-{first}-steps-{size.section}") for phase, first in phases.items()}
    if not all(path.exists() for path in paths.values()):
        loop, done = Loop(problem), 0
        for phase, first in phases.items():
            loop.train(first - done)
            _record(loop, paths[phase], size.section)
            done = first + size.section
    return {phase: _open(problem, path) for phase, path in paths.items()}


def first_steps(problem: Problem, size: Size, number: int) -> explaind.Run:
    """A run from its first step on."""
    path = _place(problem, size, f"first-{number}-steps")
    if not path.exists():
        _record(Loop(problem), path, number)
    return _open(problem, path)


def whole(problem: Problem, size: Size) -> explaind.Run:
    """Modular addition from its first step until it has grokked."""
    path = _place(problem, size, "whole")
    if not path.exists():
        _record(Loop(problem), path, size.recipe.max_steps, until_grokked=True)
    return _open(problem, path)


def _open(problem: Problem, path: Path) -> explaind.Run:
    """A recorded run of a problem."""
    return explaind.open_run(path, model=problem.make_model())


def _place(problem: Problem, size: Size, what: str) -> Path:
    return size.folder / f"{problem.name.replace(' ', '-')}-{what}.zarr"


def _record(loop: Loop, path: Path, num_steps: int, *, until_grokked: bool = False) -> None:
    """Record, and give the store its name once it is whole."""
    unfinished = path.with_suffix(".unfinished")
    with explaind.trace(loop.model, loop.optimizer, unfinished, overwrite=True) as recorder:
        for _ in range(num_steps):
            loop.step(recorder)
            if until_grokked and _accuracy(loop) == 1:
                break
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)


def _accuracy(loop: Loop) -> float:
    """Part of all training and query inputs that are answered right."""
    problem = loop.problem
    inputs = torch.cat([problem.inputs, problem.query_inputs])
    labels = torch.cat([problem.labels, problem.query_labels])
    with torch.no_grad():
        return float((loop.model(inputs).argmax(dim=1) == labels).double().mean())
