"""A request that makes no sense or cannot be met says what would."""

import os

import pytest
import torch

import explaind
from explaind import outputs, quadrature
from explaind.errors import ResultTooLargeError
from tests.cases import BY_NAME, mlp, query, record
from tests.traced import FEATURES


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-two-groups"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


# ---------------------------------------------------------------------- attribute


BAD_REQUESTS = {
    "unknown axis": ({"by": ("query", "sample")}, "unknown axis 'sample'; the axes are query, example"),
    "axis twice": ({"by": ("query", "query")}, "names an axis twice"),
    "both steps": ({"by": ("step", "update_step")}, "has both 'step' and 'update_step'"),
    "both layers": ({"by": ("layer", "parameter")}, "has both 'layer' and 'parameter'"),
    "both examples": ({"by": ("example", "group"), "groups": [0] * 9}, "has both 'example' and 'group'"),
    "groups without axis": ({"by": ("query",), "groups": [0] * 9}, "groups= is given, so name their axis"),
    "axis without groups": ({"by": ("group",)}, "give groups= a label per example"),
    "too few groups": (
        {"by": ("group",), "groups": [0, 1]},
        r"one label per example of run\.examples, 9; got .*2",
    ),
    "groups with a hole": ({"by": ("group",), "groups": {0: "a"}}, "no label for 8 examples, the first is 1"),
    "steps beyond": (
        {"by": ("step",), "steps": [2, 6]},
        r"steps must be between 0 and 5, at least one; got \[2, 6\]",
    ),
    "negative steps": ({"by": ("step",), "steps": [-1]}, "steps must be between 0 and 5"),
    "no steps": ({"by": ("step",), "steps": []}, "at least one"),
    "steps between": ({"by": ("step",), "steps": [0.5]}, "steps"),
    "unknown examples": (
        {"by": ("example",), "examples": [3, 77]},
        r"\[77\].* are not in the run.*9 examples.* 0 to 8",
    ),
    "no examples": ({"by": ("example",), "examples": []}, "are not in the run"),
    "examples between": ({"by": ("example",), "examples": [0.7]}, "examples"),
    "unknown layers": ({"by": ("layer",), "layers": ["0", "head"]}, "no layer 'head'; the layers are 0, 2"),
    "layers, not parameters": (
        {"by": ("parameter",), "layers": ["0"]},
        r"no layer '0'; the layers are 0\.weight",
    ),
    "no layers": ({"by": ("layer",), "layers": []}, "layer"),
    "quadrature": (
        {"by": ("query",), "quadrature": "simpson"},
        "'adaptive' or a rule of explaind.quadrature, got",
    ),
    "negative tolerance": ({"by": ("query",), "tolerance": -1.0}, "tolerance"),
    "no tolerance": ({"by": ("query",), "tolerance": float("nan")}, "tolerance"),
}


@pytest.mark.parametrize("request_, message", BAD_REQUESTS.values(), ids=BAD_REQUESTS.keys())
def test_a_request_that_cannot_be_met_says_why(request_, message, run):
    with pytest.raises((ValueError, TypeError), match=message):
        run.attribute(query(), **request_)


@pytest.mark.parametrize(
    "layers, message",
    [
        ({"first": ["0.weight", "0.bias"]}, r"'2\.weight' is in no layer"),
        ({"all": ["0.weight", "0.bias", "2.weight", "2.bias"], "again": ["0.bias"]}, "is in two layers"),
        ({"all": ["0.weight", "0.bias", "2.weight", "2.bias", "3.bias"]}, r"'3\.bias' is not a parameter"),
    ],
)
def test_layers_must_hold_every_parameter_once(layers, message, run):
    edited = explaind.open_run(run.path, model=mlp())
    edited.layers = layers
    with pytest.raises(ValueError, match=f"must hold every parameter once: .*{message}"):
        edited.attribute(query(), by=("layer",))


def test_a_single_axis_may_be_a_plain_string(run):
    assert run.attribute(query(), by="query").dataset.contribution.dims == ("query",)


