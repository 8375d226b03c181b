"""Hooks on the modules of a model that copies of the model do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = ["ModuleHook"]


class ModuleHook:
    """Calls a function when its module runs; in copies and pickles of the module nothing is left of it.

    Args:
        module: what it is on.
        function: takes the module, and what torch gives to hooks.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function

    def __call__(self, module: nn.Module, *seen: Any) -> Any:
        """What torch calls."""
        return self._function(module, *seen) if module is self._module else None

    def __reduce__(self) -> tuple[type[_Nothing], tuple[()]]:
        """A hook that does nothing."""
        return _Nothing, ()


class _Nothing:
    """A hook that does nothing."""

    def __call__(self, *seen: Any) -> None:
        return None
