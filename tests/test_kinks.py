"""Average slopes: exact where arguments go straight, of second order elsewhere, absent where nothing has a kink."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

import explaind
from explaind.path.kinks import averaged, watched
from explaind.path.slopes import share_above_zero
from explaind.quadrature import Adaptive, midpoint


def forms(name, *functions):
    return [pytest.param(function, id=f"{name}-{place}") for place, function in enumerate(functions)]


def relu_of_a_view(z):
    y = z * 1
    y[..., :3].relu_()
    return y


# In-place forms get a tensor of their own, as they would from the layer below.
OF_ONE = [
    *forms(
        "relu", torch.relu, torch.Tensor.relu, F.relu, nn.ReLU(), nn.Sequential(nn.Sequential(nn.ReLU())),
        lambda z: torch.relu_(z * 1), lambda z: (z * 1).relu_(), lambda z: F.relu_(z * 1),
        lambda z: F.relu(z * 1, True), lambda z: nn.ReLU(inplace=True)(z * 1), lambda z: F.relu(input=z),
        torch.ops.aten.relu, relu_of_a_view,
    ),
    *forms(
        "relu6", F.relu6, nn.ReLU6(), lambda z: nn.ReLU6(inplace=True)(z * 9), lambda z: F.relu6(z * 9, True),
    ),
    *forms(
        "leaky_relu", F.leaky_relu, nn.LeakyReLU(0.2), lambda z: F.leaky_relu(z, negative_slope=-0.5),
        lambda z: F.leaky_relu(z * 1, 0.3, True), lambda z: F.leaky_relu_(z * 1, 0.3), lambda z: F.leaky_relu(z, 0.3),
    ),
    *forms(
        "rrelu", nn.RReLU().eval(), F.rrelu, lambda z: torch.rrelu(z, 0.2, 0.4), lambda z: F.rrelu_(z * 1, 0.2, 0.4),
        lambda z: F.rrelu(z * 1, 0.2, 0.4, inplace=True),
    ),
    *forms(
        "prelu", lambda z: F.prelu(z, z.new_tensor([0.3])), lambda z: z.prelu(weight=z.new_tensor([0.3])),
        lambda z: torch.prelu(z, torch.linspace(-1, 1, z.shape[1], dtype=z.dtype)),
    ),
    *forms(
        "abs", torch.abs, abs, torch.Tensor.abs, torch.absolute, torch.Tensor.absolute, lambda z: (z * 1).abs_(),
        lambda z: torch.abs_(z * 1),
    ),
    *forms(
        "hardtanh", F.hardtanh, nn.Hardtanh(-0.3, 0.9), lambda z: F.hardtanh(z, max_val=0.1),
        lambda z: nn.Hardtanh(inplace=True)(z * 1), lambda z: F.hardtanh_(z * 1, -0.2, 0.3),
    ),
    *forms(
        "clamp", lambda z: z.clamp(-0.2, 0.5), lambda z: torch.clamp(z, max=0.5), lambda z: z.clip(min=0.1),
        lambda z: torch.clamp_min(z, 0.1), lambda z: z.clamp_max(0.1), lambda z: (z * 1).clamp_(0, 1),
        lambda z: (z * 1).clamp_min_(min=-0.1), lambda z: torch.clip_(z * 1, None, 0.4),
        lambda z: z.clip(np.float64(0.2)),
    ),
    *forms(
        "threshold", nn.Threshold(0.2, 0.2), lambda z: F.threshold(z, 0.2, 0.2), lambda z: torch.threshold(z, -1, -1),
        lambda z: F.threshold(z * 1, 0.1, 0.1, inplace=True), lambda z: F.threshold_(z * 1, 0, 0),
    ),
    *forms("softshrink", nn.Softshrink(), F.softshrink, lambda z: F.softshrink(z, 0.3)),
    *forms(
        "hardsigmoid", lambda z: F.hardsigmoid(3 * z), lambda z: nn.Hardsigmoid(inplace=True)(3 * z),
    ),
]  # fmt: skip
OF_SEVERAL = [
    *forms(
        "maximum", lambda z: torch.maximum(z[0], z[1]), lambda z: z[0].maximum(z[1, :1]),
        lambda z: torch.max(z[0], z[1]),
        lambda z: z[0].max(other=z[1]), lambda z: torch.fmax(z[0], z[1]), lambda z: torch.maximum(z, z.new_tensor(0.1)),
    ),
    *forms(
        "minimum", lambda z: torch.minimum(z[0], z[1]), lambda z: z[0, :1].minimum(z[1]),
        lambda z: torch.min(z[0], z[1]),
        lambda z: z[0].min(other=z[1]), lambda z: z[0].fmin(z[1]),
    ),
    *forms(
        "max", torch.max, lambda z: z.max(1)[0], lambda z: z.max(dim=-1).values, lambda z: torch.max(z, 2, True).values,
        lambda z: z.max(axis=0, keepdims=True)[0],
    ),
    *forms("min", torch.min, lambda z: z.min(1)[0], lambda z: torch.min(z, dim=3, keepdim=True).values),
    *forms(
        "amax", torch.amax, lambda z: z.amax(1), lambda z: z.amax((0, 2), keepdim=True), lambda z: z.amax(dim=-1),
    ),
    *forms("amin", torch.amin, lambda z: z.amin(1), lambda z: torch.amin(z, dim=(-1, 0))),
    *forms(
        "max_pool1d", lambda z: F.max_pool1d(z[0], 2), lambda z: nn.MaxPool1d(3, 2, 1, ceil_mode=True)(z[0]),
        lambda z: torch.max_pool1d(z[0], 2, dilation=2), lambda z: nn.MaxPool1d(2, return_indices=True)(z[0, 0])[0],
    ),
    *forms(
        "max_pool2d", lambda z: F.max_pool2d(z, 2), lambda z: nn.MaxPool2d((3, 2), 2, 1, ceil_mode=True)(z),
        lambda z: torch.max_pool2d(z, 2, dilation=2), lambda z: F.max_pool2d(z, 3, 1, return_indices=True)[0],
        lambda z: F.max_pool2d(input=z[0], kernel_size=2),
    ),
    *forms(
        "max_pool3d", lambda z: F.max_pool3d(z, 2), lambda z: nn.MaxPool3d(2, 1, 1, ceil_mode=True)(z[None]),
        lambda z: torch.max_pool3d(z, 2, dilation=1), lambda z: nn.MaxPool3d(2, return_indices=True)(z)[0],
    ),
    *forms(
        "adaptive", lambda z: F.adaptive_max_pool1d(z[0], 3), lambda z: torch.adaptive_max_pool1d(z[0], 2)[0],
        lambda z: nn.AdaptiveMaxPool2d((2, 3))(z), lambda z: nn.AdaptiveMaxPool2d(1, return_indices=True)(z)[0],
        lambda z: nn.AdaptiveMaxPool3d((2, None, 3))(z),
    ),
]  # fmt: skip
BENT = [
    *forms(
        "elu", lambda z: F.elu(z, 2.0), nn.ELU(0.5), lambda z: F.elu_(z * 1, 3.0), lambda z: F.elu(z * 1, 2.0, True),
    ),
    *forms("selu", F.selu, nn.SELU(), lambda z: torch.selu_(z * 1)),
    *forms("hardswish", lambda z: F.hardswish(4 * z), lambda z: nn.Hardswish(inplace=True)(4 * z)),
]  # fmt: skip


VECTORISED = [form for form in [*OF_ONE, *OF_SEVERAL, *BENT] if not form.id.startswith("rrelu")]  # vmap knows none


def way(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 2, 4, 6, 6, generator=generator, dtype=torch.float64).to(dtype)


def weighted(function, z):
    out = function(z)
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()


def averaged_sum(function, node, before, after):
    with watched() as first:
        weighted(function, before)
    with watched() as last:
        weighted(function, after)
    with averaged(first, last):
        return weighted(function, node)


def averaged_gradient(function, node, before, after):
    node = node.clone().requires_grad_()
    return torch.autograd.grad(averaged_sum(function, node, before, after), node)[0]


@pytest.mark.parametrize("function", [*OF_ONE, *OF_SEVERAL])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_one_node_is_exact_where_arguments_go_straight(function, dtype, tolerance):
    before, after = way(dtype)
    slope = averaged_gradient(function, torch.lerp(before, after, 0.3), before, after)
    change = weighted(function, after) - weighted(function, before)
    assert change.abs() > 1e-2
    torch.testing.assert_close((slope * (after - before)).sum(), change, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", [*OF_ONE, *OF_SEVERAL, *BENT])
def test_values_are_untouched(function):
    before, after = way()
    with watched() as first:
        expected = function(before)
    assert len(first) == 1
    assert torch.equal(expected, function(before))
    with watched() as last:
        function(after)
    with averaged(first, last):
        assert torch.equal(function(before), expected)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("function", VECTORISED)
def test_gradients_can_be_vectorised(function):
    before, after = torch.stack([way(), way().flip(1), way() - 0.1], dim=1)
    node = torch.lerp(before, after, 0.6)
    found = vmap(grad(lambda *points: averaged_sum(function, *points)))(node, before, after)
    for row, *points in zip(found, node, before, after, strict=True):
        torch.testing.assert_close(row, averaged_gradient(function, *points), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [*OF_ONE, *OF_SEVERAL, *BENT])
def test_slopes_are_plain_where_no_kink_is_crossed(function):
    before, _ = way()
    node = before.clone().requires_grad_()
    (plain,) = torch.autograd.grad(weighted(function, node), node)
    slope = averaged_gradient(function, before + 1e-10, before, before + 1e-9)
    torch.testing.assert_close(slope, plain, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("function", BENT)
def test_bent_pieces_lose_only_their_curvature(function):
    before, after = way()
    errors = []
    for parts in (8, 16, 32):
        ends = [torch.lerp(before, after, t) for t in np.linspace(0, 1, parts + 1)]
        slope = sum(averaged_gradient(function, (a + b) / 2, a, b) for a, b in pairwise(ends))
        # The weights of the sum in `weighted` as one number each.
        change = function(after) - function(before)
        along = slope * (after - before) / parts / torch.linspace(-1, 1, change.numel()).reshape(change.shape)
        errors.append(float((change - along).abs().sum()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]


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
        with watched() as before:
            value(left, x)
        with watched() as after:
            value(right, x)
        with averaged(before, after):
            return value(params, x)

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


@pytest.mark.parametrize(
    "function",
    [
        lambda z: F.hardshrink(z), lambda z: F.threshold(z, 0.1, 0.0), lambda z: F.rrelu(z, training=True),
        lambda z: z.clamp(min=z.new_zeros(6)), lambda z: z.clamp(1, -1), lambda z: F.elu(z),
        lambda z: F.dropout(z, 0.5),
        lambda z: z.int().abs().clamp(0, 3).max(), lambda z: torch.clamp(z, 0, 1, out=torch.empty_like(z)),
    ],
)  # fmt: skip
def test_what_jumps_or_cannot_be_averaged_is_left_alone(function):
    z, _ = way()
    with watched() as seen:
        function(z)
    assert seen == {}


def test_layers_that_call_torch_by_name_are_seen():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, activation="relu", batch_first=True).double().eval()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    for enabled in (torch.enable_grad, torch.no_grad):
        with enabled(), watched() as seen:
            layer(x)
        assert {name: z.shape for name, z in seen.items()} == {"0 relu": (2, 3, 8)}


def test_arguments_are_kept_as_they_were():
    before, _ = way()

    def overwrites(z):
        y = z * 1
        out = F.leaky_relu(y)
        y.zero_()
        return F.relu(out, inplace=True)

    with watched() as seen:
        overwrites(before)
    assert list(seen) == ["0 leaky_relu", "1 relu"]
    assert torch.equal(seen["0 leaky_relu"], before)
    assert torch.equal(seen["1 relu"], F.leaky_relu(before))


def test_in_place_functions_change_their_argument():
    before, after = way()

    def reads_the_argument(z):
        y = z * 1
        F.hardtanh(y, inplace=True)
        return y

    slope = averaged_gradient(reads_the_argument, before, before, after)
    assert torch.equal(slope, averaged_gradient(F.hardtanh, before, before, after))


def test_arguments_of_vectorised_calls_can_be_kept():
    before, after = torch.stack([way(), way().flip(1)], dim=1)

    def arguments(z):
        with watched() as seen:
            F.relu(z)
        return seen

    def at_node(z, first, last):
        with averaged(first, last):
            return F.relu(z).sum()

    slope = vmap(grad(at_node))(before, vmap(arguments)(before), vmap(arguments)(after))
    assert torch.equal(slope, share_above_zero(before, after))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own use of it
def test_directional_derivatives_are_those_of_the_gradient():
    before, after = way()
    along = lambda z: averaged_sum(F.leaky_relu, z, before, after)  # noqa: E731
    _, found = jvp(along, (before,), (after,))
    torch.testing.assert_close(found, (averaged_gradient(F.leaky_relu, before, before, after) * after).sum())


def test_shares_of_infinite_and_equal_numbers():
    inf = torch.inf
    before = torch.tensor([1.0, -1.0, -1.0, 3.0, 0.0, 0.0, -2.0, inf, -inf, -inf])
    after = torch.tensor([2.0, -2.0, 3.0, -1.0, 0.0, 1.0, 0.0, inf, -inf, 1.0])
    assert share_above_zero(before, after).tolist() == [1.0, 0.0, 0.75, 0.75, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0]


def test_masked_numbers_take_no_part():
    before, after = way()
    mask = before > 0.5
    mask[0, 0] = True

    def largest(z):
        return z.masked_fill(mask, -torch.inf).amax(-1).clamp(min=-5)

    slope = averaged_gradient(largest, before, before, after)
    assert slope.isfinite().all()
    assert not slope[mask].any()
    torch.testing.assert_close(
        (slope * (after - before)).sum(), weighted(largest, after) - weighted(largest, before), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("first", "last", "node"),
    [
        (lambda z: z, F.relu, F.relu),
        (F.relu, F.relu, lambda z: z),
        (F.relu, F.relu, lambda z: F.relu(F.relu(z))),
        (F.relu, F.relu, abs),
        (F.relu, abs, F.relu),
        (F.relu, lambda z: F.relu(z[1:]), F.relu),
        (F.relu, F.relu, lambda z: F.relu(z[1:])),
        (lambda z: F.relu(z[:1]), lambda z: F.relu(z[:1]), F.relu),
    ],
)
def test_other_calls_at_the_node_than_at_the_ends_are_refused(first, last, node):
    z, _ = way()
    with watched() as before:
        first(z)
    with watched() as after:
        last(z)
    with pytest.raises(ValueError, match="gauss_legendre"), averaged(before, after):
        node(z)


def test_errors_of_the_model_are_its_own():
    with pytest.raises(ZeroDivisionError), watched() as seen:
        F.relu(torch.ones(1))
        with averaged(seen, seen):
            raise ZeroDivisionError


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
