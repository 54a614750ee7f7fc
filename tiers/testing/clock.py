"""Time that passes only when it is told to."""

from __future__ import annotations


class VirtualClock:
    """A count of microseconds that a slow device moves on.

    Attributes
    ----------
    now_us : int
        Microseconds since the beginning.
    """

    def __init__(self) -> None:
        self.now_us = 0

    def advance(self, duration_us: int) -> None:
        """Let time pass.

        Parameters
        ----------
        duration_us : int
            Microseconds, 0 or more.

        Raises
        ------
        ValueError
        """
        if duration_us < 0:
            raise ValueError(f"time does not run backwards, by {duration_us} us")
        self.now_us += duration_us
