"""Copies in memory that is used again: never while anything still refers to it."""

import pytest
import torch

from explaind.recording.memory import CopyMemory


def holders(tensor):
    return {"tensor": tensor, "view": tensor[1:], "array": tensor.numpy(), "row of an array": tensor.numpy()[None][:1]}


@pytest.mark.parametrize("holder", holders(torch.zeros(3)))
def test_memory_is_given_out_again_only_when_nothing_refers_to_it(holder):
    memory = CopyMemory()
    first = memory.empty((3,), torch.float32)
    place = first.data_ptr()
    kept = holders(first)[holder]
    del first
    assert memory.empty((3,), torch.float32).data_ptr() != place
    del kept
    assert place in [memory.empty((3,), torch.float32).data_ptr() for _ in range(2)]


def test_copies_of_many_steps_take_the_memory_of_those_that_are_held():
    memory, held, places = CopyMemory(), [], set()
    for number in range(50):
        held = [*held[-3:], memory.copy(torch.full((4,), float(number)))]
        places.add(held[-1].data_ptr())
    assert [copy[0].item() for copy in held] == [46, 47, 48, 49]
    assert len(places) <= 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 3)])
def test_a_copy_is_equal_and_apart(dtype, shape):
    original = torch.ones(shape, dtype=dtype)
    copy = CopyMemory().copy(original)
    original.zero_()
    assert copy.dtype == dtype
    assert torch.equal(copy, torch.ones(shape, dtype=dtype))
