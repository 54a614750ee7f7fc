"""A zarr store of a directory, on top of `tiers.disk`: what zarr reads and writes goes through it.

Keys are file names, with ``/`` between directories. A value is a file of its own, written once; it
is durable when `set` returns, its name when the directory has been synced. Opened for each value
and closed again: nothing is held between two calls.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import numpy as np
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    Store,
    SuffixByteRequest,
)
from zarr.core.buffer import Buffer, BufferPrototype

from tiers.disk import Disk


class ZarrStore(Store):
    """A directory as a zarr store.

    Parameters
    ----------
    disk : Disk
    directory : Path
        Need not exist before the first value is set.
    documents : dict of str to bytes
        Metadata that is known: it reads as this, whatever the files say.
    """

    supports_writes = True
    supports_deletes = False
    supports_listing = False
    supports_partial_writes = False

    def __init__(self, disk: Disk, directory: Path, documents: dict[str, bytes]) -> None:
        super().__init__(read_only=False)
        self._disk = disk
        self._directory = directory
        self._documents = documents
        self.bytes_read = 0
        self.bytes_written = 0

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ZarrStore)
            and self._directory == other._directory
            and self._disk is other._disk
        )

    def __hash__(self) -> int:
        return hash(self._directory)

    def __str__(self) -> str:
        return f"dpnc://{self._directory}"

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key in self._documents:
            return prototype.buffer.from_bytes(self._documents[key])
        content = self._read(key, byte_range)
        return None if content is None else prototype.buffer.from_bytes(content)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def exists(self, key: str) -> bool:
        return key in self._documents or self._disk.exists(self._directory / key)

    async def set(self, key: str, value: Buffer) -> None:
        content = np.frombuffer(value.to_bytes(), np.uint8)
        path = self._directory / key
        # What a transaction left behind that never committed.
        if self._disk.exists(path):
            self._disk.unlink(path)
        file = self._disk.open(path, "create", direct=False)
        try:
            self._disk.write_batch(file, [0], [content])
            self._disk.sync(file)
        finally:
            self._disk.close(file)
        self.bytes_written += len(content)

    async def delete(self, key: str) -> None:
        raise NotImplementedError("a chunk is never taken back by zarr")

    def list(self) -> AsyncIterator[str]:
        raise NotImplementedError("the chunks of this store are found by their numbers")

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("the chunks of this store are found by their numbers")

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        raise NotImplementedError("the chunks of this store are found by their numbers")

    def _read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        try:
            file = self._disk.open(self._directory / key, "read", direct=False)
        except FileNotFoundError:
            return None
        try:
            first, stop = _bounds(byte_range, self._disk.size(file))
            content = np.empty(stop - first, np.uint8)
            self._disk.read_batch(file, [first], [content])
        finally:
            self._disk.close(file)
        self.bytes_read += len(content)
        return content.tobytes()


def _bounds(byte_range: ByteRequest | None, size_bytes: int) -> tuple[int, int]:
    """Return which bytes of a file are asked for, no more than there are."""
    match byte_range:
        case None:
            first, stop = 0, size_bytes
        case RangeByteRequest(start, end):
            first, stop = start, end
        case OffsetByteRequest(offset):
            first, stop = offset, size_bytes
        case SuffixByteRequest(suffix):
            first, stop = size_bytes - suffix, size_bytes
    first = min(max(0, first), size_bytes)
    return first, max(first, min(stop, size_bytes))
