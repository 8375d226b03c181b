"""The gradients of single rows, taken apart in one backward pass of the batch."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call

from explaind.path import factors
from explaind.path.gradients import combined_rows
from explaind.path.sums import Terms, add_combined
from explaind.path.uses import Uses

ROWS = 5


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.norm = nn.GRU(4, 3, batch_first=True), nn.RMSNorm(3)

    def forward(self, x):
        return self.norm(self.cell(x)[0])


class Language(nn.Module):
    """The head shares the embedding's weight; positions are added; only the last token is looked at."""

    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8, padding_idx=3), nn.Parameter(torch.randn(6, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, tokens):
        hidden = self.block(self.embedding(tokens) + self.positions)
        return hidden[:, -1] @ self.embedding.weight.T


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.gain = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return self.block(x.transpose(0, 1) * self.gain).mean(dim=0)


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(()))

    def forward(self, x):
        return torch.tanh(x @ self.weight) * self.scale + self.scale


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 2)), (ROWS, 4)),
    "linear on tokens": (lambda: nn.Sequential(nn.Linear(4, 7, bias=False), nn.Tanh(), nn.Linear(7, 2)), (ROWS, 3, 4)),
    "matrix product": (Projected, (ROWS, 2, 4)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
            nn.GroupNorm(3, 6),
            nn.Tanh(),
            nn.Conv2d(6, 2, 2, dilation=2),
        ),
        (ROWS, 4, 9, 8),
    ),
    "convolution of lines": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1, stride=2), nn.Tanh()), (ROWS, 3, 8)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm((3, 4)), nn.Tanh()), (ROWS, 3, 4)),
    "recurrent": (Recurrent, (ROWS, 3, 4)),
    "language": (Language, (ROWS, 6)),
    "time first": (TimeFirst, (ROWS, 3, 8)),
}


def captured(model, x, weights):
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = functional_call(model, leaves, (x,))
    expected = combined_rows({"": output}, leaves, {"": weights}, seed=(0, 0))
    uses = Uses([output], leaves)
    uses.expect(*expected)
    uses.backward([weights], leaves=True)
    return leaves, uses


def alone(model, x, weights):
    params = list(model.parameters())
    rows = [torch.autograd.grad(model(row[None])[0], params, weight) for row, weight in zip(x, weights, strict=True)]
    names = [name for name, _ in model.named_parameters()]
    return {name: torch.stack(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def make(name):
    torch.manual_seed(2)
    build, shape = MODELS[name]
    model = build().double()
    x = torch.randint(0, 11, shape) if name == "language" else torch.randn(shape, dtype=torch.float64)
    return model, x, torch.randn_like(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_rows_gradients_and_their_products_are_those_of_each_row_alone(name):
    model, x, weights = make(name)
    leaves, uses = captured(model, x, weights)
    assert uses.uncovered == set()
    for parameter, expected in alone(model, x, weights).items():
        parts = uses.factors(parameter)
        gradients = sum(part.gradients() for part in parts)
        torch.testing.assert_close(gradients, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(gradients.sum(dim=0), leaves[parameter].grad, rtol=0, atol=1e-12)
        for count in (1, 40):  # by factors and by blocks
            vectors = torch.randn(count, *expected.shape[1:], dtype=torch.float64)
            products = sum(part.products(vectors) for part in parts)
            reference = vectors.reshape(count, -1) @ expected.reshape(ROWS, -1).T
            torch.testing.assert_close(products, reference, rtol=0, atol=1e-10)
            some = torch.tensor([3, 1])
            few = sum(part.take(some).products(vectors) for part in parts)
            torch.testing.assert_close(few, reference[:, some], rtol=0, atol=1e-10)
        for mixed in (torch.eye(ROWS)[[4, 2]], torch.tensor([[0.0, 2.0, 0.0, -1.0, 0.5], [1.0, 0.0, 0.0, 0.0, 0.0]])):
            sums = torch.zeros(2, expected[0].numel(), dtype=torch.float64)
            query, row = mixed.nonzero(as_tuple=True)
            add_combined(sums, [(part, Terms(query, row, mixed[query, row].double(), ROWS)) for part in parts])
            torch.testing.assert_close(sums, mixed.double() @ expected.reshape(ROWS, -1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "call_bytes, few", [(1, 2), (1 << 40, 2), (1 << 40, 0)], ids=["products", "rows", "sums of as many rows"]
)
@pytest.mark.parametrize("name", MODELS)
def test_sums_of_rows_go_to_their_part_of_a_larger_total(name, call_bytes, few, dtype, monkeypatch):
    monkeypatch.setattr(factors, "_CALL_BYTES", call_bytes)
    monkeypatch.setattr(factors, "_FEW", few)
    model, x, weights = make(name)
    _, uses = captured(model, x, weights)
    mixed = torch.tensor([[0, 2.0, 0, -1.0, 0.5], [0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0]], dtype=torch.float64)
    query, row = mixed.nonzero(as_tuple=True)
    nothing = Terms(query[:0], row[:0], mixed[query, row][:0], ROWS)
    for parameter, expected in alone(model, x, weights).items():
        number = expected[0].numel()
        total = torch.ones(3, number + 2, dtype=dtype)
        parts = uses.factors(parameter)
        add_combined(total[:, 1:-1], [(part, Terms(query, row, mixed[query, row], ROWS)) for part in parts])
        add_combined(total[:, 1:-1], [(part, nothing) for part in parts])
        sums = 1 + mixed @ expected.reshape(ROWS, -1)
        torch.testing.assert_close(total[:, 1:-1], sums.to(dtype), rtol=0, atol=1e-12 if dtype == mixed.dtype else 1e-5)
        assert bool((total[:, [0, -1]] == 1).all())


class Box:
    """What a graph saves, in a form that can be watched."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_the_graph_is_freed_without_the_collector():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), torch.randn(ROWS, 4)
    saved = weakref.WeakSet()

    def pack(tensor):
        saved.add(box := Box(tensor.detach()))
        return box

    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            output = model(x)
        uses = Uses([output], dict(model.named_parameters()))
        kept = len(saved)
        uses.backward([torch.ones_like(output)])
        assert uses.split("0.weight", ROWS, "first") is not None
        del output
        assert kept and not saved
    finally:
        gc.enable()
