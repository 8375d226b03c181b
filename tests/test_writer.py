"""Writing in the background: what goes wrong there reaches the loop, and what goes well loses nothing."""

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch.optim import SGD, AdamW

import explaind
from explaind.checksums import checksum
from explaind.errors import RecordingError
from explaind.recording import chunks, writer
from explaind.recording.chunks import GrowingArray, rows_of_a_chunk
from explaind.recording.writer import Later, StoreWriter
from explaind.store import StoreReader
from tests.cases import chunks_of, data, mlp

FEATURES, LABELS = data().tensors


def step_on(model, optimizer, start=0):
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
    optimizer.step()


def make():
    model = mlp()
    return model, AdamW(model.parameters(), lr=0.05)


def weights(model):
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def before_each_block(monkeypatch, action):
    """Write a block at every step, and do something in the writer's thread before each; returns how many there were."""
    publish, done = StoreWriter._publish, []

    def watched(self):
        done.append(threading.current_thread())
        action(len(done))
        publish(self)

    monkeypatch.setattr(StoreWriter, "_publish", watched)
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", 10.0)  # also where publishing is slow
    return done


@pytest.fixture
def writers_alive():
    before = set(threading.enumerate())
    return lambda: [t for t in set(threading.enumerate()) - before if t.name.startswith("explaind-writer")]


@pytest.mark.parametrize("failure", [OSError(5, "Input/output error"), MemoryError("no memory"), SystemExit("killed")])
def test_a_failure_in_the_background_stops_the_loop_at_one_of_the_next_steps(
    failure, writers_alive, tmp_path, monkeypatch
):
    def fail(block):
        if block == 4:
            raise failure

    before_each_block(monkeypatch, fail)
    model, optimizer = make()
    made = 0
    with pytest.raises(type(failure), match=str(failure.args[-1])), explaind.trace(model, optimizer, tmp_path / "run"):
        while made < 10:
            step_on(model, optimizer)
            made += 1
    assert made in (3, 4)  # the fourth block is handed over as the third step begins
    assert not writers_alive()
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert not run.complete
    assert run.num_steps >= 1
    assert run.verify().bit_exact


def test_a_failure_in_the_last_block_is_raised_at_the_end(writers_alive, tmp_path, monkeypatch):
    def fail(block):
        if block == 2:  # the first is the empty one of the beginning
            raise OSError(5, "Input/output error")

    before_each_block(monkeypatch, fail)
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1 << 40)
    model, optimizer = make()
    with pytest.raises(OSError, match="Input/output"), explaind.trace(model, optimizer, tmp_path / "run"):
        step_on(model, optimizer)
    assert not writers_alive()


def test_an_error_of_the_loop_and_one_of_the_writer_are_both_told(tmp_path, monkeypatch):
    def fail(block):
        if block == 2:
            raise OSError(5, "Input/output error")

    before_each_block(monkeypatch, fail)
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1 << 40)
    model, optimizer = make()
    with pytest.raises(OSError, match="Input/output") as caught, explaind.trace(model, optimizer, tmp_path / "run"):
        step_on(model, optimizer)
        raise ZeroDivisionError
    assert isinstance(caught.value.__context__, ZeroDivisionError)


def test_a_store_that_is_deleted_meanwhile_is_said_to_be_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", math.inf)
    model, optimizer = make()
    with (
        pytest.raises(RecordingError, match=r"run was deleted or moved while it was recorded"),
        explaind.trace(model, optimizer, tmp_path / "run") as recorder,
    ):
        for number in range(10):
            if number == 3:
                recorder._rows._writer.wait()
                (tmp_path / "run").rename(tmp_path / "moved")
            step_on(model, optimizer)
    assert not (tmp_path / "run").exists()
    assert explaind.open_run(tmp_path / "moved", model=mlp()).num_steps >= 1


def test_a_slow_writer_is_waited_for_and_holds_two_blocks_at_most(tmp_path, monkeypatch):
    threads = before_each_block(monkeypatch, lambda block: time.sleep(0.01))
    plain, optimizer = make()
    for number in range(20):
        step_on(plain, optimizer, number % 7)
    model, optimizer = make()
    held = []
    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        for number in range(20):
            step_on(model, optimizer, number % 7)
            held.append(len(recorder._rows._writer._blocks))
    assert max(held) == 2
    assert len(threads) >= 20
    assert len({thread.ident for thread in threads}) == 1
    assert threading.main_thread() not in threads
    assert torch.equal(weights(model), weights(plain))
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert run.complete
    assert run.num_steps == 20
    assert run.verify().bit_exact


def test_an_interrupt_while_the_loop_waits_for_the_writer_loses_no_step(tmp_path, monkeypatch):
    wait, calls = StoreWriter.wait, []

    def interrupted(self):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        wait(self)

    before_each_block(monkeypatch, lambda block: time.sleep(0.01))
    monkeypatch.setattr(StoreWriter, "wait", interrupted)
    model, optimizer = make()
    finished = 0
    with pytest.raises(KeyboardInterrupt), explaind.trace(model, optimizer, tmp_path / "run"):
        while True:
            step_on(model, optimizer)
            finished += 1
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert run.complete
    assert run.num_steps == finished
    assert run.verify().bit_exact


