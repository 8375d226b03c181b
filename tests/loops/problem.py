"""The small float64 problem that most loops train on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

import explaind
from tests.cases import one_group
from tests.loops.row import Traced

FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1, 0, 2])
VALIDATION = torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
DATASET = TensorDataset(FEATURES, LABELS)
ADAMW = one_group(AdamW, lr=0.05)
MOMENTUM = one_group(SGD, lr=0.2, momentum=0.9)
SLOW_MOMENTUM = one_group(SGD, lr=0.1, momentum=0.9)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def single() -> nn.Sequential:
    """The same in float32."""
    return mlp().float()


def loader(batch_size: int = 4, *, shuffle: bool = True) -> DataLoader:
    """Batches of 4, 4 and a ragged 1 by default."""
    torch.manual_seed(11)
    return DataLoader(DATASET, batch_size=batch_size, shuffle=shuffle)


def query(inputs: torch.Tensor = VALIDATION) -> explaind.Query:
    return explaind.Query(inputs, output=explaind.outputs.log_prob([0, 2]))


def step(model: nn.Module, optimizer: Optimizer, x: torch.Tensor, y: torch.Tensor) -> None:
    """An ordinary step, for loops that are about something else."""
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def traced(
    optimizer: Callable[[nn.Module], Optimizer],
    *,
    make: Callable[[], nn.Module] = mlp,
    inputs: torch.Tensor = VALIDATION,
) -> Callable[[Callable[..., None]], Callable[..., Traced]]:
    """Decorate `loop(model, optimizer, recorder)`, which then trains a new model, traced."""

    def decorate(loop: Callable[..., None]) -> Callable[..., Traced]:
        def run(**options: Any) -> Traced:
            model = make()
            made = optimizer(model)
            with explaind.trace(model, made, **options) as recorder:
                loop(model, made, recorder)
            return Traced(recorder.path, model, query(inputs))

        return run

    return decorate
