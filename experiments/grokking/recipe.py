"""What fixes a run, as frozen values: task, model, optimizer and when to stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .model import ModularTransformer
from .positional import PositionalTransformer
from .task import ModularTask, Split, make_task

__all__ = ["Recipe", "StopRule"]

_STORED_STEPS = 5000
"""A run of at most so many steps is stored step by step; of a longer one most are made again when they are needed."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """Stop once both accuracies have been high for some steps in a row.

    Examples:
        >>> rule = StopRule(train_accuracy=1.0, validation_accuracy=0.95, patience=2)
        >>> rule.met([(1.0, 0.96)]), rule.met([(1.0, 0.9), (1.0, 0.95), (1.0, 0.97)])
        (False, True)
    """

    train_accuracy: float
    """Least training accuracy, in 0…1."""
    validation_accuracy: float
    """Least validation accuracy, in 0…1."""
    patience: int = 1
    """How many steps in a row must reach both."""

    def met(self, history: list[tuple[float, float]]) -> bool:
        """Say whether training ends here.

        Args:
            history: One ``(train accuracy, validation accuracy)`` per step so far.

        Returns:
            Whether the last ``patience`` entries all reach both accuracies.
        """
        last = history[-self.patience :]
        return len(last) == self.patience and all(
            train >= self.train_accuracy and validation >= self.validation_accuracy for train, validation in last
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run: task, model, AdamW on the full batch, and when to stop.

    One step is one epoch: the whole training set, reshuffled, as a single batch. The loss is the mean negative
    log-likelihood in nats.
    """

    operation: str = "addition"
    """Name of the task in :data:`~experiments.grokking.task.TASKS`."""
    modulus: int
    """The modulus p of the task."""
    positional: bool = False
    """Whether the model is the one with positions, on ordered pairs, instead of the paper's."""
    num_train: int
    """Number of training pairs."""
    num_validation: int | None
    """Number of validation pairs; ``None`` takes all that are left."""
    width: int
    """Width of the embedding and of the residual stream."""
    heads: int
    """Number of attention heads."""
    hidden: int
    """Width of the MLP."""
    init_scale: float = 1.0
    """Factor on every initial value."""
    embedding_scale: float = 1.0
    """Further factor on the initial embedding."""
    unused_positions: int = 0
    """Rows of the positional embedding that the model holds and never reads."""
    learning_rate: float
    """AdamW's ``lr``, constant."""
    betas: tuple[float, float]
    """AdamW's ``betas``."""
    eps: float = 1e-8
    """AdamW's ``eps``."""
    weight_decay: float
    """AdamW's decoupled ``weight_decay``; a step shrinks the weights by ``learning_rate * weight_decay``."""
    max_steps: int
    """Training ends after this many steps at the latest."""
    stop: StopRule
    """Training ends when this rule is met."""
    seed: int = 0
    """Seed of the split, of the initial weights and of the shuffling."""

    @property
    def task(self) -> ModularTask:
        """The task.

        Raises:
            ValueError: If there is none of that name, or the modulus does not suit it.
        """
        return make_task(self.operation, self.modulus, positional=self.positional)

    @property
    def architecture(self) -> str:
        """Which of the two models it is, in words."""
        return "positional" if self.positional else "position-free"

    @property
    def snapshot_every(self) -> int:
        """Every so many steps the weights are stored, so that a long run takes gigabytes and not tens of them."""
        return 1 if self.max_steps <= _STORED_STEPS else 50

    def make_split(self) -> Split:
        """Return the seeded training and validation sets."""
        return self.task.split(self.num_train, self.num_validation, seed=self.seed)

    def make_model(self) -> ModularTransformer | PositionalTransformer:
        """Return the seeded model at step 0; the global random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.positional:
                return PositionalTransformer(
                    self.task.vocabulary,
                    self.width,
                    heads=self.heads,
                    hidden=self.hidden,
                    init_scale=self.init_scale,
                    embedding_scale=self.embedding_scale,
                )
            return ModularTransformer(
                self.task.vocabulary,
                self.width,
                heads=self.heads,
                hidden=self.hidden,
                init_scale=self.init_scale,
                embedding_scale=self.embedding_scale,
                unused_positions=self.unused_positions,
            )

    def make_optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """Return AdamW over all parameters of the model."""
        return torch.optim.AdamW(
            model.parameters(),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )
