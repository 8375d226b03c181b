"""Goes through the directory of a run, and tells what each file is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from explaind.commit import COMMIT_FILE
from explaind.errors import DamagedStoreError
from explaind.info import ArrayInfo, Leftover, StoreInfo
from explaind.places import Place, file_sizes
from explaind.store import Layout, StoreReader, decoding

__all__ = ["store_info"]

_INTERRUPTED = "interrupted writes"
_BEYOND = "chunks beyond what is published"
_UNKNOWN = "files that the run does not name"
_BESIDE = "stores that were to replace it, or that it replaced"


def store_info(path: Place) -> StoreInfo:
    """Look at the directory of a run, whole, still being written, or damaged; nothing is changed.

    Raises:
        StoreFormatError: not a run, or one in a newer format.
        DamagedStoreError: what describes the run as a whole cannot be read.
    """
    store = StoreReader(path)
    attributes, damage = store.attributes, [] if store.lost is None else [store.lost]
    with decoding("the attributes", path):
        sizes = [math.prod(map(int, parameter["shape"])) for parameter in attributes["parameters"]]
        optimizer = str(attributes["optimizer"])
    layouts = dict[str, Layout]()
    for name in store.commit.arrays:
        try:
            layouts[name] = store.layout(name)
        except DamagedStoreError as error:
            damage.append(str(error))
    num_examples = None
    try:
        num_examples = _count_examples(store)
    except DamagedStoreError as error:
        damage.append(str(error))
    descriptions = _descriptions(store.commit.arrays)
    metadata_bytes, stored = 0, dict.fromkeys(store.commit.arrays, 0)
    leftovers: dict[str, dict[str, int]] = defaultdict(dict)
    for file, size in file_sizes(path):
        array, _, chunk = file.rpartition("/c/")
        if file.endswith(".partial"):
            leftovers[_INTERRUPTED][file] = size
        elif file in descriptions:
            metadata_bytes += size
        elif array not in stored or not chunk.replace("/", "").isdigit():
            leftovers[_UNKNOWN][file] = size
        elif _is_beyond(chunk, layouts.get(array)):
            leftovers[_BEYOND][file] = size
        else:
            stored[array] += size
    if isinstance(path, Path):
        for beside in (path.with_name(f"{path.name}.{part}.partial") for part in ("new", "old")):
            if beside.is_dir():
                leftovers[_BESIDE][str(beside)] = sum(size for _, size in file_sizes(beside))
    return StoreInfo(
        path=str(path),
        format_version=attributes["explaind_format"],
        complete=store.commit.complete,
        num_steps=store.commit.num_steps,
        snapshot_every=int(attributes.get("snapshot_every", 1)),
        inputs="by_reference" if attributes.get("inputs") == "by_reference" else "stored",
        num_examples=num_examples,
        model=str(attributes.get("model", "unknown")),
        optimizer=optimizer,
        num_elements=sum(sizes),
        num_tensors=len(sizes),
        arrays=tuple(
            ArrayInfo(
                name=name,
                dims=layout.dims,
                shape=layout.shape,
                dtype=layout.dtype,
                stored_bytes=stored[name],
                plain_bytes=layout.num_bytes,
            )
            for name, layout in layouts.items()
        ),
        metadata_bytes=metadata_bytes,
        leftovers=tuple(
            Leftover(what=what, paths=tuple(sorted(found)), num_bytes=sum(found.values()))
            for what, found in leftovers.items()
        ),
        damage=tuple(dict.fromkeys(damage)),
    )


def _count_examples(store: StoreReader) -> int:
    if not store.has("row_example"):  # no gradient came back to any call
        return 0
    rows = store.read("call_rows")[store.read("call_step") < store.commit.num_steps].sum()
    return len(np.unique(store.read("row_example", 0, int(rows))))


def _descriptions(arrays: Iterable[str]) -> set[str]:
    """The files that describe the run, its arrays, and the groups that these are in."""
    places = {place for name in arrays for place in (PurePosixPath(name), *PurePosixPath(name).parents)}
    return {COMMIT_FILE} | {str(place / "zarr.json") for place in places}


def _is_beyond(chunk: str, layout: Layout | None) -> bool:
    """Whether a chunk, `3/0` say, lies behind the last row that is valid."""
    return layout is not None and int(chunk.partition("/")[0]) >= layout.num_chunks
