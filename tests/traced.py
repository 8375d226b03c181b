"""Loops that a test writes for itself, traced: small models, one ordinary step, and the run opened again."""

import json

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

import explaind
from explaind.checksums import sealed_metadata, sealed_text
from tests.cases import data, mlp, query

FEATURES, LABELS = data().tensors


def dropout_mlp():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


def batchnorm_mlp(**settings):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5, **settings), nn.Tanh(), nn.Linear(5, 3)).double()


def untracked_batchnorm_mlp():
    return batchnorm_mlp(track_running_stats=False)


def with_buffer():
    model = mlp()
    model.register_buffer("scale", torch.ones(2))
    return model


def momentum_sgd(model):
    return SGD(model.parameters(), lr=0.2, momentum=0.9)


def step_on(model, optimizer, rows):
    """One ordinary training step on some rows of the data."""
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
    optimizer.step()


def three_steps(model, optimizer, recorder):
    for start in (0, 3, 6):
        step_on(model, optimizer, slice(start, start + 3))


def batches(recorder):
    loader = DataLoader(data(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2))
    return recorder.batches(loader)


def one_epoch(model, optimizer, recorder):
    for x, y in batches(recorder):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def recorded(path, loop, *, make=mlp, optimizer=momentum_sgd, **options):
    """Trace `loop(model, optimizer, recorder)` and open the run; returns it with the trained model."""
    model = make()
    made = optimizer(model)
    with explaind.trace(model, made, path, **options) as recorder:
        loop(model, made, recorder)
    return explaind.open_run(path, model=make()), model


def same(one, other):
    """Deep equality of state dicts, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one == other


def check_prefix(path, *, most=None):
    """Open what a writer of `mlp` left: whole steps that replay exactly and close. Returns their number."""
    run = explaind.open_run(path, model=mlp())
    assert run.verify().bit_exact
    steps = None if most is None else range(max(0, run.num_steps - most), run.num_steps)
    run.attribute(query(num=1), by=("query", "step", "layer"), steps=steps).check()
    return run.num_steps


def change_attributes(path, edit):
    """Let the metadata of a store say something else, with the right checksum."""
    metadata = json.loads((path / "zarr.json").read_text())
    edit(metadata["attributes"])
    (path / "zarr.json").write_text(json.dumps(sealed_metadata(metadata)))


def change_commit(path, edit):
    """Let the commit of a store say something else, with the right checksum."""
    content = json.loads((path / "commit.json").read_text())
    del content["checksum"]
    edit(content)
    (path / "commit.json").write_text(sealed_text(content))


def forget_chunks(path):
    """Let the commit of a store say nothing about its chunks, so that they may be others."""
    change_commit(path, lambda content: content.update(arrays=dict.fromkeys(content["arrays"]), earlier=[]))
