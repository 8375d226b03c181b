"""What an attribution costs, found out before it is made, against what it then takes."""

import copy
import inspect
import os

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import explaind
from explaind import memory
from explaind.errors import ResultTooLargeError, StoreExistsError
from explaind.path import step as step_module
from explaind.path.budget import WorkingSet
from explaind.path.factors import Outer, strategy
from explaind.request import Settings, check_request
from explaind.run import Run
from tests.cases import CASES, mlp, query, record

FULL = ("query", "example", "step", "parameter")
RULE = explaind.quadrature.gauss_legendre(2)
ASKED = {
    "all axes": {"by": FULL},
    "step and layer": {"by": ("query", "step", "layer")},
    "one sum": {"by": ()},
    "update steps": {"by": ("query", "example", "update_step")},
    "some steps": {"by": ("query", "example", "step"), "steps": [2, 4]},
    "few examples": {"by": ("query", "example", "layer"), "examples": [0, 3]},
    "an average": {"by": ("query", "example", "step"), "average": explaind.averages.ema(0.5)},
    "float32": {"by": FULL, "dtype": torch.float32},
    "elements": {"by": ("query", "window", "element"), "windows": 3},
    "elements of a layer": {"by": ("query", "step", "element"), "layers": ["2"]},
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.zarr"
    record(next(case for case in CASES if case.name == "adamw-full-batch-shuffled"), path)
    return path


def opened(path):
    return explaind.open_run(path, model=mlp())


@pytest.mark.parametrize("at_once", [4, 2])
@pytest.mark.parametrize("name", ASKED)
def test_what_is_counted_is_what_happens(path, name, at_once, monkeypatch):
    arguments = {**ASKED[name], "quadrature": RULE}
    if at_once < 4:
        monkeypatch.setattr(WorkingSet, "most_queries", lambda self, budget, number: at_once if number > 1 else 1)
    plan = opened(path).plan(query(num=4), **arguments)
    run, replayed, replay = opened(path), [], step_module.replay_step

    def counted(*args, **options):
        replayed.append(args[1])
        return replay(*args, **options)

    monkeypatch.setattr(step_module, "replay_step", counted)
    with FlopCounterMode(display=False) as counter:
        result = run.attribute(query(num=4), **arguments)
    assert plan.batch_passes == len(replayed)
    assert plan.query_gradients == int(result.dataset.num_nodes.sum())
    assert plan.steps == result.dataset.sizes["update_step"]
    assert sum(plan.operations.values()) == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert plan.bytes_result == result.dataset.nbytes
    assert plan.bytes_read == pytest.approx(run._store.bytes_read, rel=0.1)


def test_steps_that_differ_are_counted_within_a_factor_of_1_5(tmp_path):
    run, _ = record(CASES[1], tmp_path / "run.zarr", activation=torch.nn.ReLU)  # batches of 4, 4 and 1; adaptive nodes
    plan = run.plan(query(), by=FULL)
    result = run.attribute(query(), by=FULL)
    assert plan.query_gradients == pytest.approx(int(result.dataset.num_nodes.sum()), rel=0.5)


def test_it_changes_nothing(path, tmp_path):
    run = opened(path)
    before = copy.deepcopy(run.model.state_dict())
    random = torch.get_rng_state()
    files = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    run.plan(query(), by=FULL, out=tmp_path / "result.zarr")
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == files
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"by": ("query", "nonsense")}, ValueError),
        ({"by": FULL, "tolerance": -1}, ValueError),
        ({"by": FULL, "steps": [6]}, ValueError),
        ({"by": FULL, "examples": [100]}, ValueError),
        ({"by": FULL, "layers": ["x"]}, ValueError),
        ({"by": FULL, "groups": [0] * 9}, ValueError),
        ({"by": FULL, "average": 0.9}, TypeError),
        ({"by": FULL, "quadrature": "simpson"}, ValueError),
        ({"by": FULL, "memory": -1}, ValueError),
        ({"by": FULL, "memory": 10}, ResultTooLargeError),
        ({"by": FULL, "out": "."}, StoreExistsError),
    ],
    ids=str,
)
def test_it_refuses_what_is_refused_to_attribute(path, arguments, error):
    run = opened(path)
    messages = []
    for method in (run.plan, run.attribute):
        with pytest.raises(error) as raised:
            method(query(), **arguments)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def test_it_takes_the_arguments_of_attribute():
    attribute, checked = (
        {name: argument.default for name, argument in list(inspect.signature(function).parameters.items())[1:]}
        for function in (Run.attribute, check_request)
    )
    assert attribute == checked
    assert set(Settings.__annotations__) == set(list(attribute)[2:])


def test_a_result_too_large_for_memory_is_planned_for_a_store(path, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 60)
    run = opened(path)
    with pytest.raises(ResultTooLargeError, match=r"Write it to a store with out='result.zarr', leave 'example' out"):
        run.plan(query(), by=FULL)
    plan = run.plan(query(), by=FULL, out=tmp_path / "result.zarr")
    assert plan.stored
    assert plan.peak_memory == memory.working_set(check_request(run, query(), by=FULL, out=tmp_path / "r.zarr")).peak(3)


def test_it_says_how_products_are_made(path):
    run = opened(path)
    assert run.plan(query(), by=FULL).strategies["0.weight"] == "factors"
    assert run.plan(query(), by=("query", "layer")).strategies == {"0": "none: the batch's gradient is enough"} | {
        "2": "none: the batch's gradient is enough"
    }


def test_blocks_are_formed_for_many_queries_and_several_positions():
    outer = Outer(torch.ones(2, 4, 3), torch.ones(2, 4, 5))
    assert [strategy(outer, num_vectors) for num_vectors in (1, 40)] == ["factors", "block"]


def test_it_prints_as_a_table(path):
    text = str(opened(path).plan(query(), by=FULL, quadrature=RULE))
    assert text.startswith("6 steps in 1 sweep over the run\ntime")
    assert "estimated from steps 1, 3, 5" in text
    assert "training batch" in text
    assert "7 forward passes of all, 36 gradients of one" in text
    assert "products by factors" in text
