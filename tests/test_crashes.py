"""Whatever kills the writer, at whatever moment: the store holds a prefix of what an undisturbed run holds.

`EXPLAIND_KILLS=200 pytest tests/test_crashes.py` kills more of them at random moments.
"""

import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import explaind
from explaind.errors import StoreFormatError
from explaind.store import StoreReader
from tests.killed import NUM_STEPS, data, make_model
from tests.resumed import IN_TIME
from tests.traced import same

NUM_KILLS = int(os.environ.get("EXPLAIND_KILLS", "4"))
POINTS = [
    *(
        f"{moment} {file}"
        for moment in ("half of", "before rename of", "after rename of")
        for file in ("chunk", "commit")
    ),
    *(f"{moment} {file}" for moment in ("half of", "after rename of") for file in ("metadata", "attributes")),
    "after rename of run",
    "before unlink of lock",
]


@pytest.fixture(scope="module")
def processes():
    """Starts training processes: `start(path, …)` gives a pid."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.killed"],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def start(path, *, block_bytes=20_000, point=None, durable=False, overwrite=False, resume=False):
        order = {"path": str(path), "finished": f"{path}.finished", "block_bytes": block_bytes, "point": point}
        print(
            json.dumps(order | {"durable": durable, "overwrite": overwrite, "resume": resume}),
            file=server.stdin,
            flush=True,
        )
        return int(server.stdout.readline())

    yield start
    server.stdin.close()
    server.wait(timeout=30)
    server.stdout.close()


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for_end(process):
    while is_running(process):
        time.sleep(0.001)


def num_finished(path):
    return Path(f"{path}.finished").stat().st_size if Path(f"{path}.finished").exists() else 0


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """A run that nobody disturbed, and how long it took."""
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    wait_for_end(processes(path))  # the first one is slower
    began = time.monotonic()
    wait_for_end(processes(path, overwrite=True))
    assert StoreReader(path).commit.complete
    return StoreReader(path), time.monotonic() - began


def check(path, whole, block_bytes):
    """What a killed writer left is a prefix, and all of it but the last blocks."""
    try:
        run = explaind.open_run(path, model=make_model())
    except StoreFormatError as error:
        assert "before its first" in str(error) or "no such directory" in str(error)
        published = 0
    else:
        published, reader = run.num_steps, StoreReader(path)
        assert {name: reader.attributes[name] for name in ("parameters", "groups", "modules")} == {
            name: whole.attributes[name] for name in ("parameters", "groups", "modules")
        }
        for name in reader.commit.arrays:
            rows = reader.read(name)
            if name.partition("/")[0] not in IN_TIME:
                assert rows.tobytes() == whole.read(name)[: len(rows)].tobytes(), name
        assert run.verify().bit_exact
        query = explaind.Query(data().tensors[0][:1], output=explaind.outputs.logit([2]))
        last = range(max(0, published - 5), published)
        run.attribute(query, by=("query", "example", "step"), steps=last).check()
    step_bytes = sum(map(whole.num_bytes, whole.commit.arrays)) / NUM_STEPS
    assert num_finished(path) - published <= 2 * math.ceil(block_bytes / step_bytes) + 2
    return published


def check_resumed(path, whole, published):
    """What came of a run that was killed and resumed is what came of the one that nobody disturbed."""
    seams = range(max(0, published - 3), min(NUM_STEPS, published + 3))
    reader = StoreReader(path)
    assert reader.commit.complete
    assert reader.commit.arrays.keys() == whole.commit.arrays.keys()
    for name in whole.commit.arrays:
        if name.partition("/")[0] not in IN_TIME:
            assert reader.read(name).tobytes() == whole.read(name).tobytes(), name
    run = explaind.open_run(path, model=make_model())
    assert run.verify().bit_exact
    assert same(run.state(run.num_steps), explaind.open_run(whole.path, model=make_model()).state(run.num_steps))
    assert not run.info().leftovers
    query = explaind.Query(data().tensors[0][:1], output=explaind.outputs.logit([2]))
    run.attribute(query, by=("query", "step", "layer"), steps=seams).check()
    assert not list(path.parent.glob("*.lock"))


@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_writer_killed_at_any_moment_leaves_a_prefix(seed, processes, whole, tmp_path):
    chance = random.Random(seed)
    path, block_bytes = tmp_path / "run.zarr", chance.choice([1, 20_000, 60_000])
    process = processes(path, block_bytes=block_bytes, durable=seed % 2 == 1)
    time.sleep(chance.uniform(0, 1.2 * whole[1]))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)
    wait_for_end(process)
    published = check(path, whole[0], block_bytes)
    wait_for_end(processes(path, block_bytes=chance.choice([1, 20_000, 60_000]), durable=seed % 2 == 1, resume=True))
    check_resumed(path, whole[0], published)


@pytest.mark.parametrize("point", POINTS)
def test_a_writer_killed_at_a_point_leaves_a_prefix(point, processes, whole, tmp_path):
    count = 1 if point.endswith(("lock", "run")) else random.Random(point).randint(1, 4)
    wait_for_end(processes(tmp_path / "run.zarr", point=[point, count]))
    assert (num_finished(tmp_path / "run.zarr") == NUM_STEPS) == (point == "before unlink of lock")
    published = check(tmp_path / "run.zarr", whole[0], 20_000)
    wait_for_end(processes(tmp_path / "run.zarr", resume=True))
    check_resumed(tmp_path / "run.zarr", whole[0], published)


@pytest.mark.parametrize("point", ["half of commit", "after rename of chunk", "before unlink of lock"])
def test_a_resumed_run_that_is_killed_again_is_resumed_again(point, processes, whole, tmp_path):
    path = tmp_path / "run.zarr"
    wait_for_end(processes(path, point=["after rename of commit", 5]))
    published = check(path, whole[0], 20_000)
    wait_for_end(processes(path, point=[point, 1], resume=True))
    again = check(path, whole[0], 20_000)
    assert again >= published
    wait_for_end(processes(path, resume=True))
    check_resumed(path, whole[0], again)


@pytest.mark.parametrize(
    "point", ["half of commit", "before rename of old run", "after rename of old run", "after rename of run"]
)
def test_a_writer_killed_while_it_replaces_a_run_leaves_one(point, processes, whole, tmp_path):
    path = tmp_path / "run.zarr"
    wait_for_end(processes(path))
    wait_for_end(processes(path, point=[point, 1], overwrite=True))
    if point == "after rename of old run":
        with pytest.raises(StoreFormatError, match=r"the run is at .*run\.zarr\.old\.partial"):
            explaind.open_run(path)
        path.with_name("run.zarr.old.partial").rename(path)
    if point == "after rename of run":
        with pytest.raises(StoreFormatError, match="has no finished optimizer step"):
            explaind.open_run(path)
    else:
        assert explaind.open_run(path).num_steps == NUM_STEPS
    wait_for_end(processes(path, overwrite=True))
    run = explaind.open_run(path)
    assert torch.equal(run.flat_params(NUM_STEPS), torch.from_numpy(whole[0].read("params")[NUM_STEPS]))
    assert not list(tmp_path.glob("*.partial"))
