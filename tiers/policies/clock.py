"""CLOCK: a hand over a ring of frames that spares once what was touched since it last came by.

Corbato 1968, *A paging experiment with the Multics system*: one bit a frame, set at access; the
hand clears set bits and takes the first clear one.
"""

from __future__ import annotations

import numpy as np

from tiers.policies.policy import Evictable, Frames

STEP_FRAMES = 512
"""Frames the hand looks at in one numpy call."""


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

    def victims(self, count: int, evictable: Evictable) -> Frames:
        n_frames = len(self.touched)
        is_chosen = np.zeros(0, np.bool_)
        chosen: list[Frames] = []
        left = count
        n_passed = 0
        # Two turns suffice: the first clears every bit that it passes.
        while left and n_passed < 2 * n_frames:
            n_step = min(STEP_FRAMES, n_frames - n_passed % n_frames)
            ring = (np.arange(n_step) + self.hand) % n_frames
            can_go = evictable(ring)
            if n_passed >= n_frames:
                if not len(is_chosen):
                    is_chosen = np.zeros(n_frames, np.bool_)
                    is_chosen[np.concatenate([*chosen, ring[:0]])] = True
                can_go &= ~is_chosen[ring]
            found = np.flatnonzero(can_go & (self.touched[ring] == 0))[:left]
            left -= len(found)
            chosen.append(ring[found])
            n_done = n_step if left else int(found[-1]) + 1
            passed = ring[:n_done]
            self.touched[passed[can_go[:n_done]]] = 0
            self.hand = int((self.hand + n_done) % n_frames)
            n_passed += n_done
        return np.concatenate([*chosen, np.empty(0, np.int64)])
