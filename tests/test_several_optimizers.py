"""Several optimizers that share a model, and several models that are traced at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import explaind
from explaind.errors import RecordingError
from tests.cases import data, mlp

FEATURES, LABELS = data().tensors
BATCHES = [slice(0, 4), slice(4, 9), slice(2, 6), slice(0, 9)]
AXES = ("query", "example", "step", "parameter")


def halves(model):
    return [SGD(model[0].parameters(), lr=0.2, momentum=0.9), AdamW(model[2].parameters(), lr=0.05, weight_decay=0.3)]


def query():
    return explaind.Query(FEATURES[:3], output=explaind.outputs.log_prob([0, 1, 2]))


def train(model, optimizers, *, last_every=1):
    for number, rows in enumerate(BATCHES):
        for optimizer in optimizers:
            optimizer.zero_grad()
        F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
        optimizers[0].step()
        if number % last_every == 0:
            optimizers[1].step()


def recorded(path, **options):
    model = mlp()
    optimizers = halves(model)
    with explaind.trace(model, optimizers, path):
        train(model, optimizers, **options)
    return explaind.open_run(path, model=mlp()), model


@pytest.mark.parametrize("last_every", [1, 2])
def test_several_optimizers_step_in_rounds(last_every, tmp_path):
    run, model = recorded(tmp_path / "run.zarr", last_every=last_every)
    untraced = mlp()
    train(untraced, halves(untraced), last_every=last_every)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untraced.parameters(), strict=True))
    assert run.num_steps == len(BATCHES)
    assert run.group_optimizers == ["torch.optim.sgd.SGD", "torch.optim.adamw.AdamW"]
    assert run.updated[:, -1].tolist() == [number % last_every == 0 for number in range(len(BATCHES))]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=AXES)
    assert result.check().other < 1e-12
    late = run.attribute(query(), by=("query", "example", "update_step", "parameter"))
    np.testing.assert_allclose(
        late.dataset.contribution.sum("update_step"), result.dataset.contribution.sum("step"), rtol=1e-9, atol=1e-13
    )


def test_each_parameter_is_as_under_its_own_optimizer_alone(tmp_path):
    model = mlp()
    optimizers = [
        SGD(model[0].parameters(), lr=0.2, momentum=0.9),
        SGD(model[2].parameters(), lr=0.05, weight_decay=0.3),
    ]
    with explaind.trace(model, optimizers, tmp_path / "two.zarr"):
        train(model, optimizers)
    twin = mlp()
    grouped = SGD(
        [
            {"params": twin[0].parameters(), "lr": 0.2, "momentum": 0.9},
            {"params": twin[2].parameters(), "lr": 0.05, "weight_decay": 0.3},
        ]
    )
    with explaind.trace(twin, grouped, tmp_path / "one.zarr"):
        for rows in BATCHES:
            grouped.zero_grad()
            F.cross_entropy(twin(FEATURES[rows]), LABELS[rows]).backward()
            grouped.step()
    two, one = (
        explaind.open_run(tmp_path / f"{name}.zarr", model=mlp()).attribute(query(), by=AXES) for name in ("two", "one")
    )
    np.testing.assert_array_equal(two.dataset.contribution, one.dataset.contribution)
    np.testing.assert_array_equal(two.dataset.decay, one.dataset.decay)


def test_optimizers_that_take_turns_make_a_step_each(tmp_path):
    model = mlp()
    optimizers = halves(model)
    with explaind.trace(model, optimizers, tmp_path / "run.zarr"):
        for rows in BATCHES:
            for optimizer in optimizers:
                model.zero_grad()
                F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
                optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert run.num_steps == 2 * len(BATCHES)
    assert run.verify().bit_exact
    assert run.attribute(query(), by=AXES).check().other < 1e-12


def test_a_backward_pass_between_the_steps_of_a_round_is_refused(tmp_path):
    towers = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)]).double()
    optimizers = [SGD(tower.parameters(), lr=0.1) for tower in towers]
    with (
        pytest.raises(RecordingError, match="a backward pass came between the steps of two optimizers in step 0"),
        explaind.trace(towers, optimizers, tmp_path / "run.zarr") as recorder,
    ):
        recorder.examples(range(9))
        losses = [tower(FEATURES).sum() for tower in towers]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()


def test_a_generator_and_its_critic_are_traced_side_by_side(tmp_path):
    def make():
        torch.manual_seed(3)
        generator = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
        return generator, critic

    generator, critic = make()
    generator_optimizer, critic_optimizer = AdamW(generator.parameters(), lr=0.02), AdamW(critic.parameters(), lr=0.02)
    noise = torch.randn(4, 5, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with (
        explaind.trace(generator, generator_optimizer, tmp_path / "generator.zarr"),
        explaind.trace(critic, critic_optimizer, tmp_path / "critic.zarr"),
    ):
        for z, rows in zip(noise, BATCHES, strict=True):
            critic_optimizer.zero_grad()
            (F.softplus(-critic(FEATURES[rows])).mean() + F.softplus(critic(generator(z).detach())).mean()).backward()
            critic_optimizer.step()
            generator_optimizer.zero_grad()
            F.softplus(-critic(generator(z))).mean().backward()
            generator_optimizer.step()
    for name, model, inputs in zip(("generator", "critic"), make(), (noise[0], FEATURES), strict=True):
        run = explaind.open_run(tmp_path / f"{name}.zarr", model=model)
        assert run.num_steps == len(BATCHES)
        assert run.verify().bit_exact
        result = run.attribute(explaind.Query(inputs[:2], output=explaind.outputs.value()), by=AXES)
        assert result.check().other < 1e-12
