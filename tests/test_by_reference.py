"""Runs that refer to their inputs by the ids of examples, and find them in the data set again."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import explaind
from explaind import referenced_inputs
from explaind.cli import main
from explaind.errors import DamagedStoreError, DataMismatchError, NotRecordedError, RecordingError
from explaind.row_cache import RowCache
from tests.cases import BY_NAME, NUM_EXAMPLES, data, mlp, query, record
from tests.traced import change_attributes, momentum_sgd, recorded, step_on

FEATURES, LABELS = data().tensors
EVERY_AXIS = ("query", "example", "step", "layer")
DATA = data()


def make_data():
    return data()


def given(ids):
    return FEATURES[ids]


def same_results(one, other, question=None, **settings):
    """Whether two runs give the same numbers, bit for bit."""
    asked = query() if question is None else question
    results = [run.attribute(asked, by=EVERY_AXIS, **settings).dataset for run in (one, other)]
    assert results[0].sizes == results[1].sizes
    return all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def opened(path, make=mlp, **options):
    return explaind.open_run(path, model=make(), **options)


class Asked(Dataset):
    def __init__(self, items):
        self.items, self.count = items, 0

    def __getitem__(self, index):
        self.count += 1
        return self.items[index]

    def __len__(self):
        return len(self.items)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return record(BY_NAME["adamw-schedule"], tmp_path_factory.mktemp("stored") / "run.zarr")[0]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    place = tmp_path_factory.mktemp("referring") / "run.zarr"
    record(BY_NAME["adamw-schedule"], place, inputs="by_reference")
    return place


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize(
    "name", ["sgd-momentum-dampening-decay", "adamw-full-batch-shuffled", "sgd-accumulation", "adamw-clipped"]
)
def test_contributions_are_those_of_stored_inputs(name, tmp_path):
    one = record(BY_NAME[name], tmp_path / "stored")[0]
    record(BY_NAME[name], tmp_path / "referring", inputs="by_reference")
    other = opened(tmp_path / "referring", data=data())
    assert same_results(one, other)
    assert other.verify().bit_exact
    assert all(torch.equal(g, other.example_grads(1)[n]) for n, g in one.example_grads(1).items())


@pytest.mark.parametrize("options", [{"snapshot_every": 3}, {"example_grads": "stored"}], ids=str)
def test_other_options_go_together_with_it(options, tmp_path):
    one = record(BY_NAME["sgd-nesterov"], tmp_path / "stored", **options)[0]
    record(BY_NAME["sgd-nesterov"], tmp_path / "referring", inputs="by_reference", **options)
    assert same_results(one, opened(tmp_path / "referring", data=data()))


SOURCES = {
    "data set": data(),
    "list of items": list(data()),
    "items by id": dict(enumerate(data())),
    "dicts, numbers of numpy": [{"label": int(y), "x": x.numpy()} for x, y in data()],
    "other order": [(y, x) for x, y in data()],
    "narrower type, other shape": [(x.reshape(1, 3), y) for x, y in data()],
    "loader": DataLoader(data(), batch_size=2, shuffle=True),
    "loader that collates": DataLoader(
        data(), batch_size=2, collate_fn=lambda items: torch.stack([x for x, _ in items])
    ),
    "loader without batches": DataLoader(data(), batch_size=None),
    "tensor": FEATURES,
    "function": given,
    "function of several": lambda ids: {"mask": torch.ones(len(ids), 4), "x": FEATURES[ids]},
}


@pytest.mark.parametrize("source", SOURCES)
def test_inputs_are_found_in_data_of_any_form(source, stored, path):
    assert same_results(stored, opened(path, data=SOURCES[source]))


def test_items_are_converted_as_the_loop_did(tmp_path):
    pixels = torch.randint(256, (9, 1, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    items = TensorDataset(LABELS, pixels)

    def loop(model, optimizer, recorder):
        for labels, images in recorder.batches(DataLoader(items, batch_size=4)):
            optimizer.zero_grad()
            F.cross_entropy(model(images.double().flatten(1)), labels).backward()
            optimizer.step()

    recorded(tmp_path / "run", loop, inputs="by_reference")
    assert opened(tmp_path / "run", data=items).verify().bit_exact


def test_a_loop_that_changes_its_batches_is_followed_by_a_function(tmp_path):
    def loop(model, optimizer, recorder):
        for x, y in recorder.batches(DataLoader(data(), batch_size=4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x / 2 - 1), y).backward()
            optimizer.step()

    recorded(tmp_path / "run", loop, inputs="by_reference")
    with pytest.raises(DataMismatchError, match=r"the data set has '0' float64 \(3,\) with other content; '1' int64"):
        opened(tmp_path / "run", data=data()).verify()
    assert opened(tmp_path / "run", data=lambda ids: FEATURES[ids] / 2 - 1).verify().bit_exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int32])
def test_inputs_of_any_type(dtype, tmp_path):
    values = (4 * FEATURES).to(dtype)

    class Widening(nn.Sequential):
        def forward(self, x):
            return super().forward(x.double())

    def make():
        return Widening(*mlp())

    def loop(model, optimizer, recorder):
        for x, y in recorder.batches(DataLoader(TensorDataset(values, LABELS), batch_size=4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    recorded(tmp_path / "run", loop, make=make, inputs="by_reference")
    assert opened(tmp_path / "run", make, data=TensorDataset(values)).verify().bit_exact


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(2, 3)
        self.double()

    def forward(self, x, extra):
        return self.first(x) + extra["weight"] * self.second(extra["pair"])


def test_several_tensors_and_nested_dicts(tmp_path):
    pairs, weights = FEATURES[:, :2] + 1, FEATURES[:, :1].exp()
    items = [{"pair": p, "w": w, "x": x, "y": y} for p, w, x, y in zip(pairs, weights, FEATURES, LABELS, strict=True)]

    def loop(model, optimizer, recorder):
        for batch in recorder.batches(DataLoader(items, batch_size=4)):
            optimizer.zero_grad()
            extra = {"pair": batch["pair"], "weight": batch["w"]}
            F.cross_entropy(model(x=batch["x"], extra=extra), batch["y"]).backward()
            optimizer.step()

    asked = explaind.Query(
        {"x": FEATURES[:2], "extra": {"pair": pairs[:2], "weight": weights[:2]}},
        output=explaind.outputs.log_prob([0, 1]),
    )
    one, _ = recorded(tmp_path / "stored", loop, make=TwoInputs)
    recorded(tmp_path / "referring", loop, make=TwoInputs, inputs="by_reference")
    other = opened(tmp_path / "referring", TwoInputs, data=items)
    assert same_results(one, other, asked)
    assert {name for name in other._store.commit.arrays if name.startswith("input")} == {
        "input_digests/x",
        "input_digests/extra.pair",
        "input_digests/extra.weight",
    }


def test_a_model_that_is_called_with_each_part_of_an_item(tmp_path):
    pairs = TensorDataset(FEATURES, FEATURES.flip(0) + 1)

    def loop(model, optimizer, recorder):
        for _ in range(2):
            for left, right in recorder.batches(DataLoader(pairs, batch_size=4)):
                optimizer.zero_grad()
                (model(left) - model(right)).square().sum().backward()
                optimizer.step()

    one, _ = recorded(tmp_path / "stored", loop)
    recorded(tmp_path / "referring", loop, inputs="by_reference")
    assert same_results(one, opened(tmp_path / "referring", data=pairs))


def test_rows_of_one_call_may_be_of_several_tensors(tmp_path):
    def loop(model, optimizer, recorder):
        for _ in range(2):
            optimizer.zero_grad()
            recorder.examples([*range(9), *range(9)])
            F.cross_entropy(model(torch.cat([FEATURES, FEATURES + 1])), LABELS.repeat(2)).backward()
            optimizer.step()

    one, _ = recorded(tmp_path / "stored", loop)
    recorded(tmp_path / "referring", loop, inputs="by_reference")
    assert same_results(one, opened(tmp_path / "referring", data=TensorDataset(FEATURES, FEATURES + 1)))


def test_batches_that_are_padded_to_their_longest(tmp_path):
    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.embedding = nn.Embedding(5, 3).double()

        def forward(self, tokens):
            return self.embedding(tokens).sum(dim=1)

    def padded(items):
        return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.stack([y for _, y in items])

    items = [(torch.arange(1 + i % 4) + 1, y) for i, y in enumerate(LABELS)]
    loader = DataLoader(items, 3, shuffle=True, collate_fn=padded, generator=torch.Generator().manual_seed(1))

    def loop(model, optimizer, recorder):
        for _ in range(3):
            for tokens, y in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(tokens), y).backward()
                optimizer.step()

    recorded(tmp_path / "run", loop, make=Summed, inputs="by_reference")
    assert opened(tmp_path / "run", Summed, data=loader).verify().bit_exact
    with pytest.raises(DataMismatchError, match=r"default_collate.*Give as data= the DataLoader, whose collate_fn"):
        opened(tmp_path / "run", Summed, data=items).verify()


def weighted_losses(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * batch["weight"]


def test_the_batch_of_an_objective(tmp_path):
    items = [{"x": x, "y": y, "weight": 0.1 + x.square().sum()} for x, y in data()]

    def loop(model, optimizer, recorder):
        for _ in range(2):
            for batch in recorder.batches(DataLoader(items, batch_size=4)):
                optimizer.zero_grad()
                weighted_losses(model, batch).sum().backward()
                optimizer.step()

    runs = []
    for inputs in ("stored", "by_reference"):
        recorded(tmp_path / inputs, loop, inputs=inputs, objective=weighted_losses)
        runs.append(opened(tmp_path / inputs, objective=weighted_losses, data=items))
    assert same_results(*runs)
    assert runs[1].verify().bit_exact
    others = [item | {"y": (item["y"] + (i == 6)) % 3} for i, item in enumerate(items)]
    with pytest.raises(DataMismatchError, match=r"example 6 of the data set .* its input '0\.y' was int64 \(\)"):
        opened(tmp_path / "by_reference", objective=weighted_losses, data=others).verify()


# ------------------------------------------------------------------ what it saves and costs


def test_inputs_take_few_bytes(tmp_path):
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def make():
        torch.manual_seed(3)
        return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))

    def loop(model, optimizer, recorder):
        for x, y in recorder.batches(DataLoader(TensorDataset(images, LABELS), batch_size=4)):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    kinds = []
    for inputs in ("stored", "by_reference"):
        run, _ = recorded(tmp_path / inputs, loop, make=make, inputs=inputs)
        kinds.append({kind.kind: kind for kind in run.info().kinds})
    stored, referring = kinds
    assert "checksums of inputs" not in stored
    assert "inputs" not in referring
    assert stored["inputs"].plain_bytes == images.nbytes
    assert referring["checksums of inputs"].plain_bytes == 16 * 9
    assert referring["checksums of inputs"].stored_bytes < 1000


def test_the_run_says_that_it_refers_to_data(path, stored):
    assert "9, inputs by reference" in repr(opened(path))
    assert "examples:  9, inputs by reference" in str(opened(path).info())
    assert opened(path).info().inputs == "by_reference"
    assert stored.info().inputs == "stored"
    assert "by reference" not in str(stored.info())


@pytest.mark.parametrize("objective", [None, lambda model, batch: model(batch).square().sum(dim=1)])
def test_a_plan_counts_digests(objective, tmp_path):
    model, options = mlp(), {"objective": objective}
    optimizer = SGD(model.parameters(), lr=0.1)
    plans = [
        explaind.trace(model, optimizer, tmp_path / "run", inputs=inputs, **options).plan(
            FEATURES, steps=100, examples=1000
        )
        for inputs in ("stored", "by_reference")
    ]
    assert plans[0].bytes_per_example >= 24
    assert 16 <= plans[1].bytes_per_example < 120
    assert plans[1].examples == 1000


def test_items_are_asked_for_once(path):
    asked = Asked(data())
    run = opened(path, data=asked)
    run.verify()
    run.attribute(query(), by=EVERY_AXIS)
    assert asked.count == NUM_EXAMPLES


def test_what_does_not_fit_is_asked_for_again(path, stored, monkeypatch):
    monkeypatch.setattr(referenced_inputs, "_CACHE_BYTES", 3 * 3 * 8)
    asked = Asked(data())
    run = opened(path, data=asked)
    assert run.cached_bytes > 3 * 3 * 8
    assert same_results(stored, run)
    assert asked.count > NUM_EXAMPLES


def test_a_cache_keeps_the_last_rows():
    cache = RowCache(6, capacity=3, layout={"x": ((), torch.int64)})
    for numbers in ([0, 1], [1, 2], [3, 3]):
        cache.put(np.array(numbers), {"x": 10 * torch.tensor(numbers)})
    assert cache.get(np.array([0])) is None
    assert cache.get(np.array([3, 1, 2, 1]))["x"].tolist() == [30, 10, 20, 10]
    cache.put(np.arange(6), {"x": 10 * torch.arange(6)})
    assert [number for number in range(6) if cache.get(np.array([number])) is not None] == [0, 4, 5]
    nothing = RowCache(6, capacity=0, layout={"x": ((), torch.int64)})
    nothing.put(np.arange(6), {"x": torch.arange(6)})
    assert nothing.get(np.array([2])) is None


def test_reading_draws_no_random_numbers_from_the_users(path):
    def noisy(ids):
        torch.randn(3)
        return FEATURES[ids]

    before = torch.get_rng_state()
    opened(path, data=noisy).verify()
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_those_of_a_loop_that_is_not_traced(tmp_path):
    case = BY_NAME["adamw-schedule"]
    _, one = record(case, tmp_path / "stored")
    _, other = record(case, tmp_path / "referring", inputs="by_reference")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ------------------------------------------------------------------ what is refused in the loop


def test_the_option_has_two_values(tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match=r"inputs must be 'stored' or 'by_reference', got 'ids'"):
        explaind.trace(model, momentum_sgd(model), tmp_path / "run", inputs="ids")


def test_examples_must_have_names(tmp_path):
    def loop(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 4))

    with pytest.raises(RecordingError, match=r"the examples of step 0 have none\. Iterate over recorder\.batches"):
        recorded(tmp_path / "run", loop, inputs="by_reference")


def test_parts_of_a_container_are_refused(tmp_path):
    def loop(model, optimizer, recorder):
        optimizer.zero_grad()
        recorder.examples(range(9))
        model["second"](model["first"](FEATURES)).sum().backward()
        optimizer.step()

    with pytest.raises(RecordingError, match=r"called with each other's outputs, as 'second' may be, and no data set"):
        recorded(
            tmp_path / "run",
            loop,
            make=lambda: nn.ModuleDict({"first": nn.Linear(3, 3), "second": nn.Linear(3, 1)}).double(),
            inputs="by_reference",
        )


class Augmented(Dataset):
    def __getitem__(self, index):
        return FEATURES[index] + torch.randn(3, dtype=torch.float64), LABELS[index]

    def __len__(self):
        return len(FEATURES)


AUGMENTED = Augmented()


def augmented(epochs):
    def loop(model, optimizer, recorder):
        for _ in range(epochs):
            for x, y in recorder.batches(DataLoader(AUGMENTED, batch_size=4)):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    return loop


def test_an_example_with_two_contents_is_refused_and_nothing_lost(tmp_path):
    with pytest.raises(RecordingError, match=r"example 0 came with another input at step 3 than in an earlier step"):
        recorded(tmp_path / "run", augmented(epochs=2), inputs="by_reference")
    run = opened(tmp_path / "run")
    assert (run.complete, run.num_steps) == (True, 6)


def test_the_loop_stops_when_the_writer_has_noticed(tmp_path, monkeypatch):
    def loop(model, optimizer, recorder):
        for _ in range(2):
            for x, y in recorder.batches(DataLoader(AUGMENTED, batch_size=4)):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                recorder._loop.rows._writer.flush()
                recorder._loop.rows._writer.wait()

    with pytest.raises(RecordingError, match=r"Record with inputs='stored'\..* the steps before 3 can still be"):
        recorded(tmp_path / "run", loop, inputs="by_reference")
    run = opened(tmp_path / "run")
    assert (run.complete, run.num_steps) == (True, 4)


def test_augmentation_in_one_epoch_is_noticed_by_the_reader(tmp_path):
    recorded(tmp_path / "run", augmented(epochs=1), inputs="by_reference")
    with pytest.raises(DataMismatchError, match=r"example 0 .* at step 0: .*augmentation.*inputs='stored'"):
        opened(tmp_path / "run", data=AUGMENTED).verify()


# ------------------------------------------------------------------ what is refused by a reader


def changed(index):
    features = FEATURES.clone()
    features[index] += 1
    return TensorDataset(features, LABELS)


MISMATCHES = {
    "other content": (
        changed(5),
        r"example 5 of the data set is not what .* '0' was float64 \(3,\), the data set has '0'",
    ),
    "all other": (TensorDataset(FEATURES + 1), r"\(3,\) with other content\. If this is the data set of the recording"),
    "other shape": (TensorDataset(FEATURES[:, :2]), r"the data set has '0' float64 \(2,\)\. If"),
    "narrower": (TensorDataset(FEATURES.float()), r"the data set has '0' float32 \(3,\) with other content"),
    "too few": (TensorDataset(FEATURES[:5]), r"does not have all of the examples .*: IndexError"),
    "no tensors": (lambda ids: ["text" for _ in ids], r"the data set has no tensor"),
    "no rows": (lambda ids: FEATURES[0], r"'' of shape \(3,\) in all, which has no row for each of 4 examples"),
    "no items": ([(x, None) for x in FEATURES], r"by torch's default_collate: TypeError.*a function that takes a list"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_other_data_is_refused(name, path):
    other, message = MISMATCHES[name]
    with pytest.raises(DataMismatchError, match=message):
        opened(path, data=other).attribute(query(), by=EVERY_AXIS)


def test_how_many_examples_agree_is_said(path):
    run = opened(path, data=changed(5))
    (step,) = (step for step in range(3) if 5 in run.call_examples(step))
    count = len(run.call_examples(step))
    with pytest.raises(DataMismatchError, match=rf"The other {count - 1} of the call's {count} examples agree"):
        dict(run.calls(step)[0].inputs)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data())


@pytest.mark.parametrize(
    "other, message",
    [
        (Stream(), r"which an IterableDataset cannot"),
        (DataLoader(Stream()), r"which an IterableDataset cannot"),
        (7, r"data= is a map-style data set, a DataLoader of one, .*; got 7"),
        (TensorDataset, r"got <class"),
    ],
    ids=["stream", "loader of a stream", "number", "class"],
)
def test_what_is_no_data_set_is_refused(other, message, path):
    with pytest.raises(TypeError, match=message):
        opened(path, data=other)


def test_what_needs_inputs_asks_for_the_data(path):
    run = opened(path)
    for use in (run.verify, lambda: run.attribute(query(), by=EVERY_AXIS), lambda: run.example_grads(0)):
        with pytest.raises(NotRecordedError, match=r"needs the inputs of step 0, which .* data=dataset\)"):
            use()


def test_what_needs_no_inputs_needs_no_data(path, stored):
    run = explaind.open_run(path)
    assert all(torch.equal(value, stored.params(6)[name]) for name, value in run.params(6).items())
    assert run.history.equals(stored.history)
    assert run.examples.tolist() == list(range(9))
    call = run.calls(2)[0]
    assert torch.equal(call.output_grad, stored.calls(2)[0].output_grad)
    assert list(call.inputs) == ["0"]
    assert run.info().num_examples == 9


@pytest.mark.parametrize("shapes", [[], [{"0": [-3]}], [{"1": [3]}], [{"0": ["x"]}], 7], ids=str)
def test_damage_to_the_description_is_noticed(shapes, path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "run.zarr")
    change_attributes(copy, lambda attributes: attributes.update(input_shapes=shapes))
    with pytest.raises(DamagedStoreError, match="the attributes"):
        opened(copy, data=data())


def test_a_store_with_other_shapes_finds_nothing(path, tmp_path):
    copy = shutil.copytree(path, tmp_path / "run.zarr")
    change_attributes(copy, lambda attributes: attributes.update(input_shapes=[{"0": [4]}]))
    with pytest.raises(DataMismatchError, match=r"was float64 \(4,\), the data set has '0' float64 \(3,\)"):
        opened(copy, data=data()).verify()


# ------------------------------------------------------------------ exports and the command line


def test_an_export_refers_to_the_same_data(path, stored, tmp_path):
    opened(path).export(tmp_path / "part", steps=slice(2, 5))
    part = opened(tmp_path / "part", data=data())
    assert part.refers_to_data
    assert part.verify().bit_exact
    stored.export(tmp_path / "stored", steps=slice(2, 5))
    assert same_results(opened(tmp_path / "stored"), part)


def test_a_thinned_export_replays_with_the_data(path, stored, tmp_path):
    with pytest.raises(NotRecordedError, match="data="):
        opened(path).export(tmp_path / "nothing", every=2)
    opened(path, data=data()).export(tmp_path / "thin", every=2)
    thin = opened(tmp_path / "thin", data=data())
    assert thin.replays_gradients
    assert same_results(stored, thin)


def call(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="explaind")
    return result.exit_code, result.output


HERE, MODEL = "tests.test_by_reference", ("--model", "tests.cases:mlp")


@pytest.mark.parametrize("name", ["DATA", "make_data", "given"])
def test_the_command_line_takes_data(name, path):
    code, out = call("verify", path, *MODEL, "--data", f"{HERE}:{name}")
    assert code == 0
    assert "gradients: 6 of 6 bit for bit" in out


def test_the_command_line_asks_for_data(path, tmp_path):
    assert call("verify", path)[0] == 0
    code, out = call("verify", path, *MODEL)
    assert (code, out.splitlines()[-1]) == (
        2,
        "Error: the run has its inputs by reference: replaying it takes the data set, --data module:name.",
    )
    code, out = call("export", path, tmp_path / "thin", "--every", 2, *MODEL)
    assert code == 2
    assert "--every takes the data set, --data module:name." in out
    code, _ = call("export", path, tmp_path / "thin", "--every", 2, *MODEL, "--data", f"{HERE}:DATA")
    assert code == 0
    assert opened(tmp_path / "thin").refers_to_data
    code, out = call("verify", path, *MODEL, "--data", f"{HERE}:HERE")
    assert code == 2
    assert "data= is a map-style data set" in out
    code, out = call("verify", path, *MODEL, "--data", f"{HERE}:nothing")
    assert code == 2
    assert "the module has nothing of that name" in out


def test_other_data_on_the_command_line(path, monkeypatch):
    monkeypatch.setattr(f"{HERE}.FEATURES", FEATURES + 1)
    code, out = call("verify", path, *MODEL, "--data", f"{HERE}:given")
    assert code == 2
    assert "is not what the model was called with at step 0" in out


def test_the_format_is_as_its_page_says(path):
    attributes = json.loads((path / "zarr.json").read_text())["attributes"]
    assert attributes["inputs"] == "by_reference"
    assert attributes["input_shapes"] == [{"0": [3]}]
    assert attributes["input_layouts"] == [{"0": "float64"}]
    assert not (path / "inputs").exists()
