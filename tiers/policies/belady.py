"""Belady's MIN: gives up the frame whose next access is the furthest away.

Belady 1966, *A study of replacement algorithms for a virtual-storage computer*, IBM Systems Journal
5(2): no policy misses less. It needs the future, so it serves simulations, as the bound that others
are measured against.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tiers.policies.jit import compiled
from tiers.policies.policy import Evictable, Frames, Keys
from tiers.policies.stepped import SteppedPolicy, Steps, resized

NEVER = np.iinfo(np.int64).max
"""The next access of what is not accessed again."""

_ABSENT = -1


class BeladyState(NamedTuple):
    """A binary heap of frames: the furthest next access on top, of equal ones the lowest frame.

    Attributes
    ----------
    next_access : int64 array (n_frames,)
        Written by the caller, read when a frame is inserted or accessed.
    time : int64 array (n_frames,)
        What orders the heap.
    heap : int32 array (n_frames,)
    place : int32 array (n_frames,)
        Where a frame is in the heap, or -1.
    size : int64 array (1,)
        Frames in the heap.
    """

    next_access: npt.NDArray[np.int64]
    time: npt.NDArray[np.int64]
    heap: npt.NDArray[np.int32]
    place: npt.NDArray[np.int32]
    size: npt.NDArray[np.int64]


@compiled
def _is_above(state: BeladyState, one: int, other: int) -> bool:
    if state.time[one] != state.time[other]:
        return bool(state.time[one] > state.time[other])
    return one < other


@compiled
def _put(state: BeladyState, place: int, frame: int) -> None:
    state.heap[place] = frame
    state.place[frame] = place


@compiled
def _sift(state: BeladyState, start: int) -> None:
    """Move what is at `start` up or down until the heap is in order again."""
    heap, size = state.heap, state.size[0]
    frame = heap[start]
    place = start
    while place > 0 and _is_above(state, frame, heap[(place - 1) >> 1]):
        _put(state, place, heap[(place - 1) >> 1])
        place = (place - 1) >> 1
    while True:
        child = 2 * place + 1
        if child + 1 < size and _is_above(state, heap[child + 1], heap[child]):
            child += 1
        if child >= size or not _is_above(state, heap[child], frame):
            break
        _put(state, place, heap[child])
        place = child
    _put(state, place, frame)


@compiled
def _access(state: BeladyState, frames: Frames) -> None:
    for frame in frames:
        if state.place[frame] != _ABSENT:
            state.time[frame] = state.next_access[frame]
            _sift(state, state.place[frame])


@compiled
def _insert(state: BeladyState, frames: Frames, keys: Keys) -> None:
    for frame in frames:
        if state.place[frame] == _ABSENT:
            _put(state, state.size[0], frame)
            state.size[0] += 1
        state.time[frame] = state.next_access[frame]
        _sift(state, state.place[frame])


@compiled
def _take(state: BeladyState, place: int) -> None:
    """Move what is at `place` to the end of the heap, and end the heap before it."""
    last = state.size[0] - 1
    frame, moved = state.heap[place], state.heap[last]
    state.size[0] = last
    _put(state, last, frame)
    if place != last:
        _put(state, place, moved)
        _sift(state, place)


@compiled
def _remove(state: BeladyState, frames: Frames) -> None:
    for frame in frames:
        if state.place[frame] != _ABSENT:
            _take(state, state.place[frame])
            state.place[frame] = _ABSENT


@compiled
def _victims(state: BeladyState, evictable: Evictable, out: Frames) -> int:
    size_before = state.size[0]
    count = 0
    while count < len(out) and state.size[0] > 0:
        frame = state.heap[0]
        if evictable[frame]:
            out[count] = frame
            count += 1
        _take(state, 0)
    # What was taken lies behind the heap, so growing the heap over it puts it back.
    while state.size[0] < size_before:
        state.size[0] += 1
        _sift(state, state.size[0] - 1)
    return count


class Belady(SteppedPolicy):
    """Belady's MIN over `n_frames` frames.

    Before `insert` and `access`, the caller writes into ``next_access[frames]`` when the pages in
    these frames will be accessed next, in any unit that grows, or `NEVER`.
    """

    steps = Steps(_insert, _access, _remove, _victims)
    bytes_per_frame = 24

    @property
    def next_access(self) -> npt.NDArray[np.int64]:
        """Next access of what is in each frame: int64 array (n_frames,)."""
        state: BeladyState = self.state
        return state.next_access

    def _new_state(self, n_frames: int) -> BeladyState:
        return BeladyState(
            np.full(n_frames, NEVER, np.int64),
            np.full(n_frames, NEVER, np.int64),
            np.zeros(n_frames, np.int32),
            np.full(n_frames, _ABSENT, np.int32),
            np.zeros(1, np.int64),
        )

    def _resized_state(self, n_frames: int) -> BeladyState:
        state: BeladyState = self.state
        assert (state.place[n_frames:] == _ABSENT).all()
        return BeladyState(
            resized(state.next_access, n_frames, NEVER),
            resized(state.time, n_frames, NEVER),
            resized(state.heap, n_frames, 0),
            resized(state.place, n_frames, _ABSENT),
            state.size,
        )
