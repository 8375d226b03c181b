"""Training problems as data: each is a small float64 model, an optimizer and a loop as a user writes it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import explaind
from explaind.recording import chunks

NUM_EXAMPLES = 9
NUM_FEATURES = 3
NUM_CLASSES = 3


def data(dtype: torch.dtype = torch.float64) -> TensorDataset:
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(NUM_CLASSES, (NUM_EXAMPLES,), generator=generator)
    return TensorDataset(features.to(dtype), labels)


def mlp(activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Linear(NUM_FEATURES, 4), activation(), nn.Linear(4, NUM_CLASSES)]
    return nn.Sequential(*layers).to(dtype)


def two_groups(make: Callable[..., Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    """The first layer with its own rate and decay."""

    def build(model: nn.Module) -> Optimizer:
        first = {"params": list(model[0].parameters()), "lr": settings["lr"] / 2, "weight_decay": 0.3}
        return make([first, {"params": list(model[2].parameters())}], **settings)

    return build


def one_group(make: Callable[..., Optimizer], **settings: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: make(model.parameters(), **copy.deepcopy(settings))  # a schedule moves lr as a tensor in place


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    optimizer: Callable[[nn.Module], Optimizer]
    batch_size: int = 4  # 9 examples: batches of 4, 4 and a ragged 1
    epochs: int = 2
    scheduled: bool = False
    accumulate: int = 1
    max_norm: float | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def __str__(self) -> str:
        return self.name


CASES = [
    Case(name="sgd", optimizer=one_group(SGD, lr=0.3)),
    Case(
        name="sgd-momentum-dampening-decay",
        optimizer=one_group(SGD, lr=0.2, momentum=0.8, dampening=0.3, weight_decay=0.05),
    ),
    Case(name="sgd-nesterov", optimizer=one_group(SGD, lr=0.2, momentum=0.7, nesterov=True, weight_decay=0.1)),
    Case(name="sgd-two-groups-schedule", optimizer=two_groups(SGD, lr=0.2, momentum=0.9), scheduled=True),
    Case(name="adam-l2", optimizer=one_group(Adam, lr=0.05, weight_decay=0.1)),
    Case(name="adam-amsgrad", optimizer=one_group(Adam, lr=0.05, amsgrad=True)),
    Case(name="adamw-schedule", optimizer=one_group(AdamW, lr=0.05, weight_decay=0.5), scheduled=True),
    Case(name="adamw-full-batch-shuffled", optimizer=one_group(AdamW, lr=0.05), batch_size=9, epochs=6),
    Case(name="adamw-two-groups", optimizer=two_groups(AdamW, lr=0.05, betas=(0.8, 0.95))),
    Case(name="sgd-maximize", optimizer=one_group(SGD, lr=0.1, momentum=0.5, weight_decay=0.1, maximize=True)),
    Case(name="adamw-maximize", optimizer=one_group(AdamW, lr=0.02, maximize=True)),
    Case(name="adam-maximize-l2", optimizer=one_group(Adam, lr=0.02, weight_decay=0.1, maximize=True)),
    Case(name="sgd-accumulation", optimizer=one_group(SGD, lr=0.2, momentum=0.9), batch_size=2, accumulate=2),
    Case(name="adamw-clipped", optimizer=one_group(AdamW, lr=0.05), max_norm=0.1),
    Case(
        name="sgd-label-smoothing-sum",
        optimizer=one_group(SGD, lr=0.05),
        loss=lambda out, y: F.cross_entropy(out, y, label_smoothing=0.2, reduction="sum"),
    ),
]
BY_NAME = {case.name: case for case in CASES}


def train(case: Case, model: nn.Module, recorder: explaind.Recorder | None, optimizer: Optimizer) -> None:
    """The loop, traced or not."""
    loader = DataLoader(data(next(model.parameters()).dtype), batch_size=case.batch_size, shuffle=True)
    scheduler = StepLR(optimizer, step_size=2, gamma=0.7) if case.scheduled else None
    torch.manual_seed(11)
    for _ in range(case.epochs):
        for number, (x, y) in enumerate(loader if recorder is None else recorder.batches(loader)):
            if number % case.accumulate == 0:
                optimizer.zero_grad()
            case.loss(model(x), y).backward()
            if (number + 1) % case.accumulate == 0:
                if case.max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), case.max_norm)
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()


def record(
    case: Case, path: Path, *, activation: type[nn.Module] = nn.Tanh, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[explaind.Run, nn.Module]:
    """Record a case; returns the opened run and the trained model."""
    model = mlp(activation, dtype)
    optimizer = case.optimizer(model)
    with explaind.trace(model, optimizer, path, **options) as recorder:
        train(case, model, recorder, optimizer)
    return explaind.open_run(path, model=mlp(activation, dtype)), model


def query(dtype: torch.dtype = torch.float64, num: int = 3) -> explaind.Query:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(num, NUM_FEATURES, generator=generator, dtype=torch.float64).to(dtype)
    return explaind.Query(inputs, output=explaind.outputs.log_prob([i % NUM_CLASSES for i in range(num)]))


def chunks_of(monkeypatch: Any, num_bytes: int) -> None:
    """Make all chunks of a store about that large."""
    monkeypatch.setattr(chunks, "_LARGEST_BYTES", num_bytes)
    monkeypatch.setattr(chunks, "_LEAST_BYTES", num_bytes)
