"""What must not change a decomposition, on problems drawn at random."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

import explaind
from explaind.path import factored, factors
from tests.cases import CASES, data, mlp, query, record

OPTIMIZERS = {
    "sgd": lambda p: SGD(p, lr=0.2),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: AdamW(p, lr=0.05, weight_decay=0.3),
}
slow = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def trained(path, optimizer, batches, dtype=torch.float64):
    model = mlp(dtype=dtype)
    stepper = OPTIMIZERS[optimizer](model.parameters())
    x, y = data(dtype).tensors
    with explaind.trace(model, stepper, path) as recorder:
        for batch in batches:
            recorder.examples(batch)
            stepper.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            stepper.step()
    return explaind.open_run(path, model=model)


plans = st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=9), min_size=1, max_size=5)


@slow
@given(optimizer=st.sampled_from(sorted(OPTIMIZERS)), batches=plans, single=st.booleans())
def test_every_batch_plan_closes(optimizer, batches, single):
    with tempfile.TemporaryDirectory() as directory:
        run = trained(Path(directory) / "run.zarr", optimizer, batches, torch.float32 if single else torch.float64)
        result = run.attribute(query(), by=("query", "example", "step", "layer"), tolerance=1e-9, dtype=torch.float64)
        result.check()
        assert result.dataset.sizes["example"] == len({example for batch in batches for example in batch})


@slow
@given(optimizer=st.sampled_from(sorted(OPTIMIZERS)), order=st.permutations(range(9)))
def test_shuffling_a_full_batch_changes_no_contribution(optimizer, order):
    with tempfile.TemporaryDirectory() as directory:
        plain = trained(Path(directory) / "plain.zarr", optimizer, [list(range(9))] * 3)
        shuffled = trained(
            Path(directory) / "shuffled.zarr", optimizer, [list(range(9)), list(order), list(order)[::-1]]
        )
        by = ("query", "example", "step")
        one, other = (run.attribute(query(), by=by, tolerance=1e-10).dataset.contribution for run in (plain, shuffled))
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-9)


@slow
@given(parts=st.lists(st.integers(0, 2), min_size=4, max_size=4))
def test_any_grouping_of_parameters_sums_to_the_same(parts, run):
    before, layers = dict(run.layers), {}
    for name, part in zip(run.table.names, parts, strict=True):
        layers.setdefault(f"part {part}", []).append(name)
    run.layers = layers
    grouped = run.attribute(query(), by=("query", "example", "layer"), tolerance=1e-10).dataset.contribution
    whole = run.attribute(query(), by=("query", "example"), tolerance=1e-10).dataset.contribution
    run.layers = before
    np.testing.assert_allclose(grouped.sum("layer"), whole, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(CASES[1], tmp_path_factory.mktemp("run") / "run.zarr")[0]


def test_block_sizes_change_nothing(run, monkeypatch):
    by = ("query", "example", "step", "parameter")
    whole = run.attribute(query(), by=by).dataset.contribution
    for module, size in ((factors, "_BLOCK_BYTES"), (factored, "_BLOCK_BYTES")):
        monkeypatch.setattr(module, size, 1)
    np.testing.assert_allclose(run.attribute(query(), by=by).dataset.contribution, whole, rtol=1e-10, atol=1e-13)


def test_a_linear_model_needs_one_node(tmp_path):
    model = nn.Linear(3, 2).double()
    optimizer = SGD(model.parameters(), lr=0.3)
    x, y = data().tensors
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(4):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y % 2).backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=model)
    linear = explaind.Query(query().inputs, output=explaind.outputs.logit([0, 1, 0]))
    result = run.attribute(linear, by=("query",), quadrature=explaind.quadrature.midpoint(1), tolerance=1e-13)
    result.check()


def test_momentum_that_starts_later_is_followed(tmp_path):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, dampening=0.5)
    x, y = data().tensors
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for number in range(6):
            optimizer.param_groups[0]["momentum"] = 0.0 if number < 2 else 0.9
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=model)
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).sum() < 1e-12


def test_restricted_pictures_still_end_at_the_prediction(run):
    result = run.attribute(query(), by=("query", "step", "layer"), steps=range(2, 4), layers=["0"])
    line = next(line for line in result.plot.steps(query=0).get_lines() if "left out" in line.get_label())
    assert line.get_ydata()[-1] == pytest.approx(float(result.dataset.prediction[0]), abs=1e-6)
