"""What the loop did to a gradient between the backward pass and the optimizer, as one factor per entry.

Clipping by norm, loss scaling and layer-wise rates multiply a parameter's gradient g by a number s; clipping by value
bounds its entries by a number c. In either order, and for each parameter tensor on its own, that is

    G = clamp(s·g, −c, c) = factor ⊙ g,    factor = min(s, c / |g|),

and so every example's share of g is multiplied by the factor. Noise and penalties are not of this form: what entries of
different sizes do not bear out is no rescaling.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from explaind.parameters import Parameter, ParameterTable

__all__ = ["Rescaling", "find_rescaling"]

_ROUNDING_UNITS = 4
_DIFFERENT = 1.01
"""Entries of one size can be one number, seen twice: a loss with two outputs gives (a, −a). A penalty on it is, too."""
_DIFFERENT_CLIPPED = 1.001
"""Entries that differ a little and then have bitwise one size: only a bound does that."""
_ENOUGH_BITS = 18
"""Digits in which the entries must agree beyond those that fix s and c; noise of 8 times the rounding spoils one."""


@dataclass(frozen=True, kw_only=True)
class Rescaling:
    """s and c of every entry of the flat gradient, float64 `[element]`; where nothing was done, 1 and infinity."""

    scale: Tensor
    limit: Tensor

    @classmethod
    def of(
        cls, table: ParameterTable, scale: Sequence[float], limit: Sequence[float], before: Tensor, now: Tensor
    ) -> Rescaling:
        """From one s and c per parameter; those that are NaN are found from g `before` and G `now`, `[element]`."""
        unknown = [parameter for parameter, s in zip(table, scale, strict=True) if math.isnan(s)]
        found = find_rescaling(unknown, before, now)
        known = {p.name: (s, c) for p, s, c in zip(table, scale, limit, strict=True)}
        rescaling = cls.of_pairs(table, known | found)
        return cls(scale=rescaling.scale.to(before.device), limit=rescaling.limit.to(before.device))

    @classmethod
    def of_pairs(cls, table: ParameterTable, pairs: Mapping[str, tuple[float, float]]) -> Rescaling:
        """From the pair (s, c) of each parameter that was rescaled, by name."""
        scales, limits = zip(*(pairs.get(name, (1.0, math.inf)) for name in table.names), strict=True)
        return cls(scale=table.expand(scales), limit=table.expand(limits))

    def apply(self, gradient: Tensor) -> Tensor:
        """G of g, float64 `[element]`.

        >>> import torch
        >>> rescaling = Rescaling(scale=torch.full((3,), 0.5), limit=torch.full((3,), 1.0))
        >>> rescaling.apply(torch.tensor([1.0, -4.0, 0.0]))
        tensor([ 0.5000, -1.0000,  0.0000], dtype=torch.float64)
        """
        return (self.scale * gradient.to(torch.float64)).clamp(-self.limit, self.limit)

    def rounded(self, table: ParameterTable, gradient: Tensor) -> Tensor:
        """G of g `[element]` in the types that it was computed in, as a vector of the table's."""
        return table.flatten(table.unflatten(self.apply(gradient), trained_dtype=True))

    def factor(self, gradient: Tensor) -> Tensor:
        """G / g entry by entry, float64 `[element]`; s where g is zero."""
        size = self.scale.abs().minimum(self.limit / gradient.to(torch.float64).abs())
        return size.copysign(self.scale)


