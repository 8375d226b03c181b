"""Times and operations of the parts of a work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["Meter"]


class Meter:
    """Takes times, and counts operations: not both at once, for counting makes small operations slow."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}
        self.operations: dict[str, float] = {}
        """Of matrix products and convolutions, by part."""

    @property
    def seconds(self) -> dict[str, float]:
        """Mean time, by part."""
        return {part: sum(times) / len(times) for part, times in self._times.items()}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Time the block."""
        begun = time.perf_counter()
        yield
        self._times.setdefault(part, []).append(time.perf_counter() - begun)

    @contextmanager
    def counted(self, part: str) -> Iterator[None]:
        """Count the operations of the block."""
        made = _Operations()
        with made:
            yield
        self.operations[part] = made.number


class _Operations(TorchDispatchMode):
    """Adds up operations as `torch.utils.flop_counter` has them, whose own counter is several times slower."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.number = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.number += count(*args, **(kwargs or {}), out_val=result)
        return result
