"""Names of examples never go stale and never collide without an error."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader

import explaind
from explaind.errors import RecordingError, StoreExistsError
from tests.cases import CASES, data, mlp, query, record


@pytest.fixture
def setting(tmp_path):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    return model, optimizer, tmp_path / "run.zarr"


def step(model, optimizer, x, y):
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def test_names_by_hand_are_those_of_one_step(setting):
    model, optimizer, path = setting
    x, y = data().tensors
    with (
        pytest.raises(RecordingError, match=r"recorder.examples in every step"),
        explaind.trace(model, optimizer, path) as recorder,
    ):
        recorder.examples(range(4))
        step(model, optimizer, x[:4], y[:4])
        step(model, optimizer, x[4:8], y[4:8])
    assert explaind.open_run(path).num_steps == 1


def test_each_micro_batch_needs_its_own_names(setting):
    model, optimizer, path = setting
    x, y = data().tensors

    def accumulated(recorder, name_each):
        optimizer.zero_grad()
        for rows in (range(3), range(3, 6)):
            if name_each or rows.start == 0:
                recorder.examples(rows)
            F.cross_entropy(model(x[list(rows)]), y[list(rows)]).backward()
        optimizer.step()

    with (
        pytest.raises(RecordingError, match=r"two different batches of step 1 have the ids of one call"),
        explaind.trace(model, optimizer, path) as recorder,
    ):
        accumulated(recorder, name_each=True)
        accumulated(recorder, name_each=False)
    assert explaind.open_run(path).call_examples(0).tolist() == [0, 1, 2, 3, 4, 5]


def test_two_loaders_at_once_are_refused(setting):
    model, optimizer, path = setting
    dataset = data()
    first, second = DataLoader(dataset, batch_size=3), DataLoader(dataset, batch_size=3)
    with (
        pytest.raises(RecordingError, match=r"two loaders of recorder\.batches are in use at once"),
        explaind.trace(model, optimizer, path, overwrite=True) as recorder,
    ):
        for _ in zip(recorder.batches(first), recorder.batches(second), strict=True):
            pass


def test_indices_of_two_data_sets_are_not_mixed(setting):
    model, optimizer, path = setting
    with explaind.trace(model, optimizer, path) as recorder:
        for x, y in recorder.batches(DataLoader(data(), batch_size=9)):
            step(model, optimizer, x, y)
        with pytest.raises(RecordingError, match="loaders of two data sets"):
            recorder.batches(DataLoader(data(), batch_size=9))


def test_a_recorder_records_once_and_only_inside_its_block(setting):
    model, optimizer, path = setting
    recorder = explaind.trace(model, optimizer, path)
    for use in (lambda: recorder.batches(DataLoader(data())), lambda: recorder.examples([0])):
        with pytest.raises(RecordingError, match=r"with explaind\.trace"):
            use()
    assert "not recording" in repr(recorder)
    with recorder:
        step(model, optimizer, *data().tensors)
    with pytest.raises(RecordingError, match="a recorder records once"), recorder:
        pass


def test_bad_arguments_and_a_forgotten_with_delete_nothing(setting):
    model, optimizer, path = setting
    with explaind.trace(model, optimizer, path):
        step(model, optimizer, *data().tensors)
    with pytest.raises(TypeError, match="metadata must be plain data"):
        explaind.trace(model, optimizer, path, overwrite=True, metadata={"rate": np.float32(1)})
    explaind.trace(model, optimizer, path, overwrite=True)
    assert explaind.open_run(path).num_steps == 1


def test_results_do_not_overwrite(tmp_path):
    run, _ = record(CASES[0], tmp_path / "run.zarr")
    result = run.attribute(query(), by=("query",))
    with pytest.raises(StoreExistsError, match=r"run\.zarr exists already"):
        result.save(tmp_path / "run.zarr")
    run.verify()


def test_example_grads_sum_to_the_gradient(tmp_path):
    clipped = next(case for case in CASES if case.max_norm)
    run, _ = record(clipped, tmp_path / "run.zarr")
    for number in range(run.num_steps):
        gradients = run.example_grads(number)
        total = run.table.flatten_rows(gradients).sum(dim=0)
        assert len(next(iter(gradients.values()))) == len(np.unique(run.call_examples(number)))
        torch.testing.assert_close(total, run.flat_gradient(number), rtol=1e-10, atol=1e-14)


def test_every_groups_rate_is_in_the_history(tmp_path):
    grouped = next(case for case in CASES if case.name == "sgd-two-groups-schedule")
    run, _ = record(grouped, tmp_path / "run.zarr")
    np.testing.assert_allclose(run.history[["lr_0", "lr_1"]].iloc[0], [0.1, 0.2])


# ---------------------------------------------------------------------- batches that are fetched ahead


def fetched(path, loop, *, size=3):
    """Record a loop over batches of 3 and return each call's rows, by their true index in the data set."""
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    features, _ = data().tensors
    loader = DataLoader(data(), batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(2))

    def step(batches, change=lambda x: x):
        optimizer.zero_grad()
        for x, y in batches:
            F.cross_entropy(model(change(x)), y).backward()
        optimizer.step()

    with explaind.trace(model, optimizer, path) as recorder:
        loop(recorder.batches(loader), step)
    run = explaind.open_run(path, model=mlp())
    for number in range(run.num_steps):
        for call in run.calls(number):
            assert torch.equal(call.inputs["0"], features[torch.from_numpy(call.examples)])
    return run


def several_at_once(batches, step):
    for one in batches:
        step([one, *itertools.islice(batches, 1)])


def one_ahead(batches, step):
    previous = next(batches)
    for batch in batches:
        step([previous])
        previous = batch
    step([previous])


def listed(batches, step):
    for batch in list(batches):
        step([batch])


def some_left_out(batches, step):
    for number, batch in enumerate(batches):
        if number != 1:
            step([batch])


@pytest.mark.parametrize("loop", [several_at_once, one_ahead, listed, some_left_out])
def test_batches_fetched_ahead_keep_their_names(loop, tmp_path):
    run = fetched(tmp_path / "run.zarr", loop)
    assert len(run.examples) == (6 if loop is some_left_out else 9)


def test_batches_fetched_ahead_and_changed_are_refused(tmp_path):
    def loop(batches, step):
        for batch in list(batches):
            step([batch], change=lambda x: 2 * x)

    with pytest.raises(RecordingError, match=r"asked for a batch before a forward call.*recorder\.examples\(ids\)"):
        fetched(tmp_path / "run.zarr", loop)


def test_rows_in_another_order_than_the_batch_are_refused(tmp_path):
    def loop(batches, step):
        for batch in batches:
            step([batch], change=lambda x: x.flip(0))

    with pytest.raises(RecordingError, match="those of the batch in another order"):
        fetched(tmp_path / "run.zarr", loop)
