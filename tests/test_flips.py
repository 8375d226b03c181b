"""A flipped bit or a lost end in any file of a store is found, or changes nothing.

`EXPLAIND_FLIPS=1000 pytest tests/test_flips.py` flips more of them.
"""

import os
import random
import shutil
from pathlib import Path

import pytest

import explaind
from explaind.errors import DamagedStoreError, StoreFormatError
from explaind.store import StoreReader
from tests.cases import BY_NAME, train
from tests.traced import with_buffer

NUM_FLIPS = int(os.environ.get("EXPLAIND_FLIPS", "60"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = tmp_path_factory.mktemp("flips") / "run.zarr"
    case, model = BY_NAME["adamw-clipped"], with_buffer()
    optimizer = case.optimizer(model)
    with explaind.trace(model, optimizer, path, metadata={"note": "größer", "rate": 1e-3}) as recorder:
        train(case, model, recorder, optimizer)
    return path


def content(path):
    """All that explaind reads from a store."""
    explaind.open_run(path, model=with_buffer())
    reader = StoreReader(path)
    arrays = {
        name: (reader._metadata[name].dims, rows.dtype, rows.shape, rows.tobytes())
        for name in reader.commit.arrays
        for rows in [reader.read(name)]
    }
    return reader.commit, reader.attributes, arrays


@pytest.fixture(scope="module")
def intact(stored):
    return content(stored)


def flip(raw, chance):
    harmed = bytearray(raw)
    harmed[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
    return bytes(harmed)


def cut(raw, chance):
    return raw[: chance.randrange(len(raw))]


def blank(raw, chance):
    start = chance.randrange(len(raw))
    return raw[:start] + bytes(len(raw) - start)


@pytest.mark.parametrize("harm", [flip, cut, blank])
def test_harm_to_any_file_is_found_or_changes_nothing(harm, stored, intact, tmp_path):
    path = Path(shutil.copytree(stored, tmp_path / "run.zarr"))
    files = sorted(file for file in path.rglob("*") if file.is_file())
    chance, found = random.Random(harm.__name__), 0
    count = NUM_FLIPS if harm is flip else NUM_FLIPS // 3
    for _ in range(count):
        file = chance.choice(files)
        raw = file.read_bytes()
        file.write_bytes(harm(raw, chance))
        try:
            assert content(path) == intact, f"{file} reads as something else"
        except (DamagedStoreError, StoreFormatError):
            found += 1
        file.write_bytes(raw)
    assert found > 0.8 * count
