"""The store: bit-exact, always a readable prefix of whole steps, and clear about any damage."""

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
import zarr.storage._local
from torch.optim import SGD

import explaind
import explaind.recording.writer
import explaind.store
from explaind.errors import DamagedStoreError, RecordingError, StoreFormatError
from explaind.recording.writer import StoreWriter
from explaind.store import Commit, StoreReader
from tests.cases import CASES, chunks_of, data, mlp, query, record, train

BY_NAME = {case.name: case for case in CASES}


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


# ---------------------------------------------------------------------- killed writers


def check_prefix(path, *, most=None):
    """Open what a writer left; whole steps that replay exactly and close. Returns their number."""
    run = explaind.open_run(path, model=mlp())
    assert run.verify().bit_exact
    steps = None if most is None else range(max(0, run.num_steps - most), run.num_steps)
    run.attribute(query(num=1), by=("query", "step", "layer"), steps=steps).check()
    return run.num_steps


def fail_after(monkeypatch, allowed, error):
    """Let only so many files be written, `allowed[0]`: zarr writes the metadata, and chunks.py the chunks."""

    def limited(write):
        def call(*args, **kwargs):
            if allowed[0] <= 0:
                raise error
            allowed[0] -= 1
            return write(*args, **kwargs)

        return call

    monkeypatch.setattr(zarr.storage._local, "_put", limited(zarr.storage._local._put))
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
        if not published:
            with pytest.raises(StoreFormatError, match=r"has no commit\.json"):
                StoreReader(path)
            continue
        reader = StoreReader(path)
        assert reader.length("step") == published
        for name, values in rows.items():
            assert same_bits(reader.read(name), values[:published])
        if reader.commit.complete:
            return
    raise AssertionError("the writer never finished")


SERVER = """
import itertools, os, random, signal, sys
import torch
import torch.nn.functional as F
import explaind, explaind.recording.writer
from tests.cases import CASES, data, mlp

def train(path, flush_bytes, steps):
    explaind.recording.writer._BLOCK_BYTES = int(flush_bytes)
    case = next(case for case in CASES if case.name == "adamw-two-groups")
    model = mlp()
    optimizer = case.optimizer(model)
    features, labels = data().tensors
    with explaind.trace(model, optimizer, path):
        for number in range(int(steps)):
            rows = torch.tensor([number % 9, number * 5 % 9, number * 7 % 9])
            optimizer.zero_grad()
            F.cross_entropy(model(features[rows]), labels[rows]).backward()
            optimizer.step()

torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        train(*line.split())
        os._exit(0)
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def writers():
    """A process that forks writers on demand, so torch is imported once: `start(path, …)` gives a pid."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started = []

    def start(path, *, flush_bytes, steps):
        server.stdin.write(f"{path} {flush_bytes} {steps}\n")
        server.stdin.flush()
        started.append(int(server.stdout.readline()))
        return started[-1]

    yield start
    for child in started:
        kill(child)
    server.stdin.close()
    server.wait(timeout=30)
    server.stdout.close()


def is_running(child):
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def kill(child):
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    while is_running(child):
        time.sleep(0.001)


def published_steps(path):
    return Commit.read(path).num_steps if (path / "commit.json").exists() else 0


def wait_for(condition, child):
    while not condition():
        assert is_running(child), "the writer died"
        time.sleep(0.001)


@pytest.mark.parametrize("seed", range(20))
def test_a_killed_writer_leaves_whole_steps(seed, writers, tmp_path):
    chance = random.Random(seed)
    path = tmp_path / "run.zarr"
    child = writers(path, flush_bytes=chance.choice([1, 2_000, 8_000]), steps=10**6)
    wait_for(lambda: published_steps(path), child)
    time.sleep(chance.uniform(0, 0.1))
    kill(child)
    assert not explaind.open_run(path).complete
    assert check_prefix(path, most=20) >= 1


