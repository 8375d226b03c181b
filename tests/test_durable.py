"""With `durable=True`, what a commit names is on the device before the commit is."""

import itertools
import math
import os
import time
from pathlib import Path

import pytest
from torch.optim import SGD

import explaind
from explaind.commit import Commit
from explaind.recording import writer
from tests.cases import BY_NAME, chunks_of, mlp, train
from tests.traced import step_on


class Device:
    """Knows what would be left after a power cut: what was forced since it was written."""

    def __init__(self, monkeypatch, store):
        self.store, self.time = store, itertools.count()
        self.forced, self.renamed, self.commits = {}, {}, 0
        self.fsync, self.replace = os.fsync, os.replace
        monkeypatch.setattr(os, "fsync", self.force)
        monkeypatch.setattr(os, "replace", self.rename)

    def force(self, descriptor):
        self.fsync(descriptor)
        self.forced[os.fstat(descriptor).st_ino] = next(self.time)

    def rename(self, source, target):
        if Path(target).exists():
            assert self.is_forced(source), f"a power cut could leave neither the old nor the new {target}"
        if Path(target) == self.store / "commit.json":
            self.check(source)
        self.replace(source, target)
        self.renamed[os.path.dirname(target)] = next(self.time)  # noqa: PTH120

    def is_forced(self, path):
        return Path(path).stat().st_ino in self.forced

    def check(self, commit):
        paths = [path for path in self.store.rglob("*") if not path.name.startswith("commit.json")]
        assert self.is_forced(commit)
        assert [path for path in paths if not self.is_forced(path)] == []
        directories = [path for path in paths if path.is_dir() and str(path) in self.renamed]
        assert [path for path in directories if self.forced[path.stat().st_ino] < self.renamed[str(path)]] == []
        self.commits += 1


def test_data_are_forced_before_the_commit_that_names_them(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", math.inf)
    chunks_of(monkeypatch, 500)
    device = Device(monkeypatch, tmp_path / "run")
    case, model = BY_NAME["adamw-schedule"], mlp()
    optimizer = case.optimizer(model)
    with explaind.trace(model, optimizer, tmp_path / "run", durable=True) as recorder:
        train(case, model, recorder, optimizer)
        assert device.commits >= 4
    assert device.forced[(tmp_path / "run").stat().st_ino] > device.renamed[str(tmp_path / "run")]
    assert explaind.open_run(tmp_path / "run", model=mlp()).verify().bit_exact


@pytest.mark.parametrize("durable", [True, False])
def test_on_a_slow_device_blocks_are_published_less_often(durable, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_SHARE", 1e-3)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", 0.4)  # a busy machine takes a part of it for any commit
    monkeypatch.setattr(os, "fsync", lambda descriptor: time.sleep(0.02))
    model = mlp()
    optimizer = SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, tmp_path / "run", durable=durable) as recorder:
        for start in [0, 1, 2, 3, 4, 5] * 3:
            step_on(model, optimizer, slice(start, start + 3))
        recorder._rows._writer.wait()
        published = Commit.read(tmp_path / "run").num_steps
        assert published < 10 if durable else published >= 15
    assert explaind.open_run(tmp_path / "run", model=mlp()).num_steps == 18
