"""explaind: exactly how training made a neural network do what it does.

Record a training loop with `trace`, open it with `open_run`, and write any prediction of the trained model as
an exact sum over training examples, steps and layers with `run.attribute(Query(…), by=…)`.
"""

from explaind import averages, errors, optimizers, outputs, quadrature
from explaind.attribution import Attribution, Closure
from explaind.query import Query
from explaind.recording.recorder import Recorder, trace
from explaind.run import Run, open_run

__all__ = [  # record
    "Recorder",
    "trace",
]
__all__ += [  # open
    "Run",
    "open_run",
]
__all__ += [  # attribute
    "Attribution",
    "Closure",
    "Query",
    "averages",
    "optimizers",
    "outputs",
    "quadrature",
]
__all__ += ["errors"]
