"""How many bytes of memory a piece of work fills."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["made_bytes"]


def made_bytes(work: Callable[[], object]) -> int:
    """Bytes of all tensors that operations make, without gradients.

    Example:
        >>> made_bytes(lambda: torch.zeros(8).view(2, 4) + 1)
        64
    """
    made = _Made()
    with torch.no_grad(), made:
        work()
    return made.num_bytes


class _Made(TorchDispatchMode):
    """Adds up the sizes of results that are no views of arguments."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = (x for x in tree_leaves(result) if isinstance(x, Tensor))
        self.num_bytes += sum(x.nbytes for x in new if x.untyped_storage().data_ptr() not in given)
        return result
