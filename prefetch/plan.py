"""A plan: keys that will be needed, exactly known, in the order of their need.

Where the coordinates of a coming batch are known, so is its page list: looking ahead beats any
guess. A plan knows only integers; what they are keys of is its owner's business.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

Keys = npt.NDArray[np.int64]


class Ticket:
    """One list of keys in a plan.

    Attributes
    ----------
    n_keys : int
        Keys that were asked for.
    n_planned : int
        Keys that entered the plan: not planned already, and within its bound.
    n_left : int
        Planned keys that no wave has taken yet.
    """

    def __init__(self, n_keys: int, n_planned: int) -> None:
        self.n_keys = n_keys
        self.n_planned = n_planned
        self.n_left = n_planned


class Plan:
    """Keys to bring in, first needed first, each at most once at a time.

    Parameters
    ----------
    n_keys_max : int
        Most keys that wait at a time; what comes beyond is not planned, because it would push out
        what is needed sooner.
    """

    def __init__(self, n_keys_max: int) -> None:
        if n_keys_max < 1:
            raise ValueError(f"n_keys_max must be at least 1, not {n_keys_max}")
        self.n_keys_max = n_keys_max
        self._waiting: deque[tuple[Ticket, Keys]] = deque()
        self._planned: set[int] = set()

    def __len__(self) -> int:
        return len(self._planned)

    def add(self, keys: Keys) -> Ticket:
        """Append keys, int64 (n,), in the order of their need; return their ticket."""
        fresh = [key for key in dict.fromkeys(keys.tolist()) if key not in self._planned]
        fresh = fresh[: self.n_keys_max - len(self._planned)]
        ticket = Ticket(len(keys), len(fresh))
        if fresh:
            self._planned.update(fresh)
            self._waiting.append((ticket, np.array(fresh, np.int64)))
        return ticket

    def next_wave(self, n_keys_max: int) -> Keys:
        """Take up to `n_keys_max` keys of the oldest ticket; empty when nothing waits."""
        if not self._waiting:
            return np.empty(0, np.int64)
        ticket, keys = self._waiting.popleft()
        wave, rest = keys[:n_keys_max], keys[n_keys_max:]
        if len(rest):
            self._waiting.appendleft((ticket, rest))
        ticket.n_left -= len(wave)
        self._planned.difference_update(wave.tolist())
        return wave

    def cancel(self, ticket: Ticket) -> None:
        """Take what is left of a ticket out of the plan."""
        for entry in [entry for entry in self._waiting if entry[0] is ticket]:
            self._waiting.remove(entry)
            self._planned.difference_update(entry[1].tolist())
            ticket.n_left = 0
