"""Change points of series with known ones, and of series without any."""

import sys

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from explaind.analysis.change_points import Search, change_points, number_of_change_points, phases_between
from explaind.analysis.recurrence import is_stable, recurrence
from explaind.analysis.segments import fitted, line_errors, resampled, segmentations

FAST = Search(num_draws=39)


def shares(values, first=0):
    return xr.DataArray(values, {"step": range(first, first + len(values))}, ["step", "layer"])


def noise(num_steps, *, seed, alike=0.6):
    """Autocorrelated noise of unit size in three layers."""
    drawn = np.random.default_rng(seed).normal(size=(num_steps, 3))
    for step in range(1, num_steps):
        drawn[step] = alike * drawn[step - 1] + np.sqrt(1 - alike**2) * drawn[step]
    return drawn


def ramps(num_steps=100):
    """Drifting shares that jump at step 30, and drift otherwise from step 70 on."""
    steps = np.arange(num_steps)[:, None]
    drift = np.array([[0.002, -0.001, -0.001]]) * steps
    jump = np.where(steps >= 30, [[0.2, -0.1, -0.1]], 0.0)
    turn = np.where(steps >= 70, [[-0.01, 0.005, 0.005]], 0.0) * (steps - 70)
    return 1 / 3 + drift + jump + turn


def chosen(table):
    assert table["chosen"].sum() == 1
    return int(table["number"][table["chosen"]].iloc[0])


def test_errors_of_all_lines_are_those_of_least_squares():
    series = noise(12, seed=1)
    table = line_errors(series)
    for start in range(12):
        for stop in range(start + 2, 13):
            lines = fitted(series[start:stop], [stop - start])
            assert table[start, stop] == pytest.approx(np.square(series[start:stop] - lines).sum(), abs=1e-10)


def test_the_best_segments_are_those_of_all():
    series = ramps(14) + 0.05 * noise(14, seed=2)
    (_, one, two) = segmentations(series, most=2, shortest=3)
    table = line_errors(series)
    assert one.error == pytest.approx(min(table[0, m] + table[m, 14] for m in range(3, 12)))
    pairs = [(m, n) for m in range(3, 9) for n in range(m + 3, 12)]
    assert two.error == pytest.approx(min(table[0, m] + table[m, n] + table[n, 14] for m, n in pairs))


def test_resampled_series_keep_the_fit_and_the_size_of_the_residuals():
    rng = np.random.default_rng(0)
    size = np.where(np.arange(400)[:, None] < 200, 0.1, 1.0)
    series = size * noise(400, seed=3, alike=0.0)
    drawn = np.stack([resampled(series, [200, 400], block=20, rng=rng) for _ in range(50)])
    spread = (drawn - fitted(series, [200, 400])).std(axis=(0, 2))
    np.testing.assert_allclose([spread[:200].mean(), spread[200:].mean()], [0.1, 1.0], rtol=0.2)


def test_known_change_points_are_found_and_lie_in_their_intervals():
    series = shares(ramps() + 0.01 * noise(100, seed=4), first=1000)
    table = number_of_change_points(series, search=FAST)
    assert chosen(table) == 2
    assert table["p_value"].iloc[:2].tolist() == [1 / 40, 1 / 40]
    points = change_points(series, 2, search=FAST)
    assert points["step"].iloc[0] == 1030
    for truth, point in zip((1030, 1070), points.itertuples(), strict=True):
        assert point.low <= truth <= point.high
        assert point.low <= point.step <= point.high <= point.low + 20


def test_a_series_without_change_points_has_none():
    series = [shares(1 / 3 + 0.01 * noise(100, seed=seed)) for seed in range(6)]
    assert sum(chosen(number_of_change_points(one, search=FAST)) > 0 for one in series) <= 1
    assert change_points(shares(noise(60, seed=0)), 0, search=FAST).empty


def test_steps_are_averaged_and_the_interval_holds_both_stretches():
    series = shares(np.repeat(ramps(), 3, axis=0))
    coarse = Search(stretches=75, num_draws=5)
    jump, turn = change_points(series, 2, search=coarse).itertuples(index=False)
    for truth, point in ((90, jump), (210, turn)):
        assert point.step % 4 == 0
        assert point.low <= truth <= point.high <= point.low + 20


def test_a_change_between_two_stretches_is_found_exactly():
    steps = np.arange(120)[:, None]
    series = shares(np.where(steps >= 60, 0.6, 0.4) * np.ones((1, 2)) + 1e-3 * noise(120, seed=5)[:, :2])
    (point,) = change_points(series, 1, search=Search(stretches=30, num_draws=9)).itertuples(index=False)
    assert (point.low, point.step, point.high) == (57, 60, 63)


def test_phases_lie_between_change_points():
    points = pd.DataFrame({"step": [30, 70]})
    assert phases_between(points, num_steps=100) == {
        "phase 1": range(0, 30),
        "phase 2": range(30, 70),
        "phase 3": range(70, 100),
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.ones((5, 2)), "at least 6 steps, got 5"),
        (np.full((10, 2), np.nan), r"those of step 0 are \[nan nan\]. Leave out steps"),
    ],
)
def test_series_in_which_nothing_can_be_found(values, message):
    with pytest.raises(ValueError, match=message):
        number_of_change_points(shares(values))


def test_what_cannot_be_looked_for():
    with pytest.raises(ValueError, match="room for 0 to 2 change points; got number=3"):
        change_points(shares(noise(10, seed=0)), 3)
    with pytest.raises(ValueError, match=r"shortest and block in \(0, 0.5\]"):
        Search(block=0.0)
    with pytest.raises(ValueError, match="needs the axis 'layer'"):
        number_of_change_points(shares(noise(10, seed=0)).rename(layer="parameter"))


def test_the_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ruptures", None)
    with pytest.raises(ImportError, match=r"change points needs ruptures.*pip install 'explaind-tracer\[analysis\]'"):
        change_points(shares(noise(20, seed=0)), 1)


def points(*steps, spread=2):
    return pd.DataFrame({"step": steps, "low": [s - spread for s in steps], "high": [s + spread for s in steps]})


def test_change_points_recur_on_a_common_clock():
    found = {0: points(60, 330), 1: points(55, 200), 2: points(62)}
    clock = {0: [0, 64, 366, 498], 1: [0, 62, 233, 303], 2: [0, 66, 240, 300]}
    table = recurrence(found, clock, tolerance=0.1)
    assert table[["run", "point"]].values.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0]]
    assert table["time"].iloc[1] == pytest.approx(1 + (330 - 64) / (366 - 64))
    assert table["recurrence"].tolist() == [1.0, 0.5, 1.0, 0.5, 1.0]
    assert not is_stable(table)
    assert is_stable(table, least=0.5)
    assert is_stable(recurrence({0: points(), 1: points()}, {0: [0, 9], 1: [0, 9]}))


@pytest.mark.parametrize(
    ("runs", "clock", "message"),
    [
        ([0], {0: [0, 100]}, "at least two runs, got 1"),
        ([0, 1], {0: [0, 100]}, "same number of landmarks"),
        ([0, 1], {0: [0, 100], 1: [0, 50, 100]}, "same number of landmarks"),
        ([0, 1], {0: [0, 100], 1: [100, 0]}, "landmarks of run 1 must be at least two ascending"),
    ],
)
def test_clocks_that_do_not_go(runs, clock, message):
    with pytest.raises(ValueError, match=message):
        recurrence({run: points(50) for run in runs}, clock)
