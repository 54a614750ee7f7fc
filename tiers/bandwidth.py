"""Bandwidth: how many bytes may be moved by now, on a clock that is passed in.

A token bucket: it fills at a rate up to a burst, and what is moved is taken out. Between any two
times t and u no more than ``burst + rate * (u - t)`` bytes are taken.
"""

from __future__ import annotations


class Bandwidth:
    """A bound on bytes a second; full at first.

    Parameters
    ----------
    bytes_per_s : float
    burst_bytes : int

    Attributes
    ----------
    left_bytes : float
        What may be moved now; below zero after more was moved than was asked for.
    """

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._burst_bytes = burst_bytes
        self._now: float | None = None
        self.left_bytes = float(burst_bytes)

    def advance(self, now_s: float) -> None:
        """Go on to a time; one that lies before the last one gives nothing."""
        if self._now is None:
            self._now = now_s
        elapsed = max(0.0, now_s - self._now)
        self._now = max(now_s, self._now)
        self.left_bytes = min(self._burst_bytes, self.left_bytes + elapsed * self._bytes_per_s)

    def spend(self, size_bytes: int) -> None:
        self.left_bytes -= size_bytes
