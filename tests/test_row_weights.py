"""Rows that lie last are told from those that lie first, however few they are, and however small their gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW

import explaind
import explaind.reference

BY = ("query", "example", "step", "parameter")


class TimeFirst(nn.Module):
    """A branch of two layers beside a head, both on positions before rows."""

    def __init__(self, scale=1.0, width=5):
        super().__init__()
        torch.manual_seed(1)
        self.head, self.first, self.second = nn.Linear(4, 3), nn.Linear(4, width), nn.Linear(width, 3)
        self.scale = scale

    def forward(self, x):
        x = x.transpose(0, 1).contiguous()
        return (self.head(x) + self.scale * self.second(torch.tanh(self.first(x)))).sum(dim=0)


def recorded(path, make, optimizer, steps, rows, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, 4, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(3, (12,), generator=generator)
    model = make().to(dtype)
    chosen = optimizer(model.parameters(), lr=0.02)
    with explaind.trace(model, chosen, path) as recorder:
        for _ in range(steps):
            ids = torch.randperm(12, generator=generator)[:rows]
            recorder.examples(ids)
            chosen.zero_grad()
            F.cross_entropy(model(inputs[ids]), labels[ids]).backward()
            chosen.step()
    query = explaind.Query(inputs[:3], output=explaind.outputs.logit([0, 1, 2]))
    return explaind.open_run(path, model=make().to(dtype)), query


def test_two_rows_never_have_the_same_weight(tmp_path):
    run, query = recorded(tmp_path / "run.zarr", TimeFirst, SGD, steps=40, rows=2)
    found = run.attribute(query, by=BY).dataset.contribution
    expected = explaind.reference.decompose(run, query).contribution.sum(["update_step", "token"])
    np.testing.assert_allclose(found, expected.transpose(*found.dims), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-6])
def test_gradients_that_are_small_beside_others_are_no_noise(tmp_path, scale):
    def make():
        return TimeFirst(scale, width=64)

    run, query = recorded(tmp_path / "run.zarr", make, AdamW, steps=6, rows=6, dtype=torch.float32)
    found, exact = (run.attribute(query, by=BY, dtype=d).dataset.contribution for d in (torch.float32, torch.float64))
    error = np.abs(found - exact).max(("query", "example", "step")) / np.abs(exact).max(("query", "example", "step"))
    assert float(error.max()) < 1e-5
