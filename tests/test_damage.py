import os
import random
import shutil

import pytest

from explaind.damage import find_damage
from explaind.store import StoreReader
from tests.cases import BY_NAME, chunks_of, record

DRAWS = int(os.environ.get("EXPLAIND_DRAWS", "40"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, 500)
        record(BY_NAME["adamw-schedule"], path)
    return path


def flip_a_bit(file, draw):
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def cut_off(file, draw):
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def append(file, draw):
    file.write_bytes(file.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def replace(file, draw):
    file.write_bytes(draw.randbytes(draw.randrange(200)))


def remove(file, draw):
    file.unlink()


HARMS = (flip_a_bit, cut_off, append, replace, remove)


def test_an_intact_run_has_no_damage(path):
    assert not list(find_damage(StoreReader(path)))


def test_all_harmed_chunks_are_found_and_no_others(path, tmp_path):
    draw = random.Random(1)
    store = StoreReader(path)
    chunks = [
        store.chunk_name(name, index) for name in store.commit.arrays for index in range(store.layout(name).num_chunks)
    ]
    for number in range(DRAWS):
        copied = shutil.copytree(path, tmp_path / f"{number}.zarr")
        harmed = {str(file): draw.choice(HARMS) for file in draw.sample(chunks, draw.randrange(1, 6))}
        for file, harm in harmed.items():
            harm(copied / file, draw)
        assert {entry.file for entry in find_damage(StoreReader(copied))} == harmed.keys()
        shutil.rmtree(copied)