def test_a_result_that_would_not_fit_says_its_size_and_what_to_leave_out(run, monkeypatch):
    # 3 queries × 9 examples × 6 steps × 4 parameters × 8 bytes = 5,184 bytes
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes, of which half may be used
    message = r"3 query × 9 example × 6 step × 4 parameter.*Write it to a store with out=.*leave 'example' out"
    with pytest.raises(ResultTooLargeError, match=message):
        run.attribute(query(), by=("query", "example", "step", "parameter"))
    run.attribute(query(), by=("query", "step", "parameter")).check()
    monkeypatch.setattr(os, "sysconf", lambda name: 80)  # 9 examples × 31 elements × 16 bytes = 4,464 bytes
    message = r"momentum buffer each.* Use 'step' in place of 'update_step'"
    with pytest.raises(ResultTooLargeError, match=message):
        run.attribute(query(), by=("example", "update_step"))


# ---------------------------------------------------------------------- queries and rules


BAD_QUERIES = {
    "no rows": (lambda: explaind.Query(torch.ones(0, 3), output=outputs.value()), "at least one.*got .*0"),
    "a scalar": (lambda: explaind.Query(torch.tensor(1.0), output=outputs.value()), "same number of rows"),
    "ragged": (
        lambda: explaind.Query((torch.ones(2, 3), torch.ones(3, 3)), output=outputs.value()),
        "same number of rows.*2.*3",
    ),
    "no tensor": (
        lambda: explaind.Query([[1.0, 2.0]], output=outputs.value()),
        "'0' must be a tensor, or a list",
    ),
    "no output": (
        lambda: explaind.Query(torch.ones(2, 3), output="logit"),
        "one of explaind.outputs.* got 'logit'",
    ),
    "too few targets": (
        lambda: explaind.Query(torch.ones(2, 3), output=outputs.logit([1])),
        "'logit' has 1 targets for 2 inputs; give one target per input",
    ),
    "float targets": (
        lambda: outputs.logit([0.5, 1.0]),
        "class indices, a flat sequence of integers; got torch.float",
    ),
    "nested targets": (lambda: outputs.margin([[1]]), r"got torch\.int64 of shape \(1, 1\)"),
    "boolean targets": (lambda: outputs.log_prob([True]), r"got torch\.bool"),
    "mean of a mean": (lambda: query().mean().mean(), "this query is a mean already"),
    "too few classes": (lambda: query().mean(by_class=[0, 1]), r"one label per input, 3; got shape \(2,\)"),
}


@pytest.mark.parametrize("make, message", BAD_QUERIES.values(), ids=BAD_QUERIES.keys())
def test_a_query_that_makes_no_sense_says_why(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_an_output_of_the_wrong_shape_says_which(run):
    asked = explaind.Query(FEATURES[:2], output=lambda out: out)
    with pytest.raises(ValueError, match=r"one scalar per query, shape \[query\]; it gave \(2, 3\)"):
        run.attribute(asked, by=("query",))


@pytest.mark.parametrize("output", [outputs.logit, outputs.log_prob, outputs.margin])
@pytest.mark.parametrize("target", [3, -1])
def test_a_class_that_the_model_does_not_have_is_refused(output, target, run):
    with pytest.raises(ValueError, match=r"with at least 4 classes|none negative; got \[-1\]"):
        run.attribute(explaind.Query(FEATURES[:1], output=output([target])), by=("query",))


def test_a_quadrature_rule_needs_a_node():
    for rule in (quadrature.midpoint, quadrature.gauss_legendre):
        with pytest.raises(ValueError, match="at least one node, got 0"):
            rule(0)


def test_the_top_examples_need_an_example_axis(run):
    with pytest.raises(ValueError, match=r"has no example axis.*by=\('query', 'example'\)"):
        run.attribute(query(), by=("query", "step")).top(3)


def test_queries_that_are_not_finite_are_named(run):
    infinite = explaind.Query(FEATURES[:2], output=lambda logits: torch.log(torch.relu(logits - 100))[:, 0])
    with pytest.raises(ValueError, match=r"query 0 is nan with the weights of snapshot 0; only changes between finite"):
        run.attribute(infinite, by=("query", "layer"))
