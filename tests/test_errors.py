"""Bad input gets an error that says what is wrong, what was expected, what came, and what to do."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD, RMSprop
from torch.utils.data import DataLoader, IterableDataset

import explaind
from explaind import outputs, quadrature
from explaind.errors import (
    ClosureError,
    ModelMismatchError,
    NonFiniteError,
    RecordingError,
    ResultTooLargeError,
    StoreExistsError,
    StoreFormatError,
    UnknownUpdateRuleError,
    VerificationError,
)
from tests.cases import CASES, data, mlp, query, record

FEATURES, LABELS = data().tensors


def sgd(model, rate=0.2):
    return SGD(model.parameters(), lr=rate)


def step_on(model, optimizer, rows):
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
    optimizer.step()


@pytest.fixture
def traced(tmp_path):
    """A model in training: `with traced() as (model, optimizer, recorder)`; the store is `run.zarr`."""

    class Traced:
        def __init__(self, model=None, optimizer=None, **options):
            self.model = mlp() if model is None else model
            self.optimizer = sgd(self.model) if optimizer is None else optimizer
            self.recorder = explaind.trace(self.model, self.optimizer, tmp_path / "run.zarr", **options)

        def __enter__(self):
            return self.model, self.optimizer, self.recorder.__enter__()

        def __exit__(self, *error):
            return self.recorder.__exit__(*error)

    return Traced


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    case = next(case for case in CASES if case.name == "adamw-two-groups")
    return record(case, tmp_path_factory.mktemp("run") / "run.zarr")[0]


# ---------------------------------------------------------------------- model and store


def without_bias():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()


def wider():
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def longer():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Linear(3, 3)).double()


def with_buffer():
    model = mlp()
    model.register_buffer("scale", torch.ones(2))
    return model


def with_dropout():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Dropout()).double()


MISMATCHES = {
    without_bias: r"the model has no '2\.bias', which the run at .* recorded",
    wider: r"'0\.weight' was recorded with .*\(4, 3\), torch\.float64.*the model's has .*\(5, 3\)",
    longer: r"the model has '3\.weight', which the run at .* did not record",
    with_buffer: "the model has 'scale', which the run at .* did not record",
    lambda: mlp(dtype=torch.float32): r"'0\.weight' was recorded with .*float64.*model's has .*float32",
    with_dropout: "is Dropout in the model and absent in the run",
}


@pytest.mark.parametrize("make", MISMATCHES)
def test_another_model_is_refused_by_name_and_shape(make, run):
    with pytest.raises(ModelMismatchError, match=MISMATCHES[make]):
        explaind.open_run(run.path, model=make())


def test_a_model_with_another_activation_is_refused(run):
    with pytest.raises((ModelMismatchError, VerificationError), match=r"ReLU|'1'"):
        explaind.open_run(run.path, model=mlp(nn.ReLU)).attribute(query(), by=("query", "step"))


def test_what_needs_the_model_asks_for_it(run):
    alone = explaind.open_run(run.path)
    assert alone.params(0)["0.weight"].shape == (4, 3)
    asks = r"open the run with explaind\.open_run\(path, model=make_model\(\)\)"
    for use in (
        lambda: alone.attribute(query(), by=("query",)),
        alone.verify,
        lambda: alone.example_grads(0),
    ):
        with pytest.raises(ValueError, match=asks):
            use()


def test_a_step_that_was_not_recorded_is_out_of_range(run):
    for step in (-1, run.num_steps + 1):
        with pytest.raises(IndexError, match=f"step {step} is not between 0 and {run.num_steps}"):
            run.params(step)
    with pytest.raises(IndexError, match=f"not between 0 and {run.num_steps - 1}"):
        run.update(run.num_steps)


@pytest.mark.parametrize("kind", ["nothing", "a file", "a directory"])
def test_what_is_no_run_is_said_to_be_none(kind, tmp_path):
    path = tmp_path / "run.zarr"
    if kind == "a file":
        path.write_text("hello")
    elif kind == "a directory":
        path.mkdir()
    reason = "it has no commit" if kind == "a directory" else "no such directory"
    with pytest.raises(StoreFormatError, match=f"is not a recorded run: {reason}"):
        explaind.open_run(path)


def test_a_run_without_steps_says_so(traced, tmp_path):
    with traced() as (model, _, _):
        F.cross_entropy(model(FEATURES), LABELS).backward()
    with pytest.raises(StoreFormatError, match=r"no finished optimizer step\. Was optimizer\.step"):
        explaind.open_run(tmp_path / "run.zarr")


# ---------------------------------------------------------------------- what can be traced


def test_a_model_and_optimizers_are_expected(tmp_path):
    model = mlp()
    halves = [SGD(model[0].parameters(), lr=0.1), SGD(model.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"'0\.weight' belongs to two optimizers"):
        explaind.trace(model, halves, tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.optim\.Optimizer, got StepLR"):
        explaind.trace(model, torch.optim.lr_scheduler.StepLR(halves[0], 1), tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.optim\.Optimizer, got none"):
        explaind.trace(model, [], tmp_path / "run.zarr")
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got function"):
        explaind.trace(mlp, halves[0], tmp_path / "run.zarr")
    with pytest.raises(TypeError, match="LBFGS evaluates its closure several times"):
        explaind.trace(model, LBFGS(model.parameters()), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="example_grads must be 'replayed' or 'stored', got 'kept'"):
        explaind.trace(model, sgd(model), tmp_path / "run.zarr", example_grads="kept")
    assert not (tmp_path / "run.zarr").exists()


def test_a_parameter_the_optimizer_does_not_own_is_named(tmp_path):
    model = mlp()
    with pytest.raises(ValueError, match=r"does not own the parameter '2\.weight' .*\(nor 1 others\)"):
        explaind.trace(model, SGD(model[0].parameters(), lr=0.1), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match=r"freeze it with requires_grad_\(False\)"):
        explaind.trace(model, SGD([*model[0].parameters(), model[2].weight], lr=0.1), tmp_path / "run.zarr")


def test_parameters_the_model_does_not_have_are_counted(tmp_path):
    model = mlp()
    foreign = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="the optimizer owns 1 parameter that the model does not have"):
        explaind.trace(model, SGD([*model.parameters(), foreign], lr=0.1), tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="owns 2 parameters that the model does not have"):
        explaind.trace(model[0], sgd(model), tmp_path / "run.zarr")


def test_a_store_that_exists_is_replaced_only_on_request(traced, tmp_path):
    with traced() as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
    with pytest.raises(StoreExistsError, match=r"run\.zarr exists already\. Give another path, or overwrite"):
        traced()
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 1
    with traced(overwrite=True) as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
    assert explaind.open_run(tmp_path / "run.zarr").num_steps == 2


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwriting_never_deletes_what_is_no_run(kind, traced, tmp_path):
    thesis = tmp_path / "run.zarr"
    if kind == "directory":
        thesis.mkdir()
        thesis = thesis / "thesis.tex"
    thesis.write_text("dear")
    with pytest.raises(StoreExistsError, match="is not a recorded run, so overwrite=True does not delete it"):
        traced(overwrite=True)
    assert thesis.read_text() == "dear"


# ---------------------------------------------------------------------- the loop


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x, factor):
        return factor * self.linear(x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.linear(x), x


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x):
        return self.linear(x).mean(dim=0)


@pytest.mark.parametrize("factor", [torch.tensor(2.0), torch.ones(1, 3)])
def test_an_input_shared_by_the_batch_cannot_be_told_apart(factor, traced):
    with (
        pytest.raises(RecordingError, match=r"cannot be told apart: .*input '1' has shape .*first axis"),
        traced(Scaled()) as (model, _, _),
    ):
        model(FEATURES[:4], factor)


def test_an_output_without_a_row_per_example_cannot_be_told_apart(traced):
    with (
        pytest.raises(RecordingError, match=r"input '0' has shape \(4, 3\) and its output \(3,\)"),
        traced(Pooled()) as (model, _, _),
    ):
        model(FEATURES[:4])


def test_an_argument_that_cannot_be_recorded_is_named(traced):
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 4).double()

        def forward(self, x, shape):
            return self.linear(x).reshape(sorted(shape))

    with (
        pytest.raises(RecordingError, match="the argument 'shape' is a set"),
        traced(Reshaped()) as (model, _, _),
    ):
        model(FEATURES[:4], shape={2, 8})


@pytest.mark.parametrize("ids", [[1, 2], [1, 2, 3, 4]])
def test_ids_of_the_wrong_length_are_counted(ids, traced):
    with (
        pytest.raises(RecordingError, match=f"{len(ids)} example ids were given for a batch of 3 rows"),
        traced() as (model, optimizer, recorder),
    ):
        recorder.examples(ids)
        step_on(model, optimizer, slice(0, 3))


@pytest.mark.parametrize("ids", [[0.5, 1.0], ["a", "b"], [[1], [2]], 7, [True, False]])
def test_ids_are_integers(ids, traced):
    with (
        pytest.raises(TypeError, match=r"a flat sequence of integers, one per row of the batch; got"),
        traced() as (_, _, recorder),
    ):
        recorder.examples(ids)


@pytest.mark.parametrize("named_first", [True, False])
def test_either_every_batch_is_named_or_none(named_first, traced):
    with (
        pytest.raises(RecordingError, match=r"step 1 has a batch whose examples are (not )?named, unlike"),
        traced() as (model, optimizer, recorder),
    ):
        if named_first:
            recorder.examples([4, 5, 6])
        step_on(model, optimizer, slice(0, 3))
        if not named_first:
            recorder.examples([4, 5, 6])
        step_on(model, optimizer, slice(0, 3))  # names given by hand are those of one step


def test_batches_expects_a_loader_with_indices(traced):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(FEATURES)

    with traced() as (_, _, recorder):
        with pytest.raises(TypeError, match=r"expects a .*DataLoader, got list.*recorder\.examples\(ids\)"):
            recorder.batches([FEATURES])
        with pytest.raises(TypeError, match="an IterableDataset has no indices"):
            recorder.batches(DataLoader(Stream()))


def test_a_gradient_that_did_not_come_through_the_model_is_refused(traced):
    with (
        pytest.raises(RecordingError, match=r"no call of the traced model reached the gradient of step 0"),
        traced() as (model, optimizer, _),
    ):
        model.forward(FEATURES[:3]).sum().backward()
        optimizer.step()


def test_a_forward_pass_from_before_the_last_update_is_refused(traced):
    with (
        pytest.raises(RecordingError, match="step 1 uses a forward call that was made before step 0's update"),
        traced(nn.Linear(3, 3).double()) as (model, optimizer, _),
    ):
        stale = model(FEATURES[:3])
        step_on(model, optimizer, slice(3, 6))
        stale.sum().backward()
        optimizer.step()


# ---------------------------------------------------------------------- NaN and infinity


def check_safe(path, num_steps, make=mlp):
    run = explaind.open_run(path, model=make())
    assert run.num_steps == num_steps
    assert run.complete
    assert all(tensor.isfinite().all() for tensor in run.params(num_steps).values())
    assert run.verify().bit_exact
    run.attribute(query(), by=("query", "example", "step", "layer")).check()


@pytest.mark.parametrize("loss", [float("nan"), torch.tensor(float("inf"))])
def test_a_loss_that_is_not_finite_names_the_step(loss, traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"the loss is (nan|inf) at step 2"),
        traced() as (model, optimizer, recorder),
    ):
        for start in (0, 3):
            recorder.log(loss=1.0)
            step_on(model, optimizer, slice(start, start + 3))
        recorder.log(loss=loss)
    check_safe(tmp_path / "run.zarr", 2)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_gradient_that_is_not_finite_names_parameter_and_step(bad, traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"gradient of '0\.weight' has NaN or infinite entries at step 2"),
        traced() as (model, optimizer, _),
    ):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        optimizer.zero_grad()
        (bad * F.cross_entropy(model(FEATURES[:3]), LABELS[:3])).backward()
        optimizer.step()
    check_safe(tmp_path / "run.zarr", 2)


def test_a_parameter_that_becomes_infinite_names_the_step_and_leaves_those_before(traced, tmp_path):
    with (
        pytest.raises(NonFiniteError, match=r"step 2 made entries of the parameter '.*' NaN or infinite"),
        traced() as (model, optimizer, _),
    ):
        for rate in (0.1, 0.1, 1.7e308):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            (100 * F.cross_entropy(model(FEATURES[:3]), LABELS[:3])).backward()
            optimizer.step()
    check_safe(tmp_path / "run.zarr", 2)


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


class Unknown(RMSprop):
    """An optimizer without a rule."""


def test_an_unknown_optimizer_is_told_what_works(traced, tmp_path):
    model = mlp()
    with traced(model, Unknown(model.parameters(), lr=0.01)) as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    message = r"Unknown is not known as a linear filter.*SGD.*AdamW.*by=\('query', 'step', 'layer'\) works"
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("example",))
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("group",), groups=[0] * 3)
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("step",), examples=[0])


def test_a_result_that_would_not_fit_says_its_size_and_what_to_leave_out(run, monkeypatch):
    # 3 queries × 9 examples × 6 steps × 4 parameters × 8 bytes = 5,184 bytes
    monkeypatch.setattr(os, "sysconf", lambda name: 100)  # 100 pages of 100 bytes, of which half may be used
    message = r"3 query × 9 example × 6 step × 4 parameter.*Leave 'example' out"
    with pytest.raises(ResultTooLargeError, match=message):
        run.attribute(query(), by=("query", "example", "step", "parameter"))
    run.attribute(query(), by=("query", "step", "parameter")).check()
    monkeypatch.setattr(os, "sysconf", lambda name: 80)  # 9 examples × 31 elements × 16 bytes = 4,464 bytes
    message = r"momentum buffer each.* Use 'step' in place of 'update_step'"
    with pytest.raises(ResultTooLargeError, match=message):
        run.attribute(query(), by=("example", "update_step"))


# ---------------------------------------------------------------------- queries


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


# ---------------------------------------------------------------------- certificates


@pytest.mark.parametrize("term", ["contribution", "decay", "other", "rounding", "quadrature", "initial", "prediction"])
@pytest.mark.parametrize("amount", [1e-3, float("nan")])
def test_a_result_that_was_tampered_with_does_not_check(term, amount, run):
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    result.dataset[term][(0,) * result.dataset[term].ndim] += amount
    with pytest.raises(ClosureError, match=r"the decomposition does not close: sum of terms differs"):
        result.check()


def test_a_coarse_quadrature_does_not_pass_a_fine_tolerance(run):
    result = run.attribute(query(), by=("query",), quadrature=quadrature.midpoint(1), tolerance=1e-9)
    assert result.closure.error <= result.closure.error_limit  # the quadrature term makes the sum exact
    with pytest.raises(ClosureError, match=r"not accurate enough.*limit 1e-09.*check\(tolerance=…\)"):
        result.check()
    result.check(tolerance=0.1)


def test_a_quadrature_rule_needs_a_node():
    for rule in (quadrature.midpoint, quadrature.gauss_legendre):
        with pytest.raises(ValueError, match="at least one node, got 0"):
            rule(0)


def test_the_top_examples_need_an_example_axis(run):
    with pytest.raises(ValueError, match=r"has no example axis.*by=\('query', 'example'\)"):
        run.attribute(query(), by=("query", "step")).top(3)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_parameters_changed_by_hand_between_steps_are_found(traced, tmp_path):
    with traced() as (model, optimizer, _):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        with torch.no_grad():
            model[2].bias[0].add_(0.5)
        step_on(model, optimizer, slice(6, 9))
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    with pytest.raises(VerificationError, match=r"'2\.bias' after step 1 differs.*changed between the steps"):
        run.verify()
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.other.sel(step=1, layer="2")).min() > 1e-3
