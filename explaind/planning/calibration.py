"""What an attribution will cost: what can be counted is counted, and a few of the run's steps are tried out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from explaind.decomposition import attributes
from explaind.ledger import term_sizes
from explaind.memory import queries_at_once, working_set
from explaind.path.factored import FactorProducts
from explaind.path.products import ExampleProducts
from explaind.planning.metering import Meter
from explaind.planning.plan import Plan
from explaind.planning.trial import INTEGRAL, PREPARATION, REPLAYS, SKIPPED, TERMS, VALUES, Trial
from explaind.query import Query
from explaind.request import Request, check_request, products_of
from explaind.run import Run

__all__ = ["make_plan"]

_NUM_SAMPLES = 3


def make_plan(run: Run, query: Query, **arguments: Any) -> Plan:
    """Find out what `run.attribute` costs with the same arguments."""
    meter = Meter()
    with run.reads() as before, meter.timed(PREPARATION), meter.counted(PREPARATION):
        request = check_request(run, query, **arguments)
        products = products_of(request)
        attributes(request, products)
        memory = working_set(request)
    at_once = queries_at_once(request, memory)
    integrated = _integrated(request)
    # From the middle of equal stretches: the first steps of a training are often unlike all others.
    places = len(integrated) * (np.arange(_NUM_SAMPLES) + 0.5) / _NUM_SAMPLES
    sampled = sorted({integrated[int(place)] for place in places})
    num_queries, steps = request.function.num_queries, len(integrated)
    sweeps, snapshots = math.ceil(num_queries / at_once), run.num_steps + 1
    swept = run.num_steps if request.steps_axis == "update_step" else steps
    batch_passes = _batch_passes(request, products, sweeps)
    trial = Trial(request, request.function.part(slice(0, at_once)), products, meter=meter)
    with run.reads() as read:
        integrals = trial.integrals(sampled)

    times = {
        PREPARATION: 1.0,
        VALUES: snapshots * num_queries / at_once,
        INTEGRAL: steps * num_queries / at_once,
        REPLAYS: batch_passes if products is None else 0,
        TERMS: sweeps * len(request.wanted),
        SKIPPED: sweeps * (swept - len(request.wanted)),
    }
    nodes = torch.stack([integral.num_nodes for integral in integrals]).to(torch.float64).mean()
    result = _result_bytes(request, steps)
    return Plan(
        strategies=trial.strategies(sampled[-1]),
        sampled=tuple(sampled),
        steps=steps,
        sweeps=sweeps,
        queries_at_once=at_once,
        batch_passes=batch_passes,
        query_values=sweeps * snapshots,
        query_gradients=round(float(nodes) * steps * num_queries),
        operations={part: round(number * times[part]) for part, number in meter.operations.items()},
        bytes_read=run.bytes_of(read, integrated[0], sweeps, before=before, num_before=len(run.call_samples())),
        bytes_result=result,
        stored=request.out is not None,
        memory=memory.of(at_once),
        peak_memory=memory.peak(at_once) + (0 if request.out else result),
        seconds={part: seconds * times[part] for part, seconds in meter.seconds.items()},
    )


def _integrated(request: Request) -> list[int]:
    """The steps over which the path integral is taken."""
    run, wanted = request.run, request.wanted
    carried = all(run.rules) and request.steps_axis != "update_step"
    return list(range(wanted[0], run.num_steps)) if carried or request.average is not None else wanted


def _batch_passes(request: Request, products: ExampleProducts | None, sweeps: int) -> int:
    """Replays of the batch: in the types of the training, and for the rows if theirs is another."""
    run = request.run
    if not all(run.rules):
        return sweeps
    steps = range(run.num_steps) if request.steps_axis == "update_step" else request.wanted
    if products is None:
        known = run.examples_alone
        return sum(1 if step not in known else 0 if known[step] else sweeps for step in steps)
    trained = {parameter.dtype for parameter in run.table}
    return sweeps * len(steps) * (1 + (isinstance(products, FactorProducts) and trained != {request.dtype}))


def _result_bytes(request: Request, steps: int) -> int:
    """Of the terms, the certificate and the labels."""
    queries, labels = request.function.num_queries, request.coordinates
    updates = len(labels["update_step"]) if "update_step" in labels else steps
    entries = sum(math.prod(sizes.values()) for sizes in term_sizes(labels).values())
    entries += queries * (2 * updates + 4) + (0 if "update_step" in labels else updates)
    beside = [values for _, values in request.beside.values()]
    return 8 * entries + sum(np.asarray(values).nbytes for values in [*labels.values(), *beside])
