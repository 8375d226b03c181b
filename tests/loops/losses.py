"""Losses of all kinds, on outputs of all kinds."""

import torch
import torch.nn.functional as F
from torch import nn

import explaind
from tests.loops.problem import FEATURES, LABELS, SLOW_MOMENTUM, VALIDATION, mlp
from tests.loops.row import Rows, Traced

LOSSES = Rows()


def fit(loss, model=None, output=None, **options):
    """Three steps on a loss of the model's output and the batch's labels and places in the data."""
    model = model or mlp()
    optimizer = SLOW_MOMENTUM(model)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 0]):
            optimizer.zero_grad()
            loss(model(FEATURES[rows]), LABELS[rows], rows).backward()
            optimizer.step()
    return Traced(recorder.path, model, explaind.Query(VALIDATION, output=output or explaind.outputs.log_prob([0, 2])))


@LOSSES.row("label smoothing")
def label_smoothing(**options):
    return fit(lambda out, y, _: F.cross_entropy(out, y, label_smoothing=0.2), **options)


@LOSSES.row("class weights")
def class_weights(**options):
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    return fit(lambda out, y, _: F.cross_entropy(out, y, weight=weights), **options)


@LOSSES.row("sample weights")
def sample_weights(**options):
    weights = torch.linspace(0, 1, 9, dtype=torch.float64)
    return fit(
        lambda out, y, rows: (weights[rows] * F.cross_entropy(out, y, reduction="none")).sum() / weights[rows].sum(),
        **options,
    )


@LOSSES.row('`reduction="sum"`')
def summed_loss(**options):
    return fit(lambda out, y, _: 0.2 * F.cross_entropy(out, y, reduction="sum"), **options)


@LOSSES.row("a custom loss that couples the examples")
def contrastive_loss(**options):
    def loss(out, y, _):
        similarity = F.normalize(out, dim=1) @ F.normalize(out, dim=1).T
        return F.cross_entropy(similarity / 0.5, torch.arange(len(out)))

    return fit(loss, **options)


@LOSSES.row("a loss that leaves out some rows of the batch")
def hardest_examples(**options):
    return fit(lambda out, y, _: F.cross_entropy(out, y, reduction="none").topk(2).values.mean(), **options)


@LOSSES.row("a batch whose gradient is zero")
def zero_gradient(**options):
    return fit(lambda out, y, rows: F.cross_entropy(out, y) * (0.0 if rows[0] == 4 else 1.0), **options)


@LOSSES.row("regression")
def regression(**options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    return fit(
        lambda out, y, _: F.mse_loss(out.squeeze(1), y.double()),
        model,
        explaind.outputs.value(),
        **options,
    )


class TwoHeads(nn.Module):
    """Classes and a value from one trunk, as a tuple or a dict."""

    def __init__(self, *, as_dict):
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Linear(3, 4).double()
        self.classes = nn.Linear(4, 3).double()
        self.value = nn.Linear(4, 1).double()
        self.as_dict = as_dict

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        classes, value = self.classes(hidden), self.value(hidden)
        return {"classes": classes, "value": value} if self.as_dict else (classes, value)


@LOSSES.row("several outputs in a tuple")
def tuple_outputs(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out[0], y) + F.mse_loss(out[1].squeeze(1), y.double()),
        TwoHeads(as_dict=False),
        explaind.outputs.log_prob([0, 2]).of("0"),
        **options,
    )


@LOSSES.row("outputs in a dict")
def dict_outputs(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out["classes"], y) + F.mse_loss(out["value"].squeeze(1), y.double()),
        TwoHeads(as_dict=True),
        explaind.outputs.log_prob([0, 2]).of("classes"),
        **options,
    )


@LOSSES.row("outputs in a dict, one of which the loss does not use")
def unused_output(**options):
    return fit(
        lambda out, y, _: F.cross_entropy(out["classes"], y),
        TwoHeads(as_dict=True),
        explaind.outputs.log_prob([0, 2]).of("classes"),
        **options,
    )
