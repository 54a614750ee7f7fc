"""Look-ahead: pages of a coming batch, brought in by a thread while this one computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from prefetch import Plan
from tiers import Space, Store

Indices = npt.NDArray[np.int64]

WAVE_PAGES = 16


class Prefetch:
    """A batch whose pages are on their way.

    Attributes
    ----------
    n_pages : int or None
        Pages that the batch needs; None until they are known.
    n_fetched : int
        Pages brought in so far; those that were there already are not among them.
    error : Exception or None
        Why it ended early. A hint may fail: the batch itself will read what is missing, and raise
        what there is to raise.
    """

    def __init__(self) -> None:
        self.n_pages: int | None = None
        self.n_fetched = 0
        self.error: Exception | None = None
        self._cancelled = False
        self._ended = threading.Event()

    @property
    def done(self) -> bool:
        return self._ended.is_set()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended; return whether it has."""
        return self._ended.wait(timeout_s)

    def cancel(self) -> None:
        """Stop after the wave in flight."""
        self._cancelled = True


class LookAhead:
    """One thread that fetches the pages of batches, in the order in which they were announced.

    Parameters
    ----------
    store : Store
    space : Space
    """

    def __init__(self, store: Store, space: Space) -> None:
        self._store = store
        self._space = space
        self._plan = Plan(max(1, store.n_frames // 2))
        self._guard = threading.Lock()
        self._waiting: deque[tuple[Prefetch, Callable[[], Indices]]] = deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.n_failed = 0

    def announce(self, pages: Callable[[], Indices]) -> Prefetch:
        """Queue a batch; `pages` is called on the thread and returns its page list."""
        prefetch = Prefetch()
        with self._guard:
            self._waiting.append((prefetch, pages))
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="dpnc-look-ahead", daemon=True
                )
                self._thread.start()
        return prefetch

    def close(self) -> None:
        """Stop after the wave in flight and wait for the thread."""
        with self._guard:
            self._closing = True
            thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        """Work until nothing waits; the thread ends then, and does not keep the store alive."""
        while True:
            with self._guard:
                if self._closing or not self._waiting:
                    self._thread = None
                    for prefetch, _ in self._waiting:
                        prefetch._ended.set()
                    self._waiting.clear()
                    return
                prefetch, pages = self._waiting.popleft()
            try:
                self._bring_in(prefetch, pages)
            except Exception as failure:  # a hint may fail; the thread goes on with the next
                prefetch.error = failure
                self.n_failed += 1
            finally:
                prefetch._ended.set()

    def _bring_in(self, prefetch: Prefetch, pages: Callable[[], Indices]) -> None:
        needed = pages()
        prefetch.n_pages = len(needed)
        absent = needed[~self._store.resident(self._space, needed)]
        ticket = self._plan.add(absent)
        try:
            while ticket.n_left and not prefetch._cancelled and not self._closing:
                wave = self._plan.next_wave(WAVE_PAGES)
                prefetch.n_fetched += self._store.fetch(self._space, wave)
        finally:
            self._plan.cancel(ticket)
