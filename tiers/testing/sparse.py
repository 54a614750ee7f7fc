"""The bytes of one file, in immutable 4 KiB chunks that copies of the file share."""

from __future__ import annotations

CHUNK_BYTES = 4096

_ZEROS = bytes(CHUNK_BYTES)


class SparseBytes:
    """A file's bytes; a chunk that was never written reads as zeros.

    Attributes
    ----------
    size_bytes : int
    """

    __slots__ = ("_chunks", "size_bytes")

    def __init__(self) -> None:
        self.size_bytes = 0
        self._chunks: dict[int, bytes] = {}

    def copy(self) -> SparseBytes:
        """Return an independent file with the same bytes; chunks are shared until written."""
        twin = SparseBytes()
        twin.size_bytes = self.size_bytes
        twin._chunks = self._chunks.copy()
        return twin

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return at most `size_bytes` bytes from `offset`, fewer where the file ends."""
        end = min(offset + size_bytes, self.size_bytes)
        if end <= offset:
            return b""
        first, last = offset // CHUNK_BYTES, (end - 1) // CHUNK_BYTES
        if first == last:
            whole = self._chunks.get(first, _ZEROS)
        else:
            whole = b"".join(self._chunks.get(i, _ZEROS) for i in range(first, last + 1))
        start = offset - first * CHUNK_BYTES
        return whole[start : start + end - offset]

    def write(self, offset: int, content: bytes) -> None:
        """Put `content` at `offset`; the file grows as needed."""
        position = 0
        while position < len(content):
            number, start = divmod(offset + position, CHUNK_BYTES)
            piece = content[position : position + CHUNK_BYTES - start]
            if len(piece) < CHUNK_BYTES:
                old = self._chunks.get(number, _ZEROS)
                piece = old[:start] + piece + old[start + len(piece) :]
                position += CHUNK_BYTES - start
            else:
                position += CHUNK_BYTES
            self._chunks[number] = piece
        self.size_bytes = max(self.size_bytes, offset + len(content))

    def resize(self, size_bytes: int) -> None:
        """Cut the file or lengthen it with zeros."""
        if size_bytes < self.size_bytes:
            last, kept = divmod(size_bytes, CHUNK_BYTES)
            for number in [
                number for number in self._chunks if number > last or (not kept and number == last)
            ]:
                del self._chunks[number]
            if kept and last in self._chunks:
                self._chunks[last] = self._chunks[last][:kept].ljust(CHUNK_BYTES, b"\0")
        self.size_bytes = size_bytes
