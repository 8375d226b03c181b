"""Optimizers with the flags that change their update; the problem is that of `tests.cases`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, AdamW, Muon, Optimizer, SparseAdam

import explaind
from explaind.errors import UnknownUpdateRuleError
from tests.cases import Case, query, train
from tests.loops.problem import FEATURES, LABELS, loader, mlp
from tests.loops.problem import query as ask
from tests.loops.row import Row, Rows, Traced
from tests.optimizer_cases import CASES, is_muon, matrices


def fit(case: Case, **options: Any) -> Traced:
    model = matrices() if is_muon(case) else mlp()
    optimizer = case.optimizer(model)
    with explaind.trace(model, optimizer, **options) as recorder:
        train(case, model, recorder, optimizer)
    return Traced(recorder.path, model, query(num=2))


OPTIMIZERS = Rows(Row(name=case.name.replace("-", ": ", 1), run=partial(fit, case)) for case in CASES)


@OPTIMIZERS.row("Muon for matrices, AdamW for the rest")
def mixed(**options: Any) -> Traced:
    model = mlp()
    muon = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    adamw = AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.05)
    with explaind.trace(model, [muon, adamw], **options) as recorder:
        for x, y in recorder.batches(loader()):
            muon.zero_grad()
            adamw.zero_grad()
            F.cross_entropy(model(x), y).backward()
            muon.step()
            adamw.step()
    return Traced(recorder.path, model, ask())


class SignDescent(Optimizer):
    """An optimizer that nothing is known about."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


def three_steps(model: nn.Module, optimizer: Optimizer, **options: Any) -> Traced:
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(3):

            def closure() -> torch.Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(FEATURES), LABELS)
                loss.backward()
                return loss

            closure()
            optimizer.step(closure if isinstance(optimizer, LBFGS) else None)
    return Traced(recorder.path, model, ask())


@OPTIMIZERS.row("SparseAdam")
def sparse_adam(**options: Any) -> Traced:
    torch.manual_seed(3)
    model = nn.EmbeddingBag(9, 3, mode="sum", sparse=True).double()
    optimizer = SparseAdam(model.parameters(), lr=0.05)
    tokens = torch.tensor([[0, 1], [2, 3], [4, 5]])
    with explaind.trace(model, optimizer, **options) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), LABELS[:3]).backward()
            optimizer.step()
    return Traced(recorder.path, model, ask(tokens[:2]))


@OPTIMIZERS.row("LBFGS", refused=TypeError)
def lbfgs(**options: Any) -> Traced:
    model = mlp()
    return three_steps(model, LBFGS(model.parameters()), **options)


@OPTIMIZERS.row("an optimizer without a rule", refused=UnknownUpdateRuleError)
def unknown(**options: Any) -> Traced:
    model = mlp()
    return three_steps(model, SignDescent(model.parameters(), lr=0.01), **options)
