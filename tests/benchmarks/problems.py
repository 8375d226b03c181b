"""The networks that are trained and explained, and their loops, which can be stepped one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import explaind
from examples.digits_resnet import load_digits, make_model
from experiments.grokking.recipes import Recipe
from tests.benchmarks.sizes import Size

__all__ = [
    "Loop",
    "Problem",
    "digits",
    "digits_mlp",
    "modular_addition",
    "modular_addition_gelu",
    "modular_addition_last_position",
]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A network, its data, and how it is trained."""

    name: str
    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], Optimizer]
    loss: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    """Training inputs, `[example, …]`."""
    labels: Tensor
    """Their classes, `[example]`."""
    batch_size: int
    query_inputs: Tensor
    """Inputs of predictions to explain, `[query, …]`."""
    query_labels: Tensor
    """Their right classes, `[query]`."""
    error_per_step: float
    """Quadrature error that is allowed, in nats for each step and query; what comes out is several times smaller."""

    def query(self, number: int) -> explaind.Query:
        """The log-probabilities of the right answers of the first so many inputs, or of all if there are fewer."""
        return explaind.Query(self.query_inputs[:number], output=explaind.outputs.log_prob(self.query_labels[:number]))


class Loop:
    """A training loop; each step is zero_grad, forward, loss, backward and the optimizer's step."""

    def __init__(self, problem: Problem) -> None:
        torch.manual_seed(0)
        self.problem = problem
        self.model = problem.make_model()
        self.optimizer = problem.make_optimizer(self.model)
        self._order = torch.Generator().manual_seed(0)

    def train(self, num_steps: int, recorder: explaind.Recorder | None = None) -> None:
        """Several steps."""
        for _ in range(num_steps):
            self.step(recorder)

    def step(self, recorder: explaind.Recorder | None = None) -> None:
        """Train on the next batch, drawn without replacement."""
        problem = self.problem
        rows = torch.randperm(len(problem.inputs), generator=self._order)[: problem.batch_size]
        if recorder is not None:
            recorder.examples(rows)
        self.optimizer.zero_grad()
        problem.loss(self.model(problem.inputs[rows]), problem.labels[rows]).backward()
        self.optimizer.step()


def modular_addition(size: Size) -> Problem:
    """The grokking transformer as the paper trains it, on its full batch: every position is carried to the end."""
    return _addition(f"MOD-{size.recipe.modulus}", size, lambda: PublishedTransformer(size.recipe, torch.relu))


def modular_addition_last_position(size: Size) -> Problem:
    """The same function as the grokking study here computes it: nothing but the last position beyond the attention."""
    return _addition(f"MOD-{size.recipe.modulus}, last position only", size, size.recipe.make_model)


def modular_addition_gelu(size: Size) -> Problem:
    """The paper's transformer with a smooth activation."""
    return _addition(f"MOD-{size.recipe.modulus} with GELU", size, lambda: PublishedTransformer(size.recipe, F.gelu))


def _addition(name: str, size: Size, make_model: Callable[[], nn.Module]) -> Problem:
    recipe, split = size.recipe, size.recipe.make_split()
    return Problem(
        name=name,
        make_model=make_model,
        make_optimizer=recipe.make_optimizer,
        loss=F.nll_loss,
        inputs=split.train_tokens,
        labels=split.train_labels,
        batch_size=recipe.num_train,
        query_inputs=split.validation_tokens,
        query_labels=split.validation_labels,
        error_per_step=4.7e-6,  # a ten-thousandth of the path of a whole run, 41 nats in 875 steps; others are longer
    )


class PublishedTransformer(nn.Module):
    """The recipe's transformer with attention from, and an MLP at, all positions, whose last one is read."""

    def __init__(self, recipe: Recipe, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.activation = recipe.make_model(), activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[example, position]` to log-probabilities `[example, vocabulary]`."""
        net = self.net
        embedded = net.embedding(tokens) * math.sqrt(net.embedding.embedding_dim)
        values = net.attention_encoders(embedded).unflatten(-1, (net.heads, -1))
        scores = torch.einsum("eshc,ethc->ehst", values, values) / math.sqrt(values.shape[-1])
        attended = torch.einsum("ehst,ethc->eshc", scores.softmax(dim=-1), values).flatten(start_dim=2)
        residual = net.attention_decoders(attended)
        update = self.activation(net.linear2(self.activation(net.linear1(residual))))
        logits: Tensor = net.decoder(residual + update)[:, -1]
        return logits.log_softmax(dim=-1)


def digits(size: Size, *, full_batch: bool = False) -> Problem:
    """ResNet-9 without normalisation on scikit-learn's digits, in small batches or in one."""
    data = load_digits(size.num_digits, seed=0)
    return Problem(
        name="digits CNN, full batch" if full_batch else "digits CNN",
        make_model=lambda: make_model(size.width, norm=False),
        make_optimizer=lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4),
        loss=F.cross_entropy,
        inputs=data.train_images,
        labels=data.train_labels,
        batch_size=len(data.train_images) if full_batch else size.digits_batch,
        query_inputs=data.test_images,
        query_labels=data.test_labels,
        error_per_step=1e-4,
    )


def digits_mlp(size: Size) -> Problem:
    """A network of three layers with ReLU on the same digits, trained with AdamW."""
    return replace(
        digits(size),
        name="digits MLP",
        make_model=partial(_mlp, 16 * size.width),
        make_optimizer=lambda model: AdamW(model.parameters(), lr=2e-3, weight_decay=0.1),
    )


def _mlp(width: int) -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)]
    return nn.Sequential(*layers)
