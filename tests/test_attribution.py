"""What a decomposition keeps, sums, restricts and reports."""

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from tests.cases import BY_NAME, NUM_CLASSES, data, query, record

FULL = ("query", "example", "step", "parameter")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["sgd-momentum-dampening-decay"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


@pytest.fixture(scope="module")
def full(run):
    return run.attribute(query(), by=FULL, tolerance=1e-12)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "by",
    [
        (),
        ("query",),
        ("step",),
        ("layer",),
        ("example",),
        ("query", "step"),
        ("query", "example"),
        ("step", "parameter"),
    ],
    ids=str,
)
def test_axes_left_out_are_summed(run, full, by):
    result = run.attribute(query(), by=by, tolerance=1e-12)
    assert result.dataset.contribution.dims == by
    expected = full.dataset.contribution
    if "layer" in by:
        layer_of = [p.rpartition(".")[0] for p in expected.parameter.values]
        expected = expected.assign_coords(layer=("parameter", layer_of)).groupby("layer").sum()
    expected = expected.sum([dim for dim in expected.dims if dim not in by])
    close(result.dataset.contribution, expected.transpose(*by))
    close(result.dataset.decay.sum(), full.dataset.decay.sum())
    result.check()


def test_both_step_axes_sum_to_the_same(run, full):
    by_update = run.attribute(query(), by=("query", "example", "update_step"), tolerance=1e-12)
    close(by_update.dataset.contribution.sum("update_step"), full.dataset.contribution.sum(["step", "parameter"]))
    assert not np.allclose(by_update.dataset.contribution, full.dataset.contribution.sum("parameter"))


def test_without_a_query_axis_the_queries_are_summed(run, full):
    result = run.attribute(query(), by=("example",), tolerance=1e-12)
    close(result.dataset.prediction, full.dataset.prediction.sum())


def test_groups_sum_their_examples(run, full):
    labels = data().tensors[1].numpy()
    result = run.attribute(query(), by=("query", "group", "step"), groups=labels, tolerance=1e-12)
    by_example = full.dataset.contribution.sum("parameter")
    for label in range(NUM_CLASSES):
        members = by_example.sel(example=np.flatnonzero(labels == label)).sum("example")
        close(result.dataset.contribution.sel(group=label), members)


def test_a_mapping_names_groups_too(run):
    labels = {int(example): "odd" if example % 2 else "even" for example in run.examples}
    result = run.attribute(query(), by=("query", "group"), groups=labels)
    assert result.dataset.group.values.tolist() == ["even", "odd"]


@pytest.mark.parametrize("step_axis", ["step", "update_step"])
@pytest.mark.parametrize(
    "restriction", [{"steps": range(2, 4)}, {"steps": [0, 5]}, {"examples": [0, 3]}, {"layers": ["2"]}], ids=str
)
def test_restrictions_keep_their_entries_and_still_close(run, step_axis, restriction):
    by = ("query", "example", step_axis, "layer")
    whole = run.attribute(query(), by=by, tolerance=1e-12).dataset
    result = run.attribute(query(), by=by, tolerance=1e-12, **restriction)
    names = {"steps": step_axis, "examples": "example", "layers": "layer"}
    selected = {names[name]: list(values) for name, values in restriction.items()}
    close(result.dataset.contribution, whole.contribution.sel(selected))
    decay = whole.decay.sel({name: values for name, values in selected.items() if name in whole.decay.dims})
    close(result.dataset.decay, decay)
    assert float(np.abs(result.dataset.omitted).min()) > 0
    assert result.check().error <= 1e-12


def test_all_restrictions_at_once_close(run):
    result = run.attribute(query(), by=("query",), steps=[1, 4], examples=[2], layers=["0"], tolerance=1e-12)
    assert result.check().error <= 1e-12


def test_a_mean_is_the_mean_of_its_queries(run, full):
    result = run.attribute(query().mean(), by=("query", "example"), tolerance=1e-12)
    close(result.dataset.contribution[0], full.dataset.contribution.sum(["step", "parameter"]).mean("query"))
    assert result.dataset["query"].values.tolist() == ["mean"]