def test_a_writer_killed_before_its_first_block_leaves_nothing_to_open(writers, tmp_path):
    path = tmp_path / "run.zarr"
    child = writers(path, flush_bytes=10**9, steps=10**6)
    wait_for((path / "zarr.json").exists, child)
    kill(child)
    with pytest.raises(StoreFormatError, match="stopped before its first"):
        explaind.open_run(path)


def test_a_run_can_be_read_while_it_is_written(writers, tmp_path):
    path = tmp_path / "run.zarr"
    child = writers(path, flush_bytes=1, steps=20)
    wait_for(lambda: published_steps(path), child)
    polls, done = [], False
    while not done:
        done = not is_running(child)
        run = explaind.open_run(path, model=mlp())
        latest = range(max(0, run.num_steps - 2), run.num_steps)
        run.attribute(query(num=1), by=("query", "step", "layer"), steps=latest).check()
        polls.append((run.num_steps, run.complete, run.flat_params(run.num_steps)))
    assert polls[-1][:2] == (20, True)
    assert [steps for steps, _, _ in polls] == sorted(steps for steps, _, _ in polls)
    assert len({steps for steps, _, _ in polls}) >= 3
    whole = explaind.open_run(path)
    assert all(torch.equal(params, whole.flat_params(steps)) for steps, _, params in polls)
    assert check_prefix(path) == 20


def test_an_open_run_stays_as_it_was_opened(tmp_path):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    features, labels = data().tensors
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        for number in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
            if number == 2:
                recorder._rows._writer.flush()
                recorder._rows._writer.wait()
                early = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert early.num_steps == 2
    assert early.verify().bit_exact
    early.attribute(query(), by=("query", "example", "step")).check()
    with pytest.raises(IndexError, match="step 3 is not between 0 and 2"):
        early.params(3)


# ---------------------------------------------------------------------- damage


