"""Everything printed in the documentation runs."""

import doctest
import importlib
import pkgutil
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient

import experiments.grokking
import explaind
from tests.cases import CASES, record

ROOT = Path(__file__).parents[1]
MODULES = [
    name
    for package in (explaind, experiments.grokking)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not name.endswith("__main__")
]
IN_TEST_GROKKING = "02_grokking_study"  # on the study that is made there
NOTEBOOKS = [path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.stem != IN_TEST_GROKKING]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name, tmp_path):
    names = {"torch": torch, "explaind": explaind, "outputs": explaind.outputs, "store": tmp_path / "run.zarr"}
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs=names, optionflags=doctest.ELLIPSIS).failed == 0


def test_the_readmes_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    _, example = blocks("README.md")
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "sum of terms differs from the prediction by" in printed
    assert "raised" in printed
    assert (tmp_path / "storage" / "run.zarr").is_dir()


@pytest.mark.filterwarnings("ignore::explaind.errors.ReplayWarning")  # on machines that round otherwise
def test_the_readmes_sample_run_says_what_is_printed_there(monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(ROOT)
    example, _ = blocks("README.md")
    exec(compile(example, "README.md", "exec"), {})
    certificate, *table = capsys.readouterr().out.splitlines()
    assert "sum of terms differs from the prediction by" in certificate
    assert "\n".join(table) in (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*commit.json:zarr.errors.ZarrUserWarning")
def test_the_format_pages_snippets_read_a_run(tmp_path):
    run, _ = record(CASES[1], tmp_path / "run.zarr")
    names = {}
    for block in blocks("storage/README.md"):
        exec(block.replace('Path("storage/run-1.zarr")', f"Path({str(run.path)!r})"), names)
    assert names["num_steps"] == run.num_steps
    assert torch.equal(torch.from_numpy(names["weight"]), run.params(run.num_steps)["0.weight"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # of the notebook machinery, not ours
def test_notebooks_run(notebook, tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    shutil.copytree(ROOT / "storage" / "sample.zarr", tmp_path / "storage" / "sample.zarr")
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(
        content, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "notebooks"}}
    )
    client.execute()


def test_importing_the_package_loads_no_matplotlib():
    code = "import sys, explaind; sys.exit('matplotlib' in sys.modules or 'dask' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_public_names_are_few_and_exist():
    assert len(explaind.__all__) <= 20
    for name in explaind.__all__:
        assert getattr(explaind, name).__doc__
