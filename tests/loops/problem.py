"""The small float64 problem that most loops train on."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explaind

FEATURES = torch.randn(9, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 0, 1, 1, 0, 2])
VALIDATION = torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
DATASET = TensorDataset(FEATURES, LABELS)


def mlp() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def loader(batch_size: int = 4, *, shuffle: bool = True) -> DataLoader:
    """Batches of 4, 4 and a ragged 1 by default."""
    torch.manual_seed(11)
    return DataLoader(DATASET, batch_size=batch_size, shuffle=shuffle)


def query(inputs: torch.Tensor = VALIDATION) -> explaind.Query:
    return explaind.Query(inputs, output=explaind.outputs.log_prob([0, 2]))