@pytest.mark.parametrize("cheap_seconds", [1e9, 0.0], ids=["published at once", "postponed"])
def test_nothing_is_lost_if_the_interpreter_ends_within_the_block(cheap_seconds, tmp_path):
    code = f"""
import torch, explaind
from explaind.recording import writer
from tests.test_writer import make, step_on
writer._BLOCK_BYTES, writer._CHEAP_SECONDS, writer._SHARE = 1, {cheap_seconds}, 1e-9
model, optimizer = make()
recorder = explaind.trace(model, optimizer, {str(tmp_path / "run")!r}).__enter__()
for number in range(5):
    step_on(model, optimizer)
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    run = explaind.open_run(tmp_path / "run", model=mlp())
    assert run.num_steps == 3  # the fifth step began with handing over four snapshots
    assert run.verify().bit_exact


def test_rows_are_made_in_the_writers_thread_and_in_order(tmp_path):
    made = []

    def make_rows(value):
        made.append((value, threading.current_thread()))
        return [("loss", np.array([value]), ("step",))]

    store = StoreWriter(tmp_path / "run", attributes={}, overwrite=False)
    store.add(Later(lambda: make_rows(1.0), 8), ("loss", np.array([2.0]), ("step",)), Later(lambda: make_rows(3.0), 8))
    assert made == []
    store.close()
    assert StoreReader(tmp_path / "run").read("loss").tolist() == [1.0, 2.0, 3.0]
    assert [value for value, _ in made] == [1.0, 3.0]
    assert all(thread is not threading.main_thread() for _, thread in made)


def test_only_what_all_arrays_of_a_dimension_have_is_published(tmp_path):
    store = StoreWriter(tmp_path / "run", attributes={}, overwrite=False)
    store.add(("loss", np.zeros(3), ("step",)), ("gradient", np.zeros((2, 4)), ("step", "element")))
    store.close()
    assert StoreReader(tmp_path / "run").length("step") == 2


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool", "uint8"])
@pytest.mark.parametrize("shape", [(), (5,), (3, 2)])
@pytest.mark.parametrize("gathered_bytes", [0, 1 << 20])
def test_chunks_are_those_that_zarr_writes(gathered_bytes, dtype, shape, tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "_LEAST_BYTES", gathered_bytes)
    rows = np.random.default_rng(0).integers(0, 2, (7, *shape)).astype(dtype)
    dims = tuple("abc"[: rows.ndim])
    zarr.create_group(tmp_path)
    array = GrowingArray(tmp_path, "own", dims, rows, 3)
    for parts in ([rows[:2]], [rows[2:2]], [rows[2:3], rows[3:7]]):
        array.append(*parts)
    array.settle()
    array.trim()
    own = zarr.open_array(tmp_path, path="own", mode="r")
    other = zarr.create_array(
        tmp_path,
        name="other",
        shape=rows.shape,
        chunks=own.chunks,
        dtype=rows.dtype,
        filters=own.filters,
        compressors=own.compressors,
        fill_value=own.fill_value,
        config={"write_empty_chunks": True},
    )
    other[:] = rows
    metadata = [json.loads((tmp_path / name / "zarr.json").read_text()) for name in ("own", "other")]
    assert metadata[0]["attributes"].pop("checksum") == checksum(
        {k: metadata[0][k] for k in metadata[0].keys() - {"attributes"}}
    )
    assert metadata[0] == metadata[1] | {"dimension_names": list(dims)}
    written = {name: sorted((tmp_path / name / "c").rglob("*")) for name in ("own", "other")}
    for one, two in zip(*written.values(), strict=True):
        assert one.relative_to(tmp_path / "own") == two.relative_to(tmp_path / "other")
        assert one.is_dir() or one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    "num_rows, row_bytes, expected", [(3, 400, 1), (4, 400, 2), (5, 1000, 1), (12, 300, 3), (1, 10, 25), (9, 1, 40)]
)
def test_large_blocks_fill_whole_chunks_and_small_ones_share_one(num_rows, row_bytes, expected, monkeypatch):
    chunks_of(monkeypatch, 1000)
    monkeypatch.setattr(chunks, "_LEAST_BYTES", 250)
    monkeypatch.setattr(chunks, "_LARGEST_ROWS", 40)
    assert rows_of_a_chunk(np.zeros((1, row_bytes), np.uint8), num_rows) == expected


def test_a_loop_without_momentum_and_with_many_blocks_is_inert(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    results = []
    for traced in (False, True):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.1)
        if traced:
            with explaind.trace(model, optimizer, tmp_path / "run"):
                for start in range(6):
                    step_on(model, optimizer, start)
        else:
            for start in range(6):
                step_on(model, optimizer, start)
        results.append(weights(model))
    assert torch.equal(*results)
