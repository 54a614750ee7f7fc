"""CLOCK: a hand over a ring of frames that spares once what was touched since it last came by.

Corbato 1968, *A paging experiment with the Multics system*: one bit a frame, set at access; the
hand clears set bits and takes the first clear one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiers.policies.jit import compiled
from tiers.policies.policy import Evictable, Frames, Keys
from tiers.policies.stepped import SteppedPolicy, Steps, resized


class ClockState(NamedTuple):
    """The ring is the frames in their order.

    Attributes
    ----------
    touched : uint8 array (n_frames,)
    hand : int64 array (1,)
        The frame to look at next.
    """

    touched: npt.NDArray[np.uint8]
    hand: npt.NDArray[np.int64]


@compiled
def _access(state: ClockState, frames: Frames) -> None:
    for frame in frames:
        state.touched[frame] = 1


@compiled
def _remove(state: ClockState, frames: Frames) -> None:
    for frame in frames:
        state.touched[frame] = 0


@compiled
def _insert(state: ClockState, frames: Frames, keys: Keys) -> None:
    _remove(state, frames)


@compiled
def _victims(state: ClockState, evictable: Evictable, out: Frames) -> int:
    touched, hand = state
    n_frames = len(touched)
    frame = hand[0]
    count = 0
    n_first = 0  # how many the first turn chose, once it is over
    n_met = 0  # how many of those the second turn has met; it meets them in the same order
    # Two turns suffice: the first clears every bit that it passes.
    for n_passed in range(2 * n_frames):
        if count == len(out):
            break
        if n_passed == n_frames:
            n_first = count
        if evictable[frame]:
            if n_met < n_first and out[n_met] == frame:
                n_met += 1
            elif touched[frame]:
                touched[frame] = 0
            else:
                out[count] = frame
                count += 1
        frame += 1
        if frame == n_frames:
            frame = 0
    hand[0] = frame
    return count


class Clock(SteppedPolicy):
    """CLOCK over `n_frames` frames."""

    steps = Steps(_insert, _access, _remove, _victims)
    bytes_per_frame = 1

    def _new_state(self, n_frames: int) -> ClockState:
        return ClockState(np.zeros(n_frames, np.uint8), np.zeros(1, np.int64))

    def _resized_state(self, n_frames: int) -> ClockState:
        state: ClockState = self.state
        hand = state.hand if state.hand[0] < n_frames else np.zeros(1, np.int64)
        return ClockState(resized(state.touched, n_frames, 0), hand)
