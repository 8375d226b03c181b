"""How a model is called and what it returns: containers, parts, shapes, arguments that change."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

import explaind
from explaind.calls import map_tensors, named_tensors, rebuild, take_apart
from explaind.errors import RecordingError
from tests import traced
from tests.cases import one_group
from tests.traced import FEATURES, LABELS, batches, one_epoch

AXES = ("query", "example", "step", "parameter")
recorded = partial(traced.recorded, optimizer=one_group(AdamW, lr=0.05))
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
    several, model = recorded(tmp_path / "several.zarr", loop_over_heads(split), make=lambda: Heads(form))
    single, twin = recorded(
        tmp_path / "one.zarr", loop_over_heads(lambda out: (out[:, :4], out[:, 4:])), make=lambda: Heads(joint)
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
        recorded(tmp_path / "run.zarr", loop, make=make)


def test_an_output_of_several_must_be_named(tmp_path):
    run, _ = recorded(
        tmp_path / "run.zarr",
        loop_over_heads(lambda out: (out["hidden"], out["logits"])),
        make=lambda: Heads(lambda h, z: {"hidden": h, "logits": z}),
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


def test_modules_called_one_by_one_are_as_the_model_made_of_them(tmp_path):
    apart, _ = recorded(tmp_path / "parts.zarr", loop_over_parts, make=parts)
    whole, _ = recorded(tmp_path / "whole.zarr", one_epoch)
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
        recorded(tmp_path / "run.zarr", loop, make=parts)


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

    run, _ = recorded(tmp_path / "run.zarr", loop, make=Last)
    assert run.verify().bit_exact
    assert len(run.examples) == 6 + 5
    with pytest.raises(ValueError, match=r"different plain arguments.*forward=lambda model"):
        run.attribute(explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1])), by=("query",))
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]), forward=lambda m, x: m(x, 1.0))
    result = run.attribute(query, by=AXES)
    result.check()
    assert float(np.abs(result.dataset.other).max()) == 0


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
        run, _ = recorded(tmp_path / f"{name}.zarr", loop, make=make)
        assert run.verify().exact_gradients == run.num_steps, name
        assert run.attribute(explaind.Query(FEATURES[:2], output=output), by=AXES).check().other == 0


def test_a_named_tuple_as_argument_is_refused(tmp_path):
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3).double()

        def forward(self, pair):
            return self.linear(pair.first)

    with pytest.raises(RecordingError, match="the argument '0' is a Pair"):
        recorded(tmp_path / "run.zarr", lambda model, *_: model(Pair(FEATURES, LABELS)), make=First)
