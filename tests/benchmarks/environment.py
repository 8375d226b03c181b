"""The machine and the versions that a measurement was made with."""

from __future__ import annotations

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

__all__ = ["environment"]

_PACKAGES = {"torch": "torch", "numpy": "numpy", "zarr": "zarr", "explaind": "explaind-tracer"}


def environment() -> dict[str, Any]:
    """Machine, versions and date, as plain data."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
            "torch_threads": torch.get_num_threads(),
            "load_before": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version()} | {name: version(p) for name, p in _PACKAGES.items()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
