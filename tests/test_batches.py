"""Which example a row is: named by a loader or by hand, or told by its content."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

import explaind
from explaind.errors import RecordingError
from tests.cases import NUM_EXAMPLES, data, mlp
from tests.traced import FEATURES, LABELS, momentum_sgd, recorded, same, step_on

# ---------------------------------------------------------------------- loaders


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
    with explaind.trace(model, momentum_sgd(model), tmp_path / "run.zarr") as recorder:
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


# ---------------------------------------------------------------------- by hand, by content


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
