"""A budget of memory, and how many queries may share a sweep so that their working set stays within it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from explaind.errors import ResultTooLargeError

__all__ = ["Budget", "WorkingSet", "check_memory"]

_PART_OF_FREE = 4
_PART_FOR_INPUTS = 16


@dataclass(frozen=True)
class Budget:
    """Bytes that a sweep may use."""

    wanted: int
    """By which the queries are divided."""
    most: int
    """That a single query may use."""

    @property
    def for_inputs(self) -> int:
        """That inputs which are evaluated at once may use, and so much again for what is remembered of them."""
        return self.wanted // _PART_FOR_INPUTS


@dataclass(frozen=True)
class WorkingSet:
    """Bytes that are in use at once, by what uses them."""

    fixed: Mapping[str, int]
    """Whatever the number of queries."""
    per_query: Mapping[str, int]
    """For each of the queries that share a sweep."""
    before: int
    """Before the sweeps."""

    def peak(self, num_queries: int) -> int:
        """The most that is in use if so many queries share a sweep."""
        return max(self.before, sum(self.of(num_queries).values()))

    def of(self, num_queries: int) -> dict[str, int]:
        """Of a sweep with so many queries."""
        return {**self.fixed, **{name: num_queries * size for name, size in self.per_query.items()}}

    def most_queries(self, budget: Budget, num_queries: int) -> int:
        """The largest number of queries that fits, when they are divided into equal parts.

        Raises:
            ResultTooLargeError: not even one fits.
        """
        single = self.peak(1)
        if single > budget.most:
            parts = ", ".join(f"{size / 2**20:,.0f} MiB {name}" for name, size in self.of(1).items())
            raise ResultTooLargeError(
                f"a single query works in {single / 2**20:,.0f} MiB, memory= allows {budget.most / 2**20:,.0f} MiB. It "
                f"needs {parts}, and before that {self.before / 2**20:,.0f} MiB to choose how products are made. Allow "
                "more, or ask for fewer axes or examples."
            )
        fitting = max(1, (budget.wanted - sum(self.fixed.values())) // max(1, sum(self.per_query.values())))
        sweeps = -(-num_queries // fitting)
        return -(-num_queries // sweeps)


def check_memory(memory: int | None, device: torch.device) -> Budget:
    """The budget that was asked for; by default a quarter of what is free now, or for a single query all of it.

    Raises:
        ValueError: it is no positive whole number.
    """
    if memory is None:
        free = _free(device)
        return Budget(free // _PART_OF_FREE, free)
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 1:
        raise ValueError(f"memory is a number of bytes, such as 2 << 30 for 2 GiB; got {memory!r}.")
    return Budget(memory, memory)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", known.read_text()) if known.exists() else None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if found is None else int(found[1]) << 10
