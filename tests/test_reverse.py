"""The check that the examples' parts of a step sum to its gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adamax, Rprop

import explaind
import explaind.reference
from explaind.errors import ClosureError, VerificationError
from tests import cases
from tests.cases import NUM_EXAMPLES, data

FEATURES = data().tensors[0]
DTYPES = [torch.float64, torch.float32]
STEP_AXES = ["step", "update_step"]


def record(path, make, loss, steps):
    model = make()
    optimizer = SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, path) as recorder:
        for step in range(steps):
            recorder.examples(range(NUM_EXAMPLES))
            optimizer.zero_grad()
            loss(model, step).backward()
            optimizer.step()
    return explaind.open_run(path, model=make())


def linear():
    torch.manual_seed(3)
    return nn.Linear(3, 4).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step_axis", STEP_AXES)
def test_gradients_that_shift_all_logits_alike_contribute_nothing_to_a_log_probability(step_axis, dtype, tmp_path):
    weights = torch.linspace(-1.0, 2.0, NUM_EXAMPLES, dtype=torch.float64)
    run = record(tmp_path / "run.zarr", linear, lambda model, step: model(FEATURES).sum(dim=1) @ weights, steps=4)
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.log_prob([0, 1]))
    result = run.attribute(query, by=("query", "example", step_axis), dtype=dtype)
    np.testing.assert_allclose(result.dataset.contribution, 0.0, atol=64 * torch.finfo(dtype).eps)


class Coupled(nn.Module):
    """Adds the batch's mean to the rows that are marked."""

    def __init__(self):
        super().__init__()
        self.linear = linear()

    def forward(self, x, marks):
        outputs = torch.tanh(self.linear(x))
        return outputs + marks[:, None] * outputs.mean(dim=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("step_axis", STEP_AXES)
def test_rows_that_are_coupled_in_later_steps_only_are_split_by_their_outputs(step_axis, dtype, tmp_path):
    def loss(model, step):
        marks = torch.full((NUM_EXAMPLES,), float(step > 0), dtype=torch.float64)
        return model(FEATURES, marks).square().sum()

    run = record(tmp_path / "run.zarr", Coupled, loss, steps=3)
    inputs = (FEATURES[:2], torch.zeros(2, dtype=torch.float64))
    query = explaind.Query(inputs, output=explaind.outputs.logit([0, 1]))
    fixed = explaind.quadrature.gauss_legendre(3)
    result = run.attribute(query, by=("query", "example", step_axis, "parameter"), dtype=dtype, quadrature=fixed)
    found, expected = result.dataset.contribution, explaind.reference.decompose(run, query, num_nodes=3).contribution
    expected = expected.sum([axis for axis in expected.dims if axis not in found.dims])
    limit = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype] * float(np.abs(expected).max())
    assert float(np.abs(found - expected).max()) <= limit
    assert result.dataset.attrs["row_split"].startswith("coupled rows")


def normalised():
    torch.manual_seed(3)
    layers = (nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [Adamax, Rprop])
def test_a_batch_that_its_normalisation_makes_constant_raises_no_alarm(make, dtype, tmp_path):
    """The first layer's gradient is zero but for rounding, which these optimizers magnify to a whole step."""
    rows = [4, 4, 4]
    features, labels = data().tensors
    model = normalised()
    optimizer = make(model.parameters(), lr=0.02)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        for _ in range(3):
            recorder.examples(rows)
            optimizer.zero_grad()
            F.cross_entropy(model(features[rows]), labels[rows]).backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=normalised())
    query = explaind.Query(features[:2], output=explaind.outputs.log_prob([0, 1]))
    run.attribute(query, by=("query", "example", "step"), dtype=dtype).check()


def test_stored_gradients_that_do_not_sum_to_the_recorded_one_are_found(tmp_path, monkeypatch):
    run, _ = cases.record(cases.CASES[0], tmp_path / "run.zarr", example_grads="stored")
    stored = run.stored_example_grads
    monkeypatch.setattr(
        run, "stored_example_grads", lambda rows: stored(rows) * torch.linspace(1, 1.1, rows.stop - rows.start)[:, None]
    )
    with pytest.raises(VerificationError, match=r"the examples' parts of step \d+ do not sum to its gradient"):
        run.attribute(cases.query(), by=("query", "example"))


def test_gradients_that_are_less_exact_than_their_type_do_not_divide_a_step_for_ever(tmp_path):
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear()

        def forward(self, x):
            return torch.tanh(torch.tanh(self.linear(x)).half().double())

    run = record(tmp_path / "run.zarr", Halved, lambda model, step: model(FEATURES).square().sum(), steps=2)
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]))
    result = run.attribute(query, by=("query", "step"), tolerance=1e-12)
    assert int(result.dataset.num_nodes.max()) < 8000
    with pytest.raises(ClosureError, match="not accurate enough"):
        result.check()
