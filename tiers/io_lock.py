"""The I/O lock: who may use map, allocator and files, and which reads go on beside that.

A read of pages is planned under the lock: where they lie, which frames take them. The transfer
itself needs nothing but those slots and frames, so it runs without the lock, and other threads plan
theirs meanwhile. What gives slots to others or frames another place (a commit, an abort, a resize,
a compaction) first waits until no read is under way: it holds the lock *alone*.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class IoLock:
    """A reentrant lock that is held alone, or beside reads that were planned earlier.

    ``with lock:`` holds it alone. A thread whose own read is under way must not ask for that.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._reads: set[object] = set()
        self._ended = threading.Condition(threading.Lock())

    def __enter__(self) -> IoLock:
        self._lock.acquire()
        try:
            if self._reads:
                with self._ended:
                    while self._reads:
                        self._ended.wait()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    @contextmanager
    def beside_reads(self) -> Iterator[None]:
        """Hold the lock; reads that are under way go on."""
        with self._lock:
            yield

    def begin_read(self, read: object) -> None:
        """Note that a read is under way, named by an object of its own. The lock is held."""
        self._reads.add(read)

    def end_read(self, read: object) -> None:
        """Note the end of a read, with or without the lock; of one that never began, too."""
        if read in self._reads:
            with self._ended:
                self._reads.discard(read)
                self._ended.notify_all()
