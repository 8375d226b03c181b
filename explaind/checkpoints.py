"""Runs made of checkpoints: the parameters at some moments of a training, and nothing of what lay between them."""

from __future__ import annotations

import platform
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Never

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from explaind.errors import NonFiniteError, NotRecordedError, UnknownUpdateRuleError
from explaind.parameters import ParameterTable
from explaind.places import Place, place_of
from explaind.recording.fixed import encode_fixed, fixed_layout, fixed_tensors, module_types
from explaind.recording.writer import Rows, StoreWriter
from explaind.run import Run
from explaind.state_dicts import matched, read_tensors
from explaind.stream import new_store

__all__ = ["CheckpointRun", "from_checkpoints"]

_ONLY = "the run was made of checkpoints, which hold parameters only"


def from_checkpoints(
    checkpoints: Sequence[str | Path | Mapping[str, Tensor]],
    model: nn.Module,
    *,
    steps: Sequence[int] | None = None,
    store: str | Place | None = None,
) -> CheckpointRun:
    """Make a run of checkpoints of a training that was not traced: each stretch between two of them is a step.

    A prediction of the last checkpoint then is an exact sum over steps and layers, along the straight line from each
    checkpoint to the next: `run.attribute(query, by=("query", "step", "layer"))`. How the optimizer went between them,
    and which examples it saw, is not known; what is asked of those raises an error. Queries are evaluated with the
    buffers of the last checkpoint.

    Args:
        checkpoints: at least two, first to last: files with a state dict, of safetensors or of `torch.save`, or the
            state dicts themselves. The files may be those of a whole training, with the model's state dict as `model`,
            `state_dict` or `model_state_dict`. They are read with `weights_only=True`: no object is unpickled.
        model: a model of the architecture that they are of. Its weights are ignored, and left as they are.
        steps: what the checkpoints are called in `run.history`: the numbers of training steps before each, increasing.
        store: directory or URL of the zarr store to write the parameters to, which `explaind.open_run` opens again; by
            default a temporary one, deleted with the run.

    Raises:
        ModelMismatchError: a checkpoint is not of this model; which file, and which tensor.
        NonFiniteError: a checkpoint has a parameter with NaN or infinite entries.
        ValueError: there are fewer than two, `steps` do not fit, or a file is no checkpoint.
        StoreExistsError: something is at `store` already.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> zero, one = {"weight": torch.zeros(1, 2)}, {"weight": torch.ones(1, 2)}
        >>> run = explaind.from_checkpoints([zero, one], model)
        >>> query = explaind.Query(torch.tensor([[1.0, 2.0]]), output=outputs.value())
        >>> run.attribute(query, by=("step",)).dataset.contribution.item()
        3.0
    """
    sources = list(checkpoints)
    if len(sources) < 2:
        raise ValueError(f"a run needs at least two checkpoints, one before and one after; got {len(sources)}.")
    labels = list(range(len(sources))) if steps is None else [int(step) for step in steps]
    if len(labels) != len(sources) or any(a >= b for a, b in pairwise(labels)):
        raise ValueError(f"steps= needs an increasing number for each of {len(sources)} checkpoints; got {labels}.")
    model = getattr(model, "_orig_mod", model)  # of a compiled model the one that it was made of
    if store is not None:
        place = place_of(store)
        _write(place, sources, model, labels)
        return CheckpointRun(place, model)
    directory = Path(tempfile.mkdtemp(prefix="explaind-"))
    try:
        _write(directory / "run.zarr", sources, model, labels)
        run = CheckpointRun(directory / "run.zarr", model)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    weakref.finalize(run, shutil.rmtree, directory, ignore_errors=True)
    return run


