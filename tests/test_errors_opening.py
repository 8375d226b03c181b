"""A run that cannot be opened or read, or not with this model, says why."""

import pytest
import torch
from torch import nn

import explaind
from explaind.errors import ModelMismatchError, StoreFormatError, VerificationError
from tests.cases import BY_NAME, mlp, query, record
from tests.traced import with_buffer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-two-groups"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


def without_bias():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def wider():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def longer():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3)).double()


def with_dropout():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Dropout()).double()


MISMATCHES = {
    without_bias: r"the model has no '2\.bias', which the run at .* recorded",
    wider: r"'0\.weight' was recorded with .*\(4, 3\), torch\.float64.*the model's has .*\(5, 3\)",
    longer: r"the model has '3\.weight', which the run at .* did not record",
    with_buffer: "the model has 'scale', which the run at .* did not record",
    lambda: mlp(dtype=torch.float32): r"'0\.weight' was recorded with .*float64.*model's has .*float32",
    with_dropout: "is Dropout in the model and absent in the run",
}


@pytest.mark.parametrize("make", MISMATCHES)
def test_another_model_is_refused_by_name_and_shape(make, run):
    with pytest.raises(ModelMismatchError, match=MISMATCHES[make]):
        explaind.open_run(run.path, model=make())


def test_a_model_with_another_activation_is_refused(run):
    with pytest.raises((ModelMismatchError, VerificationError), match=r"ReLU|'1'"):
        explaind.open_run(run.path, model=mlp(nn.ReLU)).attribute(query(), by=("query", "step"))


def test_what_needs_the_model_asks_for_it(run):
    alone = explaind.open_run(run.path)
    assert alone.params(0)["0.weight"].shape == (4, 3)
    asks = r"open the run with explaind\.open_run\(path, model=make_model\(\)\)"
    for use in (
        lambda: alone.attribute(query(), by=("query",)),
        alone.verify,
        lambda: alone.example_grads(0),
    ):
        with pytest.raises(ValueError, match=asks):
            use()


def test_a_step_that_was_not_recorded_is_out_of_range(run):
    for step in (-1, run.num_steps + 1):
        with pytest.raises(IndexError, match=f"step {step} is not between 0 and {run.num_steps}"):
            run.params(step)
    with pytest.raises(IndexError, match=f"not between 0 and {run.num_steps - 1}"):
        run.update(run.num_steps)


@pytest.mark.parametrize("kind", ["nothing", "a file", "a directory"])
def test_what_is_no_run_is_said_to_be_none(kind, tmp_path):
    path = tmp_path / "run.zarr"
    if kind == "a file":
        path.write_text("hello")
    elif kind == "a directory":
        path.mkdir()
    reason = "it has no commit" if kind == "a directory" else "no such directory"
    with pytest.raises(StoreFormatError, match=f"is not a recorded run: {reason}"):
        explaind.open_run(path)
