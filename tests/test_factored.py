"""Which row is whose: models that fold, sort, route and couple the rows of a batch, against the slow reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

import explaind
import explaind.reference
from explaind.quadrature import gauss_legendre


class Model(nn.Module):
    """Three layers, put together by `forward(model, x)`."""

    def __init__(self, forward, first=None):
        super().__init__()
        torch.manual_seed(5)
        self.first = first() if first else nn.Linear(4, 8)
        self.other, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self._forward = forward
        self.double()

    def forward(self, x):
        return self._forward(self, x)


def folded(model, x):
    """Positions first, as recurrent networks and attention have them."""
    hidden = torch.tanh(model.first(x.transpose(0, 1).reshape(-1, 4)))
    return model.head(hidden.reshape(x.shape[1], x.shape[0], 8).mean(dim=0))


def rows_sorted(model, x):
    order = x[:, 0].argsort()
    return model.head(torch.tanh(model.first(x[order]))[order.argsort()])


def rows_coupled(model, x):
    """Rows whose first entry is large are averaged."""
    hidden = torch.tanh(model.first(x))
    large = (x[:, :1] > 5).to(x)
    return model.head(torch.where(large > 0, (hidden * large).sum(dim=0) / large.sum().clamp_min(1), hidden))


def routed(model, x):
    """Two experts, one of which may get no row."""
    left = x[:, 0] > 0
    hidden = torch.zeros(len(x), 8, dtype=x.dtype)
    hidden = hidden.index_put((left.nonzero()[:, 0],), torch.tanh(model.first(x[left])))
    return model.head(hidden.index_put(((~left).nonzero()[:, 0],), torch.tanh(model.other(x[~left]))))


class Attention(nn.Module):
    """The projection after it begins at zero, so that nothing before it has a gradient in the first step."""

    def __init__(self):
        super().__init__()
        self.attention, self.widen = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 8)
        nn.init.zeros_(self.attention.out_proj.weight)

    def forward(self, x):
        return self.widen(self.attention(x, x, x, need_weights=False)[0] + x)


def attended(model, x):
    return model.head(model.first(x).mean(dim=1))


def inputs(*shapes):
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def with_large(batches, rows):
    for x in batches:
        x[rows, 0] = 6.0
    return batches


def with_first(batches, *firsts):
    for x, first in zip(batches, firsts, strict=True):
        x[:, 0] = torch.tensor(first)
    return batches


CASES = {
    "one position in the largest call, more later": (folded, None, inputs((16, 1, 4), (12, 4, 4), (12, 4, 4))),
    "as many rows as positions": (folded, None, inputs((4, 4, 4), (4, 4, 4))),
    "rows sorted in some calls only": (
        rows_sorted,
        None,
        with_first(inputs((6, 4), (6, 4), (6, 4)), range(6), [0, 2, 1, 3, 4, 5], [0, 1, 2, 3, 5, 4]),
    ),
    "two rows of many coupled": (rows_coupled, None, with_large(inputs((24, 4), (24, 4)), [7, 15])),
    "an expert without rows": (
        routed,
        None,
        with_first(inputs((6, 4), (6, 4), (6, 4)), [1.0] * 6, [1.0, -1.0] * 3, [-1.0] * 6),
    ),
    "attention that begins without a gradient": (attended, Attention, inputs((5, 3, 4), (5, 3, 4), (5, 3, 4))),
}


@pytest.mark.parametrize("only_first", [False, True], ids=["all rows", "one row in the loss"])
@pytest.mark.parametrize("name", CASES)
def test_every_contribution_is_that_of_its_own_row(name, only_first, tmp_path):
    forward, first, batches = CASES[name]
    model = Model(forward, first)
    optimizer = AdamW(model.parameters(), lr=0.03)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        start = 0
        for x in batches:
            recorder.examples(range(start, start + len(x)))
            start += len(x)
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), torch.arange(len(x)) % 3, reduction="none")
            (losses[0] if only_first else losses.mean()).backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=Model(forward, first))
    query = explaind.Query(batches[0][:2], output=explaind.outputs.logit([0, 1]))
    expected = explaind.reference.decompose(run, query, num_nodes=2).contribution
    for axis in ("step", "update_step"):
        result = run.attribute(query, by=("query", "example", axis, "parameter"), quadrature=gauss_legendre(2))
        found = result.dataset.contribution
        reference = expected.sum([dim for dim in expected.dims if dim not in found.dims])
        largest = np.abs(reference).max(["query", "example", axis])
        assert float((np.abs(found - reference) / largest.where(largest > 1e-12, 1.0)).max()) < 1e-8