def _write(path: Place, sources: list[str | Path | Mapping[str, Tensor]], model: nn.Module, labels: list[int]) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    table = ParameterTable.of(trained, dict.fromkeys(trained, 0))
    fixed = fixed_tensors(model, trained)
    names = [f"checkpoint {n}" if isinstance(s, Mapping) else str(s) for n, s in enumerate(sources)]
    attributes = {
        "checkpoints": [{"step": label, "source": name} for label, name in zip(labels, names, strict=True)],
        "parameters": table.to_json(),
        "fixed": fixed_layout(fixed),
        "modules": module_types(model),
        "model": type(model).__name__,
        "optimizer": "unknown",
        "groups": [{}],
        "group_keys": [],
        "device": "cpu",
        "example_grads": "replayed",
        "snapshot_every": 1,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "metadata": {},
    }
    last, version = None, -1
    with new_store(path) as unfinished:
        writer = StoreWriter(unfinished, attributes=attributes, overwrite=False)
        for number, (source, name) in enumerate(zip(sources, names, strict=True)):
            found = matched(source if isinstance(source, Mapping) else read_tensors(Path(source)), model, name)
            for parameter in table:
                if not bool(found[parameter.name].isfinite().all()):
                    raise NonFiniteError(f"the parameter '{parameter.name}' has NaN or infinite entries in {name}.")
            rows: list[Rows] = []
            if fixed:
                now = encode_fixed({name: found[name] for name in fixed})
                if last is None or not np.array_equal(now, last):
                    last, version = now, version + 1
                    rows.append(("fixed", now[None], ("fixed_version", "fixed_byte")))
            rows.append(("moment_fixed", np.array([max(version, 0)]), ("moment",)))
            rows.append(("snapshot_step", np.array([number]), ("snapshot",)))
            rows.append(("params", table.flatten(found).numpy()[None], ("snapshot", "element")))
            if number:
                rows.append(("loss", np.array([np.nan]), ("step",)))
                rows.append(("updated", np.zeros((1, len(table)), np.bool_), ("step", "parameter")))
            writer.add(*rows)
            if writer.wants_flush:
                writer.flush()
        writer.close()


class CheckpointRun(Run):
    """A run that knows parameters only; made by `from_checkpoints`. Its step s leads from checkpoint s to s + 1."""

    @property
    def checkpoints(self) -> list[int]:
        """What each checkpoint is called: the `steps` that `from_checkpoints` was given, `[snapshot]`."""
        return [int(entry["step"]) for entry in self._store.attributes["checkpoints"]]

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row per step: the checkpoints that it lies between, and norms of Δ_s and θ_s."""
        points = self.checkpoints
        records = []
        for step in range(self.num_steps):
            start = self.flat_params(step).to(torch.float64)
            moved = self.flat_params(step + 1).to(torch.float64) - start
            records.append(
                {
                    "from": points[step],
                    "to": points[step + 1],
                    "update_norm": float(moved.norm()),
                    "parameter_norm": float(start.norm()),
                }
            )
        return pd.DataFrame(records, index=pd.RangeIndex(self.num_steps, name="step"))

    @property
    def replays_gradients(self) -> bool:
        """Nothing is replayed."""
        return False

    def require_rules(self) -> Never:
        """Not known; see `Record.require_rules`."""
        raise UnknownUpdateRuleError(
            f"{_ONLY}: no gradient and no batch is known, so no example can be credited. by=('query', 'step', 'layer') "
            "works; for examples, record the training with explaind.trace."
        )

    def flat_gradient(self, step: int) -> Never:
        """Not known."""
        raise _not_recorded("gradients")

    def example_grads(self, step: int) -> Never:
        """Not known."""
        raise _not_recorded("gradients")

    def state(self, snapshot: int) -> Never:
        """Not known."""
        raise _not_recorded("optimizer state")

    def settings(self, step: int, group: int) -> Never:
        """Not known."""
        raise _not_recorded("optimizer settings")

    def verify(self, *, progress: bool = False) -> Never:
        """There is nothing to replay."""
        raise _not_recorded("batches that steps could be replayed from")

    def _summary(self) -> dict[str, str]:
        return super()._summary() | {"optimizer": "not known (made of checkpoints: no example axis)"}


def _not_recorded(what: str) -> NotRecordedError:
    return NotRecordedError(f"{_ONLY}, not {what}. Record the training with explaind.trace to have them.")
