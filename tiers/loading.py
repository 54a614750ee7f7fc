"""Loading: pages on their way from slots into frames, for a claim or ahead of one.

Three steps. *Begin*, with the I/O lock: frames are found, and where the pages lie is written down.
*Read*, without a lock: the device, and the checksums. *Publish*, with the mutex: page tables name
the frames. In between the pages are *coming*: whoever else wants one waits for it, reading nothing.

What is read ahead is read in small parts. A demand takes out of them what is not being read yet, so
it waits for two transfers at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tiers.allocator import BLOCK_BYTES, COLD_BLOCK
from tiers.checksum import identity_words
from tiers.disk import Bytes
from tiers.errors import ClaimTooLargeError, TierError
from tiers.io_lock import IoLock
from tiers.page_map import ABSENT_WORD, FIRST_SPACE, Words
from tiers.pager import WAVE_PAGES, Indices, Pager
from tiers.requests import Request
from tiers.space import Space
from tiers.transfer import IN_FLIGHT, IN_FLIGHT_AHEAD, RUN_BUFFERS_MAX, Copies, copy_rows

_NOTHING: Indices = np.empty(0, np.int64)


class Load:
    """Pages of one space, and the frames that were taken for them.

    Attributes
    ----------
    space : Space
    pages, frames : int64 arrays (n,)
    blocks, crcs : int64 arrays (n,)
        Where each lies, -1 where it has no slot, and its checksum.
    names : uint64 array (n, 6)
        What follows each page in its checksum.
    version : int
        Of the open transaction.
    place : int
        Which request demands them, -1 if none does.
    """

    __slots__ = ("blocks", "crcs", "frames", "names", "pages", "place", "space", "version")

    def __init__(
        self,
        space: Space,
        pages: Indices,
        frames: Indices,
        blocks: Indices,
        crcs: Indices,
        names: Words,
        version: int,
        place: int,
    ) -> None:
        self.space = space
        self.pages = pages
        self.frames = frames
        self.blocks = blocks
        self.crcs = crcs
        self.names = names
        self.version = version
        self.place = place

    def part(self, chosen: npt.NDArray[np.generic]) -> Load:
        """Return some of it, by indices or by a mask."""
        return Load(
            self.space,
            self.pages[chosen],
            self.frames[chosen],
            self.blocks[chosen],
            self.crcs[chosen],
            self.names[chosen],
            self.version,
            self.place,
        )

    def keep(self, mask: npt.NDArray[np.bool_]) -> None:
        """Leave out the others."""
        self.pages, self.frames = self.pages[mask], self.frames[mask]
        self.blocks, self.crcs = self.blocks[mask], self.crcs[mask]
        self.names = self.names[mask]

    def parts(self, blocks_a_page: int) -> list[Load]:
        """Return it in pieces of `IN_FLIGHT_AHEAD` runs of neighbours on the device."""
        order = np.argsort(self.blocks, kind="stable")
        blocks = self.blocks[order]
        is_next = (blocks[1:] == blocks[:-1] + blocks_a_page) | (blocks[1:] < 0)
        starts = [0]
        for i, joined in enumerate(is_next.tolist(), start=1):
            if not joined or i - starts[-1] == RUN_BUFFERS_MAX:
                starts.append(i)
        bounds = [*starts[::IN_FLIGHT_AHEAD], len(order)]
        return [self.part(np.sort(order[a:b])) for a, b in pairwise(bounds)]


class Fault:
    """What a claim found in memory and what it has to bring in; or what is brought in ahead.

    Attributes
    ----------
    frames_of : list of int64 arrays
        For each request the frame of each page, -1 until it is published.
    pinned : list of int64 arrays
        Frames that are held for the claim, until it is granted.
    loads : list of Load
        What is demanded, and then pinned.
    ahead : list of Load
        What nobody has asked for yet.
    is_cold : bool
        Packs are read, which only one thread at a time may do: finish it under the lock.
    missed : list of (Space, int64 array)
        Pages that are demanded and were absent.
    target : uint8 array (n, page_bytes) or None
        Receives a copy of the pages, in the order of the only request.
    """

    __slots__ = ("ahead", "frames_of", "is_cold", "loads", "missed", "pinned", "target")

    def __init__(self, target: Bytes | None = None) -> None:
        self.target = target
        self.frames_of: list[Indices] = []
        self.pinned: list[Indices] = []
        self.loads: list[Load] = []
        self.ahead: list[Load] = []
        self.is_cold = False
        self.missed: list[Request] = []


class Loading:
    """Brings pages of a pager into its frames.

    A caller makes a `Fault`, begins it with the I/O lock held, finishes it with or without, and
    ends it whatever happened::

        fault = Fault()
        try:
            with io.beside_reads():
                loading.begin(fault, requests)
            frames_of = loading.finish(fault)
        finally:
            loading.end(fault)

    Parameters
    ----------
    pager : Pager
    io : IoLock
    """

    def __init__(self, pager: Pager, io: IoLock) -> None:
        # Here, because it imports numba.
        from tiers import books

        self._books = books
        self._pager = pager
        self._io = io
        self._coming: dict[int, set[int]] = {}
        # Of `Fault.ahead`, all that nobody has begun to read: a demand may take pages out of it.
        self._not_begun: list[Load] = []

    def begin(self, fault: Fault, requests: Sequence[Request]) -> bool:
        """Pin what is in memory, and plan to bring in the rest. I/O lock held.

        Returns
        -------
        bool
            False, with nothing done, if another thread is bringing in one of these pages: begin
            again after `wait_for_others`.

        Raises
        ------
        ClaimTooLargeError
            If the frames became too few since the claim was asked for.
        """
        pager, frames = self._pager, self._pager.frames
        n_wanted = sum(len(pages) for _, pages in requests)
        if n_wanted > frames.n_dram:
            raise ClaimTooLargeError(n_wanted, frames.n_dram)
        missing: list[tuple[int, Space, Indices]] = []
        n_missing = 0
        taken = _NOTHING
        try:
            with pager.mutex:
                frames_of = []
                for place, (space, pages) in enumerate(requests):
                    of_pages = space.table.lookup(pages)
                    frames_of.append(of_pages)
                    n_absent = self._books.n_absent(of_pages)
                    if n_absent:
                        absent = pages if n_absent == len(pages) else pages[of_pages < 0]
                        if self._are_coming(space, absent) and not self._take_over(space, absent):
                            return False
                        missing.append((place, space, absent))
                        n_missing += n_absent
                fault.frames_of = frames_of
                for of_pages in frames_of:
                    present = of_pages[of_pages >= 0] if n_missing else of_pages
                    frames.pin(present)
                    fault.pinned.append(present)
                    pager.count_hits(present)
                taken = frames.take_free(n_missing)
            if len(taken) < n_missing:
                more = pager.obtain(n_missing - len(taken), wait=True)
                taken = np.concatenate([taken, more])
            start = 0
            for place, space, absent in missing:
                of_load = taken[start : start + len(absent)]
                fault.loads.append(self._plan(fault, space, absent, of_load, place))
                fault.missed.append((space, absent))
                start += len(absent)
        except BaseException:
            with pager.mutex:
                frames.return_free(taken)
                fault.loads.clear()
            raise
        self._announce(fault, fault.loads)
        return True

    def begin_ahead(self, fault: Fault, space: Space, pages: Indices, *, stored: bool) -> None:
        """Plan to bring in pages that nobody asked for, as far as frames can be had at once.

        I/O lock held. With `stored`, pages without a slot are passed over.
        """
        pager = self._pager
        with pager.mutex:
            pages = pages[space.table.lookup(pages) < 0]
            coming = self._coming.get(space.number)
            if coming:
                pages = np.array([page for page in pages.tolist() if page not in coming], np.int64)
        if stored and len(pages):
            entries = pager.map.lookup(FIRST_SPACE + space.number, pages)
            pages = pages[entries[:, 0] != ABSENT_WORD]
        if len(pages) == 0:
            return
        frames = pager.obtain(len(pages), wait=False)
        try:
            load = self._plan(fault, space, pages[: len(frames)], frames, -1)
        except BaseException:
            with pager.mutex:
                pager.frames.return_free(frames)
            raise
        parts = load.parts(pager.page_bytes // BLOCK_BYTES)
        fault.ahead.extend(parts)
        self._announce(fault, parts)

    def finish(self, fault: Fault) -> list[Indices]:
        """Read what `begin` planned; return the frames of each request, pinned.

        Without the I/O lock, unless packs are read. What is brought in ahead comes last; a page of
        that which cannot be read does no harm here: its own claim will say so.
        """
        if fault.loads:
            self._read_demanded(fault)
        elif fault.target is not None:
            frames = fault.frames_of[0]
            copy_rows(self._pager.frames.arena, frames, fault.target, np.arange(len(frames)))
        with suppress(TierError):
            self.finish_ahead(fault)
        return fault.frames_of

    def finish_ahead(self, fault: Fault) -> int:
        """Read what `begin_ahead` planned; return how many pages were brought in."""
        pager = self._pager
        n_pages = 0
        while fault.ahead:
            load = fault.ahead[0]
            with pager.mutex:
                self._not_begun.remove(load)
            if len(load.pages):
                self._read(load, IN_FLIGHT_AHEAD)
            with pager.mutex:
                self._publish(load)
                pager.frames.prefetched[load.frames] = True
                pager.counts["prefetched"] += len(load.pages)
                del fault.ahead[0]
                pager.released.notify_all()
            n_pages += len(load.pages)
        return n_pages

    def end(self, fault: Fault) -> None:
        """Give back what was not published or not granted, and let others go on."""
        pager = self._pager
        try:
            if fault.loads or fault.ahead or fault.pinned:
                with pager.mutex:
                    pager.unpin(fault.pinned)
                    fault.pinned.clear()
                    for load in (*fault.loads, *fault.ahead):
                        self._coming[load.space.number].difference_update(load.pages.tolist())
                        pager.frames.return_free(load.frames)
                        if load in self._not_begun:
                            self._not_begun.remove(load)
                    fault.loads.clear()
                    fault.ahead.clear()
                    pager.released.notify_all()
        finally:
            self._io.end_read(fault)

    def _take_over(self, space: Space, pages: Indices) -> bool:
        """Take pages out of what is to be read ahead and was not begun; they are demanded now.

        Mutex held. Returns whether none of them is coming any more.
        """
        for load in self._not_begun:
            if load.space is space:
                is_wanted = np.isin(load.pages, pages)
                if is_wanted.any():
                    self._coming[space.number].difference_update(load.pages[is_wanted].tolist())
                    self._pager.frames.return_free(load.frames[is_wanted])
                    load.keep(~is_wanted)
        return not self._are_coming(space, pages)

    def wait_for_others(self, requests: Sequence[Request]) -> None:
        """Wait while other threads bring in one of these pages."""
        pager = self._pager
        with pager.mutex:
            while any(self._are_coming(space, pages) for space, pages in requests):
                pager.released.wait(0.1)
                pager.require_usable()

    def _are_coming(self, space: Space, pages: Indices) -> bool:
        coming = self._coming.get(space.number)
        return coming is not None and not coming.isdisjoint(pages.tolist())

    def _announce(self, fault: Fault, loads: Sequence[Load]) -> None:
        """Let others wait for these pages, and whoever wants the lock alone for the read.

        What is only copied is a read as well: a close takes the frames away.
        """
        if loads or fault.target is not None:
            with self._pager.mutex:
                self._io.begin_read(fault)
                for load in loads:
                    coming = self._coming.setdefault(load.space.number, set())
                    coming.update(load.pages.tolist())
                    if load.place < 0:
                        self._not_begun.append(load)

    def _plan(
        self, fault: Fault, space: Space, pages: Indices, frames: Indices, place: int
    ) -> Load:
        pager = self._pager
        tree = FIRST_SPACE + space.number
        blocks, crcs = np.empty((2, len(pages)), np.int64)
        names = np.empty((len(pages), 6), np.uint64)
        self._books.unpack(
            *(pager.map.lookup(tree, pages), pages, identity_words(pager.store_id, tree)),
            *(blocks, crcs, names),
        )
        if pager.allocator.n_cold_groups and len(blocks):
            fault.is_cold |= int(blocks.max()) >= COLD_BLOCK
        return Load(space, pages, frames, blocks, crcs, names, pager.map.version, place)

    def _read_demanded(self, fault: Fault) -> None:
        pager = self._pager
        began_ns = time.perf_counter_ns()
        n_read = 0
        for load in fault.loads:
            n_read += self._read(load, IN_FLIGHT, fault)
        with pager.mutex:
            if n_read:
                pager.latencies.add(time.perf_counter_ns() - began_ns)
            for load in fault.loads:
                self._publish(load)
                pager.frames.pin(load.frames)
                fault.pinned.append(load.frames)
                pager.counts["misses"] += len(load.pages)
                found = fault.frames_of[load.place]
                found[found < 0] = load.frames
            fault.loads.clear()
            pager.released.notify_all()

    def _read(self, load: Load, in_flight: int, fault: Fault | None = None) -> int:
        """Fill frames with pages, verified, or with their initial value.

        What the fault wants copied is copied meanwhile. Returns how many pages were read.
        """
        pager = self._pager
        arena = pager.frames.arena
        pages, frames, blocks = load.pages, load.frames, load.blocks
        crcs, names = load.crcs, load.names
        target = None if fault is None else fault.target
        held = places = read_places = _NOTHING
        if fault is not None and target is not None:
            frames_of = fault.frames_of[0]
            places = np.flatnonzero(frames_of >= 0)
            held = frames_of[places]
            read_places = np.flatnonzero(frames_of < 0)
        absent = blocks < 0
        if absent.any():
            for page, frame in zip(pages[absent].tolist(), frames[absent].tolist(), strict=True):
                load.space.fill_initial(page, arena[frame])
            if target is not None:
                held = np.concatenate([held, frames[absent]])
                places = np.concatenate([places, read_places[absent]])
                read_places = read_places[~absent]
            frames, blocks = frames[~absent], blocks[~absent]
            crcs, names = crcs[~absent], names[~absent]
        have_copied = False
        for start in range(0, len(frames), WAVE_PAGES):
            wave = slice(start, start + WAVE_PAGES)
            copies = None
            if target is not None:
                copies = Copies(target, held, places, read_places[wave], crcs[wave])
            found, have_copied = pager.slots.read_pages(
                *(blocks[wave], arena, frames[wave], names[wave]),
                in_flight=in_flight,
                copies=copies,
            )
            pager.verify_sums(load.space, found, crcs[wave], blocks[wave], names[wave])
            if target is not None and not have_copied:
                copy_rows(arena, frames[wave], target, read_places[wave])
            elif target is not None:
                held = places = _NOTHING
        if target is not None and len(held):
            copy_rows(arena, held, target, places)
        return len(frames)

    def _publish(self, load: Load) -> None:
        """Let page tables name what was read. Mutex held."""
        pager, frames = self._pager, self._pager.frames
        self._books.note_places(*frames.places, load.frames, load.blocks, load.names, load.version)
        frames.map(load.space, load.pages, load.frames)
        pager.placement.insert(load.frames)
        self._coming[load.space.number].difference_update(load.pages.tolist())
