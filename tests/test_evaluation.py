"""A network computes with the parameters that it is given, and is itself again afterwards."""

import numpy as np
import pytest
import torch
from torch import nn

from explaind.errors import ModelMismatchError
from explaind.evaluation import evaluate, predict
from explaind.interventions import swap
from tests.cases import BY_NAME, mlp, query, record
from tests.traced import batchnorm_mlp, dropout_mlp, same


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-full-batch-shuffled"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


def test_a_network_is_evaluated_with_the_parameters_given(run):
    inputs = torch.randn(5, 3, dtype=torch.float64)
    trained, model = run.params(run.num_steps), mlp()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = evaluate(model, trained, inputs)
    assert same(dict(model.state_dict()), before)
    assert not output.requires_grad
    model.load_state_dict(trained)
    assert torch.equal(output, model(inputs))
    assert torch.equal(evaluate(model, {"0.weight": trained["0.weight"]}, input=inputs), output)


def test_a_network_is_evaluated_in_eval_mode_and_keeps_its_mode():
    inputs = torch.randn(5, 3, dtype=torch.float64)
    for model in (dropout_mlp(), batchnorm_mlp()):
        buffers = {name: tensor.clone() for name, tensor in model.named_buffers()}
        output = evaluate(model, dict(model.named_parameters()), inputs)
        assert model.training and same(dict(model.named_buffers()), buffers)
        assert torch.equal(output, model.eval()(inputs))


def test_a_module_that_is_used_twice_gets_its_own_weights_back():
    part = nn.Linear(2, 2)
    model = nn.Sequential(part, part)
    own = part.weight
    zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    assert not evaluate(model, zeros, torch.ones(1, 2)).any()
    assert part.weight is own


def test_parameters_that_do_not_fit_are_refused():
    with pytest.raises(ModelMismatchError, match="params= has 'weights', which the model has not; it has weight, bias"):
        evaluate(nn.Linear(2, 2), {"weights": torch.zeros(2, 2)}, torch.ones(1, 2))
    with pytest.raises(ModelMismatchError, match=r"'bias' has the shape \(3,\) in params=, and \(2,\) in the model"):
        evaluate(nn.Linear(2, 2), {"bias": torch.zeros(3)}, torch.ones(1, 2))


def test_predictions_of_the_trained_network_are_those_attributed(run):
    asked = query().mean(by_class=[0, 0, 1])
    result = run.attribute(asked, by=("query",)).dataset
    steps = [run.params(step) for step in (run.num_steps, 0)]
    predicted = predict(run, asked, steps)
    assert predicted.dims == ("network", "query") and predicted["query"].values.tolist() == [0, 1]
    np.testing.assert_allclose(predicted, [result.prediction, result.initial], rtol=1e-13)


def test_predictions_of_a_changed_network_are_its_own(run):
    asked, trained = query(), run.params(run.num_steps)
    changed = swap(run, ["2"], from_step=0, into_step=run.num_steps)
    output = evaluate(mlp(), changed, asked.inputs)
    np.testing.assert_allclose(predict(run, asked, iter([trained, changed]))[1], asked.output(output), rtol=1e-13)
    with pytest.raises(ModelMismatchError, match=r"the run has '2.bias', which the network has not"):
        predict(run, asked, [{name: tensor for name, tensor in trained.items() if name != "2.bias"}])
    with pytest.raises(
        ModelMismatchError, match=r"'2.bias' has the shape \(3,\) in the run, and \(1,\) in the network"
    ):
        predict(run, asked, [trained | {"2.bias": torch.zeros(1)}])
