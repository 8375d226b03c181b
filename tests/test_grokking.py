"""The grokking experiment: the paper's sizes, and all stages end to end on a tiny problem."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from nbclient import NotebookClient

from experiments.grokking import __main__ as command
from experiments.grokking import training
from experiments.grokking.claims import CLAIMS
from experiments.grokking.gallery import GALLERY
from experiments.grokking.measures import class_difference_profile, same_class_share, smooth
from experiments.grokking.model import LAYER_GROUPS, ModularTransformer, layer_groups
from experiments.grokking.phases import find_phases
from experiments.grokking.recipes import paper, quick
from experiments.grokking.sizes import Sizes
from experiments.grokking.task import ModularAddition
from experiments.grokking.training import evaluate, train
from explaind import Attribution

pytestmark = [
    pytest.mark.timeout(3000),  # whichever test comes first waits for the whole study
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what umap-learn imports
]

ROOT = Path(__file__).parents[1]
LITTLE = Sizes(
    tolerance=1e-2,
    single_queries=16,
    window=100,
    machine_inputs=1,
    node_queries=2,
    node_steps=1,
    checkpoints=6,
    retrain_seeds=1,
    retrain_epochs=3,
    draws=19,
    perturbed=3,
    perturbed_queries=2,
    perturbed_steps=(1, 2),
)


def test_the_papers_model_has_its_sizes():
    model = paper().make_model()
    assert sum(p.numel() for p in model.parameters()) == 89_664
    used = [name for group in LAYER_GROUPS.values() for name in group]
    assert sum(p.numel() for name, p in model.named_parameters() if name in used) == 89_024
    split = paper().make_split()
    assert (len(split.train_tokens), len(split.validation_tokens)) == (4000, 2000)
    assert paper().task.num_pairs == 6441


def test_every_parameter_is_in_one_layer_group():
    model = paper().make_model()
    grouped = [name for group in layer_groups(model).values() for name in group]
    assert sorted(grouped) == sorted(name for name, _ in model.named_parameters())


def test_the_split_is_disjoint_and_labelled_right():
    split = ModularAddition(11).split(40, seed=3)
    train, validation = (
        {tuple(t) for t in tokens.tolist()} for tokens in (split.train_tokens, split.validation_tokens)
    )
    assert not train & validation
    assert len(train | validation) == 66
    a, _, b, _ = split.validation_tokens.T
    assert torch.equal((a + b) % 11, split.validation_labels)


def test_addition_commutes_in_the_model():
    model = ModularTransformer(13, 8, heads=2, hidden=16)
    torch.testing.assert_close(model(torch.tensor([[3, 11, 7, 12]])), model(torch.tensor([[7, 11, 3, 12]])))


def test_phases_are_read_off_the_curves():
    curves = pd.DataFrame(
        {"train_accuracy": [0.1, 0.99, 1.0, 1.0, 1.0, 1.0], "validation_accuracy": [0.0, 0.0, 0.1, 0.5, 0.9, 0.96]}
    )
    phases = find_phases(curves)
    assert (phases.memorised, phases.half_generalised, phases.generalised, phases.end) == (1, 3, 5, 5)
    assert phases.spans["generalisation"] == slice(3, 5)
    with pytest.raises(ValueError, match=r"validation accuracy never reached 0.95 \(its best is 0.900\)"):
        find_phases(curves[:5])
    lost = pd.concat([curves, curves[:1]], ignore_index=True)
    with pytest.raises(ValueError, match=r"ends with a validation accuracy of 0\.000: it did not stay grokked"):
        find_phases(lost)


def test_class_profiles_find_a_cyclic_matrix():
    residues = np.arange(7)
    difference = (residues[None, :] - residues[:, None] + 3) % 7 - 3
    kernel = xr.DataArray(np.cos(difference), {"query": residues, "group": residues}, ["query", "group"])
    profile = class_difference_profile(kernel, range(7))
    np.testing.assert_allclose(profile, np.cos(profile.difference))
    assert same_class_share(xr.ones_like(kernel)) == pytest.approx(1 / 7)


def test_smoothing_keeps_the_mean_of_a_line():
    line = xr.DataArray(np.arange(9.0), dims="step")
    np.testing.assert_allclose(smooth(line), [1, 1.5, 2, 3, 4, 5, 6, 6.5, 7])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The quick study itself, with a coarser quadrature and less of every analysis to keep it short."""
    directory = tmp_path_factory.mktemp("study") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(command.SIZES, "quick", LITTLE)
        for seed in (2, 1, 0):  # another machine rounds differently, and one run in twelve does not grok
            arguments = ["--out", str(directory), "--seed", str(seed), "--quiet", "--processes", "1"]
            if command.main([*arguments, "--fresh"]) == 0:
                break
        yield directory, arguments


def test_the_quick_recipe_groks(study):
    directory, _ = study
    phases = find_phases(pd.read_csv(directory / "curves.csv", index_col="step"))
    assert phases.half_generalised >= 2 * phases.memorised
    assert phases.end <= 1000


