"""The page file: slots for pages and blocks for map nodes, in one flat file.

::

    byte 0                 header block: magic, format version, page size, store id, crc32c;
                           the rest of slot 0 is unused
    byte page_bytes * n    slot n: one page, or blocks of 4 KiB that hold map nodes

Blocks from `COLD_BLOCK` on are read from the packs of the cold tier beside it (`tiers.packs`).

Pages are read and written past the page cache where the file system allows it (O_DIRECT). What the
operating system refuses becomes a typed error here; what comes back is not trusted, its reader
checks it.
"""

from __future__ import annotations

import errno
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, COLD_BLOCK
from tiers.checksum import bound_crcs32c
from tiers.disk import Bytes, Disk, File, aligned_buffer
from tiers.errors import CorruptionError, StoreFullError, StoreIOError
from tiers.packs import COLD_NAME, Packs
from tiers.root import FORMAT_VERSION, FORMATS_READ
from tiers.transfer import IN_FLIGHT, Copies, Words

_HEADER = struct.Struct(
    "<8sII16sI"
)  # magic, format version, page bytes, store id, crc32c of what is before
MAGIC = b"dpncpage"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SlotFile:
    """The page file of an open store.

    Parameters
    ----------
    disk : Disk
    file : File
        Opened by `create` or `open`.
    page_bytes : int
    size_bytes_max : int or None
        The NVMe budget.

    Attributes
    ----------
    packs : Packs
        The cold tier.
    """

    def __init__(self, disk: Disk, file: File, page_bytes: int, size_bytes_max: int | None) -> None:
        self._disk = disk
        self.file = file
        self.page_bytes = page_bytes
        self.size_bytes_max = size_bytes_max
        # Several threads read at once.
        self._counting = threading.Lock()
        self.bytes_read = 0
        self.bytes_written = 0
        self.n_syncs = 0
        self.packs = Packs(disk, file.path.parent / COLD_NAME, page_bytes)

    @classmethod
    def create(
        cls, disk: Disk, path: Path, store_id: bytes, page_bytes: int, size_bytes_max: int | None
    ) -> SlotFile:
        """Make the file with its header; durable only after `sync`."""
        slots = cls(disk, disk.open(path, "create", direct=True), page_bytes, size_bytes_max)
        try:
            header = aligned_buffer(1, BLOCK_BYTES)
            content = _HEADER.pack(MAGIC, FORMAT_VERSION, page_bytes, store_id, 0)[:-4]
            header[0, : _HEADER.size] = np.frombuffer(
                content + struct.pack("<I", google_crc32c.value(content)), np.uint8
            )
            slots.grow(page_bytes // BLOCK_BYTES, page_bytes // BLOCK_BYTES)
            slots.write_blocks([0], [header[0]])
        except BaseException:
            disk.close(slots.file)
            raise
        return slots

    @classmethod
    def open(
        cls,
        disk: Disk,
        path: Path,
        store_id: bytes,
        page_bytes: int,
        size_bytes_max: int | None,
        *,
        read_only: bool,
    ) -> SlotFile:
        """Open the file and check that its header belongs to this store.

        Raises
        ------
        CorruptionError
            If the header is damaged or is another store's.
        """
        slots = cls(
            disk,
            disk.open(path, "read" if read_only else "write", direct=True),
            page_bytes,
            size_bytes_max,
        )
        try:
            header = aligned_buffer(1, BLOCK_BYTES)
            slots.read_blocks([0], [header[0]])
            content = header[0, : _HEADER.size].tobytes()
            magic, version, found_page_bytes, found_id, crc = _HEADER.unpack(content)
            if magic != MAGIC or google_crc32c.value(content[:-4]) != crc:
                raise CorruptionError(f"{path}: the header of the page file is damaged")
            is_known = version in FORMATS_READ
            if not is_known or (found_page_bytes, found_id) != (page_bytes, store_id):
                raise CorruptionError(f"{path}: the page file belongs to another store")
        except BaseException:
            disk.close(slots.file)
            raise
        return slots

    def size_blocks(self) -> int:
        """Return how many whole blocks the file has.

        Raises
        ------
        StoreIOError
            If the operating system refuses.
        """
        try:
            return self._disk.size(self.file) // BLOCK_BYTES
        except OSError as refused:
            raise StoreIOError(
                refused.errno, f"looking at {self.file.path} failed: {refused.strerror}"
            ) from refused

    def read_pages(
        self,
        blocks: Words,
        memory: Bytes,
        rows: Words,
        identities: npt.NDArray[np.uint64],
        *,
        in_flight: int = IN_FLIGHT,
        copies: Copies | None = None,
    ) -> tuple[Words, bool]:
        """Read pages from these blocks on into rows of `memory`.

        Returns
        -------
        crcs : int64 array (n,)
            crc32c bound to the identities.
        have_copied : bool
            Whether `copies` were made, if there are any, of the pages whose checksum is right.

        Raises
        ------
        CorruptionError, StoreIOError
            As `read_blocks` does.
        """
        sums = None
        read_rows = getattr(self._disk, "read_rows", None)
        if read_rows is not None and not (blocks >= COLD_BLOCK).any():
            offsets = blocks * BLOCK_BYTES
            try:
                asked = self.file, offsets, memory, rows, identities
                sums = read_rows(*asked, in_flight=in_flight, copies=copies)
            except (EOFError, OSError) as refused:
                raise self._unread(refused) from refused
        if sums is None:
            buffers = [memory[row] for row in rows.tolist()]
            self.read_blocks(blocks.tolist(), buffers, in_flight=in_flight)
            return bound_crcs32c(buffers, identities), False
        self._count_read(len(rows) * self.page_bytes)
        found: Words = sums
        return found, copies is not None

    def read_blocks(
        self, blocks: Sequence[int], buffers: Sequence[Bytes], *, in_flight: int = IN_FLIGHT
    ) -> None:
        """Read from each of these blocks on into its buffer, 4 KiB or a page.

        Raises
        ------
        CorruptionError
            If the file ends before, or a pack is damaged.
        StoreIOError
            If the operating system refuses.
        """
        if blocks and max(blocks) >= COLD_BLOCK:
            hot = [i for i, block in enumerate(blocks) if block < COLD_BLOCK]
            cold = [i for i, block in enumerate(blocks) if block >= COLD_BLOCK]
            self.packs.read([blocks[i] for i in cold], [buffers[i] for i in cold])
            blocks, buffers = [blocks[i] for i in hot], [buffers[i] for i in hot]
        try:
            self._disk.read_batch(
                self.file, [block * BLOCK_BYTES for block in blocks], buffers, in_flight=in_flight
            )
        except (EOFError, OSError) as refused:
            raise self._unread(refused) from refused
        self._count_read(sum(len(buffer) for buffer in buffers))

    def _count_read(self, n_bytes: int) -> None:
        with self._counting:
            self.bytes_read += n_bytes

    def _unread(self, refused: EOFError | OSError) -> CorruptionError | StoreIOError:
        if isinstance(refused, EOFError):
            return CorruptionError(f"the page file is cut short: {refused}")
        return StoreIOError(refused.errno, f"reading {self.file.path} failed: {refused.strerror}")

    def write_blocks(
        self, blocks: Sequence[int], buffers: Sequence[Bytes], *, in_flight: int = IN_FLIGHT
    ) -> None:
        """Write a buffer at each of these blocks; durable after `sync`.

        Raises
        ------
        StoreFullError, StoreIOError
            If the operating system refuses; any part may have been written.
        """
        n_bytes = sum([buffer.size for buffer in buffers])
        try:
            self._disk.write_batch(
                self.file, [block * BLOCK_BYTES for block in blocks], buffers, in_flight=in_flight
            )
        except OSError as refused:
            raise _typed(refused, f"writing {self.file.path}") from refused
        self.bytes_written += n_bytes

    def write_rows(
        self,
        blocks: Words,
        memory: Bytes,
        rows: Words,
        identities: npt.NDArray[np.uint64] | None = None,
        contents: Bytes | None = None,
    ) -> Words:
        """Write rows of `memory` from these blocks on; return crc32c bound to their identities.

        Zeros without identities. Rows are filled with `contents` before, if given. Durable after
        `sync`.

        Raises
        ------
        StoreFullError, StoreIOError
            As `write_blocks` does.
        """
        write_rows = getattr(self._disk, "write_rows", None)
        if write_rows is not None:
            try:
                sums = write_rows(
                    *(self.file, blocks * BLOCK_BYTES, memory, rows, identities), contents=contents
                )
            except OSError as refused:
                raise _typed(refused, f"writing {self.file.path}") from refused
            if sums is not None:
                self.bytes_written += len(rows) * memory.shape[1]
                found: Words = sums
                return found
        if contents is not None:
            fill_rows(memory, rows, contents)
        buffers = [memory[row] for row in rows.tolist()]
        crcs = (
            np.zeros(len(rows), np.int64)
            if identities is None
            else bound_crcs32c(buffers, identities)
        )
        self.write_blocks(blocks.tolist(), buffers)
        return crcs

    def grow(self, blocks_min: int, blocks_wanted: int) -> int:
        """Lengthen the file to `blocks_wanted` blocks, or at least `blocks_min`; return how many.

        Raises
        ------
        StoreFullError
            If neither the budget nor the disk has room for `blocks_min`.
        """
        blocks_max = None if self.size_bytes_max is None else self.size_bytes_max // BLOCK_BYTES
        if blocks_max is not None and blocks_min > blocks_max:
            raise StoreFullError(
                errno.ENOSPC,
                f"the page file would need {blocks_min * BLOCK_BYTES} bytes and the NVMe budget is "
                f"{self.size_bytes_max}",
            )
        if blocks_max is not None:
            blocks_wanted = min(blocks_wanted, blocks_max)
        per_slot = self.page_bytes // BLOCK_BYTES
        for blocks in (max(blocks_min, blocks_wanted // per_slot * per_slot), blocks_min):
            try:
                self._disk.allocate(self.file, blocks * BLOCK_BYTES)
                return blocks
            except OSError as refused:
                failure = refused
                if refused.errno not in FULL:
                    break
        raise _typed(failure, f"growing {self.file.path}") from failure

    def sync(self) -> None:
        """Make contents and length durable; an `OSError` goes to the caller, who must not retry."""
        self._disk.sync(self.file)
        self.n_syncs += 1

    def truncate(self, size_blocks: int) -> None:
        """Cut the file; an `OSError` goes to the caller."""
        self._disk.truncate(self.file, size_blocks * BLOCK_BYTES)

    def close(self) -> None:
        self._disk.close(self.file)


def fill_rows(memory: Bytes, rows: Words, contents: Bytes) -> None:
    """Fill rows of an array with contents, uint8 (n, n_bytes), and zeros behind them."""
    memory[rows, : contents.shape[1]] = contents
    memory[rows, contents.shape[1] :] = 0


def _typed(refused: OSError, action: str) -> StoreFullError | StoreIOError:
    kind = StoreFullError if refused.errno in FULL else StoreIOError
    return kind(refused.errno, f"{action} failed: {refused.strerror}")
