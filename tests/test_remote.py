"""Runs in object storage: in memory, and in a local server that speaks S3 if its packages are installed."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

import explaind
from explaind.cli import main
from explaind.commit import Commit
from explaind.errors import (
    DamagedStoreError,
    ModelMismatchError,
    RecordingError,
    StoreExistsError,
    StoreFormatError,
    StoreUnreachableError,
)
from explaind.places import place_of
from explaind.recording import uploads, writer
from explaind.remote import RemotePath
from explaind.store import StoreReader
from tests.cases import BY_NAME, chunks_of, mlp, query, record
from tests.traced import change_commit, check_prefix, momentum_sgd, recorded, step_on, three_steps
from tests.unfreezing import refused, unfreeze

CASE = BY_NAME["adamw-schedule"]
NO_SERVER = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server of this process, as `s3://bucket`."""
    if NO_SERVER:
        pytest.skip(f"not installed: {', '.join(NO_SERVER)} (pip install s3fs 'moto[s3,server]')")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("AWS_ACCESS_KEY_ID", "key")
        patched.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fsspec.filesystem("s3").mkdir("s3://bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, tmp_path):
    """Where nothing is yet."""
    if request.param == "memory":
        return f"memory://{tmp_path.name}/run.zarr"
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}/run.zarr"


@pytest.fixture
def memory(tmp_path):
    return f"memory://{tmp_path.name}/run.zarr"


def same_numbers(one, other):
    one, other = StoreReader(place_of(one)), StoreReader(place_of(other))
    assert one.commit.lengths == other.commit.lengths
    assert one.commit.arrays == other.commit.arrays
    return all(np.array_equal(one.read(name), other.read(name), equal_nan=True) for name in one.commit.arrays)


def names(url):
    return dict(RemotePath(url).sizes())


def copy_to(url, directory):
    RemotePath(url).upload(directory, last=())


def write(url, content):
    fsspec.filesystem(url.partition(":")[0]).pipe_file(url, content)


# ---------------------------------------------------------------------- all of a run


def test_a_run_that_is_recorded_to_a_url_is_the_one_that_is_recorded_to_a_directory(url, tmp_path):
    here, _ = record(CASE, tmp_path / "run.zarr")
    there, _ = record(CASE, url)
    assert str(there.path) == url
    assert same_numbers(url, here.path)
    assert there.verify().bit_exact
    assert all(
        np.array_equal(one, other) for one, other in zip(there.params(3).values(), here.params(3).values(), strict=True)
    )
    assert there.history.equals(here.history)
    assert url in repr(there)
    result = there.attribute(query(), by=("query", "example", "step"))
    result.check()
    xr.testing.assert_equal(result.dataset, here.attribute(query(), by=("query", "example", "step")).dataset)


def test_what_a_run_takes_in_object_storage_is_what_it_takes_in_a_directory(url, tmp_path):
    record(CASE, tmp_path / "run.zarr")
    copy_to(url, tmp_path / "run.zarr")
    here, there = (explaind.open_run(path).info() for path in (tmp_path / "run.zarr", url))
    assert there.path == url
    assert (there.arrays, there.metadata_bytes, there.leftovers) == (here.arrays, here.metadata_bytes, ())


def test_runs_are_exported_to_urls_and_from_them(url, tmp_path):
    run, _ = record(CASE, tmp_path / "run.zarr")
    run.export(url)
    there = explaind.open_run(url, model=mlp())
    assert there.verify().bit_exact
    there.export(tmp_path / "back.zarr")
    assert same_numbers(tmp_path / "back.zarr", url)
    there.export(f"{url}-part", steps=slice(2, 5), every=2)
    part = explaind.open_run(f"{url}-part", model=mlp())
    assert part.verify().bit_exact
    assert part.metadata["exported_from"] == {"run": "run.zarr", "steps": [2, 5]}
    with pytest.raises(StoreExistsError, match="exists already"):
        run.export(url)


def test_an_export_that_fails_leaves_nothing(memory, tmp_path, monkeypatch):
    run, _ = record(CASE, tmp_path / "run.zarr")
    put, count = MemoryFileSystem.put_file, itertools.count()

    def broken(self, *args, **kwargs):
        if next(count) == 9:
            raise PermissionError("denied")
        return put(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "put_file", broken)
        with pytest.raises(StoreUnreachableError, match="denied"):
            run.export(memory)
    assert not names(memory)
    run.export(memory)


def test_exports_are_complete_with_their_last_object(memory, tmp_path, monkeypatch):
    run, _ = record(CASE, tmp_path / "run.zarr")
    put, order = MemoryFileSystem.put_file, []
    monkeypatch.setattr(MemoryFileSystem, "put_file", lambda self, a, b, **k: (order.append(b), put(self, a, b, **k)))
    run.export(memory)
    assert [name.rpartition("/")[2] for name in order[-2:]] == ["zarr.json", "commit.json"]
    assert sum(name.endswith("commit.json") for name in order) == 1


