"""Which strategy a run's products with per-example gradients are computed by, and what its rows are."""

from __future__ import annotations

import torch

from explaind.path.factored import FactorProducts, factor_products
from explaind.path.gradients import call_replay
from explaind.path.products import ExampleGradients, ExampleProducts, GradientProducts, TangentProducts
from explaind.path.step import Step
from explaind.run import Run

__all__ = ["choose_gradients", "choose_products", "count_tokens", "row_split"]


def choose_products(run: Run, *, dtype: torch.dtype, device: torch.device) -> ExampleProducts:
    """Stored gradients, else factors, or for models that couple their rows tangents.

    Where torch cannot differentiate a layer's backward pass, that of EmbeddingBag for instance, it is gradients again.
    """
    gradients = choose_gradients(run, dtype=dtype, device=device)
    if gradients.name != "rows of the batch":
        return gradients
    tangents = TangentProducts(run, dtype=dtype, device=device)
    nothing = torch.zeros(1, run.table.num_elements, device=device)
    try:
        for step, number in run.call_samples():
            tangents.products(Step(run, step, device), number, torch.tensor([0]), nothing, [[slice(None)]])
    except NotImplementedError:
        return gradients
    return tangents


def choose_gradients(run: Run, *, dtype: torch.dtype, device: torch.device) -> ExampleGradients:
    """A strategy that gives per-example gradients themselves, in whichever way the model allows."""
    factors = None if run.stores_example_grads else factor_products(run, dtype=dtype, device=device)
    return factors or GradientProducts(run, dtype=dtype, device=device)


def row_split(run: Run, products: ExampleProducts) -> str:
    """What a row's gradient is, in words: its own, or where layers couple the batch, its row's part of the batch's."""
    coupled = "coupled rows: each has the part of the batch's gradient that enters at its own output"
    if isinstance(products, FactorProducts) and products.separate:
        return coupled if products.coupled else "each example on its own"
    for step, number in run.call_samples():
        replay = call_replay(run, step, run.calls(step)[number], dtype=torch.float64, device=torch.device("cpu"))
        if replay.couples_rows():
            return coupled
    return "rows of the recorded batch, which do not depend on each other"


def count_tokens(run: Run) -> int:
    """Length of the axis after the examples of the model's output, or of the objective's losses.

    Raises:
        ValueError: there is none.
    """
    step, number = run.call_samples()[0]
    call = run.calls(step)[number]
    if call.kind.part is None:
        replay = call_replay(run, step, call, dtype=run.table.dtype, device=torch.device("cpu"))
        with torch.no_grad(), replay.conditions():
            shapes = [tuple(losses.shape) for losses in replay.outputs(replay.params).values()]
    else:
        shapes = [tuple(cotangent.shape) for cotangent in call.output_grads.values()]
    if any(len(shape) < 2 for shape in shapes):
        raise ValueError(
            "by has 'token', but the model's output (or the objective's losses) has no axis after the examples; its "
            f"shape is {shapes[0]}."
        )
    return shapes[0][1]
