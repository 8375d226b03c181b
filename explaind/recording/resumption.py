"""A run that is continued: what was recorded of it, whether it is the same training, and where it goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from explaind.commit import Commit, is_published
from explaind.errors import ResumeError, StoreExistsError
from explaind.parameters import ParameterTable
from explaind.paths import interrupted
from explaind.places import Place
from explaind.recording.begun import Begun, attach
from explaind.recording.calls import EarlierCalls
from explaind.recording.contents import RecordedBatch, read_batches
from explaind.recording.cut import calls_before, lengths_before
from explaind.recording.fixed import decode_fixed
from explaind.recording.loop_points import point_steps, read_point
from explaind.recording.loop_state import RecordedMoment
from explaind.recording.same_run import place_of_computation
from explaind.recording.state import is_state
from explaind.store import FORMAT_VERSION, StoreReader

__all__ = ["Resumption", "find_resumption"]


def find_resumption(
    path: Place, model: nn.Module, objective: Callable[[nn.Module, Any], Tensor] | None
) -> Resumption | None:
    """Where to go on with a run; None if there is none, or it has no finished step.

    Raises:
        StoreExistsError: something else is there.
        DamagedStoreError: what is there cannot be read.
        ModelMismatchError, ResumeError: see `Resumption`.
    """
    if not isinstance(path, Path):  # such runs begin anew
        return None
    if left := interrupted(path):
        raise StoreExistsError(left)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return None
    if not is_published(path):
        raise StoreExistsError(f"{path} is not a recorded run, so it cannot be resumed. Give another path.")
    return Resumption(path, model, objective) if Commit.read(path).num_steps else None


class Resumption:
    """The last point of a run from which its loop can go on.

    Args:
        path: where the run is; its lock is held.
        model: the model.
        objective: what stands for its calls, if anything.

    Raises:
        ModelMismatchError: the model is another one.
        ResumeError: the run has no such point, or none that can be restored.
    """

    def __init__(self, path: Path, model: nn.Module, objective: Callable[[nn.Module, Any], Tensor] | None) -> None:
        from explaind.record import Record

        self.path = path
        self.store = StoreReader(path)
        """The run as it is there."""
        self.attributes: dict[str, Any] = self.store.attributes
        version = self.attributes["explaind_format"]
        if version < FORMAT_VERSION:
            raise ResumeError(
                f"{path} has format {version}, which cannot be continued: that takes format {FORMAT_VERSION}. Record "
                "to another path."
            )
        steps = point_steps(self.store)
        self._number = int(np.searchsorted(steps, self.store.commit.num_steps, side="right")) - 1
        if self._number < 0:
            raise ResumeError(
                f"{path} does not say where its loop can go on: it was recorded by an earlier version of explaind, or "
                "exported, or made of checkpoints. Record to another path."
            )
        self._record = Record(path, model, objective)
        if self.attributes.get("call_kinds") and self._record.uses_objective != (objective is not None):
            was, now = ("with", "without") if objective is None else ("without", "with")
            raise ResumeError(
                f"{path} was recorded {was} an objective, and is to be resumed {now} one. Do as before, or record to "
                "another path."
            )
        self.table: ParameterTable = self._record.table
        """The recorded parameters."""
        self.point, self._num_blocks = read_point(self.store, self._number)
        """What is known of the point, as `LoopState.take` gave it and `StepRows` added to it."""
        self.step = int(steps[self._number])
        """Number of steps that are finished there."""
        if names := self._record.unrecorded_state:
            raise ResumeError(
                f"the optimizer's state {', '.join(map(repr, names))} is not in {self.path}, as it is neither a number "
                "nor a real tensor, so the optimizer cannot be brought to where it was. Record to another path."
            )

    @cached_property
    def moment(self) -> RecordedMoment:
        """The numbers of the model and its optimizers at the point."""
        flat = self._record.flat_params(self.step) if self.point["params"] is None else self.point["params"]
        fixed = dict[str, Tensor]()
        if layout := self.attributes["fixed"]:
            fixed = decode_fixed(
                layout, self.fixed_bytes if self.point["fixed"] is None else self.point["fixed"].numpy()
            )
        return RecordedMoment(
            params=self.table.unflatten(flat, trained_dtype=True),
            state=self._record.state(self.step),
            state_types=self._record.state_types,
            fixed=fixed,
        )

    @property
    def fixed_bytes(self) -> NDArray[np.uint8]:
        """Bytes of the last version of the buffers and frozen parameters."""
        version = self.point["fixed_version"]
        raw: NDArray[np.uint8] = self.store.read("fixed", version, version + 1)[0]
        return raw

    def batches(self) -> list[RecordedBatch]:
        """The batches of the iteration in progress that were used; if there are none, the last one before."""
        count: int = self.point["num_batches"]
        return read_batches(self.store, max(0, count - max(1, self.point["place"]["used"])), count)

    def calls(self) -> EarlierCalls:
        """What is known of the calls before the point."""
        return calls_before(self.store, lengths_before(self.store, self.step))

    def state_arrays(self) -> tuple[list[str], int]:
        """The arrays that the optimizers' state is written to, and how many moments have rows of it."""
        number = lengths_before(self.store, self.step).get("state_snapshot", 0)
        return [name for name in self.store.commit.arrays if is_state(name)] if number else [], number

    def changes(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Attributes of the run that are others from here on, with these notes of the user."""
        changes = place_of_computation(self.attributes)
        known = self.attributes.get("metadata", {})
        return changes if known == known | metadata else changes | {"metadata": known | metadata}

    def begun(self, *, durable: bool) -> Begun:
        """The store, to be gone on with from the point; all that is behind it is to be replaced."""
        lengths = lengths_before(self.store, self.step) | {
            "loop_point": self._number + 1,
            "loop_block": self._num_blocks,
            "fixed_version": self.point["fixed_version"] + 1,
            "batch": self.point["num_batches"],
        }
        if self.store.has("batch"):
            lengths["batch_row"] = int(self.store.read("batch", 0, lengths["batch"])[:, 2].sum())
        return attach(self.store, lengths, durable=durable)
