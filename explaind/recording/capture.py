"""Hooks on the traced model that see its forward calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.calls import (
    autocast_type,
    fingerprint_output,
    map_tensors,
    model_parts,
    named_tensors,
    take_apart,
)
from explaind.errors import RecordingError
from explaind.recording.forwards import ForwardCall, check_rows
from explaind.recording.hooks import ModuleHook
from explaind.recording.host import rng_state, to_numpy
from explaind.recording.naming import NamedBatch
from explaind.recording.passes import BackwardPasses
from explaind.recording.repeated import Repeated

__all__ = ["CallCapture"]


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """What is noted just before a forward call."""

    rng_state: NDArray[np.uint8]
    fixed_version: int


class CallCapture:
    """Notes what each forward call of a model saw, and tells backward passes which of them they come through.

    Args:
        model: the model whose calls are seen.
        called: what the loop calls: the model, its compiled form, or a ModuleList or ModuleDict of what it calls.
        current_step: returns the number of finished optimizer steps.
        named: returns the batch that a call with some tensors is about; None if it has no name, or why it is not known.
        objective: whether batches stand for the calls about them.
        before_call: called before each forward pass.
        fixed_version: notes the present buffers and frozen parameters, and returns the number of that version.
        passes: takes the cotangents that come back to a call's output.
    """

    def __init__(
        self,
        model: nn.Module,
        called: nn.Module,
        *,
        current_step: Callable[[], int],
        named: Callable[[Mapping[str, Tensor]], NamedBatch | RecordingError | None],
        objective: bool,
        before_call: Callable[[], None],
        fixed_version: Callable[[], int],
        passes: BackwardPasses,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        """All parameters of the model, by name."""
        self._modules = list(model.modules())
        self._current_step = current_step
        self._named, self._objective = named, objective
        self._before_call = before_call
        self._fixed_version = fixed_version
        self._passes = passes
        self._watching = True
        self._beginnings: list[_Beginning] = []
        self._batch: tuple[Any, ForwardCall] | None = None
        self._training = Repeated(np.array)
        self._hooks = [hook for name, part in model_parts(called).items() for hook in self._watch(name, part)]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Overlook the calls made inside the block."""
        self._watching = False
        try:
            yield
        finally:
            self._watching = True

    def _watch(self, name: str, module: nn.Module) -> list[Any]:
        """See the calls of a module; returns handles whose `remove()` ends that."""
        after = self._after(name)
        compiled = module._compiled_call_impl
        if compiled is None:
            return [
                module.register_forward_pre_hook(ModuleHook(module, self._before)),
                module.register_forward_hook(ModuleHook(module, after), with_kwargs=True),
            ]

        # Hooks of a module that was compiled in place would be compiled with it: stay around it instead.
        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(module, args)
            output = compiled(*args, **kwargs)
            watched = after(module, args, kwargs, output)
            return output if watched is None else watched

        module._compiled_call_impl = call
        return [_Undo(lambda: setattr(module, "_compiled_call_impl", compiled))]

    def _before(self, module: nn.Module, args: Any) -> None:
        if self._watching and torch.is_grad_enabled():
            self._before_call()
            device = next(iter(self.parameters.values())).device
            self._beginnings.append(_Beginning(rng_state=rng_state(device), fixed_version=self._fixed_version()))

    def _after(self, part: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if not (self._watching and torch.is_grad_enabled() and self._beginnings):
                return None
            beginning = self._beginnings.pop()
            differentiable = [name for name, tensor in named_tensors(output) if tensor.requires_grad]
            if not differentiable:
                return None
            tensors, template = take_apart(args, kwargs)
            named = self._named(tensors)
            if self._objective:
                self._watch_batch(named, beginning, output)
                return None
            call = self._call(part, tensors, template, named, beginning, output)
            check_rows(call.inputs, output)

            # One output may be computed from another: a copy of each sees what came from the loss alone. And a view
            # would lose its hook if it were changed in place.
            copied = len(differentiable) > 1 or (isinstance(output, Tensor) and output._is_view())

            def watch(name: str, tensor: Tensor) -> Tensor:
                if not tensor.requires_grad:
                    return tensor
                seen = tensor.clone() if copied else tensor
                if tensor.ndim and len(tensor) == call.num_rows:
                    seen.register_hook(lambda grad: self._passes.bring(call, name, grad))
                else:
                    seen.register_hook(_refuse_output(name, tensor, call.num_rows))
                return seen

            watched = map_tensors(output, watch)
            return watched if copied else None

        return hook

    def _call(
        self,
        part: str | None,
        tensors: Mapping[str, Tensor],
        template: dict[str, Any],
        named: NamedBatch | RecordingError | None,
        beginning: _Beginning,
        output: Any,
    ) -> ForwardCall:
        if not tensors:
            raise RecordingError("the model was called without any tensor, so there are no examples to tell apart.")
        return ForwardCall(
            step=self._current_step(),
            part=part,
            inputs={name: to_numpy(tensor) for name, tensor in tensors.items()},
            input_dtypes={name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
            template=template,
            autocast=autocast_type(next(iter(tensors.values())).device),
            training=self._training([module.training for module in self._modules]),
            rng_state=beginning.rng_state,
            fixed_version=beginning.fixed_version,
            parameter_versions={n: p._version for n, p in self.parameters.items() if p.requires_grad},
            output_fingerprint=fingerprint_output(output),
            example_ids=named.ids if isinstance(named, NamedBatch) else named,
        )

    def _watch_batch(self, named: NamedBatch | RecordingError | None, beginning: _Beginning, output: Any) -> None:
        """With an objective: the batch stands for all calls about it, from the first one on."""
        if isinstance(named, RecordingError):
            raise named
        if named is None or named.batch is None:
            raise RecordingError(
                "an objective is a function of the batch, so it must be known: iterate over recorder.batches(loader), "
                "and call the model for other purposes under torch.no_grad()."
            )
        step = self._current_step()
        if self._batch is None or self._batch[0] is not named.batch or self._batch[1].step != step:
            self._batch = (named.batch, self._call(None, *take_apart((named.batch,), {}), named, beginning, output))
            check_rows(self._batch[1].inputs, None)
        call = self._batch[1]
        for _, tensor in named_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: self._passes.come_through(call))


@dataclass(frozen=True)
class _Undo:
    """Takes back a change, in the manner of a hook's handle."""

    remove: Callable[[], None]


def _refuse_output(name: str, tensor: Tensor, rows: int) -> Callable[[Tensor], None]:
    message = (
        f"the loss depends on the model's output {name!r} of shape {tuple(tensor.shape)}, which has no row for each of "
        f"the batch's {rows} examples. Compute the loss from outputs [example, …], or, if the model computes its loss "
        "itself, give explaind.trace(…, objective=) a function of (model, batch) that returns per-example losses."
    )

    def refuse(grad: Tensor) -> None:
        raise RecordingError(message)

    return refuse
