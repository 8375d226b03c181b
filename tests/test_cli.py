import json
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader

import explaind
from explaind.cli import main
from explaind.inventory import store_info
from tests.cases import BY_NAME, chunks_of, record
from tests.traced import change_attributes, change_commit

MODEL = "tests.cases:mlp"


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    path = tmp_path_factory.mktemp("intact") / "run.zarr"
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, 500)
        record(BY_NAME["adamw-schedule"], path)
    return path


@pytest.fixture
def path(intact, tmp_path):
    return shutil.copytree(intact, tmp_path / "run.zarr")


def call(*arguments):
    """Exit code, stdout and stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="explaind")
    return result.exit_code, result.stdout, result.stderr


def whole(path):
    return f"6 steps in {len(store_info(path).arrays)} arrays, nothing is damaged\n"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_info_prints_what_the_library_finds(intact):
    assert call("info", intact) == (0, f"{store_info(intact)}\n", "")
    code, out, err = call("info", intact, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(json.dumps(store_info(intact).to_json()))


def test_a_whole_run_is_verified(intact):
    assert call("verify", intact) == (0, whole(intact), "")


def test_a_run_is_replayed_with_its_model(intact):
    code, out, err = call("verify", intact, "--model", MODEL)
    assert (code, err) == (0, "")
    assert "gradients: 6 of 6 bit for bit" in out
    replay = json.loads(call("verify", intact, "--model", MODEL, "--json")[1])["replay"]
    assert replay["bit_exact"]
    assert replay["exact_updates"] == 6


def test_all_damage_is_listed(path):
    flip(path / "gradient" / "c" / "1" / "0")
    (path / "params" / "c" / "2" / "0").unlink()
    (path / "loss" / "zarr.json").unlink()
    (path / "updated" / "zarr.json").write_text("{")
    code, out, err = call("verify", path, "--model", MODEL)
    assert code == 1
    files = {line.partition(":")[0] for line in out.splitlines()}
    assert files == {"gradient/c/1/0", "params/c/2/0", "loss/zarr.json", "updated/zarr.json"}
    assert err == f"Error: {path}: 4 pieces are damaged, so no step was replayed.\n"
    found = json.loads(call("verify", path, "--json")[1])["damage"]
    (gradient,) = (entry for entry in found if entry["array"] == "gradient")
    assert gradient["steps"] == [2, 3]
    assert "a chunk is damaged: 'gradient', step 2 to 3" in gradient["problem"]


@pytest.mark.parametrize("name, steps", [("call_kind", "0 to 5"), ("row_example", "0 to 5")])
def test_damage_to_calls_and_rows_is_told_by_step(name, steps, path):
    flip(path / name / "c" / "0")
    code, out, _ = call("verify", path)
    assert code == 1
    assert out.endswith(f"it is of steps {steps}\n")


def test_a_commit_that_promises_more_than_there_is_is_damage(path):
    change_commit(path, lambda commit: commit["lengths"].update(step=10**9))
    code, out, _ = call("verify", path)
    assert code == 1
    assert "the array 'gradient'" in out
    assert "has 6 rows along step, the commit says 1000000000" in out


def test_an_update_that_does_not_replay_fails(path):
    change_attributes(path, lambda attributes: attributes.update(group_optimizers=["torch.optim.sgd.SGD"]))
    code, out, err = call("verify", path, "--model", MODEL)
    assert code == 1
    assert out == whole(path)
    assert "does not reach the recorded parameters" in err
    code, out, _ = call("verify", path, "--model", MODEL, "--json")
    assert code == 1
    assert "does not reach the recorded parameters" in json.loads(out)["error"]


def test_a_run_that_has_lost_its_description_is_damaged(path):
    (path / "zarr.json").write_text("{")
    for command in ("info", "verify"):
        code, out, err = call(command, path)
        assert (code, out) == (1, "")
        assert err.startswith(f"Error: the metadata of {path} cannot be read")


def no_module():
    return 3


@pytest.mark.parametrize(
    "model, message",
    [
        ("tests.cases", "'tests.cases' is not of the form package.module:name."),
        ("tests.nowhere:mlp", "'tests.nowhere:mlp': No module named 'tests.nowhere'; it is looked for in "),
        ("tests.cases:nothing", "'tests.cases:nothing': the module has nothing of that name."),
        ("tests.cases:CASES", "'tests.cases:CASES': the module has a list there, no function."),
        (f"{__name__}:no_module", "--model must name a torch.nn.Module or what makes one; it made 3."),
        ("torch.nn:Identity", "the model has no '0.weight', which the run at "),
    ],
)
def test_a_model_that_is_none_is_misuse(model, message, intact):
    code, out, err = call("verify", intact, "--model", model)
    assert (code, out) == (2, "")
    assert message in err


def test_what_is_no_run_is_misuse(tmp_path):
    assert call("info", tmp_path / "nowhere")[0] == 2
    for command in ("info", "verify"):
        code, out, err = call(command, tmp_path)
        assert (code, out) == (2, "")
        assert err.startswith(f"Error: {tmp_path} is not a recorded run: it has no commit.json.")


def losses(model, batch):
    return model(batch).square().sum(dim=1)


def test_an_objective_is_asked_for_and_used(tmp_path):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr", objective=losses) as recorder:
        for batch in recorder.batches(DataLoader(torch.eye(2))):
            optimizer.zero_grad()
            losses(model, batch).sum().backward()
            optimizer.step()
    arguments = ("verify", tmp_path / "run.zarr", "--model", f"{__name__}:linear")
    code, _, err = call(*arguments)
    assert code == 2
    assert "name the function with --objective module:name" in err
    code, out, _ = call(*arguments, "--objective", f"{__name__}:losses")
    assert code == 0
    assert "updates:   2 of 2 bit for bit" in out


@pytest.mark.parametrize("steps, num", [("2:5", 3), (":-1", 5), ("4:", 2), (None, 6)])
def test_steps_are_exported(steps, num, intact, tmp_path):
    out = tmp_path / "part.zarr"
    options = () if steps is None else ("--steps", steps)
    assert call("export", intact, out, *options) == (0, f"{num} steps are in {out}\n", "")
    assert explaind.open_run(out).num_steps == num
    code, _, err = call("export", intact, out, *options)
    assert code == 2
    assert "exists already" in err


def test_a_run_is_thinned(intact, tmp_path):
    out = tmp_path / "thin.zarr"
    code, _, err = call("export", intact, out, "--every", 3)
    assert code == 2
    assert "--every replays the steps, which takes --model" in err
    assert call("export", intact, out, "--every", 3, "--model", MODEL) == (0, f"6 steps are in {out}\n", "")
    assert call("verify", out, "--model", MODEL)[0] == 0
    code, _, err = call("export", out, tmp_path / "part.zarr", "--steps", "1:3")
    assert code == 2
    assert "the first or the last of these steps has to be replayed, which takes --model" in err
    assert call("export", out, tmp_path / "copy.zarr") == (0, f"6 steps are in {tmp_path / 'copy.zarr'}\n", "")
    assert call("export", out, tmp_path / "part.zarr", "--steps", "1:3", "--model", MODEL)[0] == 0


@pytest.mark.parametrize("steps", ["3", "1:2:3", "a:b", "5:2", "3:9"])
def test_steps_that_are_none_are_misuse(steps, intact, tmp_path):
    code, out, err = call("export", intact, tmp_path / "part.zarr", "--steps", steps)
    assert (code, out) == (2, "")
    assert "--steps" in err
    assert not (tmp_path / "part.zarr").exists()


def linear():
    return torch.nn.Linear(2, 1)


def test_the_program_runs_and_is_quick_where_it_need_not_compute(intact):
    run = [sys.executable, "-X", "importtime", "-m", "explaind"]
    for arguments in (["--help"], ["info", intact]):
        done = subprocess.run([*run, *arguments], capture_output=True, text=True, check=True)
        assert "torch" not in done.stderr
    assert done.stdout == f"{store_info(intact)}\n"
    failed = subprocess.run([*run[:1], "-m", "explaind", "verify", intact.parent], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("Error: ")
