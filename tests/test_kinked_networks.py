"""Networks with kinks: of second order in the path, and smooth ones untouched."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

import explaind
from explaind.path.kinks import averaged, watched
from explaind.quadrature import Adaptive, midpoint
from tests.kinked_functions import averaged_at


def network(make):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), make(), nn.Linear(8, 8), make(), nn.Linear(8, 1)).double()


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.LeakyReLU(inplace=True), nn.Conv2d(4, 6, 2), nn.Flatten(2),
        nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(6, 1),
    ).double()  # fmt: skip


NETWORKS = [
    pytest.param(lambda: network(nn.ReLU), (4,), id="relu"),
    pytest.param(lambda: network(nn.Hardtanh), (4,), id="hardtanh"),
    pytest.param(lambda: network(nn.SELU), (4,), id="selu"),
    pytest.param(lambda: network(lambda: nn.PReLU(8)), (4,), id="prelu"),
    pytest.param(convolutions, (1, 6, 6), id="max-pooling"),
]


def path_errors(model, shape, parts, *, plain=False):
    """Σ |residual| over the parts of a straight path of the parameters, of many inputs."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, *shape, generator=generator, dtype=torch.float64)
    start = {name: p.detach() for name, p in model.named_parameters()}
    update = {n: 0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in start.items()}

    def at(t):
        return {name: start[name] + t * update[name] for name in start}

    def value(params, x):
        return functional_call(model, params, (x[None],)).squeeze()

    def at_node(params, x, left, right):
        if plain:
            return value(params, x)
        return averaged_at(partial(value, x=x), params, left, right)

    total = 0.0
    values = [vmap(value, in_dims=(None, 0))(at(k / parts), x) for k in range(parts + 1)]
    for k in range(parts):
        slopes = vmap(grad(at_node), in_dims=(None, 0, None, None))(
            at((k + 0.5) / parts), x, at(k / parts), at((k + 1) / parts)
        )
        along = sum((slopes[name] * update[name]).flatten(1).sum(1) for name in slopes) / parts
        total += float((values[k + 1] - values[k] - along).abs().sum())
    return total


@pytest.mark.parametrize(("make", "shape"), NETWORKS)
def test_networks_with_kinks_are_of_second_order(make, shape):
    model = make()
    errors = [path_errors(model, shape, parts) for parts in (32, 64, 128)]
    order = -np.polyfit([5, 6, 7], np.log2(errors), 1)[0]
    assert 1.8 < order < 2.3
    assert errors[-1] < 0.05 * path_errors(model, shape, 128, plain=True)


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.ELU, nn.CELU, nn.SiLU, nn.Softplus])
def test_smooth_networks_keep_every_bit(activation):
    model = network(activation)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (expected,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    with watched() as seen:
        model(x)
    assert seen == {}
    with averaged(seen, seen):
        (found,) = torch.autograd.grad(model(x).sum(), model[0].weight)
    assert torch.equal(found, expected)


def test_attributions_through_max_pooling_are_closer_with_as_many_nodes(tmp_path):
    model = nn.Sequential(nn.Unflatten(1, (1, 6, 6)), convolutions())
    x = torch.randn(12, 36, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr"):
        for _ in range(8):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=model)
    query = explaind.Query(x, output=explaind.outputs.value())
    residuals = [
        run.attribute(query, by=("query", "update_step"), quadrature=rule, tolerance=0.0).dataset.quadrature
        for rule in (midpoint(4), Adaptive(midpoint(1), max_depth=2))
    ]
    plain, average = (float(abs(residual).sum()) for residual in residuals)
    assert average < 0.2 * plain
