"""Runs with snapshots of some moments only: the others are replayed, and are what they would be if they were stored."""

import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Muon

import explaind
from explaind import moments
from explaind.errors import ReplayWarning, VerificationError
from tests.cases import data, mlp, query
from tests.random_models import MODELS
from tests.test_random_runs import NUM_DRAWS, OPTIMIZERS, drawn, little_directory, loops, recorded
from tests.test_random_runs import query as random_query
from tests.traced import batchnorm_mlp, dropout_mlp, forget_chunks
from tests.unfreezing import frozen_backbone, unfreeze

FEATURES, LABELS = data().tensors
NUM_STEPS = 11


def adamw(model):
    return AdamW(model.parameters(), lr=0.02)


def nothing(model, optimizer, step):
    pass


def train(path, make=mlp, make_optimizer=adamw, *, edit=nothing, between=nothing, num_steps=NUM_STEPS, **options):
    """`edit` runs after the backward pass of each step, `between` before the step begins."""
    torch.manual_seed(7)
    model = make()
    optimizer = make_optimizer(model)
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    dtype = next(model.parameters()).dtype
    with explaind.trace(model, optimizer, path, **options):
        for step in range(num_steps):
            between(model, optimizer, step)
            rows = [(step + k) % len(FEATURES) for k in range(4)]
            for each in optimizers:
                each.zero_grad()
            F.cross_entropy(model(FEATURES[rows].to(dtype)), LABELS[rows]).backward()
            edit(model, optimizer, step)
            for each in optimizers:
                each.step()
    return explaind.open_run(path, model=make())


def both(directory, *args, every=4, **options):
    """The same run with all moments stored and with some of them."""
    whole = train(directory / "whole", *args, **options)
    return whole, train(directory / "some", *args, **options, snapshot_every=every)


def assert_same(one, other, steps=None):
    """All that is known of every moment, bit for bit, read from the last to the first as attributions do."""
    assert one.num_steps == other.num_steps
    for step in reversed(range(one.num_steps + 1) if steps is None else steps):
        assert torch.equal(one.flat_params(step), other.flat_params(step)), step
        ours, theirs = one.state(step), other.state(step)
        assert {n: list(entries) for n, entries in ours.items()} == {n: list(entries) for n, entries in theirs.items()}
        for name, entries in ours.items():
            for key, value in entries.items():
                assert torch.equal(value, theirs[name][key]), (step, name, key)
                assert value.dtype == theirs[name][key].dtype
        if step < one.num_steps:
            assert torch.equal(one.flat_gradient(step), other.flat_gradient(step)), step


def stored(run, name="snapshot_step"):
    """The steps before which moments are stored."""
    length = json.loads((run.path / "commit.json").read_text())["lengths"]
    group = zarr.open_group(run.path, mode="r")
    return group[name][: length[group[name].metadata.dimension_names[0]]].tolist()


def clip_norm(model, optimizer, step):
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clip_value(model, optimizer, step):
    nn.utils.clip_grad_value_(model.parameters(), 0.02)


def momentum(model):
    return SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=0.1)


def muon(model):
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [Muon(matrices, lr=0.02), AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.02)]


def schedule(model, optimizer, step):
    for group in optimizer.param_groups:
        group["lr"] = 0.02 / (1 + step)


def attention():
    torch.manual_seed(3)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(1, 8)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.layer(self.embed(x.unsqueeze(-1))).mean(dim=1))

    return Net()


@pytest.mark.parametrize(
    "make, make_optimizer, options",
    [
        (mlp, adamw, {}),
        (dropout_mlp, adamw, {"edit": clip_norm}),
        (batchnorm_mlp, momentum, {"edit": clip_value}),
        (lambda: mlp().float(), muon, {}),
        (lambda: mlp().bfloat16(), adamw, {}),
        (attention, adamw, {"edit": clip_norm, "between": schedule}),
    ],
    ids=["mlp", "dropout, clipped", "batchnorm, clipped by value", "muon and adamw", "bfloat16", "attention, schedule"],
)
def test_moments_between_snapshots_are_replayed_bit_for_bit(make, make_optimizer, options, tmp_path):
    whole, some = both(tmp_path, make, make_optimizer, **options)
    assert stored(whole) == list(range(NUM_STEPS + 1))
    assert stored(some) == [0, 4, 8, 11]
    assert not (some.path / "gradient").exists()
    assert_same(whole, some)


