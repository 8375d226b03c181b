"""Arrays of a result on their way to where they are kept: in memory, or in a zarr store that a thread writes."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from explaind.commit import COMMIT_FILE
from explaind.errors import StoreExistsError, StoreUnreachableError
from explaind.places import Place
from explaind.remote import RemotePath

__all__ = [
    "CHUNK_BYTES",
    "STEP_AXES",
    "Kept",
    "Sink",
    "Stored",
    "check_unused",
    "chunk_sizes",
    "new_store",
    "write_dataset",
]

CHUNK_BYTES = 8 << 20
"""Of a chunk before it is compressed."""

STEP_AXES = ("step", "update_step", "window")
"""The axes that a result is filled along."""

Region = tuple[slice, ...]


class Sink(Protocol):
    """Takes in the arrays of a result, block by block; every entry once."""

    def block_steps(self, name: str) -> int:
        """How many steps of an array should be put at once."""
        ...

    def put(self, name: str, region: Region, block: NDArray[np.float64]) -> None:
        """Take over a block; the caller does not use it again."""
        ...


class Kept:
    """Arrays in memory."""

    def __init__(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        self.arrays = {name: np.full(tuple(own.values()), np.nan) for name, own in sizes.items()}
        """By name; what was not put is NaN."""

    def block_steps(self, name: str) -> int:
        """See `Sink.block_steps`."""
        return 1

    def put(self, name: str, region: Region, block: NDArray[np.float64]) -> None:
        """See `Sink.put`."""
        self.arrays[name][region] = block


class Stored:
    """Arrays of a new zarr group, written by a thread, so that the next block is computed meanwhile.

    What was never written, or is lost, reads as NaN.

    Args:
        path: directory of the group.
        sizes: of every array the length of its dimensions.
        num_queries: as many queries are put at once.
    """

    def __init__(self, path: Path, sizes: Mapping[str, Mapping[str, int]], *, num_queries: int) -> None:
        group = zarr.create_group(path)
        self._arrays = {
            name: group.create_array(
                name,
                shape=tuple(own.values()),
                chunks=tuple(chunk_sizes(own, num_queries=num_queries).values()),
                dtype=np.float64,
                compressors=[BloscCodec(cname="lz4", shuffle="bitshuffle", typesize=8), Crc32cCodec()],
                fill_value=np.nan,
                dimension_names=tuple(own),
            )
            for name, own in sizes.items()
        }
        self._steps = {
            name: chunk_sizes(own, num_queries=num_queries).get(next((a for a in STEP_AXES if a in own), ""), 1)
            for name, own in sizes.items()
        }
        self._thread, self._writing = ThreadPoolExecutor(1), Future[None]()
        self._writing.set_result(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def block_steps(self, name: str) -> int:
        """See `Sink.block_steps`."""
        return self._steps[name]

    def put(self, name: str, region: Region, block: NDArray[np.float64]) -> None:
        """See `Sink.put`; waits for the block before, and raises what has gone wrong with it."""
        self._writing.result()
        self._writing = self._thread.submit(self._write, name, region, block)

    def finish(self) -> None:
        """Wait until everything is written, and raise what has gone wrong."""
        self._writing.result()

    def _write(self, name: str, region: Region, block: NDArray[np.float64]) -> None:
        self._arrays[name][region] = block


def chunk_sizes(sizes: Mapping[str, int], *, num_queries: int) -> dict[str, int]:
    """Lengths of a chunk: whole steps as far as they fit, else parts of one, cut along its first axes."""
    chunk = {name: max(1, size) for name, size in sizes.items()}
    steps = next((name for name in sizes if name in STEP_AXES), None)
    if steps is not None:
        chunk[steps] = 1
    if "query" in chunk:
        chunk["query"] = min(chunk["query"], num_queries)
    for name, size in chunk.items():
        others = 8 * math.prod(other for axis, other in chunk.items() if axis != name)
        chunk[name] = min(size, max(1, CHUNK_BYTES // others))
    if steps is not None:
        chunk[steps] = min(max(1, CHUNK_BYTES // (8 * math.prod(chunk.values()))), sizes[steps])
    return chunk


def check_unused(path: Place) -> None:
    """Refuse a path where something is.

    Raises:
        StoreExistsError: there is, or a store that is to come there is being written.
    """
    if path.exists():
        raise StoreExistsError(f"{path} exists already; save the result somewhere else, or remove it first.")
    if isinstance(path, Path) and _unfinished(path).exists():
        raise StoreExistsError(
            f"{_unfinished(path)} exists: a result for {path.name} is being written, or its writer was killed. Remove "
            "it if nobody writes it any more, or save the result somewhere else."
        )


@contextmanager
def new_store(path: Place) -> Iterator[Path]:
    """A directory to write a store in, which is at `path` once it is whole; if that fails, nothing is left of it.

    For object storage it is a temporary one. What is there counts as nothing until the last file has been uploaded: the
    root's metadata, or in a run the commit.

    Raises:
        StoreExistsError: something is there already.
        StoreUnreachableError: it cannot be uploaded.
    """
    check_unused(path)
    if isinstance(path, RemotePath):
        with tempfile.TemporaryDirectory(prefix="explaind-") as directory:
            made = Path(directory) / path.name
            made.mkdir()
            yield made
            _upload(made, path)
        return
    unfinished = _unfinished(path)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _upload(store: Path, path: RemotePath) -> None:
    root = "zarr.json"
    try:
        path.upload(store, last=(root, COMMIT_FILE))
    except BaseException:
        with suppress(StoreUnreachableError):
            path.clear(first=COMMIT_FILE, last=root)
        raise


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def write_dataset(path: Path, dataset: xr.Dataset) -> None:
    """Add a dataset's variables, coordinates and attributes to a store."""
    texts: dict[Any, Any] = {n: c.astype(object) for n, c in dataset.coords.items() if c.dtype.kind == "U"}
    dataset.assign_coords(texts).to_zarr(path, mode="a", consolidated=False)
