"""Models are replayed as they ran: compiled, under autocast, with buffers, conversions and parts left out."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, AdamW

import explaind
import explaind.reference
from explaind.replay.model import call_function
from tests import traced
from tests.cases import mlp, one_group
from tests.traced import FEATURES, LABELS, batches, one_epoch

AXES = ("query", "example", "step", "parameter")
recorded = partial(traced.recorded, optimizer=one_group(AdamW, lr=0.05))


# ---------------------------------------------------------------------- how the model runs


def compiled_in_place():
    model = mlp()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "make", [lambda: torch.compile(mlp(), backend="eager"), compiled_in_place], ids=["wrapped", "in place"]
)
def test_a_compiled_model_is_as_the_plain_one(make, tmp_path):
    compiled, model = recorded(tmp_path / "compiled.zarr", one_epoch, make=make)
    plain, twin = recorded(tmp_path / "plain.zarr", one_epoch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert compiled.verify().bit_exact
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]))
    results = [run.attribute(query, by=AXES) for run in (compiled, plain)]
    results[0].check()
    np.testing.assert_allclose(*(result.dataset.contribution for result in results), rtol=1e-12)
    untraced = make()
    reopened = explaind.open_run(tmp_path / "compiled.zarr", model=untraced)
    np.testing.assert_array_equal(reopened.attribute(query, by=AXES).total, results[0].total)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the inductor backend needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # its own import
def test_a_model_of_the_inductor_backend_differs_by_rounding_only(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", one_epoch, make=lambda: torch.compile(mlp()))
    report = run.verify()
    assert report.exact_updates == run.num_steps
    assert report.largest_gradient_difference < 1e-14
    result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
    assert result.check().other < 1e-12


def test_a_model_compiled_in_place_is_left_as_it_was(tmp_path):
    model = compiled_in_place()
    before = model._compiled_call_impl
    optimizer = SGD(model.parameters(), lr=0.1)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        F.cross_entropy(model(FEATURES), LABELS).backward()
        optimizer.step()
    assert model._compiled_call_impl is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_replayed_bit_for_bit(dtype, tmp_path):
    def loop(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = F.cross_entropy(model(x.float()), y)
            loss.backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, make=lambda: mlp(dtype=torch.float32))
    assert run.verify().bit_exact
    result = run.attribute(explaind.Query(FEATURES[:2].float(), output=explaind.outputs.logit([0, 1])), by=AXES)
    closure = result.check()
    assert closure.other == 0
    assert 1e-7 < closure.rounding < 0.1


def test_buffers_are_those_before_the_call_also_when_the_call_changes_them(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)).double()

    def loop(model, optimizer, recorder):
        for _ in range(2):
            optimizer.zero_grad()
            for rows in (slice(0, 2), slice(2, 6), slice(6, 9)):
                F.cross_entropy(model(FEATURES[rows]), LABELS[rows], reduction="sum").backward()
            optimizer.step()

    for storage in ("replayed", "stored"):
        run, _ = recorded(tmp_path / f"{storage}.zarr", loop, make=make, example_grads=storage)
        assert run.verify().bit_exact
        result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
        result.check()
        assert float(np.abs(result.dataset.other).sum() + np.abs(result.dataset.rounding).sum()) < 1e-12


# ---------------------------------------------------------------------- what models do to their tensors


def test_parts_without_parameters_are_functions_between_the_others(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.ModuleList([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)]).double()

    def loop(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[1](model[0](x))), y).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, make=make)
    output = explaind.outputs.logit([0, 1])
    query = explaind.Query(FEATURES[:2], output=output, forward=lambda m, x: m[2](m[1](m[0](x))))
    assert run.attribute(query, by=AXES).check().other == 0
    assert run.verify().bit_exact


def test_a_model_may_convert_its_input_to_the_type_it_is_trained_in(tmp_path):
    class Bytes(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            offset = torch.full((3,), 0.5, dtype=torch.float32)
            return self.linear(x.float() / 255 - offset).to(torch.float32) * torch.ones(3)

    images = (FEATURES.abs() * 60).to(torch.uint8)

    def loop(model, optimizer, recorder):
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(images), LABELS).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, make=Bytes)
    query = explaind.Query(images[:2], output=explaind.outputs.logit([0, 1]))
    for dtype in (torch.float64, torch.float32):
        assert run.attribute(query, by=AXES, dtype=dtype).check().other == 0
    assert torch.get_default_dtype() == torch.float32


def test_coupling_that_the_first_call_does_not_show_is_seen(tmp_path):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.linear = nn.Linear(3, 3).double()

        def forward(self, x):
            out = torch.tanh(self.linear(x))
            return out - 1e-4 * out.mean(dim=0) if self.training else out

    def loop(model, optimizer, recorder):
        for rows in (slice(0, 1), slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, make=Centred)
    result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
    assert result.dataset.attrs["example_products"] == "tangents"
    assert result.dataset.attrs["row_split"].startswith("coupled rows")
    assert result.check().rounding < 1e-12


# ---------------------------------------------------------------------- parameters that a backward pass leaves out


def into_unfrozen(model, x, output):
    """As a generator's loss that must not move the critic, which is in the same optimizer."""
    model[2].requires_grad_(False)
    model(x).square().mean().backward()
    model[2].requires_grad_(True)


def into_some_only(model, x, output):
    output.square().mean().backward(inputs=[model[0].weight])


@pytest.mark.parametrize("storage", ["replayed", "stored"])
@pytest.mark.parametrize("second_backward", [into_unfrozen, into_some_only])
def test_what_a_backward_pass_leaves_out_is_not_credited(second_backward, storage, tmp_path):
    def loop(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            output = model(x)
            F.cross_entropy(output, y).backward(retain_graph=True)
            second_backward(model, x, output)
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", loop, example_grads=storage)
    assert run.verify().exact_updates == run.num_steps
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]))
    nodes = explaind.quadrature.gauss_legendre(4)
    expected = explaind.reference.decompose(run, query, num_nodes=4).contribution.sum("token")
    for axis, other in (("step", "update_step"), ("update_step", "step")):
        result = run.attribute(query, by=("query", "example", axis, "parameter"), quadrature=nodes)
        assert float(np.abs(result.dataset.other).sum()) < 1e-12
        np.testing.assert_allclose(result.dataset.contribution, expected.sum(other), rtol=1e-9, atol=1e-13)


def test_a_module_that_is_used_twice_keeps_its_parameters():
    shared, tied = nn.Linear(3, 3), nn.Linear(3, 3)
    tied.weight = shared.weight
    model = nn.Sequential(shared, nn.Tanh(), shared, nn.PReLU(3), tied).double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moved = {name: parameter.detach() + 1 for name, parameter in model.named_parameters()}
    output = call_function(lambda module, x: module(x), model, moved, (FEATURES,), {})
    hidden = F.linear(torch.tanh(F.linear(FEATURES, moved["0.weight"], moved["0.bias"])), *list(moved.values())[:2])
    expected = F.linear(F.prelu(hidden, moved["3.weight"]), moved["0.weight"], moved["4.bias"])
    torch.testing.assert_close(output, expected)
    assert all(isinstance(parameter, nn.Parameter) for parameter in (shared.weight, shared.bias, tied.weight))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
