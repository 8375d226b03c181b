"""Loops with forward passes, backward passes and steps in other numbers, or in another order."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam

from tests.cases import one_group
from tests.loops.problem import ADAMW, FEATURES, LABELS, MOMENTUM, SLOW_MOMENTUM, VALIDATION, loader, traced
from tests.loops.row import Rows

PASSES = Rows()
HALVES = slice(0, 5), slice(5, 9)


@PASSES.row("accumulation over uneven micro-batches")
@traced(ADAMW)
def accumulation(model, optimizer, recorder):
    for _ in range(2):
        for x, y in zip(FEATURES.split([4, 3, 2]), LABELS.split([4, 3, 2]), strict=True):
            (F.cross_entropy(model(x), y, reduction="sum") / 9).backward()
        optimizer.step()
        optimizer.zero_grad()


@PASSES.row("several forwards before one backward")
@traced(MOMENTUM)
def several_forwards(model, optimizer, recorder):
    for _ in range(3):
        optimizer.zero_grad()
        first, second = (F.cross_entropy(model(FEATURES[rows]), LABELS[rows]) for rows in HALVES)
        (first * second).backward()
        optimizer.step()


def with_dropout():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Tanh(), nn.Linear(4, 3)).double()


@PASSES.row("one batch twice, with other dropout masks")
@traced(MOMENTUM, make=with_dropout)
def consistency(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        first, second = model(x), model(x)
        (F.cross_entropy(first, y) + F.mse_loss(first, second)).backward()
        optimizer.step()


@PASSES.row("the output fed back as input")
@traced(SLOW_MOMENTUM)
def fed_back(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        F.cross_entropy(model(model(model(x))), y).backward()
        optimizer.step()


@PASSES.row("the output changed in place")
@traced(SLOW_MOMENTUM)
def changed_output(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        optimizer.zero_grad()
        output = model(x)
        output /= 0.5
        output[:, 0] -= 1
        F.cross_entropy(output, y).backward()
        optimizer.step()


@PASSES.row("batches fetched ahead, for accumulation")
@traced(MOMENTUM)
def fetched_ahead(model, optimizer, recorder):
    batches = recorder.batches(loader(2))
    while micro_batches := list(itertools.islice(batches, 3)):
        optimizer.zero_grad()
        for x, y in micro_batches:
            (F.cross_entropy(model(x), y) / len(micro_batches)).backward()
        optimizer.step()


@PASSES.row("several backwards before one step")
@traced(MOMENTUM)
def several_backwards(model, optimizer, recorder):
    for _ in range(3):
        optimizer.zero_grad()
        output = model(FEATURES)
        F.cross_entropy(output, LABELS).backward(retain_graph=True)
        (0.1 * output.square().mean()).backward()
        optimizer.step()


@PASSES.row("forwards that never reach the loss")
@traced(one_group(SGD, lr=0.2))
def unused_forwards(model, optimizer, recorder):
    for _ in range(3):
        optimizer.zero_grad()
        teacher = model(FEATURES).softmax(dim=1).detach()
        model(VALIDATION)
        (F.cross_entropy(model(FEATURES), LABELS) + F.mse_loss(model(-FEATURES), teacher)).backward()
        optimizer.step()
        with torch.no_grad():
            model(VALIDATION)


@PASSES.row("closures")
@traced(one_group(Adam, lr=0.05))
def closures(model, optimizer, recorder):
    for rows in HALVES * 2:

        def closure(rows=rows):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[rows]), LABELS[rows])
            loss.backward()
            return loss

        optimizer.step(closure)


@PASSES.row("step skipped by the user")
@traced(MOMENTUM)
def skipped_step(model, optimizer, recorder):
    for rows in (*HALVES, slice(2, 4), *HALVES):
        optimizer.zero_grad()
        F.cross_entropy(model(FEATURES[rows]), LABELS[rows]).backward()
        if len(LABELS[rows]) > 2:
            optimizer.step()


@PASSES.row("`zero_grad` after the step")
@traced(MOMENTUM)
def zero_grad_after(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@PASSES.row("`zero_grad` between forward and backward")
@traced(MOMENTUM)
def zero_grad_between(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@PASSES.row("`model.zero_grad(set_to_none=False)`")
@traced(MOMENTUM)
def zero_grad_in_place(model, optimizer, recorder):
    for x, y in recorder.batches(loader()):
        model.zero_grad(set_to_none=False)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
