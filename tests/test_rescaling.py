"""What loops do to the gradient between backward pass and optimizer: split exactly, or told apart as foreign."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW

import explaind
from explaind import quadrature, reference
from explaind.errors import NonFiniteError
from explaind.parameters import ParameterTable
from explaind.recording.gradients import Arrivals
from explaind.rescaling import Rescaling, find_rescaling
from tests.cases import data, mlp, query

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


def attribute(run, step_axis="step"):
    result = run.attribute(
        query(), by=("query", "example", step_axis, "parameter"), quadrature=quadrature.gauss_legendre(6)
    )
    assert result.check().error < 1e-9
    return result


def assert_equals_twin(run):
    """Contributions by both step axes, single examples' gradients, and the replay."""
    expected = reference.decompose(run, query())
    for axis, left_out in (("step", "update_step"), ("update_step", "step")):
        actual = attribute(run, axis).dataset.contribution
        summed = expected.contribution.sum([left_out, "token"]).transpose(*actual.dims)
        np.testing.assert_allclose(actual, summed, rtol=1e-7, atol=1e-9 * float(np.abs(summed).max()))


def assert_nothing_foreign(run):
    assert float(np.abs(attribute(run).dataset.other).max()) < 1e-12
    for step in range(run.num_steps):
        total = {name: grads.sum(dim=0) for name, grads in run.example_grads(step).items()}
        torch.testing.assert_close(run.table.flatten(total), run.flat_gradient(step), rtol=1e-10, atol=1e-14)
    assert run.verify().largest_gradient_difference < 1e-15


# ---------------------------------------------------------------------- whole loops


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
    np.testing.assert_allclose(
        attribute(stored).dataset.contribution, attribute(replayed).dataset.contribution, rtol=1e-9, atol=1e-14
    )
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
    assert float(np.abs(attribute(run).dataset.other).sum()) > 1e-3
    assert_equals_twin(run)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_noise_on_one_tensor_leaves_the_others_clipped(tmp_path):
    run = record(tmp_path / "run", noise_on_one_tensor)
    other = np.abs(attribute(run).dataset.other).sum(["query", "step"])
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
    assert float(np.abs(attribute(run).dataset.other).sum()) > 1e-3
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


# ---------------------------------------------------------------------- one pair of gradients


def pair(before, now, limits=()):
    """What is found for tensors `{name: [g, G]}` of one parameter each."""
    tensors = {name: torch.tensor(entries, dtype=torch.float64) for name, entries in before.items()}
    table = ParameterTable.of(tensors, dict.fromkeys(tensors, 0))
    after = table.flatten({name: torch.tensor(entries, dtype=torch.float64) for name, entries in now.items()})
    return find_rescaling(table, table.flatten(tensors), after, limits=limits)


def test_entries_of_one_size_take_only_what_others_bear_out():
    mirrored = [2.0, -2.0]
    assert pair({"bias": mirrored}, {"bias": [1.0, -1.0]}) == {"bias": (1.0, math.inf)}
    both = pair({"bias": mirrored, "weight": [1.0, 3.0]}, {"bias": [1.0, -1.0], "weight": [0.5, 1.5]})
    assert both == {"bias": (0.5, math.inf), "weight": (0.5, math.inf)}
    assert pair({"bias": mirrored}, {"bias": [1.0, -1.0]}, limits=[1.0]) == {"bias": (1.0, 1.0)}


def test_a_single_entry_takes_only_what_others_bear_out():
    found = pair({"a": [2.0], "b": [4.0, 1.0]}, {"a": [1.5], "b": [2.0, 0.5]})
    assert found == {"a": (1.0, math.inf), "b": (0.5, math.inf)}


