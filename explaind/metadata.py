"""The metadata of a store, believed only as far as it was checked: whoever wrote it may be a stranger.

Nothing in it is run, imported or unpickled, and every size that it claims is compared with the files that are there
before memory is taken for it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from explaind.checksums import check_metadata
from explaind.errors import DamagedStoreError, StoreUnreachableError
from explaind.places import Place, read_file

__all__ = ["CHUNK_HEADER", "ArrayMetadata", "read_attributes", "read_json"]

CHUNK_HEADER = 16
"""As many bytes of a chunk tell its size."""

_KINDS_OF_NUMBERS = "biuf"
_CODECS = (
    ["transpose", "bytes", "blosc", "crc32c"],
    ["transpose", "bytes", "crc32c"],
    ["bytes", "blosc", "crc32c"],
    ["bytes", "crc32c"],
)
_LARGEST_JSON_BYTES = 64 << 20
_CRC_BYTES = 4
_LARGEST_EXPANSION = 1 << 16
"""More than any of blosc's compressors makes of a byte."""


def read_json(file: Place) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError, OSError: there is none.
    """
    try:
        content = json.loads(read_file(file, most=_LARGEST_JSON_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected a JSON object, got {type(content).__name__}")
    return content


def read_attributes(store: Place) -> dict[str, Any]:
    """The attributes of a store's root group, which describe the run.

    Raises:
        DamagedStoreError: they are missing, or not what was written.
    """
    try:
        metadata = read_json(store / "zarr.json")
        attributes: dict[str, Any] = metadata["attributes"]
        version = attributes.get("explaind_format")
        check_metadata(metadata, required=not isinstance(version, int) or version > 2)
    except StoreUnreachableError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedStoreError(f"the metadata of {store} cannot be read: {error!r}") from error
    return attributes


@dataclass(frozen=True, kw_only=True)
class ArrayMetadata:
    """What the `zarr.json` of an array says, after it was checked."""

    content: dict[str, Any]
    """All of it."""
    dims: tuple[str, ...]
    """Names of the dimensions, the growing one first."""
    shape: tuple[int, ...]
    """Number of entries along each, along the first with the room that the writer keeps."""
    chunk_rows: int
    """Number of rows in a chunk."""
    dtype: np.dtype[Any]
    """Type of the entries."""

    @classmethod
    def read(cls, store: Place, name: str, *, sealed: bool) -> ArrayMetadata:
        """Read it.

        Args:
            store: place of the store.
            name: name of the array.
            sealed: whether it must have a checksum.

        Raises:
            DamagedStoreError: it is missing, or no array that explaind writes.
        """
        try:
            if any(part in ("", ".", "..") for part in name.split("/")):
                raise ValueError("its name is no path within the store")
            content = read_json(store / name / "zarr.json")
            check_metadata(content, required=sealed)
            return cls._checked(content)
        except StoreUnreachableError:
            raise
        except FileNotFoundError as error:
            raise DamagedStoreError(f"the array '{name}' is missing from {store}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DamagedStoreError(f"the metadata of '{name:.100}' in {store} is damaged: {error!r:.500}") from error

    @classmethod
    def _checked(cls, content: dict[str, Any]) -> ArrayMetadata:
        if content["node_type"] != "array" or content["zarr_format"] != 3:
            raise ValueError("it is not that of an array of Zarr v3")
        if not isinstance(content["data_type"], str):
            raise ValueError(f"a data type {content['data_type']!r}")
        shape = _sizes(content["shape"], 0)
        chunks = _sizes(content["chunk_grid"]["configuration"]["chunk_shape"], 1)
        dims: Any = content.get("dimension_names")
        dtype = np.dtype(content["data_type"])
        codecs = [codec["name"] for codec in content["codecs"]]
        separator = content["chunk_key_encoding"].get("configuration", {"separator": "/"})["separator"]
        expected = {
            "numbers": dtype.kind in _KINDS_OF_NUMBERS and dtype.name == content["data_type"],
            "a growing dimension, and names for all": isinstance(dims, list)
            and bool(shape)
            and len(dims) == len(shape)
            and all(isinstance(dim, str) for dim in dims),
            "chunks that span all other dimensions": content["chunk_grid"]["name"] == "regular"
            and len(chunks) == len(shape)
            and chunks[1:] == [max(1, size) for size in shape[1:]],
            "chunk keys like c/0/0": (content["chunk_key_encoding"]["name"], separator) == ("default", "/"),
            "the codecs transpose, bytes, blosc and crc32c": codecs in _CODECS,
            "no storage transformers": not content.get("storage_transformers"),
        }
        for what, fulfilled in expected.items():
            if not fulfilled:
                raise ValueError(f"expected {what}")
        return cls(content=content, dims=tuple(dims), shape=tuple(shape), chunk_rows=chunks[0], dtype=dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, not compressed."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def chunk_file(self, index: int) -> str:
        """Where a chunk is, below the array's directory."""
        return "/".join(["c", str(index), *["0"] * (len(self.shape) - 1)])

    @property
    def largest_chunk(self) -> int:
        """Most bytes that the file of a chunk can have: blosc makes nothing larger but for its header."""
        return self.chunk_rows * self.row_bytes + CHUNK_HEADER + _CRC_BYTES

    def check_chunk(self, num_bytes: int, header: bytes) -> None:
        """Compare the size of a chunk with what its file says and can hold.

        Args:
            num_bytes: size of the file.
            header: its first `CHUNK_HEADER` bytes.

        Raises:
            ValueError: they differ.
        """
        chunk_bytes = self.chunk_rows * self.row_bytes
        if "blosc" not in (codec["name"] for codec in self.content["codecs"]):
            fits = num_bytes == chunk_bytes + _CRC_BYTES
        elif num_bytes < CHUNK_HEADER + _CRC_BYTES:
            fits = False
        else:
            unpacked, packed = int.from_bytes(header[4:8], "little"), int.from_bytes(header[12:16], "little")
            fits = (unpacked, packed) == (chunk_bytes, num_bytes - _CRC_BYTES)
            fits &= chunk_bytes <= _LARGEST_EXPANSION * num_bytes
        if not fits:
            raise ValueError(f"a file of {num_bytes:,} bytes is not a chunk of {chunk_bytes:,}")


def _sizes(content: Any, least: int) -> list[int]:
    """A list of sizes, which must be integers."""
    if not isinstance(content, list) or not all(type(size) is int and least <= size < 1 << 62 for size in content):
        raise ValueError(f"sizes {content!r:.100}")
    return content
