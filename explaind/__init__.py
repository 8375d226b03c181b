"""explaind: exactly how training made a neural network do what it does.

Record a training loop with `trace`, open it with `open_run`, and write any prediction of the trained model as
an exact sum over training examples, steps and layers with `run.attribute(Query(…), by=…)`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from explaind import averages, errors, optimizers, outputs, quadrature
    from explaind.attribution import Attribution, Closure
    from explaind.checkpoints import from_checkpoints
    from explaind.kernel import PathKernelModel
    from explaind.query import Query
    from explaind.recording.recorder import Recorder, trace
    from explaind.run import Run, open_run

__all__ = [  # record
    "Recorder",
    "trace",
]
__all__ += [  # open
    "Run",
    "from_checkpoints",
    "open_run",
]
__all__ += [  # attribute
    "Attribution",
    "Closure",
    "PathKernelModel",
    "Query",
    "averages",
    "optimizers",
    "outputs",
    "quadrature",
]
__all__ += ["errors"]

# Names are imported when they are first used: torch takes seconds, which what does not compute need not wait for.
_HOMES = {
    "Attribution": "explaind.attribution",
    "Closure": "explaind.attribution",
    "PathKernelModel": "explaind.kernel",
    "Query": "explaind.query",
    "Recorder": "explaind.recording.recorder",
    "Run": "explaind.run",
    "from_checkpoints": "explaind.checkpoints",
    "open_run": "explaind.run",
    "trace": "explaind.recording.recorder",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name) if name in _HOMES else import_module(f"{__name__}.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
