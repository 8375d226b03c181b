"""The exact path kernel: as matrices between predictions and examples, and as the kernel machine that they make up.

For every output f of the trained network (Bell et al. 2023, arXiv 2308.00824; ExPLAIND, arXiv 2505.20076)
    f(x; θ_S) = f(x; θ_0) − Σ_s Σ_k ⟨φ_s(x), φ_{k,s}⟩ + what weight decay, other causes and rounding did,
with the average gradient φ_s(x) of the output along update s, and what example k brought to the update, φ_{k,s}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Unpack

import torch
import xarray as xr
from torch import Tensor

from explaind.agreement import argmax_agreement, mean_kl
from explaind.attribution import TERMS, Attribution
from explaind.calls import map_tensors
from explaind.outputs import Output
from explaind.path.inputs import QueryInputs
from explaind.query import Query
from explaind.request import KernelSettings, PathSettings
from explaind.run import Run

__all__ = ["KernelFit", "PathKernelModel", "path_kernel"]


def path_kernel(
    run: Run,
    query: Query,
    examples: Sequence[int] | None = None,
    *,
    by: Sequence[str],
    **settings: Unpack[KernelSettings],
) -> xr.DataArray:
    """See `explaind.Run.kernel`."""
    result = run.attribute(query, by=by, examples=examples, **settings)
    closure = result.check()
    kernel: xr.DataArray = result.dataset.contribution.rename("kernel")
    kernel.attrs |= {"unit": result.dataset.attrs["output"], "closure": str(closure)}
    return kernel


@dataclass(frozen=True, kw_only=True)
class KernelFit:
    """How far the kernel machine is from the network, over the outputs of some inputs."""

    num_inputs: int
    """Inputs that were compared."""
    mean_error: float
    """Mean |machine − network|, in the unit of the model's output."""
    max_error: float
    """Largest |machine − network|."""
    argmax_agreement: float
    """Part of the inputs whose largest output is the same one."""
    kl: float
    """Mean KL divergence of the machine's softmax from the network's, in nats."""

    def __str__(self) -> str:
        return (
            f"{self.num_inputs} inputs: error {self.mean_error:.1e} on average, {self.max_error:.1e} at most; argmax "
            f"agrees on {self.argmax_agreement:.1%}; KL {self.kl:.1e} nats"
        )


class PathKernelModel:
    """The kernel machine that training made: calling it computes every output of the network as the sum over its path.

    Nothing of the trained network's forward pass enters a prediction but gradients; the two differ by the error of the
    path integral. The sum over examples is taken before the products, ⟨φ, Σ_k φ_k⟩; `attribute` tells examples apart.

    Args:
        run: opened with its model.
        part: which tensor of the model's output, if it returns several; see `explaind.outputs.Output.of`.
        progress: show a progress bar.
        settings: `tolerance`, `quadrature`, `dtype`, `device` or `memory` of `Run.attribute`.

    Raises:
        TypeError: there is no such setting; a machine of some steps, examples or layers would not be the network.

    Example:
        >>> model, x = torch.nn.Linear(2, 3), torch.eye(2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with explaind.trace(model, optimizer, store):
        ...     for _ in range(3):
        ...         optimizer.zero_grad()
        ...         model(x).square().sum().backward()
        ...         optimizer.step()
        >>> machine = explaind.PathKernelModel(explaind.open_run(store, model=model), tolerance=1e-4)
        >>> torch.allclose(machine(x), model(x).double(), atol=1e-3)
        True
    """

    def __init__(
        self, run: Run, *, part: str | int = "", progress: bool = False, **settings: Unpack[PathSettings]
    ) -> None:
        if strange := sorted(set(settings) - set(PathSettings.__annotations__)):
            known = ", ".join(PathSettings.__annotations__)
            raise TypeError(
                f"a kernel machine is of the whole run; it has no setting {strange[0]!r}, but part, progress, {known}."
            )
        self._run, self._part, self._settings, self._progress = run, str(part), settings, progress

    def __call__(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Tensor:
        """Predict, `[input, *output]`, float64.

        Raises:
            ClosureError: the path integral is less accurate than `tolerance`.
        """
        return self._predict(inputs)[0]

    def compare(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> KernelFit:
        """Predict, and measure how far that is from the network's own outputs."""
        machine, network = (values.reshape(len(values), -1) for values in self._predict(inputs))
        error = (machine - network).abs()
        return KernelFit(
            num_inputs=len(machine),
            mean_error=float(error.mean()),
            max_error=float(error.max()),
            argmax_agreement=argmax_agreement(network, machine),
            kl=mean_kl(network, machine),
        )

    def attribute(
        self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any], *, by: Sequence[str] = ("query", "example")
    ) -> Attribution:
        """The terms of every output, with queries named `input:output`; see `Run.attribute`."""
        return self._run.attribute(self._query(inputs)[0], by=by, progress=self._progress, **self._settings)

    def _predict(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """What the sum over the path is, and what the network gives, `[input, *output]` each."""
        query, shape = self._query(inputs)
        result = self._run.attribute(query, by=("query",), progress=self._progress, **self._settings)
        result.check()
        data = result.dataset
        path = data.initial + sum(data[name] for name in TERMS)
        machine, network = (torch.from_numpy(values.values).reshape(shape) for values in (path, data.prediction))
        return machine, network

    def _query(self, inputs: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> tuple[Query, tuple[int, ...]]:
        """Every output of every input as a query, and the shape of the outputs."""
        picked = Output(name="output", function=_component, targets=torch.zeros(0), part=self._part)
        shapes = list[tuple[int, ...]]()

        def look(output: Any) -> Tensor:
            values = picked.pick(output)
            shapes.append(tuple(values.shape))
            return values.flatten()

        asked = Query(inputs, output=look)
        host, fixed = torch.device("cpu"), self._run.fixed(self._run.num_steps)
        seen = QueryInputs(self._run, asked, fixed=fixed, dtypes={torch.float64}, device=host)
        trained = self._run.flat_params(self._run.num_steps).to(torch.float64)
        with torch.no_grad():
            seen.scalars(trained, torch.arange(asked.num_inputs))
        shape, num_outputs = shapes[0], int(torch.Size(shapes[0][1:]).numel())
        return Query(
            map_tensors(inputs, lambda _, tensor: tensor.repeat_interleave(num_outputs, dim=0)),
            output=replace(picked, targets=torch.arange(num_outputs).repeat(asked.num_inputs)),
            names=[f"{row}:{output}" for row in range(asked.num_inputs) for output in range(num_outputs)],
        ), shape


def _component(output: Tensor, component: Tensor) -> Tensor:
    return output.reshape(len(output), -1).gather(1, component[:, None])[:, 0]
