"""Which blocks of the page file are free.

The truth is a bitmap, one bit a 4 KiB block (1 = used), kept as the objects of a copy-on-write tree
of the page map, so it commits and aborts with everything else. One bitmap object covers a *group*
of 32,768 blocks (128 MiB). Beside it lives a summary in memory: free slots and free odd blocks of
each group that was looked at; the others are looked at, from the end of the file, when the known
ones do not suffice.

A *slot* is an aligned run of `blocks_per_slot` blocks that holds one page. What is taken together
lies together, because it is written together: slots and blocks come from one group as long as it
has any, then from the emptiest one. Single blocks, for map nodes, break a whole slot, unless whole
ones are short or there are many holes in broken ones (`Allocator.is_thrifty`). The first slots of
each group hold the tags of the others (`tiers.tags`) and are never taken.

What a commit freed is *held* while a reader in another process may still look at the state before
it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tiers.errors import CorruptionError, StoreFullError
from tiers.groups import BITMAP_BLOCKS as BITMAP_BLOCKS
from tiers.groups import BLOCK_BYTES as BLOCK_BYTES
from tiers.groups import TAG_BYTES as TAG_BYTES
from tiers.groups import Groups
from tiers.groups import tag_slots as tag_slots
from tiers.held import HeldFrees

SPARE_BLOCKS = 16
RESERVE_BLOCKS = 32
"""Blocks that only what frees blocks may take, and two more a group."""
COLD_BLOCK = 1 << 44
"""Blocks from here on lie in the packs of the cold tier (`tiers.packs`), not in the page file."""
COLD_GROUP = COLD_BLOCK // BITMAP_BLOCKS
PACK_BLOCKS = 512
GROUPS_A_SEARCH = 64
"""Groups looked at for free slots before the file is made longer."""
GROUPS_A_STRETCH = 4
"""Groups looked at for slots that lie together."""
HOLES_MAX = 64
"""Single blocks fill broken slots once more than one block in so many is free in such a slot."""
UNKNOWN = -1

Bitmap = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]


class BitmapTree(Protocol):
    """What the allocator needs of the page map: bitmap objects, read or made private."""

    def bitmap(self, number: int) -> Bitmap | None: ...
    def private_bitmap(self, number: int) -> Bitmap: ...
    def remove_bitmap(self, number: int) -> None: ...


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
    used_blocks : int or None
        How many of them it says are used; counted if None.
    grow : Growth
    has_tags : bool
        Whether groups begin with slot tags.

    Attributes
    ----------
    kept_version : int
        Blocks written by this version or before it are kept when they are given back: a snapshot
        may refer to them.
    limit_blocks : int or None
        Take nothing from this block on; see `set_limit`.
    frees_only : bool
        The change under way frees more than it takes, and may use the last blocks.
    is_thrifty : bool
        Single blocks are taken from the holes of broken slots for the rest of the transaction: room
        that was ensured in it counts on them, or there are many.
    cold_blocks : int
        Blocks of cold slots that are used, those that the open transaction frees included.
    n_cold_groups : int
        At most so many groups lie in the cold tier.
    dead_packs : list of int
        First blocks of packs that nobody can refer to any more, for whoever removes them to take.
    worn_packs : set of int
        Of packs that lost a page since somebody looked.
    let_readers_go : callable or None
        Called on a full disk: goes on without the readers of earlier commits, and returns the
        oldest commit that is still read.
    """

    def __init__(
        self,
        tree: BitmapTree,
        blocks_per_slot: int,
        file_blocks: int,
        used_blocks: int | None,
        grow: Growth,
        *,
        has_tags: bool,
    ) -> None:
        # Here, because it imports numba.
        from tiers import books

        self._books = books
        self._tree = tree
        self._grow = grow
        self._groups = Groups(blocks_per_slot, has_tags=has_tags)
        self.blocks_per_slot = blocks_per_slot
        self.kept_version = 0
        self.limit_blocks: int | None = None
        self.frees_only = False
        self.is_thrifty = False
        self.let_readers_go: Callable[[], int | None] | None = None
        self.cold_blocks = 0
        self.n_cold_groups = 0
        self.dead_packs: list[int] = []
        self.worn_packs: set[int] = set()
        self._emptied: list[int] = []
        self.spare: list[int] = []
        self._settled_spare: list[int] = []
        self._settled_worn: set[int] = set()
        self._cursor = 0
        self._pending: dict[int, Bitmap] = {}
        self.held = HeldFrees()
        self.begin(file_blocks, used_blocks)

    def begin(self, file_blocks: int, used_blocks: int | None) -> None:
        """Forget what the open transaction took and freed; after open and after abort."""
        self.file_blocks = file_blocks
        self._pending.clear()
        self._emptied.clear()
        self.spare.clear()
        self.is_thrifty = False
        self._forget_summary()
        if used_blocks is None:
            self._search(self.n_bitmaps, self.n_bitmaps * BITMAP_BLOCKS)
            held = self.held_blocks
            used_blocks = file_blocks - self._known_slots() * self.blocks_per_slot
            used_blocks -= self._known_odd() + held
        self._used = used_blocks

    @property
    def n_bitmaps(self) -> int:
        return -(-self.file_blocks // BITMAP_BLOCKS)

    @property
    def used_blocks(self) -> int:
        """Blocks that the open transaction or the last commit uses, header and tags included."""
        return self._used - len(self.spare)

    @property
    def held_blocks(self) -> int:
        """Blocks that are free but for readers of earlier commits."""
        return self.held.n_blocks

    @property
    def waiting_blocks(self) -> int:
        """Blocks of the page file that the next commit frees."""
        return sum(_count(bits) for number, bits in self._pending.items() if number < COLD_GROUP)

    @property
    def waiting_cold_blocks(self) -> int:
        """Blocks of cold slots that the next commit frees."""
        return sum(_count(bits) for number, bits in self._pending.items() if number >= COLD_GROUP)

    @property
    def bookkeeping_bytes(self) -> int:
        """Memory that waiting frees take."""
        n_bitmaps = len(self._pending) + self.held.n_bitmaps
        return n_bitmaps * BLOCK_BYTES + 16 * len(self._free_slots)

    def set_limit(self, limit_blocks: int | None) -> None:
        """Take nothing from block `limit_blocks` on, so that the file can be cut there."""
        self.limit_blocks = limit_blocks
        self._forget_summary()

    def waiting(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which blocks of a group are used only until the next commit."""
        waits = np.zeros(BITMAP_BLOCKS, np.bool_)
        if number in self._pending:
            waits |= _unpacked(self._pending[number])
        for block in self.spare:
            if block // BITMAP_BLOCKS == number:
                waits[block % BITMAP_BLOCKS] = True
        return waits

    def ensure(self, n_slots: int, n_blocks: int) -> None:
        """See to it that so many slots and single blocks can be taken, growing the file if need be.

        Raises
        ------
        StoreFullError
            If they cannot; nothing has been taken.
        """
        if not self.frees_only:
            # What frees blocks needs some; keep so many back that it can begin on a full disk.
            n_blocks += RESERVE_BLOCKS + 2 * self.n_bitmaps
        if self._missing(n_slots, n_blocks) > 0:
            self._search(GROUPS_A_SEARCH, self._wanted(n_slots, n_blocks))
        try:
            # Where the file was longer once, readers may hold what it grows by: once more then.
            while (missing := self._missing(n_slots, n_blocks)) > 0:
                self._lengthen(missing)
        except StoreFullError:
            self._search(self.n_bitmaps, self._wanted(n_slots, n_blocks))
            if self._missing(n_slots, n_blocks) > 0 and not self._is_room_made(n_slots, n_blocks):
                raise
        # Until the transaction ends: what is ensured now may be taken after more was ensured.
        self.is_thrifty |= self._known_slots() < self._wanted(n_slots, n_blocks)
        self.is_thrifty |= self._known_odd() * HOLES_MAX > self.file_blocks
        self._find_a_stretch()

    def _find_a_stretch(self) -> None:
        """Look at a few groups if none that is known has room for many pages together."""
        if not self._unknown or self.is_thrifty:
            return
        many = BITMAP_BLOCKS // self.blocks_per_slot // 2
        if max(self._free_slots, default=0) < many:
            # Nobody needs the group of a damaged bitmap yet; who does will be told.
            with suppress(CorruptionError):
                self._search(GROUPS_A_STRETCH, self._known_slots() + many)

    def _is_room_made(self, n_slots: int, n_blocks: int) -> bool:
        """Return whether there is room once readers of earlier commits are no longer considered."""
        # Below a limit there is little room on purpose; readers are not to suffer for that.
        if not self.held.n_bitmaps or self.let_readers_go is None or self.limit_blocks is not None:
            return False
        self.release(self.let_readers_go())
        return self._missing(n_slots, n_blocks) <= 0

    def take_slots(self, count: int) -> npt.NDArray[np.int64]:
        """Take `count` slots; return the first block of each, ascending in each group.

        Raises
        ------
        StoreFullError
            If there are not so many; `ensure` first to know before anything is taken.
        """
        taken = []
        left = count
        while left:
            number = self._group_with_slots()
            if number is None:
                raise StoreFullError(f"no free slot for {left} of {count} pages")
            bitmap = self._tree.private_bitmap(number)
            bits = self._bits(number, bitmap)
            chosen = np.flatnonzero(~bits.any(axis=1))[:left]
            # Making the bitmap private may have taken the last one.
            assert len(chosen) or self._free_slots[number] <= 0, "free slots are miscounted"
            self._mark(number, bitmap, bits, chosen, slice(None))
            taken.append(chosen * self.blocks_per_slot + number * BITMAP_BLOCKS)
            left -= len(chosen)
        return np.concatenate(taken) if taken else np.empty(0, np.int64)

    def _group_with_slots(self) -> int | None:
        """Return the group to take slots from, whose bitmap is private already if it can be."""
        if not 0 <= self._cursor < len(self._free_slots) or self._free_slots[self._cursor] <= 0:
            most = max(self._free_slots, default=0)
            if most <= 0:
                return None
            self._cursor = self._free_slots.index(most)
        return self._cursor

    def take_cold(self, block: int, n_blocks: int) -> None:
        """Take blocks of cold slots, which nobody took before; room for a bitmap is ensured."""
        number, first = divmod(block, BITMAP_BLOCKS)
        assert number >= COLD_GROUP and first + n_blocks <= BITMAP_BLOCKS
        chosen = np.zeros(BITMAP_BLOCKS, np.bool_)
        chosen[first : first + n_blocks] = True
        bits = np.packbits(chosen, bitorder="little")
        bitmap = self._tree.private_bitmap(number)
        assert not (bitmap[: BITMAP_BLOCKS // 8] & bits).any(), "a cold slot is taken twice"
        bitmap[: BITMAP_BLOCKS // 8] |= bits
        self.cold_blocks += n_blocks

    def take_block(self) -> int:
        """Take one block for a map node."""
        # Making a bitmap private takes a block too, so one refill may leave nothing behind.
        while not self.spare:
            self._refill()
        return self.spare.pop()

    def give_back(self, block: int, n_blocks: int, version: int | None) -> None:
        """Free blocks of the committed state; they can be taken again after the next commit.

        Parameters
        ----------
        block, n_blocks : int
        version : int or None
            Which version wrote them; a snapshot may keep them then. None if none can.
        """
        if version is not None and version <= self.kept_version:
            return
        number, first = divmod(block, BITMAP_BLOCKS)
        bits = self._pending_of(number)
        if n_blocks % 8 == 0:
            bits[first // 8 : (first + n_blocks) // 8] = 0xFF
            return
        for bit in range(first, first + n_blocks):
            bits[bit >> 3] |= np.uint8(1 << (bit & 7))

    def give_back_lost(self, number: int, lost: Bitmap) -> None:
        """Free blocks of one group that are used and that no state refers to; one bit each."""
        bits = self._pending_of(number)
        bits |= lost

    def _pending_of(self, number: int) -> Bitmap:
        bits = self._pending.get(number)
        if bits is None:
            bits = self._pending.setdefault(number, np.zeros(BITMAP_BLOCKS // 8, np.uint8))
            # Made private now, so that a commit allocates nothing.
            self._tree.private_bitmap(number)
        return bits

    def settle(self) -> None:
        """Write pending frees and unused spares into the bitmaps; a commit is past return then."""
        # A spare block lies in a group whose bitmap is private since it was taken.
        for block in self.spare:
            self.give_back(block, 1, None)
        self._settled_spare, self.spare = self.spare, []
        self._settled_worn = set(self.worn_packs)
        for number, freed in self._pending.items():
            bitmap = self._tree.private_bitmap(number)
            n_freed = self._books.clear_bits(bitmap, freed)
            assert n_freed >= 0, "freed what is free"
            if number < COLD_GROUP:
                self._used -= n_freed
            else:
                self.cold_blocks -= n_freed
                packs = bitmap[: BITMAP_BLOCKS // 8].reshape(-1, PACK_BLOCKS // 8)
                is_left = np.asarray(packs.any(axis=1))
                was_there = freed.reshape(-1, PACK_BLOCKS // 8).any(axis=1)
                firsts = np.arange(len(packs)) * PACK_BLOCKS + number * BITMAP_BLOCKS
                self._emptied += firsts[was_there & ~is_left].tolist()
                self.worn_packs.update(firsts[was_there & is_left].tolist())
                self.worn_packs.difference_update(self._emptied)

    def unsettle(self) -> None:
        """Take `settle` back: what it freed is used until the next commit, which may then fail."""
        for number, freed in self._pending.items():
            bitmap = self._tree.private_bitmap(number)
            bitmap[: BITMAP_BLOCKS // 8] |= freed
            if number < COLD_GROUP:
                self._used += _count(freed)
            else:
                self.cold_blocks += _count(freed)
        self._emptied.clear()
        self.worn_packs = self._settled_worn
        for block in self._settled_spare:
            number, bit = divmod(block, BITMAP_BLOCKS)
            self._pending[number][bit >> 3] &= np.uint8(0xFF ^ (1 << (bit & 7)))
        self.spare, self._settled_spare = self._settled_spare, []

    def committed(self, commit: int) -> None:
        """Hold what the durable commit freed, for `release`."""
        freed = {number: bits for number, bits in self._pending.items() if number < COLD_GROUP}
        self.held.add(commit, freed, self._emptied)
        self._pending, self._emptied = {}, []

    def release(self, oldest_reader: int | None) -> None:
        """Let be taken what commits freed that no reader is older than; see `HeldFrees.let_go`."""
        groups, packs = self.held.let_go(oldest_reader)
        self.dead_packs += packs
        n_known = len(self._free_slots)
        known = [n for n in set(groups) if n < n_known and self._free_slots[n] != UNKNOWN]
        # Unknown until they are counted: reading a bitmap may fail.
        for number in known:
            self._free_slots[number] = self._free_odd[number] = UNKNOWN
        self._unknown += known
        for number in known:
            self._summarise(number, self._tree.bitmap(number))
            self._unknown.remove(number)

    def is_used(self, number: int) -> npt.NDArray[np.bool_]:
        """Return which blocks of a group its bitmap marks as used, (32768,); tags it does not."""
        bitmap = self._tree.bitmap(number)
        if bitmap is None:
            return np.zeros(BITMAP_BLOCKS, np.bool_)
        return _unpacked(bitmap[: BITMAP_BLOCKS // 8])

    def slot_counts(self, number: int) -> tuple[Counts, Counts]:
        """Return how many blocks of each slot of a group are used, and how many can be taken.

        What tags take is neither, nor is what was freed and readers of earlier commits hold.
        """
        used = self.is_used(number).reshape(-1, self.blocks_per_slot).sum(axis=1)
        bits = self._bits(number, self._tree.bitmap(number))
        free = np.zeros(len(used), np.int64)
        free[: len(bits)] = self.blocks_per_slot - bits.sum(axis=1, dtype=np.int64)
        return used, free

    def end_of_used(self) -> int:
        """Return the block after the last slot in which the bitmaps mark a block as used."""
        for number in reversed(range(self.n_bitmaps)):
            used = np.flatnonzero(self.is_used(number))
            if len(used):
                return self._groups.round_up(number * BITMAP_BLOCKS + int(used[-1]) + 1)
        raise AssertionError("the header is in use")

    def shorten(self, file_blocks: int) -> None:
        """Let the file end earlier from the next commit on; nothing beyond may be used.

        Room for the nodes above the bitmaps that go is the caller's to ensure, below the new end.
        """
        for number in range(-(-file_blocks // BITMAP_BLOCKS), self.n_bitmaps):
            assert not self.is_used(number).any(), "what is used would be cut off"
            self._tree.remove_bitmap(number)
        self._used -= self._groups.n_reserved(file_blocks, self.file_blocks)
        self.file_blocks = file_blocks
        self._forget_summary()

    def reserved(self, number: int) -> tuple[int, int]:
        """Return the blocks (first, stop) of a group, counted from its start, that tags take."""
        return self._groups.reserved(number)

    def _wanted(self, n_slots: int, n_blocks: int) -> int:
        return n_slots + -(-n_blocks // self.blocks_per_slot) + 1

    def _missing(self, n_slots: int, n_blocks: int) -> int:
        odd = self._known_odd() + len(self.spare)
        slots_wanted = n_slots + -(-max(0, n_blocks - odd) // self.blocks_per_slot)
        # One spare refill may break a slot for other bitmaps' sake.
        return slots_wanted + 1 - self._known_slots()

    def _known_slots(self) -> int:
        return sum(count for count in self._free_slots if count > 0)

    def _known_odd(self) -> int:
        return sum(count for count in self._free_odd if count > 0)

    def _search(self, n_groups_max: int, n_slots_wanted: int) -> None:
        """Look at groups that are unknown until enough free slots are known."""
        known = self._known_slots()
        n_seen = 0
        for number in self._unknown:
            if known >= n_slots_wanted or n_seen >= n_groups_max:
                break
            self._summarise(number, self._tree.bitmap(number))
            known += self._free_slots[number]
            n_seen += 1
        del self._unknown[:n_seen]

    def _lengthen(self, n_slots: int) -> None:
        """Make the file longer by so many slots that can be taken."""
        if self.limit_blocks is not None:
            raise StoreFullError(f"no free slot below block {self.limit_blocks}")
        file_blocks = self._groups.round_up(self.file_blocks)
        blocks_min = self._groups.with_tags(file_blocks, n_slots)
        wanted = self._groups.with_tags(
            file_blocks, n_slots + blocks_min // self.blocks_per_slot // 8
        )
        before = self.file_blocks
        self.file_blocks = self._grow(blocks_min, wanted)
        self._used += self._groups.n_reserved(before, self.file_blocks)
        for number in range(max(0, (before - 1) // BITMAP_BLOCKS), self.n_bitmaps):
            if number in self._unknown:
                self._unknown.remove(number)
            self._summarise(number, self._tree.bitmap(number))

    def _forget_summary(self) -> None:
        self._free_slots = [UNKNOWN] * self.n_bitmaps
        self._free_odd = [UNKNOWN] * self.n_bitmaps
        self._unknown = list(range(self.n_bitmaps))
        if self.limit_blocks is None:
            # Where the file has grown there are whole stretches.
            self._unknown.reverse()
        self._cursor = 0

    def _refill(self) -> None:
        number = None if self.is_thrifty else self._group_with_slots()
        if number is None:
            most = max(self._free_odd, default=0)
            number = self._free_odd.index(most) if most > 0 else self._group_with_slots()
        if number is None:
            raise StoreFullError("no free block for a map node")
        bitmap = self._tree.private_bitmap(number)
        if self.spare:
            return  # making the bitmap private refilled in passing
        bits = self._bits(number, bitmap)
        used = bits.sum(axis=1)
        whole = np.flatnonzero(used == 0)
        broken = np.flatnonzero((used > 0) & (used < self.blocks_per_slot))
        breaks_none = len(broken) > 0 and (self.is_thrifty or len(whole) == 0)
        if breaks_none:
            # The emptiest first: what is written together then lies together.
            rows = broken[np.argsort(used[broken], kind="stable")][:SPARE_BLOCKS]
        else:
            rows = whole[: max(1, SPARE_BLOCKS // self.blocks_per_slot)]
        row_of, column_of = np.nonzero(bits[rows] == 0)
        row_of, column_of = row_of[:SPARE_BLOCKS], column_of[:SPARE_BLOCKS]
        self._mark(number, bitmap, bits, rows[row_of], column_of)
        blocks = rows[row_of] * self.blocks_per_slot + column_of + number * BITMAP_BLOCKS
        # Of a whole slot the last one first: behind it is likely to be a page, in one run then.
        self.spare = blocks[::-1].tolist() if breaks_none else blocks.tolist()

    def _mark(
        self,
        number: int,
        bitmap: Bitmap,
        bits: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int64],
        columns: npt.NDArray[np.int64] | slice,
    ) -> None:
        """Mark blocks as used, in the bitmap and in `bits`, what `_bits` returned for it."""
        touched = np.unique(rows)
        slots, odd = self._free_of(bits[touched])
        n_used = int(bits[touched].sum(dtype=np.int64))
        bits[rows, columns] = 1
        self._used += int(bits[touched].sum(dtype=np.int64)) - n_used
        chosen = np.zeros(bits.size, np.uint8).reshape(bits.shape)
        chosen[rows, columns] = 1
        packed = np.packbits(chosen.reshape(-1), bitorder="little")
        bitmap[: len(packed)] |= packed
        slots_left, odd_left = self._free_of(bits[touched])
        self._free_slots[number] += slots_left - slots
        self._free_odd[number] += odd_left - odd

    def _summarise(self, number: int, bitmap: Bitmap | None) -> None:
        """Count what is free in a group; as `_free_of` its `_bits`, in one compiled call."""
        n_blocks, n_bits = self._extent(number)
        held = self.held.bitmaps(number)
        free_slots, free_odd = self._books.count_free(
            _NOTHING if bitmap is None else bitmap[: BITMAP_BLOCKS // 8],
            held[0] if held else _NOTHING,
            held[1] if len(held) > 1 else _NOTHING,
            *(n_blocks, n_bits, *self.reserved(number), self.blocks_per_slot),
        )
        while number >= len(self._free_slots):
            self._free_slots.append(0)
            self._free_odd.append(0)
        self._free_slots[number] = free_slots
        self._free_odd[number] = free_odd

    def _free_of(self, bits: npt.NDArray[np.uint8]) -> tuple[int, int]:
        """Count free slots, and free blocks of broken ones, in bits (n, blocks a slot)."""
        used = bits.sum(axis=1, dtype=np.int64)
        n_free = int((used == 0).sum())
        return n_free, bits.size - int(used.sum()) - n_free * self.blocks_per_slot

    def _bits(self, number: int, bitmap: Bitmap | None) -> npt.NDArray[np.uint8]:
        """Return bits as (slots, blocks a slot), 1 for what cannot be taken.

        There is nothing to be taken in the slots that are left out at the end of the group.
        """
        n_blocks, n_bits = self._extent(number)
        n_bytes = -(-n_bits // 8)
        if bitmap is None:
            bits = np.zeros(n_bits, np.uint8)
        else:
            bits = np.unpackbits(bitmap[:n_bytes], bitorder="little")[:n_bits]
        for held in self.held.bitmaps(number):
            bits |= np.unpackbits(held[:n_bytes], bitorder="little")[:n_bits]
        first, stop = self.reserved(number)
        bits[first:stop] = 1
        bits[n_blocks:] = 1
        return bits.reshape(-1, self.blocks_per_slot)

    def _extent(self, number: int) -> tuple[int, int]:
        """Return how many blocks of a group there are to be taken, and that in whole slots."""
        end = self.file_blocks if self.limit_blocks is None else self.limit_blocks
        n_blocks = max(0, min(end, self.file_blocks) - number * BITMAP_BLOCKS)
        return n_blocks, min(self._groups.round_up(n_blocks), BITMAP_BLOCKS)


_NOTHING: Bitmap = np.zeros(BITMAP_BLOCKS // 8, np.uint8)


def _unpacked(bits: Bitmap) -> npt.NDArray[np.bool_]:
    return np.unpackbits(bits, bitorder="little").view(np.bool_)


def _count(bits: Bitmap) -> int:
    return int(np.bitwise_count(bits).sum(dtype=np.int64))
