"""Workers: the threads that run kernels over ranges.

Kernels release the GIL and write disjoint outputs, so results do not depend on how many threads
there are. numba's own parallel loops are not used: its default layer ends the process when two
threads enter it at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

from dpnc.errors import FieldError
from tiers.jobs import run_all


def default_threads() -> int:
    """Return how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def checked_threads(threads: int | None) -> int:
    """Return how many threads to use, the default if None; raise `FieldError` if it is none."""
    if threads is None:
        return default_threads()
    if type(threads) is not int or threads < 1:
        raise FieldError(f"threads must be an integer of at least 1, not {threads!r}")
    return threads


class Workers:
    """A few threads.

    Parameters
    ----------
    n_threads : int
        With one, everything runs on the calling thread.
    """

    def __init__(self, n_threads: int) -> None:
        self.n_threads = n_threads
        self._pool = (
            ThreadPoolExecutor(n_threads, thread_name_prefix="dpnc") if n_threads > 1 else None
        )

    def over_ranges(self, count: int, least: int, work: Callable[[int, int], int | None]) -> int:
        """Call ``work(start, stop)`` on pieces of ``0 .. count``; sum the results.

        A piece has at least `least` items, or is all there is.
        """
        n_pieces = max(1, min(self.n_threads, count // least))
        edges = [count * piece // n_pieces for piece in range(n_pieces + 1)]
        return self.each([partial(work, a, b) for a, b in pairwise(edges)])

    def each(self, calls: list[Callable[[], int | None]]) -> int:
        """Make all calls, at once if there are threads; sum what they return.

        All calls have ended when this returns or raises.
        """
        if self._pool is None or len(calls) == 1:
            return sum(call() or 0 for call in calls)
        return sum(count or 0 for count in run_all(self._pool, calls))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
