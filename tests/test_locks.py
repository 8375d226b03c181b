"""One writer for a store at a time, and an old run that is there until a new one is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import SGD

import explaind
import explaind.recording.writer
from explaind.errors import StoreExistsError, StoreInUseError
from explaind.recording.lock import WriterLock
from tests.cases import mlp
from tests.traced import recorded, step_on, three_steps

HOLDER = """
import sys, time
from pathlib import Path
from explaind.recording.lock import WriterLock
lock = WriterLock(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(600)
"""


def traced(path, **options):
    model = mlp()
    return explaind.trace(model, SGD(model.parameters(), lr=0.1), path, **options)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_being_written_is_not_replaced(overwrite, tmp_path):
    path = tmp_path / "run.zarr"
    second = traced(path, overwrite=overwrite)  # both saw that nothing is there
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, path):
        step_on(model, optimizer, slice(0, 3))
        with pytest.raises(StoreInUseError, match=rf"run\.zarr is being written by process {os.getpid()} on "):
            second.__enter__()
        step_on(model, optimizer, slice(3, 6))
    assert explaind.open_run(path, model=mlp()).num_steps == 2
    assert [file.name for file in tmp_path.iterdir()] == ["run.zarr"]


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    path = tmp_path / "run.zarr"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(StoreInUseError, match=f"process {holder.pid} "):
        WriterLock(path)
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    holder.stdout.close()
    assert (tmp_path / "run.zarr.lock").exists()
    WriterLock(path).release()
    assert not (tmp_path / "run.zarr.lock").exists()


def test_a_forked_process_does_not_hold_or_release_the_lock_of_its_parent(tmp_path):
    path = tmp_path / "run.zarr"
    lock = WriterLock(path)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        lock.release()
        os.write(write, b"released")
        signal.pause()
    assert os.read(read, 8) == b"released"
    with pytest.raises(StoreInUseError):
        WriterLock(path)
    lock.release()
    WriterLock(path).release()  # though the child lives
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_on_a_file_that_was_deleted_meanwhile_is_not_taken_for_one(tmp_path, monkeypatch):
    first, opened, flock = WriterLock(tmp_path / "run.zarr"), [], explaind.recording.lock.fcntl.flock

    def slow_flock(descriptor, operation):
        if not opened:
            first.release()
        opened.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(explaind.recording.lock.fcntl, "flock", slow_flock)
    second = WriterLock(tmp_path / "run.zarr")
    assert len(opened) == 2
    with pytest.raises(StoreInUseError):
        WriterLock(tmp_path / "run.zarr")
    second.release()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(explaind.recording.lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(explaind.recording.lock.fcntl, "flock", no_locks)
    with pytest.warns(RuntimeWarning, match="has no locks: make sure that nothing else records to it"):
        WriterLock(tmp_path / "run.zarr").release()


def test_overwriting_replaces_a_run(tmp_path):
    old, _ = recorded(tmp_path / "run", three_steps)
    new, model = recorded(tmp_path / "run", lambda model, optimizer, _: step_on(model, optimizer, [0]), overwrite=True)
    assert (old.num_steps, new.num_steps) == (3, 1)
    assert torch.equal(new.params(1)["0.weight"], model[0].weight)
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("fails", ["put", "mkdir", "rename"])
def test_an_old_run_stays_if_the_new_one_cannot_be_made(fails, tmp_path, monkeypatch):
    recorded(tmp_path / "run", three_steps)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def rename(self, target, rename=Path.rename):
        return full() if self.name.endswith(".new.partial") else rename(self, target)

    with monkeypatch.context() as patched:
        if fails == "put":
            patched.setattr(explaind.recording.files, "put", full)
        else:
            patched.setattr(Path, fails, rename if fails == "rename" else full)
        with pytest.raises(OSError, match="No space left"):
            traced(tmp_path / "run", overwrite=True).__enter__()
    assert [file.name for file in tmp_path.iterdir()] == ["run"]
    assert explaind.open_run(tmp_path / "run", model=mlp()).verify().bit_exact
    traced(tmp_path / "run", overwrite=True)


def test_a_directory_that_is_no_run_is_not_overwritten(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "zarr.json").write_text("[1]")
    with pytest.raises(StoreExistsError, match="is not a recorded run"):
        traced(tmp_path / "notes", overwrite=True)
