"""The kernel view: both sides of the path kernel, its matrices, and the kernel machine that equals the network."""

import numpy as np
import pytest
import torch
from torch import nn

import explaind
from explaind import quadrature
from explaind.errors import ClosureError, UnknownUpdateRuleError
from explaind.features import path_errors
from tests.cases import BY_NAME, CASES, NUM_CLASSES, NUM_FEATURES, mlp, query, record

EXACT = {"tolerance": 1e-10}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_features_multiply_to_the_contributions(case, tmp_path):
    run, _ = record(case, tmp_path / "run.zarr")
    result = run.attribute(query(), by=("query", "example", "update_step", "parameter"), **EXACT)
    for step in (0, run.num_steps - 1):
        queries, examples = run.query_features(query(), step, **EXACT), run.train_features(step)
        for name in run.table.names:
            products = -queries[name].flatten(1) @ examples[name].flatten(1).T
            wanted = result.dataset.contribution.sel(update_step=step, parameter=name)
            np.testing.assert_allclose(products, wanted, rtol=1e-9, atol=1e-12)


def test_train_features_sum_to_minus_the_update_where_nothing_decays(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    for step in range(run.num_steps):
        for name, features in run.train_features(step).items():
            torch.testing.assert_close(-features.sum(dim=0), run.update(step)[name], rtol=1e-12, atol=1e-15)


def test_train_features_come_in_the_order_asked_for(tmp_path):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    every, some = run.train_features(2), run.train_features(2, [5, 1])
    for name in run.table.names:
        torch.testing.assert_close(some[name], every[name][[5, 1]], rtol=1e-12, atol=1e-14)


def test_features_of_what_is_not_there(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    with pytest.raises(ValueError, match="steps must be between 0 and 5"):
        run.query_features(query(), 6)
    with pytest.raises(ValueError, match="are not in the run"):
        run.train_features(0, [99])
    with pytest.raises(ClosureError, match=r"average gradient of query .* over step 2"):
        run.query_features(query(), 2, quadrature=quadrature.midpoint(1), tolerance=1e-12)


def test_the_kernel_is_the_data_part_of_the_predictions(tmp_path):
    run, _ = record(BY_NAME["adamw-two-groups"], tmp_path / "run.zarr")
    kernel = run.kernel(query(), **EXACT)
    result = run.attribute(query(), by=("query", "example"), **EXACT).dataset
    assert kernel.dims == ("query", "example")
    np.testing.assert_allclose(kernel, result.contribution, rtol=1e-12)
    rest = result.initial + result.decay + result.other + result.rounding + result.quadrature.sum("update_step")
    np.testing.assert_allclose(kernel.sum("example") + rest, result.prediction, rtol=1e-12)
    assert kernel.attrs["unit"] == result.attrs["output"]
    assert "closure" in kernel.attrs


def test_the_kernel_of_classes_in_windows_of_steps(tmp_path):
    run, _ = record(BY_NAME["adamw-two-groups"], tmp_path / "run.zarr")
    parity = [int(example) % 2 for example in run.examples]
    means = query().mean(by_class=[0, 0, 1])
    kernel = run.kernel(means, by=("query", "group", "window", "layer"), groups=parity, windows=4, **EXACT)
    full = run.attribute(query(), by=("query", "example", "step", "layer"), **EXACT).dataset.contribution
    for window, steps in ((0, slice(0, 3)), (4, slice(4, 5))):
        for group in (0, 1):
            mine = full.sel(step=steps).isel(example=[own == group for own in parity]).sum(("step", "example"))
            wanted = [mine.isel(query=slice(0, 2)).mean("query"), mine.isel(query=2)]
            np.testing.assert_allclose(kernel.sel(window=window, group=group), wanted, rtol=1e-8, atol=1e-13)


def test_the_kernel_of_some_examples(tmp_path):
    run, _ = record(BY_NAME["adamw-two-groups"], tmp_path / "run.zarr")
    some = run.kernel(query(), [4, 3], **EXACT)
    assert some["example"].values.tolist() == [3, 4]
    np.testing.assert_allclose(some, run.kernel(query(), **EXACT).sel(example=[3, 4]), rtol=1e-9)


@pytest.mark.parametrize("case", ["sgd-nesterov", "adamw-schedule", "adam-amsgrad"])
def test_the_kernel_machine_is_the_network(case, tmp_path):
    run, model = record(BY_NAME[case], tmp_path / "run.zarr")
    machine = explaind.PathKernelModel(run, **EXACT)
    x = torch.randn(5, NUM_FEATURES, dtype=torch.float64)
    torch.testing.assert_close(machine(x), model(x).detach(), rtol=1e-8, atol=1e-8)
    fit = machine.compare(x)
    assert fit.num_inputs == 5
    assert fit.argmax_agreement == 1
    assert fit.mean_error <= fit.max_error < 1e-8
    assert abs(fit.kl) < 1e-12
    assert "5 inputs: error" in str(fit)


def test_a_kernel_machine_that_integrates_badly_says_so(tmp_path):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    x = torch.randn(5, NUM_FEATURES, dtype=torch.float64)
    with pytest.raises(ClosureError):
        explaind.PathKernelModel(run, quadrature=quadrature.midpoint(1), tolerance=1e-12)(x)
    fit = explaind.PathKernelModel(run, quadrature=quadrature.midpoint(1), tolerance=1.0).compare(x)
    assert fit.max_error > 1e-6


def test_the_kernel_machine_tells_examples_apart(tmp_path):
    run, model = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    x = torch.randn(2, NUM_FEATURES, dtype=torch.float64)
    result = explaind.PathKernelModel(run, **EXACT).attribute(x)
    assert result.dataset.contribution.dims == ("query", "example")
    assert result.dataset["query"].values.tolist() == [f"{row}:{out}" for row in (0, 1) for out in range(NUM_CLASSES)]
    result.check()
    np.testing.assert_allclose(result.dataset.prediction, model(x).detach().flatten(), rtol=1e-12)


class Scaled(nn.Module):
    """Returns two tensors by name, one of them like an image."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x, scale):
        out = self.net(x)
        return {"map": (out * scale).reshape(len(x), 1, NUM_CLASSES), "other": out}


def test_a_machine_of_one_of_several_outputs_with_axes_of_its_own(tmp_path):
    model, x, scale = Scaled(), torch.randn(6, NUM_FEATURES).double(), torch.rand(6, 1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(3):
            optimizer.zero_grad()
            model(x, scale)["map"].square().sum().backward()
            optimizer.step()
    machine = explaind.PathKernelModel(
        explaind.open_run(tmp_path / "run.zarr", model=Scaled()), part="map", tolerance=1e-8
    )
    predicted = machine((x[:2], scale[:2]))
    assert predicted.shape == (2, 1, NUM_CLASSES)
    torch.testing.assert_close(predicted, model(x[:2], scale[:2])["map"].detach(), rtol=1e-7, atol=1e-8)


def test_unknown_rules_have_no_train_features(tmp_path):
    class Strange(torch.optim.SGD):
        """Not known by that name."""

    model = mlp()
    optimizer = Strange(model.parameters(), lr=0.1)
    x = torch.randn(4, NUM_FEATURES).double()
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        model(x).sum().backward()
        optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=mlp())
    with pytest.raises(UnknownUpdateRuleError):
        run.train_features(0)


def test_a_machine_of_a_part_of_the_run_is_refused(tmp_path):
    run, _ = record(BY_NAME["sgd"], tmp_path / "run.zarr")
    with pytest.raises(TypeError, match="kernel machine is of the whole run; it has no setting 'steps', but part"):
        explaind.PathKernelModel(run, steps=[0, 1])


def test_a_machine_of_an_output_without_axes_of_its_own(tmp_path):
    model, x = nn.Sequential(mlp(), nn.Linear(NUM_CLASSES, 1).double(), nn.Flatten(0)), torch.randn(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    machine = explaind.PathKernelModel(explaind.open_run(tmp_path / "run.zarr", model=model), **EXACT)
    torch.testing.assert_close(machine(x), model(x).detach(), rtol=1e-8, atol=1e-8)
    assert machine.compare(x).max_error < 1e-8


def test_errors_of_single_steps_are_those_of_the_whole_integral(tmp_path):
    run, _ = record(BY_NAME["adamw-schedule"], tmp_path / "run.zarr")
    rule = quadrature.midpoint(3)
    alone = path_errors(run, query(), range(run.num_steps), quadrature=rule)
    whole = run.attribute(query(), by=("query", "update_step"), quadrature=rule).dataset
    np.testing.assert_allclose(alone.quadrature, whole.quadrature, rtol=1e-6, atol=1e-14)
    np.testing.assert_array_equal(alone.num_nodes, whole.num_nodes)
    adaptive = path_errors(run, query(), range(run.num_steps), tolerance=1e-8)
    whole = run.attribute(query(), by=("query", "update_step"), tolerance=1e-8).dataset
    np.testing.assert_array_equal(adaptive.num_nodes, whole.num_nodes)
