"""Summaries of decompositions, against closed forms and against loops that a reader can check."""

import sys

import numpy as np
import pytest
import torch
import xarray as xr

from explaind.analysis.embedding import embed
from explaind.analysis.influence import layer_influence, layer_shares, model_influence, smooth
from explaind.analysis.scores import absolute_importance, cancellation_ratio, data_decay_balance
from explaind.analysis.similarity import similarity, window_similarity
from tests.cases import BY_NAME, query, record

LAYERS = {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path_factory.mktemp("analysis") / "run.zarr")
    run.layers = LAYERS
    return run


@pytest.fixture(scope="module", params=["in memory", "stored"])
def steps(run, request, tmp_path_factory):
    out = {"out": tmp_path_factory.mktemp("steps") / "result.zarr"} if request.param == "stored" else {}
    return run.attribute(query(), by=("query", "example", "step", "layer"), **out).dataset


@pytest.fixture(scope="module", params=["in memory", "stored"])
def elements(run, request, tmp_path_factory):
    out = {"out": tmp_path_factory.mktemp("elements") / "result.zarr"} if request.param == "stored" else {}
    return run.attribute(query(), by=("query", "window", "element"), windows=4, **out).dataset


def test_model_influence_is_an_l1_norm_over_queries(steps):
    influence = model_influence(steps)
    for step in steps["step"].values:
        for part, term in (("data", steps.contribution), ("decay", steps.decay)):
            wanted = sum(abs(float(term.sel(query=q, step=step).sum())) for q in steps["query"].values)
            assert float(influence[part].sel(step=step)) == pytest.approx(wanted, rel=1e-12)
    assert bool((influence["decay"] > 0).all())


def test_layer_influence_takes_absolute_values_of_every_query_and_example(steps):
    influence = layer_influence(steps)
    assert influence.dims == ("step", "layer")
    for step in steps["step"].values:
        for layer in LAYERS:
            entries = steps.contribution.sel(step=step, layer=layer).values.ravel()
            assert float(influence.sel(step=step, layer=layer)) == pytest.approx(sum(map(abs, entries)), rel=1e-12)
    np.testing.assert_allclose(layer_shares(influence).sum("layer"), 1.0)


def test_shares_of_a_step_without_influence_are_not_numbers():
    shares = layer_shares(xr.DataArray([[0.0, 0.0], [0.0, 2.0]], dims=("step", "layer")))
    assert np.isnan(shares[0]).all()
    assert shares[1].values.tolist() == [0.0, 1.0]


def test_smoothing_keeps_lines_and_says_what_it_needs():
    line = xr.DataArray(np.arange(9.0), dims="update_step")
    np.testing.assert_allclose(smooth(line), [1, 1.5, 2, 3, 4, 5, 6, 6.5, 7])
    with pytest.raises(ValueError, match="window must be at least 1 step, got 0"):
        smooth(line, window=0)
    with pytest.raises(ValueError, match=r"needs an axis of steps or windows.*by=\('query', 'step'"):
        smooth(line.rename(update_step="layer"))


def test_importance_is_absolute_before_the_sum_over_queries_only(elements):
    term = elements.contribution
    whole, windowed = absolute_importance(term), absolute_importance(term, keep=("window", "element"))
    for element in term["element"].values[::7]:
        mine = term.sel(element=element)
        assert float(whole.sel(element=element)) == pytest.approx(
            sum(abs(float(mine.sel(query=q).sum())) for q in term["query"].values), rel=1e-12
        )
        first = mine.isel(window=0).values
        assert float(windowed.isel(window=0).sel(element=element)) == pytest.approx(sum(map(abs, first)), rel=1e-12)


def test_the_balance_counts_every_tensor_of_a_layer(elements):
    balance = data_decay_balance(elements)
    assert balance.dims == ("window", "layer")
    assert balance["layer"].values.tolist() == list(LAYERS)
    assert balance["first_step"].values.tolist() == [0, 4]
    for window in elements["window"].values:
        for layer, tensors in LAYERS.items():
            wanted = 0.0
            for tensor in tensors:
                mine = (elements["parameter"] == tensor).values
                for q in elements["query"].values:
                    part = elements.sel(query=q, window=window)
                    wanted += sum(map(abs, part.contribution.values[mine])) - sum(map(abs, part.decay.values[mine]))
            assert float(balance.sel(window=window, layer=layer)) == pytest.approx(wanted, rel=1e-10)


def test_the_balance_of_whole_layers_sums_examples_first(run):
    fine = run.attribute(query(), by=("query", "example", "window", "layer"), windows=4).dataset
    coarse = run.attribute(query(), by=("query", "window", "layer"), windows=4).dataset
    np.testing.assert_allclose(data_decay_balance(fine), data_decay_balance(coarse), rtol=1e-9)


