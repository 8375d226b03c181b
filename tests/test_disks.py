"""Real disks that are full, read-only, or go away while a run is recorded: nothing published is lost."""

import subprocess

import pytest
from torch.optim import AdamW

import explaind
from explaind.errors import RecordingError
from explaind.recording import writer
from tests.cases import mlp
from tests.traced import check_prefix, step_on

MOST_STEPS = 5000


def mount(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"only who may mount a file system can fill one: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path):
    """A file system in memory, of a megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "explaind-test", place)
    yield place
    subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)


def recorded_until(path, monkeypatch, *, happens_at=None, happens=lambda: None):
    """Record until that fails; something happens before one of the steps."""
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 2000)
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with explaind.trace(model, optimizer, path) as recorder:
        for step in range(MOST_STEPS):
            if step == happens_at:
                recorder._rows._writer.wait()
                happens()
            step_on(model, optimizer, [step % 9, step * 5 % 9])
    raise AssertionError("the recording never failed")


def test_a_full_disk(disk, monkeypatch):
    with pytest.raises(RecordingError, match=r"no room left on the disk .*The first (\d+) steps are safe") as caught:
        recorded_until(disk / "run.zarr", monkeypatch)
    safe = int(str(caught.value).partition("The first ")[2].split()[0])
    assert check_prefix(disk / "run.zarr", most=20) == safe >= 1
    run = explaind.open_run(disk / "run.zarr", model=mlp())
    assert run.verify().bit_exact
    assert not run.complete


def test_a_disk_that_is_full_from_the_start(disk):
    model = mlp()
    (disk / "other").write_bytes(bytes((1 << 20) - (8 << 10)))
    with (
        pytest.raises((RecordingError, OSError), match=r"no room left on the disk|No space left"),
        explaind.trace(model, AdamW(model.parameters()), disk / "run.zarr"),
    ):
        raise AssertionError("the recording began")


def test_a_directory_that_is_read_only(disk):
    model = mlp()
    mount("-o", "remount,ro", disk)
    with (
        pytest.raises((RecordingError, OSError), match=r"Read-only file system.*run\.zarr"),
        explaind.trace(model, AdamW(model.parameters()), disk / "run.zarr"),
    ):
        raise AssertionError("the recording began")


def test_a_disk_that_goes_away(disk, monkeypatch):
    def go_away():
        subprocess.run(["umount", "--lazy", disk], check=True, capture_output=True)

    with pytest.raises(RecordingError, match=r"run\.zarr was deleted or moved while it was recorded"):
        recorded_until(disk / "run.zarr", monkeypatch, happens_at=200, happens=go_away)
    assert list(disk.iterdir()) == []
