"""Results that take long, computed by several processes at once."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread

import torch
from tqdm import tqdm

from .results import Results
from .study import Study

__all__ = ["compute_ahead"]

WAVES = (
    ("by_example", "by_class", "retrained", "by_element", "kernel_machine", "nodes", "swaps"),
    ("perturbed", "embedding", "change_point_number"),
)
"""Results that are worth a process, the longest first; those of a wave need none of the same wave or of a later one."""


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
            for names in WAVES:
                waiting = [pool.submit(_compute, name) for name in names]
                shown = tqdm(as_completed(waiting), "results", len(names), disable=None if study.progress else True)
                for future in shown:
                    shown.set_postfix_str(f"last {future.result()}")
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
    wait([parent.sentinel])
    os._exit(1)


def _compute(name: str) -> str:
    getattr(_results, name)
    return name
