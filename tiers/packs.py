"""Packs: the files of the cold tier, each with many pages, written once and never changed.

One zarr v3 group that plain zarr opens; a pack is one chunk of each array::

    cold/zarr.json
    cold/pages/zarr.json         uint8 (slots, page_bytes): a shard is a pack, a chunk of it a page
    cold/pages/c.<pack>.0        zstd and crc32c for each page
    cold/ids/zarr.json           uint64 (slots, 4): space, page, version and crc32c of each page
    cold/ids/c.<pack>.0

*Cold slots* are counted through: slot ``s`` is row ``s`` of both arrays, and in the page map it is
the blocks from ``COLD_BLOCK + s * blocks_per_slot`` on. A pack that is not full leaves the rest of
its slots empty for good. The ids are for a salvage; a reader needs the map alone.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from operator import not_
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, COLD_BLOCK, PACK_BLOCKS
from tiers.disk import Bytes, Disk
from tiers.errors import CorruptionError, StoreFullError, StoreIOError, TierError

if TYPE_CHECKING:
    from zarr import Array

    from tiers.zarr_store import ZarrStore

COLD_NAME = "cold"
ZSTD_LEVEL = 3
ID_FIELDS = ("space", "page", "version", "crc")
PLACE_BLOCKS = 1 << 44
_METADATA = "zarr.json"
_CHUNK = re.compile(r"c\.(\d+)\.0")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_SPAN_BYTES = 16  # of a chunk in the index of its shard: offset, length
_CRC_BYTES = 4
_NO_CHUNK = (1 << 64) - 1

Place = TypeVar("Place", int, npt.NDArray[np.int64])
Ids = npt.NDArray[np.uint64]


class Packs:
    """The packs of one store.

    Parameters
    ----------
    disk : Disk
    directory : Path
        It need not exist before the first pack is written.
    page_bytes : int

    Attributes
    ----------
    n_slots : int
        Slots of a pack.
    n_read, n_written, n_left : int
        Pages that were read and written; files of dead packs that could not be removed.
    """

    def __init__(self, disk: Disk, directory: Path, page_bytes: int) -> None:
        self._disk = disk
        self._directory = directory
        self._page_bytes = page_bytes
        self._per_slot = page_bytes // BLOCK_BYTES
        self._opened: tuple[ZarrStore, Any, Any] | None = None
        self._has_directory = False
        self._making = threading.Lock()
        self.n_slots = PACK_BLOCKS // self._per_slot
        self._bytes_read = 0
        self.n_read = 0
        self.n_written = 0
        self.n_left = 0

    @property
    def bytes_read(self) -> int:
        of_ids = 0 if self._opened is None else self._opened[0].bytes_read
        return self._bytes_read + of_ids

    @property
    def bytes_written(self) -> int:
        return 0 if self._opened is None else self._opened[0].bytes_written

    def first_block(self, pack: int) -> int:
        """Return the first block of a pack's first slot."""
        return COLD_BLOCK + pack * PACK_BLOCKS

    def pack_of(self, block: Place) -> Place:
        """Return the pack in which a block lies, or in which each of an array does."""
        return (block - COLD_BLOCK) // PACK_BLOCKS

    def read(self, blocks: Sequence[int], buffers: Sequence[Bytes]) -> None:
        """Read the pages of cold slots, by their first blocks.

        Raises
        ------
        CorruptionError
            If a pack is damaged or missing.
        StoreIOError
            If the operating system refuses.
        """
        of_pack: dict[int, list[int]] = {}
        for i, block in enumerate(blocks):
            of_pack.setdefault(self.pack_of(block), []).append(i)
        with self._typed_errors("reading"):
            for pack, places in of_pack.items():
                first = self.first_block(pack)
                rows = [(blocks[i] - first) // self._per_slot for i in places]
                self._read_shard(pack, rows, [buffers[i] for i in places])
        self.n_read += len(blocks)

    def write(self, pack: int, ids: Ids, content: Bytes) -> None:
        """Write a pack that no commit refers to; it is durable when this returns.

        Parameters
        ----------
        pack : int
        ids : uint64 array (n, 4)
        content : uint8 array (n, page_bytes)
            At least one page, at most `n_slots`.

        Raises
        ------
        StoreFullError, StoreIOError
            If the operating system refuses. What was written of it is of no harm.
        """
        first = pack * self.n_slots
        with self._typed_errors("writing"):
            with self._making:
                self._make_directories()
                pages, table = self._arrays()
            # zarr adds to a chunk that is there: one of a transaction that never committed.
            self.remove(pack)
            table[first : first + len(ids)] = ids
            if content.any():
                pages[first : first + len(ids)] = content
            else:
                self._write_zeros(pack)
            for name in ("ids", "pages"):
                self._disk.sync_directory(self._directory / name)
        self.n_written += len(ids)

    def ids(self, pack: int) -> Ids:
        """Return what a pack says of its pages, uint64 (n_slots, 4), zeros of those without one.

        Raises
        ------
        CorruptionError, StoreIOError
        """
        with self._typed_errors("reading"):
            _, table = self._arrays()
            found: Ids = np.asarray(table[pack * self.n_slots : (pack + 1) * self.n_slots])
            return found

    def numbers(self) -> list[int]:
        """Return the numbers of the packs that have files, ascending; dead ones too."""
        found: set[int] = set()
        with self._typed_errors("listing"):
            for directory in (self._directory / "pages", self._directory / "ids"):
                if self._disk.exists(directory):
                    matches = map(_CHUNK.fullmatch, self._disk.list_directory(directory))
                    found.update(int(match[1]) for match in matches if match)
        return sorted(found)

    def remove(self, pack: int) -> None:
        """Remove the files of a pack.

        Raises
        ------
        StoreIOError
        """
        with self._typed_errors("removing"):
            # Not the other way round: a salvage believes what ids say.
            for name in ("ids", "pages"):
                path = self._directory / name / f"c.{pack}.0"
                if self._disk.exists(path):
                    self._disk.unlink(path)

    def remove_ids(self, pack: int) -> None:
        """Remove what a pack says of its pages, which stay readable; see `tiers.leftovers`.

        Raises
        ------
        StoreIOError
        """
        with self._typed_errors("removing"):
            path = self._directory / "ids" / f"c.{pack}.0"
            if self._disk.exists(path):
                self._disk.unlink(path)

    def sync_ids(self) -> None:
        """Make durable which packs say something of their pages.

        Raises
        ------
        StoreIOError
        """
        with self._typed_errors("removing"):
            if self._disk.exists(self._directory / "ids"):
                self._disk.sync_directory(self._directory / "ids")

    def remove_dead(self, packs: Sequence[int]) -> None:
        """Remove packs that nothing refers to; those that cannot be now are counted in `n_left`."""
        for pack in packs:
            try:
                self.remove(pack)
            except StoreIOError:
                # It takes room and is of no harm; the next compaction tries again.
                self.n_left += 1

    def _write_zeros(self, pack: int) -> None:
        """Write a shard without a chunk: zarr would take zeros alone for a reason to delete it."""
        raw = np.full(self.n_slots * _SPAN_BYTES + _CRC_BYTES, 0xFF, np.uint8)
        raw[-_CRC_BYTES:].view("<u4")[0] = google_crc32c.value(raw[:-_CRC_BYTES].tobytes())
        file = self._disk.open(self._pages_path(pack), "create", direct=False)
        try:
            self._disk.write_batch(file, [0], [raw])
            self._disk.sync(file)
        finally:
            self._disk.close(file)

    def _read_shard(self, pack: int, rows: Sequence[int], buffers: Sequence[Bytes]) -> None:
        """Read pages of one pack.

        What zarr's own reader does, which takes 2 to 3 ms a page.
        """
        from numcodecs.zstd import decompress  # type: ignore[import-untyped]

        try:
            file = self._disk.open(self._pages_path(pack), "read", direct=False)
        except FileNotFoundError:
            raise CorruptionError(f"pack {pack} in {self._directory} is missing") from None
        try:
            size_bytes = self._disk.size(file)
            index_bytes = self.n_slots * _SPAN_BYTES
            raw = np.empty(index_bytes + _CRC_BYTES, np.uint8)
            self._disk.read_batch(file, [max(0, size_bytes - len(raw))], [raw])
            spans = _checked(raw).view("<u8").reshape(self.n_slots, 2)[list(rows)].tolist()
            found = [span != [_NO_CHUNK, _NO_CHUNK] for span in spans]
            for offset, n_bytes in compress(spans, found):
                if not _CRC_BYTES < n_bytes <= size_bytes - offset:
                    raise ValueError(f"a chunk of {n_bytes} bytes at {offset} of {size_bytes}")
            chunks = [np.empty(n_bytes, np.uint8) for _, n_bytes in compress(spans, found)]
            self._disk.read_batch(file, [offset for offset, _ in compress(spans, found)], chunks)
        finally:
            self._disk.close(file)
        self._bytes_read += len(raw) + sum(map(len, chunks))
        for buffer in compress(buffers, map(not_, found)):
            buffer[:] = 0
        for chunk, buffer in zip(chunks, compress(buffers, found), strict=True):
            decompress(_checked(chunk), buffer)

    def _pages_path(self, pack: int) -> Path:
        return self._directory / "pages" / f"c.{pack}.0"

    def _arrays(self) -> tuple[Array[Any], Array[Any]]:
        """Return pages and ids, described by what this module knows and not by the files."""
        if self._opened is None:
            import zarr

            from tiers.zarr_store import ZarrStore

            store = ZarrStore(self._disk, self._directory, self._documents())
            pages = zarr.open_array(store, mode="r+", path="pages", zarr_format=3)
            ids = zarr.open_array(store, mode="r+", path="ids", zarr_format=3)
            self._opened = (store, pages, ids)
        return self._opened[1:]

    def _documents(self) -> dict[str, bytes]:
        """Return the metadata of the group and of both arrays, by their keys."""
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec
        from zarr.storage import MemoryStore

        written: dict[str, Any] = {}
        group = zarr.create_group(MemoryStore(store_dict=written), zarr_format=3)
        n_rows = PLACE_BLOCKS // self._per_slot
        keys: dict[str, Any] = {"name": "default", "separator": "."}
        codecs = [ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()]
        group.create_array(
            "pages",
            shape=(n_rows, self._page_bytes),
            shards=(self.n_slots, self._page_bytes),
            chunks=(1, self._page_bytes),
            dtype="uint8",
            fill_value=0,
            compressors=codecs,
            chunk_key_encoding=keys,
            dimension_names=("slot", "byte"),
        )
        group.create_array(
            "ids",
            shape=(n_rows, len(ID_FIELDS)),
            chunks=(self.n_slots, len(ID_FIELDS)),
            dtype="uint64",
            fill_value=0,
            compressors=codecs,
            chunk_key_encoding=keys,
            dimension_names=("slot", "field"),
            attributes={"fields": list(ID_FIELDS)},
        )
        return {name: value.to_bytes() for name, value in written.items()}

    def _make_directories(self) -> None:
        """Make the directories and their metadata, durably, once in the life of the object."""
        if self._has_directory:
            return
        disk, directory = self._disk, self._directory
        for path in (directory, directory / "pages", directory / "ids"):
            if not disk.exists(path):
                disk.make_directory(path)
        for name, document in self._documents().items():
            path = directory / name
            if disk.exists(path):
                disk.unlink(path)
            file = disk.open(path, "create", direct=False)
            try:
                disk.write_batch(file, [0], [np.frombuffer(document, np.uint8)])
                disk.sync(file)
            finally:
                disk.close(file)
        for path in (directory / "pages", directory / "ids", directory, directory.parent):
            disk.sync_directory(path)
        self._has_directory = True

    @contextmanager
    def _typed_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except (TierError, MemoryError):
            raise
        except OSError as refused:
            kind = StoreFullError if refused.errno in _FULL else StoreIOError
            raise kind(
                refused.errno, f"{action} packs in {self._directory} failed: {refused.strerror}"
            ) from refused
        except Exception as broken:  # whatever zarr and its codecs make of bytes that are no pack
            raise CorruptionError(f"a pack in {self._directory} is damaged: {broken!r}") from broken


def _checked(raw: Bytes) -> Bytes:
    """Return bytes without the crc32c behind them, which must be theirs."""
    content = raw[:-_CRC_BYTES]
    if google_crc32c.value(content.tobytes()) != int(raw[-_CRC_BYTES:].view("<u4")[0]):
        raise ValueError("wrong checksum")
    return content
