"""A loop that unfreezes the first layer on the way, and hands it to the optimizer."""

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

import explaind
from explaind.errors import RecordingError
from tests.cases import data, mlp
from tests.twin import assert_exact


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
