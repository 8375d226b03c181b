"""What loops do to the gradient between backward pass and optimizer: split exactly, or told apart as foreign."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW

import explaind
from explaind.errors import NonFiniteError
from tests.cases import data, mlp
from tests.twin import assert_equals_twin, attribute

CLIP = 0.1


def halve_first_layer(model, number):
    for parameter in model[0].parameters():
        parameter.grad *= 0.5


def silence_first_layer(model, number):
    for parameter in model[0].parameters():
        parameter.grad.zero_()


def reverse(model, number):
    for parameter in model.parameters():
        parameter.grad.neg_()


def clip_every_module(model, number):
    for module, bound in ((model[0], 0.05), (model[2], 0.2)):
        nn.utils.clip_grad_norm_(module.parameters(), bound)


def clip_every_parameter(model, number):
    for parameter in model.parameters():
        nn.utils.clip_grad_norm_(parameter, CLIP / 2)


def rates_by_layer(model, number):
    for place, parameter in enumerate(model.parameters()):
        parameter.grad *= 0.9**place


def clip_norm_then_value(model, number):
    nn.utils.clip_grad_norm_(model.parameters(), 5 * CLIP)
    nn.utils.clip_grad_value_(model.parameters(), CLIP / 2)


def clip_value_then_norm(model, number):
    nn.utils.clip_grad_value_(model.parameters(), CLIP)
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)


def clip_values_by_layer(model, number):
    nn.utils.clip_grad_value_(model[0].parameters(), CLIP / 4)
    nn.utils.clip_grad_value_(model[2].parameters(), CLIP)


def clip_all_values(model, number):
    nn.utils.clip_grad_value_(model.parameters(), 1e-9)


def clip_now_and_then(model, number):
    if number % 2:
        nn.utils.clip_grad_value_(model.parameters(), CLIP)


EDITS = [
    lambda model, number: nn.utils.clip_grad_norm_(model.parameters(), CLIP),
    lambda model, number: nn.utils.clip_grad_norm_(model[0].parameters(), CLIP / 2),
    lambda model, number: nn.utils.clip_grad_value_(model.parameters(), CLIP),
    lambda model, number: nn.utils.clip_grad_value_(model.parameters(), CLIP, foreach=False),
    halve_first_layer,
    silence_first_layer,
    reverse,
    clip_every_module,
    clip_every_parameter,
    rates_by_layer,
    clip_norm_then_value,
    clip_value_then_norm,
    clip_values_by_layer,
    clip_all_values,
    clip_now_and_then,
]


def nothing(model, number):
    pass


def train(model, optimizer, edit=nothing, batches=None, accumulate=1, penalty=None):
    """A loop as a user writes it, with something between backward and step."""
    torch.manual_seed(11)
    samples = data()
    loader = torch.utils.data.DataLoader(samples, batch_size=4, shuffle=True)
    number = 0
    for _ in range(2):
        for place, (x, y) in enumerate((batches or iter)(loader)):
            if place % accumulate == 0:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            (loss if penalty is None else loss + penalty(model)).backward()
            if (place + 1) % accumulate == 0:
                edit(model, number)
                optimizer.step()
                number += 1


def record(path, edit=nothing, *, make=None, prepare=nothing, **loop):
    """Train with and without tracing; the weights must be the same bits. Returns the run."""
    make = make or (lambda model: SGD(model.parameters(), lr=0.2, momentum=0.9))
    options = {"example_grads": loop.pop("example_grads", "replayed")}
    alone, traced = mlp(), mlp()
    for model in (alone, traced):
        prepare(model, 0)
    train(alone, make(alone), edit, **loop)
    optimizer = make(traced)
    with explaind.trace(traced, optimizer, path, **options) as recorder:
        train(traced, optimizer, edit, batches=recorder.batches, **loop)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, traced.get_parameter(name))
    return explaind.open_run(path, model=mlp())


def assert_nothing_foreign(run):
    assert float(np.abs(attribute(run).other).max()) < 1e-12
    for step in range(run.num_steps):
        total = {name: grads.sum(dim=0) for name, grads in run.example_grads(step).items()}
        torch.testing.assert_close(run.table.flatten(total), run.flat_gradient(step), rtol=1e-10, atol=1e-14)
    assert run.verify().largest_gradient_difference < 1e-15


# ---------------------------------------------------------------------- clipped and scaled


@pytest.mark.parametrize("edit", EDITS)
def test_rescaling_is_split_exactly(tmp_path, edit):
    run = record(tmp_path / "run", edit)
    assert_nothing_foreign(run)
    assert_equals_twin(run)
    assert run.verify().bit_exact


@pytest.mark.parametrize("make", [Adam, AdamW])
def test_value_clipping_under_adam(tmp_path, make):
    run = record(tmp_path / "run", EDITS[2], make=lambda model: make(model.parameters(), lr=0.05, weight_decay=0.1))
    assert_nothing_foreign(run)
    assert_equals_twin(run)


@pytest.mark.parametrize("edit", [EDITS[2], clip_every_parameter])
def test_stored_and_replayed_gradients_are_rescaled_alike(tmp_path, edit):
    replayed, stored = (record(tmp_path / mode, edit, example_grads=mode) for mode in ("replayed", "stored"))
    np.testing.assert_allclose(attribute(stored).contribution, attribute(replayed).contribution, rtol=1e-9, atol=1e-14)
    assert_nothing_foreign(stored)


def test_accumulation_then_clipping(tmp_path):
    run = record(tmp_path / "run", EDITS[2], accumulate=2)
    assert_nothing_foreign(run)
    assert_equals_twin(run)


def test_clipping_by_tensor_hooks(tmp_path):
    def hooked(model, number):
        for parameter in model.parameters():
            parameter.register_hook(lambda gradient: gradient.clamp(-CLIP, CLIP))

    run = record(tmp_path / "run", prepare=hooked)
    assert_nothing_foreign(run)
    assert_equals_twin(run)


def test_scaling_by_tensor_hooks_with_clipping(tmp_path):
    def hooked(model, number):
        model[0].weight.register_hook(lambda gradient: 0.3 * gradient)

    run = record(tmp_path / "run", clip_norm_then_value, prepare=hooked)
    assert_nothing_foreign(run)
    assert_equals_twin(run)


def test_gradients_put_there_by_hand_and_clipped(tmp_path):
    def loop(model, optimizer):
        samples = data()
        for _ in range(3):
            x, y = samples[:6]
            gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2)
    with explaind.trace(model, optimizer, tmp_path / "run"):
        loop(model, optimizer)
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert_nothing_foreign(run)


# ---------------------------------------------------------------------- what comes from no example


def noise(model, number):
    torch.manual_seed(number)
    for parameter in model.parameters():
        parameter.grad += 0.01 * torch.randn_like(parameter)


def noise_on_one_tensor(model, number):
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    torch.manual_seed(number)
    model[2].bias.grad += 0.01 * torch.randn_like(model[2].bias)


def decay_by_hand(model, number):
    for parameter in model.parameters():
        parameter.grad.add_(parameter.detach(), alpha=0.1)


def one_entry_by_hand(model, number):
    model[0].weight.grad[1, 2] += 0.1


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
@pytest.mark.parametrize("edit", [noise, decay_by_hand, one_entry_by_hand])
def test_foreign_gradients_are_credited_to_no_example(tmp_path, edit):
    run = record(tmp_path / "run", edit)
    for step in range(run.num_steps):
        scale, limit = run.gradient_rescaling(step)
        assert set(scale) == {1.0}
        assert set(limit) == {math.inf}
    assert float(np.abs(attribute(run).other).sum()) > 1e-3
    assert_equals_twin(run)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_noise_on_one_tensor_leaves_the_others_clipped(tmp_path):
    run = record(tmp_path / "run", noise_on_one_tensor)
    other = np.abs(attribute(run).other).sum(["query", "step"])
    assert float(other.sel(parameter="2.bias")) > 1e-4
    assert float(other.drop_sel(parameter="2.bias").max()) < 1e-12
    assert_equals_twin(run)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_penalty_in_the_loss_is_no_rescaling_of_a_model_with_one_direction(tmp_path):
    # From zero, one example moves the weights along its own gradient only, and so does a penalty on them.
    def loop(model, optimizer):
        for _ in range(4):
            optimizer.zero_grad()
            error = model(torch.tensor([[1.0, 2.0, 3.0]]).double()) - 1
            (error.square().sum() + model.weight.square().sum()).backward()
            optimizer.step()

    model = nn.Linear(3, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    optimizer = SGD(model.parameters(), lr=0.01)
    with explaind.trace(model, optimizer, tmp_path / "run"):
        loop(model, optimizer)
    run = explaind.open_run(tmp_path / "run", model=nn.Linear(3, 1, bias=False).double())
    assert all(run.gradient_rescaling(step) == ([1.0], [math.inf]) for step in range(4))
    result = run.attribute(explaind.Query(torch.ones(1, 3).double(), output=explaind.outputs.value()), by=("query",))
    result.check()
    assert float(np.abs(result.dataset.other).max()) > 1e-3


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_penalty_in_the_loss_and_clipping(tmp_path):
    run = record(
        tmp_path / "run", EDITS[0], penalty=lambda model: 0.1 * sum(p.square().sum() for p in model.parameters())
    )
    assert float(np.abs(attribute(run).other).sum()) > 1e-3
    assert_equals_twin(run)


def test_replaced_infinite_gradients_are_refused(tmp_path):
    def loop(model, optimizer):
        x, y = data()[:4]
        (F.cross_entropy(model(x), y) * math.inf).backward()
        for parameter in model.parameters():
            parameter.grad.nan_to_num_(0.0, 1.0, -1.0)
        optimizer.step()

    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.2)
    with (
        pytest.raises(NonFiniteError, match=r"'0\.weight' NaN or infinite entries at step 0, which the loop"),
        explaind.trace(model, optimizer, tmp_path / "run"),
    ):
        loop(model, optimizer)
