"""What a recording will cost, found by recording a few steps of a copy."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from torch.optim import Optimizer

from explaind.calls import named_tensors
from explaind.commit import Commit
from explaind.info import DIGESTS, INPUTS, REST, kind_of
from explaind.places import Place, file_sizes
from explaind.recording.chunks import GrowingArray, encoded_size
from explaind.recording.snapshots import STATE_EVERY
from explaind.store import StoreReader
from explaind.units import readable_size

__all__ = ["RecordingPlan", "any_loss", "measure"]

_NUM_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class RecordingPlan:
    """What a recording of a number of steps takes, as `Recorder.plan` estimates it."""

    steps: int
    """Number of optimizer steps."""
    bytes_per_step: dict[str, int]
    """Bytes on the disk that each step adds, by kind of array."""
    bytes_per_example: int
    """Bytes on the disk that the input of each distinct example takes, or what refers to it."""
    examples: int
    """Number of distinct examples."""
    bytes_once: int
    """Bytes on the disk for what is written once."""
    step_seconds: float
    """Time of a step of the loop without recording."""
    overhead_seconds: float
    """Time that recording adds to each step."""

    @property
    def total_bytes(self) -> int:
        """Bytes on the disk in the end."""
        per_step = sum(self.bytes_per_step.values())
        return self.steps * per_step + self.examples * self.bytes_per_example + self.bytes_once

    def __str__(self) -> str:
        inputs = self.examples * self.bytes_per_example
        parts = sorted(self.bytes_per_step.items(), key=lambda part: -part[1])
        return "\n".join(
            [
                f"{self.steps:,} steps take {readable_size(self.total_bytes)} on the disk. Each adds",
                *(f"{readable_size(size):>12}  {kind}" for kind, size in parts),
                f"and there are once {readable_size(inputs)} for the inputs of {self.examples:,} examples.",
                f"A step takes {1e3 * self.step_seconds:.3g} ms, and {1e3 * self.overhead_seconds:.2g} ms more with "
                "the recording.",
            ]
        )


def measure(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    record: Callable[[Path, nn.Module, list[Optimizer]], AbstractContextManager[Any]],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    path: Place,
    steps: int,
    examples: int | None,
) -> RecordingPlan:
    """Make steps of copies with and without recording them, in a directory that is deleted again.

    Args:
        model: the module; it is left as it was.
        optimizers: likewise.
        record: makes a recorder, to a path, of copies of them.
        loss: takes a copy of the model, and the recorder if there is one, to a loss.
        path: where the run would be; for a URL the directory is one for temporary files.
        steps: how many steps to plan for.
        examples: how many distinct examples; None for those of the loss.
    """
    place = next(parent for parent in path.absolute().parents if parent.is_dir()) if isinstance(path, Path) else None
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with tempfile.TemporaryDirectory(dir=place, prefix=".plan-") as directory, torch.random.fork_rng(devices):
        store = Path(directory) / "run.zarr"
        plain = _make_steps(model, optimizers, None, loss)
        traced = _make_steps(model, optimizers, partial(record, store), loss)
        per_step, once = _sizes(StoreReader(store), steps)
        num_inputs = Commit.read(store).lengths["input"]
        seconds_per_byte = _writing_speed(Path(directory) / "speed.zarr")
    inputs = once.pop(INPUTS, 0) + once.pop(DIGESTS, 0)
    # The writing goes on beside the loop, which waits if it is the faster of the two.
    waiting = sum(per_step.values()) * seconds_per_byte - traced
    return RecordingPlan(
        steps=steps,
        bytes_per_step=dict(per_step),
        bytes_per_example=inputs // num_inputs,
        examples=num_inputs if examples is None else examples,
        bytes_once=once.total(),
        step_seconds=plain,
        overhead_seconds=max(0.0, traced - plain) + max(0.0, waiting),
    )


def _make_steps(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    record: Callable[[nn.Module, list[Optimizer]], AbstractContextManager[Any]] | None,
    loss: Callable[[nn.Module, Any], Tensor],
) -> float:
    """Make some steps of a copy, recorded or not; returns the median of their times."""
    memo: dict[int, Any] = {}
    model = copy.deepcopy(model, memo)
    copies = [_copied(optimizer, memo) for optimizer in optimizers]
    times = []
    with record(model, copies) if record is not None else nullcontext() as recorder:
        for _ in range(_NUM_STEPS):
            begun = time.perf_counter()
            for optimizer in copies:
                optimizer.zero_grad()
            loss(model, recorder).backward()
            for optimizer in copies:
                optimizer.step()
            times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _writing_speed(path: Path) -> float:
    """Seconds that a byte takes to be encoded and to come on the disk."""
    zarr.create_group(path)
    rows = np.random.default_rng(0).standard_normal((8, 1 << 16), np.float32)
    array = GrowingArray(path, "rows", ("step", "element"), rows, len(rows))
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        array.append(rows)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) / encoded_size(rows)


def _copied(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A copy without the hooks, and without the wrapper by which a scheduler would see its steps."""
    copied = copy.deepcopy(optimizer, memo)
    kept = {name: value for name, value in vars(optimizer).items() if name not in vars(copied) and name != "step"}
    vars(copied).update(copy.deepcopy(kept, memo))
    return copied


def any_loss(output: Any) -> Tensor:
    """A squared distance to random numbers: its cotangents are dense, and about as large as those of a mean loss."""
    generator, terms = torch.Generator().manual_seed(0), []
    for _, tensor in named_tensors(output):
        if tensor.requires_grad and tensor.ndim:
            target = torch.randn(tensor.shape, generator=generator).to(tensor)
            terms.append((tensor - target).square().sum() / (10 * len(tensor)))
    return torch.stack(terms).sum()


def _sizes(store: StoreReader, steps: int) -> tuple[Counter[str], Counter[str]]:
    """Bytes that each of so many steps will add, and those that come once, by kind of array."""
    per_step: Counter[str] = Counter()
    once = Counter({REST: sum(size for name, size in file_sizes(store.path) if name.endswith(".json"))})
    every = store.attributes["snapshot_every"]
    stored = {"snapshot": every, "state_snapshot": every if every > 1 else STATE_EVERY}
    for name in store.commit.arrays:
        rows, kind = store.read(name), kind_of(name)
        between = next((number for along, number in stored.items() if store.has_along(name, along)), 1)
        is_once = kind in (INPUTS, DIGESTS) or name.startswith("loop_")
        if is_once or (name == "fixed" and len(rows) < _NUM_STEPS):
            once[kind] += encoded_size(rows)
        elif between > 1 and len(rows) < _NUM_STEPS:
            # The last moment is stored too; of the first there is no state yet, or an empty one.
            num_rows = len(range(0, steps, between)) + store.has_along(name, "snapshot")
            per_step[kind] += encoded_size(rows[-1:]) * num_rows // steps
        else:
            whole = _NUM_STEPS + any(store.has_along(name, along) for along in ("moment", "snapshot", "state_snapshot"))
            per_step[kind] += encoded_size(rows) // whole
    return per_step, once
