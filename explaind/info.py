"""What is said of a store: where the bytes of a run are, and what lies there that is no part of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from explaind.units import readable_size

__all__ = ["DIGESTS", "INPUTS", "REST", "ArrayInfo", "KindInfo", "Leftover", "StoreInfo", "kind_of"]

_KINDS = {
    "params": "parameters",
    "gradient": "gradient",
    "state": "optimizer state",
    "state_shaped": "optimizer state",
    "fixed": "buffers and frozen parameters",
    "output_grad": "output gradients",
    "output_grads": "output gradients",
    "example_grad": "example gradients",
}
INPUTS, DIGESTS, REST = "inputs", "checksums of inputs", "settings, ids and random states"
"""What arrays of inputs hold, of their digests where they are only referred to, and all that are small."""


def kind_of(array: str) -> str:
    """What an array of this name holds, for people.

    Example:
        >>> kind_of("state/exp_avg")
        'optimizer state'
    """
    first = array.partition("/")[0]
    if first.startswith("input_digests"):
        return DIGESTS
    return INPUTS if first.startswith("inputs") else _KINDS.get(first, REST)


@dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """An array of a store."""

    name: str
    """Its name."""
    dims: tuple[str, ...]
    """Names of its dimensions."""
    shape: tuple[int, ...]
    """Lengths of its dimensions, as far as they are valid."""
    dtype: str
    """Name of its type."""
    stored_bytes: int
    """Bytes of its valid chunks on the disk."""
    plain_bytes: int
    """Bytes of its valid rows, not compressed."""


@dataclass(frozen=True, kw_only=True)
class KindInfo:
    """Arrays that hold the same kind of thing."""

    kind: str
    """What they hold."""
    arrays: tuple[str, ...]
    """Their names."""
    stored_bytes: int
    """Bytes on the disk."""
    plain_bytes: int
    """Bytes when they are not compressed."""
    share: float
    """Part of all arrays' bytes on the disk."""
    bytes_per_step: float
    """Bytes on the disk, divided by the number of steps."""
    vectors_per_step: float
    """The same in vectors of D float32 numbers, that is in units of 4·D bytes."""


@dataclass(frozen=True, kw_only=True)
class Leftover:
    """Files that are no part of the run."""

    what: str
    """How they came to be there."""
    paths: tuple[str, ...]
    """Where they are; of files in the store below its directory."""
    num_bytes: int
    """Their size."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StoreInfo:
    """What the directory of a run holds, as `run.info` finds it."""

    path: str
    """The directory."""
    format_version: int
    """Version of the store's format."""
    complete: bool
    """Whether the recording has ended; if not, it goes on, or was killed."""
    num_steps: int
    """Number of whole steps that are published."""
    snapshot_every: int
    """Number of steps from one stored snapshot of the parameters to the next."""
    inputs: str
    """`"stored"`, or `"by_reference"` if only the ids of the examples lead to them."""
    num_examples: int | None
    """Number of distinct examples in these steps; None if damage keeps from counting them."""
    model: str
    """Name of the model's class."""
    optimizer: str
    """Full name of the optimizer's class; of several, joined by `" + "`."""
    num_elements: int
    """D, the number of scalars in the traced parameters."""
    num_tensors: int
    """Number of traced parameters."""
    arrays: tuple[ArrayInfo, ...]
    """All arrays that could be read, by name."""
    metadata_bytes: int
    """Bytes of the JSON files that describe them."""
    leftovers: tuple[Leftover, ...]
    """What is there beside the run."""
    damage: tuple[str, ...]
    """What is wrong with what was looked at, the arrays' descriptions; `explaind verify` looks at everything."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of the run on the disk, without leftovers."""
        return self.metadata_bytes + sum(array.stored_bytes for array in self.arrays)

    @property
    def kinds(self) -> list[KindInfo]:
        """The arrays by what they hold, the largest first."""
        members: dict[str, list[ArrayInfo]] = {}
        for array in self.arrays:
            members.setdefault(kind_of(array.name), []).append(array)
        total = sum(array.stored_bytes for array in self.arrays)
        kinds = []
        for kind, arrays in members.items():
            stored = sum(array.stored_bytes for array in arrays)
            per_step = stored / max(self.num_steps, 1)
            kinds.append(
                KindInfo(
                    kind=kind,
                    arrays=tuple(array.name for array in arrays),
                    stored_bytes=stored,
                    plain_bytes=sum(array.plain_bytes for array in arrays),
                    share=stored / max(total, 1),
                    bytes_per_step=per_step,
                    vectors_per_step=per_step / max(4 * self.num_elements, 1),
                )
            )
        return sorted(kinds, key=lambda kind: -kind.stored_bytes)

    def to_json(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self) | {"stored_bytes": self.stored_bytes, "kinds": [asdict(kind) for kind in self.kinds]}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        some = f" (parameters stored before one in {self.snapshot_every:,})" if self.snapshot_every > 1 else ""
        steps = f"{self.num_steps:,}" + some + ("" if self.complete else " so far (still recording, or interrupted)")
        examples = "unknown, their ids are damaged" if self.num_examples is None else f"{self.num_examples:,}"
        facts = {
            "run": f"{self.path} (format {self.format_version})",
            "steps": steps,
            "examples": examples + (", inputs by reference" if self.inputs == "by_reference" else ""),
            "model": f"{self.model}, {self.num_elements:,} parameters in {self.num_tensors:,} tensors",
            "optimizer": self.optimizer,
            "size": readable_size(self.stored_bytes),
        }
        lines = [f"{name + ':':<11}{value}" for name, value in facts.items()]
        lines += ["", f"{'on disk':>10}{'share':>8}{'plain':>11}{'per step':>11}{'× 4·D':>10}  what"]
        lines += [
            f"{readable_size(kind.stored_bytes):>10}{kind.share:>8.1%}{readable_size(kind.plain_bytes):>11}"
            f"{readable_size(kind.bytes_per_step):>11}{kind.vectors_per_step:>10.3g}  {kind.kind}"
            for kind in self.kinds
        ]
        lines.append(f"{readable_size(self.metadata_bytes):>10}{'':>40}  descriptions of the arrays")
        if self.leftovers:
            lines += ["", "Not part of the run:" if self.complete else "Not part of the run, or not yet:"]
            lines += [
                f"{readable_size(left.num_bytes):>10}  {left.what}: {left.paths[0]}"
                + (f" and {len(left.paths) - 1:,} more" if len(left.paths) > 1 else "")
                for left in self.leftovers
            ]
        if self.damage:
            lines += ["", "Damaged:", *(f"  {problem}" for problem in self.damage)]
        return "\n".join(lines)
