"""How large recorded runs are, and how fast they are written and read."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs.blosc import Blosc
from numpy.typing import NDArray

import explaind
from tests.benchmarks.problems import Loop, Problem, modular_addition
from tests.benchmarks.runs import sections
from tests.benchmarks.sizes import Size
from tests.benchmarks.timing import seconds

__all__ = ["storage"]

_MOST = {1: 2.0, 50: 0.15}
"""Goals: bytes per step, in those of the parameters."""
_OF_THE_MODEL = ("params", "gradient", "state", "digest")
_READS = 8
_READS_IN_REVERSE = 16
_CODECS: Mapping[str, Callable[[NDArray[Any]], bytes]] = {
    "none": lambda rows: rows.tobytes(),
    "zstd 1": lambda rows: Blosc("zstd", 1, Blosc.NOSHUFFLE).encode(rows),
    "zstd 1, bit-shuffled": lambda rows: Blosc("zstd", 1, Blosc.BITSHUFFLE).encode(rows),
    "lz4, bit-shuffled": lambda rows: Blosc("lz4", 5, Blosc.BITSHUFFLE).encode(rows),
    "lz4, bit-shuffled, along steps": lambda rows: Blosc("lz4", 5, Blosc.BITSHUFFLE).encode(
        np.ascontiguousarray(rows.T)
    ),
    "zstd 3, bit-shuffled, along steps": lambda rows: Blosc("zstd", 3, Blosc.BITSHUFFLE).encode(
        np.ascontiguousarray(rows.T)
    ),
}


def storage(size: Size) -> list[dict[str, Any]]:
    """Stores of networks of several sizes with all and with some moments, and codecs on real rows."""
    records = []
    for width, num_train, num_steps in size.stored_networks:
        recipe = replace(
            size.recipe, width=width, hidden=8 * width if width == size.recipe.width else 4 * width, num_train=num_train
        )
        problem = modular_addition(replace(size, recipe=recipe))
        for every in _MOST:
            # Of a run with few snapshots so many steps that the stored moments are a fair share.
            steps = max(num_steps, 2 * every) if every > 1 else num_steps
            with tempfile.TemporaryDirectory() as folder:
                records += _measured(problem, Path(folder) / "run.zarr", every, steps)
    return records + _codecs(size)


def _measured(problem: Problem, path: Path, every: int, num_steps: int) -> list[dict[str, Any]]:
    plain, traced = Loop(problem), Loop(problem)
    plain.step()
    before = seconds(lambda: plain.train(num_steps)) / num_steps
    start = time.perf_counter()
    with explaind.trace(traced.model, traced.optimizer, path, snapshot_every=every) as recorder:
        traced.train(num_steps, recorder)
    recorded = (time.perf_counter() - start) / num_steps
    unit = (before + seconds(lambda: plain.train(num_steps)) / num_steps) / 2
    run = explaind.open_run(path, model=problem.make_model())
    elements = run.table.num_elements
    stored = sum(_num_bytes(path / name) for name in _OF_THE_MODEL) / num_steps / (4 * elements)
    common = {"case": f"{elements:,} parameters, snapshot_every={every}", "steps": num_steps, "unit_seconds": unit}
    chosen = random.Random(0).sample(range(num_steps), min(_READS, num_steps))
    reads = {
        "reading all parameters forward, per moment": statistics.mean(_forward(problem, path)),
        "reading moments with state and gradient in reverse, per moment": statistics.mean(_reverse(problem, path)),
        "reading the parameters of a moment at random": statistics.median(
            seconds(lambda step=step: _opened(problem, path).flat_params(step)) for step in chosen
        ),
    }
    return [
        {
            "work": "stored per step, inputs and cotangents apart",
            "unit": "4·D bytes",
            "value": stored,
            **common,
            "must": _MOST[every],
        },
        {"work": "recording, per step, with opening and closing", "unit": "t", "value": recorded / unit, **common},
        *({"work": work, "unit": "t", "value": value / unit, **common} for work, value in reads.items()),
    ]


def _opened(problem: Problem, path: Path) -> explaind.Run:
    return explaind.open_run(path, model=problem.make_model())


def _forward(problem: Problem, path: Path) -> list[float]:
    run = _opened(problem, path)
    return [seconds(lambda step=step: run.flat_params(step)) for step in range(run.num_steps + 1)]


def _reverse(problem: Problem, path: Path) -> list[float]:
    run = _opened(problem, path)

    def read(step: int) -> None:
        run.flat_params(step), run.state(step), run.flat_gradient(step)

    last = range(max(run.num_steps - _READS_IN_REVERSE, 0), run.num_steps)
    return [seconds(lambda step=step: read(step)) for step in reversed(last)]


def _num_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _codecs(size: Size) -> list[dict[str, Any]]:
    """Bytes and speed of codecs on what a later section of a run holds, in chunks as they are written."""
    problem = modular_addition(size)
    run = list(sections(problem, size, size.phases).values())[-1]
    steps = range(run.num_steps)
    kinds = {
        "parameters": torch.stack([run.flat_params(step) for step in steps]).numpy(),
        "gradients": torch.stack([run.flat_gradient(step) for step in steps]).numpy(),
    }
    records = []
    for kind, rows in kinds.items():
        for name, encode in _CODECS.items():
            encoded, work = encode(rows), partial(encode, rows)
            speed = rows.nbytes / min(seconds(work) for _ in range(3)) / 2**20
            common = {"case": f"{problem.name}, {kind}, {name}", "steps": len(rows)}
            records += [
                {"work": "size", "unit": "of the bytes", "value": len(encoded) / rows.nbytes, **common},
                {"work": "encoding", "unit": "MiB/s", "value": speed, **common},
            ]
    return records
