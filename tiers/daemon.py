"""The daemon: the thread that ticks the migrator of an open store."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from tiers.migration import Migrator


class Daemon:
    """Ticks a migrator at an interval until it is stopped, or a round fails.

    A store that is dropped without being closed is not kept alive by its daemon, which ends then.

    Parameters
    ----------
    migrator : Migrator
    interval_s : float
    clock : callable
        Returns seconds.
    """

    def __init__(
        self,
        migrator: Migrator,
        interval_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_run,
            args=(weakref.ref(migrator), self._stop, interval_s, clock),
            name="tiers-migration",
            daemon=True,
        )
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread, after the round that it is in; stopping twice is fine."""
        self._stop.set()
        self._thread.join()


def _run(
    reference: weakref.ref[Migrator],
    stop: threading.Event,
    interval_s: float,
    clock: Callable[[], float],
) -> None:
    while not stop.wait(interval_s):
        migrator = reference()
        if migrator is None:
            return
        try:
            migrator.tick(clock())
        except BaseException as failure:  # told by `Store.stats`; demand goes on without rounds
            migrator.failure = repr(failure)
            return
        del migrator
