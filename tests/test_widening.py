"""The store while it is widened for a new parameter group."""

import errno
import json
import shutil

import pytest

import explaind
import explaind.store
from explaind.errors import StoreExistsError, StoreFormatError
from tests.cases import NUM_EXAMPLES, chunks_of
from tests.unfreezing import frozen_backbone, momentum, record, refused, train, unfreeze


def test_no_room_for_the_wider_store_loses_nothing(tmp_path, monkeypatch):
    def copyfile(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(optimizer, model):
        monkeypatch.setattr(shutil, "copyfile", copyfile)
        unfreeze(model, optimizer)

    refused(tmp_path / "run", full, "no room left on the disk")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_while_widening_one_of_the_stores_is_whole(tmp_path, monkeypatch, renames):
    path = tmp_path / "run"
    copies = []
    rename = explaind.store.Path.rename

    def watched(self, target):
        if self == path or copies:
            copies.append({p.name: shutil.copytree(p, tmp_path / f"{len(copies)}-{p.name}") for p in beside()})
        return rename(self, target)

    def beside():
        return [p for p in tmp_path.iterdir() if p.is_dir() and p.name.startswith("run")]

    monkeypatch.setattr(explaind.store.Path, "rename", watched)
    record(path, at_epoch=unfreeze)
    monkeypatch.undo()
    assert beside() == [path]
    if renames == 2:
        assert explaind.open_run(path, model=frozen_backbone()).num_steps == 6
        return
    shutil.rmtree(path)
    for name in copies[renames]:
        shutil.move(tmp_path / f"{renames}-{name}", tmp_path / name)
    if renames == 1:
        with pytest.raises(StoreFormatError, match=r"the run is at .*run\.old\.partial"):
            explaind.open_run(path)
        with pytest.raises(StoreExistsError, match=r"the run is at .*run\.old\.partial"):
            record(path)
        wide = explaind.open_run(path.with_name("run.new.partial"), model=frozen_backbone())
        assert len(wide.table) == 4
        path.with_name("run.old.partial").rename(path)
    run = explaind.open_run(path, model=frozen_backbone())
    assert len(run.table) == 2


def test_a_run_that_was_opened_before_says_that_it_was_replaced(tmp_path):
    model = frozen_backbone()
    optimizer = momentum(model)
    early = []

    def look(model, optimizer):
        recorder._rows._writer.flush()
        recorder._rows._writer.wait()
        early.append(explaind.open_run(tmp_path / "run", model=frozen_backbone()))
        unfreeze(model, optimizer)

    with explaind.trace(model, optimizer, tmp_path / "run") as recorder:
        train(model, optimizer, recorder.batches, at_epoch=look)
    assert early[0].num_steps == 2
    run = early[0]
    run._store._cache.clear()
    for read, step in ((run.params, 0), (run.update, 0), (run.fixed, 0), (run.state, 1), (run.example_grads, 0)):
        with pytest.raises(StoreFormatError, match="has been replaced since it was opened"):
            read(step)


def test_a_long_store_is_widened_in_blocks(tmp_path, monkeypatch):
    chunks_of(monkeypatch, 1000)
    run = record(tmp_path / "run", at_epoch=unfreeze, epochs=12)
    assert run.num_steps == 36
    sizes = json.loads((tmp_path / "run" / "params" / "zarr.json").read_text())["chunk_grid"]["configuration"]
    assert sizes["chunk_shape"][0] == 1000 // (8 * 15)
    assert len(run.examples) == NUM_EXAMPLES
    assert run.verify().bit_exact
