"""Damage to a store is found and named."""

import json
import os
import shutil
from pathlib import Path

import pytest
import zarr

import explaind
import explaind.store
from explaind.errors import DamagedStoreError, StoreFormatError
from tests.cases import BY_NAME, chunks_of, query, train
from tests.traced import change_attributes, with_buffer

ONLY_TO_RESUME = ("loop_", "batch")
"""What begins the names of arrays that nothing else reads."""


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


def pipe(file):
    """Whoever opens it waits for somebody who writes."""
    file.unlink()
    os.mkfifo(file)


DAMAGE = {
    pipe: "a chunk is damaged",
    flip: "a chunk is damaged",
    truncate: "a chunk is damaged",
    empty: "a chunk is damaged",
    Path.unlink: "a chunk is missing",
}


@pytest.mark.parametrize("harm", DAMAGE)
@pytest.mark.parametrize("name, dimension", [("params", "snapshot"), ("gradient", "step")])
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
    arrays = [name for name in names if chunks(intact, name) and not name.startswith(ONLY_TO_RESUME)]
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
    change_attributes(damaged, lambda attributes: attributes.pop("parameters"))
    with pytest.raises(DamagedStoreError, match=r"attributes of .* cannot be what was written: KeyError.*parameters"):
        explaind.open_run(damaged)


@pytest.mark.parametrize("version", [explaind.store.FORMAT_VERSION + 1, 99])
def test_a_newer_format_is_refused(version, damaged):
    change_attributes(damaged, lambda attributes: attributes.update(explaind_format=version))
    message = f"has format {version}, this version of explaind reads formats up to 3"
    with pytest.raises(StoreFormatError, match=message):
        explaind.open_run(damaged)
