"""Without the example axis only some batches are replayed, unless gradients are found that no example accounts for."""

import pytest
import torch
import torch.nn.functional as F
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


def recorded(path, penalised=()):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    with explaind.trace(model, optimizer, path):
        for number in range(NUM_STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES), LABELS)
            if number in penalised:
                loss = loss + 0.01 * model[0].weight.square().sum()
            loss.backward()
            optimizer.step()
    return explaind.open_run(path, model=mlp())


@pytest.mark.parametrize("axis", ["step", "update_step"])
def test_some_steps_tell_for_all(tmp_path, replays, axis):
    run = recorded(tmp_path / "run.zarr")
    some = run.attribute(query(), by=("query", axis, "layer"))
    assert {0, NUM_STEPS - 1} < set(replays) and len(set(replays)) < 10
    assert str(sorted(set(replays))).strip("[]") in some.dataset.attrs["replayed"]
    some.check()
    every = run.attribute(query(), by=("query", "example", axis, "layer"))
    assert every.dataset.attrs["replayed"] == "every step"
    summed = every.dataset.contribution.sum("example").transpose(*some.dataset.contribution.dims)
    torch.testing.assert_close(torch.tensor(some.dataset.contribution.values), torch.tensor(summed.values))


def test_a_penalty_makes_every_step_be_replayed(tmp_path, replays):
    run = recorded(tmp_path / "run.zarr", penalised=range(NUM_STEPS))
    result = run.attribute(query(), by=("query", "step"))
    assert set(replays) == set(range(NUM_STEPS))
    with pytest.warns(explaind.errors.UnattributedWarning):
        result.check()
