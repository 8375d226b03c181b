"""Killed writers leave a readable prefix of whole steps; readers see one while they write."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.optim import SGD

import explaind
import explaind.recording.writer
from explaind.commit import Commit
from explaind.errors import StoreFormatError
from tests.cases import data, mlp, query
from tests.traced import check_prefix

SERVER = """
import os, signal, sys
import torch, torch._dynamo
import torch.nn.functional as F
import explaind, explaind.recording.recorder, explaind.recording.writer
from tests.cases import BY_NAME, data, mlp

def train(path, flush_bytes, steps):
    explaind.recording.writer._BLOCK_BYTES = int(flush_bytes)
    model = mlp()
    optimizer = BY_NAME["adamw-two-groups"].optimizer(model)
    features, labels = data().tensors
    with explaind.trace(model, optimizer, path):
        for number in range(int(steps)):
            rows = torch.tensor([number % 9, number * 5 % 9, number * 7 % 9])
            optimizer.zero_grad()
            F.cross_entropy(model(features[rows]), labels[rows]).backward()
            optimizer.step()

torch.set_num_threads(1)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        train(*line.split())
        os._exit(0)
    print(child, flush=True)
"""


@pytest.fixture(scope="module")
def writers():
    """A process that forks writers on demand, so torch is imported once: `start(path, …)` gives a pid."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    started = []

    def start(path, *, flush_bytes, steps):
        server.stdin.write(f"{path} {flush_bytes} {steps}\n")
        server.stdin.flush()
        started.append(int(server.stdout.readline()))
        return started[-1]

    yield start
    for child in started:
        kill(child)
    server.stdin.close()
    server.wait(timeout=30)
    server.stdout.close()


def is_running(child):
    try:
        os.kill(child, 0)
    except ProcessLookupError:
        return False
    return True


def kill(child):
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    while is_running(child):
        time.sleep(0.001)


def published_steps(path):
    return Commit.read(path).num_steps if (path / "commit.json").exists() else 0


def wait_for(condition, child):
    while not condition():
        assert is_running(child), "the writer died"
        time.sleep(0.001)


def test_a_writer_killed_before_its_first_block_leaves_nothing_to_open(writers, tmp_path):
    path = tmp_path / "run.zarr"
    child = writers(path, flush_bytes=10**9, steps=10**6)
    wait_for((path / "zarr.json").exists, child)
    kill(child)
    with pytest.raises(StoreFormatError, match="stopped before its first"):
        explaind.open_run(path)


def test_a_run_can_be_read_while_it_is_written(writers, tmp_path):
    def look(path):
        run = explaind.open_run(path, model=mlp())
        latest = range(max(0, run.num_steps - 2), run.num_steps)
        run.attribute(query(num=1), by=("query", "step", "layer"), steps=latest).check()
        return run.num_steps, run.complete, run.flat_params(run.num_steps)

    first, path = tmp_path / "first.zarr", tmp_path / "run.zarr"
    child = writers(first, flush_bytes=1, steps=2)
    wait_for(lambda: published_steps(first), child)
    look(first)  # the first time takes longer than it takes to write the run
    child = writers(path, flush_bytes=1, steps=200)
    wait_for(lambda: published_steps(path), child)
    polls, done = [], False
    while not done:
        done = not is_running(child)
        polls.append(look(path))
    assert polls[-1][:2] == (200, True)
    assert [steps for steps, _, _ in polls] == sorted(steps for steps, _, _ in polls)
    assert len({steps for steps, _, _ in polls}) >= 3
    whole = explaind.open_run(path)
    assert all(torch.equal(params, whole.flat_params(steps)) for steps, _, params in polls)
    assert check_prefix(path) == 200


def test_an_open_run_stays_as_it_was_opened(tmp_path):
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    features, labels = data().tensors
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        for number in range(6):
            optimizer.zero_grad()
            F.cross_entropy(model(features), labels).backward()
            optimizer.step()
            if number == 2:
                recorder._rows._writer.flush()
                recorder._rows._writer.wait()
                early = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    assert early.num_steps == 2
    assert early.verify().bit_exact
    early.attribute(query(), by=("query", "example", "step")).check()
    with pytest.raises(IndexError, match="step 3 is not between 0 and 2"):
        early.params(3)
