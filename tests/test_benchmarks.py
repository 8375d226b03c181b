"""The benchmarks run, at sizes where their numbers mean nothing, and the page says what was measured."""

import gc
import json
import re

import pytest

pytest.importorskip("sklearn")

from tests.benchmarks.page import PAGE, PICTURES, page, verdict
from tests.benchmarks.plots import draw, exponents
from tests.benchmarks.results import BENCHMARKS, measure, read
from tests.benchmarks.sizes import toy


def linked(text):
    return set(re.findall(rf"\({PICTURES.name}/(.*?)\)", text))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmarks")
    gc.freeze()  # what is loaded is no garbage: before each measurement all that is not frozen is gone through
    for name in BENCHMARKS:
        measure(name, toy(folder), folder / "results.json")
    gc.unfreeze()
    return read(folder / "results.json")


def test_every_benchmark_leaves_records_with_machine_and_versions(measured):
    assert list(measured) == list(BENCHMARKS)
    for entry in measured.values():
        assert entry["records"]
        assert entry["machine"]["torch_threads"] == 1
        assert {"python", "torch", "numpy", "zarr", "explaind"} <= set(entry["versions"])


def test_the_published_algorithm_gives_the_same_contributions(measured):
    both = next(record for record in measured["naive"]["records"] if "published" in record)
    assert both["largest_difference"] < 1e-3
    assert both["ours"]["error"] <= both["published"]["error"]


def test_page_and_pictures_come_from_the_file_alone(measured, tmp_path):
    results = json.loads(json.dumps(measured))
    assert {path.name for path in draw(results, tmp_path)} == linked(page(results)) != set()


def test_the_committed_page_is_that_of_the_committed_results():
    assert PAGE.read_text() == page(read())
    assert {path.name for path in PICTURES.iterdir()} == linked(PAGE.read_text())


def test_a_verdict_names_the_best_goal_that_is_reached():
    goals = {"must": 3.0, "stretch": 2.0}
    assert [verdict({"value": value, **goals}) for value in (1.9, 2.5, 3.5)] == ["stretch", "must", "missed"]
    goals = {"must": 0.6, "stretch": 0.8, "more_is_better": True}
    assert [verdict({"value": value, **goals}) for value in (0.9, 0.7, 0.5)] == ["stretch", "must", "missed"]


def test_exponents_are_those_of_power_laws():
    records = [{"axis": "steps", "steps": n, "seconds": 3.0 * n, "bytes": 7.0 * n**2} for n in (1, 2, 4, 8)]
    assert exponents(records, "steps") == pytest.approx((1.0, 2.0))
