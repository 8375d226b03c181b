"""Figures of computed data: they show its numbers, with the study's colours and readable labels."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from explaind.plots import (
    plot_balance,
    plot_bands,
    plot_change_points,
    plot_closure_by_nodes,
    plot_curves,
    plot_embedding,
    plot_layer_influence,
    plot_layer_shares,
    plot_model_influence,
    plot_phases,
    plot_similarity,
)
from explaind.plots.style import layer_styles
from tests.cases import BY_NAME, query, record

LAYERS = ["embedding", "attention", "decoder"]


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path_factory.mktemp("plots") / "run.zarr")
    run.layers = {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}
    return run


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def by_layer(values, axis="step", **coordinates):
    return xr.DataArray(values, {axis: range(len(values)), "layer": LAYERS, **coordinates}, [axis, "layer"])


def test_a_layer_has_one_colour_in_all_figures_of_a_study():
    influence = by_layer(np.arange(1.0, 7.0).reshape(2, 3))
    whole = lines(plot_layer_influence(influence))
    part = lines(plot_layer_shares(influence.sel(layer=["decoder"]), study=LAYERS))
    ends = {"first_step": ("window", [0, 50]), "last_step": ("window", [49, 99])}
    balance = lines(plot_balance(by_layer(np.ones((2, 3)), "window", **ends).sel(layer=["decoder"]), study=LAYERS))
    for figure in (part, balance):
        assert figure["decoder"].get_color() == whole["decoder"].get_color()
        assert figure["decoder"].get_linestyle() == whole["decoder"].get_linestyle()
    assert len({(line.get_color(), line.get_linestyle()) for line in whole.values()}) == 3
    with pytest.raises(ValueError, match="'mlp' is none of the study's layers, which are embedding, attention"):
        layer_styles(["mlp"], LAYERS)


def test_layer_influence_is_drawn_on_a_logarithmic_scale_and_shares_from_zero():
    influence = by_layer(np.arange(1.0, 7.0).reshape(2, 3))
    ax = plot_layer_influence(influence)
    assert (ax.get_yscale(), ax.get_xlabel()) == ("log", "optimizer step")
    np.testing.assert_array_equal(lines(ax)["attention"].get_ydata(), [2.0, 5.0])
    assert plot_layer_shares(influence).get_ylim()[0] == 0
    with pytest.raises(ValueError, match="needs the axis 'layer'"):
        plot_layer_influence(influence.sum("layer"))


def test_model_influence_has_a_line_for_data_and_one_for_decay():
    influence = xr.Dataset({"data": ("step", [3.0, 4.0]), "decay": ("step", [1.0, 0.5])}, {"step": [0, 1]})
    found = lines(plot_model_influence(influence))
    np.testing.assert_array_equal(found["training examples"].get_ydata(), [3.0, 4.0])
    np.testing.assert_array_equal(found["weight decay"].get_ydata(), [1.0, 0.5])
    without = plot_model_influence(influence.assign(decay=("step", [0.0, 0.0])))
    assert list(lines(without)) == ["training examples"]


def test_balance_runs_through_the_middles_of_the_windows():
    ends = {"first_step": ("window", [0, 50]), "last_step": ("window", [49, 79])}
    ax = plot_balance(by_layer(np.array([[1.0, -2.0, 3.0], [4.0, 5.0, -6.0]]), "window", **ends))
    line = lines(ax)["attention"]
    assert line.get_xdata().tolist() == [25.0, 65.0]
    assert line.get_ydata().tolist() == [-2.0, 5.0]
    assert ax.get_yscale() == "symlog"


def test_similarities_are_white_at_zero_and_grey_where_there_are_none():
    matrix = xr.DataArray([[1.0, 0.0], [np.nan, -1.0]], {"query": [3, 4], "other": [3, 4]}, ["query", "other"])
    image = plot_similarity(matrix).get_images()[0]
    assert (image.norm.vmin, image.norm.vmax) == (-1, 1)
    colours = image.to_rgba(image.get_array())
    assert min(colours[0, 1][:3]) > 0.9
    np.testing.assert_allclose(colours[1, 0][:3], 0.6, atol=0.01)
    with pytest.raises(ValueError, match="needs two axes"):
        plot_similarity(matrix[0])


def test_phases_are_bands_with_names():
    ax = plot_phases({"memorisation": range(0, 60), "circuit formation": slice(60, 200)})
    assert [text.get_text() for text in ax.texts] == ["memorisation", "circuit\nformation"]
    assert [(band.get_x(), band.get_width()) for band in ax.patches] == [(0, 60), (60, 140)]
    assert ax.get_xlim() == (0, 200)
    assert not plot_phases({"all": range(5)}, names=False).texts
    with pytest.raises(ValueError, match="phase 'all' needs a first and a last step"):
        plot_phases({"all": slice(None)})
    with pytest.raises(ValueError, match="there are no phases"):
        plot_phases({})


def test_change_points_are_lines_in_their_intervals():
    ax = plot_change_points(pd.DataFrame({"step": [60, 335], "low": [41, 331], "high": [64, 339]}))
    assert [line.get_xdata()[0] for line in ax.get_lines()] == [60, 335]
    assert [(band.get_x(), band.get_width()) for band in ax.patches] == [(41, 23), (331, 8)]
    with pytest.raises(ValueError, match="there is no 'low'"):
        plot_change_points(pd.DataFrame({"step": [1]}))


def test_neighbouring_classes_have_neighbouring_colours_also_the_last_and_the_first():
    ax = plot_embedding(pd.DataFrame({"x": range(31), "y": range(31), "class": range(31)}))
    points = ax.collections[0]
    np.testing.assert_array_equal(points.get_offsets()[:, 0], range(31))
    colours = points.to_rgba(points.get_array())[:, :3]
    around = np.linalg.norm(colours - np.roll(colours, 1, axis=0), axis=1)
    assert 0 < around.min() <= around.max() < 0.15
    with pytest.raises(ValueError, match="needs the columns x, y and class; there is no 'class'"):
        plot_embedding(pd.DataFrame({"x": [0], "y": [0]}))


def test_curves_are_columns_by_the_names_they_are_given():
    curves = pd.DataFrame({"train_loss": [3.0, 1.0], "norm": [1.0, 2.0]}, index=pd.Index([0, 1], name="step"))
    ax = plot_curves(curves, {"train_loss": "training"}, label="loss (nats)")
    assert lines(ax)["training"].get_ydata().tolist() == [3.0, 1.0]
    assert ax.get_ylabel() == "loss (nats)"
    with pytest.raises(ValueError, match="no column 'loss'; the table has train_loss, norm"):
        plot_curves(curves, {"loss": "loss"}, label="loss")


def test_bands_are_one_standard_deviation_wide():
    frame = pd.DataFrame(
        {"set": ["outer"] * 4 + ["none"], "epoch": [0, 0, 1, 1, 0], "accuracy": [0.0, 0.2, 0.8, 1.0, 0.1]}
    )
    ax = plot_bands(frame, x="epoch", y="accuracy", line="set")
    assert lines(ax)["outer (n = 2)"].get_ydata() == pytest.approx([0.1, 0.9])
    assert lines(ax)["none (n = 1)"].get_ydata() == pytest.approx([0.1])
    band = ax.collections[0].get_paths()[0].vertices
    at_one = band[band[:, 0] == 1][:, 1]
    assert (at_one.min(), at_one.max()) == pytest.approx((0.9 - np.sqrt(0.02), 0.9 + np.sqrt(0.02)))
    with pytest.raises(ValueError, match="no column 'seed'"):
        plot_bands(frame, x="epoch", y="accuracy", line="seed")


def test_closure_has_a_line_and_markers_per_family():
    closure = pd.DataFrame(
        {
            "family": ["midpoint", "midpoint", "adaptive"],
            "nodes": [4.0, 1.0, 2.0],
            "mean_error": [1e-3, 1e-2, 1e-6],
            "max_error": [3e-3, 3e-2, 3e-6],
        }
    )
    found = lines(ax := plot_closure_by_nodes(closure))
    assert found["midpoint, mean"].get_xdata().tolist() == [1.0, 4.0]
    assert found["midpoint, largest"].get_ydata().tolist() == [3e-2, 3e-3]
    assert found["midpoint, largest"].get_linestyle() == "None"
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    with pytest.raises(ValueError, match="there is no 'family'"):
        plot_closure_by_nodes(closure.drop(columns="family"))


def test_a_result_draws_its_kernel_and_influences(run):
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    term = result.dataset.contribution
    image = result.plot.kernel().get_images()[0]
    np.testing.assert_allclose(image.get_array(), term.sum(["step", "layer"]))
    image = result.plot.kernel(layer="last").get_images()[0]
    np.testing.assert_allclose(image.get_array(), term.sel(layer="last").sum("step"))
    change = abs(term.sum(["example", "layer"])).sum("query")
    np.testing.assert_allclose(lines(result.plot.influence())["training examples"].get_ydata(), change)
    through = abs(term.sel(layer="first")).sum(["query", "example"])
    np.testing.assert_allclose(lines(result.plot.layer_influence())["first"].get_ydata(), through)
    smoothed = lines(result.plot.layer_influence(smoothing=3))["first"].get_ydata()
    assert smoothed[1] == pytest.approx(float(through[:3].mean()))


def test_a_result_by_element_draws_its_balance_and_similarity(run):
    result = run.attribute(query(), by=("query", "window", "element"), windows=4)
    assert set(lines(result.plot.balance())) >= {"first", "last"}
    ax = result.plot.similarity("last")
    np.testing.assert_allclose(np.diag(ax.get_images()[0].get_array()), 1.0)
    assert ax.get_title() == "Similarity of predictions: last"


def test_what_a_result_cannot_draw_is_said(run):
    result = run.attribute(query(), by=("query", "example"))
    with pytest.raises(ValueError, match="does not tell layers apart"):
        result.plot.kernel(layer="first")
    with pytest.raises(ValueError, match=r"attribute by=\('query', 'example'\)"):
        run.attribute(query(), by=("query",)).plot.kernel()
    with pytest.raises(ValueError, match=r"there is no layer 'middle' in this result; it has \['first', 'last'\]"):
        run.attribute(query(), by=("query", "layer")).plot.similarity("middle")
