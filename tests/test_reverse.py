"""The check that the examples' parts of a step sum to its gradient."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adamax, Rprop

import explaind
from explaind.errors import VerificationError
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
def test_rows_that_are_coupled_in_later_steps_only_are_found(step_axis, dtype, tmp_path):
    def loss(model, step):
        marks = torch.full((NUM_EXAMPLES,), float(step > 0), dtype=torch.float64)
        return model(FEATURES, marks).square().sum()

    run = record(tmp_path / "run.zarr", Coupled, loss, steps=3)
    inputs = (FEATURES[:2], torch.zeros(2, dtype=torch.float64))
    query = explaind.Query(inputs, output=explaind.outputs.logit([0, 1]))
    with pytest.raises(VerificationError, match=r"of step [12] has another gradient in its batch than alone"):
        run.attribute(query, by=("query", "example", step_axis), dtype=dtype)


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
