"""Arithmetic modulo p: the four operations and the cyclic groups behind them.

Multiplication and division are those of the ``p - 1`` residues without zero, which are a group: there every operand has
an inverse and a discrete logarithm, and all answers are about equally frequent. With zero, one class would have twice
the examples of any other and be known from a single operand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pairs import ModularTask, Split

__all__ = [
    "TASKS",
    "ModularAddition",
    "ModularDivision",
    "ModularMultiplication",
    "ModularSubtraction",
    "ModularTask",
    "Split",
    "make_task",
    "primitive_root",
]


class ModularAddition(ModularTask):
    """The task ``a + b``, in the paper on the ``p (p + 1) / 2`` unordered pairs.

    Examples:
        >>> task = ModularAddition(5)
        >>> tokens, labels = task.pairs()
        >>> task.num_pairs, tokens[-1].tolist(), labels[-1].item(), task.text(tokens[-1])
        (15, [4, 5, 4, 6], 3, '4 + 4')
    """

    symbol, commutes = "+", True

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``(a + b) mod p``, elementwise."""
        return (a + b) % self.modulus


class ModularSubtraction(ModularTask):
    """The task ``a - b``.

    Examples:
        >>> task = ModularSubtraction(5)
        >>> tokens, labels = task.pairs()
        >>> task.num_pairs, tokens[2].tolist(), labels[2].item(), task.text(tokens[2])
        (25, [0, 5, 9, 6], 3, '0 − 2')
    """

    symbol, commutes = "−", False

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``(a - b) mod p``, elementwise."""
        return (a - b) % self.modulus


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


class _WithoutZero(ModularTask):
    """An operation of the multiplicative group.

    Raises:
        ValueError: If the modulus is no odd prime.
    """

    def __post_init__(self) -> None:
        """Reject a modulus whose residues are no cyclic group."""
        super().__post_init__()
        primitive_root(self.modulus)

    @property
    def cycle(self) -> tuple[int, ...]:
        """The residues 1, g, g², … for a primitive root g: their places are their discrete logarithms."""
        root = primitive_root(self.modulus)
        return tuple(pow(root, power, self.modulus) for power in range(self.modulus - 1))

    @property
    def order(self) -> str:
        """The order of :attr:`cycle` in words."""
        root = primitive_root(self.modulus)
        return f"in the order {root}⁰, {root}¹, {root}², …"

    def place_name(self, residue: str) -> str:
        """What to call the discrete logarithm of something that is called ``residue``."""
        return f"{self._log}({residue})"

    def difference_name(self, one: str, other: str) -> str:
        """What to call the difference of two discrete logarithms: the logarithm of the ratio."""
        return f"{self._log}({one} / {other}) mod {self.modulus - 1}"

    @property
    def _log(self) -> str:
        return "log" + str(primitive_root(self.modulus)).translate(_SUBSCRIPTS)


class ModularMultiplication(_WithoutZero):
    """The task ``a · b`` without zero.

    Examples:
        >>> task = ModularMultiplication(5)
        >>> tokens, labels = task.pairs()
        >>> task.num_pairs, tokens[-1].tolist(), labels[-1].item(), task.cycle
        (10, [4, 5, 4, 6], 1, (1, 2, 4, 3))
        >>> task.expression, task.order, task.difference_name("c", "c'")
        ('a · b mod 5', 'in the order 2⁰, 2¹, 2², …', "log₂(c / c') mod 4")
    """

    symbol, commutes = "·", True

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``(a · b) mod p``, elementwise."""
        return (a * b) % self.modulus


class ModularDivision(_WithoutZero):
    """The task ``a / b``, which is ``a`` times the inverse of ``b``, without zero.

    Examples:
        >>> task = ModularDivision(5, positional=True)
        >>> tokens, labels = task.pairs()
        >>> task.num_pairs, tokens[1].tolist(), labels[1].item(), task.text(tokens[1])
        (16, [1, 2, 5], 3, '1 / 2')
    """

    symbol, commutes = "/", False

    def answer(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``a b⁻¹ mod p``, elementwise."""
        inverses = torch.tensor([0, *(pow(residue, -1, self.modulus) for residue in range(1, self.modulus))])
        return (a * inverses[b]) % self.modulus


TASKS: dict[str, type[ModularTask]] = {
    "addition": ModularAddition,
    "subtraction": ModularSubtraction,
    "multiplication": ModularMultiplication,
    "division": ModularDivision,
}
"""The tasks by name."""


def make_task(operation: str, modulus: int, *, positional: bool = False) -> ModularTask:
    """Return the task of this name.

    Raises:
        ValueError: If there is none, or the modulus does not suit it.
    """
    if operation not in TASKS:
        raise ValueError(f"there is no task {operation!r}; the tasks are {', '.join(TASKS)}.")
    return TASKS[operation](modulus, positional)


def primitive_root(modulus: int) -> int:
    """Return the smallest residue whose powers are all residues but zero.

    Raises:
        ValueError: If the modulus is no odd prime.

    Examples:
        >>> primitive_root(7), primitive_root(31), primitive_root(113)
        (3, 3, 3)
    """
    for root in range(2, modulus):
        if len({pow(root, power, modulus) for power in range(modulus - 1)} - {0}) == modulus - 1:
            return root
    raise ValueError(f"multiplication and division need a modulus that is an odd prime, got {modulus}.")
