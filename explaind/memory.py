"""How much memory a decomposition works in.

Counted are the arrays whose sizes depend on what is asked: for every query its vectors of the parameters' size, the
activations of as many of its inputs as are evaluated at once, and the terms of a step; and once the activations of a
training batch, the vectors of a step and what is kept of the record. What operations need inside of themselves comes
on top.
"""

from __future__ import annotations

from functools import partial

from explaind.ledger import term_sizes
from explaind.optimizers import UpdateRule
from explaind.optimizers.muon import MuonRule
from explaind.path.budget import WorkingSet
from explaind.path.footprint import made_bytes
from explaind.path.gradients import call_replay
from explaind.request import Request
from explaind.stream import CHUNK_BYTES, chunk_sizes

__all__ = ["queries_at_once", "working_set"]

_FORWARD_VECTORS, _REVERSE_VECTORS, _PATH_VECTORS = 5, 3, 2
"""Of the parameters' size for each query: with buffers (float64), by adjoints, and for optimizers without a rule.

Adjoints are φ and r, and what φ is put together from. ψ comes on top where it is needed, φ' with Muon, and with a
registered rule φ' and p ⊙ φ', which it may have."""
_ELEMENT_VECTORS = 4
"""Of as many numbers as there are elements to be told apart for each query, float64: two terms, and what they are made
of."""
_STEP_VECTORS = 54
"""Of the parameters' size, float64, for a step: its filter, states, gradients and what these do not explain."""
_GRAPHS = 2
"""How often the activations of a forward pass are kept: as they are, and the gradients that came back to them."""


def working_set(request: Request) -> WorkingSet:
    """The memory that a request is worked out in, without the result itself."""
    run, dtype = request.run, request.dtype
    vector = 8 * run.table.num_elements
    entries = len(request.sources) * (request.num_tokens or 1) * len(request.layers)
    by_update_step, averaged = request.steps_axis == "update_step", request.average is not None
    has_rows = request.sources.needs_rows or request.num_tokens is not None
    if by_update_step:
        vectors = (_FORWARD_VECTORS + averaged * len(request.wanted)) * vector
    else:
        needs_psi, registered = has_rows or request.elements is not None, any(not _is_own(rule) for rule in run.rules)
        turned = registered or any(isinstance(rule, MuonRule) for rule in run.rules)
        kept = _REVERSE_VECTORS + needs_psi + turned + registered if all(run.rules) else _PATH_VECTORS
        vectors = kept * dtype.itemsize * run.table.num_elements + 2 * averaged * vector
    # The products, their sum in float64, and the block that it is entered into; on its way to a store, also the last.
    entered = 8 if request.out is None else 16
    terms = entries * ((dtype.itemsize + 8 if has_rows else 8) + entered)
    if request.elements is not None:
        terms += len(request.elements) * (8 * _ELEMENT_VECTORS + 2 * entered)
    own = {"gradients of queries": vectors, "terms of a step": terms}
    batch = _GRAPHS * _batch_activations(request)
    # How products are made is tried out in float64, before any query takes part.
    trial = batch * 8 // dtype.itemsize if has_rows and not run.stores_example_grads else 0
    fixed = {
        "training batch": batch,
        "vectors of a step": (_STEP_VECTORS + (4 * len(request.sources) if by_update_step else 0)) * vector,
        "record": run.cached_bytes,
    }
    if request.out is not None:
        fixed["blocks to be written"] = 2 * CHUNK_BYTES
    if request.function.kinked:
        fixed["arguments of kinks"] = request.function.remembered_bytes
    inputs = {"inputs of queries": request.function.working_bytes}
    if request.function.separate and not request.function.is_blocked:
        return WorkingSet(fixed, own | inputs, trial)
    return WorkingSet(fixed | inputs, own, trial)


def queries_at_once(request: Request, memory: WorkingSet) -> int:
    """How many queries share a sweep."""
    num_queries = request.function.num_queries
    fitting = memory.most_queries(request.memory, num_queries)
    if request.out is None or "query" not in request.axes or fitting == num_queries:
        return fitting
    # So that no chunk of the store holds queries of two sweeps.
    chunk = chunk_sizes(term_sizes(request.coordinates)["contribution"], num_queries=fitting)["query"]
    return fitting // chunk * chunk


def _is_own(rule: UpdateRule | None) -> bool:
    """Whether a rule is one of this package."""
    return type(rule).__module__.startswith(UpdateRule.__module__.rpartition(".")[0])


def _batch_activations(request: Request) -> int:
    """Bytes that a forward pass of the largest batch makes."""
    run, largest = request.run, 0
    for step, number in run.call_samples():
        replay = call_replay(run, step, run.calls(step)[number], dtype=request.dtype, device=request.device)
        with replay.conditions():
            largest = max(largest, made_bytes(partial(replay.outputs, replay.params)))
    return largest