def with_buffer():
    model = mlp()
    model.register_buffer("scale", torch.ones(2))
    return model


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run whose chunks hold few rows each."""
    path = tmp_path_factory.mktemp("intact") / "run.zarr"
    case, model = BY_NAME["adamw-schedule"], with_buffer()
    optimizer = case.optimizer(model)
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, 500)
        with explaind.trace(model, optimizer, path) as recorder:
            train(case, model, recorder, optimizer)
    return path


@pytest.fixture
def damaged(intact, tmp_path):
    return Path(shutil.copytree(intact, tmp_path / "run.zarr"))


def use_everything(path):
    run = explaind.open_run(path, model=with_buffer())
    _ = run.history
    run.verify()
    run.attribute(query(num=1), by=("query", "example", "step"))


def chunks(path, name):
    return sorted(
        (file for file in (path / name / "c").rglob("*") if file.is_file()),
        key=lambda file: int(file.relative_to(path / name / "c").parts[0]),
    )


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-7])


def empty(file):
    file.write_bytes(b"")


DAMAGE = {
    flip: "a chunk is damaged",
    truncate: "a chunk is damaged",
    empty: "a chunk is damaged",
    Path.unlink: "a chunk is missing",
}


@pytest.mark.parametrize("harm", DAMAGE)
@pytest.mark.parametrize(
    "name, dimension", [("params", "snapshot"), ("gradient", "step"), ("state/exp_avg", "snapshot")]
)
def test_a_damaged_chunk_is_named_with_its_steps(name, dimension, harm, damaged):
    rows = zarr.open_group(damaged, mode="r")[name].chunks[0]
    assert len(chunks(damaged, name)) >= 3
    harm(chunks(damaged, name)[1])
    run = explaind.open_run(damaged, model=with_buffer())
    message = f"{DAMAGE[harm]}: '{name}', {dimension} {rows} to {2 * rows - 1}"
    with pytest.raises(DamagedStoreError, match=message):
        run.verify()
    assert run.params(0)["0.weight"].isfinite().all()


def test_damage_is_found_in_every_array(intact, damaged):
    names = sorted(str(file.parent.relative_to(intact)) for file in intact.rglob("zarr.json"))
    arrays = [name for name in names if chunks(intact, name)]
    assert {"params", "gradient", "row_example", "inputs/0", "state_scalar/step"} <= set(arrays)
    use_everything(damaged)
    overlooked = []
    for name in arrays:
        file = chunks(damaged, name)[0]
        content = file.read_bytes()
        flip(file)
        try:
            use_everything(damaged)
            overlooked.append(name)
        except DamagedStoreError as error:
            assert f"'{name}'" in str(error)
        file.write_bytes(content)
    assert overlooked == []


def test_a_missing_array_is_named(intact, tmp_path):
    names = sorted(str(file.parent.relative_to(intact)) for file in intact.rglob("zarr.json"))
    overlooked = {}
    for number, name in enumerate(name for name in names if chunks(intact, name)):
        path = Path(shutil.copytree(intact, tmp_path / f"{number}.zarr"))
        shutil.rmtree(path / name)
        try:
            use_everything(path)
            overlooked[name] = "nothing was raised"
        except Exception as error:
            if not (isinstance(error, DamagedStoreError) and f"'{name}'" in str(error)):
                overlooked[name] = repr(error)
    assert overlooked == {}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"lengths": 3, "complete": true}', '"\\u0000"'])
def test_a_garbled_commit_is_named(content, damaged):
    (damaged / "commit.json").write_text(content)
    with pytest.raises(DamagedStoreError, match=r"commit\.json cannot be read"):
        explaind.open_run(damaged)


def test_a_commit_of_raw_bytes_is_named(damaged):
    (damaged / "commit.json").write_bytes(b"\xff\xfe\x00garbage")
    with pytest.raises(DamagedStoreError, match=r"commit\.json cannot be read"):
        explaind.open_run(damaged)


def test_a_commit_that_promises_more_than_there_is_is_damage(damaged):
    commit = json.loads((damaged / "commit.json").read_text())
    commit["lengths"] = {name: 10 * length for name, length in commit["lengths"].items()}
    (damaged / "commit.json").write_text(json.dumps(commit))
    with pytest.raises(DamagedStoreError):
        use_everything(damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null"])
def test_garbled_metadata_of_the_run_is_damage(content, damaged):
    (damaged / "zarr.json").write_text(content)
    with pytest.raises(DamagedStoreError, match=r"run\.zarr"):
        explaind.open_run(damaged)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_garbled_metadata_of_an_array_is_damage(content, damaged):
    (damaged / "params" / "zarr.json").write_text(content)
    with pytest.raises(DamagedStoreError, match="'params'"):
        explaind.open_run(damaged).params(0)


def test_missing_attributes_are_damage(damaged):
    metadata = json.loads((damaged / "zarr.json").read_text())
    del metadata["attributes"]["parameters"]
    (damaged / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(DamagedStoreError, match=r"attributes of .* are incomplete.*parameters"):
        explaind.open_run(damaged)


@pytest.mark.parametrize("version", [explaind.store.FORMAT_VERSION + 1, 99])
def test_a_newer_format_is_refused(version, damaged):
    metadata = json.loads((damaged / "zarr.json").read_text())
    metadata["attributes"]["explaind_format"] = version
    (damaged / "zarr.json").write_text(json.dumps(metadata))
    message = f"has format {version}, this version of explaind reads formats up to 2"
    with pytest.raises(StoreFormatError, match=message):
        explaind.open_run(damaged)


# ---------------------------------------------------------------------- no room


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


def test_other_disk_errors_are_passed_on(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "run.zarr", attributes={}, overwrite=False)
    writer.add(("loss", np.zeros(3), ("step",)))
    fail_after(monkeypatch, [0], OSError(errno.EIO, "Input/output error"))
    writer.flush()
    with pytest.raises(OSError, match="Input/output error"):
        writer.wait()
