"""Reading a run's steps ahead of the work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from explaind.path.step import Step

__all__ = ["read_ahead"]


def read_ahead(steps: Iterable[int], make: Callable[[int], Step], *, alone: bool) -> Iterator[Step]:
    """Make the steps in turn, each read from the store while the one before it is worked on.

    Args:
        steps: which.
        make: makes one.
        alone: reading takes the model, so that nothing else may be done meanwhile.
    """
    if alone:
        yield from map(make, steps)
        return

    def read(index: int) -> Step:
        step = make(index)
        step.read()
        return step

    with ThreadPoolExecutor(1, "explaind-reader") as reader:
        waiting: Future[Step] | None = None
        for index in steps:
            following = reader.submit(read, index)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
