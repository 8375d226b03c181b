"""Average slopes of kinked functions over a sub-interval of an optimizer step, in place of their slopes at one node.

A gradient at one node sees every ReLU either on or off. Over a sub-interval in which a pre-activation goes from
z_a to z_b, the ReLU is on for a part of the way, and so it is with every function that has kinks (`slopes` tells
which, and their averages). With average slopes the quadrature error of a sub-interval with kinks is of second order
in its length instead of first. The model's values are not touched, and neither are smooth functions.

Kinks that no function of torch has by its name, as in `torch.where(z > 0, z, 0)` or inside of `nn.RNN`, keep the
slopes of the node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from explaind.path.intervals import PARTS
from explaind.path.slopes import KINKED, Kinked

__all__ = ["KNOWN_POINTS", "Kinks", "KnownKinks", "averaged", "watched"]

Kinks = Mapping[str, Tensor]
"""What `watched` collects."""

_NAMES = {"axis": "dim", "keepdims": "keepdim"}
"""NumPy's names of arguments, which torch knows too."""
KNOWN_POINTS = 2 * max(PARTS) + 1
"""Ends and cuts of the sub-intervals that are divided at once, and of half of their parts."""


class _Intercept(TorchFunctionMode):
    """Computes calls of kinked functions by `evaluate(name, call, kinked)`."""

    def __init__(self, evaluate: Callable[[str, Callable[[], Any], Kinked], Any]) -> None:
        super().__init__()
        self._evaluate = evaluate

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        # torch.relu, Tensor.relu, F.relu and relu_ are all one function; F.threshold is called _threshold.
        name = getattr(function, "__name__", "").strip("_")
        z = args[0] if args else named.get("input")
        if name not in KINKED or not isinstance(z, Tensor) or not z.is_floating_point() or "out" in named:
            return function(*args, **named)
        others = {_NAMES.get(key, key): value for key, value in named.items() if key not in ("input", "inplace")}
        kinked = KINKED[name](z, *args[1:], **others)
        if kinked is None:
            return function(*args, **named)
        return self._evaluate(name, lambda: function(*args, **named), kinked)


@contextmanager
def watched(into: dict[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """Collect the arguments of the kinked functions that are computed in the block.

    Args:
        into: where they go; by default into a new dict.

    Yields:
        The arguments by place and function, as in `"0 relu"`: a dict of tensors that vmap can return and take.
    """
    seen = {} if into is None else into

    def note(name: str, call: Callable[[], Any], kinked: Kinked) -> Any:
        seen[f"{len(seen)} {name}"] = kinked.argument.detach().clone()  # the model may go on to change its own in place
        return call()

    with _Intercept(note):
        yield seen


@contextmanager
def averaged(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Iterator[None]:
    """Differentiate the kinked functions of the block by their average slopes over a sub-interval.

    Args:
        before: what `watched` collected at one end of the sub-interval.
        after: the same at the other end.

    Raises:
        ValueError: the block does not compute the functions that were computed at both ends.
    """
    if list(before) != list(after):
        raise _differing(", ".join(before) or "nothing", ", ".join(after) or "nothing")
    place = 0

    def replace(name: str, call: Callable[[], Any], kinked: Kinked) -> Any:
        nonlocal place
        key, shape = f"{place} {name}", kinked.argument.shape
        if key not in before:
            raise _differing(", ".join(before) or "nothing", key)
        if not before[key].shape == after[key].shape == shape:
            raise _differing(f"{key} of {tuple(before[key].shape)} and {tuple(after[key].shape)}", f"{tuple(shape)}")
        place += 1
        line = kinked.line(before[key], after[key])
        with torch.no_grad():
            output = call()
        values, *indices = output if isinstance(output, tuple) else (output,)
        # Unlike values + (line − line.detach()), writing the values over the line's is right for infinite ones too.
        result = line.reshape(values.shape)
        result.detach().copy_(values.detach())
        if values is kinked.argument:  # computed in place
            return values.copy_(result)
        return type(output)((result, *indices)) if isinstance(output, tuple) else result

    with _Intercept(replace):
        yield
    if place < len(before):
        raise _differing(", ".join(before), f"only the first {place}")


class KnownKinks:
    """Arguments of kinked functions at points of the segment that is being integrated.

    At the end that it shares with the segment before they are known from that one.

    Args:
        by_row: whether they have the inputs along their first axis.
        dtype: type that they are kept in.
        most_bytes: of them that are kept.
    """

    def __init__(self, *, by_row: bool, dtype: torch.dtype, most_bytes: int) -> None:
        self._by_row, self._dtype, self._most_bytes = by_row, dtype, most_bytes
        self._start = self._update = torch.empty(0)
        self._known: dict[float, list[tuple[Tensor, Kinks]]] = {}
        self._num_bytes = 0

    def anew(self, most_bytes: int) -> KnownKinks:
        """The same for other inputs, of which nothing is known yet."""
        return KnownKinks(by_row=self._by_row, dtype=self._dtype, most_bytes=most_bytes)

    def get(self, start: Tensor, update: Tensor, position: float, rows: Tensor) -> Kinks | None:
        """What is known of some inputs, ascending, at a point."""
        self._enter(start, update)
        for those, kinks in self._known.get(position, ()):
            if torch.equal(those, rows):
                return kinks
            if self._by_row and len(rows) < len(those):
                places = torch.searchsorted(those, rows).clamp_max(len(those) - 1)
                if torch.equal(those[places], rows):
                    return {name: argument[places] for name, argument in kinks.items()}
        return None

    def put(self, start: Tensor, update: Tensor, position: float, rows: Tensor, kinks: Kinks) -> None:
        """Remember some inputs at a point."""
        self._enter(start, update)
        kinks = {name: argument.to(self._dtype) for name, argument in kinks.items()}
        self._known.setdefault(position, []).append((rows, kinks))
        self._num_bytes += _num_bytes(kinks)
        while self._num_bytes > self._most_bytes:
            self._num_bytes -= sum(_num_bytes(kinks) for _, kinks in self._known.pop(next(iter(self._known))))

    def _enter(self, start: Tensor, update: Tensor) -> None:
        if start is self._start and update is self._update:
            return
        # The sweep goes from the last segment to the first.
        shared = len(start) == len(self._start) and torch.equal(start + update, self._start)
        self._known = {1.0: self._known[0.0]} if shared and 0.0 in self._known else {}
        self._num_bytes = sum(_num_bytes(kinks) for known in self._known.values() for _, kinks in known)
        self._start, self._update = start, update


def _num_bytes(kinks: Kinks) -> int:
    return sum(argument.nbytes for argument in kinks.values())


def _differing(expected: str, found: str) -> ValueError:
    return ValueError(
        "slopes can be averaged over a part of a step only where the model computes the same kinked functions, with "
        f"arguments of the same shapes, all along it; it computed {expected} at one point and {found} at another. "
        "Take a fixed rule, such as quadrature=explaind.quadrature.gauss_legendre(3), which averages no slopes."
    )
