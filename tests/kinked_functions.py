"""Functions with kinks in all the forms that torch knows them by, and their average slopes."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from explaind.path.kinks import averaged, watched


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


def averaged_at(function, node, before, after):
    """What the function gives at the node, with slopes averaged between two points."""
    with watched() as first:
        function(before)
    with watched() as last:
        function(after)
    with averaged(first, last):
        return function(node)


def averaged_sum(function, node, before, after):
    return averaged_at(partial(weighted, function), node, before, after)


def averaged_gradient(function, node, before, after):
    node = node.clone().requires_grad_()
    return torch.autograd.grad(averaged_sum(function, node, before, after), node)[0]
