"""Stores that were written in each version of the format stay readable, and give the same numbers."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import explaind
from tests.cases import data

DATA = Path(__file__).parent / "data"
INPUTS = data().tensors[0]
QUERY = {"output": explaind.outputs.logit([0, 1])}
AXES = ("query", "example", "step", "layer")


def opened(name, model, directory):
    with zipfile.ZipFile(DATA / f"{name}.zip") as archive:
        archive.extractall(directory)
    return explaind.open_run(directory / name, model=model)


@pytest.fixture(scope="module")
def format_1(tmp_path_factory):
    """AdamW with clipping on a network with BatchNorm, two batches an epoch for three epochs, ids by hand."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return opened("format-1.zarr", model, tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="module")
def format_2(tmp_path_factory):
    """The same in float32, with dropout and weight decay."""
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.25), nn.Linear(4, 3))
    return opened("format-2.zarr", model, tmp_path_factory.mktemp("stores"))


def test_a_store_of_format_1_is_replayed(format_1):
    report = format_1.verify()
    assert format_1.num_steps == 6
    assert report.exact_updates == 6
    assert report.largest_gradient_difference < 1e-12


def test_a_store_of_format_1_gives_the_prediction_it_gave(format_1):
    result = format_1.attribute(explaind.Query(INPUTS[:2], **QUERY), by=AXES)
    assert result.check().other < 1e-9
    np.testing.assert_allclose(result.dataset.prediction, [-0.3671207420858626, -0.7149056882765794], rtol=1e-12)
    assert list(result.dataset.example.values) == list(range(9))


def test_a_store_of_format_2_is_replayed(format_2):
    report = format_2.verify()
    assert format_2.num_steps == 6
    assert report.largest_gradient_difference < 1e-6
    assert report.largest_update_difference < 1e-7  # bit for bit only on a processor like that of the recording


def test_a_store_of_format_2_gives_the_numbers_it_gave(format_2):
    result = format_2.attribute(explaind.Query(INPUTS[:2].float(), **QUERY), by=AXES)
    result.check()
    np.testing.assert_allclose(result.dataset.prediction, [-0.007343529128109892, -0.33410476875289274], rtol=1e-6)
    np.testing.assert_allclose(abs(result.dataset.contribution).sum(), 3.335696209143862, rtol=1e-4)


def format_3_model():
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.25), nn.Linear(4, 3))


@pytest.fixture(scope="module")
def format_3(tmp_path_factory):
    """The same with a ReLU and a schedule, checksums, and points from which the loop can go on."""
    return opened("format-3.zarr", format_3_model(), tmp_path_factory.mktemp("stores"))


def test_a_store_of_format_3_is_replayed(format_3):
    report = format_3.verify()
    assert format_3.num_steps == 6
    assert report.largest_gradient_difference < 1e-6
    assert report.largest_update_difference < 1e-7
    assert format_3.history.lr.tolist() == [0.05] * 4 + [0.025] * 2
    np.testing.assert_allclose(format_3.history.loss.iloc[0], 1.3550174236297607, rtol=1e-6)


def test_a_store_of_format_3_gives_the_numbers_it_gave(format_3):
    result = format_3.attribute(explaind.Query(INPUTS[:2].float(), **QUERY), by=AXES)
    result.check()
    np.testing.assert_allclose(result.dataset.prediction, [-0.6421738604950304, 0.026763974072723185], rtol=1e-6)
    np.testing.assert_allclose(abs(result.dataset.contribution).sum(), 3.124736859841505, rtol=1e-4)


def test_a_store_of_format_3_is_resumed(format_3, tmp_path):
    path = shutil.copytree(format_3.path, tmp_path / "run.zarr")
    features, labels = data().tensors
    rows = TensorDataset(features.float(), labels)
    loader = DataLoader(rows, batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))
    model = format_3_model()
    optimizer = AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    scheduler = StepLR(optimizer, 2, 0.5)
    with explaind.trace(model, optimizer, path, resume=True) as recorder:
        recorder.keep(scheduler)
        assert recorder.restore() == 6
        for _ in range(4):
            for batch, targets in recorder.batches(loader):
                optimizer.zero_grad()
                F.cross_entropy(model(batch), targets).backward()
                optimizer.step()
            scheduler.step()
    run = explaind.open_run(path, model=format_3_model())
    assert run.num_steps == 8
    assert all(run.flat_params(step).equal(format_3.flat_params(step)) for step in range(7))
    run.attribute(explaind.Query(INPUTS[:2].float(), **QUERY), by=AXES).check()
