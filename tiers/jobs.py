"""Jobs: calls on a pool that have all ended before their caller goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import TypeVar

Result = TypeVar("Result")


def run_all(pool: Executor, calls: Sequence[Callable[[], Result]]) -> list[Result]:
    """Make all calls on a pool; return their results.

    When this returns or raises, every call has ended. An interrupt does not cut the wait short: a
    call that outlived its caller would read or write memory that belongs to somebody else by then.
    """
    jobs: list[Future[Result]] = []
    try:
        for call in calls:
            jobs.append(pool.submit(call))
    finally:
        _wait(jobs)
    return [job.result() for job in jobs]


def _wait(jobs: Sequence[Future[Result]]) -> None:
    interrupt: BaseException | None = None
    for job in jobs:
        while not job.done():
            try:
                job.exception()
            except BaseException as struck:
                interrupt = interrupt or struck
    if interrupt is not None:
        raise interrupt
