"""⟨ψ, g_k⟩ from what one forward and backward pass of the batch brings to every layer (`explaind.path.uses`).

Parameters that the pass does not cover take part with gradients of single rows, by vmap. Which row is whose is not
taken on trust: where the rows lie in each operation is found by comparison with rows that are evaluated alone, and in
every call one row, drawn at random, is compared again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from explaind.errors import ExplaindError, VerificationError
from explaind.parameters import Parameter
from explaind.path.factors import Factors, Summed
from explaind.path.gradients import call_replay, replay_step
from explaind.path.slices import Slices, layer_of
from explaind.path.step import Step
from explaind.path.uses import SAME_ROW, Order, Uses
from explaind.replay.call import Replay
from explaind.run import Run

__all__ = ["FactorProducts", "factor_products"]

_NUM_PROBES = 4
_BLOCK_BYTES = 64 << 20


class FactorProducts:
    """Products layer by layer, each with the strategy of `explaind.path.factors` that is cheaper.

    Args:
        run: the run.
        orders: where the rows lie, for every parameter that the pass covers.
        separate: whether rows can be evaluated alone, else only in their batch, as with dropout.
        dtype, device: type and place of the computation.
    """

    def __init__(
        self, run: Run, orders: Mapping[str, Order], *, separate: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._run, self._orders, self._dtype, self._device = run, orders, dtype, device
        self.separate = separate
        rest = [name for name in run.table.names if name not in orders]
        self.name = f"factors, vmap for {', '.join(rest)}" if rest else "factors"
        self.precision = dtype

    def products(self, step: Step, number: int, rows: Tensor, psi: Tensor, slices: Slices) -> Tensor:
        """See `ExampleProducts.products`."""
        result = psi.new_zeros(len(psi), len(rows), len(slices), dtype=self._dtype)
        for block, parameter, parts in self._parts(step, number, rows):
            layer = layer_of(parameter, slices)
            if layer is None:
                continue
            vectors = psi[:, parameter.slice].to(self._dtype).reshape(len(psi), *parameter.shape)
            for part in parts:
                result[:, block, layer] += part.products(vectors)
        return result[:, :, None]

    def gradients(self, step: Step, number: int, rows: Tensor) -> list[Tensor]:
        """g_k of the given rows, in one block `[row, element]`."""
        result = torch.zeros(len(rows), self._run.table.num_elements, dtype=self._dtype, device=self._device)
        for block, parameter, parts in self._parts(step, number, rows):
            for part in parts:
                result[block, parameter.slice] += part.gradients().reshape(-1, parameter.num_elements)
        return [result]

    def _parts(self, step: Step, number: int, rows: Tensor) -> Iterator[tuple[slice, Parameter, Sequence[Factors]]]:
        """For blocks of the rows, a parameter and its uses' factors, until every row has all parameters."""
        call = self._run.calls(step.index)[number]
        replay = call_replay(self._run, step.index, call, dtype=self._dtype, device=self._device)
        uses, rest, every = step.uses[number], list[Parameter](), len(rows) == replay.num_rows
        self._check_row(step, number, replay, uses)
        for parameter in self._run.table:
            factors = uses.factors(parameter.name, replay.num_rows, self._orders.get(parameter.name))
            if factors is None:
                rest.append(parameter)
            else:
                yield slice(None), parameter, factors if every else [part.take(rows) for part in factors]
        if rest:
            yield from self._alone(replay, rows, rest)

    def _alone(
        self, replay: Replay, rows: Tensor, parameters: Sequence[Parameter]
    ) -> Iterator[tuple[slice, Parameter, Sequence[Factors]]]:
        """Gradients of single rows, in blocks, for parameters that the pass does not cover."""
        names = [parameter.name for parameter in parameters]
        size = sum(parameter.num_elements for parameter in parameters) * self._dtype.itemsize
        first = 0
        for block in rows.split(max(1, _BLOCK_BYTES // size)):
            tensors = replay.separate_rows(block, names) if self.separate else replay.batch_rows(block.tolist())
            for parameter in parameters:
                yield slice(first, first + len(block)), parameter, [Summed(tensors[parameter.name])]
            first += len(block)

    def _check_row(self, step: Step, number: int, replay: Replay, uses: Uses) -> None:
        """A row drawn at random must have the gradient that it has when evaluated alone.

        Raises:
            VerificationError: it does not.
        """
        row = int(np.random.default_rng((step.index, number)).integers(replay.num_rows))
        if self._difference(replay, uses, row) <= SAME_ROW[self._dtype]:
            return
        # Gradients of nearly fitted examples are rounded coarsely in float32: only float64 can tell.
        call = self._run.calls(step.index)[number]
        exact = call_replay(self._run, step.index, call, dtype=torch.float64, device=self._device)
        (uses,) = replay_step(
            self._run, step.index, dtype=torch.float64, calls=[call], device=self._device, watched=True
        ).uses
        difference = self._difference(exact, uses, row)
        if not difference <= SAME_ROW[torch.float64]:
            raise VerificationError(
                f"row {row} of forward call {number} of step {step.index} has another gradient in its batch than "
                f"alone: they differ by {difference:.1e} of its norm. The model couples or reorders its batch in some "
                "calls only, and not in the largest one, or it is not the model that was recorded; run.verify() tells "
                "which. Without 'example' in by, the steps and layers still add up."
            )

    def _difference(self, replay: Replay, uses: Uses, row: int) -> float:
        """Of a row's gradient in its batch and alone, relative to its norm."""
        alone = _row_alone(replay, row, separate=self.separate)
        own = {name: uses.row(name, row, replay.num_rows, self._orders.get(name)) for name in alone}
        covered = {name: gradient for name, gradient in own.items() if gradient is not None}
        return _distance(covered, {name: alone[name] for name in covered})


def factor_products(run: Run, *, dtype: torch.dtype, device: torch.device) -> FactorProducts | None:
    """The strategy, if in one call of every kind and mode it gives the part of the gradient that enters at each row."""
    orders: dict[str, list[Order]] = {name: list(get_args(Order)) for name in run.table.names}
    replays, separate = list[Replay](), True
    for step, number in run.call_samples():
        call = run.calls(step)[number]
        replay = call_replay(run, step, call, dtype=torch.float64, device=device)
        replays.append(replay)
        rows = np.random.default_rng(step).permutation(replay.num_rows)[:_NUM_PROBES].tolist()
        entering = [_row_alone(replay, row, separate=False) for row in rows]
        separate = separate and _are_separate(replay, dict(zip(rows, entering, strict=True)))
        (uses,) = replay_step(run, step, dtype=torch.float64, calls=[call], device=device, watched=True).uses
        for row, gradients in zip(rows, entering, strict=True):
            for name, expected in gradients.items():
                fitting = uses.orders(name, row, replay.num_rows, expected)
                orders[name] = [order for order in orders[name] if order in fitting]
    covered = {name: left[0] for name, left in orders.items() if left}
    rest = orders.keys() - covered.keys()
    if rest and not (separate and all(_vectorizes(replay, rest) for replay in replays)):
        return None
    return FactorProducts(run, covered, separate=separate, dtype=dtype, device=device)


def _row_alone(replay: Replay, row: int, *, separate: bool) -> dict[str, Tensor]:
    """g_k of a row: by a batch of its own if rows are separate, else as far as it enters at the row's output."""
    if separate:
        return replay.single_row(row)
    return {name: gradient[0] for name, gradient in replay.batch_rows([row]).items()}


def _are_separate(replay: Replay, entering: Mapping[int, Mapping[str, Tensor]]) -> bool:
    """Whether a batch of a single row does with it what the recorded batch does."""
    if replay.draws_random_numbers():
        return False
    for row, gradients in entering.items():
        alone = _attempt(partial(replay.single_row, row))
        if alone is None or _distance(alone, gradients) > SAME_ROW[torch.float64]:
            return False
    return True


def _distance(gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """‖g − g'‖ / ‖g'‖ over all parameters together."""
    error = sum(float((gradients[name] - own).square().sum()) for name, own in expected.items())
    size = sum(float(own.square().sum()) for own in expected.values())
    return math.sqrt(error / size) if size else math.sqrt(error)


def _vectorizes(replay: Replay, names: Collection[str]) -> bool:
    """Whether single rows' gradients by these parameters can be computed by vmap."""
    return _attempt(lambda: replay.separate_rows(torch.tensor([0]), names)) is not None


def _attempt(evaluate: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor] | None:
    try:
        return evaluate()
    except ExplaindError:
        raise
    except (RuntimeError, ValueError):  # how vmap and batch layers say that a row cannot be evaluated alone
        return None
