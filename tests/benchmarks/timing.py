"""Times as ratios within one run, and memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Ratio", "in_own_process", "peak_memory", "ratios", "seconds"]

_Result = TypeVar("_Result")

_UNITS = 5
"""Units that are timed before and after every measured work."""


@dataclass(frozen=True)
class Ratio:
    """A work's time over that of the unit which it took turns with."""

    value: float
    """Median of the rounds."""
    low: float
    high: float
    """Least and most of the rounds."""
    unit_seconds: float
    """Median time of the unit, in seconds."""
    rounds: int

    @classmethod
    def of(cls, quotients: Sequence[float], units: Sequence[float]) -> Ratio:
        """From one quotient per round, and all times of the unit."""
        return cls(
            statistics.median(quotients), min(quotients), max(quotients), statistics.median(units), len(quotients)
        )

    def per(self, number: int) -> Ratio:
        """The same for one of so many equal parts of the work."""
        return replace(self, value=self.value / number, low=self.low / number, high=self.high / number)

    def minus(self, other: Ratio) -> Ratio:
        """What is left of the work without another one."""
        value, low, high = self.value - other.value, self.low - other.high, self.high - other.low
        return replace(self, value=value, low=low, high=high)

    def record(self) -> dict[str, float]:
        """As plain data."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "unit_seconds": self.unit_seconds,
            "rounds": self.rounds,
        }


def seconds(work: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratios(unit: Callable[[], object], works: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, Ratio]:
    """Let each work take turns with the unit; a round's quotient is to the units just before and after the work."""
    unit()
    quotients: dict[str, list[float]] = {name: [] for name in works}
    units = [_several(unit)]
    for _ in range(rounds):
        for name, work in works.items():
            gc.collect()
            elapsed = seconds(work)
            units.append(_several(unit))
            quotients[name].append(2 * elapsed / (units[-2] + units[-1]))
    return {name: Ratio.of(found, units) for name, found in quotients.items()}


def _several(unit: Callable[[], object]) -> float:
    return statistics.median(seconds(unit) for _ in range(_UNITS))


def in_own_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns when it is called in a fresh process, which has imported what all of them need."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["tests.benchmarks.problems", "explaind.decomposition", "torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def peak_memory(work: Callable[[], _Result]) -> tuple[int, _Result]:
    """Most bytes that this process had in memory during a call, above those before it; and what the call returned."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before, but not given back, could be used without being seen
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    result = work()
    return _status("VmHWM") - before, result


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"/proc/self/status has no {field}: memory is measured on Linux only.")
