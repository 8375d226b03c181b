"""Runs whose newest files did not reach the device, or were copied while they grew, open as far as they are whole."""

import random
import re
import shutil
from pathlib import Path

import pytest
from torch.optim import AdamW

import explaind
from explaind.commit import Commit
from explaind.damage import find_damage
from explaind.errors import DamagedStoreError, DamagedStoreWarning
from explaind.inventory import store_info
from explaind.recording import writer
from explaind.store import StoreReader
from tests.cases import chunks_of, mlp, query
from tests.traced import step_on


def grow(path, monkeypatch, *, num_steps=40, at_step=lambda recorder, step: None):
    """Record a run in which every step is a block, and call something in each."""
    monkeypatch.setattr(writer, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(writer, "_CHEAP_SECONDS", 10.0)  # also where publishing is slow
    chunks_of(monkeypatch, 1500)
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, path, overwrite=True) as recorder:
        for step in range(num_steps):
            step_on(model, optimizer, slice(step % 6, step % 6 + 3))
            recorder._rows._writer.wait()
            at_step(recorder, step)


def unclosed(path, monkeypatch):
    """A run that was not closed, after 38 published steps."""

    def keep(recorder, step):
        if step == 39:
            shutil.copytree(recorder.path, path)

    grow(path.with_name("growing"), monkeypatch, at_step=keep)
    return explaind.open_run(path.with_name("growing"))


def newest_chunks(path, name, count):
    files = sorted((path / name / "c").iterdir(), key=lambda file: int(file.name))[-count:]
    return [file if file.is_file() else next(inner for inner in file.rglob("*") if inner.is_file()) for file in files]


HARM = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-9]),
    "zero": lambda file: file.write_bytes(bytes(file.stat().st_size)),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("count", [1, 3])
def test_what_did_not_reach_the_device_is_left_out(count, harm, tmp_path, monkeypatch):
    path = tmp_path / "run"
    whole = unclosed(path, monkeypatch)
    for name in ("params", "gradient", "state/exp_avg"):
        for file in newest_chunks(path, name, count):
            HARM[harm](file)
    with pytest.warns(DamagedStoreWarning, match=r"the newest steps of .*run are lost.*of 38 steps are read"):
        run = explaind.open_run(path, model=mlp())
    assert 10 <= run.num_steps < 38
    for step in range(run.num_steps + 1):
        assert run.flat_params(step).equal(whole.flat_params(step))
    assert run.verify().bit_exact
    run.attribute(query(num=1), by=("query", "example", "step")).check()


def test_what_is_lost_is_damage_to_who_looks_for_it(tmp_path, monkeypatch):
    unclosed(tmp_path / "run", monkeypatch)
    newest_chunks(tmp_path / "run", "params", 1)[0].unlink()
    message = r"the newest steps of .*run are lost.*a chunk is missing: 'params'.*The first \d+ of 38 steps are read"
    (lost,) = find_damage(StoreReader(tmp_path / "run"))
    assert lost.file == "commit.json"
    assert re.search(message, lost.problem)
    assert store_info(tmp_path / "run").damage == (lost.problem,)


def test_damage_in_the_middle_is_none_of_a_power_cut(tmp_path, monkeypatch):
    unclosed(tmp_path / "run", monkeypatch)
    newest_chunks(tmp_path / "run", "params", 9)[0].unlink()
    with pytest.raises(DamagedStoreError, match="a chunk is missing: 'params'"):
        explaind.open_run(tmp_path / "run", model=mlp()).verify()


def test_a_run_that_was_closed_has_lost_nothing_or_is_damaged(tmp_path, monkeypatch):
    grow(tmp_path / "run", monkeypatch)
    newest_chunks(tmp_path / "run", "params", 1)[0].unlink()
    run = explaind.open_run(tmp_path / "run")
    assert run.num_steps == 40
    run.params(20)
    with pytest.raises(DamagedStoreError, match="a chunk is missing: 'params'"):
        run.params(40)


@pytest.mark.parametrize("name", ["params", "row_input"])
def test_a_run_of_which_nothing_is_left_is_damaged(name, tmp_path, monkeypatch):
    unclosed(tmp_path / "run", monkeypatch)
    for file in newest_chunks(tmp_path / "run", name, 100):
        file.unlink()
    with pytest.raises(DamagedStoreError, match=f"a chunk is missing: '{name}'"):
        explaind.open_run(tmp_path / "run", model=mlp()).verify()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore::explaind.errors.DamagedStoreWarning")
def test_a_copy_of_a_growing_run_has_a_prefix(seed, tmp_path, monkeypatch):
    chance, copied, todo = random.Random(seed), tmp_path / "copy", []

    def copy_some(recorder, step):
        if step == 10:
            todo.extend(file for file in recorder.path.rglob("*") if file.is_file())
            chance.shuffle(todo)
        for _ in range(min(len(todo), 4) if step > 10 else 0):
            file = todo.pop()
            target = copied / file.relative_to(recorder.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    grow(tmp_path / "run", monkeypatch, num_steps=60, at_step=copy_some)
    assert not todo
    assert 8 <= Commit.read(copied).num_steps < 60
    run = explaind.open_run(copied, model=mlp())
    assert run.num_steps >= 4
    assert run.verify().bit_exact
    run.attribute(query(num=1), by=("query", "example", "step")).check()
