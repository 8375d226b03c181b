"""The study's computations and figures on a tiny run."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from experiments.grokking import decompose, kernels, measures, nodes, scores
from experiments.grokking.figures import balance, change_points, influence, kernel, similarity, umap
from experiments.grokking.figures import nodes as nodes_figure
from experiments.grokking.phases import Phases
from experiments.grokking.recipes import quick
from experiments.grokking.sizes import QUICK
from experiments.grokking.training import train
from explaind.analysis.influence import layer_influence, layer_shares, model_influence
from explaind.analysis.scores import data_decay_balance
from explaind.analysis.similarity import window_similarity
from explaind.quadrature import gauss_legendre, midpoint

FEW = replace(QUICK, single_queries=6, window=8, tolerance=1e-4)
FOUND = Phases(memorised=16, half_generalised=16, generalised=30, end=40)
PHASES = {"memorisation": range(0, 10), "generalisation": range(10, 24)}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    recipe = replace(quick(), modulus=7, num_train=20, width=8, heads=2, hidden=8, max_steps=40)
    store = tmp_path_factory.mktemp("tiny") / "run.zarr"
    train(recipe, store, progress=False)
    return recipe, decompose.open_study(recipe, store), recipe.make_split()


def test_windows_are_spread_over_the_phases():
    windows = kernels.windows_across(PHASES, length=2)
    assert list(windows) == ["start", "memorisation", "generalisation", "end"]
    assert windows["generalisation"] == range(16, 18)
    short = {"memorisation": range(0, 60), "circuit formation": range(60, 63), "generalisation": range(63, 90)}
    assert kernels.windows_across(short)["circuit formation"] == range(60, 63)
    with pytest.raises(ValueError, match="windows of 5 steps overlap"):
        kernels.windows_across({"memorisation": range(0, 8)})


def test_windows_and_what_lies_between_hold_every_step():
    windows = kernels.partition(FOUND.spans, num_steps=40)
    assert [step for window in windows.values() for step in window] == list(range(40))
    assert set(kernels.windows_across(FOUND.spans)) <= set(windows)


def test_kernels_are_sorted_by_answer_and_drawn_per_layer_and_window(study, tmp_path):
    recipe, run, split = study
    whole = decompose.by_example(run, recipe, FEW, FOUND, tmp_path / "kernel.zarr", progress=False)
    whole.check()
    found = kernels.kernel_in_windows(whole.dataset, recipe, FOUND.spans)
    assert dict(found.sizes) == {"query": 6, "example": 20, "window": 4, "layer": 6}
    for axis, tokens in (("query", split.validation_tokens), ("example", split.train_tokens)):
        answers = found[f"{axis}_class"].values
        assert (np.diff(answers) >= 0).all()
        assert sorted(answers) == sorted(((tokens[: len(answers), 0] + tokens[: len(answers), 2]) % 7).tolist())
    direct = run.kernel(
        scores.validation_pairs(recipe, num=6),
        by=("query", "example", "window", "layer"),
        windows=kernels.windows_across(FOUND.spans),
        tolerance=1e-4,
    )
    np.testing.assert_allclose(found.sel(query=direct["query"], example=direct["example"]), direct, atol=1e-6)
    figure = kernel.kernel_in_windows(found, recipe.task)
    images = [ax.get_images()[0].get_array() for ax in figure.axes if ax.get_images()]
    np.testing.assert_array_equal(images[1], found.isel(layer=0, window=1))


def test_scores_give_balance_similarity_and_their_figures(study, tmp_path):
    recipe, run, split = study
    result = decompose.by_element(run, recipe, FEW, tmp_path / "scores.zarr", progress=False)
    balances = data_decay_balance(result.dataset)
    line = balance.balance(balances, PHASES).axes[0].get_lines()[0]
    np.testing.assert_array_equal(line.get_ydata(), balances.isel(layer=0))
    matrices = scores.sorted_by_answer(window_similarity(result.dataset.contribution), recipe)
    assert (np.diff(matrices["class"]) >= 0).all()
    pairs = zip(split.validation_tokens, split.validation_labels.tolist(), strict=True)
    answers = {recipe.task.text(pair): answer for pair, answer in pairs}
    assert [answers[name] for name in matrices["query"].values] == matrices["class"].values.tolist()
    np.testing.assert_array_equal(matrices["query"], matrices["other"])
    drawn = similarity.similarity_in_windows(matrices, recipe.task, most=2)
    images = [ax.get_images()[0].get_array() for ax in drawn.axes if ax.get_images()]
    np.testing.assert_array_equal(images[1], matrices.isel(window=-1, layer=0))
    assert len(similarity.similarity(matrices.isel(window=0), recipe.task).axes) == 7


def test_embedded_predictions_have_their_class(study, monkeypatch):
    recipe, _, split = study
    plane = pd.DataFrame({"query": ["a", "b"], "x": [0.0, 1.0], "y": [0.0, 1.0]})
    monkeypatch.setattr(scores, "embed", lambda term, *, layer, seed: plane)
    points = scores.embedded(None, split, layer="linear2")
    assert points["class"].tolist() == split.validation_labels[:2].tolist()
    dots = umap.embedding(points, recipe.task, layer="linear2").axes[0].collections[0]
    np.testing.assert_array_equal(dots.get_array(), points["class"])


def test_more_nodes_give_smaller_errors(study):
    recipe, run, _ = study
    rules = [nodes.Rule(family="midpoint", quadrature=midpoint(num)) for num in (1, 16)]
    rules.append(nodes.Rule(family="Gauss–Legendre", quadrature=gauss_legendre(4)))
    query = scores.validation_pairs(recipe, num=4)
    table = nodes.closure_by_nodes(run, query, steps=range(0, 24, 4), rules=rules)
    assert table["num_steps"].tolist() == [6, 6, 6]
    assert table["nodes"].tolist() == [1, 16, 4]
    assert table["mean_error"][1] < table["mean_error"][0] / 4
    assert (table["max_error"] >= table["mean_error"]).all()
    (adaptive,) = nodes.closure_by_nodes(run, query, steps=range(6), rules=nodes.RULES[-1:]).itertuples()
    assert adaptive.max_error < 1e-3
    drawn = nodes_figure.closure_by_nodes(table).axes[0].get_lines()
    np.testing.assert_array_equal(drawn[0].get_ydata(), table["mean_error"][:2])


def test_influences_and_change_points_are_drawn_over_the_phases(study, tmp_path):
    recipe, run, _ = study
    data = decompose.by_class(run, recipe, FEW, tmp_path / "by_class.zarr", progress=False).dataset
    totals = measures.running_totals(data)
    wanted = data.contribution.sum(["group", "layer"]).mean("query").cumsum("step")
    np.testing.assert_allclose(totals["data"], wanted, rtol=1e-9)
    figure = influence.model_influence(model_influence(data), totals, PHASES)
    np.testing.assert_allclose(figure.axes[1].get_lines()[0].get_ydata(), totals["data"])
    layers = layer_influence(data)
    assert len(influence.layer_influence(layers, PHASES).axes) == 2
    points = pd.DataFrame({"step": [9], "low": [8], "high": [11]})
    figure = change_points.change_points(layer_shares(layers), points, PHASES, accuracies={"training 0.99": 10})
    assert "9 (8–11)" in figure.get_suptitle()
    assert [text.get_text() for text in figure.axes[0].texts] == ["memorisation", "generalisation", "training 0.99"]
    per_phase = measures.phase_kernels(data, FOUND.spans)
    np.testing.assert_allclose(per_phase.sum("phase"), data.contribution.sum(["step", "layer"]), rtol=1e-9)
    assert len(kernel.kernel_by_class(per_phase, recipe.task).axes) == 6
