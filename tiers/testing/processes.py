"""Work on many parts in several processes, with the outcomes in the order of one."""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_context, parent_process
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

Outcome = TypeVar("Outcome")

WAITING_PARTS_A_JOB = 2
"""Parts that are handed out ahead, so that no process waits for the next one."""

_stop: Event | None = None


def in_processes(
    work: Callable[..., Iterator[Outcome]], parts: Iterable[tuple[Any, ...]], jobs: int
) -> Iterator[Outcome]:
    """Yield what ``work(*part)`` yields for each part in turn.

    Parts are worked on in `jobs` new processes at once, which end when this generator does: when it
    is exhausted or closed, or interrupted, before the next outcome of each.

    Parameters
    ----------
    work : callable
        A function of a module, as the processes import it.
    parts : iterable of tuple
        Arguments of each call; taken as they are needed, so there may be no end to them.
    jobs : int

    Raises
    ------
    concurrent.futures.process.BrokenProcessPool
        If one of the processes dies.
    """
    # A fork would copy whatever locks the threads of this process hold.
    context = get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(stop,))
    to_do = iter(parts)
    running: deque[Future[list[Outcome]]] = deque()
    try:
        with _interrupts_held():
            # The first call starts the processes.
            for part in islice(to_do, jobs * WAITING_PARTS_A_JOB):
                running.append(pool.submit(_run, work, part))
        while running:
            outcomes = running.popleft().result()
            running.extend(pool.submit(_run, work, part) for part in islice(to_do, 1))
            yield from outcomes
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends; processes that start in it never see one."""
    handler = signal.getsignal(signal.SIGINT)
    is_ours = threading.current_thread() is threading.main_thread() and callable(handler)
    came: list[int] = []
    if is_ours:
        # A mask alone holds nothing back: the signal may come to another thread.
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if is_ours:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _begin(stop: Event) -> None:
    """Listen to the parent, and end when it does."""
    global _stop
    _stop = stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(work: Callable[..., Iterator[Outcome]], part: tuple[Any, ...]) -> list[Outcome]:
    """Work on one part; what has been found when the parent stops is thrown away."""
    assert _stop is not None
    outcomes = []
    for outcome in work(*part):
        outcomes.append(outcome)
        if _stop.is_set():
            return []
    return outcomes
