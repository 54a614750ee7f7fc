"""What a store asks of an eviction policy."""

from __future__ import annotations

from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from tiers.errors import TierError

Frames = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
"""Names of pages that stay the same when the pages come back."""
Evictable = npt.NDArray[np.bool_]
"""For each frame, whether it is mapped and held by nobody."""


class PolicyError(TierError, ValueError):
    """There is no such eviction policy, or it cannot choose among so few frames."""


class Policy(Protocol):
    """Chooses which frame to give up.

    All methods are called under the store's mutex, with frames in ascending order of their pages; a
    policy has no clock and no chance but what it is given, so the same accesses give the same
    victims.

    Attributes
    ----------
    bytes_per_frame : int
        DRAM that its state takes a frame; `STATE_BYTES_MIN` beside that are taken once.
    """

    bytes_per_frame: ClassVar[int]

    def __init__(self, n_frames: int) -> None: ...

    def insert(self, frames: Frames, keys: Keys) -> None:
        """Pages with these keys were brought into these frames, demanded or ahead of demand."""

    def access(self, frames: Frames) -> None:
        """Pages in these frames were demanded, once a batch."""

    def remove(self, frames: Frames) -> None:
        """Pages left these frames, evicted or dropped."""

    def victims(self, count: int, evictable: Evictable) -> Frames:
        """Return up to `count` distinct frames to give up, best first, only evictable ones.

        They stay where they are: what is evicted is removed by `remove`, and what is not can be
        chosen again.
        """
        ...

    def resize(self, n_frames: int) -> None:
        """Choose among `n_frames` frames from now on; those beyond have been removed."""


STATE_BYTES_MIN = 256
"""DRAM that a policy takes for what is not counted by frame: heads of lists, counts, hands."""
