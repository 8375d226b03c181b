"""The adjoint sweep: contributions by the step whose gradient is credited, without per-example momentum.

From the last step down, with a_s = buffer_gain, p_s = previous_gain and b_s = gradient_gain of `LinearFilter`, and
with φ'_s = leftᵀ · φ_s · rightᵀ, which is φ_s but for optimizers with a matrix factor:
    r_s = a_s ⊙ φ'_s + C_{s+1},    C_s = retain_s ⊙ r_s + p_s ⊙ φ'_s,    ψ_s = intake_s ⊙ r_s + b_s ⊙ φ'_s
    contribution[q, k, s, l] = − ⟨ψ_s^{(l)}, g_{k,s}^{(l)}⟩
Memory is queries × D, whatever the number of examples and steps. With m_s the momentum buffer, the terms of a step sum
to
    ⟨φ_s, Δ_s⟩ + ⟨C_s, m_{s−1}⟩ − ⟨C_{s+1}, m_s⟩,
whose last two parts cancel between the steps, whatever they are rounded to, as the same number is taken twice: what
that loses is in the rounding of one step, and with the other sign in that of the next. The first part is what the
path integral measured (`path.averaged.Adjoint`). What the terms miss of that sum was lost when φ_s was put together,
and in their own arithmetic: it is rounding, and must be no more than that.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from explaind.errors import VerificationError
from explaind.path.averaged import Adjoint
from explaind.path.factored import DistrustedError
from explaind.path.products import ExampleProducts
from explaind.path.slices import dot, layer_of
from explaind.path.sources import Sources
from explaind.path.step import Step, StepTerms
from explaind.run import Run

__all__ = ["ReverseSweep"]

_SUMMED_UNITS = 1024
"""Rounding of a usual sum over examples, in units of its absolute sum."""
_LARGEST_LOSS = {torch.float64: 1e-5, torch.float32: 3e-3}
"""Of the absolute sum: more is no rounding, not even of layers that magnify it by normalising nearly equal rows."""
_CANCELLED_UNITS = 256
"""Rounding of the entries of a product that cancel, in units of their size: that of a few layers' backward pass."""
_VANISHED_UNITS = 1 << 14
"""Rounding of a gradient that is zero in exact numbers, in units of the largest: layers that normalise magnify it."""
_ARITHMETIC_UNITS = 64
"""Rounding of the sweep's own sums, in units of the product of the norms."""
_PART_ROWS = 256
"""Whose products are added up at once."""
_DECAY, _OTHER, _ROUNDING, _EXAMPLES, _HELD = range(5)


