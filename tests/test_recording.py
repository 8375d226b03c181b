"""The recorder: changes nothing, and writes down exactly what the loop did."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

import explaind
from explaind import reference
from explaind.errors import RecordingError, UnknownUpdateRuleError
from tests.cases import CASES, NUM_EXAMPLES, Case, data, mlp, one_group, query, record, train

FEATURES, LABELS = data().tensors
BY_NAME = {case.name: case for case in CASES}


def dropout_mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def batchnorm_mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()


def linear(bias=True):
    torch.manual_seed(3)
    return nn.Linear(3, 1, bias=bias).double()


def make_sgd(model):
    return SGD(model.parameters(), lr=0.2, momentum=0.9)


def step_on(model, optimizer, rows):
    """One ordinary training step on some rows of the data."""
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
    optimizer.step()


def recorded(path, body, *, make=mlp, optimizer=make_sgd, **options):
    """Trace `body(model, optimizer, recorder)` and open the run; returns it with the trained model."""
    model = make()
    made = optimizer(model)
    with explaind.trace(model, made, path, **options) as recorder:
        body(model, made, recorder)
    return explaind.open_run(path, model=make()), model


def three_steps(model, optimizer, recorder):
    for start in (0, 3, 6):
        step_on(model, optimizer, slice(start, start + 3))


def same(one, other):
    """Deep equality of state dicts, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


# ---------------------------------------------------------------------- inert


def trained(case, make, path, *, naming, **options):
    """Weights, optimizer state, last gradients and generator state after training."""
    model = make()
    optimizer = case.optimizer(model)
    if naming is None:
        train(case, model, None, optimizer)
    else:
        with explaind.trace(model, optimizer, path, **options) as recorder:
            train(case, model, recorder if naming == "batches" else None, optimizer)
    gradients = [parameter.grad for parameter in model.parameters()]
    return model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state(), model.training


