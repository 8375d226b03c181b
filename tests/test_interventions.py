"""Hybrids, transplants and pruned networks have exactly the weights that were asked for."""

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import explaind
from explaind.errors import ModelMismatchError
from explaind.interventions import prune, swap, transplant
from tests.cases import BY_NAME, mlp, query, record
from tests.traced import same


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-full-batch-shuffled"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


def test_a_hybrid_has_each_layer_from_its_step(run):
    hybrid = swap(run, ["2"], from_step=run.num_steps, into_step=1)
    assert list(hybrid) == list(run.table.names)
    for name, tensor in hybrid.items():
        assert torch.equal(tensor, run.params(run.num_steps if name.startswith("2.") else 1)[name])


def test_swapping_all_layers_or_none_is_a_step(run):
    assert same(swap(run, list(run.layers), from_step=3, into_step=0), run.params(3))
    assert same(swap(run, [], from_step=3, into_step=0), run.params(0))


def test_layers_are_those_of_the_run(run):
    opened = explaind.open_run(run.path, model=mlp())
    opened.layers = {"weights": ["0.weight", "2.weight"], "biases": ["0.bias", "2.bias"]}
    hybrid = swap(opened, ["biases"], from_step=4, into_step=2)
    assert same(
        {name: hybrid[name] for name in ("0.bias", "2.weight")},
        {"0.bias": run.params(4)["0.bias"], "2.weight": run.params(2)["2.weight"]},
    )
    opened.layers = {"biases": ["2.bais"]}
    with pytest.raises(ValueError, match=r"run.layers names '2.bais', which is not a parameter of the run"):
        swap(opened, ["biases"], from_step=1, into_step=0)


def test_a_transplant_moves_the_layers_named_and_no_other(run):
    model = mlp()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    transplant(run, ["0"], step=run.num_steps, model=model)
    trained = run.params(run.num_steps)
    assert torch.equal(model[0].weight, trained["0.weight"])
    assert torch.equal(model[0].bias, trained["0.bias"])
    assert (model[2].weight == 7).all() and (model[2].bias == 7).all()
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_layers_and_steps_that_are_not_there_are_refused(run):
    for change in (
        lambda layers, step: swap(run, layers, from_step=step, into_step=0),
        lambda layers, step: transplant(run, layers, step=step, model=mlp()),
    ):
        with pytest.raises(ValueError, match="there is no layer 'first'; the layers are 0, 2"):
            change(["first"], 0)
        with pytest.raises(ValueError, match="layers is a list of names; got the string '0'"):
            change("0", 0)
        with pytest.raises(IndexError, match="step 7 is not between 0 and 6"):
            change(["0"], run.num_steps + 1)


def test_a_model_of_another_shape_is_left_as_it_was(run):
    other = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(ModelMismatchError, match=r"'0.weight' has the shape \(4, 3\) in the run, and \(5, 3\)"):
        transplant(run, ["0"], step=1, model=other)
    assert same(dict(other.state_dict()), before)
    with pytest.raises(ModelMismatchError, match=r"the run has '0.weight', which the model has not"):
        transplant(run, ["0"], step=1, model=nn.Linear(3, 3))
    with pytest.raises(
        ModelMismatchError, match=r"torch.float64 in the run, and torch.float32.*Convert it with .to\(torch.float64\)"
    ):
        transplant(run, ["0"], step=1, model=mlp().float())


def test_pruning_keeps_the_highest_scores(run):
    params = run.params(run.num_steps)
    flat = run.table.flatten(params)
    scores = np.random.default_rng(0).permutation(run.table.num_elements)
    kept = run.table.flatten(prune(params, scores, fraction=0.3))
    num_kept = round(0.3 * len(scores))
    expected = torch.where(torch.from_numpy(scores >= len(scores) - num_kept), flat, 0)
    assert torch.equal(kept, expected)
    assert torch.equal(run.table.flatten(params), flat)


def test_all_or_nothing_can_be_pruned(run):
    params = run.params(run.num_steps)
    scores = np.zeros(run.table.num_elements)
    assert same(prune(params, scores, fraction=1), params)
    assert not any(tensor.any() for tensor in prune(params, scores, fraction=0).values())


def test_of_equal_scores_the_first_are_kept():
    params = {"w": torch.ones(4)}
    assert prune(params, [1, 2, 1, 1], fraction=0.5)["w"].tolist() == [1, 1, 0, 0]
    assert prune(params, np.array([True, False, True, False]), fraction=0.75)["w"].tolist() == [1, 1, 1, 0]
    assert prune(params, [-torch.inf, 0, 0, 0], fraction=0.75)["w"].tolist() == [0, 1, 1, 1]


def test_scores_by_element_are_matched_by_their_coordinate(run):
    data = run.attribute(query(), by=("query", "element")).dataset
    scores = abs(data.contribution + data.decay).sum("query")
    params = run.params(run.num_steps)
    pruned = prune(params, scores.values, fraction=0.4)
    assert same(prune(params, scores, fraction=0.4), pruned)
    reversed_scores = scores.isel(element=slice(None, None, -1))
    assert same(prune(params, reversed_scores, fraction=0.4), pruned)
    assert not same(prune(params, reversed_scores.values, fraction=0.4), pruned)


def test_what_cannot_be_pruned_by_is_said(run):
    params = run.params(0)
    total = run.table.num_elements
    for fraction in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="fraction is the part of the elements to keep, from 0 to 1; got"):
            prune(params, np.ones(total), fraction=fraction)
    with pytest.raises(ValueError, match=rf"of length {total}; got the shape \(3, {total}\). Sum the other axes out"):
        prune(params, np.ones((3, total)), fraction=0.5)
    with pytest.raises(ValueError, match="2 scores are NaN"):
        prune(params, [np.nan, np.nan, *range(total - 2)], fraction=0.5)
    twice = xr.DataArray(np.ones(total), {"element": [0, *range(total - 1)]}, ["element"])
    with pytest.raises(ValueError, match=f"must name each of 0 … {total - 1} once; it goes from 0 to {total - 2}"):
        prune(params, twice, fraction=0.5)
