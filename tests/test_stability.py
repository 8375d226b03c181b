"""Change points over seeds: the clock, recurrence against chance, the verdict, and how they are shown."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments.grokking.figures.stability import change_points_over_seeds
from experiments.grokking.stability import POINTS, chance, clock, find_change_points, recurring, verdicts
from experiments.grokking.summary import in_markdown


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def run(seed, *boundaries, task="addition"):
    memorised, half, generalised, end = boundaries
    return {
        "task": task,
        "architecture": "position-free",
        "seed": seed,
        "memorised": memorised,
        "half_generalised": half,
        "generalised": generalised,
        "num_steps": end,
        "closure_error": 1e-17,
        "quadrature_error": 1e-3,
    }


RUNS = pd.DataFrame([run(0, 60, 200, 280, 300), run(1, 50, 500, 700, 720), run(2, 70, 300, 390, 400)])
"""Three runs of one task, of which the second is more than twice as long as the others."""

FAILED = pd.DataFrame([{"task": "addition", "architecture": "position-free", "seed": 3, "failure": "never"}])


def points(steps, *, width=5, task="addition"):
    rows = [(task, "position-free", seed, s, s - width, s + width) for seed, own in steps.items() for s in own]
    return pd.DataFrame(rows, columns=POINTS)


def judged(found, runs=RUNS):
    found = recurring(found, runs)
    return found, verdicts(found, runs)


def test_the_turn_is_not_before_the_training_set_is_memorised():
    assert clock(run(0, 60, 200, 280, 300)) == [0, 60, 200, 300]
    assert clock(run(0, 60, 55, 80, 100)) == [0, 60, 60, 100]


def test_phases_that_follow_the_accuracies_are_stable_however_long_a_run_is():
    found, table = judged(points({0: [60, 200], 1: [52, 497], 2: [68, 302]}), pd.concat([RUNS, FAILED]))
    np.testing.assert_allclose(found["time"], [1, 2, 1 + 2 / 450, 1 + 447 / 450, 68 / 70, 2.02])
    assert (found["recurrence"] == 1).all()
    (row,) = table.to_dict("records")
    assert (row["seeds"], row["fewest"], row["most"], row["points"], row["recurring"]) == (3, 2, 2, 6, 6)
    assert [row[f"holds_{name}"] for name in ("memorised", "half_generalised", "generalised")] == [3, 3, 0]
    assert (row["verdict"], row["p_value"]) == ("stable", 1 / 200)
    assert 0 < row["by_chance"] < 0.5


def test_phases_at_the_same_steps_are_not_stable_where_the_accuracies_differ():
    found, table = judged(points({0: [180], 1: [180], 2: [180]}))
    assert found["recurrence"].tolist() == [0.0, 0.0, 0.0]
    assert table["verdict"].item() == "not stable"
    _, table = judged(points({0: [60, 200], 1: [50], 2: [70, 300]}))
    assert table["verdict"].item() == "not stable"
    assert table["recurring"].item() == 3


def test_intervals_that_meet_wherever_they_are_say_nothing():
    wide = points({0: [150], 1: [360], 2: [200]}, width=350)
    found, table = judged(wide)
    assert (found["recurrence"] == 1).all()
    assert (table["verdict"].item(), table["p_value"].item(), table["by_chance"].item()) == ("not stable", 1.0, 1.0)


def test_chance_is_that_of_two_points_in_a_run():
    found = {seed: points({seed: [50]}, width=0) for seed in (0, 1)}
    drawn = chance(found, {0: [0, 30, 60, 90], 1: [0, 30, 60, 90]}, num_draws=2000)
    assert drawn.mean() == pytest.approx(1 - (1 - 0.1 / 3) ** 2, abs=0.02)  # times within 0.1 of 3


def test_without_change_points_or_other_runs_nothing_is_called_stable():
    none, table = judged(points({}))
    assert none.empty
    assert (table["verdict"].item(), table["points"].item()) == ("no change points", 0)
    one, table = judged(points({0: [60]}), RUNS[:1])
    assert one["recurrence"].isna().all()
    assert (table["verdict"].item(), table["seeds"].item()) == ("one run", 1)


def test_the_change_points_of_a_run_are_those_of_its_shares():
    rng = np.random.default_rng(0)
    rows = []
    for step in range(40):
        size = rng.uniform(1, 9) if step != 17 else 0.0  # the size of a step is no matter; one without is left out
        share = (0.7 if step < 20 else 0.3) + 0.01 * rng.normal()
        rows += [(step, "embedding", size * share), (step, "decoder", size * (1 - share))]
    found = find_change_points(pd.DataFrame(rows, columns=["step", "layer", "influence"]))
    assert found[["step", "low", "high"]].to_numpy().tolist() == [[20, 20, 20]]


def test_the_page_and_the_figure_show_every_change_point_beside_the_accuracies():
    runs = pd.concat([RUNS, FAILED, pd.DataFrame([run(0, 40, 90, 95, 99, task="division")])], ignore_index=True)
    steps = {0: [60, 200], 1: [50], 2: [70, 300]}
    found, table = judged(pd.concat([points(steps), points({0: [41]}, task="division")]), runs)
    page = in_markdown(runs, pd.DataFrame(), found, table)
    assert "| addition | position-free | 0 | 60 | 200 | 280 | 60 (55–65; 1.00), 200 (195–205; 2.00) |" in page
    assert "| addition | position-free | 3 | 1–2 | 3 of 5 |" in page
    assert "| 3 of 3 | 2 of 3 | 0 of 3 | **not stable** |" in page
    assert "| division | position-free | 1 | 1 | – | – | – | – | 1 of 1 | 0 of 1 | 0 of 1 | **one run** |" in page

    figure = change_points_over_seeds(found, runs, table)
    in_steps, on_clock, *other = figure.axes
    for axes, expected in ((in_steps, [60, 200]), (on_clock, [1, 2])):
        (drawn,) = [line for line in axes.lines if line.get_marker() == "|" and line.get_ydata()[0] < 0]
        np.testing.assert_allclose(drawn.get_xdata(), expected)
    reached = [line.get_xdata()[0] for line in in_steps.lines if line.get_marker() in "osD"]
    assert reached == [60, 200, 280, 50, 500, 700, 70, 300, 390]
    low, high = in_steps.collections[0].get_segments()[0][:, 0]
    assert (low, high) == (55, 65)
    assert on_clock.get_title(loc="left").startswith("not stable: 3 of 5 recur in all other runs (p = ")
    assert [axes.get_title(loc="left") for axes in other] == ["division, position-free", "one run"]
