"""Gradients one example, one query and one node at a time, by plain autograd on a float64 copy of the model.

A recorded call is repeated as it was: the whole batch, in its mode, with its random numbers and buffers. An example's
gradient is what comes back when the recorded cotangent is masked to its row.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.calls import named_tensors, rebuild
from explaind.query import Query
from explaind.recorded_calls import RecordedCall
from explaind.run import Run

__all__ = ["average_query_gradient", "example_gradients", "query_values"]

_ROUNDING = 1e-6
"""Part of the largest entry by which a gradient of the training's own type may differ from one in float64."""


def example_gradients(run: Run, step: int, *, by_token: bool = False) -> list[tuple[int, int, dict[str, Tensor]]]:
    """Every row's example id, token and gradient at a step, scaled as the loop scaled the batch's."""
    found = [
        (int(call.examples[row]), token, gradient)
        for call in run.calls(step)
        for row, token, gradient in row_gradients(run, step, call, by_token)
    ]
    if not found:  # all gradients were zero
        return []
    scale = run.table.unflatten(run.table.expand(run.gradient_rescaling(step)[0]))
    recorded = run.table.unflatten(run.flat_gradient(step).double())
    for name in run.table.names:
        batch = torch.stack([gradient[name] for _, _, gradient in found]).sum(dim=0)
        if bool(scale[name].isnan().any()):  # a hook of the loop has rescaled it, in whichever way
            scale[name] = torch.where(batch == 0, 1.0, recorded[name] / batch)
        else:
            scale[name] = scale[name] * clipping(scale[name] * batch, recorded[name])
    return [(example, token, {name: scale[name] * g[name] for name in g}) for example, token, g in found]


def clipping(before: Tensor, after: Tensor) -> Tensor:
    """By which factor each entry was clipped, if some were cut to one largest size and the others left alone."""
    largest = after.abs().max()
    cut = before.abs() > (1 + _ROUNDING) * largest
    others = (after - before)[~cut].abs()
    to_the_largest = (after - largest * before.sign())[cut].abs()
    if not cut.any() or cut.numel() == 1 or torch.cat([others, to_the_largest]).max() > _ROUNDING * largest:
        return torch.ones_like(before)
    return torch.where(cut, after / before, 1.0)


def row_gradients(
    run: Run, step: int, call: RecordedCall, by_token: bool
) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
    """J_k(θ_s)ᵀ c_k of every row of a call, and of each of its tokens if they are told apart."""
    model = double_copy(run, run.params(step), run.fixed_version(call.fixed_version))
    for module, training in zip(model.modules(), call.training, strict=True):
        module.training = bool(training)
    args, kwargs = rebuild(call.kind.template, {name: widened(tensor) for name, tensor in call.inputs.items()})
    with torch.random.fork_rng(devices=[]), eagerly(model):
        torch.set_rng_state(torch.from_numpy(call.rng_state))
        if call.kind.part is None:
            assert run.objective is not None
            losses = run.objective(model, *args)
            outputs, cotangents = {"": losses}, {"": torch.ones_like(losses)}
        else:
            outputs = dict(named_tensors(model.get_submodule(call.kind.part)(*args, **kwargs)))
            cotangents = {name: widened(tensor) for name, tensor in call.output_grads.items()}
    products = [outputs[name] * cotangent for name, cotangent in cotangents.items()]
    num_tokens = products[0].shape[1] if by_token else 1
    for row in range(len(call.examples)):
        for token in range(num_tokens):
            own = [(product[row, token] if by_token else product[row]).sum() for product in products]
            found = gradients(torch.stack(own).sum(), model, run.table.names)
            yield row, token, {name: g if name in call.reached else 0 * g for name, g in found.items()}


def average_query_gradient(
    run: Run,
    query: Query,
    start: Mapping[str, Tensor],
    stop: Mapping[str, Tensor],
    fixed: Mapping[str, Tensor],
    num_nodes: int,
) -> list[dict[str, Tensor]]:
    """The gradient of every query, averaged from one point to another by Gauss–Legendre with many nodes."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    averages: list[dict[str, Tensor]] = []
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        params = {name: start[name] + node * (stop[name] - start[name]) for name in start}
        scalars, model = query_scalars(run, query, params, fixed)
        averages = averages or [dict.fromkeys(start, torch.zeros(())) for _ in scalars]
        for average, scalar in zip(averages, scalars, strict=True):
            for name, gradient in gradients(scalar, model, run.table.names).items():
                average[name] = average[name] + weight * gradient
    return averages


def query_values(
    run: Run, query: Query, params: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
) -> NDArray[np.float64]:
    """q(θ), `[query]`."""
    return query_scalars(run, query, params, fixed)[0].detach().numpy()


def query_scalars(
    run: Run, query: Query, params: Mapping[str, Tensor], fixed: Mapping[str, Tensor]
) -> tuple[Tensor, nn.Module]:
    """q(θ) of all queries, `[query]`, and the model that they can be differentiated by."""
    model = double_copy(run, params, fixed).eval()
    inputs, template = query.call
    if query.forward is None and (recorded := run.kinds_of("")):
        template = recorded[0].template  # with the plain arguments of the loop
    args, kwargs = rebuild(template, {name: widened(tensor) for name, tensor in inputs.items()})
    with eagerly(model):
        output = model(*args, **kwargs) if query.forward is None else query.forward(model, *args, **kwargs)
    return query.output(output), model


def double_copy(run: Run, params: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> nn.Module:
    """The model in float64 with these parameters, buffers and frozen parameters."""
    model = copy.deepcopy(run.model).double()
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in {**fixed, **params}.items():
            own[name].copy_(tensor)
    for name in params:
        own[name].requires_grad_()
    return model


def gradients(scalar: Tensor, model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The gradient of a scalar by each parameter, zero where it was not used."""
    params = dict(model.named_parameters())
    parts = torch.autograd.grad(
        scalar, [params[name] for name in names], retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return {name: part.to_dense() for name, part in zip(names, parts, strict=True)}


def widened(tensor: Tensor) -> Tensor:
    """A floating-point tensor in float64; others as they are."""
    return tensor.double() if tensor.is_floating_point() else tensor


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Run compiled modules as the Python that they were compiled from."""
    compiled = any(hasattr(module, "_orig_mod") for module in model.modules())
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        yield
