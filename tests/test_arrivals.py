"""Gradients as the last backward pass left them, against those that the optimizer gets."""

import math

import pytest
import torch
from torch import nn

from explaind.parameters import ParameterTable
from explaind.recording.gradients import Arrivals


def watched(**values):
    """Parameters whose gradients' arrivals are noted, and what gives their rescaling."""
    tracked = {name: nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in values.items()}
    table = ParameterTable.of(tracked, dict.fromkeys(tracked, 0))
    arrivals = Arrivals(tracked, table)
    passes = {}

    def arrive(name):
        task = torch._C._current_graph_task_id()
        if task not in passes:
            passes[task] = set()
            arrivals.expect(passes[task])
        passes[task].add(name)

    for name, parameter in tracked.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrive(name))

    def rescaling():
        gradients = {name: parameter.grad for name, parameter in tracked.items()}
        return arrivals.rescaling(gradients, table.flatten(gradients), 0)

    return tracked, arrivals, rescaling


UNTOUCHED = (1.0, math.inf)


def test_arrivals_are_kept_until_they_are_used():
    tracked, arrivals, rescaling = watched(a=[0.0, 0.0])
    (tracked["a"] * torch.tensor([1.0, 2.0])).sum().backward()
    tracked["a"].grad *= 0.25
    assert rescaling() == {"a": (0.25, math.inf)}
    arrivals.forget(["a"])
    assert all(map(math.isnan, rescaling()["a"]))


def test_an_arrival_counts_as_the_last_pass_left_it():
    tracked, _, rescaling = watched(a=[3.0, 5.0], b=[2.0, 7.0])
    a, b = tracked.values()
    (a.square() * b).sum().backward()
    assert rescaling() == {"a": UNTOUCHED, "b": UNTOUCHED}
    a.grad *= 0.5
    b.grad *= 0.5
    (b**3).sum().backward()
    assert rescaling() == {"a": (0.5, math.inf), "b": UNTOUCHED}


def test_a_pass_that_an_error_stopped_leaves_gradients_that_nobody_saw():
    tracked, arrivals, rescaling = watched(a=[3.0, 5.0], b=[2.0, 7.0])
    a, b = tracked.values()
    (a * b).sum().backward()

    def stop(grad):
        raise ZeroDivisionError

    middle = b * 1.0
    middle.register_hook(stop)
    with pytest.raises(ZeroDivisionError):
        (a.square().sum() + middle.square().sum()).backward()
    found = rescaling()
    assert found["b"] == UNTOUCHED
    assert all(map(math.isnan, found["a"]))
    arrivals.forget(["a", "b"])
    a.grad = b.grad = None
    (a * b).sum().backward()
    assert rescaling() == {"a": UNTOUCHED, "b": UNTOUCHED}
