"""SIEVE: a queue in the order of arrival, and a hand that spares once what was accessed.

Zhang, Yang, Yue, Vigfusson and Rashmi 2024, *SIEVE is simpler than LRU: an efficient turn-key
eviction algorithm for web caches*, NSDI, algorithm 1. Unlike CLOCK, what is spared keeps its place,
so new pages do not mix with those that have proved themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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

_HEAD = 0
_FIRST_NODE = 1


class SieveState(NamedTuple):
    """The queue, newest first, and the hand; frame f is node 1 + f.

    Attributes
    ----------
    links : int32 array (1 + n_frames, 2)
    visited : uint8 array (n_frames,)
    hand : int64 array (1,)
        The node to look at next; the head stands for the oldest.
    """

    links: Links
    visited: npt.NDArray[np.uint8]
    hand: npt.NDArray[np.int64]


@compiled
def _access(state: SieveState, frames: Frames) -> None:
    for frame in frames:
        state.visited[frame] = 1


@compiled
def _remove(state: SieveState, frames: Frames) -> None:
    for frame in frames:
        node = _FIRST_NODE + frame
        if state.hand[0] == node:
            state.hand[0] = state.links[node, PREVIOUS]
        unlink(state.links, node)


@compiled
def _insert(state: SieveState, frames: Frames, keys: Keys) -> None:
    _remove(state, frames)
    for frame in frames:
        push_front(state.links, _HEAD, _FIRST_NODE + frame)
        state.visited[frame] = 0


@compiled
def _victims(state: SieveState, evictable: Evictable, out: Frames) -> int:
    links, visited, hand = state
    start = int(hand[0])
    if start == _HEAD:
        start = int(links[_HEAD, PREVIOUS])
    if start == _HEAD:
        return 0
    node = start
    count = 0
    n_first = -1  # how many the first turn chose, once it is over
    n_met = 0  # how many of those the second turn has met; it meets them in the same order
    while count < len(out):
        frame = node - _FIRST_NODE
        if evictable[frame]:
            if n_met < n_first and out[n_met] == frame:
                n_met += 1
            elif visited[frame]:
                visited[frame] = 0
            else:
                out[count] = frame
                count += 1
        node = int(links[node, PREVIOUS])
        if node == _HEAD:
            node = int(links[_HEAD, PREVIOUS])
        if node == start:
            # Two turns suffice: the first clears every bit that it passes.
            if n_first >= 0:
                break
            n_first = count
    hand[0] = node
    return count


class Sieve(SteppedPolicy):
    """SIEVE over `n_frames` frames."""

    steps = Steps(_insert, _access, _remove, _victims)
    bytes_per_frame = BYTES_PER_NODE + 1

    def _new_state(self, n_frames: int) -> SieveState:
        return SieveState(
            new_links(_FIRST_NODE, n_frames), np.zeros(n_frames, np.uint8), np.zeros(1, np.int64)
        )

    def _resized_state(self, n_frames: int) -> SieveState:
        return SieveState(
            resized_links(self.state.links, _FIRST_NODE, n_frames),
            resized(self.state.visited, n_frames, 0),
            self.state.hand,
        )
