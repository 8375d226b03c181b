"""⟨ψ, g_k⟩ from what one forward and backward pass of the batch brings to every layer (`explaind.path.uses`).

Parameters that the pass does not cover take part with gradients of single rows, by vmap. Which row is whose is not
taken on trust: in every call the rows of every parameter, added with random weights, must give what a second backward
pass of the batch gives for the same weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from explaind.errors import ExplaindError
from explaind.parameters import Parameter
from explaind.path.factors import Factors, Summed
from explaind.path.gradients import call_replay, replay_step
from explaind.path.slices import Slices, layer_of
from explaind.path.step import Step
from explaind.path.uses import ORDERS, Uses
from explaind.replay.call import Replay
from explaind.run import Run

__all__ = ["DistrustedError", "FactorProducts", "factor_products"]

_BLOCK_BYTES = 64 << 20


class DistrustedError(Exception):
    """A step's gradient was taken for the sum of its examples', and it is not."""


class FactorProducts:
    """Products layer by layer, each with the strategy of `explaind.path.factors` that is cheaper.

    Args:
        run: the run.
        covered: names of the parameters that the pass covers, as far as the samples tell.
        separate: whether rows can be evaluated alone, else only in their batch, as with dropout.
        dtype, device: type and place of the computation.
    """

    def __init__(
        self, run: Run, covered: Collection[str], *, separate: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._run, self._dtype, self._device = run, dtype, device
        self.separate = separate
        self.coupled = False
        """Whether there was a call some of whose rows depend on others."""
        rest = [name for name in run.table.names if name not in covered]
        self.name = f"factors, vmap for {', '.join(rest)}" if rest else "factors"
        self.precision = dtype

    def products(self, step: Step, number: int, rows: Tensor, psi: Tensor, slices: Slices) -> Tensor:
        """See `ExampleProducts.products`.

        Raises:
            DistrustedError: the rows of a step that is trusted do not add up to its gradient.
        """
        result = psi.new_zeros(len(psi), len(rows), len(slices), dtype=self._dtype)
        uses, rest = step.uses[number], list[Parameter]()
        for parameter in self._run.table:
            layer = layer_of(parameter, slices)
            if layer is None:
                continue
            vectors = psi[:, parameter.slice].to(self._dtype).reshape(len(psi), *parameter.shape)
            products = _products(uses, parameter.name, vectors, rows)
            if products is None:
                rest.append(parameter)
            else:
                result[:, :, layer] += products
        for block, parameter, gradients in self._alone(step, number, rows, rest):
            flat = psi[:, parameter.slice].to(self._dtype)
            result[:, block, layer_of(parameter, slices)] += flat @ gradients.reshape(-1, parameter.num_elements).T
        return result[:, :, None]

    def gradients(self, step: Step, number: int, rows: Tensor) -> list[Tensor]:
        """g_k of the given rows, in one block `[row, element]`."""
        result = torch.zeros(len(rows), self._run.table.num_elements, dtype=self._dtype, device=self._device)
        uses, rest = step.uses[number], list[Parameter]()
        for parameter in self._run.table:
            factors = uses.factors(parameter.name)
            if factors is None:
                rest.append(parameter)
            for part in factors or ():
                result[:, parameter.slice] += part.take(rows).gradients().reshape(-1, parameter.num_elements)
        for block, parameter, gradients in self._alone(step, number, rows, rest):
            result[block, parameter.slice] += gradients.reshape(-1, parameter.num_elements)
        return [result]

    def _alone(
        self, step: Step, number: int, rows: Tensor, parameters: Sequence[Parameter]
    ) -> Iterator[tuple[slice, Parameter, Tensor]]:
        """Gradients of single rows, in blocks `[row, *shape]`, by parameters that the pass does not cover."""
        if not parameters:
            return
        if step.is_trusted:
            raise DistrustedError
        call = self._run.calls(step.index)[number]
        replay = call_replay(self._run, step.index, call, dtype=self._dtype, device=self._device)
        names = [parameter.name for parameter in parameters]
        separate = self.separate and _are_separate(replay, step.uses[number], names)
        self.coupled |= self.separate and not separate
        first = 0
        for block in _blocks(replay, rows, names):
            tensors = replay.separate_rows(block, names) if separate else replay.batch_rows(block.tolist())
            for parameter in parameters:
                yield slice(first, first + len(block)), parameter, tensors[parameter.name]
            first += len(block)


def _products(uses: Uses, name: str, vectors: Tensor, rows: Tensor) -> Tensor | None:
    """⟨ψ, g_k⟩ of some rows by a parameter, `[query, row]`; None if it is not covered."""
    if len(rows) < uses.num_rows:
        factors = uses.factors(name)
        return None if factors is None else _sum_of_products([part.take(rows) for part in factors], vectors, len(rows))
    # Of all rows, the products themselves show whether they are right, which is cheaper.
    tried, weights = list[tuple[Tensor, Tensor, list[Factors]]](), uses.weights.abs()
    for order in ORDERS:
        factors = uses.split(name, uses.num_rows, order)
        if factors is not None:
            products = _sum_of_products(factors, vectors, uses.num_rows)
            error = uses.product_errors(name, vectors, products)
            if bool((error <= uses.same * (products.abs() @ weights)).all()):
                return products
            tried.append((error, products, factors))
    for error, products, factors in sorted(tried, key=lambda attempt: float(attempt[0].max())):
        sizes = _sum_of_products([part.absolute() for part in factors], vectors.abs(), uses.num_rows) @ weights
        if bool((error <= uses.same * (products.abs() @ weights) + uses.noise(sizes)).all()):
            return products
    return None


def _sum_of_products(factors: Sequence[Factors], vectors: Tensor, num_rows: int) -> Tensor:
    return sum((part.products(vectors) for part in factors), start=vectors.new_zeros(len(vectors), num_rows))


def factor_products(run: Run, *, dtype: torch.dtype, device: torch.device) -> FactorProducts | None:
    """The strategy, if in one call of every kind and mode it gives the part of the gradient that enters at each row."""
    rest, samples, separate = set[str](), list[tuple[Replay, Uses]](), True
    for step, number in run.call_samples():
        call = run.calls(step)[number]
        (uses,) = replay_step(run, step, dtype=torch.float64, calls=[call], device=device, watched=True).uses
        replay = call_replay(run, step, call, dtype=torch.float64, device=device)
        samples.append((replay, uses))
        separate = separate and not replay.draws_random_numbers() and not replay.couples_rows()
        rest |= {name for name in run.table.names if uses.factors(name) is None}
    if rest and not (separate and all(_are_separate(replay, uses, rest) for replay, uses in samples)):
        return None
    covered = [name for name in run.table.names if name not in rest]
    return FactorProducts(run, covered, separate=separate, dtype=dtype, device=device)


def _are_separate(replay: Replay, uses: Uses, names: Collection[str]) -> bool:
    """Whether the rows' gradients by some parameters, each row on its own, are those of the batch; by vmap."""
    totals: dict[str, Tensor | float] = dict.fromkeys(names, 0.0)
    try:
        for rows in _blocks(replay, torch.arange(replay.num_rows), names):
            for name, gradients in replay.separate_rows(rows, names).items():
                totals[name] = totals[name] + Summed(gradients).combined(uses.weights[rows])
    except ExplaindError:
        raise
    except (RuntimeError, ValueError):  # how vmap and batch layers say that a row cannot be evaluated alone
        return False
    return all(isinstance(total, Tensor) and uses.agrees(name, [total]) for name, total in totals.items())


def _blocks(replay: Replay, rows: Tensor, names: Collection[str]) -> Sequence[Tensor]:
    """The rows in blocks whose gradients by some parameters fit in memory."""
    size = sum(replay.params[name].nbytes for name in names)
    return list(rows.split(max(1, _BLOCK_BYTES // max(1, size))))
