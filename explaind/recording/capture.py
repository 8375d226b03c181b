"""What each forward call of the traced model saw, and the cotangents that came back to its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.calls import (
    CallKind,
    autocast_type,
    fingerprint_output,
    map_tensors,
    model_parts,
    named_tensors,
    take_apart,
)
from explaind.errors import RecordingError
from explaind.recording.naming import NamedBatch

__all__ = ["CallCapture", "ForwardCall"]


@dataclass(eq=False, kw_only=True)
class ForwardCall:
    """One forward call with gradients enabled; with an objective, all calls about one batch."""

    step: int
    """Number of optimizer steps that were finished when it ran."""
    part: str | None
    """Name of the module that was called, `""` for the model itself; None where an objective stands for it."""
    inputs: dict[str, NDArray[Any]]
    """Its tensors `[row, …]` by name, see `explaind.calls.take_apart`."""
    input_dtypes: dict[str, str]
    """Their types, as some widen when they are stored."""
    template: dict[str, Any]
    """Its arguments without the tensors."""
    autocast: str | None
    """The type that autocast lowered to, None if it was off."""
    training: NDArray[np.bool_]
    """`module.training` of every module, in the order of `model.modules()`."""
    rng_state: NDArray[np.uint8]
    """State of the random number generators just before it, `[byte]`."""
    fixed_version: int
    """Which version of the buffers and frozen parameters it began with."""
    parameter_versions: dict[str, int]
    """How often each parameter that requires gradients had been changed in place, by name."""
    output_fingerprint: Tensor
    """Norm and sum of its output, `[2]`: tells whether a replay is of the same model."""
    example_ids: Sequence[int] | NDArray[np.int64] | RecordingError | None
    """Names given to its rows by the user, if any, or why they are not known."""
    reached: frozenset[str] | None = None
    """Names of the parameters whose gradients it entered; None if all that it depends on."""
    output_grads: dict[str, Tensor] = field(default_factory=dict)
    """∂L/∂f of each output tensor that the loss depends on, summed over the backward passes that made the step's
    gradient, `[row, …]`; empty before the step, and with an objective."""

    @property
    def kind(self) -> CallKind:
        """What it has in common with other calls."""
        return CallKind(
            part=self.part, template=self.template, outputs=tuple(self.output_grads), autocast=self.autocast
        )

    @property
    def num_rows(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))

    def first_changed(self, parameters: Mapping[str, Tensor]) -> str | None:
        """Name of the first of the model's parameters that has been changed since, if one has."""
        versions = self.parameter_versions.items()
        return next((name for name, version in versions if parameters[name]._version != version), None)


@dataclass(frozen=True, kw_only=True)
class _Beginning:
    """What is noted just before a forward call."""

    rng_state: NDArray[np.uint8]
    fixed_version: int