def test_cancellation_is_the_signed_sum_over_the_absolute_one(steps):
    ratio = cancellation_ratio(steps.contribution, over=["example", "step"])
    assert ratio.dims == ("query", "layer")
    entries = steps.contribution.sel(layer="last").isel(query=1).values.ravel()
    wanted = abs(sum(entries)) / sum(map(abs, entries))
    assert float(ratio.sel(layer="last").isel(query=1)) == pytest.approx(wanted, rel=1e-12)
    assert bool((ratio < 1).all())
    assert np.isnan(cancellation_ratio(xr.DataArray([0.0, 0.0], dims="step"), over=["step"]))


def test_similarity_is_the_cosine_of_two_queries_scores(elements):
    found, windowed = similarity(elements.contribution), window_similarity(elements.contribution)
    assert found.dims == ("layer", "query", "other")
    assert windowed.dims == ("window", "layer", "query", "other")
    for layer in LAYERS:
        mine = elements.contribution.isel(element=(elements["layer"] == layer).values)
        for values, matrix in (
            (mine.sum("window"), found.sel(layer=layer)),
            (mine.isel(window=1), windowed.isel(window=1).sel(layer=layer)),
        ):
            one, other = values.isel(query=0).values, values.isel(query=2).values
            cosine = one @ other / np.sqrt(one @ one * (other @ other))
            assert float(matrix[0, 2]) == pytest.approx(cosine, rel=1e-10)
            np.testing.assert_allclose(np.diag(matrix), 1.0)
    assert windowed["first_step"].values.tolist() == [0, 4]


def test_a_query_without_scores_is_like_no_other():
    scores = xr.DataArray([[0.0, 0.0], [1.0, 2.0]], {"layer": ("element", ["a", "a"])}, ["query", "element"])
    matrix = similarity(scores)[0].values
    assert np.isnan(matrix[0]).all()
    assert matrix[1, 1] == pytest.approx(1.0)


def two_clusters():
    rng = np.random.default_rng(0)
    centres = np.repeat(np.eye(8)[:2], 20, axis=0)
    layers = ["a"] * 8 + ["b"] * 2
    scores = np.concatenate([centres + 0.05 * rng.normal(size=centres.shape), rng.normal(size=(40, 2))], axis=1)
    return xr.DataArray(scores, {"layer": ("element", layers)}, ["query", "element"])


@pytest.mark.filterwarnings("ignore:Tensorflow not installed", "ignore::DeprecationWarning")
def test_an_embedding_keeps_alike_queries_together():
    threads = torch.get_num_threads()
    points = embed(two_clusters().assign_coords(query=range(40)), layer="a", num_neighbours=10)
    assert torch.get_num_threads() == threads
    assert points["query"].tolist() == list(range(40))
    one, other = points.iloc[:20][["x", "y"]], points.iloc[20:][["x", "y"]]
    between = float(np.linalg.norm(one.mean() - other.mean()))
    assert between > 2 * max(np.linalg.norm(half - half.mean(), axis=1).max() for half in (one, other))


def test_what_cannot_be_embedded(monkeypatch):
    scores = two_clusters().assign_coords(query=range(40))
    with pytest.raises(ValueError, match="there is no layer 'c'; there are a, b"):
        embed(scores, layer="c")
    with pytest.raises(ValueError, match="needs fewer neighbours than that; got num_neighbours=15"):
        embed(scores[:15], layer="a")
    with pytest.raises(ValueError, match="query 3 has no scores in layer 'a'"):
        embed(scores.where(scores["query"] != 3, 0.0), layer="a")
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match=r"an embedding needs umap-learn.*pip install 'explaind-tracer\[analysis\]'"):
        embed(scores, layer="a")


@pytest.mark.parametrize(
    ("summary", "missing"),
    [
        (lambda data: model_influence(data.sum("query")), "query"),
        (lambda data: layer_influence(data.sum("layer")), "layer"),
        (lambda data: absolute_importance(data.contribution), "element"),
        (lambda data: data_decay_balance(data.sum("layer")), "element"),
        (lambda data: data_decay_balance(data.sum("query")), "query"),
        (lambda data: cancellation_ratio(data.contribution, over=["token"]), "token"),
        (lambda data: similarity(data.contribution), "element"),
        (lambda data: window_similarity(data.contribution), "window"),
    ],
)
def test_an_axis_that_is_missing_is_named(run, summary, missing):
    data = run.attribute(query(), by=("query", "step", "layer")).dataset
    with pytest.raises(ValueError, match=f"this needs the axis '{missing}'.*by= of run.attribute"):
        summary(data)