class ReverseSweep:
    """Carries r from step to step, which tells C; feed it the steps from last to first.

    Args:
        run: the run.
        products: strategy for the products with per-example gradients; None if no row is needed.
        sources: the example axis.
        num_tokens: length of the token axis, 1 without it.
        slices: the layers.
        first: the last step to be fed in; what the momentum brought there from before is accounted for.
    """

    def __init__(
        self,
        run: Run,
        *,
        products: ExampleProducts | None,
        sources: Sources,
        num_tokens: int,
        slices: list[list[slice]],
        first: int,
    ) -> None:
        self._run, self._products, self._sources, self._slices = run, products, sources, slices
        self._num_tokens, self._first = num_tokens, first
        # What belongs to no layer that was asked for has a column of its own, the last.
        layers = [layer_of(parameter, slices) for parameter in run.table]
        self._columns = torch.tensor([len(slices) if layer is None else layer for layer in layers])
        self._r = self._psi = self._seen = self._intake = self._retain = torch.empty(0)
        self._gradient_gain: Tensor | None = None
        self._ahead: Tensor | None = None
        """p_s ⊙ φ'_s of the step that was fed in last, if it is not zero."""
        self._has_psi = True
        self._held: Tensor | None = None
        """⟨C_{s+1}, m_s⟩ of the step that was fed in last, `[query, column]`."""

    def skip(self, step: Step, adjoint: Adjoint) -> Tensor:
        """Pass a step whose terms are not asked for; returns their sum `[query]`.

        Raises:
            VerificationError: φ_s, which earlier steps' terms are made of, is not what the integral measured.
        """
        adjoint.rounding(step, step.update)
        self._advance(step, adjoint.vectors)
        (held,) = sums = self._no_sums(1, adjoint.vectors)
        self._add_products(sums, self._r, _times(step.filter.retain, {0: step.buffer_before}))
        self._add_products(sums, self._seen, _times(step.filter.previous_gain, {0: step.buffer_before}))
        return self._together(adjoint, held).sum(dim=1)

    def terms(self, step: Step, adjoint: Adjoint) -> StepTerms:
        """The terms of a step, from φ_s, which of averaged weights is λ_s."""
        self._advance(step, adjoint.vectors)
        found = None if self._products is None else self._found(step)
        products = self._sums(step, adjoint.vectors)
        sums, together = products[:_HELD], self._together(adjoint, products[_HELD])
        omitted = together[:, -1]
        lost = together - sums.sum(dim=0)
        self._check_arithmetic(step, adjoint, lost, sums.abs().sum(dim=(0, 2)))
        decay, other, rounding, from_examples = (part[:, :-1] for part in sums)
        rounding = rounding + lost[:, :-1]
        contribution = from_examples[:, None, None]
        if found is not None:
            contribution, spread, weights, precision = found
            lost = from_examples - contribution.sum(dim=(1, 2))
            if self._sources.restricted:
                omitted = omitted + lost.sum(dim=1)
            else:
                check_example_sum(step, lost, spread, weights, self._slices, precision)
                rounding = rounding + lost
        if step.index == self._first and self._held is not None:
            # The buffer as it was before: it belongs to earlier steps, or to before the recording.
            brought = -self._held
            omitted = omitted + brought[:, -1]
            if self._first == 0:
                other = other + brought[:, :-1]
            else:
                omitted = omitted + brought[:, :-1].sum(dim=1)
        return StepTerms(contribution=contribution, decay=decay, other=other, rounding=rounding, omitted=omitted)

    @property
    def psi(self) -> Tensor:
        """ψ_s of the step that was fed in last, `[query, element]`.

        It is made when it is first asked for, which must be before φ_s is written over.
        """
        if not self._has_psi:
            if self._psi.shape != self._r.shape:
                self._psi = torch.empty_like(self._r)
            torch.mul(self._r, self._intake, out=self._psi)
            if self._gradient_gain is not None:
                self._psi.addcmul_(self._seen, self._gradient_gain)
            self._has_psi = True
        return self._psi

    def _advance(self, step: Step, phi: Tensor) -> None:
        """Find r_s, in the place of r_{s+1}."""
        f = step.filter
        if self._r.shape == phi.shape:
            carried = self._r.mul_(self._retain)
            self._r = carried if self._ahead is None else carried.add_(self._ahead)
        else:
            self._r = torch.zeros_like(phi)
        self._seen, self._columns = f.adjoint(phi), self._columns.to(phi.device)
        gain, self._retain, self._intake = (x.to(phi.dtype) for x in (f.buffer_gain, f.retain, f.intake))
        previous_gain, self._gradient_gain = (
            x.to(phi.dtype) if bool(x.any()) else None for x in (f.previous_gain, f.gradient_gain)
        )
        self._r.addcmul_(self._seen, gain)
        self._ahead = None if previous_gain is None else self._seen * previous_gain
        self._has_psi = False

    def _sums(self, step: Step, phi: Tensor) -> Tensor:
        """Decay, other, rounding, the examples' part, and ⟨C_s, m_{s−1}⟩, float64 `[5, query, column]`.

        As C_s and ψ_s are sums of r_s and φ'_s, their products with vectors are products of those two.
        """
        f, sums = step.filter, self._no_sums(5, phi)
        on_phi = _times(-f.decoupled_decay, {_DECAY: step.params}) | _errors(step.update_error)
        self._add_products(sums, phi, on_phi)
        on_carried = {_HELD: step.buffer_before}
        on_psi = _times(-f.coupled_decay, {_DECAY: step.params})
        on_psi |= _times(-f.sign, {_EXAMPLES: step.example_gradient_sum} | _errors(step.foreign_gradient))
        on_r = {place: -error for place, error in _errors(step.buffer_error).items()}
        self._add_products(sums, self._r, on_r, _times(f.retain, on_carried), _times(f.intake, on_psi))
        self._add_products(sums, self._seen, _times(f.previous_gain, on_carried), _times(f.gradient_gain, on_psi))
        return sums

    def _add_products(self, sums: Tensor, vectors: Tensor, *flat: Mapping[int, Tensor]) -> None:
        """Add products of `vectors [query, element]` with flat ones to `sums [place, query, column]`, at their places.

        Args:
            sums: changed in place.
            vectors: of the queries.
            flat: by place, `[element]`; of several with the same place it is their sum.
        """
        total: dict[int, Tensor] = {}
        for place, vector in itertools.chain.from_iterable(each.items() for each in flat):
            if bool(vector.any()):
                total[place] = total[place] + vector if place in total else vector
        if not total:
            return
        stacked = torch.stack([vector.to(vectors.dtype) for vector in total.values()])
        products = vectors.new_empty(len(self._run.table), len(stacked), len(vectors))
        for parameter, own in zip(self._run.table, products, strict=True):
            torch.mm(stacked[:, parameter.slice], vectors[:, parameter.slice].T, out=own)
        for place, by_parameter in zip(total, products.to(sums.dtype).unbind(dim=1), strict=True):
            sums[place].index_add_(1, self._columns, by_parameter.T)

    def _no_sums(self, number: int, like: Tensor) -> Tensor:
        return torch.zeros(number, len(like), len(self._slices) + 1, dtype=torch.float64, device=like.device)

    def _together(self, adjoint: Adjoint, held: Tensor) -> Tensor:
        """⟨φ_s, Δ_s⟩ + ⟨C_s, m_{s−1}⟩ − ⟨C_{s+1}, m_s⟩, `[query, column]`, where `held` is the second."""
        total = held.clone()
        total.index_add_(1, self._columns, adjoint.products)
        if self._held is not None:
            total -= self._held
        self._held = held
        return total

    def _check_arithmetic(self, step: Step, adjoint: Adjoint, lost: Tensor, size: Tensor) -> None:
        """The terms of a step must sum to what it did, up to the rounding of φ_s and of their own arithmetic.

        Args:
            step: the step.
            adjoint: φ_s.
            lost: what they miss of it, float64 `[query, column]`.
            size: sum of their absolute values, `[query]`.

        Raises:
            VerificationError: they do not.
        """
        unit = _ARITHMETIC_UNITS * torch.finfo(adjoint.vectors.dtype).eps
        is_unclear = ~(lost.abs().sum(dim=1) <= unit * size)
        if not bool(is_unclear.any()):
            return
        # A few vectors are copied, not most of them.
        unclear: Tensor | slice = slice(None) if 2 * int(is_unclear.sum()) > len(lost) else is_unclear
        adjoint = Adjoint(adjoint.vectors[unclear], adjoint.products[unclear])
        of_phi = adjoint.rounding(step, step.update)
        missing = lost[unclear].index_add(1, self._columns, of_phi, alpha=-1).abs().sum(dim=1)
        f, before, after, gradient = step.filter, step.buffer_before, step.buffer_after, step.gradient
        on_r = sum(vector.norm() for vector in (after, f.intake * gradient, f.retain * before))
        gained = (f.buffer_gain * after, f.previous_gain * before, f.gradient_gain * gradient)
        on_phi = sum(vector.norm() for vector in (step.update, *gained))
        size = size[unclear] + adjoint.vectors.norm(dim=1) * on_phi + self._r.norm(dim=1)[unclear] * on_r
        if not bool((missing <= unit * size).all()):
            raise VerificationError(
                f"the terms of step {step.index} miss what it did by {float((missing / size).max()):.1e} of their "
                "size, which is more than their own arithmetic was rounded."
            )

    def _found(self, step: Step) -> tuple[Tensor, Tensor, Tensor, torch.dtype]:
        """The examples' contributions and their sizes, what was multiplied with their gradients, and its precision."""
        assert self._products is not None
        while True:
            f, psi = step.filter, self.psi
            weights = psi if step.is_unscaled else psi * (f.sign * step.gradient_scale).to(psi.dtype)
            try:
                return *self._contributions(step, weights), weights, self._products.precision
            except DistrustedError:
                step.distrust()

    def _contributions(self, step: Step, weights: Tensor) -> tuple[Tensor, Tensor]:
        """−⟨w, g_k⟩ gathered by source, `[query, source, token, layer]`, and Σ_k |⟨w, g_k⟩| `[query, layer]`."""
        shape = len(weights), len(self._sources), self._num_tokens, len(self._slices)
        total = torch.zeros(shape, dtype=torch.float64, device=weights.device)
        spread = torch.zeros(shape[0], shape[3], dtype=torch.float64, device=weights.device)
        for source, products in self._row_products(step, weights):
            # Not all of them are in float64 at once.
            for places, part in zip(source.split(_PART_ROWS), products.split(_PART_ROWS, dim=1), strict=True):
                exact = part.to(torch.float64)
                total.index_add_(1, places.to(weights.device), exact, alpha=-1)
                spread += exact.abs_().sum(dim=(1, 2))
        return total, spread

    def _row_products(self, step: Step, weights: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert self._products is not None
        for number, call in enumerate(self._run.calls(step.index)):
            rows, source = self._sources.locate(call.examples)
            if len(rows):
                yield source, self._products.products(step, number, rows, weights, self._slices)


def _errors(pair: tuple[Tensor, Tensor]) -> dict[int, Tensor]:
    """A pair (other, rounding) of vectors by their places, without what is zero."""
    return {place: part for place, part in zip((_OTHER, _ROUNDING), pair, strict=True) if bool(part.any())}


def _times(factor: Tensor, vectors: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Vectors by their places, each times a factor; none if that is zero."""
    return {place: factor * vector for place, vector in vectors.items()} if bool(factor.any()) else {}


def check_example_sum(
    step: Step, lost: Tensor, spread: Tensor, weights: Tensor, slices: list[list[slice]], dtype: torch.dtype
) -> None:
    """Every step: the per-example parts must sum to the batch's gradient, up to the rounding of the training.

    Args:
        step: the step.
        lost: what they miss of the replayed gradient, `[query, layer]`.
        spread: sum of their absolute values, `[query, layer]`.
        weights: what the gradients were multiplied with, `[query, element]`.
        slices: the layers.
        dtype: type that the parts are exact to.

    Raises:
        VerificationError: they do not.
    """
    unit, trained, total = torch.finfo(dtype).eps, torch.finfo(step.recorded_dtype).eps, spread.sum(dim=1)
    usual = _SUMMED_UNITS * max(unit, trained) * total
    if bool((lost.sum(dim=1).abs() <= usual).all()):
        return
    # Where the entries of every single product cancel, its parts are nothing but their rounding.
    size = dot(weights.abs(), step.replayed_gradient.abs(), slices).sum(dim=1)
    cancelled = _CANCELLED_UNITS * unit * size + 1e-300
    if bool((lost.sum(dim=1).abs() <= usual + cancelled).all()):
        return
    # Gradients of nearly fitted examples are rounded coarsely in float32: their parts may be nearer to the exact sum.
    exact = step.exact_example_gradient_sum
    correction = dot(weights, exact - step.replayed_gradient, slices)
    missing = torch.minimum(lost.sum(dim=1).abs(), (lost - correction).sum(dim=1).abs())
    # Gradients of a batch that a normalisation maps to a constant are nothing but rounding, whatever they weigh.
    largest, noise = exact.abs().max(), _VANISHED_UNITS * unit
    vanished = (exact.abs() <= _VANISHED_UNITS * torch.finfo(torch.float64).eps * largest) & (exact != 0)
    cancelled += noise * largest * dot(weights.abs(), vanished.to(torch.float64), slices).sum(dim=1)
    if not bool((missing <= _LARGEST_LOSS.get(dtype, 3e-3) * total + cancelled).all()):
        raise VerificationError(
            f"the examples' parts of step {step.index} do not sum to its gradient (off by "
            f"{float((missing / (total + cancelled)).max()):.1e} of their absolute sum). The model couples its batch "
            "in some calls only, and not in the largest one; or it is not the model that was recorded, which "
            "run.verify() tells; or float32 is too coarse for it, and dtype=torch.float64 is not. Without 'example' in "
            "by, the steps and layers still add up."
        )