def test_a_study_leaves_every_picture_with_its_data(study):
    directory, _ = study
    for name in GALLERY:
        for kind in ("png", "svg"):
            assert (directory / "figures" / f"{name}.{kind}").stat().st_size > 1000
        assert list((directory / "figures").glob(f"{name}*.csv")) + list((directory / "figures").glob(f"{name}*.zarr"))


def test_a_studys_findings_have_the_closure_of_every_decomposition(study):
    directory, _ = study
    findings = json.loads((directory / "findings.json").read_text())
    assert set(findings["closure"]) == {"by class", "by example", "by element"}
    for name, closure in findings["closure"].items():
        assert closure["relative_closure_error"] <= 1e-12
        assert closure["quadrature_error_over_change"] <= 1e-2
        assert Attribution.open(directory / f"{name.replace(' ', '_')}.zarr").check().passed
    assert findings["kernel_machine"]["argmax_agreement"] == 1


def test_every_claim_is_judged_in_the_findings(study):
    directory, _ = study
    findings = json.loads((directory / "findings.json").read_text())
    page = (directory / "findings.md").read_text()
    assert len(findings["claims"]) == len(CLAIMS)
    for claim in findings["claims"]:
        assert claim["verdict"] in ("agrees", "refines", "disagrees")
        assert claim["figure"] in GALLERY
        assert claim["ours"].replace("|", "\\|") in page
        assert claim["theirs"].replace("|", "\\|") in page
    rows = [line for line in page.splitlines() if line.startswith("| ") and "](figures/" in line]
    assert [len(re.split(r"(?<!\\)\|", row)) for row in rows] == [6] * len(CLAIMS)
    assert f"reached 0.99 at step {findings['memorised_at']}" in page


def test_a_study_goes_on_where_it_stopped(study):
    directory, arguments = study
    before = (directory / "by_class.zarr" / "zarr.json").stat().st_mtime_ns
    (directory / "findings.md").unlink()
    (directory / "swaps.csv").unlink()
    (directory / "figures" / "swaps.drawn").unlink()
    (directory / "retrained" / "nothing-0.csv").unlink()
    assert command.main([*arguments[:-1], "2"]) == 0
    assert (directory / "findings.md").is_file()
    assert (directory / "swaps.csv").is_file()
    assert (directory / "retrained" / "nothing-0.csv").is_file()
    assert (directory / "by_class.zarr" / "zarr.json").stat().st_mtime_ns == before


PROGRAM = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from experiments.grokking.ahead import _begin
from experiments.grokking.recipes import quick
from experiments.grokking.sizes import QUICK
from experiments.grokking.study import Study

if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin, initargs=(Study(quick(), QUICK, Path()),))
    print(pool.submit(os.getpid).result(), flush=True)
    pool.submit(time.sleep, 600).result()
"""


def test_nobody_goes_on_with_a_study_that_was_killed(tmp_path):
    (program := tmp_path / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command_line = [sys.executable, str(program)]
    with subprocess.Popen(command_line, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    until = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(worker)


def is_running(process):
    status = Path(f"/proc/{process}/status")
    return status.is_file() and "State:\tZ" not in status.read_text()  # nor ended, and not yet taken note of


@pytest.mark.filterwarnings("default")  # of the notebook machinery, not ours
def test_the_notebook_tells_the_story_of_a_study(study, monkeypatch):
    directory, arguments = study
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    content = nbformat.read(ROOT / "notebooks" / "02_grokking_study.ipynb", as_version=4)
    (parameters,) = (cell for cell in content.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = (
        "from experiments.grokking.sizes import Sizes\n"
        f"directory, recipe, sizes = {str(directory)!r}, quick({arguments[3]}), {LITTLE!r}"
    )
    before = {path: path.stat().st_mtime_ns for path in directory.glob("*.zarr")}
    NotebookClient(content, timeout=300, kernel_name="python3").execute()
    assert before == {path: path.stat().st_mtime_ns for path in directory.glob("*.zarr")}
    outputs = [output for cell in content.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert printed.count("sum of terms differs from the prediction by") == 3
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    (page,) = (output.data["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))
    findings = json.loads((directory / "findings.json").read_text())
    assert all(claim["ours"] in page for claim in findings["claims"])


def test_an_interrupted_training_goes_on_with_the_same_curves(tmp_path, monkeypatch):
    recipe = replace(quick(), max_steps=6)
    whole = train(recipe, tmp_path / "whole.zarr", progress=False)
    evaluated = []

    def interrupting(*arguments):
        evaluated.append(arguments)
        if len(evaluated) == 5:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", interrupting)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "half.zarr", progress=False)
    assert len(evaluated) == 5
    pd.testing.assert_frame_equal(train(recipe, tmp_path / "half.zarr", progress=False), whole)


def test_a_directory_of_another_study_is_refused(study, tmp_path, capsys):
    _, arguments = study
    assert command.main([*arguments[:2], "--seed", "99", "--quiet"]) == 1
    assert "another recipe or size" in capsys.readouterr().err
    (tmp_path / "thesis.tex").touch()
    assert command.main(["--out", str(tmp_path), "--fresh"]) == 1
    assert (tmp_path / "thesis.tex").is_file()
