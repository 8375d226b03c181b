"""The fast decomposition held against the slow twin, term by term."""

import numpy as np

from explaind import reference
from explaind.quadrature import gauss_legendre
from explaind.reference import filters
from tests.cases import query

NODES = gauss_legendre(6)  # the twin's


def attribute(run, step_axis="step", quadrature=NODES):
    """Every single term; closes."""
    asked = query(run.table.dtype)
    result = run.attribute(asked, by=("query", "example", step_axis, "parameter"), quadrature=quadrature)
    result.check()
    return result.dataset


def other_and_rounding(run):
    """Sums of the absolute terms, with the nodes that a user gets."""
    dataset = attribute(run, quadrature="adaptive")
    return [float(np.abs(dataset[term]).sum()) for term in ("other", "rounding")]


def compare(run, expected, step_axis):
    """Every contribution and decay term, relative to what the twin sums into that very entry."""
    dataset = attribute(run, step_axis)
    other_axis = {"step": "update_step", "update_step": "step"}[step_axis]
    for term, twin in (("contribution", expected.contribution.sum("token")), ("decay", expected.decay)):
        actual, sizes = dataset[term], np.abs(twin).sum(other_axis)
        assert not np.any(actual.values[sizes.values == 0])
        assert float((np.abs(actual - twin.sum(other_axis)) / sizes.where(sizes > 0, 1.0)).max()) <= 1e-9
    return dataset


def assert_equals_twin(run):
    """By both step axes; returns what was compared."""
    expected = reference.decompose(run, query())
    return [compare(run, expected, axis) for axis in ("step", "update_step")]


def assert_exact(run):
    """All comes from the examples, which get what the twin gives them, and every step replays."""
    assert all(float(np.abs(dataset.other).sum()) < 1e-12 for dataset in assert_equals_twin(run))
    assert run.verify().bit_exact


def errors_of_the_twin(run):
    """‖Δ_s + share of the whole gradient + decay‖ / ‖Δ_s‖ of every parameter and step."""
    for p, parameter in enumerate(run.table):
        history = filters.History(run, p)
        for s, share in history.follow({s: update.whole for s, update in history.updates.items()}).items():
            update = run.update(s)[parameter.name]
            yield float((update + share + history.decoupled_decay(s)).norm() / update.norm())
