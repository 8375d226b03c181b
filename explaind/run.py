"""A recorded run, opened for reading: its parameters, steps, batches and settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from explaind.places import Place, file_sizes, place_of
from explaind.record import Record
from explaind.store import StoreReader, decoding

if TYPE_CHECKING:
    import xarray as xr

    from explaind.attribution import Attribution
    from explaind.averages import Average
    from explaind.info import StoreInfo
    from explaind.path.verify import VerifyReport
    from explaind.planning.plan import Plan
    from explaind.quadrature import Quadrature
    from explaind.query import Query
    from explaind.request import KernelSettings, PathSettings, Settings

__all__ = ["Run", "open_run"]


def open_run(
    store: str | Place,
    model: nn.Module | None = None,
    *,
    objective: Callable[[nn.Module, Any], Tensor] | None = None,
    data: Any = None,
) -> Run:
    """Open a recorded run for reading; also while it is still being written.

    Args:
        store: directory that `explaind.trace` wrote, or a URL that fsspec knows, such as `s3://bucket/run.zarr`.
        model: a model of the recorded architecture. Its weights are ignored, and left as they are: all
            weights come from the store. Without it, what needs a forward pass is not possible.
        objective: the function that `explaind.trace` was given, if any: a store holds no code.
        data: where the inputs of a run with `inputs="by_reference"` are: the map-style data set that it was recorded
            with, or the DataLoader, whose `collate_fn` is then used; by ids given by hand, anything with items of these
            ids. Or a function that takes a list of ids to tensors with a row for each, such as
            `lambda ids: normalise(images[ids])` for a loop that changed its batches before it called the model. Names
            and order of tensors do not matter, nor do types and the shape of a row: what the model was called with is
            found by its content. Runs whose inputs are stored do not use it.

    Raises:
        StoreFormatError: not a run, an empty one, or one in a newer format.
        DamagedStoreError: the store's metadata cannot be read.
        StoreUnreachableError: object storage cannot be read.
        ModelMismatchError: the model's parameters or modules are not those recorded.
        TypeError: `data` is no data set, nor a function. When inputs are needed, there is a `NotRecordedError` without
            it, and a `DataMismatchError` where an example's item is not what the model was called with.
    """
    path = place_of(store)
    if "checkpoints" in StoreReader(path).attributes:
        from explaind.checkpoints import CheckpointRun

        return CheckpointRun(path, model)
    return Run(path, model, objective, data)


class Run(Record):
    """The published steps of a recorded run; made by `open_run`."""

    def __init__(
        self,
        path: Place,
        model: nn.Module | None,
        objective: Callable[[nn.Module, Any], Tensor] | None = None,
        data: Any = None,
    ) -> None:
        super().__init__(path, model, objective, data)
        self.layers = default_layers(self.table.names)
        self.examples_alone: dict[int, bool] = {}
        """Of the steps that were replayed to tell, whether the gradient is its examples', with nothing else in it."""

    @property
    def layers(self) -> MutableMapping[str, Sequence[str]]:
        """Parameter groups `{layer: [parameter name, …]}`, by default one per module; edit or replace them."""
        return self._layers

    @layers.setter
    def layers(self, layers: Mapping[str, Iterable[str]]) -> None:
        self._layers: dict[str, Sequence[str]] = {name: list(members) for name, members in layers.items()}

    def params(self, step: int) -> dict[str, Tensor]:
        """θ_step by parameter name, in the trained types; `step` from 0 to S."""
        return self.table.unflatten(self.flat_params(step), trained_dtype=True)

    def update(self, step: int) -> dict[str, Tensor]:
        """Δ_step = θ_{step+1} − θ_step by parameter name, exact in float64."""
        self._check_step(step, self.num_steps - 1)
        start, stop = (self.flat_params(s).to(torch.float64) for s in (step, step + 1))
        return self.table.unflatten(stop - start)

    def example_grads(self, step: int) -> dict[str, Tensor]:
        """g_{k,step} by parameter name, `[example, *shape]`, for the examples `np.unique(run.call_examples(step))`."""
        from explaind.path.gradients import step_example_gradients

        return step_example_gradients(self, step)

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per step: loss (if seen), learning rate, batch rows, and norms of G_s, Δ_s and θ_s.

        With several parameter groups, the learning rates are `lr_0`, `lr_1`, ….
        """
        records = []
        rows = np.diff(self._row_offsets)
        for step in range(self.num_steps):
            start = self.flat_params(step).to(torch.float64)
            calls = slice(self._num_calls(step), self._num_calls(step + 1))
            records.append(
                {
                    "loss": float(self._store.read("loss", step, step + 1)[0]),
                    **self._rates(step),
                    "num_rows": int(rows[calls].sum()),
                    "gradient_norm": float(self.flat_gradient(step).norm()),
                    "update_norm": float((self.flat_params(step + 1).to(torch.float64) - start).norm()),
                    "parameter_norm": float(start.norm()),
                }
            )
        return pd.DataFrame(records, index=pd.RangeIndex(self.num_steps, name="step"))

    def _rates(self, step: int) -> dict[str, float]:
        with decoding(f"the learning rates of step {step}", self.path):
            rates = [float(self.settings(step, group).get("lr", np.nan)) for group in range(self.num_groups)]
        return {"lr": rates[0]} if len(rates) == 1 else {f"lr_{group}": rate for group, rate in enumerate(rates)}

    def __repr__(self) -> str:
        return "\n".join(f"{name + ':':<13}{value}" for name, value in self._summary().items())

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(value)}</td></tr>"
            for name, value in self._summary().items()
        )
        return f"<table>{rows}</table>"

    def _summary(self) -> dict[str, str]:
        size = sum(size for _, size in file_sizes(self.path))
        known = "" if all(self.rules) else " (update rule not known: no example axis)"
        return {
            "run": str(self.path),
            "steps": f"{self.num_steps:,}" + ("" if self.complete else " so far (still recording, or interrupted)"),
            "examples": f"{len(self.examples):,}" + (", inputs by reference" if self.refers_to_data else ""),
            "parameters": f"{self.table.num_elements:,} in {len(self.table)} tensors, {len(self.layers)} layers",
            "optimizer": " + ".join(dict.fromkeys(name.rpartition(".")[2] for name in self.group_optimizers)) + known,
            "size": f"{size / 2**20:,.1f} MiB",
        }

    def attribute(
        self,
        query: Query,
        *,
        by: Sequence[str],
        steps: range | Sequence[int] | None = None,
        examples: Sequence[int] | None = None,
        layers: Sequence[str] | None = None,
        groups: Mapping[int, Any] | Sequence[Any] | None = None,
        windows: int | Mapping[Any, range | slice] | None = None,
        average: Average | None = None,
        tolerance: float = 1e-6,
        quadrature: Quadrature | str = "adaptive",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        out: str | Place | None = None,
        memory: int | None = None,
        progress: bool = False,
    ) -> Attribution:
        """Write q(θ_S) as q(θ_0) plus what every example, step and layer added: an exact sum.

        The path integral of ∇q over each recorded update, spread over the gradients that the optimizer's filter
        applied in it: contribution[q, k, s, l] = −⟨ψ_s^{(l)}, g_{k,s}^{(l)}⟩.

        Args:
            query: the predictions to explain.
            by: the axes to keep, any of `query`, `example` | `group`, `step` | `update_step` | `window`, `token`,
                `layer` | `parameter` | `element`. The others are summed. `step` is when a gradient was taken,
                `update_step` when the optimizer applied it. `element` is every single number of the parameters, for all
                examples together; `quadrature` measures the error of the sum over them, in which theirs may cancel.
            steps: keep only these steps.
            examples: keep only these example ids.
            layers: keep only these layers (or parameters).
            groups: a label per example, for `by=(…, "group")`: a mapping by id or a sequence along `run.examples`.
            windows: for `by=(…, "window")`, which steps are summed: a number, for windows of so many steps, or a label
                and successive steps for each, `{"memorising": range(0, 60), …}`. Steps count when a gradient was taken.
            average: explain averaged weights, one of `explaind.averages`, in place of the last ones: q(avg_S) for
                q(θ_S). The path, and all that is said of it, then is the average's.
            tolerance: wanted quadrature error, as a part of the query's path length Σ_s |q(θ_{s+1}) − q(θ_s)|.
            quadrature: `"adaptive"`, or a rule from `explaind.quadrature`.
            dtype: type of gradients and products, by default the one that the run was trained in. With float32 the
                terms have its rounding, measured and part of `rounding`; gradients of queries whose rounding alone
                would exceed the tolerance are computed in float64. The certificate is always float64.
            device: where to compute; by default the host.
            out: a directory for a zarr store, where the terms are written step by step as they are computed; the result
                reads them when they are used. It has that name once it is whole. To a URL it is uploaded then.
            memory: bytes that the computation may work in beside the result, by default a quarter of what is free. If
                that does not hold all queries, they are computed in several sweeps over the run, a part in each;
                `run.plan` says how many. Inputs that do not depend on each other are evaluated in blocks that fit.
            progress: show a progress bar.

        Returns:
            An `Attribution` whose dataset has, in the unit of the query:

            - `contribution [*by]`: what the examples' gradients did;
            - `decay`, `other`, `rounding [*by without examples]`: weight decay; gradient or movement that came from
              no recorded example (a penalty on the parameters, noise, an edit by hand, momentum from before the
              recording); floating-point rounding of the training itself. To tell examples from others, each batch is
              replayed; without example axis only once for all queries, unless there are others in its gradient;
            - `quadrature [query, update_step]`: the measured error of the path integral;
            - `initial`, `prediction`, `omitted`, `path_length [query]`: q(θ_0), q(θ_S), what restrictions left out,
              and Σ_s |q(θ_{s+1}) − q(θ_s)|.

        Raises:
            ValueError: axes, steps, examples, layers or groups that do not exist or do not go together.
            UnknownUpdateRuleError: the example axis for an optimizer without a rule.
            ResultTooLargeError: the result would not fit in memory and has no `out`, or a single query needs more than
                `memory`.
            StoreExistsError: something is at `out` already.
            ModelMismatchError: the model computes something else than was recorded.
            VerificationError: the examples' gradients do not sum to the recorded step's.

        Cost:
            Per step a few forward and backward passes of the queries' inputs, and with the example axis one forward
            pass of the batch, two backward passes, and a product for each query, example and weight; `run.plan` counts
            them. Memory: three vectors of the parameters' size for each query, four with the example axis, and the
            activations of one step.
        """
        from explaind.decomposition import attribute
        from explaind.request import check_request

        request = check_request(
            self,
            query,
            by=by,
            steps=steps,
            examples=examples,
            layers=layers,
            groups=groups,
            windows=windows,
            average=average,
            tolerance=tolerance,
            quadrature=quadrature,
            dtype=dtype,
            device=device,
            out=out,
            memory=memory,
            progress=progress,
        )
        return attribute(request)

    def plan(self, query: Query, *, by: Sequence[str], **settings: Unpack[Settings]) -> Plan:
        """Find out what `attribute` will cost with the same arguments, from a few of the steps that it would compute.

        Steps from the middle of three equal stretches of the run are computed, which takes as long as they do; what
        differs from step to step, such as the number of nodes, is their mean. Nothing is written and nothing kept.

        Args:
            query: as in `attribute`.
            by: likewise.
            settings: likewise.

        Returns:
            A `Plan`, which prints as a table.

        Raises:
            Exception: what `attribute` would raise before it computes anything.
        """
        from explaind.planning.calibration import make_plan

        return make_plan(self, query, by=by, **settings)

    def kernel(
        self,
        query: Query,
        examples: Sequence[int] | None = None,
        *,
        by: Sequence[str] = ("query", "example"),
        **settings: Unpack[KernelSettings],
    ) -> xr.DataArray:
        """The exact path kernel between predictions and training examples, summed over the axes that `by` leaves out.

        K[q, k, …] = −Σ ⟨φ_q, φ_k⟩, with `query_features` for φ_q and `train_features` for φ_k: what the gradients of
        example k did to query q. Both sides include the loss's slope and the optimizer's scale, as in ExPLAIND (arXiv
        2505.20076), so the kernel's rows sum to what the data did. With `window` in `by` they are accumulated over
        windows of steps, with `group` and `query.mean(by_class=…)` over classes, with `layer` told apart by layer.

        Args:
            query: as in `attribute`.
            examples: ids along the example axis, by default all.
            by: as in `attribute`.
            settings: likewise.

        Returns:
            The matrix `[*by]` in the unit of the query, with the closure of its sum in its attributes. With `out=` it
            is read when it is used.

        Raises:
            ClosureError: the terms do not sum to the predictions within `tolerance`.
            Exception: what `attribute` raises.
        """
        from explaind.kernel import path_kernel

        return path_kernel(self, query, examples, by=by, **settings)

    def query_features(self, query: Query, step: int, **settings: Unpack[PathSettings]) -> dict[str, Tensor]:
        """φ_q = ∫_0^1 ∇q(θ_step + tΔ_step) dt by parameter name, `[query, *shape]`; ⟨φ_q, Δ_step⟩ is q's change.

        Args:
            query: as in `attribute`.
            step: the update that the gradient is averaged over.
            settings: `tolerance` (a part of the step's change), `quadrature`, `dtype`, `device` and `memory` as in
                `attribute`.

        Raises:
            ClosureError: the average is not accurate enough.
        """
        from explaind.features import query_features

        return query_features(self, query, step, **settings)

    def train_features(self, step: int, examples: Sequence[int] | None = None) -> dict[str, Tensor]:
        """φ_k, the part of −Δ_step that came from each example's gradients, `{name: [example, *shape]}`, float64.

        Through the optimizer's momentum these are all its gradients up to the step, so that the sum over all examples
        is −Δ_step but for weight decay; −⟨φ_q, φ_k⟩ is the contribution by `update_step`.

        Args:
            step: the update.
            examples: their ids, in the order wanted; by default `run.examples`.

        Raises:
            UnknownUpdateRuleError: the optimizer has no rule.
            ValueError: steps or examples that the run does not have.
            ResultTooLargeError: the vectors of so many examples would not fit in memory.

        Cost:
            Replays all steps up to this one. Memory: four vectors of the parameters' size for each example.
        """
        from explaind.features import train_features

        return train_features(self, step, examples)

    def info(self) -> StoreInfo:
        """Where the bytes of the run are, and what a writer left beside it; as the disk has it now."""
        from explaind.inventory import store_info

        return store_info(self.path)

    def export(
        self,
        path: str | Place,
        *,
        steps: slice | range | None = None,
        every: int | None = None,
        progress: bool = False,
    ) -> None:
        """Write some of the steps to a store of their own, numbered from 0; bit for bit what is recorded of them.

        Examples keep their ids. Momentum that the optimizer had before the first of the steps is in the term `other` of
        the new run. Its `metadata` say as `exported_from` which steps they are.

        Args:
            path: directory of the new store, or a URL, to which it is uploaded once it is whole; until then it is in a
                temporary directory.
            steps: successive steps, such as `slice(100, 200)`; by default all.
            every: store only the parameters before every K-th of the steps, as `snapshot_every` of `explaind.trace`
                does, and what replaying does not give bit for bit; this replays all of them. By default the new store
                has what this one has.
            progress: show a progress bar if that takes longer than a second.

        Raises:
            StoreExistsError: something is at `path` already.
            StoreFormatError: the steps cannot be replayed, so `every` is not possible.
            ValueError: the steps are none, not in the run, or not successive; or they must be replayed, and the run was
                opened without its model.
            VerificationError: the first of them, or with `every` any, has to be replayed, which gives something else
                here than where it was recorded.
            DamagedStoreError: what is recorded of them is missing or fails its checksum. Nothing is left at `path`.
        """
        from explaind.export import export

        if every is not None and (not isinstance(every, int) or every < 2):
            raise ValueError(f"every= is a number of steps, at least 2; got {every!r}.")
        chosen = successive_steps(steps, self.num_steps)
        export(self, self._store, place_of(path), steps=chosen, every=every, progress=progress)

    def verify(self, *, progress: bool = False) -> VerifyReport:
        """Replay every step and compare with the record; see `explaind.path.verify.verify`."""
        from explaind.path.verify import verify

        return verify(self, progress=progress)


def successive_steps(steps: slice | range | None, num_steps: int) -> range:
    """Steps of a run from one to another.

    Raises:
        ValueError: they are none, some are not in the run, or they are not successive.

    Example:
        >>> successive_steps(slice(-2, None), num_steps=10)
        range(8, 10)
    """
    if steps is None:
        steps = slice(None)
    chosen = range(*steps.indices(num_steps)) if isinstance(steps, slice) else steps
    beyond = max(chosen.stop, *(bound or 0 for bound in (steps.start, steps.stop)))
    if not (chosen.step == 1 and 0 <= chosen.start < chosen.stop and beyond <= num_steps):
        raise ValueError(
            f"steps= are successive ones out of 0 to {num_steps - 1}, such as slice(0, {num_steps}); got {steps!r}."
        )
    return chosen


def default_layers(names: Iterable[str]) -> dict[str, list[str]]:
    """One layer per module: parameters are grouped by all of their name but the last part."""
    layers: dict[str, list[str]] = {}
    for name in names:
        module, _, parameter = name.rpartition(".")
        layers.setdefault(module or parameter, []).append(name)
    return layers
