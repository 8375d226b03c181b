"""Averaged weights, to be explained in place of the last ones: q(avg_S) for q(θ_S).

With θ_{s+1} the weights after step s, and k_s what an update of the average keeps of it,
    avg_{s+1} = k_s avg_s + (1 − k_s) θ_{s+1}.
Nothing of this is recorded: the average is a function of the recorded weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

__all__ = ["Average", "ema", "swa"]


@dataclass(frozen=True, kw_only=True)
class Average:
    """A running average as `torch.optim.swa_utils.AveragedModel` computes it; its first update copies the weights.

    Raises:
        ValueError: no step is `start`, or no number of steps is `every`.
    """

    name: str
    """How it is called in a result's attributes."""
    keep: Callable[[int], float] = field(repr=False)
    """k of an update, from the number n ≥ 1 of updates before it (torch's `num_averaged`)."""
    start: int = 0
    """The step after which `update_parameters` was first called."""
    every: int = 1
    """Number of steps from one update to the next."""
    model: nn.Module | None = field(default=None, repr=False)
    """The averaged model itself, if its parameters are to be compared and its buffers to be used."""

    def __post_init__(self) -> None:
        if self.start < 0 or self.every < 1:
            raise ValueError(
                "an average starts after a step from 0 on and is updated every 1 or more steps; got "
                f"start={self.start}, every={self.every}."
            )
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise TypeError(f"model must be the averaged torch.nn.Module; got {self.model!r}.")

    def updates(self, num_steps: int) -> range:
        """The steps after which the average is updated.

        Raises:
            ValueError: it is never updated in so many steps.
        """
        if self.start >= num_steps:
            raise ValueError(
                f"the average starts after step {self.start}, but the run has only the steps 0 to {num_steps - 1}."
            )
        return range(self.start, num_steps, self.every)

    def schedule(self, num_steps: int) -> list[float]:
        """k_s of every step, `[step]`.

        It is 1 where the average is not updated; up to the first update it is 0: as that one copies the weights,
        nothing before it matters to the average, and the path to it is the weights' own.

        Example:
            >>> swa(start=1, every=2).schedule(7)
            [0.0, 0.0, 1.0, 0.5, 1.0, 0.6666666666666666, 1.0]
        """
        kept = [0.0] * self.start + [1.0] * (num_steps - self.start)
        for count, step in enumerate(self.updates(num_steps)):
            kept[step] = float(self.keep(count)) if count else 0.0
            if not 0 <= kept[step] <= 1:
                raise ValueError(f"an average keeps a part between 0 and 1 of itself; {self.name} keeps {kept[step]}.")
        return kept


def ema(decay: float, *, start: int = 0, every: int = 1, model: nn.Module | None = None) -> Average:
    """Exponential moving average: k = decay, as of `get_ema_multi_avg_fn(decay)`.

    Args:
        decay: what an update keeps of the average, between 0 and 1.
        start: the step, counted from 0, after which `update_parameters` was first called; it copied the weights.
        every: number of steps from one update to the next.
        model: the averaged model, to compare its parameters with the average and to take its buffers.

    Example:
        >>> ema(0.9).schedule(3)
        [0.0, 0.9, 0.9]
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be between 0 and 1, got {decay}.")
    return Average(name=f"ema({decay})", keep=lambda _: decay, start=start, every=every, model=model)


def swa(*, start: int = 0, every: int = 1, model: nn.Module | None = None) -> Average:
    """Stochastic weight averaging, the mean of all weights so far: k = n / (n + 1) after n updates.

    Args:
        start: the step, counted from 0, after which `update_parameters` was first called.
        every: number of steps from one update to the next: those of an epoch, if it was called at the end of each.
        model: the averaged model, to compare its parameters with the average and to take its buffers, which
            `update_bn` computed.

    Example:
        >>> swa().schedule(3)
        [0.0, 0.5, 0.6666666666666666]
    """
    return Average(name="swa", keep=lambda count: count / (count + 1), start=start, every=every, model=model)
