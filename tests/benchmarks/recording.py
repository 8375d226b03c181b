"""What tracing adds to a training step."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import explaind
from tests.benchmarks.problems import Loop, Problem, digits, modular_addition
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import Ratio

__all__ = ["recording"]


def recording(size: Size) -> list[dict[str, Any]]:
    """Mean time of a traced step over that of an untraced one; blocks of both take turns."""
    # A recording makes its arrays and takes its memory once, and publishes its first steps at short notice: blocks take
    # as long as it takes until it goes on as it will.
    problems = (
        (modular_addition(size), size.recorded_steps),
        (digits(size), 25 * size.recorded_steps),
        (digits(size, full_batch=True), 4 * size.recorded_steps),
    )
    return [record for problem, num_steps in problems for record in _compare(problem, num_steps, size.recording_rounds)]


def _compare(problem: Problem, num_steps: int, rounds: int) -> list[dict[str, Any]]:
    plain, traced = Loop(problem), Loop(problem)
    plain.step()
    without = [_train(plain, num_steps)]
    within, around = [], []
    for _ in range(rounds):
        inside, outside = _train_traced(traced, num_steps)
        within.append(inside)
        around.append(outside)
        without.append(_train(plain, num_steps))
    wall, processor = (
        Ratio.of(
            [2 * within[r][clock] / (without[r][clock] + without[r + 1][clock]) for r in range(rounds)],
            [block[clock] / num_steps for block in without],
        )
        for clock in (0, 1)
    )
    common = {"case": problem.name, "unit": "t", "steps": num_steps}
    return [
        {"work": "recording, per step", **common, **wall.record(), "must": 1.05, "stretch": 1.02},
        {"work": "recording, per step, time of all processors", **common, **processor.record()},
        {
            "work": "opening and closing a recording",
            "case": problem.name,
            "unit": "s",
            "value": statistics.median(around),
            "low": min(around),
            "high": max(around),
            "rounds": rounds,
        },
    ]


def _train(loop: Loop, num_steps: int, recorder: explaind.Recorder | None = None) -> tuple[float, float]:
    """Seconds of the steps: on the wall, with all waiting for the writer in between, and of all processors."""
    wall, processor = time.perf_counter(), time.process_time()
    loop.train(num_steps, recorder)
    return time.perf_counter() - wall, time.process_time() - processor


def _train_traced(loop: Loop, num_steps: int) -> tuple[tuple[float, float], float]:
    """The same of traced steps, and the wall seconds of entering and leaving."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        with explaind.trace(loop.model, loop.optimizer, Path(folder) / "run.zarr") as recorder:
            inside = _train(loop, num_steps, recorder)
        return inside, time.perf_counter() - start - inside[0]
