"""Stores that somebody else made up, with the right checksums: a clean error or a result, in bounded time and memory.

`EXPLAIND_CASES=10000 pytest tests/test_strangers.py` makes up more of them.
"""

import copy
import json
import os
import random
import resource
import shutil
import signal
import warnings
from pathlib import Path

import google_crc32c
import pytest
import zarr

import explaind
from explaind.checksums import sealed_metadata, sealed_text
from explaind.errors import ExplaindError
from tests.cases import query
from tests.traced import forget_chunks, one_epoch, recorded, with_buffer

NUM_CASES = int(os.environ.get("EXPLAIND_CASES", "100"))
SECONDS, BYTES = 20, 500 << 20


def nested(depth):
    content = []
    for _ in range(depth):
        content = [content]
    return content


ODD = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**15, 10**30, 0.5, 1e308, float("nan"), float("inf")),
    *("", ".", "..", "../../../etc/passwd", "/etc/passwd", "params", "\x00", "object", "float16", "int64", "cuda:7"),
    *("meta", "torch.optim.sgd.SGD", "os.system", "numcodecs.pickle", "vlen-utf8", "gzip", "zstd", "x" * 10_000),
    *([], {}, [1], [10**15], [-1, 3], {"tensor": "0"}, {"value": 1}, {"list": []}, nested(9), nested(150)),
]  # fmt: skip


def places(content, path=()):
    """Where something is in plain data."""
    yield path
    entries = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, entry in entries:
        yield from places(entry, (*path, key))


def mutated(content, chance):
    """Plain data with one thing in it replaced, removed, doubled, or put elsewhere; and what was done."""
    content = copy.deepcopy(content)
    every = list(places(content))
    path = chance.choice(every[1:])
    *parents, last = path
    inside = content
    for key in parents:
        inside = inside[key]
    way = chance.choice(["replace", "replace", "replace", "remove", "move", "double", "shift"])
    if way == "replace":
        inside[last] = copy.deepcopy(chance.choice(ODD))
    elif way == "remove":
        del inside[last]
    elif way == "double" and isinstance(inside, list):
        inside.insert(last, copy.deepcopy(inside[last]))
    elif way == "shift" and type(inside[last]) in (int, float):
        inside[last] += chance.choice([-1, 1, 7])
    else:
        other = content
        for key in chance.choice(every):
            other = other[key]
        inside[last] = copy.deepcopy(other)
    return content, f"{way} {path}, {inside!r:.200}"


def change_metadata(path, chance):
    file = chance.choice(sorted(path.rglob("zarr.json")) + [path / "zarr.json"] * 30)
    metadata = json.loads(file.read_text())
    if file.parent == path:
        metadata["attributes"], what = mutated(metadata["attributes"], chance)
    else:
        metadata, what = mutated(metadata, chance)
    if isinstance(metadata.get("attributes"), dict):
        metadata = sealed_metadata(metadata)
    file.write_text(json.dumps(metadata))
    return f"{file}: {what}"


def change_commit(path, chance):
    file = path / "commit.json"
    content = json.loads(file.read_text())
    del content["checksum"]
    content, what = mutated(content, chance)
    file.write_text(sealed_text(content))
    return what


def change_numbers(path, chance):
    file = chance.choice([file for file in sorted(path.rglob("zarr.json")) if (file.parent / "c").exists()])
    array = zarr.open_array(file.parent, mode="r+")
    rows = array[:]
    flat = rows.reshape(-1)
    values = [0, 1, -1, 2, 1000, 2**62, -(2**62)] if rows.dtype.kind == "i" else [0, 1, 255]
    if rows.dtype.kind == "f":
        values = [0, -1, 0.5, 3, 1e30, float("nan"), float("inf")]
    place, value = chance.randrange(flat.size), chance.choice(values)
    flat[place] = value
    array[:] = rows
    forget_chunks(path)
    return f"{file.parent}[{place}] = {value}"


def change_chunk(path, chance):
    file = chance.choice(sorted(file for file in path.rglob("*") if file.is_file() and "c" in file.parts))
    way = chance.choice(["header", "header", "bytes", "long", "sparse", "link", "directory", "pipe"])
    raw = bytearray(file.read_bytes()[:-4])
    if way == "header":
        raw[chance.randrange(min(16, len(raw)))] = chance.choice([0, 1, 127, 255])
    elif way == "bytes":
        for _ in range(chance.choice([1, 10, 100])):
            raw[chance.randrange(len(raw))] = chance.randrange(256)
    elif way == "long":
        raw += bytes(chance.choice([1, 1000, 10**6]))
    if chance.random() < 0.5:
        forget_chunks(path)
    file.write_bytes(raw + google_crc32c.value(bytes(raw)).to_bytes(4, "little"))
    if way == "sparse":
        os.truncate(file, 1 << 40)
    elif way in ("link", "directory", "pipe"):
        file.unlink()
        {"link": lambda: file.symlink_to("/dev/zero"), "directory": file.mkdir, "pipe": lambda: os.mkfifo(file)}[way]()
    return f"{file}: {way}"


def change_file(path, chance):
    file = chance.choice([path / "commit.json", path / "zarr.json", *sorted(path.rglob("*/zarr.json"))])
    texts = [
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "\x00",
        "[]",
        "1",
        "NaN",
        '"',
        "{}",
        "9" * 5000,
        '{"attributes": []}',
    ]
    file.write_text(text := chance.choice(texts))
    if sparse := chance.random() < 0.2:
        os.truncate(file, 1 << 40)
    return f"{file}: {text[:20]}, {sparse}"


CHANGES = [change_metadata, change_commit, change_numbers, change_chunk, change_file]


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run of which every moment is stored, and one of which most are replayed."""
    paths = [tmp_path_factory.mktemp("strangers") / f"{every}.zarr" for every in (1, 2)]
    for every, path in enumerate(paths, start=1):
        recorded(path, one_epoch, make=with_buffer, snapshot_every=every)
    return paths


def use(path, attribute):
    run = explaind.open_run(path, model=with_buffer())
    assert str(run)
    assert run._repr_html_()
    assert len(run.history) == run.num_steps
    assert len(run.examples) >= 0
    for step in range(run.num_steps):
        run.params(step)
        run.update(step)
        run.fixed(step)
        run.state(step)
        run.calls(step)
        run.settings(step, 0)
    run.verify()
    if attribute:
        run.attribute(query(num=1), by=("query", "example", "step")).check()


class TooSlow(BaseException):
    """No `Exception`, which a reader might take for damage."""


def too_slow(number, frame):
    raise TooSlow(f"took longer than {SECONDS} seconds")


@pytest.mark.parametrize("change", CHANGES)
def test_a_made_up_store_gives_a_clean_error_or_a_result(change, stored, tmp_path):
    chance, unclean = random.Random(change.__name__), {}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.signal(signal.SIGALRM, too_slow)
    for number in range(NUM_CASES // len(CHANGES)):
        path = Path(shutil.copytree(stored[number % 2], tmp_path / "run.zarr"))
        what = change(path, chance)
        signal.alarm(SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(path, attribute=number % 5 == 0)
        except ExplaindError:
            pass
        except BaseException as error:
            unclean[number, what] = repr(error)[:300]
        finally:
            signal.alarm(0)
            shutil.rmtree(path)
    assert not unclean, "\n".join(f"{what}: {error}" for what, error in unclean.items())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < BYTES >> 10
