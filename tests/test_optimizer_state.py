"""State and settings of optimizers are read back as they were, or named where they cannot be."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import explaind
from explaind.errors import RecordingError
from tests.cases import mlp, one_group, query
from tests.traced import recorded, three_steps


def record_steps(model, optimizer, path, losses):
    with explaind.trace(model, optimizer, path):
        for loss in losses:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return explaind.open_run(path, model=model)


class Scaled(nn.Module):
    """A temperature that may get a gradient before the weights do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def forward(self, x):
        return self.scale * x @ (self.weight.detach() if self.training else self.weight)


def test_state_that_begins_on_a_parameter_without_axes_is_kept_apart(tmp_path):
    model = Scaled()
    optimizer = Adam(model.parameters(), lr=0.1, amsgrad=True)

    def loss(training):
        return lambda m: m.train(training)(torch.ones(4, 3, dtype=torch.float64)).square().mean()

    run = record_steps(model, optimizer, tmp_path / "run.zarr", [loss(True), loss(True), loss(False), loss(False)])
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(run.state(4)[name][key], value)
            assert run.state(4)[name][key].dtype == value.dtype
    assert set(run.state(2)) == {"scale", "weight"}
    assert set(run.state(2)["scale"]) == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    assert run.state(2)["weight"] == {}
    assert run.verify().bit_exact
    x = torch.ones(2, 3, dtype=torch.float64)
    result = run.attribute(explaind.Query(x, output=explaind.outputs.value(0)), by=("query", "step"))
    result.check()
    assert float(np.abs(result.dataset.other).sum()) < 1e-14


class Odd(SGD):
    """Keeps all kinds of state."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.register_step_post_hook(Odd.keep)

    def keep(self, *_):
        for group in self.param_groups:
            for place, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1
                state["rate"] = 0.1 * state["count"]
                state["double"] = torch.full((2, 3), 0.1 * state["count"], dtype=torch.float64)
                state["whole"] = torch.full_like(parameter, 2**24 + state["count"], dtype=torch.int64)
                state["growing"] = torch.zeros(state["count"])
                state["mixed"] = torch.tensor(0.25) if place else torch.full_like(parameter, 0.5)
                state["late"] = torch.ones(3, 2) if state["count"] > 1 else None


def test_state_of_every_kind_is_read_back_as_it_was(tmp_path):
    model = mlp(dtype=torch.float32)
    optimizer = Odd(model.parameters(), lr=0.1)
    run = record_steps(model, optimizer, tmp_path / "run.zarr", [lambda m: m(torch.ones(2, 3)).sum()] * 3)
    assert run.unrecorded_state == ["growing"]
    for name, parameter in model.named_parameters():
        read = run.state(3)[name]
        assert set(read) == set(optimizer.state[parameter]) - {"growing"}
        for key, value in read.items():
            expected = optimizer.state[parameter][key]
            assert torch.equal(value, torch.as_tensor(expected, dtype=value.dtype))
            assert not isinstance(expected, torch.Tensor) or value.dtype == expected.dtype
    assert "late" not in run.state(1)["0.weight"]
    assert run.state(0)["0.weight"] == {}


def test_settings_that_are_not_numbers_may_not_change(tmp_path):
    for key, value in {"foreach": True, "lr": torch.tensor(0.1), "nesterov": None}.items():
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)

        def loss(m, optimizer=optimizer, key=key, value=value):
            optimizer.param_groups[0][key] = value
            return m(torch.ones(2, 3, dtype=torch.float64)).sum()

        with pytest.raises(RecordingError, match=f"setting '{key}' of parameter group 0 was .* and is .* now"):
            record_steps(model, optimizer, tmp_path / f"{key}.zarr", [loss])


class WithHistory(SGD):
    """Keeps what no array can hold."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [parameter.detach().clone()]


def test_state_that_is_not_recorded_is_named_and_not_replayed(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(WithHistory, lr=0.01))
    assert run.unrecorded_state == ["history"]
    assert run.verify().exact_updates is None
    run.attribute(query(), by=("query", "step", "layer")).check()
