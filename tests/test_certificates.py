"""What a result vouches for: exact replay, closure, and what no example accounts for."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import explaind
from explaind import quadrature
from explaind.errors import ClosureError, UnattributedWarning, VerificationError
from explaind.path.queries import QueryFunction
from tests.cases import BY_NAME, CASES, one_group, query, record
from tests.traced import FEATURES, LABELS, recorded, step_on

AXES = ("query", "example", "step", "parameter")


def linear(bias=True):
    torch.manual_seed(3)
    return nn.Linear(3, 1, bias=bias).double()


# ---------------------------------------------------------------------- replay and closure


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replay_is_bit_exact(case, tmp_path):
    run, _ = record(case, tmp_path / "run.zarr")
    report = run.verify()
    assert report.exact_updates == run.num_steps
    assert report.largest_update_difference == 0
    if case.max_norm is None:
        assert report.bit_exact
        assert report.first_inexact is None
    else:
        assert report.largest_gradient_difference < 1e-14


@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-schedule", "adamw-clipped"])
def test_a_float32_run_closes_in_float64(name, tmp_path):
    run, _ = record(BY_NAME[name], tmp_path / "run.zarr", dtype=torch.float32)
    assert run.params(0)["0.weight"].dtype == torch.float32
    axes = ("query", "example", "step", "layer")
    result = run.attribute(query(torch.float32), by=axes, dtype=torch.float64)
    closure = result.check()
    assert closure.error_limit == 1e-12
    single = run.attribute(query(torch.float32), by=axes)
    assert single.dataset.attrs["dtype"] == "float32"
    assert single.check().error < 1e-12
    np.testing.assert_allclose(single.dataset.contribution, result.dataset.contribution, rtol=1e-3, atol=1e-6)
    assert np.abs(result.dataset.other).max() == 0
    assert 0 < float(np.abs(result.dataset.rounding).sum()) < 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"by": ("query", "step", "layer")},
        {"by": ("query", "example", "step"), "steps": [0]},
        {"by": ("query", "step"), "steps": [0]},
        {"by": ("query", "step", "element")},
        {"by": ("query", "update_step", "layer")},
        {"by": ("query", "step"), "average": explaind.averages.ema(0.5)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sgd-nesterov", "adamw-schedule"])
def test_an_average_gradient_that_is_not_what_was_measured_is_refused(name, arguments, tmp_path, monkeypatch):
    run, _ = record(BY_NAME[name], tmp_path / "run.zarr", dtype=torch.float32)
    gathered, made = QueryFunction.gathered, []

    def wrong(self, parts, total):
        made.append(gathered(self, parts, total))
        return made[-1].mul_(1.02) if len(made) == 2 else made[-1]

    monkeypatch.setattr(QueryFunction, "gathered", wrong)
    with pytest.raises(VerificationError, match=r"the average gradients of step \d+ have lost \d"):
        run.attribute(query(torch.float32), **arguments)


def regression(path, change_gradient, *, penalty=0.0, make=linear):
    """Two SGD steps of a linear model, whose path integral is exact; `change_gradient` edits by hand."""
    targets = FEATURES.sum(dim=1, keepdim=True)

    def body(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            loss = F.mse_loss(model(FEATURES[rows]), targets[rows])
            (loss + penalty * model.weight.square().sum()).backward()
            change_gradient(model.weight.grad)
            optimizer.step()

    return recorded(path, body, make=make, optimizer=one_group(SGD, lr=0.1))


def value_of(x):
    return explaind.Query(x, output=explaind.outputs.value())


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_penalty_in_the_loss_is_other(tmp_path):
    run, _ = regression(tmp_path / "run.zarr", lambda gradient: None, penalty=0.05)
    x = FEATURES[:1]
    result = run.attribute(value_of(x), by=("query", "example", "step"))
    result.check()
    expected = [-0.1 * 0.05 * 2 * float(x @ run.params(step)["weight"].T) for step in range(2)]
    np.testing.assert_allclose(result.dataset.other[0], expected, rtol=1e-9)


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
@pytest.mark.parametrize("bias", [True, False])
def test_noise_added_to_the_gradient_is_other_and_no_rescaling(bias, tmp_path):
    noise = torch.tensor([[0.3, -0.2, 0.5]], dtype=torch.float64)

    def make():
        return linear(bias)

    run, _ = regression(tmp_path / "run.zarr", lambda gradient: gradient.add_(noise), make=make)
    x = FEATURES[:1]
    result = run.attribute(value_of(x), by=("query", "example", "step"))
    result.check()
    np.testing.assert_allclose(result.dataset.other[0], [-0.1 * float(x @ noise.T)] * 2, rtol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_a_gradient_reversed_by_hand_is_a_factor_of_minus_one_or_other(bias, tmp_path):
    """Whatever it is called, the examples and the rest must add up to the true movement."""
    run, model = regression(tmp_path / "run.zarr", lambda gradient: gradient.neg_(), make=lambda: linear(bias))
    result = run.attribute(value_of(FEATURES[:1]), by=("query", "example", "step"))
    result.check()
    with torch.no_grad():
        np.testing.assert_allclose(result.total, model(FEATURES[:1])[:, 0], rtol=1e-12)


def test_a_loss_scaler_is_a_rescaling_and_its_skipped_steps_are_none(tmp_path):
    def body(model, optimizer, recorder):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for number, start in enumerate((0, 3, 6)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3])
            scaler.scale(loss * math.inf if number == 1 else loss).backward()
            scaler.step(optimizer)
            scaler.update()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.num_steps == 2
    assert run.call_examples(1).tolist() == [3, 4, 5]  # by content: the skipped batch was never counted
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_what_no_example_accounts_for_is_warned_about(tmp_path):
    def loop(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            F.cross_entropy(model(FEATURES), LABELS).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, optimizer=one_group(AdamW, lr=0.05))
    result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
    with pytest.warns(UnattributedWarning, match=r"% of the path is in the term 'other'"):
        closure = result.check()
    assert closure.other > 1e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(BY_NAME["adamw-two-groups"], tmp_path_factory.mktemp("run") / "run.zarr")[0]


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


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_parameters_changed_by_hand_between_steps_are_found(tmp_path):
    def loop(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        step_on(model, optimizer, slice(3, 6))
        with torch.no_grad():
            model[2].bias[0].add_(0.5)
        step_on(model, optimizer, slice(6, 9))

    run, _ = recorded(tmp_path / "run.zarr", loop, optimizer=one_group(SGD, lr=0.2))
    with pytest.raises(VerificationError, match=r"'2\.bias' after step 1 differs.*changed between the steps"):
        run.verify()
    result = run.attribute(query(), by=("query", "example", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.other.sel(step=1, layer="2")).min() > 1e-3
