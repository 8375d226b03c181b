"""Results that are written to a store while they are computed."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr

import explaind
from explaind import stream
from explaind.errors import ClosureError, StoreExistsError, StoreFormatError
from tests.cases import CASES, query, record

FULL = ("query", "example", "step", "parameter")
RULE = explaind.quadrature.gauss_legendre(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(CASES[1], tmp_path_factory.mktemp("run") / "run.zarr")[0]


@pytest.mark.parametrize(
    "by",
    [
        FULL,
        (),
        ("query",),
        ("example",),
        ("query", "step"),
        ("query", "example", "layer"),
        ("query", "example", "update_step", "layer"),
    ],
    ids=str,
)
def test_the_store_has_what_the_result_in_memory_has(run, by, tmp_path):
    expected = run.attribute(query(), by=by, quadrature=RULE)
    stored = run.attribute(query(), by=by, quadrature=RULE, out=tmp_path / "result.zarr")
    xr.testing.assert_identical(stored.dataset.load(), expected.dataset)
    assert explaind.Attribution.open(tmp_path / "result.zarr").check(tolerance=1).error <= 1e-12
    assert [path.name for path in tmp_path.iterdir()] == ["result.zarr"]


@pytest.mark.parametrize("num_bytes", [8, 100, 300, 2000])
def test_chunks_of_any_size_hold_the_same(run, num_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", num_bytes)
    expected = run.attribute(query(), by=FULL, quadrature=RULE)
    stored = run.attribute(query(), by=FULL, quadrature=RULE, out=tmp_path / "result.zarr")
    shape = zarr.open_array(tmp_path / "result.zarr", path="contribution").chunks
    assert 8 * np.prod(shape) <= num_bytes
    assert stored.closure.error <= 1e-12
    pd.testing.assert_frame_equal(stored.top(2), expected.top(2))
    xr.testing.assert_identical(stored.dataset.load(), expected.dataset)


def test_groups_and_names_are_kept(run, tmp_path):
    labels = {int(example): "odd" if example % 2 else "even" for example in run.examples}
    stored = run.attribute(query(), by=("query", "group"), groups=labels, out=tmp_path / "result.zarr")
    assert stored.dataset.group.values.tolist() == ["even", "odd"]
    assert stored.dataset.attrs["optimizer"] == run.optimizer


def test_nothing_is_computed_where_something_is_already(run, tmp_path, monkeypatch):
    monkeypatch.setattr(explaind.Query, "call", property(lambda self: pytest.fail("computed")))
    (tmp_path / "result.zarr").mkdir()
    with pytest.raises(StoreExistsError, match="exists already; save the result somewhere else"):
        run.attribute(None, by=FULL, out=tmp_path / "result.zarr")
    (tmp_path / "other.zarr.partial").mkdir()
    with pytest.raises(StoreExistsError, match="is being written, or its writer was killed"):
        run.attribute(None, by=FULL, out=tmp_path / "other.zarr")


def test_nothing_is_left_of_a_result_that_failed(run, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("no space left on the device")

    monkeypatch.setattr(stream.Stored, "_write", fail)
    with pytest.raises(OSError, match="no space left"):
        run.attribute(query(), by=FULL, quadrature=RULE, out=tmp_path / "result.zarr")
    assert list(tmp_path.iterdir()) == []


def test_a_result_whose_writer_was_killed_is_not_taken_for_a_whole_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stream.shutil, "rmtree", lambda *args, **kwargs: None)
    monkeypatch.setattr(stream.Stored, "finish", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.attribute(query(), by=FULL, quadrature=RULE, out=tmp_path / "result.zarr")
    for path in (tmp_path / "result.zarr.partial", tmp_path / "result.zarr"):
        with pytest.raises(StoreFormatError, match="is not a stored result"):
            explaind.Attribution.open(path)


def test_the_closure_is_that_of_what_is_stored(run, tmp_path):
    path = tmp_path / "result.zarr"
    run.attribute(query(), by=FULL, quadrature=RULE, out=path).check(tolerance=1)
    chunk = next(file for file in (path / "contribution" / "c").rglob("*") if file.is_file())
    chunk.unlink()  # a lost chunk reads as NaN
    with pytest.raises(ClosureError, match="does not close: sum of terms differs from the prediction by nan"):
        explaind.Attribution.open(path).check()


def test_looking_at_a_stored_result_reads_no_terms(run, tmp_path, monkeypatch):
    stored = run.attribute(query(), by=FULL, quadrature=RULE, out=tmp_path / "result.zarr")
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda *args: pytest.fail("read"))
    assert "check() reads it whole" in repr(stored)


def test_a_result_of_an_optimizer_without_a_rule_is_stored_too(tmp_path, monkeypatch):
    case = CASES[0]
    run, _ = record(case, tmp_path / "run.zarr")
    monkeypatch.setattr(type(run), "rules", [None])
    stored = run.attribute(query(), by=("query", "step", "layer"), out=tmp_path / "result.zarr")
    assert stored.check().error <= 1e-12
