"""Two more axes: windows of steps, and single elements of the parameters."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import explaind
from explaind import quadrature
from explaind.errors import VerificationError
from explaind.path import elements, sweep
from tests.cases import BY_NAME, CASES, mlp, query, record

EXACT = {"tolerance": 1e-10}
TERMS = ("contribution", "decay", "other", "rounding")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-schedule"], tmp_path_factory.mktemp("windows") / "run.zarr")[0]


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("by", [("example",), ("layer",), ()], ids=str)
def test_windows_sum_their_steps(run, by, stored, tmp_path):
    out = {"out": tmp_path / "result.zarr"} if stored else {}
    coarse = run.attribute(
        query(), by=("query", "window", *by), windows={"late": range(2, 6), "early": slice(0, 2)}, **out
    )
    fine = run.attribute(query(), by=("query", "step", *by)).dataset
    coarse.check()
    assert coarse.dataset["window"].values.tolist() == ["early", "late"]
    assert coarse.dataset["first_step"].values.tolist() == [0, 2]
    assert coarse.dataset["last_step"].values.tolist() == [1, 5]
    for label, steps in (("early", slice(0, 1)), ("late", slice(2, 5))):
        for term in TERMS:
            wanted = fine[term].sel(step=steps).sum("step")
            np.testing.assert_allclose(coarse.dataset[term].sel(window=label), wanted, rtol=1e-12, atol=1e-15)


def test_windows_of_a_length_begin_at_step_0_and_leave_out_what_is_not_asked_for(run):
    result = run.attribute(query(), by=("query", "window"), windows=2, steps=[3, 4])
    result.check()
    assert result.dataset["window"].values.tolist() == [2, 4]
    fine = run.attribute(query(), by=("query", "step"), steps=[3, 4]).dataset
    np.testing.assert_allclose(result.dataset.contribution, fine.contribution, rtol=1e-12)
    np.testing.assert_allclose(result.dataset.omitted, fine.omitted, rtol=1e-12)


def test_named_windows_leave_the_other_steps_out(run):
    result = run.attribute(query(), by=("query", "window"), windows={"middle": range(2, 4)})
    result.check()
    assert set(result.dataset["update_step"].values.tolist()) >= {2, 3}
    fine = run.attribute(query(), by=("query", "step"), steps=[2, 3]).dataset
    np.testing.assert_allclose(result.dataset.omitted, fine.omitted, rtol=1e-12)


@pytest.mark.parametrize(
    ("by", "windows", "message"),
    [
        ("window", None, "so say which"),
        ("step", 3, "so name their axis"),
        ("window", 0, "number of steps, or a mapping"),
        ("window", "all", "number of steps, or a mapping"),
        ("window", {}, "is empty"),
        ("window", {"a": range(0, 3), "b": range(2, 4)}, "must not share steps: 'a' is range"),
        ("window", {"a": range(0, 7)}, "successive steps of the run's 6"),
        ("window", {"a": range(0, 4, 2)}, "successive steps"),
        ("window", {"a": slice(3, 3)}, "successive steps"),
    ],
)
def test_windows_that_do_not_go(run, by, windows, message):
    with pytest.raises(ValueError, match=message):
        run.attribute(query(), by=("query", by), windows=windows)


def test_window_and_step_exclude_each_other(run):
    with pytest.raises(ValueError, match="ask for one"):
        run.attribute(query(), by=("query", "step", "window"), windows=2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_elements_sum_to_their_parameters(case, tmp_path):
    run, _ = record(case, tmp_path / "run.zarr")
    fine = run.attribute(query(), by=("query", "step", "element"), **EXACT)
    coarse = run.attribute(query(), by=("query", "step", "parameter"), **EXACT).dataset
    fine.check()
    for term in ("contribution", "decay"):
        summed = fine.dataset[term].groupby("parameter").sum()
        wanted = coarse[term].sel(parameter=summed["parameter"])
        np.testing.assert_allclose(summed, wanted, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_the_product_of_both_features(case, tmp_path):
    run, _ = record(case, tmp_path / "run.zarr")
    # Adaptive rules are free to differ in elements whose errors cancel, so both sides take the same nodes.
    nodes = {"quadrature": quadrature.gauss_legendre(3), "tolerance": 1.0}
    found = run.attribute(query(), by=("query", "element"), **nodes).dataset.contribution
    wanted = torch.zeros(query().num_inputs, run.table.num_elements, dtype=torch.float64)
    for step in range(run.num_steps):
        phi, brought = run.query_features(query(), step, **nodes), run.train_features(step)
        flat = run.table.flatten({name: features.sum(dim=0) for name, features in brought.items()}, torch.float64)
        wanted -= torch.stack([run.table.flatten({n: v[q] for n, v in phi.items()}) for q in range(len(wanted))]) * flat
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-13)


def test_elements_of_some_layers_in_windows(run, tmp_path):
    kwargs = {"by": ("query", "window", "element"), "windows": 3, "layers": ["2"]}
    result = run.attribute(query(), **kwargs, out=tmp_path / "result.zarr")
    result.check()
    every = run.attribute(query(), by=("query", "window", "element"), windows=3)
    last = every.dataset.contribution["layer"] == "2"
    assert set(result.dataset["parameter"].values.tolist()) == {"2.weight", "2.bias"}
    np.testing.assert_array_equal(result.dataset["element"], every.dataset["element"][last])
    np.testing.assert_allclose(
        result.dataset.contribution, every.dataset.contribution[:, :, last.values], rtol=1e-12, atol=1e-16
    )
    assert result.dataset.other.dims == ("query", "window")


def test_elements_of_an_optimizer_without_a_rule(tmp_path):
    class Strange(torch.optim.SGD):
        """Not known by that name."""

    model = mlp()
    optimizer = Strange(model.parameters(), lr=0.1, weight_decay=0.1)
    x = torch.randn(4, 3, dtype=torch.float64)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    result = run.attribute(query(), by=("query", "step", "element"))
    result.check()
    assert not result.dataset.decay.any()


@pytest.mark.parametrize("axis", ["example", "update_step", "token"])
def test_elements_do_not_go_with(run, axis):
    with pytest.raises(ValueError, match=f"by with 'element' goes with 'step' or 'window'.*{axis}"):
        run.attribute(query(), by=("query", "element", axis))


def test_what_elements_cost_is_planned(run):
    plan = run.plan(query(), by=("query", "window", "element"), windows=2)
    assert plan.bytes_result > 2 * 8 * 3 * 3 * run.table.num_elements


def test_steps_outside_of_the_windows_are_left_out(run):
    result = run.attribute(query(), by=("query", "window"), windows={"late": range(3, 6)}, steps=[0, 1, 4])
    result.check()
    fine = run.attribute(query(), by=("query", "step"), steps=[4]).dataset
    np.testing.assert_allclose(result.dataset.contribution[:, 0], fine.contribution[:, 0], rtol=1e-12)
    np.testing.assert_allclose(result.dataset.omitted, fine.omitted, rtol=1e-12)
    with pytest.raises(ValueError, match="none of the steps lies in a window"):
        run.attribute(query(), by=("query", "window"), windows={"late": range(3, 6)}, steps=[0, 1])


def test_elements_are_of_all_examples(run):
    with pytest.raises(ValueError, match="'element' is for all examples together; leave examples= out"):
        run.attribute(query(), by=("query", "element"), examples=[1, 2])


def test_elements_that_miss_their_terms_are_refused(run, monkeypatch):
    """As if another gradient had been multiplied than the one that the terms were made of."""
    original = elements.split_by_element

    def other(terms, step, phi, psi, kept):
        return original(replace(terms, contribution=1.001 * terms.contribution), step, phi, psi, kept)

    monkeypatch.setattr(sweep, "split_by_element", other)
    with pytest.raises(VerificationError, match="elements' parts of step 5 miss its terms by"):
        run.attribute(query(), by=("query", "element"))