def test_attributions_do_not_depend_on_the_snapshots(tmp_path):
    every = {"every": 5}
    whole, some = both(tmp_path, dropout_mlp, adamw, edit=clip_norm, **every)
    for axes in (
        ("query", "example", "step", "layer"),
        ("query", "example", "update_step"),
        ("query", "step", "layer"),
    ):
        one, other = (run.attribute(query(), by=axes) for run in (whole, some))
        other.check()
        for name in one.dataset.data_vars:
            np.testing.assert_array_equal(one.dataset[name], other.dataset[name])
    assert some.verify().exact_gradients == whole.verify().exact_gradients == NUM_STEPS


@settings(drawn, max_examples=NUM_DRAWS // 3)
@given(
    name=st.sampled_from(sorted(MODELS)),
    choice=st.one_of(*OPTIMIZERS.values()),
    loop=loops,
    dtype=st.sampled_from([torch.float64, torch.float32]),
    every=st.integers(2, 4),
)
def test_any_run_is_the_same_with_fewer_snapshots(name, choice, loop, dtype, every):
    with little_directory() as one, little_directory() as other, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # gradients with a penalty or noise are stored
        whole, _ = recorded(one, name, choice, loop, dtype)
        some, _ = recorded(other, name, choice, loop, dtype, snapshot_every=every)
        assert_same(whole, some)
        terms = [run.attribute(random_query(name, dtype), by=("query", "example", "step")) for run in (whole, some)]
        np.testing.assert_array_equal(terms[0].dataset.contribution, terms[1].dataset.contribution)


def test_the_state_is_stored_at_some_moments_even_if_the_parameters_are_at_all(tmp_path):
    run = train(tmp_path / "run", num_steps=70)
    assert stored(run, "state_step") == [0, 32, 64, 70]


def test_parameters_that_were_changed_between_steps_are_stored(tmp_path):
    def halve(model, optimizer, step):
        if step == 6:
            with torch.no_grad():
                model[0].weight.mul_(0.5)

    whole, some = both(tmp_path, between=halve)
    assert stored(some) == [0, 4, 6, 8, 11]
    assert_same(whole, some)


def test_state_that_was_changed_between_steps_is_stored(tmp_path):
    def forget(model, optimizer, step):
        if step == 6:
            optimizer.state.clear()

    whole, some = both(tmp_path, between=forget)
    assert 7 in stored(some)  # state is looked at when a step has been made
    assert 7 in stored(whole, "state_step")
    assert_same(whole, some)


def test_parameters_that_come_later(tmp_path):
    def thaw(model, optimizer, step):
        if step == 6:
            unfreeze(model, optimizer, lr=0.01)

    whole, some = both(tmp_path, frozen_backbone, lambda model: AdamW(model[2].parameters(), lr=0.02), between=thaw)
    assert_same(whole, some)


def test_gradients_that_cannot_be_replayed_are_stored(tmp_path):
    def penalty(model, optimizer, step):
        sum(parameter.square().sum() for parameter in model.parameters()).mul(0.1).backward()

    whole = train(tmp_path / "whole", edit=penalty)
    with pytest.warns(UserWarning, match="the gradient of step 0 is not, bit for bit, what the recorded forward calls"):
        some = train(tmp_path / "some", edit=penalty, snapshot_every=4)
    assert stored(some, "gradient_step") == list(range(NUM_STEPS))
    assert_same(whole, some)


def noise_once(model, optimizer, step):
    if step == 6:
        # A gradient that enters by a backward pass of its own, which no recorded call explains.
        (model[2].weight * torch.ones_like(model[2].weight)).sum().backward()


def test_an_edited_gradient_is_stored(tmp_path):
    def edit(model, optimizer, step):
        if step == 6:
            model[2].weight.grad.add_(0.125)

    whole, some = both(tmp_path, edit=edit)
    assert stored(some, "gradient_step") == [6]
    assert_same(whole, some)


def test_a_replay_that_diverges_stops_with_step_and_tensor(tmp_path):
    run = train(tmp_path / "run", edit=noise_once, snapshot_every=4)
    for read, step in ((run.flat_params, 7), (run.state, 7), (run.flat_gradient, 6)):
        with pytest.raises(VerificationError, match=r"after step 6 the parameter '2.weight' differs, for"):
            read(step)
    whole = train(tmp_path / "whole", edit=noise_once)
    assert_same(whole, run, steps=[0, 1, 2, 3, 4, 5, 8, 9, 10, 11])
    assert torch.equal(run.flat_params(6), whole.flat_params(6))


def test_a_digest_that_differs_is_noticed(tmp_path):
    train(tmp_path / "run", snapshot_every=20)
    group = zarr.open_group(tmp_path / "run", mode="r+")
    group["digest"][5, 3] += 1
    forget_chunks(tmp_path / "run")
    with pytest.raises(VerificationError, match=r"after step 4 the parameter '2.bias' differs"):
        explaind.open_run(tmp_path / "run", model=mlp()).flat_params(9)


def elsewhere(monkeypatch, factor):
    """As if the run had been recorded on another machine, where gradients come out a little different."""
    replayed = moments.Moments.replayed_gradient
    monkeypatch.setattr(moments, "machine", lambda: "another one")
    monkeypatch.setattr(moments.Moments, "replayed_gradient", lambda self, step: replayed(self, step) * factor)


def test_on_another_machine_a_replay_may_differ_by_rounding(tmp_path, monkeypatch):
    whole, _ = both(tmp_path, lambda: mlp().float(), momentum)
    elsewhere(monkeypatch, 1 + 2**-22)
    some = explaind.open_run(tmp_path / "some", model=mlp().float())
    with pytest.warns(ReplayWarning, match="recorded on another machine"):
        some.verify()
    for step in reversed(range(NUM_STEPS + 1)):
        torch.testing.assert_close(some.flat_params(step), whole.flat_params(step), rtol=1e-5, atol=1e-6)


def test_on_another_machine_a_replay_may_not_differ_by_more(tmp_path, monkeypatch):
    train(tmp_path / "run", lambda: mlp().float(), momentum, snapshot_every=4)
    elsewhere(monkeypatch, 1.01)
    run = explaind.open_run(tmp_path / "run", model=mlp().float())
    with pytest.raises(VerificationError, match=r"after step 3 the parameter '0.weight' differs by .* of its size"):
        run.flat_gradient(3)


@pytest.mark.parametrize("num_bytes", [1, 3000])
def test_moments_that_do_not_fit_into_memory_are_replayed_again(num_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(moments, "_CACHE_BYTES", num_bytes)
    whole, some = both(tmp_path, dropout_mlp, every=10)
    assert_same(whole, some)


def test_replays_are_made_with_as_many_threads_as_the_loop_had(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        whole, some = both(tmp_path)
    finally:
        torch.set_num_threads(threads)
    assert_same(whole, some)
    assert torch.get_num_threads() == threads


def test_moments_between_snapshots_need_the_model(tmp_path):
    train(tmp_path / "run", snapshot_every=4)
    run = explaind.open_run(tmp_path / "run")
    assert run.flat_params(4).isfinite().all()
    with pytest.raises(ValueError, match="this needs the model"):
        run.flat_params(5)


def test_an_objective_is_replayed_too(tmp_path):
    def losses(model, batch):
        x, y = batch
        return F.cross_entropy(model(x), y, reduction="none") / len(y)

    runs = []
    for every in (1, 4):
        torch.manual_seed(5)
        model = mlp()
        optimizer = adamw(model)
        loader = torch.utils.data.DataLoader(data(), batch_size=4, shuffle=True)
        path = tmp_path / str(every)
        with explaind.trace(model, optimizer, path, objective=losses, snapshot_every=every) as recorder:
            for _ in range(4):
                for batch in recorder.batches(loader):
                    optimizer.zero_grad()
                    losses(model, batch).sum().backward()
                    optimizer.step()
        runs.append(explaind.open_run(path, model=mlp(), objective=losses))
    assert_same(*runs)


class Signs(SGD):
    """An optimizer that torch does not have."""


def test_optimizers_that_cannot_be_replayed_are_refused(tmp_path):
    model = mlp()
    with pytest.raises(
        ValueError, match=r"snapshot_every=4 needs optimizers .* those of torch.optim.*Signs; record it"
    ):
        explaind.trace(model, Signs(model.parameters(), lr=0.1), tmp_path / "run", snapshot_every=4)
    assert not (tmp_path / "run").exists()


def test_the_state_of_unknown_optimizers_is_stored_at_every_moment(tmp_path):
    run = train(tmp_path / "run", make_optimizer=lambda model: Signs(model.parameters(), lr=0.1, momentum=0.9))
    assert stored(run, "state_step") == list(range(NUM_STEPS + 1))


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "10"])
def test_snapshots_come_every_so_many_steps(every, tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match="snapshot_every must be a whole number of steps, at least 1; got"):
        explaind.trace(model, adamw(model), tmp_path / "run", snapshot_every=every)
