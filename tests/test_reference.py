"""The fast path against the slow twin, contribution by contribution."""

import numpy as np
import pytest

from explaind import quadrature, reference
from tests.cases import CASES, query, record


def worst_relative_difference(actual, expected):
    """Largest difference of any single entry, relative to that very entry; zeros must be zeros."""
    assert not np.any(actual.values[expected.values == 0])
    return float((np.abs(actual - expected) / np.abs(expected).where(expected != 0, 1.0)).max())


@pytest.fixture(scope="module", params=CASES, ids=str)
def solved(request, tmp_path_factory):
    run, _ = record(request.param, tmp_path_factory.mktemp("run") / "run.zarr")
    return run, reference.decompose(run, query())


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_every_single_contribution_and_decay_equals_the_reference(solved, step_axis):
    run, expected = solved
    other_axis = {"step": "update_step", "update_step": "step"}[step_axis]
    nodes = quadrature.gauss_legendre(6)  # the twin's
    result = run.attribute(query(), by=("query", "example", step_axis, "parameter"), quadrature=nodes)
    for term, twin in (("contribution", expected.contribution.sum("token")), ("decay", expected.decay)):
        assert worst_relative_difference(result.dataset[term], twin.sum(other_axis)) <= 1e-9
    result.check()


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_adaptive_quadrature_gives_the_same_contributions(solved, step_axis):
    run, expected = solved
    other_axis = {"step": "update_step", "update_step": "step"}[step_axis]
    result = run.attribute(query(), by=("query", "example", step_axis, "parameter"), tolerance=1e-12)
    terms = expected.contribution.sum("token")
    error = np.abs(result.dataset.contribution - terms.sum(other_axis))
    assert float((error / np.abs(terms).sum(other_axis).where(lambda size: size > 0, 1.0)).max()) <= 1e-9


def test_the_sum_is_the_networks_output_to_1e_12(solved):
    run, expected = solved
    result = run.attribute(query(), by=("query", "example", "step", "layer"), tolerance=1e-12)
    np.testing.assert_allclose(result.total, expected.prediction, rtol=1e-12)
    np.testing.assert_allclose(result.dataset.initial, expected.initial, rtol=1e-12)
    assert float(np.abs(result.dataset.rounding).sum()) < 1e-12
    assert float(np.abs(result.dataset.other).sum()) < 1e-12
