"""Stores written by earlier versions stay readable, and give the same numbers."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch import nn

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
