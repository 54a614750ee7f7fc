"""S3-FIFO: a small queue that lets one-hit pages pass quickly, a main queue, a ghost queue.

Yang, Zhang, Qiu, Yue and Vinayak 2023, *FIFO queues are all you need for cache eviction*, SOSP,
algorithm 1. Where it leaves a choice: a page starts anew, with frequency 0, when it moves to the
main queue, and until the first eviction pages that the small queue has no room for go to the main
queue, as in the authors' libCacheSim.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from tiers.policies.ghost import (
    BYTES_PER_KEY,
    NO_SLOT,
    Ghost,
    forget,
    new_ghost,
    remember,
    resized_ghost,
    slot_of,
)
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
_N_SMALL, _HAS_EVICTED, _SMALL_SIZE, _N_LEFT, _ADAPTS = range(5)
N_COUNTS = 5

SOON_FRACTION = 10
"""A page comes back soon if fewer than one page for so many frames left after it."""
STEP_FRACTION = 64
"""One frame in so many is what the small queue is changed by."""
SMALL_FRACTION_MIN = 2
"""The small queue never takes more than one frame in so many."""


class S3FifoState(NamedTuple):
    """Both queues, newest first, and the ghost queue; frame f is node 2 + f.

    Attributes
    ----------
    links : int32 array (2 + n_frames, 2)
    queue, frequency : uint8 array (n_frames,)
        The queue a frame is in, and how often its page was accessed, counted down in the main one.
    key : uint64 array (n_frames,)
    counts : int64 array (N_COUNTS,)
        Frames in the small queue; 1 once anything was evicted; frames for the small queue; how many
        pages left it; whether its size adapts.
    ghost : Ghost
        Keys of pages that left the small queue.
    left : int64 array (n_keys_max of the ghost,)
        For each slot of the ghost, how many pages had left the small queue with this one.
    """

    links: Links
    queue: npt.NDArray[np.uint8]
    frequency: npt.NDArray[np.uint8]
    key: Keys
    counts: npt.NDArray[np.int64]
    ghost: Ghost
    left: npt.NDArray[np.int64]


@compiled
def _move(state: S3FifoState, frame: int, queue: int) -> None:
    """Put a frame at the front of a queue, or into none."""
    state.counts[_N_SMALL] += int(queue == _SMALL) - int(state.queue[frame] == _SMALL)
    state.queue[frame] = queue
    unlink(state.links, _FIRST_NODE + frame)
    if queue != _NO_QUEUE:
        push_front(state.links, queue, _FIRST_NODE + frame)


@compiled
def _count(frequency: npt.NDArray[np.uint8], frames: Frames) -> None:
    for frame in frames:
        if frequency[frame] < FREQUENCY_MAX:
            frequency[frame] += 1


@compiled
def _access(state: S3FifoState, frames: Frames) -> None:
    _count(state.frequency, frames)


@compiled
def _leave(state: S3FifoState, key: np.uint64) -> None:
    """Remember a page that leaves the small queue."""
    if slot_of(state.ghost, key) == NO_SLOT:
        remember(state.ghost, key)
        state.counts[_N_LEFT] += 1
        state.left[slot_of(state.ghost, key)] = state.counts[_N_LEFT]


@compiled
def _came_back(state: S3FifoState, key: np.uint64) -> bool:
    """Return whether a page is remembered, and learn from it; it is forgotten then.

    Pages that come back soon after they left would have stayed in a longer small queue; pages that
    come back late would have needed far more than that, and the main queue keeps more of them.
    """
    slot = slot_of(state.ghost, key)
    if slot == NO_SLOT:
        return False
    n_frames = len(state.queue)
    if state.counts[_ADAPTS]:
        step = max(1, n_frames // STEP_FRACTION)
        size = state.counts[_SMALL_SIZE]
        if state.counts[_N_LEFT] - state.left[slot] < max(1, n_frames // SOON_FRACTION):
            size = min(max(1, n_frames // SMALL_FRACTION_MIN), size + step)
        else:
            size = max(1, n_frames // SMALL_FRACTION, size - step)
        state.counts[_SMALL_SIZE] = size
    return forget(state.ghost, key)


@compiled
def _insert(state: S3FifoState, frames: Frames, keys: Keys) -> None:
    for i in range(len(frames)):
        frame = frames[i]
        _move(state, frame, _NO_QUEUE)
        has_room = not state.counts[_HAS_EVICTED]
        if _came_back(state, keys[i]) or (
            has_room and state.counts[_N_SMALL] >= state.counts[_SMALL_SIZE]
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
            _leave(state, state.key[frame])
        _move(state, frame, _NO_QUEUE)


@compiled
def _victims(state: S3FifoState, evictable: Evictable, out: Frames) -> int:
    links, frequency = state.links, state.frequency
    small_size = state.counts[_SMALL_SIZE]
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
    bytes_per_frame = BYTES_PER_NODE + 1 + 1 + 8 + BYTES_PER_KEY + 8
    adapts: ClassVar[bool] = False

    def access(self, frames: Frames) -> None:
        # Every hit comes here: handing over one array is four times as fast as the whole state.
        _count(self.state.frequency, self._checked(frames))

    def _new_state(self, n_frames: int) -> S3FifoState:
        n_keys = _ghost_size(n_frames)
        counts = np.zeros(N_COUNTS, np.int64)
        counts[_SMALL_SIZE] = _small_size(n_frames)
        counts[_ADAPTS] = self.adapts
        return S3FifoState(
            new_links(_FIRST_NODE, n_frames),
            np.full(n_frames, _NO_QUEUE, np.uint8),
            np.zeros(n_frames, np.uint8),
            np.zeros(n_frames, np.uint64),
            counts,
            new_ghost(n_keys),
            np.zeros(n_keys, np.int64),
        )

    def _resized_state(self, n_frames: int) -> S3FifoState:
        state: S3FifoState = self.state
        counts = state.counts.copy()
        if n_frames > self.n_frames:
            counts[_HAS_EVICTED] = 0
        counts[_SMALL_SIZE] = _small_size(n_frames)
        ghost = resized_ghost(state.ghost, _ghost_size(n_frames))
        left = np.zeros(len(ghost.keys), np.int64)
        _copy_left(state, ghost, left)
        return S3FifoState(
            resized_links(state.links, _FIRST_NODE, n_frames),
            resized(state.queue, n_frames, _NO_QUEUE),
            resized(state.frequency, n_frames, 0),
            resized(state.key, n_frames, 0),
            counts,
            ghost,
            left,
        )


@compiled
def _copy_left(state: S3FifoState, ghost: Ghost, left: npt.NDArray[np.int64]) -> None:
    """Fill `left` for another ghost that holds some of the same keys."""
    for old in range(len(state.left)):
        slot = slot_of(ghost, state.ghost.keys[old])
        if slot != NO_SLOT and slot_of(state.ghost, state.ghost.keys[old]) == old:
            left[slot] = state.left[old]


def _small_size(n_frames: int) -> int:
    return max(1, n_frames // SMALL_FRACTION)


def _ghost_size(n_frames: int) -> int:
    return max(1, n_frames - _small_size(n_frames))
