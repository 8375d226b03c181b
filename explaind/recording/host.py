"""Numbers of the training loop as arrays on the host."""

from __future__ import annotations

import platform
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from explaind.errors import RecordingError

__all__ = ["machine", "rng_state", "same_bits", "to_numpy"]


def to_numpy(tensor: Tensor, *, copy: bool = True) -> NDArray[Any]:
    """A tensor on the host, where it need not be copied only if nothing else changes it.

    bfloat16 and float16 widen, exactly, to float32.

    Raises:
        RecordingError: the tensor is complex.
    """
    if tensor.is_complex():
        raise RecordingError("complex tensors are not supported; use a pair of real ones.")
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array.copy() if copy else array


def rng_state(device: torch.device) -> NDArray[np.uint8]:
    """State of the host's generator, followed by that of the device if it has its own."""
    host: NDArray[np.uint8] = torch.get_rng_state().numpy()
    return np.concatenate([host, torch.cuda.get_rng_state(device).numpy()]) if device.type == "cuda" else host


def machine() -> str:
    """What decides, beside torch's version and the number of threads, how sums are rounded."""
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Whether two arrays of one type have the same bits; NaN is then equal to itself, and −0 is not 0."""
    return one.shape == other.shape and np.array_equal(one.reshape(-1).view(np.uint8), other.reshape(-1).view(np.uint8))