class CallCapture:
    """Forward and tensor hooks on a model; hands over the calls that the loss of the current step came through.

    Args:
        model: the model whose calls are seen.
        called: what the loop calls: the model, its compiled form, or a ModuleList or ModuleDict of what it calls.
        current_step: returns the number of finished optimizer steps.
        named: returns the batch that a call with some tensors is about; None if it has no name, or why it is not known.
        objective: whether batches stand for the calls about them.
        before_call: called before each forward pass.
        fixed_version: notes the present buffers and frozen parameters, and returns the number of that version.
        gradients_cleared: tells whether all parameters' gradients are None or zero.
        arrival: called in a backward pass when the first gradient comes in, with the names of the parameters whose
            gradients do, as far as the pass has got.
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
        gradients_cleared: Callable[[], bool],
        arrival: Callable[[set[str]], None],
    ) -> None:
        self.parameters = dict(model.named_parameters())
        """All parameters of the model, by name."""
        self._modules = list(model.modules())
        self._current_step = current_step
        self._named, self._objective = named, objective
        self._before_call = before_call
        self._fixed_version = fixed_version
        self._gradients_cleared, self._arrival = gradients_cleared, arrival
        self._passes: dict[int, dict[ForwardCall, dict[str, Tensor]]] = {}
        self._reached: dict[int, set[str]] = {}
        self._watching = True
        self._beginnings: list[_Beginning] = []
        self._batch: tuple[Any, ForwardCall] | None = None
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
        self._passes, self._batch = {}, None
        self._reached.clear()
        return list(calls.values())

    def settle(self, name: str) -> None:
        """Called when a parameter's gradient has come in: the present backward pass counts, and reached it."""
        task = _backward_pass()
        names = self._reached.get(task)
        if names is None:
            names = self._reached[task] = set()
            self._arrival(names)
        names.add(name)

    def _watch(self, name: str, module: nn.Module) -> list[Any]:
        """See the calls of a module; returns handles whose `remove()` ends that."""
        after = self._after(name)
        compiled = module._compiled_call_impl
        if compiled is None:
            return [
                module.register_forward_pre_hook(self._before),
                module.register_forward_hook(after, with_kwargs=True),
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
                    seen.register_hook(lambda grad: self._receive(call, name, grad))
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
            training=np.array([module.training for module in self._modules]),
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
        if self._batch is None or self._batch[0] is not named.batch:
            self._batch = (named.batch, self._call(None, *take_apart((named.batch,), {}), named, beginning, output))
            check_rows(self._batch[1].inputs, None)
        call = self._batch[1]

        def note(grad: Tensor) -> None:
            self._pass().setdefault(call, {})

        for _, tensor in named_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(note)

    def _receive(self, call: ForwardCall, name: str, grad: Tensor) -> None:
        self._pass().setdefault(call, {})[name] = grad.detach().clone()

    def _pass(self) -> dict[ForwardCall, dict[str, Tensor]]:
        """What the present backward pass has brought so far."""
        task = _backward_pass()
        if task not in self._passes and self._reached and self._gradients_cleared():
            # zero_grad() was called since: what came before is in no gradient any more.
            self._passes = {known: calls for known, calls in self._passes.items() if known not in self._reached}
            self._reached.clear()
        return self._passes.setdefault(task, {})


@dataclass(frozen=True)
class _Undo:
    """Takes back a change, in the manner of a hook's handle."""

    remove: Callable[[], None]


def _backward_pass() -> int:
    """A number that tells backward passes apart, from within their hooks."""
    return int(torch._C._current_graph_task_id())


def _refuse_output(name: str, tensor: Tensor, rows: int) -> Callable[[Tensor], None]:
    message = (
        f"the loss depends on the model's output {name!r} of shape {tuple(tensor.shape)}, which has no row for each of "
        f"the batch's {rows} examples. Compute the loss from outputs [example, …], or, if the model computes its loss "
        "itself, give explaind.trace(…, objective=) a function of (model, batch) that returns per-example losses."
    )

    def refuse(grad: Tensor) -> None:
        raise RecordingError(message)

    return refuse


def check_rows(inputs: Mapping[str, NDArray[Any]], output: Any) -> None:
    """All tensors of a call must have the examples along their first axis.

    Raises:
        RecordingError: they do not.
    """
    shapes = {f"input '{name}'": rows.shape for name, rows in inputs.items()}
    if isinstance(output, Tensor):
        shapes = {"output": tuple(output.shape), **shapes}
    first = next(iter(shapes))
    for name, shape in shapes.items():
        if not shape or shape[:1] != shapes[first][:1]:
            raise RecordingError(
                f"the examples of a batch cannot be told apart: the model's {name} has shape {shape} and its {first} "
                f"{shapes[first]}. All must have the examples along their first axis; keep what is shared by all "
                "examples as a buffer of the model."
            )


def to_numpy(tensor: Tensor, *, copy: bool = True) -> NDArray[Any]:
    """A tensor on the host, where it need not be copied only if nothing else changes it.

    bfloat16 and float16 widen, exactly, to float32.

    Raises:
        RecordingError: the tensor is complex.
    """
    if tensor.is_complex():
        raise RecordingError("complex tensors are not supported; use a pair of real ones.")
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array: NDArray[Any] = tensor.detach().cpu().numpy()
    return array.copy() if copy else array


def rng_state(device: torch.device) -> NDArray[np.uint8]:
    """State of the host's generator, followed by that of the device if it has its own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return np.concatenate([state.numpy() for state in states])
