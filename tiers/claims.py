"""Claims: which thread holds which pages, and the epochs beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from tiers.condition import Condition
from tiers.disk import Bytes
from tiers.errors import NestedClaimError, TierError
from tiers.fetcher import Fetcher
from tiers.io_lock import IoLock
from tiers.loading import Fault, Loading
from tiers.pager import Indices, Pager
from tiers.readahead import ReadAhead
from tiers.requests import Request, require_spaces
from tiers.space import Space
from tiers.transfer import copy_rows

PREFETCH_WAVE_PAGES = 16
AHEAD_WAVE_PAGES = 32
PATIENCE_S = 0.05
"""How long a wave, or a slice of other work, lets demand go first, which may never end."""


class Claim:
    """Pages that stay in their frames until `release`; a context manager, for one thread.

    Attributes
    ----------
    frames : list of int64 arrays
        For each request, the frame of each page.
    """

    __slots__ = ("_on_release", "frames")

    def __init__(self, frames: list[Indices], on_release: Callable[[list[Indices]], None]) -> None:
        self.frames = frames
        self._on_release: Callable[[list[Indices]], None] | None = on_release

    def release(self) -> None:
        """Let the pages go; releasing twice is fine."""
        if self._on_release is not None:
            on_release, self._on_release = self._on_release, None
            on_release(self.frames)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


class _Held(threading.local):
    """What the calling thread holds."""

    claims_and_epochs = 0
    write_claims = 0


class Claims:
    """Grants claims and epochs on the pages of a pager.

    Parameters
    ----------
    pager : Pager
    condition : Condition
    io : IoLock
        The store's.

    Attributes
    ----------
    read_ahead : ReadAhead
    fetcher : Fetcher or None
        Brings in what is read ahead; None while claims wait for it themselves.
    n_writes : int
        Write claims granted so far.
    stall_ns : int
        Time that claims waited for pages that were not there.
    n_waiting, n_waiting_max : int
        Claims that wait for their pages now, and most of them at once.
    """

    def __init__(self, pager: Pager, condition: Condition, io: IoLock) -> None:
        self._pager = pager
        self._condition = condition
        self.io = io
        self.read_ahead = ReadAhead()
        self.fetcher: Fetcher | None = None
        self._loading = Loading(pager, io)
        self._held = _Held()
        self._numbers: Indices = np.arange(64)
        self.n_waiting = 0
        self.n_waiting_max = 0
        self.stall_ns = 0
        self.n_writes = 0

    def require_no_reading(self) -> None:
        """Raise if the calling thread reads: a write could wait for it for ever."""
        if self._held.claims_and_epochs > self._held.write_claims:
            raise NestedClaimError("a thread that holds a read claim or an epoch cannot write")

    def require_nothing_held(self) -> None:
        """Raise if the calling thread holds anything: it would wait for itself, or worse."""
        if self._held.claims_and_epochs:
            raise NestedClaimError("a thread that holds a claim or an epoch cannot do this")

    def take(
        self,
        requests: list[Request],
        *,
        reserve: Callable[[list[Request]], None] | None,
        on_release: Callable[[], None],
    ) -> Claim:
        """Grant a claim: at once if everything is resident, else after bringing it in.

        Parameters
        ----------
        requests : list of (Space, int64 array)
            Checked.
        reserve : callable or None
            Sees to it that the pages can be written; None makes a read claim.
        on_release : callable
        """
        write = reserve is not None
        try:
            with self._pager.mutex:
                frames_of = self._pin_resident(requests, write=write)
                if frames_of is not None:
                    return self._grant(frames_of, write, on_release)
        except TierError:
            raise
        except BaseException as failure:
            self._condition.poison_by("a claim", failure)
            raise
        with self._waiting() as fault:
            frames_of = self._bring_in(fault, requests, reserve)
            with self._pager.mutex:
                fault.pinned.clear()
                return self._grant(frames_of, write, on_release)

    def read(self, request: Request, target: Bytes) -> None:
        """Copy pages of a checked request to the rows of `target`; see `Store.read`."""
        pager = self._pager
        try:
            with pager.mutex:
                frames_of = self._pin_resident([request], write=False)
                arena = pager.frames.arena
            if frames_of is not None:
                frames = frames_of[0]
                copy_rows(arena, frames, target, self._places(len(frames)))
                with pager.mutex:
                    pager.unpin(frames_of)
                return
        except TierError:
            raise
        except BaseException as failure:
            self._condition.poison_by("a read", failure)
            raise
        with self._waiting(target) as fault:
            self._bring_in(fault, [request], None)

    def _pin_resident(self, requests: list[Request], *, write: bool) -> list[Indices] | None:
        """Pin pages that are all in memory, and count them as hits. Mutex held."""
        pager = self._pager
        # Since the caller asked, the store may have been closed and its frames be gone.
        self._condition.require_usable()
        frames_of = pager.resident_frames(requests, write)
        if frames_of is None:
            return None
        n_used = 0
        used = []
        for frames in frames_of:
            used.append(pager.count_hits(frames))
            n_used += len(used[-1])
            pager.frames.pin(frames)
        if n_used and self.fetcher is not None:
            self._hand_over(self._pages_in(requests, used))
        return frames_of

    @contextmanager
    def _waiting(self, target: Bytes | None = None) -> Iterator[Fault]:
        """Wait for pages that are not there; the fault is over at the end of the block."""
        if self._held.claims_and_epochs:
            raise NestedClaimError(
                "a thread that holds a claim or an epoch cannot bring in another one's pages"
            )
        pager = self._pager
        began_ns = time.perf_counter_ns()
        fault = Fault(target)
        with pager.mutex:
            self.n_waiting += 1
            self.n_waiting_max = max(self.n_waiting_max, self.n_waiting)
        try:
            with self._condition.guarding("a claim"):
                yield fault
        finally:
            try:
                self._end(fault)
            finally:
                with pager.mutex:
                    self.n_waiting -= 1
                    self.stall_ns += time.perf_counter_ns() - began_ns
                    pager.released.notify_all()
                # Again, because an interrupt may have struck first: a close would wait for ever.
                self.io.end_read(fault)

    def _end(self, fault: Fault) -> None:
        """End a fault; a store that does not know what became of its frames refuses."""
        try:
            self._loading.end(fault)
        except BaseException as failure:
            self._condition.poison_by("the end of a read", failure)
            raise

    @contextmanager
    def epoch(self) -> Iterator[None]:
        """Hold an epoch; see `Store.epoch`."""
        with self._pager.mutex:
            epoch = self._pager.frames.enter_epoch()
        self._held.claims_and_epochs += 1
        try:
            yield
        finally:
            self._held.claims_and_epochs -= 1
            with self._pager.mutex:
                self._pager.frames.leave_epoch(epoch)
                self._pager.released.notify_all()

    def touch(self, requests: Sequence[Request]) -> None:
        """Count hits of pages that were read in an epoch; see `Store.touch`."""
        with self._pager.mutex:
            for space, pages in requests:
                frames = space.table.lookup(pages)
                self._pager.count_hits(frames[frames >= 0])

    def wait_for_demands(self, most_s: float = PATIENCE_S) -> None:
        """Let every claim that waits for its pages go first, for so long at most."""
        until_s = time.monotonic() + most_s
        with self._pager.mutex:
            while self.n_waiting and not self._condition.closed and time.monotonic() < until_s:
                self._pager.released.wait(min(0.05, most_s))

    def fetch(self, space: Space, pages: Indices) -> int:
        """Bring pages in wave by wave; see `Store.fetch`."""
        self.require_nothing_held()
        n_fetched = 0
        for start in range(0, len(pages), PREFETCH_WAVE_PAGES):
            self.wait_for_demands()
            wave = pages[start : start + PREFETCH_WAVE_PAGES]
            n_fetched += self._fetch(space, wave, stored=False)
        return n_fetched

    def _fetch(self, space: Space, pages: Indices, *, stored: bool) -> int:
        """Bring in a wave of pages that nobody asked for yet; none of a store that refuses."""
        fault = Fault()
        try:
            with self._condition.guarding("a fetch"):
                with self.io.beside_reads(), self._condition.guarding("a fetch"):
                    if self._condition.closed or self._condition.poison:
                        return 0
                    self._pager.checked([(space, pages)])
                    self._loading.begin_ahead(fault, space, pages, stored=stored)
                    if fault.is_cold:
                        return self._loading.finish_ahead(fault)
                return self._loading.finish_ahead(fault)
        finally:
            try:
                self._end(fault)
            finally:
                self.io.end_read(fault)

    def _bring_in(
        self,
        fault: Fault,
        requests: list[Request],
        reserve: Callable[[list[Request]], None] | None,
    ) -> list[Indices]:
        """Fault in what is missing; return the frames, pinned once."""
        frames_of = self._fault_in(fault, requests, reserve)
        if fault.missed and self.fetcher is not None and reserve is None:
            with self._pager.mutex:
                self._hand_over(fault.missed)
        return frames_of

    def _fault_in(
        self,
        fault: Fault,
        requests: list[Request],
        reserve: Callable[[list[Request]], None] | None,
    ) -> list[Indices]:
        while True:
            # Damage is judged while a refresh waits: after it nobody would seem to be expired.
            with self.io.beside_reads(), self._condition.guarding("a claim"):
                self._condition.require_usable()
                # Meanwhile somebody may have dropped a space.
                require_spaces(requests, self._pager.spaces)
                if reserve is not None:
                    return self._bring_in_to_write(fault, requests, reserve)
                if self._loading.begin(fault, requests):
                    if self.fetcher is None:
                        self._begin_read_ahead(fault)
                    if not fault.is_cold:
                        break
                    return self._loading.finish(fault)
            self._loading.wait_for_others(requests)
        return self._loading.finish(fault)

    def _bring_in_to_write(
        self, fault: Fault, requests: list[Request], reserve: Callable[[list[Request]], None]
    ) -> list[Indices]:
        """Fault in what is missing and give it slots of the open transaction. I/O lock held."""
        reserve(requests)
        while not self._loading.begin(fault, requests):
            self._loading.wait_for_others(requests)
        frames_of = self._loading.finish(fault)
        try:
            self._pager.make_pages_private(requests, frames_of)
        except BaseException as failure:
            self._condition.broken = f"reserving slots was cut short by {failure!r}"
            raise
        return frames_of

    def _begin_read_ahead(self, fault: Fault) -> None:
        """Plan to bring in neighbours of what a fault missed, where that is of use. I/O lock held.

        A map that cannot be read does no harm here.
        """
        with self._pager.mutex:
            wanted = self._wanted(fault.missed, background=False)
        for space, pages in wanted:
            try:
                self._loading.begin_ahead(fault, space, pages, stored=True)
            except TierError:
                return

    def _hand_over(self, touched: list[Request]) -> None:
        """Let the fetcher bring in neighbours of these pages, where that is of use. Mutex held."""
        assert self.fetcher is not None
        wanted = self._wanted(touched, background=True)
        if wanted:
            self.fetcher.hand(wanted)

    def fetch_ahead(self, space: Space, pages: Indices) -> None:
        """Bring in pages that are read ahead, as far as they are stored; for the fetcher.

        A page that cannot be read does no harm here: its own claim will say so.
        """
        for start in range(0, len(pages), AHEAD_WAVE_PAGES):
            with suppress(TierError):
                self._fetch(space, pages[start : start + AHEAD_WAVE_PAGES], stored=True)

    def _wanted(self, touched: list[Request], *, background: bool) -> list[Request]:
        """Return what to read ahead after these pages were missed or first used. Mutex held."""
        pager = self._pager
        wanted = self.read_ahead.wanted(touched, pager.frames.n_dram, background=background)
        if not wanted:
            return []
        n_used = pager.counts["prefetch_used"]
        n_unused = pager.counts["prefetched"] - n_used
        n_wasted = n_unused - int(pager.frames.prefetched.sum())
        return wanted if self.read_ahead.may(n_used, n_wasted) else []

    def _places(self, count: int) -> Indices:
        """Return the numbers 0 .. count - 1; not to be changed."""
        # Another thread may put a shorter list there in between.
        numbers = self._numbers
        if count > len(numbers):
            numbers = self._numbers = np.arange(count)
        return numbers[:count]

    def _pages_in(self, requests: list[Request], frames_of: list[Indices]) -> list[Request]:
        """Return the pages in some frames of each request."""
        of_frame = self._pager.frames.page
        return [
            (space, of_frame[frames])
            for (space, _), frames in zip(requests, frames_of, strict=True)
            if len(frames)
        ]

    def _grant(
        self, frames_of: list[Indices], write: bool, on_release: Callable[[], None]
    ) -> Claim:
        """Give the calling thread frames that are pinned for it. Mutex held."""
        if write:
            dirty = self._pager.frames.dirty
            for frames in frames_of:
                self._pager.counts["dirtied"] += len(frames) - int(dirty[frames].sum())
                dirty[frames] = True
        self._held.claims_and_epochs += 1
        self._held.write_claims += write
        self.n_writes += write

        def release(frames_of: list[Indices]) -> None:
            try:
                with self._pager.mutex:
                    self._pager.unpin(frames_of)
                self._held.claims_and_epochs -= 1
                self._held.write_claims -= write
                on_release()
            except BaseException as failure:
                self._condition.poison_by("a release", failure)
                raise

        return Claim(frames_of, release)
