"""What models train: frozen, unfrozen and tied parameters, continued runs, dropout and batch normalisation."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

import explaind
from explaind import reference
from tests.cases import mlp, one_group, query
from tests.traced import (
    batchnorm_mlp,
    dropout_mlp,
    momentum_sgd,
    recorded,
    step_on,
    three_steps,
    untracked_batchnorm_mlp,
)

# ---------------------------------------------------------------------- parameters


def test_frozen_parameters_are_kept_as_they_were(tmp_path):
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    run, model = recorded(
        tmp_path / "run.zarr",
        three_steps,
        make=make,
        optimizer=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.2),
    )
    assert list(run.params(0)) == ["2.weight", "2.bias"]
    assert torch.equal(run.fixed(0)["0.weight"], model[0].weight)
    other = make()
    nn.init.zeros_(other[0].weight)
    reopened = explaind.open_run(tmp_path / "run.zarr", model=other)
    result = reopened.attribute(query(), by=("query", "example", "layer"))
    result.check()
    with torch.no_grad():
        expected = query().output(model(query().inputs))
    np.testing.assert_allclose(result.dataset.prediction, expected, rtol=1e-12)
    assert not other[0].weight.any()


def test_a_frozen_parameter_in_the_optimizer_gets_nothing(tmp_path):
    def make():
        model = mlp()
        model[0].bias.requires_grad_(False)
        return model

    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=make, optimizer=one_group(AdamW, lr=0.05))
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "parameter"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(parameter="0.bias")).max() == 0
    assert np.abs(result.dataset.decay.sel(parameter="0.bias")).max() == 0


def test_a_parameter_unfrozen_on_the_way_is_followed(tmp_path):
    def body(model, optimizer, recorder):
        model[0].requires_grad_(False)
        step_on(model, optimizer, slice(0, 3))
        model[0].requires_grad_(True)
        step_on(model, optimizer, slice(3, 6))
        step_on(model, optimizer, slice(6, 9))

    run, _ = recorded(tmp_path / "run.zarr", body, optimizer=one_group(AdamW, lr=0.05))
    assert run.updated[:, 0].tolist() == [False, True, True]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(layer="0", step=0)).max() == 0
    assert np.abs(result.dataset.other).max() < 1e-14


def test_tied_weights_are_one_parameter(tmp_path):
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        model[2].weight = model[0].weight
        return model

    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=make, optimizer=one_group(AdamW, lr=0.05))
    assert list(run.params(0)) == ["0.weight", "0.bias", "2.bias"]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "parameter"), tolerance=1e-12)
    result.check()
    expected = reference.decompose(run, query()).contribution.sum(["update_step", "token"])
    np.testing.assert_allclose(result.dataset.contribution, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_continued_run_keeps_the_momentum_from_before(tmp_path):
    model = mlp()
    optimizer = momentum_sgd(model)
    step_on(model, optimizer, slice(0, 3))
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        step_on(model, optimizer, slice(3, 6))
        step_on(model, optimizer, slice(6, 9))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert run.verify().bit_exact
    for axis in ("step", "update_step"):
        result = run.attribute(query(), by=("query", "example", axis))
        result.check()
        assert np.abs(result.dataset.other).sum() > 1e-6


# ---------------------------------------------------------------------- dropout and batch normalisation


@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_dropout_and_batchnorm_in_training_close_by_example(make, tmp_path):
    run, model = recorded(tmp_path / "run.zarr", three_steps, make=make)
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert result.dataset.attrs["example_products"] == ("factors" if make is dropout_mlp else "tangents")
    assert np.abs(result.dataset.other).max() < 1e-14
    assert np.abs(result.dataset.rounding).max() < 1e-14
    model.eval()
    with torch.no_grad():
        expected = query().output(model(query().inputs))
    np.testing.assert_allclose(result.dataset.prediction, expected, rtol=1e-12)


def test_batchnorm_without_running_statistics_closes_by_example(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=untracked_batchnorm_mlp)
    asked = query().mean()  # such a model has no prediction for a single input
    run.attribute(asked, by=("query", "example", "step", "layer")).check()


def last_step_in_eval_mode(model, optimizer):
    model.eval()
    step_on(model, optimizer, slice(6, 9))


def last_step_without_examples(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


@pytest.mark.parametrize("last", [last_step_in_eval_mode, last_step_without_examples])
@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_dropout_and_batchnorm_close_when_the_last_step_shows_neither(make, last, tmp_path):
    def body(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        last(model, optimizer)

    run, _ = recorded(tmp_path / "run.zarr", body, make=make)
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14
