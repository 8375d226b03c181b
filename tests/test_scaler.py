"""Loss scaling with `torch.amp.GradScaler`: unscaled by hand or not, with overflows, and by fused optimizers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

import explaind
from tests.cases import data, mlp
from tests.twin import assert_exact, attribute

START = 1024.0


def train(model, optimizer, scaler, batches=iter, *, clip=None, overflow_at=(), accumulate=1):
    """A loop as a user writes it; returns the loss scale after every step."""
    torch.manual_seed(11)
    loader = torch.utils.data.DataLoader(data(next(model.parameters()).dtype), batch_size=3, shuffle=True)
    scales = []
    for _ in range(2):
        for number, (x, y) in enumerate(batches(loader)):
            if len(scales) % accumulate == 0:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y) * (math.inf if number in overflow_at else 1.0)
            scaler.scale(loss).backward()
            if (number + 1) % accumulate == 0:
                if clip is not None:
                    scaler.unscale_(optimizer)
                    clip(model.parameters())
                scaler.step(optimizer)
                scaler.update()
            scales.append(scaler.get_scale())
    return scales


def record(path, make, *, dtype=torch.float64, example_grads="replayed", **loop):
    """Train with and without tracing: weights, state and loss scales must be the same bits."""
    alone, traced = mlp(dtype=dtype), mlp(dtype=dtype)
    optimizers = make(alone.parameters()), make(traced.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=START, growth_interval=2) for _ in range(2)]
    expected = train(alone, optimizers[0], scalers[0], **loop)
    with explaind.trace(traced, optimizers[1], path, example_grads=example_grads) as recorder:
        assert train(traced, optimizers[1], scalers[1], recorder.batches, **loop) == expected
    for one, other in zip(alone.parameters(), traced.parameters(), strict=True):
        assert torch.equal(one, other)
        states = [optimizer.state[tensor] for optimizer, tensor in zip(optimizers, (one, other), strict=True)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            np.testing.assert_array_equal(value, states[1][key])
    assert scalers[0].state_dict() == scalers[1].state_dict()
    return explaind.open_run(path, model=mlp(dtype=dtype))


def by_norm(parameters):
    nn.utils.clip_grad_norm_(parameters, 0.1)


def by_value(parameters):
    nn.utils.clip_grad_value_(parameters, 0.1)


@pytest.mark.parametrize("clip", [None, by_norm, by_value])
@pytest.mark.parametrize("make", [lambda p: SGD(p, lr=0.2, momentum=0.9), lambda p: AdamW(p, lr=0.05)])
def test_loss_scaling_is_undone(tmp_path, make, clip):
    run = record(tmp_path / "run", make, clip=clip)
    assert run.num_steps == 6
    assert_exact(run)
    if clip is None:
        scales = [run.gradient_rescaling(step)[0] for step in range(6)]
        assert scales == [[1 / START / 2 ** (step // 2)] * 4 for step in range(6)]


def test_gradients_are_accumulated_before_they_are_unscaled(tmp_path):
    run = record(tmp_path / "run", lambda p: SGD(p, lr=0.2), clip=by_norm, accumulate=3)
    assert run.num_steps == 2
    assert len(run.calls(0)) == 3
    assert_exact(run)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [None, by_norm])
@pytest.mark.parametrize("overflow_at", [[0], [1], [2], [0, 1]])
def test_a_step_that_overflowed_is_no_step(tmp_path, overflow_at, clip, fused):
    run = record(tmp_path / "run", lambda p: AdamW(p, lr=0.05, fused=fused), clip=clip, overflow_at=overflow_at)
    assert run.num_steps == 2 * (3 - len(overflow_at))
    assert all(len(run.calls(step)) == 1 for step in range(run.num_steps))
    assert_exact(run)


def test_all_steps_overflow_at_first(tmp_path):
    run = record(tmp_path / "run", lambda p: SGD(p, lr=0.2), overflow_at=[0, 1])
    assert run.num_steps == 2
    assert_exact(run)


@pytest.mark.parametrize("example_grads", ["replayed", "stored"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: SGD(p, lr=0.2, momentum=0.9, fused=True),
        lambda p: Adam(p, lr=0.05, fused=True),
        lambda p: AdamW(p, lr=0.05, fused=True, amsgrad=True),
    ],
)
@pytest.mark.parametrize("clip", [None, by_norm])
def test_fused_optimizers_unscale_within_their_step(tmp_path, make, clip, example_grads):
    run = record(tmp_path / "run", make, clip=clip, example_grads=example_grads)
    assert_exact(run)
    for step in range(run.num_steps):
        assert float(run.flat_gradient(step).norm()) < 10  # that of the scaled loss would be a thousand times this


def test_a_fused_optimizer_without_a_twin(tmp_path):
    run = record(tmp_path / "run", lambda p: Adagrad(p, lr=0.05, fused=True))
    assert float(np.abs(attribute(run).other).max()) < 1e-12


def test_single_precision(tmp_path):
    run = record(tmp_path / "run", lambda p: SGD(p, lr=0.2, fused=True), dtype=torch.float32, overflow_at=[1])
    assert run.num_steps == 4
    assert float(np.abs(attribute(run).other).max()) == 0.0
    assert run.verify().bit_exact


def test_a_scaler_that_is_switched_off(tmp_path):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2)
    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        train(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), recorder.batches)
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert run.gradient_rescaling(0) == ([1.0] * 4, [math.inf] * 4)
    assert_exact(run)
