"""The cold tier of an open store: pages move between slots of the page file and packs.

A page that moves is written anew under the version of the open transaction, so that what says how
old a place is says it of packs too: nothing else has to know how snapshots, aborts and readers keep
what they need. It is in its old place until the commit that names the new one is durable, and
longer if somebody reads an earlier state.

::

    demote    slots -> a pack      written and synced first, named by the map then
    repack    a pack -> a pack     the pages of it that the open transaction still refers to
    promote   a pack -> slots      as if somebody had written the page without changing it

A pack is filled in three steps: its pages are read, with the locks of a writer; it is written,
without them, for that takes longest; it is named, with them again, as far as its pages are still
what they were.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.allocator import BITMAP_BLOCKS, BLOCK_BYTES, COLD_BLOCK
from tiers.checksum import bound_crc32c
from tiers.disk import Bytes, aligned_buffer
from tiers.errors import StoreFullError
from tiers.packs import Ids
from tiers.page_map import (
    ABSENT_WORD,
    FIRST_SPACE,
    Words,
    are_private,
    blocks_of,
    pack_entry,
    unpack_entry,
)
from tiers.pager import Indices, Pager, Request
from tiers.space import Space
from tiers.transaction import Transaction

Claim = Callable[[list[Request]], AbstractContextManager[Any]]
Section = Callable[[], AbstractContextManager[None]]
Choice = Callable[[Space, Indices], Indices]

ATTEMPTS = 3
"""How often a pack is filled beside others who commit; then they wait."""


@dataclass
class Filling:
    """A pack that is being filled.

    Attributes
    ----------
    number : int
    version : int
        Of the transaction in which its pages were read.
    requests : list of (Space, int64 array)
        Which pages.
    entries : list of uint64 arrays (n, 2)
        Where the map had them.
    content : uint8 array (n, page_bytes)
    ids : uint64 array (n, 4)
        Once it is written.
    is_named : bool
        Whether it belongs to the transaction.
    """

    number: int
    version: int
    requests: list[Request]
    entries: list[Words]
    content: Bytes
    ids: Ids = field(default_factory=lambda: np.empty((0, 4), np.uint64))
    is_named: bool = False


class Cold:
    """Moves pages of an open store between its page file and its packs.

    What it moves takes part in the open transaction.

    Parameters
    ----------
    pager : Pager
    transaction : Transaction
    changing : callable
        Holds the locks of the store's writer, which may hold them already.
    claim : callable
        ``claim([(space, pages)])``; a write claim on pages that ascend.
    size_bytes_max : int or None
        The budget of the cold tier.

    Attributes
    ----------
    counts : dict of str to int
        Pages that were demoted, promoted and repacked.
    """

    def __init__(
        self,
        pager: Pager,
        transaction: Transaction,
        changing: Section,
        claim: Claim,
        size_bytes_max: int | None,
    ) -> None:
        self._pager = pager
        self._transaction = transaction
        self._changing = changing
        self._claim = claim
        self.size_bytes_max = size_bytes_max
        self._per_slot = pager.page_bytes // BLOCK_BYTES
        self.counts = dict.fromkeys(("demoted", "promoted", "repacked"), 0)
        self._filling: dict[int, threading.Thread] = {}

    @property
    def pages_a_pack(self) -> int:
        return self._pager.slots.packs.n_slots

    def is_cold(self, space: Space, pages: Indices) -> npt.NDArray[np.bool_]:
        """Return which pages lie in packs; `pages` ascend. I/O lock held."""
        entries = self._pager.map.lookup(FIRST_SPACE + space.number, pages)
        return np.asarray((entries[:, 0] != ABSENT_WORD) & (blocks_of(entries) >= COLD_BLOCK))

    def demote(self, requests: Sequence[Request], naming: Section | None = None) -> int:
        """Move pages to new packs; return how many moved.

        Passed over is what is not stored, is cold already, or was written in the open transaction.
        `naming` is the section in which the map is to name them, if it does more than change.

        Raises
        ------
        CorruptionError
            If a page is not what was written. Packs that were filled before it stay.
        StoreFullError, StoreIOError
            If a pack cannot be written, or there is no room to note it.
        """
        n_moved = 0
        for part in self._parts(requests):
            n_moved += self._move(part, self._demotable, naming or self._changing)
        self.counts["demoted"] += n_moved
        return n_moved

    def promote(self, requests: Sequence[Request]) -> int:
        """Move pages to slots of the page file; return how many moved. The writer's locks are held.

        They are written like pages that were changed: with the next commit, or when they give way.

        Raises
        ------
        ClaimTooLargeError, CorruptionError, StoreFullError, StoreIOError
        """
        n_moved = 0
        step = max(1, self._pager.frames.n_dram // 4)
        for space, pages in requests:
            cold = pages[self.is_cold(space, pages)]
            for start in range(0, len(cold), step):
                part = cold[start : start + step]
                with self._claim([(space, part)]):
                    n_moved += len(part)
        self.counts["promoted"] += n_moved
        return n_moved

    def repack(self, packs: Sequence[int], naming: Section | None = None) -> int:
        """Move what the open transaction refers to in these packs to new ones; return how many.

        A pack is dead once nothing refers to it: what a snapshot keeps stays.

        Raises
        ------
        CorruptionError, StoreFullError, StoreIOError
        """
        with self._changing():
            requests = self._live_pages(packs)
        n_moved = 0
        choose = partial(self._in_packs, packs)
        for part in self._parts(requests):
            n_moved += self._move(part, choose, naming or self._changing)
        self.counts["repacked"] += n_moved
        return n_moved

    # What may move

    def _demotable(self, space: Space, pages: Indices) -> Indices:
        entries = self._pager.map.lookup(FIRST_SPACE + space.number, pages)
        is_hot = (entries[:, 0] != ABSENT_WORD) & (blocks_of(entries) < COLD_BLOCK)
        chosen: Indices = pages[is_hot & ~are_private(entries, self._pager.map.version)]
        return chosen

    def _in_packs(self, packs: Sequence[int], space: Space, pages: Indices) -> Indices:
        entries = self._pager.map.lookup(FIRST_SPACE + space.number, pages)
        places = self._pager.slots.packs.pack_of(blocks_of(entries))
        is_there = (entries[:, 0] != ABSENT_WORD) & np.isin(places, packs)
        chosen: Indices = pages[is_there]
        return chosen

    def _live_pages(self, packs: Sequence[int]) -> list[Request]:
        """Return the pages in these packs that the open transaction refers to there."""
        files, spaces = self._pager.slots.packs, self._pager.spaces
        named: dict[int, list[int]] = {}
        for pack in packs:
            for number, page, version, _ in files.ids(pack).tolist():
                if version and number in spaces and page < spaces[number].n_pages:
                    named.setdefault(number, []).append(page)
        found = [
            (spaces[number], self._in_packs(packs, spaces[number], np.unique(named[number])))
            for number in sorted(named)
        ]
        return [(space, pages) for space, pages in found if len(pages)]

    def _parts(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Return the same pages in parts that each fit into a pack."""
        parts: list[list[Request]] = []
        n_left = 0
        for space, pages in requests:
            while len(pages):
                if n_left == 0:
                    parts.append([])
                    n_left = self.pages_a_pack
                parts[-1].append((space, pages[:n_left]))
                pages = pages[n_left:]
                n_left -= len(parts[-1][-1][1])
        return parts

    # Filling a pack

    def _move(self, part: list[Request], choose: Choice, naming: Section) -> int:
        """Fill one pack; return how many pages it holds."""
        for _ in range(ATTEMPTS):
            n_named = self._fill(part, choose, naming)
            if n_named is not None:
                return n_named
        with self._changing():
            return self._fill(part, choose, naming) or 0

    def _fill(self, part: list[Request], choose: Choice, naming: Section) -> int | None:
        """Fill a pack; return how many pages it holds, None if another commit came between."""
        filling = self._read(part, choose)
        if filling is None:
            return 0
        try:
            self._write(filling)
            return self._name(filling, naming)
        finally:
            self._transaction.end_pack(filling.number)
            with self._pager.mutex:
                self._filling.pop(filling.number, None)
                self._pager.released.notify_all()

    def _read(self, part: list[Request], choose: Choice) -> Filling | None:
        """Read and verify what of these pages is to move; None if nothing is."""
        pager = self._pager
        with self._changing():
            known = [(s, p) for s, p in part if pager.spaces.get(s.number) is s]
            requests = [(space, choose(space, pages)) for space, pages in known]
            requests = [(space, pages) for space, pages in requests if len(pages)]
            if not requests:
                return None
            entries = [pager.map.lookup(FIRST_SPACE + s.number, pages) for s, pages in requests]
            version = pager.map.version
            content = self._verified(requests, entries)
            number = self._transaction.reserve_pack()
            with pager.mutex:
                self._filling[number] = threading.current_thread()
            filling = Filling(number, version, requests, entries, content)
        return filling

    def _write(self, filling: Filling) -> None:
        pager, packs = self._pager, self._pager.slots.packs
        ids = []
        keys = (
            (space.number, page) for space, pages in filling.requests for page in pages.tolist()
        )
        for raw, key in zip(filling.content, keys, strict=True):
            tree = FIRST_SPACE + key[0]
            crc = bound_crc32c(raw, pager.store_id, tree, 0, key[1], filling.version)
            ids.append((*key, filling.version, crc))
        filling.ids = np.array(ids, np.uint64)
        try:
            packs.write(filling.number, filling.ids, filling.content)
        except BaseException:
            packs.remove_dead([filling.number])
            raise

    def _verified(self, requests: list[Request], entries: list[Words]) -> Bytes:
        """Return the bytes of stored pages, uint8 (n, page_bytes)."""
        pager = self._pager
        found = [
            (space, page, unpack_entry(*entry))
            for (space, pages), words in zip(requests, entries, strict=True)
            for page, entry in zip(pages.tolist(), words.tolist(), strict=True)
        ]
        content = aligned_buffer(len(found), pager.page_bytes)
        pager.slots.read_blocks([place[0] for _, _, place in found], list(content))
        for raw, (space, page, place) in zip(content, found, strict=True):
            pager.verify(space, page, place, raw)
        return content

    def _name(self, filling: Filling, naming: Section) -> int | None:
        """Let the map name what of a pack is still as it was read; return how much.

        None if it was read in another transaction: its pages would seem older than they are.
        """
        packs = self._pager.slots.packs
        try:
            with naming():
                if self._pager.map.version == filling.version:
                    return self._name_unchanged(filling)
                return None
        finally:
            # A pack that belongs to the transaction may be what a commit that failed refers to.
            if not filling.is_named:
                packs.remove_dead([filling.number])

    def is_filling(self, number: int) -> bool:
        """Return whether a pack is written just now, which nothing refers to yet. I/O lock held."""
        return number in self._filling

    def wait_for_fillings(self) -> None:
        """Wait until nobody writes or removes a pack any more, once the store is closed."""
        me = threading.current_thread()
        with self._pager.mutex:
            # Of a thread that an interrupt ended between two steps nothing more will come.
            while any(one.is_alive() and one is not me for one in self._filling.values()):
                self._pager.released.wait(0.1)

    def _name_unchanged(self, filling: Filling) -> int:
        pager = self._pager
        first = pager.slots.packs.first_block(filling.number)
        crcs = filling.ids[:, 3].tolist()
        moves: list[tuple[Space, Indices, Words, Words]] = []
        start = 0
        for (space, pages), entries in zip(filling.requests, filling.entries, strict=True):
            if pager.spaces.get(space.number) is space:
                now = pager.map.lookup(FIRST_SPACE + space.number, pages)
                is_same = (now == entries).all(axis=1)
                rows = np.flatnonzero(is_same) + start
                new = [
                    pack_entry(first + row * self._per_slot, filling.version, crcs[row])
                    for row in rows.tolist()
                ]
                if new:
                    moves.append(
                        (space, pages[is_same], entries[is_same], np.array(new, np.uint64))
                    )
            start += len(pages)
        n_pages = sum(len(pages) for _, pages, _, _ in moves)
        if n_pages == 0:
            return 0
        self._require_room(n_pages)
        self._ensure_room(moves)
        filling.is_named = True
        self._transaction.add_pack(filling.number)
        for space, pages, old, new_entries in moves:
            for block in blocks_of(new_entries).tolist():
                pager.allocator.take_cold(block, self._per_slot)
            pager.map.set_entries(FIRST_SPACE + space.number, pages, new_entries)
            pager.free_pages(old)
            with pager.mutex:
                frames = space.table.lookup(pages)
                pager.frames.cold[frames[frames >= 0]] = True
        return n_pages

    def _require_room(self, n_pages: int) -> None:
        """Raise if the budget of the cold tier does not hold so many pages more."""
        allocator, limit_bytes = self._pager.allocator, self.size_bytes_max
        n_blocks = allocator.cold_blocks - allocator.waiting_cold_blocks + n_pages * self._per_slot
        if limit_bytes is not None and n_blocks * BLOCK_BYTES > limit_bytes:
            raise StoreFullError(
                errno.ENOSPC,
                f"{n_pages} pages more are beyond the cold budget of {limit_bytes} bytes",
            )

    def _ensure_room(self, moves: list[tuple[Space, Indices, Words, Words]]) -> None:
        """See to it that the map can name a pack, and that what it names now can be freed."""
        self._transaction.begin_change()
        groups: set[int] = set()
        n_blocks = 0
        for space, pages, old, _ in moves:
            groups.update((blocks_of(old) // BITMAP_BLOCKS).tolist())
            n_blocks += self._pager.map.count_private_needed(FIRST_SPACE + space.number, pages)
        # The first pack of all makes the tree of the bitmaps higher.
        self._transaction.ensure_bitmaps(len(groups) + 1 + 2 * n_blocks, n_blocks + 8)
