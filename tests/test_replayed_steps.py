"""Which batches are replayed, to tell what comes from the examples, and how much of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import explaind
import explaind.reference
from explaind.path import step as path_step
from tests.cases import data, mlp, query

NUM_STEPS = 30
FEATURES, LABELS = data().tensors


@pytest.fixture
def replays(monkeypatch):
    """Numbers of the steps that are replayed."""
    steps, replay = [], path_step.replay_step

    def counted(run, index, **options):
        steps.append(index)
        return replay(run, index, **options)

    monkeypatch.setattr(path_step, "replay_step", counted)
    return steps


def recorded(path, penalised=(), clipped=(), halved=()):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    with explaind.trace(model, optimizer, path):
        for number in range(NUM_STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES), LABELS)
            if number in penalised:
                loss = loss + 0.01 * model[0].weight.square().sum()
            loss.backward()
            if number in clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if number in halved:
                for parameter in model.parameters():
                    parameter.grad *= 0.5
            optimizer.step()
    return explaind.open_run(path, model=mlp())


@pytest.mark.parametrize("axis", ["step", "update_step"])
def test_every_step_is_replayed_once_for_all_queries(tmp_path, replays, axis):
    run = recorded(tmp_path / "run.zarr")
    first = run.attribute(query(), by=("query", axis, "layer"))
    assert sorted(replays) == list(range(NUM_STEPS))
    first.check()
    replays.clear()
    second = run.attribute(query(), by=("query", axis, "layer"))
    assert not replays
    assert abs(first.dataset.contribution - second.dataset.contribution).max() == 0
    every = run.attribute(query(), by=("query", "example", axis, "layer")).dataset.contribution.sum("example")
    expected = every.transpose(*first.dataset.contribution.dims)
    torch.testing.assert_close(torch.tensor(first.dataset.contribution.values), torch.tensor(expected.values))


def test_what_no_example_accounts_for_is_told_apart_at_every_step_where_there_is_some(tmp_path, replays):
    run = recorded(tmp_path / "run.zarr", penalised=[4, 7, 8])
    first = run.attribute(query(), by=("query", "step", "layer")).dataset
    replays.clear()
    second = run.attribute(query(), by=("query", "step", "layer")).dataset
    assert sorted(replays) == [4, 7, 8]
    every = run.attribute(query(), by=("query", "example", "step", "layer")).dataset
    for found in (first, second):
        assert set(found.step.values[(found.other != 0).any(("query", "layer"))]) == {4, 7, 8}
        torch.testing.assert_close(torch.tensor(found.other.values), torch.tensor(every.other.values))


@pytest.mark.parametrize("examples", [None, [1, 4]])
@pytest.mark.parametrize(
    "odd", [{"penalised": [12]}, {"clipped": [12, 13]}, {"penalised": [25], "halved": [3, 4]}], ids=str
)
def test_a_gradient_that_is_not_its_examples_alone_is_found_out(tmp_path, monkeypatch, odd, examples):
    run = recorded(tmp_path / "run.zarr", **odd)
    by, asked, trust = ("query", "example", "step", "layer"), [], path_step.Step.trust

    def noted(step):
        trust(step)
        asked.append(step)

    monkeypatch.setattr(path_step.Step, "trust", noted)
    found = run.attribute(query(), by=by, examples=examples).dataset
    trusted, odd_steps = (
        [step.index for step in asked if step.is_trusted],
        {step for steps in odd.values() for step in steps},
    )
    if examples is None:
        assert len(trusted) > NUM_STEPS / 2 and not odd_steps & set(trusted)
    else:
        assert not asked  # where rows are left out, what they add up to cannot be seen
    monkeypatch.setattr(path_step.Step, "trust", lambda step: None)
    expected = run.attribute(query(), by=by, examples=examples).dataset
    for name in ("contribution", "decay", "other", "omitted"):
        torch.testing.assert_close(torch.tensor(found[name].values), torch.tensor(expected[name].values))
    assert bool((found.other != 0).any()) == bool((expected.other != 0).any())


def test_rows_that_cancel_do_not_hide_a_factor(tmp_path):
    # Near the optimum the rows' gradients add up to nothing, whatever they are multiplied with.
    def make():
        torch.manual_seed(0)
        return nn.Linear(3, 1).double()

    features, targets = FEATURES, FEATURES @ torch.ones(3, 1, dtype=torch.float64) + torch.sin(5 * FEATURES[:, :1])
    model = make()
    optimizer = SGD(model.parameters(), lr=0.3)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        for number in range(80):
            recorder.examples(range(len(features)))
            optimizer.zero_grad()
            F.mse_loss(model(features), targets).backward()
            if 55 <= number < 79:
                for parameter in model.parameters():
                    parameter.grad *= 0.5
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=make())
    asked = explaind.Query(features[:2], output=explaind.outputs.value())
    found = run.attribute(asked, by=("query", "example", "step")).dataset.contribution
    expected = explaind.reference.decompose(run, asked).contribution
    expected = expected.sum([dim for dim in expected.dims if dim not in found.dims]).transpose(*found.dims)
    torch.testing.assert_close(torch.tensor(found.values), torch.tensor(expected.values), atol=1e-9, rtol=1e-7)
