"""Inputs of queries in blocks, where memory does not hold them all at once."""

import pytest
import torch
import xarray as xr
from torch import nn

import explaind
from explaind.path.budget import Budget
from explaind.request import check_request
from tests.cases import BY_NAME, query, record

BY = ("query", "example", "step", "layer")


class Gated(nn.Module):
    """Its parameter is used by an operation whose rows only vmap can tell apart."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Parameter(torch.tensor([0.3, -0.2, 0.5, 0.1]))

    def forward(self, z):
        return torch.relu(z) * torch.sigmoid(self.gate)


class Centred(nn.Module):
    def forward(self, z):
        return z - z.mean(dim=0)


def weighted():
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0.2, 0.2, 0.2, 0.2, 0.2], [0, 0, 0, 0, 0, 1.0]])
    return explaind.Query(query(num=6).inputs, output=query(num=6).output, weights=weights.double())


QUERIES = {
    "each": query(num=6),
    "mean": query(num=6).mean(),
    "by class": query(num=6).mean(by_class=[0, 1, 2, 0, 1, 0]),
    "overlapping": weighted(),
}


def in_blocks_of(number, run, asked, monkeypatch):
    """Make the budget hold so many inputs at once."""
    function = check_request(run, asked, by=BY).function
    monkeypatch.setattr(Budget, "for_inputs", number * function.working_bytes // max(1, function._most_inputs))


@pytest.mark.parametrize("asked", QUERIES.values(), ids=QUERIES)
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, Gated])
def test_blocks_give_what_all_inputs_together_give(activation, asked, tmp_path, monkeypatch):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr", activation=activation)
    rule = explaind.quadrature.adaptive(max_depth=2)
    expected = run.attribute(asked, by=BY, quadrature=rule)
    for number in (1, 4):
        with monkeypatch.context() as patch:
            in_blocks_of(number, run, asked, patch)
            assert check_request(run, asked, by=BY).function._block == number
            found = run.attribute(asked, by=BY, quadrature=rule)
        assert found.dataset.attrs["query_evaluation"] == "each query alone"
        xr.testing.assert_allclose(found.dataset, expected.dataset, rtol=1e-10, atol=1e-13)


def test_inputs_that_depend_on_each_other_are_never_taken_apart(tmp_path, monkeypatch):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr", activation=Centred)
    asked = query(num=6).mean()
    expected = run.attribute(asked, by=("query", "step", "layer"))
    monkeypatch.setattr(Budget, "for_inputs", 1)
    found = run.attribute(asked, by=("query", "step", "layer"))
    assert found.dataset.attrs["query_evaluation"] == "all inputs as one batch"
    xr.testing.assert_allclose(found.dataset, expected.dataset, rtol=1e-11, atol=1e-13)


def test_a_model_that_makes_another_number_of_rows_is_refused(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    twice = explaind.Query(
        query(num=2).inputs, output=explaind.outputs.value(), forward=lambda model, x: model(torch.cat([x, x]))
    )
    with pytest.raises(ValueError, match=r"'value' needs a row of the model's output for every input; of 2 inputs"):
        run.attribute(twice, by="query")


@pytest.mark.parametrize("number", [1, 4])
def test_queries_of_which_some_are_in_doubt_are_divided_in_blocks(number, tmp_path, monkeypatch):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr", activation=nn.ReLU)
    asked = query(num=20)
    settings = {"by": BY, "tolerance": 1e-4, "dtype": torch.float32}
    expected = run.attribute(asked, **settings)
    in_blocks_of(number, run, asked, monkeypatch)
    result = run.attribute(asked, **settings)
    result.check()
    size = float(abs(expected.dataset.contribution).sum())
    assert float(abs(result.dataset.contribution - expected.dataset.contribution).max()) < 1e-3 * size


@pytest.mark.parametrize("seed", [2, 6, 10])
def test_a_block_of_which_no_query_is_kept_adds_nothing(seed, tmp_path, monkeypatch):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr", activation=nn.ReLU)
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    asked = explaind.Query(inputs, output=explaind.outputs.log_prob([0, 1, 2, 0, 1]))
    settings = {"by": ("query", "step"), "tolerance": 1e-7, "dtype": torch.float32}
    expected = run.attribute(asked, **settings)
    in_blocks_of(2, run, asked, monkeypatch)
    result = run.attribute(asked, **settings)
    result.check(tolerance=1e-6)
    size = float(abs(expected.dataset.contribution).sum())
    assert float(abs(result.dataset.contribution - expected.dataset.contribution).max()) < 1e-3 * size
