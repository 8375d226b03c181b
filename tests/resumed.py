"""Trainings that are stopped and resumed, of many shapes."""

import random
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import explaind
from explaind.recording import boundaries, writer
from explaind.store import StoreReader
from tests.cases import data, mlp
from tests.traced import (
    FEATURES,
    LABELS,
    batchnorm_mlp,
    dropout_mlp,
    momentum_sgd,
    same,
)

IN_TIME = ("loop_point", "loop_state", "state", "state_step", "state_scalar", "state_present")
"""Arrays whose rows depend on when blocks were published, or where a run was resumed."""


DATA = data()


@contextmanager
def points_everywhere():
    """A point between all steps, however short they are, and all blocks published, however slow that is."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(boundaries, "_SHARE", float("inf"))
        patched.setattr(writer, "_CHEAP_SECONDS", 10.0)
        yield


class Stopped(Exception):
    pass


@dataclass
class Loop:
    """A training that may be stopped: `stop(recorder, where)` is called after each forward pass and each step."""

    path: Any
    options: dict[str, Any] = field(default_factory=dict)
    make: Any = mlp
    make_optimizer: Any = momentum_sgd
    epochs: int = 3
    drop_last: bool = False
    stop: Any = lambda recorder, where: None
    recorder: Any = None

    def __call__(self, body, **options):
        torch.manual_seed(5)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        model = self.make()
        made = self.make_optimizer(model)
        optimizers = made if isinstance(made, list) else [made]
        with explaind.trace(model, made, self.path, **self.options | options) as self.recorder:
            body(self, self.recorder, model, *optimizers)
        return model

    def at(self, where):
        self.stop(self.recorder, where)

    def step(self, recorder, model, optimizer, x, y):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        self.at("forward")
        loss.backward()
        optimizer.step()
        self.at("step")


def loader(**options):
    return DataLoader(DATA, **{"batch_size": 4, "shuffle": True} | options)


def plain(loop, recorder, model, optimizer):
    batches = loader(drop_last=loop.drop_last)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def seeded(loop, recorder, model, optimizer):
    batches = loader(generator=torch.Generator().manual_seed(2))
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def with_replacement(loop, recorder, model, optimizer):
    generator = torch.Generator().manual_seed(2)
    sampler = torch.utils.data.RandomSampler(DATA, replacement=True, num_samples=10, generator=generator)
    batches = loader(shuffle=None, sampler=sampler)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x + torch.rand(1, generator=generator), y)


def workers(loop, recorder, model, optimizer):
    batches = loader(num_workers=1)
    for _ in range(2):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def scheduled(loop, recorder, model, optimizer):
    by_step, by_epoch = StepLR(optimizer, 2, 0.5), MultiStepLR(optimizer, [1, 2], 0.3)
    recorder.keep(by_step, by_epoch)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            by_step.step()
        by_epoch.step()


def not_kept_scheduler(loop, recorder, model, optimizer):
    scheduler = StepLR(optimizer, 1, 0.5)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
        scheduler.step()


def averaged(loop, recorder, model, optimizer):
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    plateau = ReduceLROnPlateau(optimizer, patience=0)
    recorder.keep(ema, plateau)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            ema.update_parameters(model)
        with torch.no_grad():
            plateau.step(F.cross_entropy(ema(FEATURES), LABELS))
    model.register_buffer("ema", torch.cat([p.detach().reshape(-1) for p in ema.parameters()]))


def accumulated(loop, recorder, model, optimizer):
    seen = []
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader(batch_size=2, drop_last=True)):
            F.cross_entropy(model(x), y).backward()
            loop.at("forward")
            if len(seen := [*seen, x]) % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()
                loop.at("step")


def closures(loop, recorder, model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loop.at("forward")
        loss.backward()
        return loss

    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):  # noqa: B007
            optimizer.step(closure)
            loop.at("step")


def scaled(loop, recorder, model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    recorder.keep(scaler)
    for _ in range(5):
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad()
            overflow = torch.inf if y.sum() % 3 == 1 else 1.0
            scaler.scale(F.cross_entropy(model(x), y) * overflow).backward()
            loop.at("forward")
            scaler.step(optimizer)
            scaler.update()
            loop.at("step")


def two_steps_for_a_batch(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            loop.step(recorder, model, optimizer, x, y)
            loop.step(recorder, model, optimizer, x, y)


def projected(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.9)
            loop.step(recorder, model, optimizer, x, y)
            with torch.no_grad():
                model[0].bias.add_(torch.randn_like(model[0].bias), alpha=0.01)


def by_hand(loop, recorder, model, optimizer):
    while recorder.num_steps < 9:
        ids = torch.randint(len(FEATURES), (4,))
        recorder.examples(ids)
        loop.step(recorder, model, optimizer, FEATURES[ids], LABELS[ids])


def by_content(loop, recorder, model, optimizer):
    scheduler = CosineAnnealingLR(optimizer, 9)
    recorder.keep(scheduler)
    for step in range(recorder.num_steps, 9):
        rows = [(step + number) % 7 for number in range(3)]
        loop.step(recorder, model, optimizer, FEATURES[rows], LABELS[rows])
        scheduler.step()


def own_generator(loop, recorder, model, optimizer):
    generator = torch.Generator().manual_seed(8)
    recorder.keep(generator)
    while recorder.num_steps < 9:
        ids = torch.randint(len(FEATURES), (4,), generator=generator)
        loop.step(recorder, model, optimizer, FEATURES[ids], LABELS[ids])


def zeroed_in_place(loop, recorder, model, optimizer):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            optimizer.zero_grad(set_to_none=False)
            output = model(x) if recorder.num_steps < 4 else model[2](model[1](model[0](x).detach()))
            if recorder.num_steps >= 4:
                output = model(x) * 0 + output
            F.cross_entropy(output, y).backward()
            loop.at("forward")
            optimizer.step()
            loop.at("step")


class Augmented(Dataset):
    """Draws from all generators that there are."""

    def __len__(self):
        return len(FEATURES)

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return FEATURES[index] + 0.1 * noise, LABELS[index]


def augmented(loop, recorder, model, optimizer):
    batches = DataLoader(Augmented(), batch_size=4, shuffle=True)
    for _ in range(loop.epochs):
        for x, y in recorder.batches(batches):
            loop.step(recorder, model, optimizer, x, y)


def several_kinds(loop, recorder, model, optimizer):
    tokens = torch.arange(12).reshape(3, 4) % 5
    while recorder.num_steps < 8:
        step = recorder.num_steps
        optimizer.zero_grad()
        length = 2 + step // 2 % 3
        rows = tokens[:, :length] + step % 2
        model(rows).logsumexp(-1).sum().backward()
        loop.at("forward")
        optimizer.step()
        loop.at("step")


def embedding():
    return nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 2)).double()


def adamw(model):
    return AdamW(model.parameters(), lr=0.03, weight_decay=0.1)


def two_optimizers(model):
    return [SGD(model[0].parameters(), lr=0.1, momentum=0.9), Adam(model[2].parameters(), lr=0.05)]


def in_rounds(loop, recorder, model, *optimizers):
    for _ in range(loop.epochs):
        for x, y in recorder.batches(loader()):
            for optimizer in optimizers:
                optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            loop.at("forward")
            for optimizer in optimizers:
                optimizer.step()
            loop.at("step")


def sum_of_losses(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none") / len(x)


CASES = {
    "plain": (plain, {}),
    "generator": (seeded, {}),
    "replacement": (with_replacement, {}),
    "workers": (workers, {}),
    "dropout": (plain, {"make": dropout_mlp}),
    "batch norm": (plain, {"drop_last": True, "epochs": 4, "make": batchnorm_mlp, "make_optimizer": adamw}),
    "schedulers": (scheduled, {"make_optimizer": adamw}),
    "scheduler not kept": (not_kept_scheduler, {}),
    "averages": (averaged, {}),
    "accumulation": (accumulated, {}),
    "closure": (closures, {}),
    "scaler": (scaled, {}),
    "two steps for a batch": (two_steps_for_a_batch, {}),
    "weights that the loop changes": (projected, {}),
    "by hand": (by_hand, {"make": dropout_mlp}),
    "by content": (by_content, {}),
    "own generator": (own_generator, {}),
    "zeroed in place": (zeroed_in_place, {"make_optimizer": adamw}),
    "augmented": (augmented, {"make": dropout_mlp}),
    "several kinds of calls": (several_kinds, {"make": embedding}),
    "two optimizers": (in_rounds, {"make_optimizer": two_optimizers}),
    "snapshots": (
        plain,
        {
            "drop_last": True,
            "epochs": 4,
            "make": batchnorm_mlp,
            "make_optimizer": adamw,
            "options": {"snapshot_every": 3},
        },
    ),
    "stored gradients": (plain, {"options": {"example_grads": "stored"}}),
    "objective": (plain, {"options": {"objective": sum_of_losses}}),
    "durable": (plain, {"options": {"durable": True}}),
}


def assert_same_run(path, other, *, but=()):
    """All rows of two stores are the same, but for those that depend on the time."""
    one, two = StoreReader(path), StoreReader(other)
    assert one.commit.complete
    assert one.commit.arrays.keys() == two.commit.arrays.keys()
    for name in one.commit.arrays:
        if name.partition("/")[0] not in (*IN_TIME, *but):
            assert one.read(name).shape == two.read(name).shape, name
            assert one.read(name).tobytes() == two.read(name).tobytes(), name
    for name in ("parameters", "fixed", "groups", "group_keys", "call_kinds", "input_layouts"):
        assert one.attributes.get(name) == two.attributes.get(name)


def assert_same_weights(one, other):
    assert same(one.state_dict(), other.state_dict())


def stop_at(where, num_steps, left=None):
    """Stop a loop; copies to `left` what would be there if its process had been killed."""

    def stop(recorder, now):
        if (now, recorder.num_steps) == (where, num_steps):
            if left is not None:
                recorder._rows._writer.wait()
                shutil.copytree(recorder.path, left)
            raise Stopped

    return stop
