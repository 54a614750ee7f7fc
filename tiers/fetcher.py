"""The fetcher: the thread that brings in what is read ahead, beside the claims."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

from tiers.requests import Request

WAITING_MAX = 8
"""Stretches that wait for the thread; the oldest are dropped for newer ones."""
IDLE_S = 1.0
"""How often a thread without work looks whether its store is still there."""


class Fetcher:
    """Fetches what it is handed, in a thread that starts with the first of it.

    A store that is dropped without being closed is not kept alive by its fetcher, which ends then.

    Parameters
    ----------
    fetch : bound method of (space, pages)
        Its object is held weakly.

    Attributes
    ----------
    failure : str or None
        What ended the thread, or kept it from starting.
    """

    def __init__(self, fetch: Callable[..., object]) -> None:
        self._fetch = weakref.WeakMethod(fetch)
        self._waiting: deque[Request] = deque(maxlen=WAITING_MAX)
        self._wake = threading.Event()
        self._is_stopped = False
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self.failure: str | None = None

    def hand(self, requests: list[Request]) -> None:
        """Let these be fetched soon; returns at once."""
        if self._is_stopped:
            return
        self._waiting.extend(requests)
        self._wake.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None and not self._is_stopped:
                    thread = threading.Thread(
                        target=_run, args=(weakref.ref(self),), name="tiers-fetcher", daemon=True
                    )
                    try:
                        thread.start()
                    except RuntimeError as refused:  # no more threads, or the interpreter ends
                        self.failure = repr(refused)
                        self._is_stopped = True
                        return
                    self._thread = thread

    def stop(self) -> None:
        """End the thread, after the fetch that it is in; stopping twice is fine."""
        with self._starting:
            self._is_stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> bool:
        """Fetch what is waiting; return whether to go on."""
        self._wake.clear()
        while self._waiting and not self._is_stopped:
            fetch = self._fetch()
            if fetch is None:
                return False
            try:
                fetch(*self._waiting.popleft())
            except BaseException as failure:  # told by `Store.stats`; claims fetch for themselves
                self.failure = repr(failure)
                return False
        return not self._is_stopped


def _run(reference: weakref.ref[Fetcher]) -> None:
    while True:
        fetcher = reference()
        if fetcher is None or not fetcher._work():
            return
        wake = fetcher._wake
        del fetcher
        wake.wait(IDLE_S)
