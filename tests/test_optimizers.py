"""Every optimizer of torch.optim with every flag that changes its update, against the slow twin."""

import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import ASGD, SGD, Adadelta, Adam, Adamax, AdamW, Muon, NAdam, RAdam, RMSprop, Rprop

import explaind
from explaind import reference
from explaind.optimizers import RULES, ParameterStep
from tests.cases import Case, data, mlp, one_group, query
from tests.optimizer_cases import CASES, VARIANTS, is_muon, record_case
from tests.twin import assert_exact, compare, errors_of_the_twin, other_and_rounding


@pytest.fixture(scope="module", params=CASES, ids=str)
def recorded(request, tmp_path_factory):
    return request.param, record_case(request.param, tmp_path_factory.mktemp("run") / "run.zarr")


@pytest.fixture(scope="module")
def expected(recorded):
    return reference.decompose(recorded[1], query())


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
def test_every_single_contribution_and_decay_equals_the_twin(recorded, expected, step_axis):
    case, run = recorded
    dataset = compare(run, expected, step_axis)
    assert float(np.abs(dataset.other).sum()) < 1e-12
    if not is_muon(case):  # which computes in bfloat16
        assert float(np.abs(dataset.rounding).sum()) < 1e-12
        assert max(errors_of_the_twin(run)) <= 1e-12


@pytest.mark.parametrize("case", [case for case in CASES if is_muon(case)], ids=str)
def test_muon_that_computes_in_float64_leaves_no_rounding(case, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    run = record_case(case, tmp_path / "run.zarr")
    assert max(errors_of_the_twin(run)) <= 1e-12
    assert max(other_and_rounding(run)) < 1e-12


def test_the_recorded_steps_replay_bit_for_bit(recorded):
    _, run = recorded
    assert run.verify().bit_exact


DENSE = [make for make in VARIANTS if make is not Muon]


@pytest.mark.parametrize("make", DENSE)
def test_a_learning_rate_in_a_tensor_counts_as_the_optimizer_rounds_it(make, tmp_path):
    def build(model):
        return make(model.parameters(), **VARIANTS[make][0] | {"lr": torch.tensor(VARIANTS[make][0]["lr"])})

    run = record_case(Case(name="", optimizer=build, scheduled=True), tmp_path / "run.zarr")
    rates = [run.settings(s, 0)["lr"] for s in range(run.num_steps)]
    assert all(rate.dtype == torch.float32 for rate in rates)
    assert rates[-1] < rates[0]  # the scheduler writes into the tensor
    assert run.verify().bit_exact
    assert max(other_and_rounding(run)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("make", [Adam, AdamW, NAdam, RAdam, Adamax, Adadelta, RMSprop, Rprop, ASGD])
def test_capturable_steps_leave_only_the_rounding_of_their_count(make, foreach, dtype, tmp_path, monkeypatch):
    module = sys.modules[make.__module__ if make is not AdamW else Adam.__module__]
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda *args, **options: ["cpu"])
    flags = VARIANTS[make][0] | {"capturable": True, "foreach": foreach}
    case = Case(name="", optimizer=one_group(make, **flags), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr", dtype)
    assert run.verify().bit_exact
    other, rounding = other_and_rounding(run)
    assert other < 1e-12
    assert rounding < 1e-4


@pytest.mark.parametrize("make", list(VARIANTS))
def test_float32_steps_leave_only_rounding(make, tmp_path):
    case = Case(name=make.__name__, optimizer=one_group(make, **VARIANTS[make][0]), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr", torch.float32)
    assert run.verify().bit_exact
    other, rounding = other_and_rounding(run)
    assert other == 0
    assert make is Muon or rounding < 1e-4


def test_a_scheduler_of_the_betas_counts(tmp_path):
    def build(model):
        def change(optimizer, *_):
            beta1, beta2 = optimizer.param_groups[0]["betas"]
            optimizer.param_groups[0]["betas"] = (0.95 * beta1, beta2)

        optimizer = AdamW(model.parameters(), lr=0.05)
        optimizer.register_step_post_hook(change)
        return optimizer

    run = record_case(Case(name="", optimizer=build), tmp_path / "run.zarr")
    assert_exact(run)


def test_a_variance_that_cancels_widens_what_counts_as_rounding():
    settings = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "eps": 1e-8, "centered": True, "maximize": False}

    def roundoff(variance):
        square, mean = torch.tensor([1.0 + variance], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        step = ParameterStep(
            settings=settings,
            params=mean,
            gradient=mean,
            before={},
            after={"square_avg": square, "grad_avg": mean},
            dtype=torch.float32,
        )
        found = RULES["torch.optim.rmsprop.RMSprop"].filter(step)
        assert torch.isfinite(found.gradient_gain).all()
        return float(found.update_roundoff / found.gradient_gain)

    assert roundoff(1.0) < 1e-5  # as a part of the update
    assert roundoff(1e-5) > 0.01
    assert roundoff(0.0) > 0.5
    assert roundoff(-1e-9) > 0.5


def test_every_group_follows_the_rule_of_its_own_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    model = mlp()
    optimizers = [
        Muon([model[0].weight], lr=0.02),
        AdamW([model[0].bias, model[2].weight], lr=0.05, weight_decay=0.3),
        SGD([model[2].bias], lr=0.1, momentum=0.9),
    ]
    x, y = data().tensors
    with explaind.trace(model, optimizers, tmp_path / "run.zarr") as recorder:
        for batch in ([0, 1, 2], [3, 4], [0, 5, 6, 7]):
            recorder.examples(batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            for optimizer in optimizers:
                optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert [name.rpartition(".")[2] for name in run.group_optimizers] == ["Muon", "AdamW", "SGD"]
    assert_exact(run)
    assert other_and_rounding(run)[1] < 1e-12
