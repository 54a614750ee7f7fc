"""A request to stop: Ctrl-C asks once politely, the second time it does not ask."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import FrameType, TracebackType


STDERR = 2
MESSAGE = b"\nstopping after this step; once more goes back to the last commit at once\n"


class StopRequest:
    """Turn the first SIGINT or SIGTERM into a flag, and the second into `KeyboardInterrupt`.

    A context manager for the main thread. Work in small steps and look at `requested` between them.

    Attributes
    ----------
    requested : bool
        Whether somebody asked.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not print: a handler must not enter a buffered writer that it may have interrupted.
        os.write(STDERR, MESSAGE)
