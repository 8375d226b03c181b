"""The rescaling that is found between two gradients, tensor by tensor."""

import math

import pytest
import torch

from explaind.parameters import ParameterTable
from explaind.rescaling import Rescaling, find_rescaling


def pair(before, now, limits=()):
    """What is found for tensors `{name: [g, G]}` of one parameter each."""
    tensors = {name: torch.tensor(entries, dtype=torch.float64) for name, entries in before.items()}
    table = ParameterTable.of(tensors, dict.fromkeys(tensors, 0))
    after = table.flatten({name: torch.tensor(entries, dtype=torch.float64) for name, entries in now.items()})
    return find_rescaling(table, table.flatten(tensors), after, limits=limits)


def test_entries_of_one_size_take_only_what_others_bear_out():
    mirrored = [2.0, -2.0]
    assert pair({"bias": mirrored}, {"bias": [1.0, -1.0]}) == {"bias": (1.0, math.inf)}
    both = pair({"bias": mirrored, "weight": [1.0, 3.0]}, {"bias": [1.0, -1.0], "weight": [0.5, 1.5]})
    assert both == {"bias": (0.5, math.inf), "weight": (0.5, math.inf)}
    assert pair({"bias": mirrored}, {"bias": [1.0, -1.0]}, limits=[1.0]) == {"bias": (1.0, 1.0)}


def test_a_single_entry_takes_only_what_others_bear_out():
    found = pair({"a": [2.0], "b": [4.0, 1.0]}, {"a": [1.5], "b": [2.0, 0.5]})
    assert found == {"a": (1.0, math.inf), "b": (0.5, math.inf)}


def test_zero_gradients():
    assert pair({"a": [0.0, 0.0]}, {"a": [0.0, 0.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [0.0, 0.0]}, {"a": [1.0, 2.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [1.0]}, {"a": [0.0]}) == {"a": (0.0, math.inf)}
    assert pair({"a": [0.0, 1.0, 3.0]}, {"a": [0.0, 2.0, 6.0]}) == {"a": (2.0, math.inf)}


def test_one_clipped_entry_counts_beside_others_that_were_left_alone():
    assert pair({"a": [1.0, -0.5, 3.0]}, {"a": [1.0, -0.5, 2.0]}) == {"a": (1.0, 2.0)}
    assert pair({"a": [1.0, 0.0, 3.0]}, {"a": [1.0, 0.0, 2.0]}) == {"a": (1.0, math.inf)}


def test_entries_that_grew_or_turned_are_not_clipped():
    assert pair({"a": [1.0, -0.5, 3.0]}, {"a": [1.0, -0.5, -2.0]}) == {"a": (1.0, math.inf)}
    assert pair({"a": [1.0, -0.5, 1.5]}, {"a": [1.0, -0.5, 2.0]}) == {"a": (1.0, math.inf)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_coarse_types_need_more_entries(dtype):
    torch.manual_seed(0)
    for count in range(2, 12):
        before = (1 + torch.rand(count)).to(dtype)
        now = before * torch.tensor(0.3, dtype=dtype)
        table = ParameterTable.of({"a": before}, {"a": 0})
        ((scale, limit),) = find_rescaling(table, before, now).values()
        assert limit == math.inf
        assert scale == pytest.approx(0.3, rel=0.01) or scale == 1.0
        enough = {torch.float64: 2, torch.float32: 2, torch.bfloat16: 10, torch.float16: 5}[dtype]
        assert (scale != 1.0) == (count >= enough)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_noise_is_told_from_rounding(dtype):
    torch.manual_seed(0)
    for _ in range(200):
        tensors = {name: torch.randn(count).to(dtype) for name, count in (("a", 2), ("b", 3), ("c", 6), ("d", 20))}
        table = ParameterTable.of(tensors, dict.fromkeys(tensors, 0))
        now = {name: 0.5 * tensor + 0.1 * torch.randn(len(tensor)).to(dtype) for name, tensor in tensors.items()}
        found = find_rescaling(table, table.flatten(tensors), table.flatten(now))
        assert set(found.values()) == {(1.0, math.inf)}


def test_the_factor_gives_what_the_rescaling_gives():
    rescaling = Rescaling(scale=torch.tensor([-0.5, 2.0, 1.0, 0.0]), limit=torch.tensor([1.0, 1.0, math.inf, math.inf]))
    gradient = torch.tensor([4.0, 0.0, -3.0, 5.0])
    torch.testing.assert_close(rescaling.factor(gradient) * gradient, rescaling.apply(gradient).double())
    assert rescaling.factor(gradient)[1] == 2.0
