"""Claims: which thread holds which pages, and the epochs beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tiers.condition import Condition
from tiers.errors import NestedClaimError, TierError
from tiers.page_map import ABSENT_WORD, FIRST_SPACE
from tiers.pager import Indices, Pager
from tiers.requests import Request, require_spaces
from tiers.space import Space

PREFETCH_WAVE_PAGES = 16
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
    io : RLock
        The store's I/O lock.

    Attributes
    ----------
    n_writes : int
        Write claims granted so far.
    stall_ns : int
        Time that claims waited for pages that were not there.
    n_waiting, n_waiting_max : int
        Claims that wait for their pages now, and most of them at once.
    """

    def __init__(self, pager: Pager, condition: Condition, io: threading.RLock) -> None:
        self._pager = pager
        self._condition = condition
        self.io = io
        self._held = _Held()
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
        pager = self._pager
        try:
            with pager.mutex:
                found = pager.resident_frames(requests, write=reserve is not None)
                if found is not None:
                    for frames in found:
                        pager.count_hits(frames)
                        pager.frames.pin(frames)
                    return self._grant(found, reserve is not None, on_release)
        except BaseException as failure:
            self._condition.poison_by("a claim", failure)
            raise
        if self._held.claims_and_epochs:
            raise NestedClaimError(
                "a thread that holds a claim or an epoch cannot bring in another one's pages"
            )
        began_ns = time.perf_counter_ns()
        with pager.mutex:
            self.n_waiting += 1
            self.n_waiting_max = max(self.n_waiting_max, self.n_waiting)
        try:
            with self.io, self._condition.guarding("a claim"):
                self._condition.require_usable()
                # Meanwhile somebody may have dropped a space.
                require_spaces(requests, pager.spaces)
                frames_of = self._bring_in(requests, reserve)
                if reserve is None:
                    self._read_ahead()
                with pager.mutex:
                    return self._grant(frames_of, reserve is not None, on_release)
        finally:
            with pager.mutex:
                self.n_waiting -= 1
                self.stall_ns += time.perf_counter_ns() - began_ns
                pager.released.notify_all()

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
            with self.io, self._condition.guarding("a fetch"):
                if self._condition.closed or self._condition.poison:
                    break
                wave = pages[start : start + PREFETCH_WAVE_PAGES]
                self._pager.checked([(space, wave)])
                n_fetched += self._pager.fetch_wave(space, wave)
        return n_fetched

    def _bring_in(
        self, requests: list[Request], reserve: Callable[[list[Request]], None] | None
    ) -> list[Indices]:
        """Fault in what is missing; return the frames, pinned once. I/O lock held."""
        if reserve is None:
            return self._pager.fault(requests)
        reserve(requests)
        frames_of = self._pager.fault(requests)
        try:
            self._pager.make_pages_private(requests, frames_of)
        except BaseException as failure:
            self._condition.broken = f"reserving slots was cut short by {failure!r}"
            with self._pager.mutex:
                self._pager.unpin(frames_of)
            raise
        return frames_of

    def _read_ahead(self) -> None:
        """Bring in neighbours of what the last fault missed, where that is of use. I/O lock held.

        A page that cannot be read does no harm here: its own claim will say so.
        """
        pager = self._pager
        with pager.mutex:
            wanted = pager.read_ahead.wanted(pager.missed, pager.frames.n_dram)
            if not wanted:
                return
            n_used = pager.counts["prefetch_used"]
            n_unused = pager.counts["prefetched"] - n_used
            n_wasted = n_unused - int(pager.frames.prefetched.sum())
            if not pager.read_ahead.may(n_used, n_wasted):
                return
        for space, pages in wanted:
            try:
                entries = pager.map.lookup(FIRST_SPACE + space.number, pages)
                pager.fetch_wave(space, pages[entries[:, 0] != ABSENT_WORD])
            except TierError:
                return

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
