"""Loops with batches of all kinds."""

from torch.optim import SGD

from tests.cases import one_group
from tests.loops.problem import ADAMW, FEATURES, LABELS, MOMENTUM, loader, step, traced
from tests.loops.row import Rows

BATCHES = Rows()


@BATCHES.row("ragged batches")
@traced(ADAMW)
def ragged_batches(model, optimizer, recorder):
    for x, y in recorder.batches(loader(batch_size=4, shuffle=False)):
        step(model, optimizer, x, y)


@BATCHES.row("shuffled full batch")
@traced(ADAMW)
def shuffled_full_batch(model, optimizer, recorder):
    batches = loader(batch_size=9)
    for _ in range(4):
        for x, y in recorder.batches(batches):
            step(model, optimizer, x, y)


@BATCHES.row("the same example twice in a batch")
@traced(MOMENTUM)
def repeated_examples(model, optimizer, recorder):
    for rows in ([0, 1, 1, 2], [3, 3, 3, 0], [1, 4, 1, 4]):
        step(model, optimizer, FEATURES[rows], LABELS[rows])


@BATCHES.row("several epochs")
@traced(one_group(SGD, lr=0.2, momentum=0.9, weight_decay=0.1))
def several_epochs(model, optimizer, recorder):
    batches = loader()
    for _ in range(2):
        for x, y in recorder.batches(batches):
            step(model, optimizer, x, y)
