"""Jobs: calls on a pool that have all ended before their caller goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

Result = TypeVar("Result")


def run_all(pool: Executor, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Make all calls on a pool; return their results.

    When this returns or raises, every call has ended or will never begin. An interrupt does not cut
    the wait short: a call that outlived its caller would read or write memory that belongs to
    somebody else by then.
    """
    jobs = [_Job(call) for call in calls]
    interrupt: BaseException | None = None
    try:
        for job in jobs:
            pool.submit(job.run)
    except BaseException as struck:
        # Whether the pool took the one that was being handed over, nobody can say.
        interrupt = struck
        for job in jobs:
            job.withdraw()
    for job in jobs:
        while not job.ended.is_set():
            try:
                job.ended.wait()
            except BaseException as struck:
                interrupt = interrupt or struck
    if interrupt is not None:
        raise interrupt
    return [job.outcome() for job in jobs]


class _Job(Generic[Result]):
    """A call that is made once, or withdrawn before it began."""

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._guard = threading.Lock()
        self._is_taken = False
        self._results: list[Result] = []
        self._failure: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        if not self._take():
            return
        try:
            self._results.append(self._call())
        except BaseException as failure:
            self._failure = failure
        finally:
            self.ended.set()

    def withdraw(self) -> None:
        if self._take():
            self.ended.set()

    def outcome(self) -> Result:
        if self._failure is not None:
            raise self._failure
        return self._results[0]

    def _take(self) -> bool:
        with self._guard:
            was_taken, self._is_taken = self._is_taken, True
            return not was_taken
