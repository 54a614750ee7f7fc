"""What a store asks of an eviction policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

Frames = npt.NDArray[np.int64]
Evictable = Callable[[Frames], npt.NDArray[np.bool_]]
"""Tells of some frames which of them are mapped and held by nobody."""


class Policy(Protocol):
    """Chooses which frame to give up.

    All methods are called under the store's mutex, with frames in ascending order of their pages; a
    policy has no clock and no chance but what it is given, so the same accesses give the same
    victims.
    """

    def insert(self, frames: Frames) -> None:
        """Pages were brought into these frames."""

    def access(self, frames: Frames) -> None:
        """Pages in these frames were demanded, once a batch."""

    def remove(self, frames: Frames) -> None:
        """Pages left these frames."""

    def victims(self, count: int, evictable: Evictable) -> Frames:
        """Return up to `count` frames to give up, best first, only such as are `evictable`."""
        ...
