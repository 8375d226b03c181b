"""The path that the explained weights took, and what an update of the trained weights meant for it.

For the weights themselves that is θ_0 … θ_S. For averaged ones it is avg_0 … avg_S,
    avg_{s+1} = k_s avg_s + (1 − k_s) θ_{s+1},    avg_0 = θ_0,
whose segments hold all earlier updates: with the lag E_s = θ_{s+1} − avg_s = Δ_s + k_{s−1} E_{s−1},
    avg_{s+1} − avg_s = (1 − k_s) E_s.
With φ_s the average of ∇q over that segment, swapping the sums gives each update its own adjoint,
    q(avg_S) − q(θ_0) = Σ_s ⟨φ_s, avg_{s+1} − avg_s⟩ = Σ_s ⟨λ_s, Δ_s⟩,    λ_s = (1 − k_s) φ_s + k_s λ_{s+1}.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Protocol

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from explaind.averages import Average
from explaind.errors import VerificationError
from explaind.path.slices import dot
from explaind.path.step import Step
from explaind.recording.fixed import fixed_tensors
from explaind.run import Run

__all__ = ["Adjoint", "AveragedWeights", "ExplainedPath", "LastWeights", "explained_path"]

_LARGEST_ROUNDING = 1e-3
"""A model that differs from its average by more than this part of the weights was averaged otherwise."""
_LARGEST_LOSS, _LOST_UNITS = 1e-3, 1024
"""Rounding of average gradients: of their products with the update, and units of the product of the norms."""


@dataclass(frozen=True)
class Adjoint:
    """λ_s of some queries."""

    vectors: Tensor
    """`[query, element]`"""
    products: Tensor
    """⟨λ_s, Δ_s⟩ by parameter, float64 `[query, parameter]`; if λ_s is φ_s, as the integral found them, before its
    gradients were put together."""

    @classmethod
    def of(cls, vectors: Tensor, step: Step) -> Adjoint:
        """With the vectors' own products."""
        return cls(vectors, dot(vectors, step.update, [[parameter.slice] for parameter in step.table]))

    def rounding(self, step: Step, move: Tensor) -> Tensor:
        """What the vectors' own products miss of these, as they were rounded when they were put together.

        Args:
            step: the step.
            move: what they are multiplied with, `[element]`.

        Returns:
            By parameter, float64 `[query, parameter]`.

        Raises:
            VerificationError: it is more than rounding may take.
        """
        lost = self.products - dot(self.vectors, move, [[parameter.slice] for parameter in step.table])
        unit = _LOST_UNITS * torch.finfo(self.vectors.dtype).eps
        size = self.vectors.norm(dim=1) * move.norm()
        missing, limit = lost.abs().sum(dim=1), _LARGEST_LOSS * self.products.abs().sum(dim=1) + unit * size
        if not bool((missing <= limit).all()):
            raise VerificationError(
                f"the average gradients of step {step.index} have lost {float((missing / limit).max()):.0e} times what "
                "rounding may take when they were put together."
            )
        return lost


class ExplainedPath(Protocol):
    """Points p_0 … p_S that the path integral runs along; all vectors are float64 `[element]`."""

    name: str
    """How the explained weights are called in a result's attributes."""
    averaged: bool
    """Whether an update of the trained weights also moves later segments of the path."""
    fixed: dict[str, Tensor]
    """Buffers and frozen parameters to evaluate queries with, by name."""

    def points(self) -> Iterator[Tensor]:
        """p_0 … p_S."""
        ...

    def segment(self, step: Step) -> tuple[Tensor, Tensor]:
        """p_s and p_{s+1} − p_s."""
        ...

    def moves(self, step: int) -> bool:
        """Whether p_{s+1} differs from p_s."""
        ...

    def adjoint(self, step: int, phi: Tensor) -> Tensor:
        """λ_s from φ_s, `[query, element]`; of averaged weights, from the last step to the first."""
        ...

    def lead(self, step: Step) -> Tensor:
        """θ_s − p_s: what updates before step s will still do to the path; λ_s tells how much that is."""
        ...


class LastWeights:
    """The trained weights themselves: p_s = θ_s, λ_s = φ_s."""

    name = "last"
    averaged = False

    def __init__(self, run: Run, device: torch.device) -> None:
        self._run, self._device = run, device
        self.fixed = run.fixed(run.num_steps)

    def points(self) -> Iterator[Tensor]:
        """θ_0 … θ_S."""
        return (_load(self._run, step, self._device) for step in range(self._run.num_steps + 1))

    def segment(self, step: Step) -> tuple[Tensor, Tensor]:
        """θ_s and Δ_s."""
        return step.params, step.update

    def moves(self, step: int) -> bool:
        """Always."""
        return True

    def adjoint(self, step: int, phi: Tensor) -> Tensor:
        """φ_s."""
        return phi

    def lead(self, step: Step) -> Tensor:
        """Nothing."""
        return torch.zeros_like(step.params)


