"""Parameter groups that are added while a run is recorded."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

import explaind
from explaind.errors import RecordingError
from tests.cases import data
from tests.twin import assert_exact, attribute
from tests.unfreezing import frozen_backbone, momentum, record, refused, train, unfreeze


@pytest.mark.parametrize("when", ["at_epoch", "midway", "before_step"])
@pytest.mark.parametrize(
    "make",
    [
        momentum,
        lambda model: SGD(model[2].parameters(), lr=0.2, weight_decay=0.1, nesterov=True, momentum=0.8),
        lambda model: Adam(model[2].parameters(), lr=0.05, weight_decay=0.1, amsgrad=True),
        lambda model: AdamW(model[2].parameters(), lr=0.05, weight_decay=0.3),
    ],
)
def test_an_unfrozen_backbone_is_split_exactly(tmp_path, make, when):
    run = record(tmp_path / "run", make=make, **{when: lambda model, optimizer: unfreeze(model, optimizer, lr=0.03)})
    assert list(run.table.names) == ["2.weight", "2.bias", "0.weight", "0.bias"]
    assert run.num_groups == 2
    start = 3 if when == "at_epoch" else 4
    begun = run.updated[:, 2:]
    # Its own gradient comes with the first backward pass of a parameter that requires one.
    assert begun.all(axis=1).tolist() == [s >= start + (when == "before_step") for s in range(6)]
    backbone = frozen_backbone()[0]
    for step in range(start + 1):
        assert torch.equal(run.params(step)["0.weight"], backbone.weight)
    assert not torch.equal(run.params(6)["0.weight"], backbone.weight)
    assert_exact(run)


def test_settings_of_a_group_before_it_was_added_are_its_first(tmp_path):
    def add(model, optimizer):
        unfreeze(model, optimizer, lr=0.03, weight_decay=0.4, name="backbone", warmup=(1.0, 2.0))

    def later(model, optimizer):
        optimizer.param_groups[1]["lr"] = 0.01

    run = record(tmp_path / "run", at_epoch=add, midway=later)
    assert [run.settings(step, 0)["lr"] for step in range(6)] == [0.2] * 6
    assert [run.settings(step, 1)["lr"] for step in range(6)] == [0.03] * 4 + [0.01] * 2
    assert run.settings(0, 1)["name"] == "backbone"
    assert run.settings(0, 1)["warmup"] == (1.0, 2.0)
    assert run.settings(0, 1)["weight_decay"] == 0.4
    assert "warmup" not in run.settings(5, 0)
    assert_exact(run)


def test_groups_are_added_one_after_the_other(tmp_path):
    def make_model():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model[0].requires_grad_(False)
        model[2].requires_grad_(False)
        return model

    def add(layer, rate):
        def edit(model, optimizer):
            model[layer].requires_grad_(True)
            optimizer.add_param_group({"params": list(model[layer].parameters()), "lr": rate})

        return edit

    run = record(
        tmp_path / "run",
        make_model=make_model,
        make=lambda model: AdamW(model[4].parameters(), lr=0.05),
        at_epoch=add(2, 0.02),
        midway=add(0, 0.01),
    )
    assert list(run.table.names) == ["4.weight", "4.bias", "2.weight", "2.bias", "0.weight", "0.bias"]
    assert [int(run.updated[:, place].sum()) for place in (0, 2, 4)] == [6, 3, 2]
    assert run.fixed(0) == {}
    assert_exact(run)


def test_running_statistics_stay_fixed_tensors(tmp_path):
    def make_model():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
        model[0].requires_grad_(False)
        return model

    def make(model):
        return AdamW([*model[1].parameters(), *model[2].parameters()], lr=0.05)

    run = record(tmp_path / "run", make_model=make_model, make=make, at_epoch=unfreeze, batch_size=3)
    assert set(run.fixed(0)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert [int(run.fixed(step)["1.num_batches_tracked"]) for step in range(7)] == [1, 2, 3, 4, 5, 6, 6]
    assert run.verify().bit_exact


def test_frozen_values_that_were_edited_are_kept_snapshot_by_snapshot(tmp_path):
    def make_model():
        return frozen_backbone()

    def edit(model, optimizer):
        with torch.no_grad():
            model[0].weight.mul_(0.5)

    def loop(model, optimizer, batches=iter):
        train(model, optimizer, batches, at_epoch=edit, midway=unfreeze)

    model = make_model()
    start = model[0].weight.detach().clone()
    optimizer = momentum(model)
    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        loop(model, optimizer, recorder.batches)
    run = explaind.open_run(tmp_path / "run", model=make_model())
    for step in range(5):
        assert torch.equal(run.params(step)["0.weight"], start if step < 3 else start / 2)


def test_stored_example_gradients_are_zero_before(tmp_path):
    stored = record(tmp_path / "stored", example_grads="stored", midway=unfreeze)
    replayed = record(tmp_path / "replayed", midway=unfreeze)
    np.testing.assert_allclose(attribute(stored).contribution, attribute(replayed).contribution, rtol=1e-9, atol=1e-14)
    assert not stored.example_grads(0)["0.weight"].any()


def test_a_new_parameter_of_a_wider_type(tmp_path):
    def make_model():
        torch.manual_seed(3)
        wide = nn.Linear(4, 3).double().requires_grad_(False)

        class Mixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(3, 4), wide

            def forward(self, x):
                return self.second(self.first(x).double())

        return Mixed()

    def add(model, optimizer):
        model.second.requires_grad_(True)
        optimizer.add_param_group({"params": model.second.parameters()})

    run = record(
        tmp_path / "run", make_model=make_model, make=lambda m: SGD(m.first.parameters(), lr=0.1), at_epoch=add
    )
    assert run.params(6)["first.weight"].dtype == torch.float32
    assert run.params(6)["second.weight"].dtype == torch.float64
    assert run.verify().bit_exact


def test_of_two_optimizers_the_first_gets_a_group(tmp_path):
    def make_model():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        model[2].requires_grad_(False)
        return model

    def loop(model, optimizers, batches=iter):
        loader = torch.utils.data.DataLoader(data(), batch_size=4)
        for epoch in range(2):
            if epoch == 1:
                model[2].requires_grad_(True)
                optimizers[0].add_param_group({"params": model[2].parameters(), "lr": 0.01})
            for x, y in batches(loader):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                for optimizer in optimizers:
                    optimizer.step()

    models = [make_model(), make_model()]
    optimizers = [
        [SGD(m[0].parameters(), lr=0.1, momentum=0.9), SGD(m[4].parameters(), lr=0.2, weight_decay=0.1)] for m in models
    ]
    loop(models[0], optimizers[0])
    with explaind.trace(models[1], optimizers[1], tmp_path / "run") as recorder:
        loop(models[1], optimizers[1], recorder.batches)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    run = explaind.open_run(tmp_path / "run", model=make_model())
    assert {p.name: p.group for p in run.table} == {
        "0.weight": 0, "0.bias": 0, "2.weight": 1, "2.bias": 1, "4.weight": 2, "4.bias": 2
    }  # fmt: skip
    assert [run.settings(0, group)["lr"] for group in range(3)] == [0.1, 0.01, 0.2]
    assert [run.settings(5, group)["weight_decay"] for group in range(3)] == [0, 0, 0.1]
    assert float(np.abs(attribute(run).other).max()) < 1e-12
    assert run.verify().bit_exact


def test_parameters_that_the_optimizer_owned_all_along_are_unfrozen(tmp_path):
    def thaw(model, optimizer):
        model[0].requires_grad_(True)

    def clipped(model, optimizer):
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    run = record(tmp_path / "run", make=lambda m: SGD(m.parameters(), lr=0.2), at_epoch=thaw, before_step=clipped)
    assert run.updated[:, 0].tolist() == [False] * 3 + [True] * 3
    assert len(set(run.gradient_rescaling(4)[0])) == 1
    assert run.gradient_rescaling(4)[0][0] < 1
    assert_exact(run)


def test_parameters_that_require_gradients_and_have_no_group_are_not_trained(tmp_path):
    def thaw(model, optimizer):
        model[0].requires_grad_(True)

    run = record(tmp_path / "run", at_epoch=thaw)
    assert list(run.table.names) == ["2.weight", "2.bias"]
    assert_exact(run)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_stale_gradient_of_a_new_parameter_comes_from_no_example(tmp_path):
    def thaw(model, optimizer):
        model[0].requires_grad_(True)

    def add(model, optimizer):  # and its gradient is that of two batches, of which only one is in the step
        optimizer.add_param_group({"params": model[0].parameters()})

    run = record(tmp_path / "run", at_epoch=thaw, before_step=add)
    other = np.abs(attribute(run).other).sum(["query"])
    assert float(other.sel(parameter="0.weight", step=4)) > 1e-4
    assert float(other.sel(parameter="2.weight").max()) < 1e-12


def test_a_schedule_made_while_recording(tmp_path):
    def loop(model, optimizer, batches=iter):
        loader = torch.utils.data.DataLoader(data(), batch_size=4)
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for epoch in range(2):
            if epoch == 1:
                unfreeze(model, optimizer, lr=0.03, initial_lr=0.03)
                scheduler = StepLR(optimizer, step_size=1, gamma=0.5, last_epoch=0)
            for x, y in batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                scheduler.step()

    model = frozen_backbone()
    optimizer = momentum(model)
    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        loop(model, optimizer, recorder.batches)
    run = explaind.open_run(tmp_path / "run", model=frozen_backbone())
    assert_exact(run)


# ---------------------------------------------------------------------- what is refused


def test_a_parameter_of_another_model_is_refused(tmp_path):
    refused(
        tmp_path / "run",
        lambda optimizer, model: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
        "with 1 parameter that the traced model does not have",
    )


def test_a_group_that_is_taken_away_is_refused(tmp_path):
    refused(
        tmp_path / "run",
        lambda optimizer, model: optimizer.param_groups.clear(),
        "taken out of group 0 of an optimizer",
    )


def test_a_group_that_is_replaced_is_refused(tmp_path):
    def replace(optimizer, model):
        optimizer.param_groups[0]["params"] = list(model[0].parameters())

    refused(tmp_path / "run", replace, "taken out of group 0 of an optimizer")


def test_a_group_between_the_steps_of_two_optimizers_is_refused(tmp_path):
    model = frozen_backbone()
    optimizers = [SGD([model[2].weight], lr=0.1), SGD([model[2].bias], lr=0.1)]
    x, y = data()[:4]
    with (
        pytest.raises(
            RecordingError, match="a parameter group was added between the steps of two optimizers in step 0"
        ),
        explaind.trace(model, optimizers, tmp_path / "run"),
    ):
        F.cross_entropy(model(x), y).backward()
        optimizers[0].step()
        unfreeze(model, optimizers[1])
        optimizers[1].step()
