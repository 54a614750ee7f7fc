"""CLOCK: a hand over a ring of frames that spares once what was touched since it last came by.

Corbato 1968, *A paging experiment with the Multics system*: one bit a frame, set at access; the
hand clears set bits and takes the first clear one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.policies.policy import Frames


class Clock:
    """CLOCK over `n_frames` frames.

    Attributes
    ----------
    touched : uint8 array (n_frames,)
    hand : int
    """

    def __init__(self, n_frames: int) -> None:
        self.touched = np.zeros(n_frames, np.uint8)
        self.hand = 0

    def insert(self, frames: Frames) -> None:
        self.touched[frames] = 0

    def access(self, frames: Frames) -> None:
        self.touched[frames] = 1

    def remove(self, frames: Frames) -> None:
        self.touched[frames] = 0

    def victims(self, count: int, evictable: npt.NDArray[np.bool_]) -> Frames:
        n_frames = len(self.touched)
        chosen: list[Frames] = []
        left = count
        # Two turns suffice: the first clears every bit that it passes.
        for _ in range(2):
            ring = (np.arange(n_frames) + self.hand) % n_frames
            candidates = np.flatnonzero(evictable[ring] & (self.touched[ring] == 0))
            if chosen:
                candidates = candidates[~np.isin(ring[candidates], np.concatenate(chosen))]
            candidates = candidates[:left]
            left -= len(candidates)
            chosen.append(ring[candidates].astype(np.int64))
            passed = ring if left else ring[: candidates[-1] + 1] if len(candidates) else ring[:0]
            spared = passed[evictable[passed]]
            self.touched[spared] = 0
            self.hand = int((self.hand + len(passed)) % n_frames)
            if left == 0:
                break
        return np.concatenate(chosen)
