"""Sections: stretches of time in which one thread may change a store, or look at all of it.

Locks, in the order in which they are taken:

``writer``
    One write section at a time; a commit or abort takes it too, so both wait until updates ended.
``io``
    Whoever faults, writes back, reserves or commits: map, allocator and files belong to its holder;
    reads that it planned go on without it (`tiers.io_lock`).
``Pager.mutex``
    Frames, page tables, policy and counters; never held across I/O.

Nobody waits for `io` with a pin in hand (`NestedClaimError` otherwise), so its holder can wait for
pins to go away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiers.claims import Claim, Claims
from tiers.condition import Condition
from tiers.io_lock import IoLock
from tiers.page_map import PageMap
from tiers.pager import Request

PATIENCE_S = 0.1


class Sections:
    """The sections of one open store.

    Parameters
    ----------
    condition : Condition
    claims : Claims
    page_map : PageMap
    io : IoLock
        The I/O lock, which `claims` uses too.
    """

    def __init__(self, condition: Condition, claims: Claims, page_map: PageMap, io: IoLock) -> None:
        self.writer = threading.RLock()
        self._io = io
        self._condition = condition
        self._claims = claims
        self._map = page_map

    def require_whole(self) -> None:
        """Raise `TransactionBrokenError` if a change was cut short; only an abort helps then."""
        if self._map.failure is not None and self._condition.broken is None:
            self._condition.broken = f"a change was cut short by {self._map.failure}"
        self._condition.require_whole()

    def refuse_reader(self) -> None:
        """Raise if the store, or the calling thread, only reads."""
        self._condition.require_writable()
        self._claims.require_no_reading()

    @contextmanager
    def writing(self, *, whole: bool = True) -> Iterator[None]:
        """Keep other writers, commits and aborts out; if not `whole`, of a broken one too."""
        self.refuse_reader()
        while not self.writer.acquire(timeout=PATIENCE_S):
            self._condition.require_open()
        try:
            self._condition.require_writable()
            if whole:
                self.require_whole()
            yield
        finally:
            self.writer.release()

    def claim(self, requests: list[Request], reserve: Callable[[list[Request]], None]) -> Claim:
        """Grant a write claim on checked requests; other writers wait until it is released.

        `reserve` sees to it that the pages can be written.
        """
        self.refuse_reader()
        self.writer.acquire()
        try:
            self.require_whole()
            return self._claims.take(requests, reserve=reserve, on_release=self.writer.release)
        except BaseException:
            self.writer.release()
            raise

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Write; if that is cut short after pages could be changed, the transaction is broken."""
        with self.writing():
            n_writes = self._claims.n_writes
            try:
                yield
            except BaseException as failure:
                if self._claims.n_writes > n_writes:
                    self._condition.broken = f"an update was cut short by {failure!r}"
                raise

    @contextmanager
    def alone(self, *, whole: bool = True) -> Iterator[None]:
        """Hold the writer's lock and the I/O lock, with nothing else in hand."""
        self._claims.require_nothing_held()
        with self.writing(whole=whole), self._io:
            yield

    @contextmanager
    def changing(self, action: str) -> Iterator[None]:
        """Change the open transaction alone."""
        with self.alone(), self._condition.guarding(action):
            yield

    @contextmanager
    def looking(self, action: str) -> Iterator[None]:
        """Look at the whole store while nothing moves; a reader may, too."""
        self._condition.require_usable()
        self._claims.require_nothing_held()
        with self.writer, self._io, self._condition.guarding(action):
            yield

    @contextmanager
    def doing_io(self, action: str) -> Iterator[None]:
        """Use map and files, beside a writer that is not doing so."""
        self._condition.require_usable()
        self._claims.require_nothing_held()
        with self._io, self._condition.guarding(action):
            yield
