"""Chunks of an array in object storage, on their way through zarr: each is read with one request, and then checked."""

from __future__ import annotations

from typing import Any, Self

from zarr.abc.store import ByteRequest, RangeByteRequest, Store
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import FsspecStore, WrapperStore

from explaind.metadata import CHUNK_HEADER, ArrayMetadata
from explaind.remote import RemotePath, reached

__all__ = ["RemoteChunks"]


class RemoteChunks(WrapperStore[Store]):
    """A store that zarr reads the chunks of one array from; in place of a chunk that is missing it gives an error.

    No more is read of an object than a chunk can have, and what is read is checked before it is decoded.

    Args:
        place: where the store of the run is.
        metadata: of the array.
    """

    def __init__(self, place: RemotePath, metadata: ArrayMetadata) -> None:
        super().__init__(FsspecStore.from_url(str(place), read_only=True))
        self._place, self._metadata = place, metadata

    def _with_store(self, store: Any) -> Self:
        raise NotImplementedError("chunks are only read")

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer:
        """The bytes of a chunk, of which zarr asks for the whole.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is not of the size that the metadata say.
            StoreUnreachableError: it cannot be told.
        """
        assert byte_range is None, "chunks are not sharded"
        most = self._metadata.largest_chunk
        with reached(self._place / key):
            found = await self._store.get(key, prototype, RangeByteRequest(0, most + 1))
        if found is None:
            raise FileNotFoundError(f"there is no {self._place / key}")
        self._metadata.check_chunk(len(found), found.to_bytes()[:CHUNK_HEADER])
        return found
