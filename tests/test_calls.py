"""How a model is called and what it returns: containers, parts, shapes, compilation, autocast."""

import shutil
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

import explaind
import explaind.reference
from explaind.calls import map_tensors, named_tensors, rebuild, take_apart
from explaind.errors import RecordingError
from explaind.replay.model import call_function
from tests.cases import data, mlp

FEATURES, LABELS = data().tensors
AXES = ("query", "example", "step", "parameter")
Pair = namedtuple("Pair", "first second")


@dataclass
class Fields:
    loss: torch.Tensor
    logits: torch.Tensor


# ---------------------------------------------------------------------- arguments and outputs


def test_arguments_are_taken_apart_and_rebuilt():
    x, mask, ids = torch.ones(2), torch.zeros(2), torch.arange(2)
    args, kwargs = (x, {"mask": mask, "scale": 2.0}), {"ids": [ids, None, ("a", True)]}
    tensors, template = take_apart(args, kwargs)
    assert list(tensors) == ["0", "1.mask", "ids.0"]
    (first, second), named = rebuild(template, tensors)
    assert first is x
    assert second["mask"] is mask
    assert second["scale"] == 2.0
    assert named["ids"][0] is ids
    assert named["ids"][1:] == [None, ("a", True)]


@pytest.mark.parametrize("container", [dict, OrderedDict], ids=lambda kind: kind.__name__)
def test_outputs_keep_their_type_when_tensors_are_replaced(container):
    one, two = torch.ones(2), torch.zeros(2)
    output = container(a=one, b=[two, (one,)], c=Pair(one, two), d=Fields(one, two), e="text")
    replaced = map_tensors(output, lambda name, tensor: tensor + 1)
    assert [name for name, _ in named_tensors(output)] == ["a", "b.0", "b.1.0", "c.0", "c.1", "d.loss", "d.logits"]
    assert type(replaced) is container
    assert isinstance(replaced["b"][1], tuple)
    assert isinstance(replaced["c"], Pair)
    assert isinstance(replaced["d"], Fields)
    assert replaced["e"] == "text"
    assert all(
        torch.equal(new, old + 1)
        for (_, new), (_, old) in zip(named_tensors(replaced), named_tensors(output), strict=True)
    )
    assert torch.equal(output["d"].loss, torch.ones(2))


# ---------------------------------------------------------------------- several outputs


class Heads(nn.Module):
    """One output is computed from the other, and both are in the loss."""

    def __init__(self, form):
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head, self.form = nn.Linear(3, 4), nn.Linear(4, 3), form
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.form(hidden, self.head(hidden))


def joint(hidden, logits):
    return torch.cat([hidden, logits], dim=1)


def recorded(path, make, loop, *, optimizer=lambda p: AdamW(p, lr=0.05), **options):
    model = make()
    made = optimizer(model.parameters())
    with explaind.trace(model, made, path, **options) as recorder:
        loop(model, made, recorder)
    return explaind.open_run(path, model=make(), objective=options.get("objective")), model


def batches(recorder, *, size=4):
    loader = DataLoader(data(), batch_size=size, shuffle=True, generator=torch.Generator().manual_seed(2))
    return recorder.batches(loader)


