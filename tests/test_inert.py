"""Training is bit for bit the same with and without the recorder, which leaves nothing behind."""

import copy
import pickle

import pytest
import torch
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel

import explaind
from tests.cases import BY_NAME, CASES, Case, data, mlp, one_group, train
from tests.traced import batchnorm_mlp, dropout_mlp, momentum_sgd, same, step_on


def trained(case, make, path, *, naming, **options):
    """Weights, optimizer state, last gradients and generator state after training."""
    model = make()
    optimizer = case.optimizer(model)
    if naming is None:
        train(case, model, None, optimizer)
    else:
        with explaind.trace(model, optimizer, path, **options) as recorder:
            train(case, model, recorder if naming == "batches" else None, optimizer)
    gradients = [parameter.grad for parameter in model.parameters()]
    return model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state(), model.training


@pytest.mark.parametrize("naming", ["batches", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_bit_identical_with_and_without_the_recorder(case, naming, tmp_path):
    plain = trained(case, mlp, None, naming=None)
    traced = trained(case, mlp, tmp_path / "run.zarr", naming=naming)
    assert same(plain, traced)


@pytest.mark.parametrize("naming", ["batches", "bare"])
@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_training_with_dropout_or_batchnorm_is_bit_identical(make, naming, tmp_path):
    case = Case(name="random", optimizer=one_group(AdamW, lr=0.05), batch_size=3)
    assert same(trained(case, make, None, naming=None), trained(case, make, tmp_path / "run.zarr", naming=naming))


def test_storing_example_gradients_is_inert_too(tmp_path):
    case = BY_NAME["sgd-accumulation"]
    plain = trained(case, mlp, None, naming=None)
    traced = trained(case, mlp, tmp_path / "run.zarr", naming="batches", example_grads="stored")
    assert same(plain, traced)


def hooks(model, optimizer):
    found = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    for module in model.modules():
        found += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for parameter in model.parameters():
        found += list((parameter._post_accumulate_grad_hooks or {}).values())
    return found


@pytest.mark.parametrize("error", [None, ValueError])
def test_no_hook_is_left_behind(error, tmp_path):
    model = mlp()
    optimizer = momentum_sgd(model)
    try:
        with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
            assert hooks(model, optimizer)
            step_on(model, optimizer, slice(0, 3))
            if error:
                raise error
    except ValueError:
        pass
    assert hooks(model, optimizer) == []
    step_on(model, optimizer, slice(3, 6))
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, AveragedModel, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_while_recording_are_not_recorded(copied, tmp_path):
    model = mlp()
    optimizer = momentum_sgd(model)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        step_on(model, optimizer, range(4))
        other = copied(model)
        other(data().tensors[0])
        step_on(model, optimizer, range(4))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert [len(run.calls(step)) for step in range(2)] == [1, 1]
    assert torch.equal(other(data().tensors[0]), copied(other)(data().tensors[0]))