class AveragedWeights:
    """A running average of the trained weights: p_s = avg_s.

    An average cannot be run backward, so about √S of its points are kept, and the segments between are recomputed.

    Raises:
        ValueError: the average never starts, is not that of `average.model`, or needs one to know frozen parameters.
    """

    averaged = True

    def __init__(self, run: Run, average: Average, device: torch.device) -> None:
        self._run, self._device = run, device
        self.name = average.name
        self._kept = average.schedule(run.num_steps)
        self._stride = max(1, isqrt(run.num_steps))
        self._marks = {0: _load(run, 0, device)}
        self._first, self._stretch = -1, list[Tensor]()
        self._carried: Tensor | float = 0.0
        for first in range(0, run.num_steps, self._stride):
            stretch = self._roll(first)
            self._marks[first + len(stretch) - 1] = stretch[-1]
        if average.model is None:
            check_frozen(run, average)
            # What AveragedModel copied with its last update, if that came right after the step.
            self.fixed = run.fixed(average.updates(run.num_steps)[-1])
        else:
            module = average.model.module if isinstance(average.model, AveragedModel) else average.model
            module = getattr(module, "_orig_mod", module)  # of a compiled model the one that it was made of
            check_average(run, average, module, self._marks[run.num_steps])
            self.fixed = fixed_tensors(module, run.table.names)

    def _roll(self, first: int) -> list[Tensor]:
        """avg_s from one mark to the next, both included."""
        points = [self._marks[first]]
        for step in range(first, min(first + self._stride, self._run.num_steps)):
            keep = self._kept[step]
            new = keep * points[-1] + (1 - keep) * _load(self._run, step + 1, self._device) if keep < 1 else points[-1]
            points.append(new)
        return points

    def points(self) -> Iterator[Tensor]:
        """avg_0 … avg_S."""
        for first in range(0, self._run.num_steps, self._stride):
            yield from self._roll(first)[:-1]
        yield self._marks[self._run.num_steps]

    def segment(self, step: Step) -> tuple[Tensor, Tensor]:
        """avg_s and (1 − k_s) E_s."""
        place = step.index % self._stride
        if step.index - place != self._first:
            self._first = step.index - place
            self._stretch = self._roll(self._first)
        start, stop = self._stretch[place : place + 2]
        return start, stop - start

    def moves(self, step: int) -> bool:
        """Whether the average is updated."""
        return self._kept[step] < 1

    def adjoint(self, step: int, phi: Tensor) -> Tensor:
        """(1 − k_s) φ_s + k_s λ_{s+1}, in float64: what this sum lost would be in no term."""
        keep = self._kept[step]
        self._carried = (1 - keep) * phi.to(torch.float64) + keep * self._carried
        return self._carried

    def lead(self, step: Step) -> Tensor:
        """θ_s − avg_s."""
        return step.params - self.segment(step)[0]


def explained_path(run: Run, average: Average | None, device: torch.device) -> ExplainedPath:
    """The path of the trained weights, or of their average."""
    return LastWeights(run, device) if average is None else AveragedWeights(run, average, device)


def check_frozen(run: Run, average: Average) -> None:
    """The average of parameters that another optimizer moves is not known.

    Raises:
        ValueError: there are some.
    """
    before, after = run.fixed(0), run.fixed(run.num_steps)
    for name, _ in run.model.named_parameters():
        if name in after and not torch.equal(before[name], after[name]):
            raise ValueError(
                f"the parameter '{name}' changed without the traced optimizer, so its average is not known. Give the "
                f"averaged model: {average.name} with model=…."
            )


def check_average(run: Run, average: Average, module: torch.nn.Module, computed: Tensor) -> None:
    """The module's parameters must be the average of the recorded weights, up to its own rounding.

    Raises:
        ValueError: they are not, or it is another model.
    """
    params = dict(module.named_parameters())
    roundings = 0.0  # of all updates, as much of them as later ones keep
    for keep in average.schedule(run.num_steps):
        roundings = keep * roundings + (keep < 1)
    expected = run.table.unflatten(computed)
    fixed = run.fixed(run.num_steps)
    given = {name: tuple(tensor.shape) for name, tensor in (params | fixed_tensors(module, run.table.names)).items()}
    for name, tensor in (expected | fixed).items():
        if given.get(name) != tuple(tensor.shape):
            raise ValueError(
                f"the averaged model has {f'{name!r} of shape {given[name]}' if name in given else f'no {name!r}'}; "
                f"the run has it with shape {tuple(tensor.shape)}."
            )
    for name, tensor in expected.items():
        unit = 2 * torch.finfo(params[name].dtype).eps
        part = min(unit * roundings, max(unit, _LARGEST_ROUNDING))
        error = float((params[name].detach().to(tensor) - tensor).abs().max())
        limit = part * float(tensor.abs().max())
        if not error <= limit:
            raise ValueError(
                f"the averaged model's '{name}' differs from {average.name} of the recorded weights by {error:.1e}, "
                f"rounding explains {limit:.1e}. Is it started after step {average.start} (the first call of "
                f"update_parameters) and updated every {average.every} steps?"
            )


def _load(run: Run, step: int, device: torch.device) -> Tensor:
    return run.flat_params(step).to(device=device, dtype=torch.float64)
