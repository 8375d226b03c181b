"""How far the kernel machine, which training made, is from the network that it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

import explaind
from tests.benchmarks.problems import Problem, digits, digits_mlp, modular_addition
from tests.benchmarks.runs import first_steps, whole
from tests.benchmarks.sizes import Size

__all__ = ["kernel_machine"]

_TOLERANCE = 1e-4
"""Of the path integral, as a part of each output's path."""


def kernel_machine(size: Size) -> list[dict[str, Any]]:
    """Every output of some inputs, as the sum over the path and as the network computes it."""
    addition, convolutional, mlp = modular_addition(size), digits(size), digits_mlp(size)
    runs = [
        (addition, whole(addition, size)),
        (convolutional, first_steps(convolutional, size, size.machine_steps)),
        (mlp, first_steps(mlp, size, size.machine_steps)),
    ]
    return [_compare(problem, run, size) for problem, run in runs]


def _compare(problem: Problem, run: explaind.Run, size: Size) -> dict[str, Any]:
    with torch.no_grad():
        num_outputs = problem.make_model()(problem.query_inputs[:1]).shape[1]
    inputs = problem.query_inputs[: max(1, size.machine_queries // num_outputs)]
    fit = explaind.PathKernelModel(run, tolerance=_TOLERANCE).compare(inputs)
    return {"case": problem.name, "steps": run.num_steps, "num_outputs": num_outputs, **asdict(fit)}
