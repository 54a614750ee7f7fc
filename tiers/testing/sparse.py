"""The bytes of one file, in immutable 4 KiB chunks that copies of the file share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

CHUNK_BYTES = 4096
ZEROS = bytes(CHUNK_BYTES)


class SparseBytes:
    """A file's bytes; a chunk that was never written reads as zeros.

    Parameters
    ----------
    chunks : dict of int to bytes, optional
        Chunks to begin with, by number, each of `CHUNK_BYTES`; never changed here.
    size_bytes : int

    Attributes
    ----------
    size_bytes : int
    """

    __slots__ = ("_chunks", "_is_shared", "size_bytes")

    def __init__(self, chunks: dict[int, bytes] | None = None, size_bytes: int = 0) -> None:
        self.size_bytes = size_bytes
        self._chunks: dict[int, bytes] = {} if chunks is None else chunks
        self._is_shared = chunks is not None

    @property
    def chunks(self) -> Mapping[int, bytes]:
        """The chunks that were ever written, by number; bytes past the end are zeros."""
        return self._chunks

    def copy(self) -> SparseBytes:
        """Return an independent file with the same bytes; chunks are shared until written."""
        self._is_shared = True
        return SparseBytes(self._chunks, self.size_bytes)

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return at most `size_bytes` bytes from `offset`, fewer where the file ends."""
        content = bytearray(max(0, min(size_bytes, self.size_bytes - offset)))
        if content:
            self.read_into(offset, memoryview(content))
        return bytes(content)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `offset` on.

        Raises
        ------
        EOFError
            If the file ends before; how much of `target` is filled is not said.
        """
        size_bytes = len(target)
        if offset + size_bytes > self.size_bytes:
            raise EOFError(f"the file ends at byte {self.size_bytes}")
        chunks = self._chunks
        number, start = divmod(offset, CHUNK_BYTES)
        if size_bytes == CHUNK_BYTES and not start:
            target[:] = chunks.get(number, ZEROS)
            return
        if not start and not size_bytes % CHUNK_BYTES:
            numbers = range(number, number + size_bytes // CHUNK_BYTES)
            target[:] = b"".join([chunks.get(number, ZEROS) for number in numbers])
            return
        done = 0
        while done < size_bytes:
            step = min(CHUNK_BYTES - start, size_bytes - done)
            chunk = chunks.get(number, ZEROS)
            target[done : done + step] = (
                chunk if step == CHUNK_BYTES else chunk[start : start + step]
            )
            done += step
            number += 1
            start = 0

    def write(self, offset: int, content: bytes) -> None:
        """Put `content` at `offset`; the file grows as needed."""
        self._own()
        chunks = self._chunks
        size_bytes = len(content)
        number, start = divmod(offset, CHUNK_BYTES)
        done = 0
        while done < size_bytes:
            step = min(CHUNK_BYTES - start, size_bytes - done)
            if step == CHUNK_BYTES:
                chunks[number] = content[done : done + step]
            else:
                old = chunks.get(number, ZEROS)
                chunks[number] = old[:start] + content[done : done + step] + old[start + step :]
            done += step
            number += 1
            start = 0
        self.size_bytes = max(self.size_bytes, offset + size_bytes)

    def put_chunk(self, number: int, content: bytes) -> None:
        """Make the `CHUNK_BYTES` of one chunk `content`; the file's size stays what it is."""
        self._own()
        self._chunks[number] = content

    def resize(self, size_bytes: int) -> None:
        """Cut the file or lengthen it with zeros."""
        if size_bytes < self.size_bytes:
            self._own()
            last, kept = divmod(size_bytes, CHUNK_BYTES)
            for number in [
                number for number in self._chunks if number > last or (not kept and number == last)
            ]:
                del self._chunks[number]
            if kept and last in self._chunks:
                self._chunks[last] = self._chunks[last][:kept].ljust(CHUNK_BYTES, b"\0")
        self.size_bytes = size_bytes

    def _own(self) -> None:
        if self._is_shared:
            self._chunks = self._chunks.copy()
            self._is_shared = False


def chunks_of(offsets: Sequence[int], sizes_bytes: Sequence[int]) -> tuple[int, ...]:
    """Return the numbers of the chunks that pieces of a file lie in, in their order."""
    numbers: list[int] = []
    for offset, size_bytes in zip(offsets, sizes_bytes, strict=True):
        end = offset + size_bytes
        numbers.extend(range(offset // CHUNK_BYTES, -(-end // CHUNK_BYTES)))
    return tuple(numbers)
