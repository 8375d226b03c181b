import json
import math
import shutil

import pytest

import explaind
from explaind.errors import DamagedStoreError, StoreFormatError
from explaind.inventory import store_info
from tests.cases import BY_NAME, chunks_of, record
from tests.traced import change_attributes, change_commit, forget_chunks


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "run.zarr"
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, 500)
        record(BY_NAME["adamw-schedule"], path)
    return path


@pytest.fixture
def copied(path, tmp_path):
    return shutil.copytree(path, tmp_path / "run.zarr")


def size_of(directory):
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


def test_every_byte_of_a_whole_run_is_accounted_for(path):
    info = explaind.open_run(path).info()
    assert info.stored_bytes == size_of(path)
    assert sum(kind.stored_bytes for kind in info.kinds) + info.metadata_bytes == info.stored_bytes
    assert math.isclose(sum(kind.share for kind in info.kinds), 1)
    assert not info.leftovers
    assert not info.damage


def test_a_run_is_described_as_it_was_recorded(path):
    info, run = explaind.open_run(path).info(), explaind.open_run(path)
    assert (info.num_steps, info.complete, info.num_examples) == (run.num_steps, True, len(run.examples))
    assert (info.num_elements, info.num_tensors) == (run.table.num_elements, len(run.table))
    assert (info.model, info.optimizer) == ("Sequential", "torch.optim.adamw.AdamW")
    params = next(array for array in info.arrays if array.name == "params")
    assert params.shape == (run.num_steps + 1, run.table.num_elements)
    assert params.plain_bytes == 8 * math.prod(params.shape)
    kind = next(kind for kind in info.kinds if "params" in kind.arrays)
    assert kind.vectors_per_step == pytest.approx(params.stored_bytes / run.num_steps / (4 * run.table.num_elements))


def test_it_reads_as_a_table_and_as_plain_data(path):
    info = store_info(path)
    text = str(info)
    assert all(kind.kind in text for kind in info.kinds)
    assert "steps:     6\n" in text
    assert json.loads(json.dumps(info.to_json()))["num_steps"] == 6


def test_what_a_killed_writer_left_is_told_from_the_run(path, copied):
    whole = store_info(path)
    lengths = {"step": 3, "snapshot": 4, "call": 3, "row": 9}
    forget_chunks(copied)
    change_commit(copied, lambda commit: commit.update(lengths=commit["lengths"] | lengths, complete=False))
    (copied / "params" / "c" / "7").mkdir()
    (copied / "params" / "c" / "7" / "0.partial").write_bytes(bytes(100))
    (copied / "notes.txt").write_bytes(bytes(10))
    (copied.parent / "run.zarr.new.partial").mkdir()
    (copied.parent / "run.zarr.new.partial" / "zarr.json").write_bytes(bytes(20))
    info = store_info(copied)
    left = {found.what: found for found in info.leftovers}
    assert left["interrupted writes"].paths == ("params/c/7/0.partial",)
    assert left["interrupted writes"].num_bytes == 100
    assert left["files that the run does not name"].paths == ("notes.txt",)
    assert left["stores that were to replace it, or that it replaced"].num_bytes == 20
    beyond = left["chunks beyond what is published"]
    assert all((copied / file).is_file() for file in beyond.paths)
    assert any(file.startswith("params/c/") for file in beyond.paths)
    assert beyond.num_bytes + info.stored_bytes - info.metadata_bytes == whole.stored_bytes - whole.metadata_bytes
    assert info.num_steps == 3
    assert "so far (still recording, or interrupted)" in str(info)
    assert "params/c/7/0.partial" in str(info)


def test_damage_is_told_and_the_rest_is_shown(copied):
    (copied / "params" / "zarr.json").write_text("{")
    file = next(file for file in (copied / "row_example" / "c").rglob("*") if file.is_file())
    file.write_bytes(b"")
    info = store_info(copied)
    assert info.num_examples is None
    assert len(info.damage) == 2
    assert "'params'" in info.damage[0]
    assert "'row_example'" in info.damage[1]
    assert {array.name for array in info.arrays} >= {"gradient", "state/exp_avg"}
    assert "Damaged:" in str(info)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(StoreFormatError, match="is not a recorded run"):
        store_info(tmp_path)


def test_without_attributes_there_is_nothing_to_tell(copied):
    change_attributes(copied, lambda attributes: attributes.pop("optimizer"))
    with pytest.raises(DamagedStoreError, match=r"attributes of .* cannot be what was written: KeyError.*optimizer"):
        store_info(copied)