def test_zero_gradients():
    assert pair({"a": [0.0, 0.0]}, {"a": [0.0, 0.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [0.0, 0.0]}, {"a": [1.0, 2.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [1.0]}, {"a": [0.0]}) == {"a": (0.0, math.inf)}
    assert pair({"a": [0.0, 1.0, 3.0]}, {"a": [0.0, 2.0, 6.0]}) == {"a": (2.0, math.inf)}


def test_one_clipped_entry_counts_beside_others_that_were_left_alone():
    assert pair({"a": [1.0, -0.5, 3.0]}, {"a": [1.0, -0.5, 2.0]}) == {"a": (1.0, 2.0)}
    assert pair({"a": [1.0, 0.0, 3.0]}, {"a": [1.0, 0.0, 2.0]}) == {"a": (1.0, math.inf)}


def test_entries_that_grew_or_turned_are_not_clipped():
    assert pair({"a": [1.0, -0.5, 3.0]}, {"a": [1.0, -0.5, -2.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [1.0, -0.5, 1.5]}, {"a": [1.0, -0.5, 2.0]}) == {"a": (1.0, math.inf)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_coarse_types_need_more_entries(dtype):
    torch.manual_seed(0)
    for count in range(2, 12):
        before = (1 + torch.rand(count)).to(dtype)
        now = before * torch.tensor(0.3, dtype=dtype)
        table = ParameterTable.of({"a": before}, {"a": 0})
        ((scale, limit),) = find_rescaling(table, before, now).values()
        assert limit == math.inf
        assert scale == pytest.approx(0.3, rel=0.01) or scale == 1.0
        enough = {torch.float64: 2, torch.float32: 2, torch.bfloat16: 10, torch.float16: 5}[dtype]
        assert (scale != 1.0) == (count >= enough)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_told_from_rounding(dtype):
    torch.manual_seed(0)
    for _ in range(200):
        tensors = {name: torch.randn(count).to(dtype) for name, count in (("a", 2), ("b", 3), ("c", 6), ("d", 20))}
        table = ParameterTable.of(tensors, dict.fromkeys(tensors, 0))
        now = {name: 0.5 * tensor + 0.1 * torch.randn(len(tensor)).to(dtype) for name, tensor in tensors.items()}
        found = find_rescaling(table, table.flatten(tensors), table.flatten(now))
        assert set(found.values()) == {(1.0, math.inf)}


def test_the_factor_gives_what_the_rescaling_gives():
    rescaling = Rescaling(scale=torch.tensor([-0.5, 2.0, 1.0, 0.0]), limit=torch.tensor([1.0, 1.0, math.inf, math.inf]))
    gradient = torch.tensor([4.0, 0.0, -3.0, 5.0])
    torch.testing.assert_close(rescaling.factor(gradient) * gradient, rescaling.apply(gradient).double())
    assert rescaling.factor(gradient)[1] == 2.0


def watched(**values):
    """Parameters whose gradients' arrivals are noted, and what gives their rescaling."""
    tracked = {name: nn.Parameter(torch.tensor(value, dtype=torch.float64)) for name, value in values.items()}
    table = ParameterTable.of(tracked, dict.fromkeys(tracked, 0))
    arrivals = Arrivals(tracked, table)
    passes = {}

    def arrive(name):
        task = torch._C._current_graph_task_id()
        if task not in passes:
            passes[task] = set()
            arrivals.expect(passes[task])
        passes[task].add(name)

    for name, parameter in tracked.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrive(name))

    def rescaling():
        gradients = {name: parameter.grad for name, parameter in tracked.items()}
        return arrivals.rescaling(gradients, table.flatten(gradients), 0)

    return tracked, arrivals, rescaling


UNTOUCHED = (1.0, math.inf)


def test_arrivals_are_kept_until_they_are_used():
    tracked, arrivals, rescaling = watched(a=[0.0, 0.0])
    (tracked["a"] * torch.tensor([1.0, 2.0])).sum().backward()
    tracked["a"].grad *= 0.25
    assert rescaling() == {"a": (0.25, math.inf)}
    arrivals.forget(["a"])
    assert all(map(math.isnan, rescaling()["a"]))


def test_an_arrival_counts_as_the_last_pass_left_it():
    tracked, _, rescaling = watched(a=[3.0, 5.0], b=[2.0, 7.0])
    a, b = tracked.values()
    (a.square() * b).sum().backward()
    assert rescaling() == {"a": UNTOUCHED, "b": UNTOUCHED}
    a.grad *= 0.5
    b.grad *= 0.5
    (b**3).sum().backward()
    assert rescaling() == {"a": (0.5, math.inf), "b": UNTOUCHED}


def test_a_pass_that_an_error_stopped_leaves_gradients_that_nobody_saw():
    tracked, arrivals, rescaling = watched(a=[3.0, 5.0], b=[2.0, 7.0])
    a, b = tracked.values()
    (a * b).sum().backward()

    def stop(grad):
        raise ZeroDivisionError

    middle = b * 1.0
    middle.register_hook(stop)
    with pytest.raises(ZeroDivisionError):
        (a.square().sum() + middle.square().sum()).backward()
    found = rescaling()
    assert found["b"] == UNTOUCHED
    assert all(map(math.isnan, found["a"]))
    arrivals.forget(["a", "b"])
    a.grad = b.grad = None
    (a * b).sum().backward()
    assert rescaling() == {"a": UNTOUCHED, "b": UNTOUCHED}
