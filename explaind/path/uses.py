"""Every use of a parameter in a forward pass, found in its autograd graph, and what the backward pass brings there.

The graph is complete: a parameter's gradient is the sum of what arrives over the edges into its leaf. Where an edge
comes from an operation that treats the rows of the batch alike, the rows' own gradients depend on the input that it
saved and on the gradient δ at its output only (`explaind.path.factors`). Parameters with any other edge are not
covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from explaind.path.factors import Factors
from explaind.path.operations import OPERATIONS, Make, NotByRowError, Operation, matrix

__all__ = ["ORDERS", "SAME_ROW", "Order", "Uses"]

SAME_ROW = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference of combined rows from what autograd gives, relative to the norm."""
_NOISE = 64
"""Rounding of numbers that cancel, in units of their size."""
_TRUSTED_UNITS = 16
"""Largest difference of the rows' sum from a gradient that is known, in units of the sum's absolute parts."""

Order = Literal["first", "last"]
"""Whether the rows of the batch come before or after the positions within a row, such as tokens."""
ORDERS: tuple[Order, ...] = get_args(Order)


class Uses:
    """Watches the backward pass that starts at some outputs.

    Args:
        outputs: where it starts.
        leaves: the parameters, leaves of the graph, by name.
        row_weights: powers of two that the rows' cotangents have been multiplied with, to be divided out, `[row]`.
    """

    def __init__(
        self, outputs: Sequence[Tensor], leaves: Mapping[str, Tensor], *, row_weights: Tensor | None = None
    ) -> None:
        self._row_weights = row_weights
        self._outputs, self._leaves = outputs, leaves
        self._watched = list[tuple[Any, list[tuple[str, Operation, bool]]]]()
        self._names = {id(leaf): name for name, leaf in leaves.items()}
        self._shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        self._brought: dict[str, list[Make]] = {}
        self.uncovered = {self._names[id(output)] for output in outputs if id(output) in self._names}
        """Parameters whose gradients come, at least in part, from operations that are not known here."""
        self._watch([output.grad_fn for output in outputs if output.grad_fn is not None])

    def backward(self, cotangents: Sequence[Tensor | None], *, leaves: bool = False) -> None:
        """Make the backward pass, once.

        Args:
            cotangents: where it starts, one for each output.
            leaves: give the leaves their gradients too, as `torch.autograd.backward` does; it takes half as long again.
        """
        wanted = list(self._leaves.values()) if leaves else []
        inputs: list[Any] = [*(GradientEdge(node, 0) for node, _ in self._watched), *wanted]
        gradients: tuple[Tensor | None, ...] = ()
        if inputs:  # and the graph is kept until the end, as the operations look at what was saved for it
            gradients = torch.autograd.grad(self._outputs, inputs, cotangents, retain_graph=True, allow_unused=True)
        for leaf, gradient in zip(wanted, gradients[len(self._watched) :], strict=True):
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        with torch.no_grad():
            for (node, known), delta in zip(self._watched, gradients, strict=False):
                if delta is not None:
                    self._bring(node, known, delta)
        self._outputs, self._watched = (), []  # else the graph would be kept in memory

    def expect(self, weights: Tensor, combined: Mapping[str, Tensor | None]) -> None:
        """Say what the backward pass must bring.

        Args:
            weights: a random number w_k for every row of the batch, `[row]`.
            combined: Σ_k w_k g_k by every parameter, by autograd; None where it was not used.
        """
        self.weights = weights
        self._combined = {name: None if total is None else total.detach() for name, total in combined.items()}
        norms = [total.norm() for total in self._combined.values() if total is not None]
        self._size = float(torch.stack(norms).norm()) if norms else 0.0

    def factors(self, name: str) -> list[Factors] | None:
        """After the backward pass: the gradients of a parameter's rows, one entry for each use; None if not covered.

        The rows may lie first or last. Either is taken only if the rows, combined with the expected weights, give
        what autograd gave: if a single row got what is another's, they do not.
        """
        order = self.order(name)
        return None if order is None else self.split(name, self.num_rows, order)

    def order(self, name: str) -> Order | None:
        """Where the rows lie; None if not covered."""
        tried = list[tuple[float, Order, list[Factors]]]()
        total = self._combined[name]
        size = 0.0 if total is None else float(total.norm())
        for order in ORDERS:
            factors = self.split(name, self.num_rows, order)
            if factors is not None:
                error = self._error(name, [part.combined(self.weights) for part in factors])
                if error <= self.same * size:
                    return order
                tried.append((error, order, factors))
        # What is left of numbers that cancel is their rounding, whose size only they themselves tell.
        for error, order, factors in sorted(tried, key=lambda attempt: attempt[0]):
            sizes = [part.absolute().combined(self.weights.abs()) for part in factors]
            if error <= self.same * size + self.noise(sum(float(part.norm()) for part in sizes)):
                return order
        return None

    def split(self, name: str, num_rows: int, order: Order) -> list[Factors] | None:
        """What is brought to the rows if they lie in this order; None if they cannot."""
        if name in self.uncovered:
            return None
        try:
            parts = [make(partial(_by_row, num_rows=num_rows, order=order)) for make in self._brought.get(name, ())]
        except NotByRowError:
            return None
        return parts if self._row_weights is None else [part.scaled(1 / self._row_weights) for part in parts]

    def product_errors(self, name: str, vectors: Tensor, products: Tensor) -> Tensor:
        """|Σ_k w_k ⟨ψ, g_k⟩ − ⟨ψ, Σ_k w_k g_k⟩| `[query]`, for vectors `[query, *shape]`, products `[query, row]`."""
        total, found = self._combined[name], products @ self.weights
        return (found if total is None else found - vectors.reshape(len(vectors), -1) @ total.flatten()).abs()

    def noise(self, size: Any) -> Any:
        """Rounding of sums of numbers of this size together; what is to be trusted must do without."""
        units = _NOISE if self._row_weights is None else 0
        return units * torch.finfo(self.weights.dtype).eps * size

    @property
    def same(self) -> float:
        """Largest relative difference that is none."""
        unit = torch.finfo(self.weights.dtype).eps
        return SAME_ROW[self.weights.dtype] if self._row_weights is None else _TRUSTED_UNITS * unit

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return len(self.weights)

    def agrees(self, name: str, parts: Sequence[Tensor]) -> bool:
        """Whether Σ_k w_k g_k is the sum of some parts, up to the rounding of the gradients of all parameters."""
        total = self._combined[name]
        return self._error(name, parts) <= (
            0.0 if total is None else self.same * float(total.norm()) + self.noise(self._size)
        )

    def _error(self, name: str, parts: Sequence[Tensor]) -> float:
        """‖Σ_k w_k g_k − Σ parts‖."""
        total = self._combined[name]
        target = torch.zeros(()) if total is None else total.reshape(self._shapes[name])
        return float((sum(parts, start=torch.zeros_like(target)) - target).norm())

    def _watch(self, roots: list[Any]) -> None:
        seen, waiting = set(roots), list(roots)
        while waiting:
            node = waiting.pop()
            known: list[tuple[str, Operation, bool]] = []
            for edge, (child, _) in enumerate(node.next_functions):
                if child is None:
                    continue
                leaf, transposed = _leaf_behind(child)
                if leaf is None and child not in seen:
                    seen.add(child)
                    waiting.append(child)
                elif (name := self._names.get(id(leaf))) is not None:
                    operation = OPERATIONS.get((node.name(), edge))
                    if operation is None or (transposed and operation is not matrix):
                        self.uncovered.add(name)
                    else:
                        known.append((name, operation, transposed))
            if known:
                self._watched.append((node, known))

    def _bring(self, node: Any, known: list[tuple[str, Operation, bool]], delta: Tensor) -> None:
        for name, operation, transposed in known:
            try:
                if delta.is_complex():
                    raise NotByRowError("complex numbers")
                make = operation(node, delta, self._shapes[name], transposed)
                self._brought.setdefault(name, []).append(make)
            except NotByRowError:
                self.uncovered.add(name)


