"""Packages that only some analyses need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["optional"]


def optional(module: str, *, purpose: str, package: str) -> Any:
    """An installed module.

    Args:
        module: its name.
        purpose: what it is needed for, at the beginning of a sentence.
        package: what installs it.

    Raises:
        ImportError: it is not installed; says what installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which comes with the extra 'analysis': "
            f"pip install 'explaind-tracer[analysis]', or pip install {package}."
        ) from error
