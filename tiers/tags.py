"""Slot tags: whose page each slot holds, so that pages can be found when the map is lost.

32 bytes a slot, in the first slots of each group of 32,768 blocks (`tiers.allocator.tag_slots`)::

    bytes  0 ..  3   crc32c of the other 28 bytes followed by store id (16) and slot number (8)
    bytes  4 ..  7   number of the space
    bytes  8 .. 15   index of the page
    bytes 16 .. 23   version that wrote it
    bytes 24 .. 27   crc32c of the page, as in its map entry
    bytes 28 .. 31   zero

A tag is noted with its page, written before the commit, which syncs it; it is never read but for a
salvage. It
outlives its page: what a tag says is believed only if its version was committed and no newer one
names the same page, and the page passes its checksum.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, TAG_BYTES, tag_slots
from tiers.disk import Bytes, aligned_buffer
from tiers.root import Range
from tiers.slots import SlotFile

_TAG = struct.Struct("<IIQQII")
_SLOT = struct.Struct("<Q")
_CRC = struct.Struct("<I")
TAGS_A_BLOCK = BLOCK_BYTES // TAG_BYTES
CACHED_BLOCKS = 10
NOTED_MAX = 600
"""So many tags are written at once, even long before the commit."""
Columns = npt.NDArray[np.int64]
PAGES_MAX = 1 << 63
SWEEP_BLOCKS = 256


@dataclass(frozen=True)
class Tag:
    """What a slot says of itself.

    Attributes
    ----------
    block : int
        First block of the slot.
    space, page, version, crc : int
    """

    block: int
    space: int
    page: int
    version: int
    crc: int


class Tags:
    """The slot tags of an open page file.

    Parameters
    ----------
    slots : SlotFile
    store_id : bytes, 16

    Attributes
    ----------
    size_bytes : int
        Memory that the cache of tag blocks takes.
    """

    size_bytes = CACHED_BLOCKS * BLOCK_BYTES + NOTED_MAX * 40

    def __init__(self, slots: SlotFile, store_id: bytes) -> None:
        # Here, because it imports numba.
        from tiers import sums

        self._sums = sums
        self._slots = slots
        self._store_id = store_id
        self._store_words = np.frombuffer(store_id, "<u4")
        self._per_slot = slots.page_bytes // BLOCK_BYTES
        self._memory = aligned_buffer(CACHED_BLOCKS, BLOCK_BYTES)
        self._free = list(range(CACHED_BLOCKS))
        self._cached: OrderedDict[int, int] = OrderedDict()
        self._noted: list[Columns] = []

    def note(
        self, blocks: Columns, spaces: Columns, pages: Columns, version: int, crcs: Columns
    ) -> None:
        """Remember tags, to be written over those of the same slots by `write_noted`.

        Parameters
        ----------
        blocks, spaces, pages, crcs : int64 arrays (n,)
            First block of each slot, and what it holds.
        version : int

        Raises
        ------
        StoreIOError, StoreFullError
            If there were many and the operating system refuses to write them; they are remembered.
        """
        noted = np.empty((5, len(blocks)), np.int64)
        noted[0], noted[1], noted[2], noted[3], noted[4] = blocks, spaces, pages, version, crcs
        self._noted.append(noted)
        if sum(columns.shape[1] for columns in self._noted) >= NOTED_MAX:
            self.write_noted()

    def forget_noted(self) -> None:
        """Leave out what was noted since it was last written."""
        self._noted.clear()

    def write_noted(self) -> None:
        """Write what was noted; durable after the page file's sync.

        Raises
        ------
        StoreIOError, StoreFullError
            If the operating system refuses; it is still noted.
        """
        if not self._noted:
            return
        tag_blocks, rows, tags = self._last_of_each_slot()
        todo = np.unique(tag_blocks).tolist()
        for start in range(0, len(todo), CACHED_BLOCKS):
            wave = todo[start : start + CACHED_BLOCKS]
            with self._changing(wave):
                self._slots.write_blocks(wave, self._filled(wave, tag_blocks, rows, tags))
        self._noted.clear()

    @contextmanager
    def placed(self, tags: list[Tag]) -> Iterator[tuple[list[int], list[Bytes]]]:
        """Let the caller write a few tags, beside other things; what was noted is written first.

        Yields
        ------
        blocks : list of int
        buffers : list of uint8 arrays (4096,)
            What is to be written there.

        Raises
        ------
        StoreIOError, StoreFullError
            If the operating system refuses; what was noted is still noted.
        """
        assert len(tags) <= CACHED_BLOCKS
        self.write_noted()
        places = [self._place(tag.block // self._per_slot) for tag in tags]
        blocks = sorted({block for block, _ in places})
        buffers = dict(zip(blocks, self._load(blocks), strict=True))
        with self._changing(blocks):
            for tag, (block, offset) in zip(tags, places, strict=True):
                raw = np.frombuffer(self._encode(tag), np.uint8)
                buffers[block][offset : offset + TAG_BYTES] = raw
            yield blocks, list(buffers.values())

    def _last_of_each_slot(self) -> tuple[Columns, Columns, Bytes]:
        """Return block and row in it of each tag that was noted, and the tag, uint8 (n, 32)."""
        columns = self._noted[0] if len(self._noted) == 1 else np.concatenate(self._noted, axis=1)
        blocks = columns[0]
        if len(self._noted) > 1:
            # Of the tags of one slot the last one counts.
            _, last = np.unique(blocks[::-1], return_index=True)
            columns = columns[:, columns.shape[1] - 1 - last].copy()
            blocks = columns[0]
        tag_blocks, offsets = self._places(blocks)
        return tag_blocks, offsets // TAG_BYTES, self._encoded(*columns)

    def _filled(
        self, wave: list[int], tag_blocks: Columns, rows: Columns, tags: Bytes
    ) -> list[Bytes]:
        """Return the content of these blocks with the tags entered that belong there."""
        buffers = self._load(wave)
        for block, buffer in zip(wave, buffers, strict=True):
            chosen = tag_blocks == block
            buffer.reshape(TAGS_A_BLOCK, TAG_BYTES)[rows[chosen]] = tags[chosen]
        return buffers

    @contextmanager
    def _changing(self, blocks: list[int]) -> Iterator[None]:
        """Forget blocks whose writing failed: the cache may not be what the device has."""
        try:
            yield
        except BaseException:
            self._forget([block for block in blocks if block in self._cached])
            raise

    def read_all(self, file_blocks: int) -> Iterator[Tag]:
        """Yield every whole tag of slots below block `file_blocks`."""
        for block, content in self._all_blocks(file_blocks):
            first = self._first_slot(block)
            for i in range(TAGS_A_BLOCK):
                raw = content[i * TAG_BYTES : (i + 1) * TAG_BYTES].tobytes()
                tag = self._decode(raw, first + i)
                if tag is not None and tag.block + self._per_slot <= file_blocks:
                    yield tag

    def clear(self, versions: Sequence[Range], file_blocks: int) -> None:
        """Blot out the tags of these versions; durable after the page file's sync.

        What is noted must have been written.
        """
        assert not self._noted
        self._forget(list(self._cached))
        for block, content in self._all_blocks(file_blocks):
            fields = content.view(np.uint64).reshape(TAGS_A_BLOCK, TAG_BYTES // 8)
            dead = np.zeros(TAGS_A_BLOCK, np.bool_)
            for first, last in versions:
                dead |= (fields[:, 2] >= np.uint64(first)) & (fields[:, 2] <= np.uint64(last))
            if dead.any():
                fields[dead] = 0
                self._slots.write_blocks([block], [content])

    def _all_blocks(self, file_blocks: int) -> Iterator[tuple[int, Bytes]]:
        """Yield each block of tags and its content, which may be changed until the next one."""
        buffers = aligned_buffer(SWEEP_BLOCKS, BLOCK_BYTES)
        for number in range(-(-file_blocks // BITMAP_BLOCKS)):
            first, stop = self._tag_blocks(number, file_blocks)
            for start in range(first, stop, SWEEP_BLOCKS):
                blocks = list(range(start, min(start + SWEEP_BLOCKS, stop)))
                self._slots.read_blocks(blocks, list(buffers[: len(blocks)]))
                yield from zip(blocks, buffers, strict=False)

    def _tag_blocks(self, number: int, file_blocks: int) -> tuple[int, int]:
        first = number * BITMAP_BLOCKS + tag_slots(number, self._per_slot)[0] * self._per_slot
        n_slots = BITMAP_BLOCKS // self._per_slot
        return first, min(first - (-n_slots // TAGS_A_BLOCK), file_blocks)

    def _places(self, blocks: Columns) -> tuple[Columns, Columns]:
        """Return the blocks with the tags of slots, and the offsets of the tags in them."""
        numbers, within = np.divmod(blocks, BITMAP_BLOCKS)
        # The very first slot of the file is its header.
        first = numbers * BITMAP_BLOCKS + (numbers == 0) * self._per_slot
        in_group, rest = np.divmod(within // self._per_slot, TAGS_A_BLOCK)
        return first + in_group, rest * TAG_BYTES

    def _place(self, slot: int) -> tuple[int, int]:
        """Return the block with the tag of a slot, and the offset of the tag in it."""
        number, within = divmod(slot, BITMAP_BLOCKS // self._per_slot)
        in_group, rest = divmod(within, TAGS_A_BLOCK)
        first = number * BITMAP_BLOCKS if number else self._per_slot
        return first + in_group, rest * TAG_BYTES

    def _first_slot(self, block: int) -> int:
        """Return the first of the slots whose tags are in a block of tags."""
        number = block // BITMAP_BLOCKS
        first, _ = self._tag_blocks(number, (number + 1) * BITMAP_BLOCKS)
        return number * (BITMAP_BLOCKS // self._per_slot) + (block - first) * TAGS_A_BLOCK

    def _load(self, blocks: list[int]) -> list[Bytes]:
        missing = [block for block in blocks if block not in self._cached]
        for block in blocks:
            if block in self._cached:
                self._cached.move_to_end(block)
        if missing:
            self._read(missing)
        return [self._memory[self._cached[block]] for block in blocks]

    def _read(self, blocks: list[int]) -> None:
        """Read blocks into the cache, in place of those used longest ago."""
        frames = []
        for _ in blocks:
            frames.append(self._free.pop() if self._free else self._cached.popitem(last=False)[1])
        try:
            self._slots.read_blocks(blocks, [self._memory[frame] for frame in frames])
        except BaseException:
            self._free.extend(frames)
            raise
        self._cached.update(zip(blocks, frames, strict=True))

    def _forget(self, blocks: list[int]) -> None:
        for block in blocks:
            self._free.append(self._cached.pop(block))

    def _encoded(
        self, blocks: Columns, spaces: Columns, pages: Columns, versions: Columns, crcs: Columns
    ) -> Bytes:
        """Return tags, uint8 (n, 32)."""
        n = len(blocks)
        # What `_decode` sums: the tag without its checksum, and where it belongs.
        summed = np.empty((n, (TAG_BYTES - 4 + 24) // 4), "<u4")
        summed[:, 0] = spaces
        summed[:, 1:3] = pages.view("<u4").reshape(n, 2)
        summed[:, 3:5] = versions.view("<u4").reshape(n, 2)
        summed[:, 5] = crcs
        summed[:, 6] = 0
        summed[:, 7:11] = self._store_words
        summed[:, 11:] = (blocks // self._per_slot).view("<u4").reshape(n, 2)
        tags = np.empty((n, TAG_BYTES // 4), "<u4")
        tags[:, 0] = self._sums.sum_rows(summed.view(np.uint8))
        tags[:, 1:] = summed[:, :7]
        return tags.view(np.uint8)

    def _encode(self, tag: Tag) -> bytes:
        """Return one tag as `_encoded` returns many."""
        fields = _TAG.pack(0, tag.space, tag.page, tag.version, tag.crc, 0)[4:]
        slot = tag.block // self._per_slot
        return _CRC.pack(google_crc32c.value(fields + self._identity(slot))) + fields

    def _decode(self, raw: bytes, slot: int) -> Tag | None:
        crc, space, page, version, page_crc, _ = _TAG.unpack(raw)
        if (
            version == 0
            or page >= PAGES_MAX
            or google_crc32c.value(raw[4:] + self._identity(slot)) != crc
        ):
            return None
        return Tag(slot * self._per_slot, space, page, version, page_crc)

    def _identity(self, slot: int) -> bytes:
        return self._store_id + _SLOT.pack(slot)
