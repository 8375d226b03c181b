"""The order in which a model's parameter tensors lie in one flat vector θ ∈ R^D."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

__all__ = ["Parameter", "ParameterTable"]

_DEVICE = attrgetter("device")


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One named parameter tensor and its place in the flat vector."""

    name: str
    """Name as in `module.named_parameters()`."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    dtype: torch.dtype
    """Data type it is trained in."""
    offset: int
    """Index of its first element in the flat vector."""
    group: int
    """Index of the optimizer's parameter group that owns it."""

    @property
    def num_elements(self) -> int:
        """Number of scalars in the tensor."""
        return int(torch.Size(self.shape).numel())

    @property
    def slice(self) -> slice:
        """Where its elements lie in the flat vector."""
        return slice(self.offset, self.offset + self.num_elements)


class ParameterTable(Sequence[Parameter]):
    """All traced parameters in the order of the flat vector; `flatten` and `unflatten` go to and fro."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters = tuple(parameters)
        self.names = tuple(parameter.name for parameter in self._parameters)
        self.num_elements = sum(parameter.num_elements for parameter in self._parameters)
        self._zeros = {p.name: torch.zeros(()).expand(p.num_elements) for p in self._parameters}
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        self.dtype = torch.float64 if wide else torch.float32
        """The type that holds every parameter exactly: float64 if any is float64, else float32."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], groups: Mapping[str, int]) -> ParameterTable:
        """Lay out named tensors one after the other; `groups` gives each one's optimizer group."""
        parameters, offset = [], 0
        for name, tensor in tensors.items():
            parameters.append(
                Parameter(
                    name=name,
                    shape=tuple(tensor.shape),
                    dtype=tensor.dtype,
                    offset=offset,
                    group=groups[name],
                )
            )
            offset += tensor.numel()
        return cls(parameters)

    def flatten(
        self, tensors: Mapping[str, Tensor | None], dtype: torch.dtype | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Copy named tensors `[*shape]` to one vector `[element]` on the host, or to `out`; a missing or None is zero.

        Without `out` its type is `dtype`, or that of the table.
        """
        parts = [zero if (part := tensors.get(name)) is None else part for name, zero in self._zeros.items()]
        if len(parts) == 1 or len(set(map(_DEVICE, parts))) > 1:  # of one tensor, torch would make a view
            parts = [part.detach().to("cpu", copy=True) for part in parts]
        with torch.no_grad():
            flat: Tensor = _flatten_dense_tensors(parts)
            if out is not None:
                return out.copy_(flat)
        return flat.to(device="cpu", dtype=dtype or self.dtype)

    def flatten_rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Concatenate named tensors `[row, *shape]` to one matrix `[row, element]`."""
        return torch.cat([tensors[name].reshape(len(tensors[name]), -1) for name in self.names], dim=1)

    def unflatten(self, flat: Tensor, *, trained_dtype: bool = False) -> dict[str, Tensor]:
        """Views `{name: [*shape]}` into a flat vector; `trained_dtype=True` casts each to its own dtype.

        Axes before the last, `[…, element]`, are kept: `{name: […, *shape]}`.
        """
        front = flat.shape[:-1]
        tensors = {p.name: flat[..., p.slice].reshape((*front, *p.shape)) for p in self._parameters}
        if trained_dtype:
            return {p.name: tensors[p.name].to(p.dtype) for p in self._parameters}
        return tensors

    def expand(self, values: Sequence[float] | Tensor) -> Tensor:
        """Repeat one number per parameter `[parameter]` over its elements, as float64 `[element]`."""
        counts = torch.tensor([parameter.num_elements for parameter in self._parameters])
        return torch.as_tensor(values, dtype=torch.float64).repeat_interleave(counts)

    def to_json(self) -> list[dict[str, Any]]:
        """The table as plain data for a store's attributes."""
        return [asdict(p) | {"dtype": str(p.dtype).removeprefix("torch.")} for p in self._parameters]

    @classmethod
    def from_json(cls, rows: Iterable[Mapping[str, Any]]) -> ParameterTable:
        """Read back what `to_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        parameters = [
            Parameter(
                name=str(row["name"]),
                shape=tuple(int(size) for size in row["shape"]),
                dtype=named_dtype(row["dtype"]),
                offset=int(row["offset"]),
                group=int(row["group"]),
            )
            for row in rows
        ]
        stop = 0
        for parameter in parameters:
            if min(parameter.shape, default=0) < 0 or parameter.offset != stop:
                raise ValueError(f"'{parameter.name}' does not begin where the one before it ends, at {stop}")
            stop += parameter.num_elements
        if len({parameter.name for parameter in parameters}) < len(parameters):
            raise ValueError("two parameters have the same name")
        return cls(parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __getitem__(self, index: Any) -> Any:
        return self._parameters[index]


def named_dtype(name: str) -> torch.dtype:
    """The torch dtype of this name, such as `"float32"`; anything else is a ValueError."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not the name of a torch dtype")
    return dtype
