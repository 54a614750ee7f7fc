"""S3-FIFO: a small queue that lets one-hit pages pass quickly, a main queue, a ghost queue.

Yang, Zhang, Qiu, Yue and Vinayak 2023, *FIFO queues are all you need for cache eviction*, SOSP,
algorithm 1. Where it leaves a choice: a page starts anew, with frequency 0, when it moves to the
main queue, and until the first eviction pages that the small queue has no room for go to the main
queue, as in the authors' libCacheSim.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiers.policies.ghost import BYTES_PER_KEY, Ghost, forget, new_ghost, remember, resized_ghost
from tiers.policies.jit import compiled
from tiers.policies.links import (
    BYTES_PER_NODE,
    PREVIOUS,
    Links,
    new_links,
    push_front,
    resized_links,
    unlink,
)
from tiers.policies.policy import Evictable, Frames, Keys
from tiers.policies.stepped import SteppedPolicy, Steps, resized

SMALL_FRACTION = 10
"""One frame in so many is for the small queue."""
FREQUENCY_MAX = 3
PROMOTED_MIN = 2
"""Frequency from which on a page moves from the small queue to the main one."""

_SMALL, _MAIN = 0, 1
_NO_QUEUE = 2
_FIRST_NODE = 2
# What `counts` holds.
_N_SMALL, _HAS_EVICTED = 0, 1


class S3FifoState(NamedTuple):
    """Both queues, newest first, and the ghost queue; frame f is node 2 + f.

    Attributes
    ----------
    links : int32 array (2 + n_frames, 2)
    queue, frequency : uint8 array (n_frames,)
        The queue a frame is in, and how often its page was accessed, counted down in the main one.
    key : uint64 array (n_frames,)
    counts : int64 array (2,)
        Frames in the small queue; 1 once anything was evicted.
    ghost : Ghost
        Keys of pages that left the small queue.
    """

    links: Links
    queue: npt.NDArray[np.uint8]
    frequency: npt.NDArray[np.uint8]
    key: Keys
    counts: npt.NDArray[np.int64]
    ghost: Ghost


@compiled
def _small_size(state: S3FifoState) -> int:
    return max(1, len(state.queue) // SMALL_FRACTION)


@compiled
def _move(state: S3FifoState, frame: int, queue: int) -> None:
    """Put a frame at the front of a queue, or into none."""
    state.counts[_N_SMALL] += (queue == _SMALL) - (state.queue[frame] == _SMALL)
    state.queue[frame] = queue
    unlink(state.links, _FIRST_NODE + frame)
    if queue != _NO_QUEUE:
        push_front(state.links, queue, _FIRST_NODE + frame)


@compiled
def _access(state: S3FifoState, frames: Frames) -> None:
    for frame in frames:
        if state.frequency[frame] < FREQUENCY_MAX:
            state.frequency[frame] += 1


@compiled
def _insert(state: S3FifoState, frames: Frames, keys: Keys) -> None:
    for i in range(len(frames)):
        frame = frames[i]
        _move(state, frame, _NO_QUEUE)
        has_room = not state.counts[_HAS_EVICTED]
        if forget(state.ghost, keys[i]) or (
            has_room and state.counts[_N_SMALL] >= _small_size(state)
        ):
            _move(state, frame, _MAIN)
        else:
            _move(state, frame, _SMALL)
        state.key[frame] = keys[i]
        state.frequency[frame] = 0


@compiled
def _remove(state: S3FifoState, frames: Frames) -> None:
    for frame in frames:
        if state.queue[frame] == _SMALL:
            remember(state.ghost, state.key[frame])
        _move(state, frame, _NO_QUEUE)


@compiled
def _victims(state: S3FifoState, evictable: Evictable, out: Frames) -> int:
    links, frequency = state.links, state.frequency
    small_size = _small_size(state)
    if len(out):
        state.counts[_HAS_EVICTED] = 1
    # One cursor a queue moves from its oldest to its newest frame and passes by what is chosen or
    # not evictable; it is at the head when there is nothing left to look at.
    small = int(links[_SMALL, PREVIOUS])
    main = int(links[_MAIN, PREVIOUS])
    count = 0
    n_small_chosen = 0
    while count < len(out) and (small != _SMALL or main != _MAIN):
        count_before = count
        n_small = state.counts[_N_SMALL] - n_small_chosen
        if small != _SMALL and (n_small >= small_size or main == _MAIN):
            while small != _SMALL and count == count_before:
                node = small
                frame = node - _FIRST_NODE
                small = int(links[node, PREVIOUS])
                if frequency[frame] >= PROMOTED_MIN:
                    _move(state, frame, _MAIN)
                    frequency[frame] = 0
                    if main == _MAIN:
                        main = node
                elif evictable[frame]:
                    out[count] = frame
                    count += 1
                    n_small_chosen += 1
        else:
            while main != _MAIN and count == count_before:
                node = main
                frame = node - _FIRST_NODE
                before = int(links[node, PREVIOUS])
                if not evictable[frame]:
                    main = before
                elif frequency[frame]:
                    frequency[frame] -= 1
                    _move(state, frame, _MAIN)
                    # The newest frame stays the newest, so it is looked at once more.
                    if before != _MAIN:
                        main = before
                else:
                    main = before
                    out[count] = frame
                    count += 1
    return count


class S3Fifo(SteppedPolicy):
    """S3-FIFO over `n_frames` frames: a tenth for the small queue, a ghost as long as the main."""

    steps = Steps(_insert, _access, _remove, _victims)
    bytes_per_frame = BYTES_PER_NODE + 1 + 1 + 8 + BYTES_PER_KEY

    def _new_state(self, n_frames: int) -> S3FifoState:
        return S3FifoState(
            new_links(_FIRST_NODE, n_frames),
            np.full(n_frames, _NO_QUEUE, np.uint8),
            np.zeros(n_frames, np.uint8),
            np.zeros(n_frames, np.uint64),
            np.zeros(2, np.int64),
            new_ghost(_ghost_size(n_frames)),
        )

    def _resized_state(self, n_frames: int) -> S3FifoState:
        state: S3FifoState = self.state
        counts = state.counts.copy()
        if n_frames > self.n_frames:
            counts[_HAS_EVICTED] = 0
        return S3FifoState(
            resized_links(state.links, _FIRST_NODE, n_frames),
            resized(state.queue, n_frames, _NO_QUEUE),
            resized(state.frequency, n_frames, 0),
            resized(state.key, n_frames, 0),
            counts,
            resized_ghost(state.ghost, _ghost_size(n_frames)),
        )


def _ghost_size(n_frames: int) -> int:
    return max(1, n_frames - max(1, n_frames // SMALL_FRACTION))
