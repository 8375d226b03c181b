"""Quadrature: declared orders, measured residuals, and what adaptivity and averaged slopes gain."""

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind import quadrature
from explaind.path import integral as path_integral
from explaind.path.queries import QueryFunction
from tests.cases import CASES, Case, one_group, query, record

ADAMW = next(case for case in CASES if case.name == "adamw-full-batch-shuffled")
VIOLENT = Case(name="violent", optimizer=one_group(torch.optim.AdamW, lr=0.3), batch_size=9, epochs=12)


class Scalar:
    """q(θ) of one parameter, with its derivative: a path function whose integrals are known."""

    kinked = False

    def __init__(self, function, derivative):
        self.function, self.derivative, self.evaluations = function, derivative, 0

    def values(self, start, update, position, which):
        return self.function(start + position * update)

    def averages(self, start, update, ends, which, rule, *, kinks, exact):
        self.evaluations += len(rule.nodes)
        left, length = ends[0], ends[1] - ends[0]
        nodes = [self.derivative(start + (left + length * node) * update) for node in rule.nodes]
        return Slopes(length * sum(weight * slope for weight, slope in zip(rule.weights, nodes, strict=True))[None])

    def gathered(self, parts, total):
        sums = [part.weights[:, None] * part.averages.slopes for part in parts]
        return sum(sums, start=0.0 if total is None else total)


class Slopes:
    num_bytes = 8

    def __init__(self, slopes):
        self.slopes = slopes

    def products(self, update):
        return (self.slopes @ update)[:, None]

    def rounding(self, update, entries):
        return torch.finfo(torch.float64).eps * (self.slopes[entries].abs() @ update.abs())


def integrate(function, rule, step=1.0, tolerance=1e-10):
    start, update = torch.tensor([0.2], dtype=torch.float64), torch.tensor([step], dtype=torch.float64)
    ends = function.values(start, update, 0.0, None), function.values(start, update, 1.0, None)
    return path_integral.integrate(
        function, start, update, change=ends, tolerance=torch.tensor([tolerance]), quadrature=rule
    )


def smooth():
    return Scalar(torch.sin, torch.cos)


def kinked():
    return Scalar(lambda x: (x - 0.61).abs(), lambda x: torch.sign(x - 0.61))


