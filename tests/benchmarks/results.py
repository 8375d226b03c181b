"""All benchmarks by name, and the file that keeps what they measured."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.benchmarks.environment import environment
from tests.benchmarks.machine import kernel_machine
from tests.benchmarks.memory import memory
from tests.benchmarks.naive import naive
from tests.benchmarks.plans import plans
from tests.benchmarks.precision import precision, whole_run_error
from tests.benchmarks.products import products
from tests.benchmarks.queries import queries
from tests.benchmarks.recording import recording
from tests.benchmarks.scaling import scaling
from tests.benchmarks.sizes import Size
from tests.benchmarks.storage import storage

__all__ = ["BENCHMARKS", "RESULTS", "measure", "read"]

RESULTS = Path(__file__).with_name("results.json")

BENCHMARKS: dict[str, Callable[[Size], list[dict[str, Any]]]] = {
    "recording": recording,
    "queries": queries,
    "products": products,
    "memory": memory,
    "plans": plans,
    "error": whole_run_error,
    "precision": precision,
    "scaling": scaling,
    "naive": naive,
    "machine": kernel_machine,
    "storage": storage,
}
"""Each gives plain records."""


def measure(name: str, size: Size, path: Path = RESULTS) -> None:
    """Run a benchmark and put its records, with machine and versions, in place of its earlier ones."""
    about, start = environment(), time.perf_counter()
    records = BENCHMARKS[name](size)
    elapsed = round(time.perf_counter() - start, 1)
    entries = read(path) | {name: {**about, "seconds": elapsed, "records": records}}
    ordered = {known: entries[known] for known in BENCHMARKS if known in entries}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def read(path: Path = RESULTS) -> dict[str, Any]:
    """Everything measured so far, by benchmark."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found
