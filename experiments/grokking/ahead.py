"""Results that take long, computed by several processes at once."""

from __future__ import annotations

import os
import signal
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import active_children, connection, get_context, parent_process
from threading import Thread

import torch
from tqdm import tqdm

from .results import Results
from .study import Study

__all__ = ["compute_ahead"]

NEEDS: dict[str, tuple[str, ...]] = {
    "by_example": (),
    "by_class": (),
    "retrained": (),
    "by_element": (),
    "kernel_machine": (),
    "perturbed": ("by_element",),
    "nodes": (),
    "embedding": ("by_element",),
    "change_point_number": ("by_class",),
    "swaps": (),
}
"""Results that are worth a process, the longest first, and which of the others they need."""


def compute_ahead(study: Study, *, processes: int) -> None:
    """Compute what takes long and is not there yet, each in one thread.

    Args:
        study: whose run is trained.
        processes: how many results are computed at once.

    Raises:
        ChildProcessError: something else has ended one of the processes.
        Exception: what a result cannot be computed for.
    """
    _ = study.phases
    own, others = replace(study, progress=False), set(active_children())
    with ProcessPoolExecutor(processes, get_context("spawn"), initializer=_begin, initargs=(own,)) as pool:
        try:
            _compute_all(pool, progress=study.progress)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
                process.join()
            if isinstance(error, BrokenProcessPool):
                raise ChildProcessError(
                    "a process that computed a result was ended from outside, perhaps as memory was short. The same "
                    "command goes on with what was interrupted; give fewer --processes."
                ) from error
            raise


def _compute_all(pool: ProcessPoolExecutor, *, progress: bool) -> None:
    """Compute every result as soon as those that it needs are there."""
    left, done, running = dict(NEEDS), set[str](), set[Future[str]]()
    with tqdm(desc="results", total=len(NEEDS), disable=None if progress else True) as shown:
        while left or running:
            ready = [name for name, needs in left.items() if done.issuperset(needs)]
            running |= {pool.submit(_compute, name) for name in ready}
            left = {name: needs for name, needs in left.items() if name not in ready}
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            done |= {future.result() for future in finished}
            shown.update(len(finished))


_results: Results


def _begin(study: Study) -> None:
    """In a process that computes results."""
    global _results
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it too, ends this process
    _results = Results(study)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A study that was killed is begun again, and must not find anybody still at work."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _compute(name: str) -> str:
    getattr(_results, name)
    return name