def _leaf_behind(node: Any) -> tuple[Tensor | None, bool]:
    """The leaf that an edge leads to, directly or through the transposition of a matrix, and whether through one."""
    leaf = getattr(node, "variable", None)
    if leaf is None and _transposes(node):
        behind = getattr(node.next_functions[0][0], "variable", None)
        return (behind, True) if behind is not None and behind.ndim == 2 else (None, False)
    return leaf, False


def _transposes(node: Any) -> bool:
    """Whether a node, if it got a matrix, has transposed it."""
    if node.name() == "TransposeBackward0":
        return bool((node._saved_dim0 - node._saved_dim1) % 2)  # negative dimensions are saved modulo a power of two
    return node.name() == "TBackward0" or bool(node.name() == "PermuteBackward0" and node._saved_dims == (1, 0))


def _by_row(tensor: Tensor, num_rows: int, order: Order) -> Tensor:
    """A tensor with rows and positions in one axis, or in two, as `[row, position, …]`."""
    if order == "last" and tensor.ndim > 2 and tensor.shape[1] == num_rows:
        return tensor.transpose(0, 1)
    if not tensor.ndim or tensor.shape[0] % num_rows:
        raise NotByRowError(f"a tensor of shape {tuple(tensor.shape)} does not hold {num_rows} rows")
    positions = tensor.shape[0] // num_rows
    if order == "first":
        return tensor.reshape(num_rows, positions, *tensor.shape[1:])
    return tensor.reshape(positions, num_rows, *tensor.shape[1:]).transpose(0, 1)
