"""Which forward calls the gradients of a step came through: backward passes, and what each brought and reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from explaind.recording.forwards import ForwardCall
from explaind.recording.memory import CopyMemory

__all__ = ["BackwardPasses"]


class BackwardPasses:
    """Gathers the cotangents of forward calls, pass by pass; its methods are called from within backward passes.

    Args:
        gradients_cleared: tells whether all parameters' gradients are None or zero.
        arrival: called when the first gradient of a pass comes in, with the names of the parameters whose gradients
            do, as far as the pass has got.
    """

    def __init__(self, *, gradients_cleared: Callable[[], bool], arrival: Callable[[set[str]], None]) -> None:
        self._gradients_cleared, self._arrival = gradients_cleared, arrival
        self._passes: dict[int, dict[ForwardCall, dict[str, Tensor]]] = {}
        self._reached: dict[int, set[str]] = {}
        self._memory = CopyMemory()

    def bring(self, call: ForwardCall, name: str, grad: Tensor) -> None:
        """The present pass has the cotangent of an output of a call."""
        self._present().setdefault(call, {})[name] = self._memory.copy(grad)

    def come_through(self, call: ForwardCall) -> None:
        """The present pass comes through a call whose cotangents are not kept."""
        self._present().setdefault(call, {})

    def reach(self, name: str) -> None:
        """The present pass counts, as a parameter's gradient has come in."""
        task = _number()
        names = self._reached.get(task)
        if names is None:
            names = self._reached[task] = set()
            self._arrival(names)
        names.add(name)

    def take(self) -> list[ForwardCall]:
        """The calls whose cotangents are in the parameters' gradients, in the order in which those came."""
        # A pass that reached no parameter's .grad only looked (torch.autograd.grad), unless none did: then the
        # gradients were put there by hand.
        counted = [task for task in self._passes if task in self._reached] or list(self._passes)
        # Parameters may be frozen for one pass and not for another: then a call is one with either.
        calls: dict[tuple[ForwardCall, frozenset[str] | None], ForwardCall] = {}
        for task in counted:
            reached = frozenset(self._reached[task]) if task in self._reached else None
            for call, grads in self._passes[task].items():
                part = calls.setdefault((call, reached), replace(call, output_grads={}, reached=reached))
                for name, grad in grads.items():
                    known = part.output_grads.get(name)
                    part.output_grads[name] = grad if known is None else known + grad
        self._passes = {}
        self._reached.clear()
        return list(calls.values())

    def _present(self) -> dict[ForwardCall, dict[str, Tensor]]:
        """What the present pass has brought so far."""
        task = _number()
        if task not in self._passes and self._reached and self._gradients_cleared():
            # zero_grad() was called since: what came before is in no gradient any more.
            self._passes = {known: calls for known, calls in self._passes.items() if known not in self._reached}
            self._reached.clear()
        return self._passes.setdefault(task, {})


def _number() -> int:
    """A number that tells backward passes apart."""
    return int(torch._C._current_graph_task_id())