@pytest.mark.parametrize("naming", ["batches", "bare"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_bit_identical_with_and_without_the_recorder(case, naming, tmp_path):
    plain = trained(case, mlp, None, naming=None)
    traced = trained(case, mlp, tmp_path / "run.zarr", naming=naming)
    assert same(plain, traced)


@pytest.mark.parametrize("naming", ["batches", "bare"])
@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_training_with_dropout_or_batchnorm_is_bit_identical(make, naming, tmp_path):
    case = Case(name="random", optimizer=one_group(AdamW, lr=0.05), batch_size=3)
    assert same(trained(case, make, None, naming=None), trained(case, make, tmp_path / "run.zarr", naming=naming))


def test_storing_example_gradients_is_inert_too(tmp_path):
    case = BY_NAME["sgd-accumulation"]
    plain = trained(case, mlp, None, naming=None)
    traced = trained(case, mlp, tmp_path / "run.zarr", naming="batches", example_grads="stored")
    assert same(plain, traced)


def hooks(model, optimizer):
    found = [*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()]
    for module in model.modules():
        found += [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for parameter in model.parameters():
        found += list((parameter._post_accumulate_grad_hooks or {}).values())
    return found


@pytest.mark.parametrize("error", [None, ValueError])
def test_no_hook_is_left_behind(error, tmp_path):
    model = mlp()
    optimizer = make_sgd(model)
    try:
        with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
            assert hooks(model, optimizer)
            step_on(model, optimizer, slice(0, 3))
            if error:
                raise error
    except ValueError:
        pass
    assert hooks(model, optimizer) == []
    step_on(model, optimizer, slice(3, 6))
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 1


# ---------------------------------------------------------------------- naming examples


class Fetched(Dataset):
    """A map-style data set that fetches whole batches, and only those."""

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        raise AssertionError("a batch is fetched at once")

    def __getitems__(self, indices):
        return [(FEATURES[i], LABELS[i]) for i in indices]


class Backwards(torch.utils.data.Sampler):
    def __iter__(self):
        return iter(range(NUM_EXAMPLES - 1, -1, -1))

    def __len__(self):
        return NUM_EXAMPLES


def as_dict(samples):
    return {"x": torch.stack([x for x, _ in samples]), "y": torch.stack([y for _, y in samples])}


def seeded():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "sequential": lambda: DataLoader(data(), batch_size=4),
    "shuffle": lambda: DataLoader(data(), batch_size=4, shuffle=True),
    "drop_last": lambda: DataLoader(data(), batch_size=4, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(data(), batch_size=4, shuffle=True, generator=seeded()),
    "sampler": lambda: DataLoader(data(), batch_size=4, sampler=Backwards()),
    "batch_sampler": lambda: DataLoader(
        data(), batch_sampler=BatchSampler(RandomSampler(data(), replacement=True), 2, drop_last=False)
    ),
    "workers": lambda: DataLoader(data(), batch_size=4, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        data(), batch_size=4, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "one item, no batching": lambda: DataLoader(data(), batch_size=None, shuffle=True),
    "batched by the sampler": lambda: DataLoader(
        data(), batch_size=None, sampler=BatchSampler(SequentialSampler(data()), 4, drop_last=False)
    ),
    "getitems": lambda: DataLoader(Fetched(), batch_size=4, shuffle=True),
    "collate": lambda: DataLoader(data(), batch_size=4, shuffle=True, collate_fn=as_dict),
}


@pytest.mark.parametrize("make_loader", LOADERS.values(), ids=LOADERS.keys())
def test_batches_are_the_loaders_own_with_the_right_indices(make_loader, tmp_path):
    torch.manual_seed(1)
    loader = make_loader()
    expected = [*loader, *loader]
    seen = []

    def body(model, optimizer, recorder):
        torch.manual_seed(1)
        loader = make_loader()
        for batch in itertools.chain(recorder.batches(loader), recorder.batches(loader)):
            seen.append(batch)
            x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
            optimizer.zero_grad()
            F.cross_entropy(model(x.reshape(-1, 3)), y.reshape(-1)).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert len(seen) == run.num_steps == len(expected)
    assert all(type(a) is type(b) and same(a, b) for a, b in zip(seen, expected, strict=True))
    for step in range(run.num_steps):
        (call,) = run.calls(step)
        assert torch.equal(call.inputs["0"], FEATURES[call.examples])


class Shifted(Dataset):
    """A data set that each worker sets up for itself, as those that open files do."""

    offset = 0.0

    def __len__(self):
        return NUM_EXAMPLES

    def __getitem__(self, index):
        return FEATURES[index] + self.offset


def set_up_worker(number):
    torch.utils.data.get_worker_info().dataset.offset = 1.0


def test_workers_see_the_data_set_itself(tmp_path):
    model = mlp()
    loader = DataLoader(Shifted(), batch_size=4, num_workers=1, worker_init_fn=set_up_worker)
    with explaind.trace(model, make_sgd(model), tmp_path / "run.zarr") as recorder:
        seen = list(recorder.batches(loader))
    assert same(seen, list(loader))


def test_leaving_a_loader_early_ends_its_names(tmp_path):
    def body(model, optimizer, recorder):
        for x, y in recorder.batches(DataLoader(data(), batch_size=4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            break
        step_on(model, optimizer, slice(4, 8))

    with pytest.raises(RecordingError, match="not named"):
        recorded(tmp_path / "run.zarr", body)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_examples_are_named_by_hand(kind, tmp_path):
    def body(model, optimizer, recorder):
        for ids in ([70, 10, -3], [10, 500, 70]):
            recorder.examples(kind(ids))
            step_on(model, optimizer, slice(0, 3))

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.examples.tolist() == [-3, 10, 70, 500]
    assert run.call_examples(1).tolist() == [10, 500, 70]


def test_equal_rows_are_one_example_and_stored_once(tmp_path):
    rows = torch.tensor([4, 2, 4, 4])

    def body(model, optimizer, recorder):
        step_on(model, optimizer, rows)
        step_on(model, optimizer, torch.tensor([2, 7]))

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.call_examples(0).tolist() == [0, 1, 0, 0]
    assert run.call_examples(1).tolist() == [1, 2]
    assert run.examples.tolist() == [0, 1, 2]
    kept = zarr.open_group(tmp_path / "run.zarr", mode="r")["inputs/0"][:]
    np.testing.assert_array_equal(kept, FEATURES[[4, 2, 7]])
    assert torch.equal(run.calls(0)[0].inputs["0"], FEATURES[rows])


def test_named_examples_with_equal_inputs_stay_apart_but_are_stored_once(tmp_path):
    def body(model, optimizer, recorder):
        recorder.examples([5, 6, 7])
        step_on(model, optimizer, torch.tensor([1, 1, 1]))

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.examples.tolist() == [5, 6, 7]
    assert zarr.open_group(tmp_path / "run.zarr", mode="r")["inputs/0"].shape == (1, 3)


def test_wide_rows_are_told_apart_too(tmp_path):
    wide = torch.zeros(3, 40, dtype=torch.float64)
    wide[1, -1] = 1.0

    def body(model, optimizer, recorder):
        model(wide).square().sum().backward()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body, make=lambda: nn.Linear(40, 2).double())
    assert run.call_examples(0).tolist() == [0, 1, 0]


def test_without_a_path_runs_are_numbered_under_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        model = mlp()
        optimizer = make_sgd(model)
        with explaind.trace(model, optimizer):
            step_on(model, optimizer, slice(0, 3))
        assert explaind.open_run(f"storage/run-{number}.zarr").num_steps == 1
    assert sorted(path.name for path in (tmp_path / "storage").iterdir()) == ["run-1.zarr", "run-2.zarr"]


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", ["sgd-two-groups-schedule", "adam-amsgrad", "adamw-schedule", "sgd-nesterov"])
def test_parameters_state_and_settings_are_those_of_the_loop(name, tmp_path):
    case = BY_NAME[name]
    model = mlp()
    optimizer = case.optimizer(model)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.5)
    names = dict(model.named_parameters())

    def look():
        params = {name: p.detach().clone() for name, p in names.items()}
        state = {
            name: {key: torch.as_tensor(value).clone() for key, value in optimizer.state[p].items()}
            for name, p in names.items()
            if p in optimizer.state
        }
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        return params, state, settings

    before, gradients = [], []
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for start in (0, 2, 4, 6, 1):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            before.append(look())
            gradients.append({name: p.grad.clone() for name, p in names.items()})
            optimizer.step()
            scheduler.step()
        last = look()
    run = explaind.open_run(tmp_path / "run.zarr")
    assert run.num_steps == 5
    assert run.complete
    for step, (params, state, settings) in enumerate([*before, last]):
        assert same(run.params(step), params)
        for name, entries in state.items():
            for key, value in entries.items():
                assert torch.equal(run.state(step)[name][key], value), (step, name, key)
        if step < 5:
            assert same(run.table.unflatten(run.flat_gradient(step)), gradients[step])
            update = {key: before_after - params[key] for key, before_after in run.params(step + 1).items()}
            assert same(run.update(step), update)
            for group, values in enumerate(settings):
                got = run.settings(step, group)
                assert {key: got[key] for key in values} == values


@pytest.mark.parametrize("as_keyword", [True, False], ids=["keyword", "positional"])
@pytest.mark.parametrize("make_optimizer", [make_sgd, one_group(Adam, lr=0.1)], ids=["sgd", "adam"])
def test_a_closure_gives_the_same_record_as_the_plain_loop(make_optimizer, as_keyword, tmp_path):
    losses = []

    def with_closure(model, optimizer, recorder):
        for start in (0, 3, 6):
            rows = slice(start, start + 3)

            def closure(rows=rows):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
                loss.backward()
                return loss

            returned = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
            losses.append(returned.item())

    run, model = recorded(tmp_path / "closure.zarr", with_closure, optimizer=make_optimizer)
    plain, plain_model = recorded(tmp_path / "plain.zarr", three_steps, optimizer=make_optimizer)
    assert same(model.state_dict(), plain_model.state_dict())
    assert run.num_steps == plain.num_steps == 3
    for step in range(3):
        assert torch.equal(run.flat_gradient(step), plain.flat_gradient(step))
        assert torch.equal(run.calls(step)[0].output_grad, plain.calls(step)[0].output_grad)
    assert run.history.loss.tolist() == losses
    assert run.verify().bit_exact


def test_logging_the_loss_of_a_graph_does_not_warn(tmp_path):
    def body(model, optimizer, recorder):
        recorder.log(loss=F.cross_entropy(model(FEATURES[:3]), LABELS[:3]))

    torch.set_warn_always(True)
    try:
        model = mlp()
        with explaind.trace(model, make_sgd(model), tmp_path / "run.zarr") as recorder:
            body(model, None, recorder)
    finally:
        torch.set_warn_always(False)


def test_the_history_is_the_loops(tmp_path):
    losses = []

    def body(model, optimizer, recorder):
        scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
            losses.append(loss.item())
            recorder.log(loss=loss)
            loss.backward()
            optimizer.step()
            scheduler.step()
        step_on(model, optimizer, slice(0, 2))

    run, _ = recorded(tmp_path / "run.zarr", body)
    history = run.history
    assert list(history.columns) == [
        "loss", "lr", "num_rows", "gradient_norm", "update_norm", "parameter_norm"
    ]  # fmt: skip
    assert history.index.name == "step"
    assert history.loss.tolist()[:2] == losses
    assert math.isnan(history.loss[2])
    np.testing.assert_allclose(history.lr, [0.2, 0.1, 0.05])
    assert history.num_rows.tolist() == [4, 5, 2]
    np.testing.assert_allclose(history.gradient_norm, [run.flat_gradient(s).norm() for s in range(3)])
    np.testing.assert_allclose(history.update_norm[0], 0.2 * history.gradient_norm[0])
    start = torch.cat([p.detach().reshape(-1) for p in mlp().parameters()])
    np.testing.assert_allclose(history.parameter_norm[0], start.norm())


@pytest.mark.parametrize("name", ["sgd-accumulation", "adamw-two-groups", "adamw-clipped"])
def test_stored_example_gradients_equal_replayed_ones(name, tmp_path):
    case = BY_NAME[name]
    stored, _ = record(case, tmp_path / "stored.zarr", example_grads="stored")
    replayed, _ = record(case, tmp_path / "replayed.zarr")
    assert stored.stores_example_grads
    assert not replayed.stores_example_grads
    for step in range(stored.num_steps):
        one, other = stored.example_grads(step), replayed.example_grads(step)
        for parameter, gradients in one.items():
            assert len(gradients) == len(stored.call_examples(step))
            torch.testing.assert_close(gradients, other[parameter], rtol=1e-12, atol=1e-15)
    axes = ("query", "example", "step", "parameter")
    first, second = (run.attribute(query(), by=axes) for run in (stored, replayed))
    assert first.dataset.attrs["example_products"] == "stored"
    np.testing.assert_allclose(first.dataset.contribution, second.dataset.contribution, rtol=1e-9, atol=1e-15)
    first.check()


def test_stored_example_gradients_sum_to_the_gradient(tmp_path):
    run, _ = record(BY_NAME["sgd-accumulation"], tmp_path / "run.zarr", example_grads="stored")
    for step in range(run.num_steps):
        total = {name: rows.sum(dim=0) for name, rows in run.example_grads(step).items()}
        torch.testing.assert_close(run.table.flatten(total), run.flat_gradient(step), rtol=1e-12, atol=1e-15)


def untracked_batchnorm_mlp():
    torch.manual_seed(3)
    normalize = nn.BatchNorm1d(5, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 5), normalize, nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp, untracked_batchnorm_mlp])
def test_rows_of_a_batch_that_cannot_be_taken_apart_are_stored_too(make, tmp_path):
    by = ("query", "example", "step", "parameter")
    stored, _ = recorded(tmp_path / "stored.zarr", three_steps, make=make, example_grads="stored")
    replayed, _ = recorded(tmp_path / "replayed.zarr", three_steps, make=make)
    one, other = stored.attribute(query(), by=by), replayed.attribute(query(), by=by)
    ways = ("factors", "factors") if make is dropout_mlp else ("tangents", "rows of the batch")
    assert (one.dataset.attrs["example_products"], other.dataset.attrs["example_products"]) == ("stored", ways[0])
    split = "rows of the recorded batch" if make is dropout_mlp else "coupled rows"
    assert all(result.dataset.attrs["row_split"].startswith(split) for result in (one, other))
    np.testing.assert_allclose(one.dataset.contribution, other.dataset.contribution, rtol=1e-9, atol=1e-14)
    late = replayed.attribute(query(), by=("query", "example", "update_step", "parameter"))
    assert late.dataset.attrs["example_products"] == ways[1]
    np.testing.assert_allclose(
        late.dataset.contribution.sum("update_step"), other.dataset.contribution.sum("step"), rtol=1e-9, atol=1e-14
    )


def test_keyword_inputs_and_plain_arguments_are_recorded(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x, *, mask, factor=1.0):
            return factor * self.linear(x * mask)

    mask = (torch.arange(27).reshape(9, 3) % 2).double()

    def body(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows], mask=mask[rows], factor=2.0), LABELS[rows]).backward()
            optimizer.step()

    run, model = recorded(tmp_path / "run.zarr", body, make=Scaled)
    assert run.verify().bit_exact
    asked = explaind.Query({"0": FEATURES[:2], "mask": mask[:2]}, output=explaind.outputs.logit([0, 1]))
    result = run.attribute(asked, by=("query", "example", "layer"))
    result.check()
    with torch.no_grad():
        expected = model(FEATURES[:2], mask=mask[:2], factor=2.0)[[0, 1], [0, 1]]
    np.testing.assert_allclose(result.total, expected, rtol=1e-12)


