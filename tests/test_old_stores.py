"""Stores written by earlier versions stay readable, and give the same numbers."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import explaind
from tests.cases import data

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def format_1(tmp_path_factory):
    """AdamW with clipping on a network with BatchNorm, two batches an epoch for three epochs, ids by hand."""
    directory = tmp_path_factory.mktemp("stores")
    with zipfile.ZipFile(DATA / "format-1.zarr.zip") as archive:
        archive.extractall(directory)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return explaind.open_run(directory / "format-1.zarr", model=model)


def test_a_store_of_format_1_is_replayed(format_1):
    report = format_1.verify()
    assert format_1.num_steps == 6
    assert report.exact_updates == 6
    assert report.largest_gradient_difference < 1e-12


def test_a_store_of_format_1_gives_the_prediction_it_gave(format_1):
    query = explaind.Query(data().tensors[0][:2], output=explaind.outputs.logit([0, 1]))
    result = format_1.attribute(query, by=("query", "example", "step", "layer"))
    assert result.check().other < 1e-9
    np.testing.assert_allclose(result.dataset.prediction, [-0.3671207420858626, -0.7149056882765794], rtol=1e-12)
    assert list(result.dataset.example.values) == list(range(9))
