"""Pairs of residues as token sequences, and a seeded split of them.

Residues ``0 … p-1`` are their own token ids. How a pair becomes tokens depends on what the model can see:

- the paper's model sees no positions, ``[a, ∘, b, =]`` with ``∘`` = ``p`` and ``=`` = ``p + 1``. Addition and
  multiplication commute, so ordered pairs would repeat the same example, and there are only those with ``a >= b``.
  ``a - b`` would be the same set of tokens as ``b - a``: for subtraction and division every residue has a second token,
  ``p + 2 + b``, by which the model knows the second operand.
- a model with positions (``positional=True``) reads all ordered pairs, ``[a, b, =]`` with ``=`` = ``p``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["ModularTask", "Split"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and validation examples, disjoint; every tensor is int64."""

    train_tokens: Tensor
    """Training inputs, ``[example, position]``."""
    train_labels: Tensor
    """Training targets, ``[example]``."""
    validation_tokens: Tensor
    """Validation inputs, ``[query, position]``."""
    validation_labels: Tensor
    """Validation targets, ``[query]``."""


@dataclass(frozen=True)
class ModularTask(ABC):
    """The task ``a ∘ b = c (mod modulus)`` on all pairs of operands.

    Raises:
        ValueError: If the modulus is smaller than 2.
    """

    symbol: ClassVar[str]
    """The operation ∘ as text."""
    commutes: ClassVar[bool]
    """Whether ``a ∘ b = b ∘ a``."""

    modulus: int
    """The modulus ``p``; also the number of residues."""
    positional: bool = False
    """Whether the model tells positions apart, and so reads ordered pairs ``[a, b, =]``."""

    def __post_init__(self) -> None:
        """Reject a modulus without two residues."""
        if self.modulus < 2:
            raise ValueError(f"modulus must be at least 2, got {self.modulus}.")

    @abstractmethod
    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``(a ∘ b) mod p``, elementwise."""

    @property
    def cycle(self) -> tuple[int, ...]:
        """The operands in the order of the cyclic group that they form.

        The k-th and the l-th combine to the (k + l)-th, or the (k − l)-th, of this list read as a circle; so a Fourier
        transform along it is one over the characters of the group.
        """
        return tuple(range(self.modulus))

    @property
    def equals(self) -> int:
        """Token id of ``=``, the position at which the model answers."""
        return self.modulus if self.positional else self.modulus + 1

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self.equals + 1 + self.modulus * self._second_has_tokens

    @property
    def num_pairs(self) -> int:
        """Number of pairs: ordered ones, or without regard to order if that is the same example."""
        operands = len(self.cycle)
        return operands * (operands + 1) // 2 if self._unordered else operands**2

    def pairs(self) -> tuple[Tensor, Tensor]:
        """Return every example in lexicographic order of ``(a, b)``.

        Returns:
            Tokens ``[num_pairs, position]`` and labels ``[num_pairs]``.
        """
        operands = torch.tensor(sorted(self.cycle))
        a, b = torch.cartesian_prod(operands, operands).unbind(dim=1)
        if self._unordered:
            a, b = a[a >= b], b[a >= b]
        return self.tokens(a, b), self.answer(a, b)

    def tokens(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the tokens ``[…, position]`` of pairs of operands ``[…]``."""
        equals = torch.full_like(a, self.equals)
        if self.positional:
            return torch.stack([a, b, equals], dim=-1)
        return torch.stack([a, torch.full_like(a, self.modulus), b + self._second_offset, equals], dim=-1)

    def table(self) -> tuple[Tensor, Tensor]:
        """Return all ordered pairs as a table whose axes are the operands in the order of :attr:`cycle`.

        Returns:
            Tokens ``[first, second, position]`` and the answers' places in the cycle ``[first, second]``.
        """
        operands = torch.tensor(self.cycle)
        a, b = torch.meshgrid(operands, operands, indexing="ij")
        return self.tokens(a, b), self.places(self.answer(a, b))

    def places(self, operands: Tensor) -> Tensor:
        """Return where in :attr:`cycle` these residues are: in a multiplicative task their discrete logarithms."""
        places = torch.full((self.modulus,), -1)
        places[torch.tensor(self.cycle)] = torch.arange(len(self.cycle))
        return places[operands]

    @property
    def expression(self) -> str:
        """What an example asks for, such as ``"a + b mod 7"``."""
        return f"a {self.symbol} b mod {self.modulus}"

    @property
    def order(self) -> str:
        """The order of :attr:`cycle` in words."""
        return "in ascending order"

    def place_name(self, residue: str) -> str:
        """What to call the place in :attr:`cycle` of something that is called ``residue``."""
        return residue

    def difference_name(self, one: str, other: str) -> str:
        """What to call the difference between the places of two residues."""
        return f"{one} − {other} mod {self.modulus}"

    def sort(self, tokens: Tensor) -> Tensor:
        """Return which examples ``[example]`` come one after the other if sorted by answer, then by ``a``.

        Both are in the order of :attr:`cycle`, in which answers that are neighbours in the group are neighbours.
        """
        a, b = self.operands(tokens)
        return (self.places(self.answer(a, b)) * self.modulus + self.places(a)).argsort()

    def operands(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``a`` and ``b`` of tokens ``[…, position]``."""
        return tokens[..., 0], tokens[..., -2] - self._second_offset

    def text(self, tokens: Tensor) -> str:
        """Return one example in words, such as ``"4 + 3"``."""
        a, b = self.operands(tokens)
        return f"{int(a)} {self.symbol} {int(b)}"

    def split(self, num_train: int, num_validation: int | None = None, *, seed: int = 0) -> Split:
        """Draw disjoint training and validation sets uniformly, without replacement.

        The same seed gives the same training set whatever ``num_validation`` is; the global generator is not touched.

        Args:
            num_train: Number of training pairs.
            num_validation: Number of validation pairs; ``None`` takes all the pairs that are left.
            seed: Seed of the draw.

        Returns:
            The two sets, each in the order drawn.

        Raises:
            ValueError: If either set would be empty or there are too few pairs.
        """
        left = self.num_pairs - num_train
        taken = left if num_validation is None else num_validation
        if num_train < 1 or taken < 1 or taken > left:
            kind = "unordered" if self._unordered else "ordered"
            raise ValueError(
                f"num_train and num_validation must be positive and add up to at most {self.num_pairs}, the number of "
                f"{kind} pairs modulo {self.modulus}; got num_train={num_train}, num_validation={num_validation}."
            )
        tokens, labels = self.pairs()
        order = torch.randperm(self.num_pairs, generator=torch.Generator().manual_seed(seed))
        train, validation = order[:num_train], order[num_train : num_train + taken]
        return Split(
            train_tokens=tokens[train],
            train_labels=labels[train],
            validation_tokens=tokens[validation],
            validation_labels=labels[validation],
        )

    @property
    def _unordered(self) -> bool:
        return self.commutes and not self.positional

    @property
    def _second_has_tokens(self) -> bool:
        return not self.commutes and not self.positional

    @property
    def _second_offset(self) -> int:
        return (self.equals + 1) * self._second_has_tokens