def test_results_are_streamed_to_urls_and_saved_there(url, tmp_path):
    run, _ = record(CASE, tmp_path / "run.zarr")
    result = run.attribute(query(), by=("query", "step", "layer"), out=url)
    result.check()
    result.save(f"{url}-again")
    again = explaind.Attribution.open(f"{url}-again")
    xr.testing.assert_equal(again.dataset, run.attribute(query(), by=("query", "step", "layer")).dataset)
    with pytest.raises(StoreExistsError):
        run.attribute(query(), by=("query", "step"), out=url)


def test_runs_are_made_of_checkpoints_at_a_url(memory):
    states = [mlp().state_dict(), {name: 2 * value for name, value in mlp().state_dict().items()}]
    explaind.from_checkpoints(states, mlp(), store=memory)
    run = explaind.open_run(memory, model=mlp())
    run.attribute(query(), by=("query", "step", "layer")).check()


def test_the_command_line_takes_urls(memory, tmp_path):
    record(CASE, memory)

    def call(*arguments):
        found = CliRunner().invoke(main, [*map(str, arguments)])
        assert found.exit_code == 0, found.output
        return found.stdout

    assert json.loads(call("info", memory, "--json"))["num_steps"] == 6
    assert "bit for bit" in call("verify", memory, "--model", "tests.cases:mlp")
    call("export", memory, f"{memory}-part", "--steps", "1:4")
    call("export", f"{memory}-part", tmp_path / "part.zarr")
    assert same_numbers(f"{memory}-part", tmp_path / "part.zarr")


@pytest.mark.parametrize(
    ("run", "said"),
    [("memory://nowhere", "not a recorded run: no such directory"), ("nonsense://run", "no kind that fsspec knows")],
)
def test_the_command_line_says_what_is_wrong_with_a_url(run, said):
    found = CliRunner().invoke(main, ["info", run])
    assert found.exit_code == 2
    assert said in " ".join(found.output.replace("│", " ").split())


# ---------------------------------------------------------------------- while it is written


def test_a_reader_sees_whole_steps_while_the_run_is_written(url, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", 100)
    model = mlp()
    optimizer = momentum_sgd(model)
    with explaind.trace(model, optimizer, url) as recorder:
        first = None
        for start in range(6):
            step_on(model, optimizer, slice(start, start + 3))
            recorder._rows._writer.wait()
            if start >= 2:
                run = explaind.open_run(url, model=mlp())
                assert 0 < run.num_steps <= start and not run.complete
                first = first or run
    assert first.verify().bit_exact  # the run has grown, and is still the same
    assert explaind.open_run(url, model=mlp()).num_steps == 6


@pytest.mark.parametrize("last", range(0, 200, 23))
def test_a_network_that_breaks_leaves_a_prefix(last, memory, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    chunks_of(monkeypatch, 500)
    put, count = MemoryFileSystem.pipe_file, itertools.count()

    def breaking(self, *args, **kwargs):
        if next(count) >= last:
            raise OSError("the network is gone")
        return put(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "pipe_file", breaking)
        with pytest.raises(StoreUnreachableError, match="the network is gone"):
            record(CASE, memory)
    if "commit.json" in names(memory) and Commit.read(RemotePath(memory)).num_steps:
        check_prefix(RemotePath(memory), most=1)
    else:
        assert last < 120
        with pytest.raises(StoreFormatError):
            explaind.open_run(memory)


def test_files_are_sent_together(memory, monkeypatch):
    sent, pipe = [], MemoryFileSystem.pipe
    monkeypatch.setattr(MemoryFileSystem, "pipe", lambda self, files: (sent.append(list(files)), pipe(self, files)))
    record(BY_NAME["sgd"], memory)
    commits = [batch for batch in sent if any(name.endswith("commit.json") for name in batch)]
    assert all(len(batch) == 1 for batch in commits)
    assert len(sent) <= 3 * len(commits)
    assert max(map(len, sent)) > 20


def test_much_is_sent_before_it_is_published(memory, monkeypatch):
    monkeypatch.setattr(uploads, "_LARGEST_BYTES", 100)
    assert record(CASE, memory)[0].verify().bit_exact


def test_a_run_is_replaced_only_if_that_was_asked_for(url):
    three = recorded(url, three_steps)[0]
    with pytest.raises(StoreExistsError, match="overwrite=True"):
        recorded(url, three_steps)
    longer = record(CASE, url, overwrite=True)[0]
    assert longer.num_steps == 6 and longer.info().leftovers == ()
    with pytest.raises(StoreFormatError, match="replaced since it was opened"):
        three.params(1)


def test_the_old_commit_goes_first_and_what_tells_a_run_last(memory, monkeypatch):
    recorded(memory, three_steps)
    remove, order = MemoryFileSystem.rm_file, []

    def stopped(self, path):
        order.append(path)
        if path.endswith(f"{memory.rpartition('/')[2]}/zarr.json"):
            raise PermissionError("denied")
        remove(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(MemoryFileSystem, "rm_file", stopped)
        with pytest.raises(StoreUnreachableError):
            recorded(memory, three_steps, overwrite=True)
    assert order[0].endswith("commit.json")
    assert list(names(memory)) == ["zarr.json"]
    assert recorded(memory, three_steps, overwrite=True)[0].num_steps == 3


def test_only_runs_are_overwritten(memory):
    write(f"{memory}/notes.txt", b"mine")
    with pytest.raises(StoreExistsError, match="not a recorded run"):
        recorded(memory, three_steps, overwrite=True)
    assert names(memory) == {"notes.txt": 4}


def test_a_run_that_is_deleted_while_it_is_recorded_does_not_come_back(memory, monkeypatch):
    model = mlp()
    optimizer = momentum_sgd(model)
    with pytest.raises(RecordingError, match="deleted or moved"), explaind.trace(model, optimizer, memory):
        step_on(model, optimizer, slice(0, 3))
        RemotePath(memory).clear(first="commit.json", last="zarr.json")
    assert not names(memory)


def test_parameters_that_come_later_are_refused(memory):
    refused(memory, lambda optimizer, model: unfreeze(model, optimizer), r"replaced as a whole.*run\.export\(url\)")


def test_a_durable_recording_is_an_ordinary_one(memory):
    assert recorded(memory, three_steps, durable=True)[0].verify().bit_exact


def test_a_recording_to_a_url_can_be_planned(memory):
    model = mlp()
    plan = explaind.trace(model, momentum_sgd(model), memory).plan(query().inputs[0], steps=10)
    assert plan.total_bytes > 0 and not names(memory)


# ---------------------------------------------------------------------- what is not as it should be


def harm(url, change, file="params/c/0/0"):
    path = RemotePath(url) / file
    content = change(path.read(1 << 20))
    if content is None:
        fsspec.filesystem(url.partition(":")[0]).rm(str(path))
    else:
        write(str(path), content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda old: None, r"a chunk is missing: 'params', snapshot 0 to 6, .*\(params/c/0/0\)"),
        (lambda old: old[:-1], "is not a chunk of"),
        (lambda old: old + b"more", "is not a chunk of"),
        (lambda old: b"", "a file of 0 bytes is not a chunk"),
        (lambda old: old[:4] + (1 << 30).to_bytes(4, "little") + old[8:], "is not a chunk of"),
        (lambda old: old[:40] + bytes([old[40] ^ 1]) + old[41:], "damaged"),
        (lambda old: bytes(50 << 20), "is not a chunk of"),
    ],
    ids=["missing", "short", "long", "empty", "larger than said", "another bit", "much"],
)
def test_damage_is_never_read_as_numbers(change, said, memory):
    run, _ = record(CASE, memory)
    harm(memory, change)
    with pytest.raises(DamagedStoreError, match=said):
        explaind.open_run(memory, model=mlp()).params(0)
    found = CliRunner().invoke(main, ["verify", memory])
    assert found.exit_code == 1
    assert "params/c/0/0" in found.output
    with pytest.raises(DamagedStoreError):
        run.export(f"{memory}-copy")
    assert not names(f"{memory}-copy")


@pytest.mark.parametrize("content", [None, b"", b"no chunk"], ids=["missing", "empty", "another"])
def test_a_chunk_is_read_as_it_is_in_the_storage(content, url):
    run, _ = record(CASE, url)
    harm(url, lambda old: content)
    with pytest.raises(DamagedStoreError, match=r"a chunk is (missing|damaged): 'params', snapshot 0 to 6"):
        run.params(0)


def test_of_a_chunk_no_more_is_read_than_it_can_have(memory, monkeypatch):
    run, _ = record(CASE, memory)
    harm(memory, lambda old: bytes(50 << 20))
    cat, read = MemoryFileSystem.cat_file, []

    def counted(self, path, start=None, end=None, **kwargs):
        content = cat(self, path, start=start, end=end, **kwargs)
        read.append(len(content))
        return content

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    with pytest.raises(DamagedStoreError):
        run.params(0)
    assert max(read) < 1 << 20


def test_metadata_are_believed_only_with_their_checksums(memory):
    record(CASE, memory)
    harm(memory, lambda old: old.replace(b'"shape": [7', b'"shape": [8'), "params/zarr.json")
    with pytest.raises(DamagedStoreError, match=r"'params'.*checksum"):
        explaind.open_run(memory)
    harm(memory, lambda old: old.replace(b'"moment":7', b'"moment":6'), "commit.json")
    with pytest.raises(DamagedStoreError, match=r"commit\.json cannot be read.*checksum"):
        explaind.open_run(memory)
    harm(memory, lambda old: None, "commit.json")
    with pytest.raises(StoreFormatError, match="it has no commit"):
        explaind.open_run(memory)


def test_an_earlier_commit_is_read_where_the_newest_chunks_are_lost(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    chunks_of(monkeypatch, 500)
    record(CASE, tmp_path / "run.zarr")
    change_commit(tmp_path / "run.zarr", lambda content: content.update(complete=False))
    copy_to(memory, tmp_path / "run.zarr")
    last = max(name for name in names(memory) if name.startswith("params/c/"))
    harm(memory, lambda old: None, last)
    with pytest.warns(explaind.errors.DamagedStoreWarning, match=r"a chunk is missing: 'params'"):
        assert 0 < explaind.open_run(memory).num_steps < 6


@pytest.mark.parametrize("error", [PermissionError("denied"), TimeoutError("slow"), RuntimeError("client")], ids=repr)
def test_storage_that_does_not_answer_is_not_taken_for_damage(error, memory, monkeypatch):
    run, _ = record(CASE, memory)

    def refuse(self, *args, **kwargs):
        raise error

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(StoreUnreachableError, match=rf"{error}.*Look at the address, the credentials"):
        run.params(0)
    for use in (explaind.open_run, lambda path: recorded(path, three_steps, overwrite=True)):
        with pytest.raises(StoreUnreachableError, match="cannot be reached"):
            use(memory)
    found = CliRunner().invoke(main, ["verify", memory])
    assert found.exit_code == 2 and "cannot be reached" in found.output


def test_a_refused_request_does_not_lead_to_an_earlier_commit(memory, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    record(CASE, tmp_path / "run.zarr")
    change_commit(tmp_path / "run.zarr", lambda content: content.update(complete=False))
    copy_to(memory, tmp_path / "run.zarr")
    cat = MemoryFileSystem.cat_file

    def refuse(self, path, **kwargs):
        if "params/c/" in path:
            raise PermissionError("denied")
        return cat(self, path, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", refuse)
    with pytest.raises(StoreUnreachableError, match="denied"):
        explaind.open_run(memory)


def test_the_model_must_be_that_of_the_run(memory):
    record(CASE, memory)
    with pytest.raises(ModelMismatchError, match=memory):
        explaind.open_run(memory, model=mlp(nn.ReLU))


# ---------------------------------------------------------------------- places


def test_urls_of_files_are_directories(tmp_path):
    run = record(CASE, (tmp_path / "a run.zarr").as_uri())[0]
    assert run.path == tmp_path / "a run.zarr"
    assert explaind.open_run(f"file://{tmp_path}/a run.zarr").num_steps == 6


@pytest.mark.parametrize(
    ("store", "error", "said"),
    [
        (Path("s3://bucket/run.zarr"), ValueError, "was a URL before it became a Path"),
        ("file://run.zarr", ValueError, "expected file:///path/to/run.zarr"),
        ("nonsense://run.zarr", ValueError, "of no kind that fsspec knows"),
    ],
)
def test_what_names_no_place_is_refused(store, error, said):
    for use in (explaind.open_run, lambda store: explaind.trace(mlp(), momentum_sgd(mlp()), store)):
        with pytest.raises(error, match=said):
            use(store)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ImportError, match=r"gs://bucket/run\.zarr cannot be reached without another package.*gcsfs"):
        explaind.open_run("gs://bucket/run.zarr")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match="pip install fsspec"):
        explaind.open_run("memory://run.zarr")


def test_what_is_local_does_without_fsspec(tmp_path):
    code = (
        "import sys; sys.modules['fsspec'] = None; from tests.cases import *; "
        f"record(CASES[0], Path({str(tmp_path)!r}) / 'run.zarr')[0].verify()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0


# ---------------------------------------------------------------------- other readers


@pytest.mark.filterwarnings("ignore:.*commit.json:zarr.errors.ZarrUserWarning")
@pytest.mark.parametrize("place", ["directory", "memory"])
def test_xarray_opens_the_trajectory_lazily_with_labels(place, memory, tmp_path):
    where = str(tmp_path / "run.zarr") if place == "directory" else memory
    run, _ = record(CASE, where, snapshot_every=2)
    opened = xr.open_zarr(where, consolidated=False, chunks=None)
    assert opened.params.dims == ("snapshot", "element")
    assert not opened.params.variable._in_memory
    labelled = opened.params.assign_coords(snapshot=opened.snapshot_step)
    assert not labelled.variable._in_memory
    for step in (0, 2, 4, 6):
        assert np.array_equal(labelled.sel(snapshot=step), run.flat_params(step))
