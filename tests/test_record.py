"""What is written down is what the loop did."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Adam
from torch.optim.lr_scheduler import StepLR

import explaind
from tests.cases import BY_NAME, mlp, one_group, query, record
from tests.traced import (
    FEATURES,
    LABELS,
    batchnorm_mlp,
    dropout_mlp,
    momentum_sgd,
    recorded,
    same,
    step_on,
    three_steps,
    untracked_batchnorm_mlp,
)


def test_without_a_path_runs_are_numbered_under_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        model = mlp()
        optimizer = momentum_sgd(model)
        with explaind.trace(model, optimizer):
            step_on(model, optimizer, slice(0, 3))
        assert explaind.open_run(f"storage/run-{number}.zarr").num_steps == 1
    assert sorted(path.name for path in (tmp_path / "storage").iterdir()) == ["run-1.zarr", "run-2.zarr"]


@pytest.mark.parametrize("name", ["sgd-two-groups-schedule", "adam-amsgrad", "adamw-schedule", "sgd-nesterov"])
def test_parameters_state_and_settings_are_those_of_the_loop(name, tmp_path):
    case = BY_NAME[name]
    model = mlp()
    optimizer = case.optimizer(model)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    names = dict(model.named_parameters())

    def look():
        params = {name: p.detach().clone() for name, p in names.items()}
        state = {
            name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
            for name, p in names.items()
            if p in optimizer.state
        }
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return params, state, settings

    before, gradients = [], []
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for start in (0, 2, 4, 6, 1):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            before.append(look())
            gradients.append({name: p.grad.clone() for name, p in names.items()})
            optimizer.step()
            scheduler.step()
        last = look()
    run = explaind.open_run(tmp_path / "run.zarr")
    assert run.num_steps == 5
    assert run.complete
    for step, (params, state, settings) in enumerate([*before, last]):
        assert same(run.params(step), params)
        for name, entries in state.items():
            for key, value in entries.items():
                assert torch.equal(run.state(step)[name][key], value), (step, name, key)
        if step < 5:
            assert same(run.table.unflatten(run.flat_gradient(step)), gradients[step])
            update = {key: before_after - params[key] for key, before_after in run.params(step + 1).items()}
            assert same(run.update(step), update)
            for group, values in enumerate(settings):
                got = run.settings(step, group)
                assert {key: got[key] for key in values} == values


@pytest.mark.parametrize("as_keyword", [True, False], ids=["keyword", "positional"])
@pytest.mark.parametrize("make_optimizer", [momentum_sgd, one_group(Adam, lr=0.1)], ids=["sgd", "adam"])
def test_a_closure_gives_the_same_record_as_the_plain_loop(make_optimizer, as_keyword, tmp_path):
    losses = []

    def with_closure(model, optimizer, recorder):
        for start in (0, 3, 6):
            rows = slice(start, start + 3)

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
                loss.backward()
                return loss

            returned = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            losses.append(returned.item())

    run, model = recorded(tmp_path / "closure.zarr", with_closure, optimizer=make_optimizer)
    plain, plain_model = recorded(tmp_path / "plain.zarr", three_steps, optimizer=make_optimizer)
    assert same(model.state_dict(), plain_model.state_dict())
    assert run.num_steps == plain.num_steps == 3
    for step in range(3):
        assert torch.equal(run.flat_gradient(step), plain.flat_gradient(step))
        assert torch.equal(run.calls(step)[0].output_grad, plain.calls(step)[0].output_grad)
    assert run.history.loss.tolist() == losses
    assert run.verify().bit_exact


def test_logging_the_loss_of_a_graph_does_not_warn(tmp_path):
    def body(model, optimizer, recorder):
        recorder.log(loss=F.cross_entropy(model(FEATURES[:3]), LABELS[:3]))

    torch.set_warn_always(True)
    try:
        model = mlp()
        with explaind.trace(model, momentum_sgd(model), tmp_path / "run.zarr") as recorder:
            body(model, None, recorder)
    finally:
        torch.set_warn_always(False)


def test_the_history_is_the_loops(tmp_path):
    losses = []

    def body(model, optimizer, recorder):
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
            losses.append(loss.item())
            recorder.log(loss=loss)
            loss.backward()
            optimizer.step()
            scheduler.step()
        step_on(model, optimizer, slice(0, 2))

    run, _ = recorded(tmp_path / "run.zarr", body)
    history = run.history
    assert list(history.columns) == [
        "loss", "lr", "num_rows", "gradient_norm", "update_norm", "parameter_norm"
    ]  # fmt: skip
    assert history.index.name == "step"
    assert history.loss.tolist()[:2] == losses
    assert math.isnan(history.loss[2])
    np.testing.assert_allclose(history.lr, [0.2, 0.1, 0.05])
    assert history.num_rows.tolist() == [4, 5, 2]
    np.testing.assert_allclose(history.gradient_norm, [run.flat_gradient(s).norm() for s in range(3)])
    np.testing.assert_allclose(history.update_norm[0], 0.2 * history.gradient_norm[0])
    start = torch.cat([p.detach().reshape(-1) for p in mlp().parameters()])
    np.testing.assert_allclose(history.parameter_norm[0], start.norm())


@pytest.mark.parametrize("name", ["sgd-accumulation", "adamw-two-groups", "adamw-clipped"])
def test_stored_example_gradients_equal_replayed_ones(name, tmp_path):
    case = BY_NAME[name]
    stored, _ = record(case, tmp_path / "stored.zarr", example_grads="stored")
    replayed, _ = record(case, tmp_path / "replayed.zarr")
    assert stored.stores_example_grads
    assert not replayed.stores_example_grads
    for step in range(stored.num_steps):
        one, other = stored.example_grads(step), replayed.example_grads(step)
        for parameter, gradients in one.items():
            assert len(gradients) == len(stored.call_examples(step))
            torch.testing.assert_close(gradients, other[parameter], rtol=1e-12, atol=1e-15)
    axes = ("query", "example", "step", "parameter")
    first, second = (run.attribute(query(), by=axes) for run in (stored, replayed))
    assert first.dataset.attrs["example_products"] == "stored"
    np.testing.assert_allclose(first.dataset.contribution, second.dataset.contribution, rtol=1e-9, atol=1e-15)
    first.check()


def test_stored_example_gradients_sum_to_the_gradient(tmp_path):
    run, _ = record(BY_NAME["sgd-accumulation"], tmp_path / "run.zarr", example_grads="stored")
    for step in range(run.num_steps):
        total = {name: rows.sum(dim=0) for name, rows in run.example_grads(step).items()}
        torch.testing.assert_close(run.table.flatten(total), run.flat_gradient(step), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp, untracked_batchnorm_mlp])
def test_rows_of_a_batch_that_cannot_be_taken_apart_are_stored_too(make, tmp_path):
    by = ("query", "example", "step", "parameter")
    stored, _ = recorded(tmp_path / "stored.zarr", three_steps, make=make, example_grads="stored")
    replayed, _ = recorded(tmp_path / "replayed.zarr", three_steps, make=make)
    one, other = stored.attribute(query(), by=by), replayed.attribute(query(), by=by)
    ways = ("factors", "factors") if make is dropout_mlp else ("tangents", "rows of the batch")
    assert (one.dataset.attrs["example_products"], other.dataset.attrs["example_products"]) == ("stored", ways[0])
    split = "rows of the recorded batch" if make is dropout_mlp else "coupled rows"
    assert all(result.dataset.attrs["row_split"].startswith(split) for result in (one, other))
    np.testing.assert_allclose(one.dataset.contribution, other.dataset.contribution, rtol=1e-9, atol=1e-14)
    late = replayed.attribute(query(), by=("query", "example", "update_step", "parameter"))
    assert late.dataset.attrs["example_products"] == ways[1]
    np.testing.assert_allclose(
        late.dataset.contribution.sum("update_step"), other.dataset.contribution.sum("step"), rtol=1e-9, atol=1e-14
    )


def test_keyword_inputs_and_plain_arguments_are_recorded(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x, *, mask, factor=1.0):
            return factor * self.linear(x * mask)

    mask = (torch.arange(27).reshape(9, 3) % 2).double()

    def body(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows], mask=mask[rows], factor=2.0), LABELS[rows]).backward()
            optimizer.step()

    run, model = recorded(tmp_path / "run.zarr", body, make=Scaled)
    assert run.verify().bit_exact
    asked = explaind.Query({"0": FEATURES[:2], "mask": mask[:2]}, output=explaind.outputs.logit([0, 1]))
    result = run.attribute(asked, by=("query", "example", "layer"))
    result.check()
    with torch.no_grad():
        expected = model(FEATURES[:2], mask=mask[:2], factor=2.0)[[0, 1], [0, 1]]
    np.testing.assert_allclose(result.total, expected, rtol=1e-12)