def find_rescaling(
    parameters: Iterable[Parameter], before: Tensor, now: Tensor, *, limits: Iterable[float] = ()
) -> dict[str, tuple[float, float]]:
    """The numbers s and c of each parameter, such that G = clamp(s·g, −c, c) up to rounding; else 1 and infinity.

    A pair counts only where entries of different sizes bear it out: those of the parameter, of another one, or of all
    that cannot tell by themselves, such as single numbers.

    Args:
        parameters: which to look at.
        before: g, `[element]`.
        now: G, `[element]`.
        limits: bounds c that are known to be in use.
    """
    found = {parameter.name: (1.0, math.inf) for parameter in parameters}
    changed = [_Entries.of(p, before, now) for p in parameters if not torch.equal(before[p.slice], now[p.slice])]
    own = {entries.name: pair for entries in changed if (pair := entries.rescaling())}
    candidates = dict.fromkeys([*own.values(), *((1.0, limit) for limit in limits)])
    rest = []
    for entries in changed:
        pair = own.get(entries.name) or next((pair for pair in candidates if entries.agree(*pair)), None)
        if pair is None:
            rest.append(entries)
        else:
            found[entries.name] = pair
    if len(rest) > 1 and (common := _Entries.together(rest).rescaling()):
        found |= {entries.name: common for entries in rest}
    return found


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """Entries of g and G, float64 `[entry]`, with the relative and the least rounding of their type."""

    name: str
    dtype: torch.dtype
    """float64 if an entry is trained in it, else float32"""
    before: Tensor
    now: Tensor
    unit: Tensor
    floor: Tensor

    @classmethod
    def of(cls, parameter: Parameter, before: Tensor, now: Tensor) -> _Entries:
        g, total = (flat[parameter.slice].to(torch.float64) for flat in (before, now))
        kind = torch.finfo(parameter.dtype)
        return cls(
            name=parameter.name,
            dtype=torch.promote_types(parameter.dtype, torch.float32),
            before=g,
            now=total,
            unit=g.new_tensor(_ROUNDING_UNITS * kind.eps),
            floor=g.new_tensor(_ROUNDING_UNITS * kind.tiny * kind.eps),
        )

    @classmethod
    def together(cls, parts: Sequence[_Entries]) -> _Entries:
        before, now, unit, floor = (
            torch.cat([getattr(part, field).expand_as(part.now) for part in parts])
            for field in ("before", "now", "unit", "floor")
        )
        dtype = torch.float64 if torch.float64 in {part.dtype for part in parts} else torch.float32
        return cls(name="", dtype=dtype, before=before, now=now, unit=unit, floor=floor)

    def rescaling(self) -> tuple[float, float] | None:
        """The pair (s, c) that these entries bear out, if there is one."""
        size = self.now.abs()
        largest = float(size.max())
        if not largest:
            return 0.0, math.inf  # neither noise nor a penalty makes all entries exactly zero
        scale = self._ratio(size >= 0)
        if self.agree(scale, math.inf):
            return (scale, math.inf) if self._bear_out(size >= 0) else None
        # Clipped entries are bitwise the same size, and no other is larger.
        clipped, free = size == largest, (size < largest) & (size > 0)
        scale = self._ratio(free) if bool(free.any()) else 1.0
        return (scale, largest) if self._bear_out(free, clipped) and self.agree(scale, largest) else None

    def agree(self, scale: float, limit: float) -> bool:
        """Whether G = clamp(s·g, −c, c) up to rounding."""
        expected = (scale * self.before).clamp(-limit, limit)
        return bool(((self.now - expected).abs() <= self.unit * expected.abs() + self.floor).all())

    def _ratio(self, chosen: Tensor) -> float:
        """The s by which s·g is most often G: that of the largest entry, up to its rounding."""
        g, total = self.before[chosen], self.now[chosen]
        largest = g.abs().argmax()
        if not g[largest]:
            return 1.0
        ratio = (total[largest] / g[largest]).to(self.dtype)
        ends = (ratio, ratio.new_tensor(-math.inf), ratio.new_tensor(math.inf))
        return max(
            (float(ratio.nextafter(end)) for end in ends),
            key=lambda scale: int(((scale * g).to(self.dtype) == total).sum()),
        )

    def _bear_out(self, scaled: Tensor, clipped: Tensor | None = None) -> bool:
        """Whether parts of the entries, each of which fixes a number, have enough others, and of different sizes."""
        parts = [(scaled, _DIFFERENT)] + ([] if clipped is None else [(clipped, _DIFFERENT_CLIPPED)])
        sizes = [(self.before[part & (self.before != 0)].abs(), least) for part, least in parts]
        sizes = [(own, least) for own, least in sizes if len(own)]
        differ = any(bool(own.max() > least * own.min()) for own, least in sizes)
        bits = -math.log2(8 * float(self.unit.max()))
        return differ and sum(len(own) - 1 for own, _ in sizes) * bits >= _ENOUGH_BITS
