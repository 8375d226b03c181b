"""Average slopes: exact where arguments go straight, and plain where no kink is crossed."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import grad, jvp, vmap

from explaind.path.kinks import KnownKinks, averaged, watched
from explaind.path.slopes import share_above_zero
from tests.kinked_functions import BENT, OF_ONE, OF_SEVERAL, VECTORISED, averaged_gradient, averaged_sum, way, weighted


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


def test_arguments_of_some_rows_are_known_from_those_of_more():
    start, update, rows = torch.zeros(2), torch.ones(2), torch.tensor([0, 2, 5])
    argument = torch.arange(6.0).reshape(3, 2)
    for by_row in (True, False):
        known = KnownKinks(by_row=by_row, dtype=torch.float32, most_bytes=1 << 10)
        known.put(start, update, 0.5, rows, {"0 relu": argument})
        assert known.get(start, update, 0.5, rows)["0 relu"] is argument
        some = known.get(start, update, 0.5, torch.tensor([0, 5]))
        assert (some["0 relu"].tolist() == [[0, 1], [4, 5]]) if by_row else some is None
        assert known.get(start, update, 0.5, torch.tensor([0, 3])) is None
        assert known.get(start, update, 0.25, rows) is None


def test_arguments_are_forgotten_from_the_first_point_on():
    start, update, rows, argument = torch.zeros(2), torch.ones(2), torch.arange(3), torch.zeros(3, dtype=torch.float64)
    known = KnownKinks(by_row=True, dtype=argument.dtype, most_bytes=2 * argument.nbytes)
    for position in (0.0, 0.5, 1.0):
        known.put(start, update, position, rows, {"0 relu": argument})
    assert [known.get(start, update, position, rows) is None for position in (0.0, 0.5, 1.0)] == [True, False, False]
