"""A loop that is left by an error keeps every finished step."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

import explaind
from explaind.errors import RecordingError
from tests.cases import mlp, one_group, query
from tests.traced import FEATURES, LABELS, momentum_sgd, recorded, same, step_on


@pytest.mark.parametrize("when", ["before backward", "before step", "after step"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_loop_leaves_every_finished_step(error, when, tmp_path):
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(error), explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for start in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3])
            if start == 3 and when == "before backward":
                raise error
            loss.backward()
            if start == 3 and when == "before step":
                raise error
            optimizer.step()
            if start == 3 and when == "after step":
                raise error
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert run.complete
    assert run.num_steps == (4 if when == "after step" else 3)
    assert same(run.params(run.num_steps), {name: p.detach() for name, p in model.named_parameters()})
    assert run.verify().bit_exact
    run.attribute(query(), by=("query", "example", "step", "layer")).check()


def test_an_interrupt_within_the_optimizer_drops_only_that_step(tmp_path):
    class Torn(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})
            self.calls = 0

        @torch.no_grad()
        def step(self, closure=None):
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=0.1)
                if self.calls == 2:
                    raise KeyboardInterrupt
            self.calls += 1

    model = mlp()
    optimizer = Torn(model.parameters())
    with pytest.raises(KeyboardInterrupt), explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        while True:
            step_on(model, optimizer, slice(0, 3))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert run.num_steps == 2
    run.attribute(query(), by=("query", "step", "layer")).check()


def test_a_caught_recording_error_does_not_shift_the_later_steps(tmp_path):
    """A loop may skip a step that failed, as many do when out of memory."""

    def body(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        stale = F.cross_entropy(model(FEATURES[3:6]), LABELS[3:6])
        step_on(model, optimizer, slice(0, 3))
        optimizer.zero_grad()
        stale.backward()
        with pytest.raises(RecordingError):
            optimizer.step()
        try:
            step_on(model, optimizer, slice(3, 6))
            step_on(model, optimizer, slice(6, 9))
        except RecordingError as error:  # to refuse to go on is fine as well
            assert "cannot go on" in str(error)

    run, _ = recorded(
        tmp_path / "run.zarr",
        body,
        make=lambda: nn.Linear(3, 3).double(),
        optimizer=one_group(SGD, lr=0.2),
    )
    assert run.num_steps >= 2
    assert run.verify().bit_exact