# ---------------------------------------------------------------------- leaving the loop


@pytest.mark.parametrize("when", ["before backward", "before step", "after step"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_interrupted_loop_leaves_every_finished_step(error, when, tmp_path):
    model = mlp()
    optimizer = make_sgd(model)
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


# ---------------------------------------------------------------------- loops of all shapes


@pytest.mark.parametrize("place", ["before backward", "after step", "to zeros"])
def test_gradients_may_be_cleared_anywhere(place, tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            if place != "after step":
                optimizer.zero_grad(set_to_none=place != "to zeros")
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()
            if place == "after step":
                optimizer.zero_grad()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [run.call_examples(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert run.verify().bit_exact


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("forward", ["one by one", "both first"])
def test_a_zeroed_micro_batch_does_not_count(forward, set_to_none, tmp_path):
    def body(model, optimizer, recorder):
        for _ in range(2):
            if forward == "both first":
                dropped = F.cross_entropy(model(FEATURES[0:2]), LABELS[0:2])
                kept = F.cross_entropy(model(FEATURES[5:7]), LABELS[5:7])
                dropped.backward()
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                F.cross_entropy(model(FEATURES[0:2]), LABELS[0:2]).backward()
                optimizer.zero_grad(set_to_none=set_to_none)
                kept = F.cross_entropy(model(FEATURES[5:7]), LABELS[5:7])
            kept.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    run, _ = recorded(tmp_path / "run.zarr", body)
    for step in range(2):
        (call,) = run.calls(step)
        assert torch.equal(call.inputs["0"], FEATURES[5:7])
    assert run.verify().bit_exact


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_forgotten_gradients_count_again_in_the_next_step_as_no_example(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.call_examples(1).tolist() == [3, 4, 5]
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other.sel(step=0)).max() < 1e-14
    assert np.abs(result.dataset.other.sel(step=1)).min() > 1e-6


def test_a_second_backward_through_one_call_adds_up(tmp_path):
    def body(model, optimizer, recorder):
        out = model(FEATURES[:3])
        F.cross_entropy(out, LABELS[:3]).backward(retain_graph=True)
        out.square().mean().backward()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert len(run.calls(0)) == 1
    fresh = mlp()
    out = fresh(FEATURES[:3])
    (F.cross_entropy(out, LABELS[:3]) + out.square().mean()).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in fresh.parameters()])
    torch.testing.assert_close(run.flat_gradient(0), expected, rtol=1e-12, atol=1e-15)
    result = run.attribute(query(), by=("query", "example"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_accumulated_micro_batches_are_calls_of_one_step(tmp_path):
    def body(model, optimizer, recorder):
        for rows in [(slice(0, 2), slice(2, 5), slice(5, 6)), (slice(6, 7), slice(7, 9), slice(0, 1))]:
            optimizer.zero_grad()
            for part in rows:
                (F.cross_entropy(model(FEATURES[part]), LABELS[part]) / 3).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(call.examples) for call in run.calls(0)] == [2, 3, 1]
    assert run.call_examples(1).tolist() == [6, 7, 8, 0]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_forward_calls_outside_the_loss_are_ignored(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[start : start + 2]), LABELS[start : start + 2])
            with torch.no_grad():
                model(FEATURES[6:])
            model(FEATURES[4:6]).sum()  # has a graph, but no loss
            model.eval()
            model(FEATURES[8:])
            model.train()
            loss.backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(run.calls(step)) for step in range(2)] == [1, 1]
    assert run.examples.tolist() == [0, 1, 2, 3]
    assert zarr.open_group(tmp_path / "run.zarr", mode="r")["inputs/0"].shape == (4, 3)
    assert run.verify().bit_exact


@pytest.mark.parametrize("of_inputs", [True, False], ids=["of inputs", "of parameters"])
def test_gradients_taken_to_look_at_are_ignored(of_inputs, tmp_path):
    """Saliency maps, adversarial examples or gradient norms within the loop change no `.grad`."""

    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            optimizer.zero_grad()
            x = FEATURES[start : start + 3].clone().requires_grad_()
            torch.autograd.grad(model(x).sum(), x if of_inputs else list(model.parameters()))
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(run.calls(step)) for step in range(3)] == [1, 1, 1]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_gradients_set_by_hand_from_autograd_are_recorded(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            loss = F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3])
            parameters = list(model.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [run.call_examples(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert run.verify().bit_exact


def test_a_model_applied_twice_in_a_row_is_two_calls(tmp_path):
    def body(model, optimizer, recorder):
        optimizer.zero_grad()
        F.cross_entropy(model(model(FEATURES[:3])), LABELS[:3]).backward()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert len(run.calls(0)) == 2
    result = run.attribute(query(), by=("query", "example"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_a_step_without_any_gradient_is_recorded(tmp_path):
    def body(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        step_on(model, optimizer, slice(3, 6))
        optimizer.zero_grad()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.num_steps == 4
    assert [len(run.calls(step)) for step in range(4)] == [1, 0, 1, 0]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "update_step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(update_step=1)).max() > 1e-6  # momentum goes on
    assert np.abs(result.dataset.contribution.sel(update_step=3)).max() == 0


def test_frozen_parameters_are_kept_as_they_were(tmp_path):
    def make():
        model = mlp()
        model[0].requires_grad_(False)
        return model

    def body(model, optimizer, recorder):
        three_steps(model, optimizer, recorder)

    run, model = recorded(
        tmp_path / "run.zarr",
        body,
        make=make,
        optimizer=lambda m: SGD([p for p in m.parameters() if p.requires_grad], lr=0.2),
    )
    assert list(run.params(0)) == ["2.weight", "2.bias"]
    assert torch.equal(run.fixed(0)["0.weight"], model[0].weight)
    other = make()
    nn.init.zeros_(other[0].weight)
    reopened = explaind.open_run(tmp_path / "run.zarr", model=other)
    result = reopened.attribute(query(), by=("query", "example", "layer"))
    result.check()
    with torch.no_grad():
        expected = query().output(model(query().inputs))
    np.testing.assert_allclose(result.dataset.prediction, expected, rtol=1e-12)
    assert not other[0].weight.any()


def test_a_frozen_parameter_in_the_optimizer_gets_nothing(tmp_path):
    def make():
        model = mlp()
        model[0].bias.requires_grad_(False)
        return model

    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=make, optimizer=one_group(AdamW, lr=0.05))
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "parameter"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(parameter="0.bias")).max() == 0
    assert np.abs(result.dataset.decay.sel(parameter="0.bias")).max() == 0


def test_a_parameter_unfrozen_on_the_way_is_followed(tmp_path):
    def body(model, optimizer, recorder):
        model[0].requires_grad_(False)
        step_on(model, optimizer, slice(0, 3))
        model[0].requires_grad_(True)
        step_on(model, optimizer, slice(3, 6))
        step_on(model, optimizer, slice(6, 9))

    run, _ = recorded(tmp_path / "run.zarr", body, optimizer=one_group(AdamW, lr=0.05))
    assert run.updated[:, 0].tolist() == [False, True, True]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(layer="0", step=0)).max() == 0
    assert np.abs(result.dataset.other).max() < 1e-14


def test_tied_weights_are_one_parameter(tmp_path):
    def make():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        model[2].weight = model[0].weight
        return model

    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=make, optimizer=one_group(AdamW, lr=0.05))
    assert list(run.params(0)) == ["0.weight", "0.bias", "2.bias"]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "parameter"), tolerance=1e-12)
    result.check()
    expected = reference.decompose(run, query()).contribution.sum(["update_step", "token"])
    np.testing.assert_allclose(result.dataset.contribution, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_continued_run_keeps_the_momentum_from_before(tmp_path):
    model = mlp()
    optimizer = make_sgd(model)
    step_on(model, optimizer, slice(0, 3))
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        step_on(model, optimizer, slice(3, 6))
        step_on(model, optimizer, slice(6, 9))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert run.verify().bit_exact
    for axis in ("step", "update_step"):
        result = run.attribute(query(), by=("query", "example", axis))
        result.check()
        assert np.abs(result.dataset.other).sum() > 1e-6


def test_a_step_that_calls_its_parents_step_is_refused(tmp_path):
    class Counting(SGD):
        def step(self, closure=None):
            return super().step(closure)

    SGD([torch.zeros(1)], lr=0.1)  # torch installs its hooks in a class when it is first used
    with pytest.raises(RecordingError, match=r"its step\(\) calls that of another optimizer class"):
        recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(Counting, lr=0.2))