def loop_over_heads(split):
    def loop(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            hidden, logits = split(model(x))
            (F.cross_entropy(logits, y) + 0.3 * hidden.square().mean()).backward()
            optimizer.step()

    return loop


@pytest.mark.parametrize(
    ("form", "split", "part"),
    [
        (lambda h, z: {"hidden": h, "logits": z}, lambda out: (out["hidden"], out["logits"]), "logits"),
        (lambda h, z: (h, (z, h.sum())), lambda out: (out[0], out[1][0]), "1.0"),
        (Pair, lambda out: out, 1),
        (lambda h, z: Fields(loss=h, logits=z), lambda out: (out.loss, out.logits), "logits"),
    ],
    ids=["dict", "nested tuple", "namedtuple", "dataclass"],
)
def test_several_outputs_are_as_one_that_holds_them_all(form, split, part, tmp_path):
    several, model = recorded(tmp_path / "several.zarr", lambda: Heads(form), loop_over_heads(split))
    single, twin = recorded(
        tmp_path / "one.zarr", lambda: Heads(joint), loop_over_heads(lambda out: (out[:, :4], out[:, 4:]))
    )
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert several.verify().bit_exact
    logits = explaind.outputs.logit([0, 1, 2])
    result = several.attribute(explaind.Query(FEATURES[:3], output=logits.of(part)), by=AXES)
    result.check()
    assert float(np.abs(result.dataset.other).max()) == 0
    expected = single.attribute(
        explaind.Query(FEATURES[:3], output=lambda out: out[torch.arange(3), 4 + torch.arange(3)]), by=AXES
    )
    np.testing.assert_allclose(result.dataset.contribution, expected.dataset.contribution, rtol=1e-9, atol=1e-13)


def test_an_output_without_rows_is_refused_once_the_loss_depends_on_it(tmp_path):
    def make():
        return Heads(lambda h, z: {"logits": z, "penalty": h.square().sum()})

    def loop(model, optimizer, recorder):
        model(FEATURES)["penalty"].backward()

    with pytest.raises(
        RecordingError, match=r"output 'penalty' of shape \(\), which has no row .* 9 examples.*objective="
    ):
        recorded(tmp_path / "run.zarr", make, loop)


def test_an_output_of_several_must_be_named(tmp_path):
    run, _ = recorded(
        tmp_path / "run.zarr",
        lambda: Heads(lambda h, z: {"hidden": h, "logits": z}),
        loop_over_heads(lambda out: (out["hidden"], out["logits"])),
    )
    for output, message in (
        (explaind.outputs.value(), r"returns several tensors.*: hidden, logits\. Name one.*of\('hidden'\)"),
        (explaind.outputs.value().of("loss"), r"returns no 'loss': hidden, logits"),
    ):
        with pytest.raises(ValueError, match=message):
            run.attribute(explaind.Query(FEATURES[:2], output=output), by=("query",))


# ---------------------------------------------------------------------- modules called one by one


def parts():
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    return nn.ModuleDict({"encoder": encoder, "decoder": nn.Linear(4, 3)}).double()


def loop_over_parts(model, optimizer, recorder):
    encoder, decoder = model["encoder"], model["decoder"]
    for x, y in batches(recorder):
        optimizer.zero_grad()
        F.cross_entropy(decoder(encoder(x)), y).backward()
        optimizer.step()


def loop_over_whole(model, optimizer, recorder):
    for x, y in batches(recorder):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_modules_called_one_by_one_are_as_the_model_made_of_them(tmp_path):
    apart, _ = recorded(tmp_path / "parts.zarr", parts, loop_over_parts)
    whole, _ = recorded(tmp_path / "whole.zarr", mlp, loop_over_whole)
    assert apart.verify().bit_exact
    output = explaind.outputs.logit([0, 1])
    query = explaind.Query(FEATURES[:2], output=output, forward=lambda m, x: m["decoder"](m["encoder"](x)))
    result = apart.attribute(query, by=AXES)
    result.check()
    expected = whole.attribute(explaind.Query(FEATURES[:2], output=output), by=AXES)
    np.testing.assert_allclose(result.dataset.contribution, expected.dataset.contribution, rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match="say how a prediction is made: Query"):
        apart.attribute(explaind.Query(FEATURES[:2], output=output), by=("query",))


def test_modules_called_one_by_one_need_named_examples(tmp_path):
    def loop(model, optimizer, recorder):
        model["decoder"](model["encoder"](FEATURES)).sum().backward()
        optimizer.step()

    with pytest.raises(RecordingError, match=r"call of 'decoder' have no content.*recorder\.batches"):
        recorded(tmp_path / "run.zarr", parts, loop)


# ---------------------------------------------------------------------- arguments that change


class Last(nn.Module):
    """Looks at the last entries of sequences of any length."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, 3).double()

    def forward(self, x, factor=1.0):
        return torch.tanh(factor * self.linear(x[:, -3:])) + x.mean()


def test_batches_may_differ_in_shape_and_plain_arguments(tmp_path):
    longer = torch.cat([torch.ones(9, 2, dtype=torch.float64), FEATURES], dim=1)

    def loop(model, optimizer, recorder):
        for x, factor in ((FEATURES[:4], 1.0), (longer[4:], 1.0), (FEATURES[2:6], 2.0), (longer[5:], 2.0)):
            optimizer.zero_grad()
            F.cross_entropy(model(x, factor), LABELS[: len(x)]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", Last, loop)
    assert run.verify().bit_exact
    assert len(run.examples) == 6 + 5
    with pytest.raises(ValueError, match=r"different plain arguments.*forward=lambda model"):
        run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=("query",))
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]), forward=lambda m, x: m(x, 1.0))
    result = run.attribute(query, by=AXES)
    result.check()
    assert float(np.abs(result.dataset.other).max()) == 0


# ---------------------------------------------------------------------- how the model runs


def compiled_in_place():
    model = mlp()
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "make", [lambda: torch.compile(mlp(), backend="eager"), compiled_in_place], ids=["wrapped", "in place"]
)
def test_a_compiled_model_is_as_the_plain_one(make, tmp_path):
    compiled, model = recorded(tmp_path / "compiled.zarr", make, loop_over_whole)
    plain, twin = recorded(tmp_path / "plain.zarr", mlp, loop_over_whole)
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
    run, _ = recorded(tmp_path / "run.zarr", lambda: torch.compile(mlp()), loop_over_whole)
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

    run, _ = recorded(tmp_path / "run.zarr", lambda: mlp(dtype=torch.float32), loop)
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
        run, _ = recorded(tmp_path / f"{storage}.zarr", make, loop, example_grads=storage)
        assert run.verify().bit_exact
        result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
        result.check()
        assert float(np.abs(result.dataset.other).sum() + np.abs(result.dataset.rounding).sum()) < 1e-12


# ---------------------------------------------------------------------- what models do to their tensors


def test_outputs_changed_in_place_are_followed(tmp_path):
    """An output that is a view, and one of several, lose their hooks when they are changed in place."""

    class Sliced(Heads):
        def forward(self, x):
            return super().forward(x)[:, -3:]

    def loop_over_slices(model, optimizer, recorder):
        for _ in range(2):
            optimizer.zero_grad()
            for rows in (slice(0, 4), slice(4, 9)):
                F.cross_entropy(model(FEATURES[rows]).div_(0.5), LABELS[rows], reduction="sum").backward()
            optimizer.step()

    def loop_over_pairs(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            hidden, logits = model(x)
            logits /= 0.5
            (F.cross_entropy(logits, y) + hidden.square().mean()).backward()
            optimizer.step()

    cases = {
        "slices": (lambda: Sliced(joint), loop_over_slices, explaind.outputs.logit([0, 1])),
        "pairs": (lambda: Heads(Pair), loop_over_pairs, explaind.outputs.logit([0, 1]).of(1)),
    }
    for name, (make, loop, output) in cases.items():
        run, _ = recorded(tmp_path / f"{name}.zarr", make, loop)
        assert run.verify().exact_gradients == run.num_steps, name
        assert run.attribute(explaind.Query(FEATURES[:2], output=output), by=AXES).check().other == 0


def test_parts_without_parameters_are_functions_between_the_others(tmp_path):
    def make():
        torch.manual_seed(3)
        return nn.ModuleList([nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)]).double()

    def loop(model, optimizer, recorder):
        for x, y in batches(recorder):
            optimizer.zero_grad()
            F.cross_entropy(model[2](model[1](model[0](x))), y).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", make, loop)
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

    run, _ = recorded(tmp_path / "run.zarr", Bytes, loop)
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

    run, _ = recorded(tmp_path / "run.zarr", Centred, loop)
    result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
    assert result.dataset.attrs["example_products"] == "tangents"
    assert result.dataset.attrs["row_split"].startswith("coupled rows")
    assert result.check().rounding < 1e-12


def test_a_named_tuple_as_argument_is_refused(tmp_path):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, pair):
            return self.linear(pair.first)

    with pytest.raises(RecordingError, match="the argument '0' is a Pair"):
        recorded(tmp_path / "run.zarr", First, lambda model, *_: model(Pair(FEATURES, LABELS)))


def test_what_no_example_accounts_for_is_warned_about(tmp_path):
    def loop(model, optimizer, recorder):
        for rows in (slice(0, 4), slice(4, 9)):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            F.cross_entropy(model(FEATURES), LABELS).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", mlp, loop)
    result = run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=AXES)
    with pytest.warns(explaind.errors.UnattributedWarning, match=r"% of the path is in the term 'other'"):
        closure = result.check()
    assert closure.other > 1e-3


# ---------------------------------------------------------------------- parameters that a backward pass leaves out


def frozen_for_one_loss(model, optimizer, recorder):
    """As a generator's loss that must not move the critic, which is in the same optimizer."""
    for x, y in batches(recorder):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        model[2].requires_grad_(False)
        model(x).square().mean().backward()
        model[2].requires_grad_(True)
        optimizer.step()


def into_some_only(model, optimizer, recorder):
    for x, y in batches(recorder):
        optimizer.zero_grad()
        output = model(x)
        F.cross_entropy(output, y).backward(retain_graph=True)
        output.square().mean().backward(inputs=[model[0].weight])
        optimizer.step()


@pytest.mark.parametrize("storage", ["replayed", "stored"])
@pytest.mark.parametrize("loop", [frozen_for_one_loss, into_some_only])
def test_what_a_backward_pass_leaves_out_is_not_credited(loop, storage, tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", mlp, loop, example_grads=storage)
    assert run.verify().exact_updates == run.num_steps
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]))
    nodes = explaind.quadrature.gauss_legendre(4)
    expected = explaind.reference.decompose(run, query, num_nodes=4).contribution.sum("token")
    for axis, other in (("step", "update_step"), ("update_step", "step")):
        result = run.attribute(query, by=("query", "example", axis, "parameter"), quadrature=nodes)
        assert float(np.abs(result.dataset.other).sum()) < 1e-12
        np.testing.assert_allclose(result.dataset.contribution, expected.sum(other), rtol=1e-9, atol=1e-13)


def test_a_module_that_is_used_twice_keeps_its_parameters(tmp_path):
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
