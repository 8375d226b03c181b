"""Evaluating a module with other parameters than its own, in a given mode, and leaving it as it was."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from explaind.calls import CallKind, named_tensors, rebuild
from explaind.errors import RecordingError

__all__ = [
    "Forward",
    "call_function",
    "cast",
    "dense",
    "exchanged",
    "modes",
    "restored_rng",
    "sparse_weights",
    "vectorizable",
]

_CONVERSIONS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_NO_CHECKPOINTS = (
    "the model computes activations again in the backward pass (torch.utils.checkpoint), or hooks into saved tensors "
    "otherwise. Open the run with a model that has this switched off: what it computes is the same."
)


class Forward:
    """A recorded call as a function f(x; θ) of its tensors and of the model's.

    Args:
        model: the module; it is left as it was.
        kind: how it was called.
        objective: what was evaluated in place of the module, where the kind says so.
    """

    def __init__(
        self, model: nn.Module, kind: CallKind, objective: Callable[[nn.Module, Any], Tensor] | None = None
    ) -> None:
        self.model = model
        """The module."""
        self._kind, self._objective = kind, objective

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The output tensors by name; of an objective the per-example losses, named `""`.

        Args:
            tensors: parameters and buffers to use in place of the model's own of those names.
            inputs: the call's tensors by name.
        """
        return self.named(self.raw(tensors, inputs))

    def raw(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Any:
        """The output as the function returns it."""
        return call_function(self._function, self.model, tensors, *rebuild(self._kind.template, inputs))

    def named(self, output: Any) -> dict[str, Tensor]:
        """The output's tensors that cotangents are known for."""
        found = dict(named_tensors(output))
        return found if self._kind.part is None else {name: found[name] for name in self._kind.outputs}

    def loss_terms(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the backward pass of the batch starts from: the outputs, or the sum of an objective's losses."""
        return dict(outputs) if self._kind.part is not None else {"": self.scalar(outputs, {})}

    def scalar(self, outputs: Mapping[str, Tensor], output_grads: Mapping[str, Tensor]) -> Tensor:
        """Σ ⟨c, f⟩ over all outputs, whose gradient is that of the loss; an objective's losses count by themselves."""
        if self._kind.part is None:
            return outputs[""].sum()
        return torch.stack([(tensor * output_grads[name]).sum() for name, tensor in outputs.items()]).sum()

    def _function(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._kind.part is not None:
            return model.get_submodule(self._kind.part)(*args, **kwargs)
        if self._objective is None:
            raise ValueError(
                "the run was recorded with an objective, which only code can compute: open it with "
                "explaind.open_run(path, model=…, objective=…), the function that explaind.trace was given."
            )
        losses = self._objective(model, *args)
        rows = len(next(iter(self._rows(args))))
        if not isinstance(losses, Tensor) or losses.ndim not in (1, 2) or len(losses) != rows:
            got = f"a tensor of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise RecordingError(
                f"the objective must return the losses of a batch's {rows} examples, a tensor [example] or "
                f"[example, token], whose sum is the loss; it returned {got}."
            )
        return losses

    @staticmethod
    def _rows(args: tuple[Any, ...]) -> Iterator[Tensor]:
        return (tensor for _, tensor in named_tensors(args))


def call_function(
    function: Callable[..., Any],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """`function(model, *args, **kwargs)` with `tensors` in place of the model's parameters and buffers.

    Raises:
        RecordingError: it would be computed again in the backward pass, when the model has its own tensors back.
    """
    own = {parameter.dtype for parameter in model.parameters()}
    used = max((t.dtype for t in tensors.values() if t.is_floating_point()), key=lambda t: t.itemsize, default=None)
    widened = _Widened(used) if used is not None and used not in own else nullcontext()
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(_NO_CHECKPOINTS), widened, exchanged(model, tensors):
            return function(model, *args, **kwargs)
    except RuntimeError as error:
        if str(error) == _NO_CHECKPOINTS:
            raise RecordingError(_NO_CHECKPOINTS) from None
        raise


@contextmanager
def exchanged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of the model's own inside the block, under every name that these have.

    A small call of `torch.func.functional_call` takes several times as long, and of modules that are used twice it puts
    the wrong tensors back.
    """
    own = {
        f"{path}.{name}" if path else name: (store, name, tensor)
        for path, module in model.named_modules(remove_duplicate=False)
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
    }
    instead = {id(own[name][-1]): tensor for name, tensor in tensors.items()}
    before = [(store, name, tensor) for store, name, tensor in own.values() if id(tensor) in instead]
    try:
        for store, name, tensor in before:
            store[name] = instead[id(tensor)]
        yield
    finally:
        for store, name, tensor in before:
            store[name] = tensor


class _Widened(TorchFunctionMode):
    """Conversions to narrower floating-point types, as in `x.float() / 255`, convert to the type of the computation."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        self._default = torch.get_default_dtype()

    def __enter__(self) -> Self:
        torch.set_default_dtype(self._dtype)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._default)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _CONVERSIONS:
            return args[0].to(self._dtype)
        return function(*map(self._widen, args), **{name: self._widen(arg) for name, arg in (kwargs or {}).items()})

    def _widen(self, argument: Any) -> Any:
        narrow = isinstance(argument, torch.dtype) and argument.is_floating_point
        return self._dtype if narrow and argument.itemsize < self._dtype.itemsize else argument


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Floating-point tensors in another type, all on one device."""
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }


@contextmanager
def modes(model: nn.Module, training: Iterable[bool] | bool) -> Iterator[None]:
    """Set `module.training` of every module inside the block, where compiled modules run as plain Python."""
    modules = list(model.modules())
    flags = [training] * len(modules) if isinstance(training, bool) else [bool(flag) for flag in training]
    others = [(module, flag) for module, flag in zip(modules, flags, strict=True) if module.training != flag]
    compiled = any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in modules)
    try:
        for module, flag in others:
            module.training = flag
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        for module, flag in others:
            module.training = not flag


def dense(gradient: Tensor) -> Tensor:
    """The gradient with all its entries, where that of an embedding may have only the rows that were looked up."""
    # A row that was looked up twice is there twice; its sum is taken as torch.optim takes it.
    return gradient.coalesce().to_dense() if gradient.is_sparse else gradient


def sparse_weights(model: nn.Module) -> set[str]:
    """Names of the parameters that have sparse gradients, as the embeddings that they belong to were made so."""
    weights = {id(module.weight) for module in _sparse_embeddings(model)}
    return {name for name, parameter in model.named_parameters() if id(parameter) in weights}


def _sparse_embeddings(model: nn.Module) -> list[nn.Embedding | nn.EmbeddingBag]:
    return [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]


@contextmanager
def vectorizable(model: nn.Module) -> Iterator[None]:
    """Attention by its defining operations, and dense gradients of embeddings, inside the block.

    Fused kernels and sparse tensors can be neither vectorised nor differentiated twice. What vmap cannot vectorise it
    loops over, which is of no interest to a user and not warned about.
    """
    fused, sparse = torch.backends.mha.get_fastpath_enabled(), _sparse_embeddings(model)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module in sparse:
            module.sparse = False
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module in sparse:
            module.sparse = True


@contextmanager
def restored_rng(state: NDArray[np.uint8], device: torch.device) -> Iterator[None]:
    """Set the random number generators to a recorded state inside the block, and back after it."""
    host = torch.get_rng_state().numel()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(torch.from_numpy(state[:host].copy()))
        if device.type == "cuda" and len(state) > host:
            torch.cuda.set_rng_state(torch.from_numpy(state[host:].copy()), device)
        yield
