"""The recorded run that comes with the repository: it is small, whole, and says what the README says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import explaind
from explaind.cli import main

pytest.importorskip("sklearn")

from examples import sample_run

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / sample_run.SAMPLE

pytestmark = pytest.mark.filterwarnings("ignore::explaind.errors.ReplayWarning")  # on machines that round otherwise


def files(directory):
    return {path.relative_to(directory): path.stat() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run():
    return explaind.open_run(SAMPLE, model=sample_run.make_model())


def test_it_is_small_and_has_few_files():
    sizes = [stat.st_size for stat in files(SAMPLE).values()]
    assert sum(sizes) <= 2e6
    assert len(sizes) <= 100


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout of git")
def test_git_keeps_it_and_no_other_run():
    def ignored(path):
        return subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT).returncode == 0

    assert not ignored("storage/sample.zarr/params/c/0/0")
    assert ignored("storage/run-1.zarr/params/c/0/0")
    assert ignored("storage/sample.zarr.lock")


def test_every_step_of_it_replays(run):
    report = run.verify()
    assert report.num_steps == run.num_steps == 120
    assert report.largest_gradient_difference < 1e-5
    assert report.largest_update_difference < 1e-5


def test_held_out_digits_are_explained_and_nothing_is_written(run):
    def found():
        return {path: stat.st_mtime_ns for path, stat in files(SAMPLE).items()}, set(SAMPLE.parent.glob("sample*"))

    before, digits = found(), sample_run.sample_digits()
    query = explaind.Query(digits.test_images[:3], output=explaind.outputs.margin(digits.test_labels[:3]))
    result = explaind.open_run(SAMPLE, model=sample_run.make_model()).attribute(
        query, by=("query", "example", "layer"), tolerance=1e-3
    )
    assert result.check().passed
    assert dict(result.dataset.contribution.sizes) == {"query": 3, "example": 300, "layer": 3}
    assert found() == before


def test_it_has_learned_to_read(run):
    digits, model = sample_run.sample_digits(), sample_run.make_model()
    model.load_state_dict(run.params(run.num_steps))
    assert (model(digits.test_images).argmax(dim=1) == digits.test_labels).double().mean() > 0.9


def test_the_script_makes_it(run, tmp_path, capsys):
    sample_run.main(["--out", str(tmp_path / "sample.zarr")])
    assert "test accuracy 92" in capsys.readouterr().out
    again = explaind.open_run(tmp_path / "sample.zarr", model=sample_run.make_model())
    for step in (0, run.num_steps):
        torch.testing.assert_close(again.flat_params(step), run.flat_params(step), rtol=1e-3, atol=1e-4)


def test_the_command_line_prints_what_the_readme_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    (shown,) = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    calls = re.findall(r"\$ explaind (.*)\n([^$]*)", shown)
    assert [call.split()[0] for call, _ in calls] == ["info", "verify"]
    for call, printed in calls:
        result = CliRunner().invoke(main, call.split(), prog_name="explaind")
        assert (result.exit_code, result.stdout.rstrip()) == (0, printed.rstrip())


def test_the_command_line_replays_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["verify", "storage/sample.zarr", "--model", "examples.sample_run:make_model"]
    result = CliRunner().invoke(main, arguments, prog_name="explaind")
    assert result.exit_code == 0
    assert "gradients: " in result.stdout
