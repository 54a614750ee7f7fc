"""Which blocks of the page file are free.

The truth is a bitmap, one bit a 4 KiB block (1 = used), kept as the objects of a copy-on-write tree
of the page map, so it commits and aborts with everything else. One bitmap object covers 32,768
blocks (128 MiB). Beside it lives a summary in memory: free slots and free odd blocks of each
object.

A *slot* is an aligned run of `blocks_per_slot` blocks that holds one page. Single blocks, for map
nodes, are taken from slots that are broken already before a whole one is broken.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiers.errors import StoreFullError

BLOCK_BYTES = 4096
BITMAP_BLOCKS = BLOCK_BYTES * 8
SPARE_BLOCKS = 16

Bitmap = npt.NDArray[np.uint8]


class BitmapTree(Protocol):
    """What the allocator needs of the page map: bitmap objects, read or made private."""

    def bitmap(self, number: int) -> Bitmap | None: ...
    def private_bitmap(self, number: int) -> Bitmap: ...


class Growth(Protocol):
    """Lengthens the page file by allocated blocks, or raises StoreFullError."""

    def __call__(self, blocks_min: int, blocks_wanted: int) -> int: ...


class Allocator:
    """Free blocks of the page file.

    Parameters
    ----------
    tree : BitmapTree
    blocks_per_slot : int
        Power of two.
    file_blocks : int
        Blocks that the committed root says the file has.
    grow : Growth
    """

    def __init__(
        self, tree: BitmapTree, blocks_per_slot: int, file_blocks: int, grow: Growth
    ) -> None:
        self._tree = tree
        self._grow = grow
        self.blocks_per_slot = blocks_per_slot
        self.file_blocks = file_blocks
        self.pending_free: list[tuple[int, int]] = []
        self.spare: list[int] = []
        self._free_slots: list[int] = []
        self._free_odd: list[int] = []
        self._cursor = 0
        self.recount()

    def recount(self) -> None:
        """Read every bitmap object and rebuild the summary; after open and after abort."""
        self.pending_free.clear()
        self.spare.clear()
        self._free_slots = []
        self._free_odd = []
        self._cursor = 0
        for number in range(self.n_bitmaps):
            self._summarise(number, self._tree.bitmap(number))

    @property
    def n_bitmaps(self) -> int:
        return -(-self.file_blocks // BITMAP_BLOCKS)

    @property
    def free_blocks(self) -> int:
        """Blocks that can be taken without growing the file."""
        return sum(self._free_slots) * self.blocks_per_slot + sum(self._free_odd) + len(self.spare)

    @property
    def used_blocks(self) -> int:
        """Blocks that the open transaction or the last commit uses, the file's header included."""
        return self.file_blocks - self.free_blocks

    def ensure(self, n_slots: int, n_blocks: int) -> None:
        """See to it that so many slots and single blocks can be taken, growing the file if need be.

        Raises
        ------
        StoreFullError
            If they cannot; nothing has been taken.
        """
        odd = sum(self._free_odd) + len(self.spare)
        slots_wanted = n_slots + -(-max(0, n_blocks - odd) // self.blocks_per_slot)
        # One spare refill may break a slot for other bitmaps' sake.
        missing = slots_wanted + 1 - sum(self._free_slots)
        if missing <= 0:
            return
        blocks_min = self._round_up(self.file_blocks) + missing * self.blocks_per_slot
        self.file_blocks = self._grow(blocks_min, max(blocks_min, blocks_min + blocks_min // 8))
        first_changed = len(self._free_slots) - 1
        for number in range(max(0, first_changed), self.n_bitmaps):
            self._summarise(number, self._tree.bitmap(number))

    def take_slots(self, count: int) -> npt.NDArray[np.int64]:
        """Take `count` slots; return the first block of each, ascending in each bitmap object.

        Raises
        ------
        StoreFullError
            If there are not so many; `ensure` first to know before anything is taken.
        """
        taken = []
        left = count
        n_bitmaps = len(self._free_slots)
        first = self._cursor
        for step in range(n_bitmaps):
            if left == 0:
                break
            number = (first + step) % n_bitmaps
            if self._free_slots[number] == 0:
                continue
            bitmap = self._tree.private_bitmap(number)
            bits = self._bits(number, bitmap)
            chosen = np.flatnonzero(~bits.any(axis=1))[:left]
            bits[chosen] = 1
            self._store_bits(number, bitmap, bits)
            self._summarise(number, bitmap)
            taken.append(chosen * self.blocks_per_slot + number * BITMAP_BLOCKS)
            left -= len(chosen)
            self._cursor = number
        if left:
            raise StoreFullError(f"no free slot for {left} of {count} pages")
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def take_block(self) -> int:
        """Take one block for a map node."""
        # Making a bitmap private takes a block too, so one refill may leave nothing behind.
        while not self.spare:
            self._refill()
        return self.spare.pop()

    def give_back(self, block: int, n_blocks: int) -> None:
        """Free blocks of the committed state; they can be taken again after the next commit."""
        self.pending_free.append((block, n_blocks))
        # Made private now, so that a commit allocates nothing.
        self._tree.private_bitmap(block // BITMAP_BLOCKS)

    def settle(self) -> None:
        """Write pending frees and unused spares into the bitmaps; a commit is past return then."""
        for block in self.spare:
            self.pending_free.append((block, 1))
        self.spare.clear()
        for block, n_blocks in self.pending_free:
            self._clear(block, n_blocks)

    def committed(self) -> None:
        """Let what the durable commit freed be taken."""
        for number in {block // BITMAP_BLOCKS for block, _ in self.pending_free}:
            self._summarise(number, self._tree.bitmap(number))
        self.pending_free.clear()

    def _clear(self, block: int, n_blocks: int) -> None:
        number, first = divmod(block, BITMAP_BLOCKS)
        bitmap = self._tree.private_bitmap(number)
        if n_blocks % 8 == 0:
            bitmap[first // 8 : (first + n_blocks) // 8] = 0
            return
        for bit in range(first, first + n_blocks):
            bitmap[bit >> 3] &= ~np.uint8(1 << (bit & 7))

    def _refill(self) -> None:
        number = next((i for i, odd in enumerate(self._free_odd) if odd), None)
        if number is None:
            number = next((i for i, slots in enumerate(self._free_slots) if slots), None)
        if number is None:
            raise StoreFullError("no free block for a map node")
        bitmap = self._tree.private_bitmap(number)
        if self.spare:
            return  # making the bitmap private refilled in passing
        bits = self._bits(number, bitmap)
        used = bits.sum(axis=1)
        broken = np.flatnonzero((used > 0) & (used < self.blocks_per_slot))
        rows = broken[:SPARE_BLOCKS] if len(broken) else np.flatnonzero(used == 0)[:1]
        if self.blocks_per_slot == 1:
            rows = np.flatnonzero(used == 0)[:SPARE_BLOCKS]
        row_of, column_of = np.nonzero(bits[rows] == 0)
        row_of, column_of = row_of[:SPARE_BLOCKS], column_of[:SPARE_BLOCKS]
        bits[rows[row_of], column_of] = 1
        self._store_bits(number, bitmap, bits)
        self._summarise(number, bitmap)
        blocks = rows[row_of] * self.blocks_per_slot + column_of + number * BITMAP_BLOCKS
        self.spare = [int(block) for block in blocks[::-1]]

    def _summarise(self, number: int, bitmap: Bitmap | None) -> None:
        bits = self._bits(number, bitmap)
        used = bits.sum(axis=1)
        free_slots = int((used == 0).sum())
        free_odd = int(((self.blocks_per_slot - used) * (used > 0)).sum())
        if number == len(self._free_slots):
            self._free_slots.append(free_slots)
            self._free_odd.append(free_odd)
        else:
            self._free_slots[number] = free_slots
            self._free_odd[number] = free_odd

    def _bits(self, number: int, bitmap: Bitmap | None) -> npt.NDArray[np.uint8]:
        """Return bits as (slots, blocks a slot), blocks beyond the file's end as used."""
        if bitmap is None:
            bits = np.zeros(BITMAP_BLOCKS, np.uint8)
        else:
            bits = np.unpackbits(bitmap[: BITMAP_BLOCKS // 8], bitorder="little")
        end = self.file_blocks - number * BITMAP_BLOCKS
        if end < BITMAP_BLOCKS:
            bits[max(0, end) :] = 1
        return bits.reshape(-1, self.blocks_per_slot)

    def _store_bits(self, number: int, bitmap: Bitmap, bits: npt.NDArray[np.uint8]) -> None:
        flat = bits.reshape(-1)
        # Blocks beyond the end only look used; the file may grow over them.
        flat[max(0, self.file_blocks - number * BITMAP_BLOCKS) :] = 0
        bitmap[: BITMAP_BLOCKS // 8] = np.packbits(flat, bitorder="little")

    def _round_up(self, blocks: int) -> int:
        return -(-blocks // self.blocks_per_slot) * self.blocks_per_slot
