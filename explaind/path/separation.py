"""Whether a query's inputs can be evaluated one by one, what each then takes in memory, and where its rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from explaind.errors import ExplaindError
from explaind.path.footprint import made_bytes
from explaind.path.gradients import combined_rows
from explaind.path.inputs import QueryInputs
from explaind.path.uses import Order, Uses

__all__ = ["input_bytes", "row_orders"]

_NUM_PROBES = 4
_CANNOT = (RuntimeError, ValueError)
"""How vmap, batch layers and models that shape their output by the batch say that a row cannot be evaluated alone."""


def input_bytes(inputs: QueryInputs, params: Tensor) -> int | None:
    """What one more input adds to the activations; None if a few cannot be evaluated without the others.

    Args:
        inputs: the inputs.
        params: θ, float64 `[element]`.
    """
    few = torch.arange(min(inputs.number, 2), device=params.device)
    try:
        made = [made_bytes(partial(inputs.scalars, params, rows)) for rows in (few[:1], few)]
    except ExplaindError:
        raise
    except _CANNOT:
        return None
    return max(1, made[1] - made[0] if len(few) > 1 else made[0])


def row_orders(
    inputs: QueryInputs, params: Tensor, scalars: Tensor, blocks: Sequence[Tensor]
) -> dict[str, Order] | None:
    """Where the inputs' rows lie in the operations by which parameters are used.

    Args:
        inputs: the inputs.
        params: θ, float64 `[element]`.
        scalars: what they give there, `[input]`.
        blocks: the inputs that are evaluated together, `[row]` each.

    Returns:
        An order by the name of every parameter that the rows' gradients have one for; None if single inputs do not give
        what they give together with others.
    """
    generator = torch.Generator().manual_seed(0)
    probes = torch.randperm(len(scalars), generator=generator)[:_NUM_PROBES].to(params.device)
    largest = float(scalars.abs().max())
    try:
        with torch.no_grad():
            # Next to each other, as there may be blocks of one.
            alone = [inputs.scalars(params, row[None]) for row in probes]
            several = [inputs.scalars(params, probes), scalars[probes]]
        for known in several:
            if not torch.allclose(torch.cat(alone), known, rtol=1e-9, atol=1e-9 * largest):
                return None
        by_block = [_block_orders(inputs, params, rows) for rows in blocks]
        orders = {name: order for name, order in by_block[0].items() if all(own[name] == order for own in by_block)}
        leaves = inputs.leaves(params)
        rest = {name: leaf for name, leaf in leaves.items() if orders.get(name) is None}
        if rest:
            inputs.gradients(rest, leaves, probes[:1], ())
    except ExplaindError:
        raise
    except _CANNOT:
        return None
    return {name: order for name, order in orders.items() if order is not None}


def _block_orders(inputs: QueryInputs, params: Tensor, rows: Tensor) -> dict[str, Order | None]:
    """The orders of some rows by every parameter, None where they have none."""
    leaves = inputs.leaves(params)
    with torch.enable_grad():
        together = inputs.scalars(leaves, rows)
    weights, combined = combined_rows({"": together}, leaves, {}, (0, 0))
    uses = Uses([together], leaves)
    uses.expect(weights, combined)
    uses.backward([torch.ones_like(together)])
    return {name: uses.order(name) for name in leaves}
