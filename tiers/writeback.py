"""Writeback: pages given slots of the open transaction, written to them, and named.

One part of `tiers.pager.Pager`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, Allocator
from tiers.checksum import bound_crc32c, bound_crcs32c, identity_words
from tiers.disk import Bytes
from tiers.errors import StoreFullError, StoreIOError
from tiers.frames import Frames
from tiers.page_map import (
    ABSENT_WORD,
    ALLOCATION,
    FIRST_SPACE,
    PageMap,
    Words,
    are_private,
    blocks_of,
    pack_entries,
    pack_entry,
    unpack_entry,
)
from tiers.placement import Placement
from tiers.requests import Request
from tiers.slots import SlotFile, fill_rows
from tiers.space import Space
from tiers.tags import Tag, Tags

Indices = npt.NDArray[np.int64]

WRITE_WAVE_PAGES = 4096
"""Pages in one wave of writes, which nobody waits for page by page."""
WRITE_ATTEMPTS = 3


class Writeback:
    """The writing side of a pager."""

    store_id: bytes
    page_bytes: int
    slots: SlotFile
    tags: Tags | None
    has_written_tags: bool
    map: PageMap
    allocator: Allocator
    frames: Frames
    mutex: threading.Lock
    counts: dict[str, int]
    placement: Placement
    obtain: Callable[..., Indices]
    unpin: Callable[[list[Indices]], None]
    count_hits: Callable[[Indices], Indices]

    def ensure_room(self, requests: list[Request]) -> None:
        """Make sure that slots and map paths of these pages can be taken. I/O lock held."""
        n_slots = 0
        n_blocks = 0
        for space, pages in requests:
            tree = FIRST_SPACE + space.number
            entries = self.map.lookup(tree, pages)
            fresh = pages[~are_private(entries, self.map.version)]
            n_slots += len(fresh)
            n_blocks += self.map.count_private_needed(tree, fresh) if len(fresh) else 0
        self.allocator.ensure(n_slots, n_blocks + self.allocation_bound(2 * n_slots + 2 * n_blocks))

    def allocation_bound(self, n_changes: int) -> int:
        """Return the most blocks that so many changes of bitmaps can make private."""
        n_bitmaps = self.allocator.n_bitmaps + self.allocator.n_cold_groups + 2
        return 2 * min(n_bitmaps, n_changes) + 2 * self.map.depth(ALLOCATION) + 4

    def make_pages_private(self, requests: list[Request], frames_of: list[Indices]) -> None:
        """Give each page that has none a slot of this transaction. I/O lock held, room ensured."""
        for (space, pages), frames in zip(requests, frames_of, strict=True):
            fresh = ~self.frames.private[frames]
            if not fresh.any():
                continue
            tree = FIRST_SPACE + space.number
            old = self.map.lookup(tree, pages[fresh])
            blocks = self.allocator.take_slots(int(fresh.sum()))
            entries = pack_entries(blocks, self.map.version, np.zeros_like(blocks))
            self.map.set_entries(tree, pages[fresh], entries)
            self.free_pages(old[old[:, 0] != ABSENT_WORD])
            with self.mutex:
                self.frames.private[frames[fresh]] = True
                self.frames.cold[frames[fresh]] = False
                self.frames.dirty[frames[fresh]] = True
                self.frames.block[frames[fresh]] = blocks
                self.counts["dirtied"] += int(fresh.sum())

    def free_pages(self, entries: Words) -> None:
        """Give back the slots that entries name. I/O lock held, room for the bitmaps ensured."""
        n_blocks = self.page_bytes // BLOCK_BYTES
        for word0, word1 in entries.tolist():
            block, version, _ = unpack_entry(word0, word1)
            self.allocator.give_back(block, n_blocks, version)

    def write_pages(self, frames: Indices) -> None:
        """Write frames, which nobody changes, to their slots and name them. I/O lock held."""
        books = self.frames
        frames = frames[np.lexsort((books.page[frames], books.space[frames]))]
        for start in range(0, len(frames), WRITE_WAVE_PAGES):
            wave = frames[start : start + WRITE_WAVE_PAGES]
            self._write_wave(wave, books.space[wave].astype(np.int64), books.page[wave])

    def write_contents(self, space: Space, pages: Indices, contents: Bytes, through: bool) -> None:
        """Let pages have these contents, uint8 (n, n_bytes). I/O lock held, room ensured.

        With `through` they are written to their slots as they are copied. A page that cannot be
        stays dirty, as if it had not been tried.
        """
        books = self.frames
        taken: Indices = np.empty(0, np.int64)
        with self.mutex:
            frames = space.table.lookup(pages)
            is_absent = frames < 0
            present = frames[~is_absent]
            books.pin(present)
        try:
            # Nobody sees these before they have their contents.
            taken = self.obtain(int(is_absent.sum()), wait=True)
            frames[is_absent] = taken
            entries = self.map.lookup(FIRST_SPACE + space.number, pages[is_absent])
            is_private = are_private(entries, self.map.version) & (entries[:, 0] != ABSENT_WORD)
            with self.mutex:
                books.cold[taken] = False
                books.private[taken] = is_private
                books.block[taken[is_private]] = blocks_of(entries[is_private])
            self.make_pages_private([(space, pages)], [frames])
            with self.mutex:
                self.counts["dirtied"] += int((~books.dirty[frames]).sum())
                books.dirty[frames] = True
            if through:
                with suppress(StoreIOError, StoreFullError):
                    self._write_wave(frames, np.full_like(pages, space.number), pages, contents)
                    self.counts["write_backs"] += len(pages)
            else:
                fill_rows(books.arena, frames, contents)
        except BaseException:
            with self.mutex:
                books.dirty[taken] = books.private[taken] = False
                books.return_free(taken)
                self.unpin([present])
            raise
        with self.mutex:
            books.map(space, pages[is_absent], taken)
            self.placement.insert(taken)
            self.count_hits(present)
            self.unpin([present])

    def _write_wave(
        self, frames: Indices, spaces: Indices, pages: Indices, contents: Bytes | None = None
    ) -> None:
        """Write these pages, filled with contents before if given, and name them."""
        books = self.frames
        names = self._identities(spaces, pages)
        try:
            crcs = self.slots.write_rows(books.block[frames], books.arena, frames, names, contents)
        except OSError:
            if contents is not None:
                fill_rows(books.arena, frames, contents)
            for place in zip(frames.tolist(), spaces.tolist(), pages.tolist(), strict=True):
                self._write_page_elsewhere(*place)
            crcs = bound_crcs32c([books.arena[frame] for frame in frames.tolist()], names)
        blocks = books.block[frames]
        if self.tags is not None:
            self.has_written_tags = True
            self.tags.note(blocks, spaces, pages, self.map.version, crcs)
        entries = pack_entries(blocks, self.map.version, crcs)
        for number in np.unique(spaces).tolist():
            chosen = spaces == number
            self.map.set_entries(FIRST_SPACE + number, pages[chosen], entries[chosen])
        with self.mutex:
            books.dirty[frames] = False

    def name_few(self, frames: Indices) -> tuple[list[int], list[Bytes], list[Tag]]:
        """Name frames, which nobody changes, before they are written. I/O lock held.

        Returns
        -------
        blocks : list of int
        contents : list of uint8 arrays
            What is to be written there.
        tags : list of Tag
            To be written with them, see `placed_tags`.
        """
        books, version = self.frames, self.map.version
        blocks, contents, tags = books.block[frames].tolist(), [], []
        names = zip(books.space[frames].tolist(), books.page[frames].tolist(), strict=True)
        for frame, block, (number, page) in zip(frames.tolist(), blocks, names, strict=True):
            tree, content = FIRST_SPACE + number, books.arena[frame]
            crc = bound_crc32c(content, self.store_id, tree, 0, page, version)
            self.map.set_entry(tree, page, pack_entry(block, version, crc))
            contents.append(content)
            tags.append(Tag(block, number, page, version, crc))
        return blocks, contents, tags

    def placed_tags(self, tags: list[Tag]) -> AbstractContextManager[tuple[list[int], list[Bytes]]]:
        """See `Tags.placed`; nothing in a store without tags."""
        if self.tags is None:
            return nullcontext(([], []))
        self.has_written_tags |= bool(tags)
        return self.tags.placed(tags)

    def _identities(self, spaces: Indices, pages: Indices) -> Words:
        """Return what follows each page in its checksum, uint64 (n, 6)."""
        names = np.empty((len(pages), 6), np.uint64)
        for number in np.unique(spaces).tolist():
            names[spaces == number, :4] = identity_words(self.store_id, FIRST_SPACE + number)
        names[:, 4], names[:, 5] = pages, self.map.version
        return names

    def _write_page_elsewhere(self, frame: int, number: int, page: int) -> None:
        """Write one page, to another slot where the device refuses one; that one is given up."""
        for attempt in range(WRITE_ATTEMPTS):
            try:
                self.slots.write_blocks([int(self.frames.block[frame])], [self.frames.arena[frame]])
                return
            except OSError:
                if attempt == WRITE_ATTEMPTS - 1:
                    raise
                self.allocator.ensure(1, self.allocation_bound(2))
                block = self.allocator.take_slots(1)
                if self.tags is not None:
                    # The device may have a tag that says that the page lies there.
                    none = np.zeros(1, np.int64)
                    self.tags.note(self.frames.block[[frame]], none, none, 0, none)
                self.frames.block[frame] = block[0]
                self.map.set_entries(
                    FIRST_SPACE + number,
                    np.array([page]),
                    pack_entries(block, self.map.version, np.zeros_like(block)),
                )
