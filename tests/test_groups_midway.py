"""Parameter groups that are added while a run is recorded."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import StepLR

import explaind
import explaind.store
from explaind import quadrature, reference
from explaind.errors import RecordingError, StoreExistsError, StoreFormatError
from tests.cases import NUM_EXAMPLES, chunks_of, data, mlp, query


def frozen_backbone():
    model = mlp()
    model[0].requires_grad_(False)
    return model


def unfreeze(model, optimizer, **settings):
    model[0].requires_grad_(True)
    optimizer.add_param_group({"params": model[0].parameters(), **settings})


def nothing(model, optimizer):
    pass


def train(
    model, optimizer, batches=iter, *, at_epoch=nothing, midway=nothing, before_step=nothing, epochs=2, batch_size=4
):
    """A loop as a user writes it; `at_epoch` runs before the second epoch, the others within its second batch."""
    torch.manual_seed(11)
    samples = data(next(model.parameters()).dtype)
    loader = torch.utils.data.DataLoader(samples, batch_size=batch_size, shuffle=True)
    for epoch in range(epochs):
        if epoch == 1:
            at_epoch(model, optimizer)
        for number, (x, y) in enumerate(batches(loader)):
            optimizer.zero_grad()
            if (epoch, number) == (1, 1):
                midway(model, optimizer)
            F.cross_entropy(model(x), y).backward()
            if (epoch, number) == (1, 1):
                before_step(model, optimizer)
            optimizer.step()


def momentum(model):
    return SGD(model[2].parameters(), lr=0.2, momentum=0.9)


def record(path, *, make_model=frozen_backbone, make=momentum, example_grads="replayed", **loop):
    """Train with and without tracing; the weights must be the same bits. Returns the run."""
    alone, traced = make_model(), make_model()
    train(alone, make(alone), **loop)
    optimizer = make(traced)
    with explaind.trace(traced, optimizer, path, example_grads=example_grads) as recorder:
        train(traced, optimizer, batches=recorder.batches, **loop)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, traced.get_parameter(name))
    run = explaind.open_run(path, model=make_model())
    for name, tensor in (run.params(run.num_steps) | run.fixed(run.num_steps)).items():
        assert torch.equal(tensor, traced.state_dict()[name])
    return run


def attribute(run, step_axis="step"):
    result = run.attribute(
        query(run.table.dtype), by=("query", "example", step_axis, "parameter"), quadrature=quadrature.gauss_legendre(6)
    )
    result.check()
    return result.dataset


def assert_exact(run):
    assert float(np.abs(attribute(run).other).max()) < 1e-12
    expected = reference.decompose(run, query())
    for axis, left_out in (("step", "update_step"), ("update_step", "step")):
        dataset = attribute(run, axis)
        for actual, term in (
            (dataset.contribution, expected.contribution.sum("token")),
            (dataset.decay, expected.decay),
        ):
            summed = term.sum(left_out).transpose(*actual.dims)
            np.testing.assert_allclose(actual, summed, rtol=1e-7, atol=1e-9 * float(np.abs(summed).max()))
    assert run.verify().bit_exact


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


def refused(path, edit, match, **loop):
    model = frozen_backbone()
    optimizer = momentum(model)
    with (
        pytest.raises(RecordingError, match=match),
        explaind.trace(model, optimizer, path) as recorder,
    ):
        train(model, optimizer, recorder.batches, at_epoch=lambda m, o: edit(o, m), **loop)
    run = explaind.open_run(path, model=frozen_backbone())
    assert run.num_steps == 3
    assert run.complete
    assert_exact(run)


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


# ---------------------------------------------------------------------- the store while it is widened


def failing(error):
    def copyfile(source, target):
        raise error

    return copyfile


def test_no_room_for_the_wider_store_loses_nothing(tmp_path, monkeypatch):
    def full(optimizer, model):
        monkeypatch.setattr(shutil, "copyfile", failing(OSError(28, "No space left on device")))
        unfreeze(model, optimizer)

    refused(tmp_path / "run", full, "no room left on the disk")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_widening_one_of_the_stores_is_whole(tmp_path, monkeypatch, renames):
    path = tmp_path / "run"
    copies = []
    rename = explaind.store.Path.rename

    def watched(self, target):
        copies.append({p.name: copy.copy(shutil.copytree(p, tmp_path / f"{len(copies)}-{p.name}")) for p in beside()})
        return rename(self, target)

    def beside():
        return [p for p in tmp_path.iterdir() if p.name.startswith("run")]

    monkeypatch.setattr(explaind.store.Path, "rename", watched)
    record(path, at_epoch=unfreeze)
    monkeypatch.undo()
    kept = {p.name: p for p in beside()}
    assert list(kept) == ["run"]
    if renames == 2:
        assert explaind.open_run(path, model=frozen_backbone()).num_steps == 6
        return
    shutil.rmtree(path)
    for name in copies[renames]:
        shutil.move(tmp_path / f"{renames}-{name}", tmp_path / name)
    if renames == 1:
        with pytest.raises(StoreFormatError, match=r"the run is at .*run\.old\.partial"):
            explaind.open_run(path)
        with pytest.raises(StoreExistsError, match=r"the run is at .*run\.old\.partial"):
            record(path)
        wide = explaind.open_run(path.with_name("run.new.partial"), model=frozen_backbone())
        assert len(wide.table) == 4
        path.with_name("run.old.partial").rename(path)
    run = explaind.open_run(path, model=frozen_backbone())
    assert len(run.table) == 2


def test_a_run_that_was_opened_before_says_that_it_was_replaced(tmp_path):
    model = frozen_backbone()
    optimizer = momentum(model)
    early = []

    def look(model, optimizer):
        recorder._rows._writer.flush()
        recorder._rows._writer.wait()
        early.append(explaind.open_run(tmp_path / "run", model=frozen_backbone()))
        unfreeze(model, optimizer)

    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        train(model, optimizer, recorder.batches, at_epoch=look)
    assert early[0].num_steps == 2
    for read in (early[0].params, early[0].update, early[0].fixed, early[0].state, early[0].example_grads):
        with pytest.raises(StoreFormatError, match="has been replaced since it was opened"):
            read(0)


def test_a_long_store_is_widened_in_blocks(tmp_path, monkeypatch):
    chunks_of(monkeypatch, 1000)
    run = record(tmp_path / "run", at_epoch=unfreeze, epochs=12)
    assert run.num_steps == 36
    sizes = json.loads((tmp_path / "run" / "params" / "zarr.json").read_text())["chunk_grid"]["configuration"]
    assert sizes["chunk_shape"][0] == 1000 // (8 * 15)
    assert len(run.examples) == NUM_EXAMPLES
    assert run.verify().bit_exact