def test_means_by_class(run, full):
    result = run.attribute(query().mean(by_class=[7, 5, 7]), by=("query", "example"), tolerance=1e-12)
    each = full.dataset.contribution.sum(["step", "parameter"])
    close(result.dataset.contribution.sel(query=7), each.sel(query=[0, 2]).mean("query"))
    close(result.dataset.contribution.sel(query=5), each.sel(query=1))


def test_any_function_of_the_output_is_a_query(run, full):
    own = explaind.Query(query().inputs, output=lambda out: out.log_softmax(dim=1)[torch.arange(3), torch.arange(3)])
    result = run.attribute(own, by=FULL, tolerance=1e-12)
    close(result.dataset.contribution, full.dataset.contribution)


def test_a_function_may_mix_its_inputs(run):
    spread = explaind.Query(query().inputs, output=lambda out: torch.stack([out.std(), (out[0] * out[1]).sum()]))
    assert run.attribute(spread, by=("query", "example", "step"), tolerance=1e-12).check().passed


@pytest.mark.parametrize("name", ["logit", "log_prob", "margin", "loss"])
def test_outputs_close(run, name):
    own = explaind.Query(query().inputs, output=getattr(explaind.outputs, name)([0, 1, 2]))
    result = run.attribute(own, by=("query", "step"), tolerance=1e-12)
    model_output = torch.func.functional_call(run.model, run.params(run.num_steps), (query().inputs,))
    close(result.dataset.prediction, own.output(model_output).detach())
    result.check()


def test_float32_products_keep_a_float64_certificate(run, full):
    result = run.attribute(query(), by=FULL, dtype=torch.float32, tolerance=1e-4)
    scale = float(np.abs(full.dataset.contribution).max())
    np.testing.assert_allclose(result.dataset.contribution, full.dataset.contribution, atol=1e-5 * scale)
    assert result.dataset.quadrature.dtype == np.float64
    result.check()


def test_stored_gradients_give_the_replayed_numbers(tmp_path, full):
    stored, _ = record(BY_NAME["sgd-momentum-dampening-decay"], tmp_path / "run.zarr", example_grads="stored")
    result = stored.attribute(query(), by=FULL, tolerance=1e-12)
    close(result.dataset.contribution, full.dataset.contribution)
    assert result.dataset.attrs["example_products"] == "stored"


def test_top_names_the_largest_of_each_sign(full):
    top = full.top(2)
    scores = full.dataset.contribution.sum(["step", "parameter"]).sel(query=1).to_series()
    raised = top[(top["query"] == 1) & (top["direction"] == "raised")]
    assert raised["example"].tolist() == scores.nlargest(2).index.tolist()
    assert top[top["direction"] == "lowered"]["contribution"].lt(0).all()


def test_queries_of_one_name_each_have_their_top(full):
    renamed = explaind.Attribution(full.dataset.assign_coords(query=["one", "two", "two"]))
    assert renamed.top(2).drop(columns="query").equals(full.top(2).drop(columns="query"))


def test_a_saved_result_opens_as_it_was(full, tmp_path):
    full.save(tmp_path / "result.zarr")
    again = explaind.Attribution.open(tmp_path / "result.zarr")
    np.testing.assert_array_equal(again.dataset.contribution, full.dataset.contribution)
    assert again.dataset.parameter.values.tolist() == full.dataset.parameter.values.tolist()
    assert again.check() == full.check()


def test_the_result_says_what_it_is(full):
    assert "log-probability" in repr(full)
    assert "query: 3, example: 9" in repr(full)


def test_layers_can_be_regrouped(run):
    run_layers = dict(run.layers)
    try:
        run.layers = {"weights": ["0.weight", "2.weight"], "biases": ["0.bias", "2.bias"]}
        result = run.attribute(query(), by=("query", "layer"))
        assert result.dataset.layer.values.tolist() == ["weights", "biases"]
        result.check()
    finally:
        run.layers = run_layers


@pytest.mark.parametrize("axis", ["step", "update_step"])
def test_a_run_whose_gradients_are_all_zero_has_no_examples_and_closes(axis, tmp_path):
    model = nn.Linear(3, 1).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), torch.zeros(4, dtype=torch.int64)).backward()  # of one class only
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=model)
    result = run.attribute(explaind.Query(x[:2], output=explaind.outputs.value()), by=("query", "example", axis))
    result.check()
    assert result.dataset.sizes["example"] == 0
    assert float(np.abs(result.dataset.decay).sum()) > 0