@pytest.mark.parametrize("optimizer", ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_every_optimizer_of_torch_is_recorded(optimizer, tmp_path):
    make = one_group(getattr(torch.optim, optimizer), lr=0.01)
    run, _ = recorded(tmp_path / "run.zarr", three_steps, optimizer=make)
    assert run.verify().bit_exact
    run.attribute(query(), by=("query", "step", "layer")).check()


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


class Unknown(RMSprop):
    """An optimizer without a rule."""


def test_an_optimizer_without_a_rule_closes_by_step_and_layer(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(Unknown, lr=0.01, momentum=0.5))
    assert run.verify().exact_updates is None
    result = run.attribute(query(), by=("query", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution).min() > 0
    with pytest.raises(UnknownUpdateRuleError, match="by=\\('query', 'step', 'layer'\\) works"):
        run.attribute(query(), by=("query", "example"))


@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_dropout_and_batchnorm_in_training_close_by_example(make, tmp_path):
    run, model = recorded(tmp_path / "run.zarr", three_steps, make=make)
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert result.dataset.attrs["example_products"] == ("factors" if make is dropout_mlp else "tangents")
    assert np.abs(result.dataset.other).max() < 1e-14
    assert np.abs(result.dataset.rounding).max() < 1e-14
    model.eval()
    with torch.no_grad():
        expected = query().output(model(query().inputs))
    np.testing.assert_allclose(result.dataset.prediction, expected, rtol=1e-12)


def test_batchnorm_without_running_statistics_closes_by_example(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, make=untracked_batchnorm_mlp)
    asked = query().mean()  # such a model has no prediction for a single input
    run.attribute(asked, by=("query", "example", "step", "layer")).check()


def last_step_in_eval_mode(model, optimizer):
    model.eval()
    step_on(model, optimizer, slice(6, 9))


def last_step_without_examples(model, optimizer):
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()


@pytest.mark.parametrize("last", [last_step_in_eval_mode, last_step_without_examples])
@pytest.mark.parametrize("make", [dropout_mlp, batchnorm_mlp])
def test_dropout_and_batchnorm_close_when_the_last_step_shows_neither(make, last, tmp_path):
    def body(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        last(model, optimizer)

    run, _ = recorded(tmp_path / "run.zarr", body, make=make)
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


# ---------------------------------------------------------------------- certificates


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replay_is_bit_exact(case, tmp_path):
    run, _ = record(case, tmp_path / "run.zarr")
    report = run.verify()
    assert report.exact_updates == run.num_steps
    assert report.largest_update_difference == 0
    if case.max_norm is None:
        assert report.bit_exact
        assert report.first_inexact is None
    else:
        assert report.largest_gradient_difference < 1e-14


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-schedule", "adamw-clipped"])
def test_a_float32_run_closes_in_float64(name, tmp_path):
    run, _ = record(BY_NAME[name], tmp_path / "run.zarr", dtype=torch.float32)
    assert run.params(0)["0.weight"].dtype == torch.float32
    axes = ("query", "example", "step", "layer")
    result = run.attribute(query(torch.float32), by=axes, dtype=torch.float64)
    closure = result.check()
    assert closure.error_limit == 1e-12
    single = run.attribute(query(torch.float32), by=axes)
    assert single.dataset.attrs["dtype"] == "float32"
    assert single.check().error < 1e-12
    np.testing.assert_allclose(single.dataset.contribution, result.dataset.contribution, rtol=1e-3, atol=1e-6)
    assert np.abs(result.dataset.other).max() == 0
    assert 0 < float(np.abs(result.dataset.rounding).sum()) < 1e-4


def regression(path, change_gradient, *, penalty=0.0, make=linear):
    """Two SGD steps of a linear model, whose path integral is exact; `change_gradient` edits by hand."""
    targets = FEATURES.sum(dim=1, keepdim=True)

    def body(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            loss = F.mse_loss(model(FEATURES[rows]), targets[rows])
            (loss + penalty * model.weight.square().sum()).backward()
            change_gradient(model.weight.grad)
            optimizer.step()

    return recorded(path, body, make=make, optimizer=one_group(SGD, lr=0.1))


def value_of(x):
    return explaind.Query(x, output=explaind.outputs.value())


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_penalty_in_the_loss_is_other(tmp_path):
    run, _ = regression(tmp_path / "run.zarr", lambda gradient: None, penalty=0.05)
    x = FEATURES[:1]
    result = run.attribute(value_of(x), by=("query", "example", "step"))
    result.check()
    expected = [-0.1 * 0.05 * 2 * float(x @ run.params(step)["weight"].T) for step in range(2)]
    np.testing.assert_allclose(result.dataset.other[0], expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_noise_added_to_the_gradient_is_other_and_no_rescaling(bias, tmp_path):
    noise = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)

    def make():
        return linear(bias)

    run, _ = regression(tmp_path / "run.zarr", lambda gradient: gradient.add_(noise), make=make)
    x = FEATURES[:1]
    result = run.attribute(value_of(x), by=("query", "example", "step"))
    result.check()
    np.testing.assert_allclose(result.dataset.other[0], [-0.1 * float(x @ noise.T)] * 2, rtol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_reversed_by_hand_is_a_factor_of_minus_one_or_other(bias, tmp_path):
    """Whatever it is called, the examples and the rest must add up to the true movement."""
    run, model = regression(tmp_path / "run.zarr", lambda gradient: gradient.neg_(), make=lambda: linear(bias))
    result = run.attribute(value_of(FEATURES[:1]), by=("query", "example", "step"))
    result.check()
    with torch.no_grad():
        np.testing.assert_allclose(result.total, model(FEATURES[:1])[:, 0], rtol=1e-12)


def test_a_loss_scaler_is_a_rescaling_and_its_skipped_steps_are_none(tmp_path):
    def body(model, optimizer, recorder):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number, start in enumerate((0, 3, 6)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3])
            scaler.scale(loss * math.inf if number == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.num_steps == 2
    assert run.call_examples(1).tolist() == [3, 4, 5]  # by content: the skipped batch was never counted
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14