@pytest.mark.parametrize(
    ("rule", "order"),
    [(quadrature.midpoint(1), 2), (quadrature.gauss_legendre(2), 4), (quadrature.gauss_legendre(3), 6)],
)
def test_errors_fall_with_the_declared_order(rule, order):
    # The residual of one step of length h is an integral over h: one order more than the rule's.
    steps = np.array([0.8, 0.4, 0.2])
    errors = [abs(float(integrate(smooth(), rule, step).residual)) for step in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(order + 1, abs=0.2)


def test_composite_midpoint_is_the_papers_rule():
    assert quadrature.midpoint(100).nodes[0] == pytest.approx(0.005)
    errors = [abs(float(integrate(smooth(), quadrature.midpoint(n)).residual)) for n in (10, 100)]
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


def test_adaptive_bisects_towards_a_kink_only():
    function = kinked()
    result = integrate(function, quadrature.adaptive(2, max_depth=30), tolerance=1e-6)
    assert abs(float(result.residual)) <= 1e-6
    assert int(result.num_nodes) == function.evaluations < 200  # an even mesh of this width has millions of nodes


def test_adaptive_stops_at_its_depth_and_says_what_is_left():
    result = integrate(kinked(), quadrature.adaptive(2, max_depth=3), tolerance=1e-12)
    assert abs(float(result.residual)) > 1e-4


def test_whole_and_parts_are_extrapolated_where_that_is_enough():
    # One node on x³ over [a, a + 1] errs by 1/4 of the third derivative's term, and two halves by a quarter of that.
    function = Scalar(lambda x: x**3, lambda x: 3 * x**2)
    result = integrate(function, quadrature.adaptive(1), tolerance=1e-12)
    assert int(result.num_nodes) == function.evaluations == 1 + 8
    assert abs(float(result.residual)) < 1e-13


def test_rules_of_very_many_nodes_are_no_different():
    assert abs(float(integrate(smooth(), quadrature.gauss_legendre(300)).residual)) < 1e-12
    assert abs(float(integrate(smooth(), quadrature.adaptive(600), tolerance=1e-20).residual)) < 1e-12


def test_what_there_are_not_nodes_enough_for_is_spread_over_the_step(monkeypatch):
    # Depth first, they would all be spent at one end, and the rest of the step would stay undivided.
    monkeypatch.setattr(path_integral, "_MOST_NODES", 200)
    wave = Scalar(lambda x: torch.sin(40 * x), lambda x: 40 * torch.cos(40 * x))
    assert abs(float(integrate(wave, quadrature.adaptive(2), tolerance=1e-15).residual)) < 1e-3


def test_queries_are_divided_as_each_needs(tmp_path):
    run, _ = record(VIOLENT, tmp_path / "run.zarr", activation=nn.ReLU)
    options = {"by": ("query", "step"), "tolerance": 1e-4}
    together = run.attribute(query(num=6), **options).dataset
    assert len(np.unique(together.num_nodes)) > 2
    assert float(np.abs(together.quadrature).sum("update_step").max() / together.path_length.min()) <= 1e-4


def test_noise_of_single_precision_is_computed_again_in_double(tmp_path):
    run, _ = record(ADAMW, tmp_path / "run.zarr", dtype=torch.float32)
    loose, strict = (run.attribute(query(torch.float32), by=("query", "example"), tolerance=t) for t in (1e-3, 1e-9))
    assert strict.check().quadrature <= 1e-9 < loose.closure.quadrature
    assert strict.dataset.attrs["dtype"] == "float32"


def test_easy_queries_get_no_extra_nodes():
    result = integrate(smooth(), quadrature.adaptive(3), tolerance=1e-3)
    assert int(result.num_nodes) == 3


def test_rules_need_a_node():
    with pytest.raises(ValueError, match="at least one node, got 0"):
        quadrature.midpoint(0)


def total_residual(run, rule, **options):
    data = run.attribute(query(num=40), by=("query", "update_step"), quadrature=rule, **options).dataset
    return float(np.abs(data.quadrature).sum()), float(data.num_nodes.mean())


def test_averaged_slopes_make_kinks_second_order(tmp_path):
    run, _ = record(VIOLENT, tmp_path / "run.zarr", activation=nn.ReLU)
    depths = [2, 4, 6]
    plain = [total_residual(run, quadrature.midpoint(2**depth))[0] for depth in depths]
    average = [total_residual(run, quadrature.adaptive(1, max_depth=depth), tolerance=0.0)[0] for depth in depths]
    orders = [-np.polyfit(depths, np.log2(errors), 1)[0] for errors in (plain, average)]
    assert orders[0] < 1.5 < 1.8 < orders[1]
    assert average[-1] < 0.1 * plain[-1]


def test_a_relu_network_reaches_the_tolerance_that_was_asked_for(tmp_path):
    run, _ = record(VIOLENT, tmp_path / "run.zarr", activation=nn.ReLU)
    for tolerance in (1e-4, 1e-7):
        result = run.attribute(query(), by=("query", "example"), tolerance=tolerance)
        assert result.check().quadrature <= tolerance


def test_smooth_networks_gain_two_orders_per_node(tmp_path):
    run, _ = record(ADAMW, tmp_path / "run.zarr")
    errors = [total_residual(run, quadrature.gauss_legendre(n))[0] for n in (1, 2, 3)]
    assert errors[0] > 500 * errors[1] > 500**2 * errors[2]


def test_a_kink_may_take_what_the_rest_leaves_of_the_tolerance():
    # With an equal share for equal lengths it would be divided until its length is a hundredth, which takes 37 nodes.
    result = integrate(kinked(), quadrature.adaptive(1), tolerance=1e-2)
    assert int(result.num_nodes) <= 15
    assert abs(float(result.residual)) <= 1e-2


def test_the_tolerance_that_was_given_stays_as_it_was():
    function, tolerance = smooth(), torch.tensor([1e-6], dtype=torch.float64)
    start, update = torch.tensor([0.2], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    ends = function.values(start, update, 0.0, None), function.values(start, update, 1.0, None)
    path_integral.integrate(
        function, start, update, change=ends, tolerance=tolerance, quadrature=quadrature.adaptive(2)
    )
    assert tolerance.tolist() == [1e-6]


def test_queries_that_need_the_same_sub_intervals_share_passes(tmp_path, monkeypatch):
    run, _ = record(VIOLENT, tmp_path / "run.zarr", activation=nn.ReLU)
    passes, averages = [], QueryFunction.averages
    monkeypatch.setattr(
        QueryFunction, "averages", lambda *args, **settings: passes.append(args[3]) or averages(*args, **settings)
    )
    numbers = []
    for copies in (1, 5):
        asked = query(num=1)
        asked = explaind.Query(asked.inputs.repeat(copies, 1), output=explaind.outputs.log_prob([0] * copies))
        result = run.attribute(asked, by=("query", "step"), tolerance=1e-5)
        numbers.append((len(passes), result.dataset.num_nodes.sel(query=0).values.tolist()))
        passes.clear()
    assert numbers[0] == numbers[1]
    assert max(numbers[0][1]) > 1


def test_what_is_remembered_of_kinks_changes_nothing(tmp_path, monkeypatch):
    run, _ = record(VIOLENT, tmp_path / "run.zarr", activation=nn.ReLU)
    options = {"by": ("query", "step", "parameter"), "tolerance": 1e-4}
    known = run.attribute(query(num=6), **options).dataset
    monkeypatch.setattr(QueryFunction, "remembered_bytes", 0)
    again = run.attribute(query(num=6), **options).dataset
    np.testing.assert_allclose(known.contribution, again.contribution, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(known.num_nodes, again.num_nodes)
