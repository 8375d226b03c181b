"""The store gives back every bit, and keeps whole rows where writing fails."""

import errno
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from torch.optim import SGD

import explaind
import explaind.recording.writer
import explaind.store
from explaind.errors import DamagedStoreError, RecordingError
from explaind.recording.writer import StoreWriter
from explaind.store import StoreReader
from tests.cases import BY_NAME, chunks_of, data, mlp, query, record
from tests.traced import check_prefix


def same_bits(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


# ---------------------------------------------------------------------- round trip


def awkward(dtype, shape, seed):
    """Random bit patterns of a type: NaN payloads, infinities, denormals and negative zeros among them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
    if dtype == np.bool_:
        raw &= 1
    return raw.view(dtype).reshape(shape)


COLUMNS = {
    "params": (np.float64, (5,)),
    "state/exp_avg": (np.float32, (5,)),
    "row_example": (np.int64, ()),
    "updated": (np.bool_, (3,)),
    "rng_state": (np.uint8, (100,)),
    "inputs/0": (np.float32, (2, 3, 2)),
    "empty": (np.float64, (2, 0)),
}


@pytest.mark.parametrize("chunk_bytes", [1, 100, 2 << 20])
@pytest.mark.parametrize("name", COLUMNS)
def test_every_array_comes_back_bit_for_bit(name, chunk_bytes, tmp_path, monkeypatch):
    chunks_of(monkeypatch, chunk_bytes)
    monkeypatch.setattr(explaind.recording.writer, "_CHEAP_SECONDS", 10.0)  # also where publishing is slow
    dtype, shape = COLUMNS[name]
    dims = ("row", *(f"axis_{i}" for i in range(len(shape))))
    writer = StoreWriter(tmp_path / "run.zarr", attributes={}, overwrite=False)
    blocks = [awkward(dtype, (rows, *shape), rows) for rows in (1, 3, 0, 2, 7)]
    for block in blocks:
        writer.add((name, block, dims))
        writer.flush()
    writer.wait()
    whole = np.concatenate(blocks)
    growing = StoreReader(tmp_path / "run.zarr")
    assert not growing.commit.complete
    assert same_bits(growing.read(name), whole)
    writer.close()
    reader = StoreReader(tmp_path / "run.zarr")
    assert reader.commit.complete
    assert reader.length("row") == 13
    for start, stop in [(0, 13), (0, 0), (13, 13), (4, 5), (2, 11), (12, 13)]:
        assert same_bits(reader.read(name, start, stop), whole[start:stop])
    with pytest.raises(IndexError, match="rows 0:14"):
        reader.read(name, 0, 14)


def test_other_zarr_readers_see_the_same_arrays(tmp_path):
    run, model = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    group = zarr.open_group(tmp_path / "run.zarr", mode="r")
    assert group["params"].metadata.dimension_names == ("snapshot", "element")
    assert group["params"].shape[0] == run.num_steps + 1
    last = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    np.testing.assert_array_equal(group["params"][-1], last)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_parameters_of_every_type_come_back_bit_for_bit(dtype, tmp_path):
    model = mlp(dtype=dtype)
    optimizer = SGD(model.parameters(), lr=0.2, momentum=0.9)
    features, labels = data(dtype).tensors
    seen, buffers = [], []
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for start in (0, 3, 6):
            optimizer.zero_grad()
            F.cross_entropy(model(features[start : start + 3]), labels[start : start + 3]).backward()
            optimizer.step()
            seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
            buffers.append(optimizer.state[model[0].weight]["momentum_buffer"].clone())
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp(dtype=dtype))
    for step, params in enumerate(seen):
        for name, tensor in run.params(step + 1).items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, params[name])
        assert torch.equal(run.state(step + 1)["0.weight"]["momentum_buffer"], buffers[step])
    assert run.verify().bit_exact
    run.attribute(query(dtype), by=("query", "example", "step")).check()


@pytest.mark.parametrize("num_rows", [3, 4, 7, 8, 9])
def test_a_chunk_of_an_earlier_moment_is_not_taken_for_the_last_one(num_rows, tmp_path, monkeypatch):
    chunks_of(monkeypatch, 4 * 8)
    path = tmp_path / "run.zarr"
    writer = StoreWriter(path, attributes={}, overwrite=False)
    writer.add(("row_input", np.arange(1, num_rows), ("row",)))
    writer.flush()
    writer.wait()
    file = path / "row_input" / "c" / str((num_rows - 1) // 4)
    earlier = file.read_bytes() if file.exists() else None
    writer.add(("row_input", np.array([num_rows]), ("row",)))
    writer.close()
    assert StoreReader(path).read("row_input").tolist() == list(range(1, num_rows + 1))
    if earlier is None:
        file.unlink()
    else:
        file.write_bytes(earlier)
    with pytest.raises(DamagedStoreError, match=r"a chunk is (missing|not that of the commit): 'row_input', row"):
        StoreReader(path).read("row_input")


# ---------------------------------------------------------------------- writing that fails


def fail_after(monkeypatch, allowed, error):
    """Let only so many files be written, `allowed[0]`."""

    def limited(write):
        def call(*args, **kwargs):
            if allowed[0] <= 0:
                raise error
            allowed[0] -= 1
            return write(*args, **kwargs)

        return call

    monkeypatch.setattr(os, "replace", limited(os.replace))


def test_a_writer_killed_between_any_two_files_leaves_the_last_published_rows(tmp_path, monkeypatch):
    chunks_of(monkeypatch, 80)
    allowed = [0]
    fail_after(monkeypatch, allowed, RuntimeError("killed"))
    rows = {"params": awkward(np.float64, (60, 5), 1), "loss": awkward(np.float64, (60,), 2)}
    for kill_after in range(1, 150):
        path = tmp_path / f"{kill_after}.zarr"
        allowed[0] = 10**9
        writer = StoreWriter(path, attributes={}, overwrite=False)
        allowed[0] = kill_after
        published = 0
        try:
            for start, stop in [(0, 3), (3, 4), (4, 11), (11, 12)]:
                writer.add(("params", rows["params"][start:stop], ("step", "element")))
                writer.add(("loss", rows["loss"][start:stop], ("step",)))
                writer.flush()
                writer.wait()
                published = stop
            writer.close()
        except RuntimeError:
            pass
        reader = StoreReader(path)
        assert reader.length("step") == published
        assert all(reader.has(name) for name in rows) == bool(published)
        for name, values in rows.items() if published else ():
            assert same_bits(reader.read(name), values[:published])
        if reader.commit.complete:
            return
    raise AssertionError("the writer never finished")


@pytest.mark.parametrize("files", [20, 33, 47])
def test_a_full_disk_loses_nothing_recorded_so_far(files, tmp_path, monkeypatch):
    """The disk takes the first published step and then this many files."""
    room = [10**9]
    fail_after(monkeypatch, room, OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(explaind.recording.writer, "_BLOCK_BYTES", 1)
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    features, labels = data().tensors
    message = r"no room left on the disk for .*run\.zarr.*The first \d+ steps are safe"
    with (
        pytest.raises(RecordingError, match=message) as caught,
        explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder,
    ):
        for number in range(50):
            if number == 3:
                recorder._rows._writer.wait()
                room[0] = files
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
    safe = check_prefix(tmp_path / "run.zarr")
    assert safe >= 1
    assert f"The first {safe} steps are safe" in str(caught.value)


def test_other_disk_errors_are_told_with_what_is_safe(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "run.zarr", attributes={}, overwrite=False)
    writer.add(("loss", np.zeros(3), ("step",)))
    fail_after(monkeypatch, [0], OSError(errno.EIO, "Input/output error"))
    writer.flush()
    message = r"run\.zarr cannot be written any more: .*Input/output error.* The first 0 steps are safe there"
    with pytest.raises(RecordingError, match=message):
        writer.wait()
