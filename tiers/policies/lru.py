"""LRU: gives up the frame whose last access is the longest ago.

Mattson, Gecsei, Slutz and Traiger 1970, *Evaluation techniques for storage hierarchies*, IBM
Systems Journal 9(2): one list in the order of the last access.
"""

from __future__ import annotations

from typing import NamedTuple

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
from tiers.policies.stepped import SteppedPolicy, Steps

_HEAD = 0
_FIRST_NODE = 1


class LruState(NamedTuple):
    """The list of frames, the last accessed first; frame f is node 1 + f."""

    links: Links


@compiled
def _access(state: LruState, frames: Frames) -> None:
    for frame in frames:
        node = _FIRST_NODE + frame
        unlink(state.links, node)
        push_front(state.links, _HEAD, node)


@compiled
def _insert(state: LruState, frames: Frames, keys: Keys) -> None:
    _access(state, frames)


@compiled
def _remove(state: LruState, frames: Frames) -> None:
    for frame in frames:
        unlink(state.links, _FIRST_NODE + frame)


@compiled
def _victims(state: LruState, evictable: Evictable, out: Frames) -> int:
    count = 0
    node = state.links[_HEAD, PREVIOUS]
    while node != _HEAD and count < len(out):
        if evictable[node - _FIRST_NODE]:
            out[count] = node - _FIRST_NODE
            count += 1
        node = state.links[node, PREVIOUS]
    return count


class Lru(SteppedPolicy):
    """LRU over `n_frames` frames."""

    steps = Steps(_insert, _access, _remove, _victims)
    bytes_per_frame = BYTES_PER_NODE

    def _new_state(self, n_frames: int) -> LruState:
        return LruState(new_links(_FIRST_NODE, n_frames))

    def _resized_state(self, n_frames: int) -> LruState:
        return LruState(resized_links(self.state.links, _FIRST_NODE, n_frames))
