"""Which batches are replayed, to tell what comes from the examples, and how much of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import explaind
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


def recorded(path, penalised=(), clipped=()):
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
    "odd", [{"penalised": [12]}, {"clipped": [12, 13]}, {"penalised": [25], "clipped": [3]}], ids=str
)
def test_a_gradient_that_is_trusted_wrongly_is_found_out(tmp_path, monkeypatch, odd, examples):
    run = recorded(tmp_path / "run.zarr", **odd)
    by, trusted, trust = ("query", "example", "step", "layer"), [], path_step.Step.trust

    def noted(step):
        trust(step)
        trusted.append(step)

    monkeypatch.setattr(path_step.Step, "trust", noted)
    found = run.attribute(query(), by=by, examples=examples).dataset
    assert len(trusted) > NUM_STEPS / 2
    distrusted = {step.index for step in trusted if not step.is_trusted}
    assert distrusted and distrusted <= {step for steps in odd.values() for step in steps}
    monkeypatch.setattr(path_step.Step, "trust", lambda step: None)
    expected = run.attribute(query(), by=by, examples=examples).dataset
    for name in ("contribution", "decay", "other", "omitted"):
        torch.testing.assert_close(torch.tensor(found[name].values), torch.tensor(expected[name].values))
    assert bool((found.other != 0).any()) == bool((expected.other != 0).any())
