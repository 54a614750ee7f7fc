"""A ghost queue: the keys of the last pages that left, without the pages.

A bounded queue in the order of departure, threaded through a hash table with chains. A key is
found by multiplicative hashing (Knuth, *The Art of Computer Programming* 3, section 6.4).
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
    unlink,
)
from tiers.policies.policy import Keys

_USED, _FREE = 0, 1
_FIRST_NODE = 2
NO_SLOT = -1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio, made odd

BYTES_PER_KEY = 8 + BYTES_PER_NODE + 4 + 2 * 4
"""A key, its place in the queue and in its chain, and at most two heads of chains."""


class Ghost(NamedTuple):
    """The last `len(keys)` keys at most; slot s is node 2 + s.

    Attributes
    ----------
    keys : uint64 array (n_keys_max,)
    links : int32 array (2 + n_keys_max, 2)
        The queue, newest first, and the list of free slots.
    chain : int32 array (n_keys_max,)
        Next slot whose key has the same bucket, or -1.
    buckets : int32 array
        First slot of each chain, or -1; a power of two of them.
    """

    keys: Keys
    links: Links
    chain: npt.NDArray[np.int32]
    buckets: npt.NDArray[np.int32]


def new_ghost(n_keys_max: int) -> Ghost:
    """Return an empty ghost queue for `n_keys_max` keys, at least 1."""
    links = new_links(_FIRST_NODE, n_keys_max)
    _free_all(links)
    n_buckets = 1 << (n_keys_max - 1).bit_length()
    return Ghost(
        np.zeros(n_keys_max, np.uint64),
        links,
        np.full(n_keys_max, NO_SLOT, np.int32),
        np.full(n_buckets, NO_SLOT, np.int32),
    )


def resized_ghost(ghost: Ghost, n_keys_max: int) -> Ghost:
    """Return the same queue with another bound; of too many keys the oldest go."""
    resized = new_ghost(n_keys_max)
    _copy(ghost, resized)
    return resized


@compiled
def _free_all(links: Links) -> None:
    for node in range(_FIRST_NODE, len(links)):
        push_front(links, _FREE, node)


@compiled
def _bucket(ghost: Ghost, key: np.uint64) -> int:
    # The high half of the product mixes all bits of the key.
    mixed = (key * _GOLDEN) >> np.uint64(32)
    return int(mixed & np.uint64(len(ghost.buckets) - 1))


@compiled
def _unchain(ghost: Ghost, slot: int) -> None:
    bucket = _bucket(ghost, ghost.keys[slot])
    following = ghost.chain[slot]
    if ghost.buckets[bucket] == slot:
        ghost.buckets[bucket] = following
        return
    before = ghost.buckets[bucket]
    while ghost.chain[before] != slot:
        before = ghost.chain[before]
    ghost.chain[before] = following


@compiled
def slot_of(ghost: Ghost, key: np.uint64) -> int:
    """Return the slot that holds a key, `NO_SLOT` if none does."""
    slot = ghost.buckets[_bucket(ghost, key)]
    while slot != NO_SLOT and ghost.keys[slot] != key:
        slot = ghost.chain[slot]
    return int(slot)


@compiled
def remember(ghost: Ghost, key: np.uint64) -> None:
    """Add a key as the newest, in place of the oldest where all slots are taken.

    One that is there already keeps its place.
    """
    if slot_of(ghost, key) != NO_SLOT:
        return
    node = ghost.links[_FREE, PREVIOUS]
    if node == _FREE:
        node = ghost.links[_USED, PREVIOUS]
        _unchain(ghost, node - _FIRST_NODE)
    slot = node - _FIRST_NODE
    unlink(ghost.links, node)
    push_front(ghost.links, _USED, node)
    bucket = _bucket(ghost, key)
    ghost.keys[slot] = key
    ghost.chain[slot] = ghost.buckets[bucket]
    ghost.buckets[bucket] = slot


@compiled
def forget(ghost: Ghost, key: np.uint64) -> bool:
    """Remove a key; return whether it was there."""
    slot = slot_of(ghost, key)
    if slot == NO_SLOT:
        return False
    _unchain(ghost, slot)
    unlink(ghost.links, _FIRST_NODE + slot)
    push_front(ghost.links, _FREE, _FIRST_NODE + slot)
    return True


@compiled
def _copy(source: Ghost, target: Ghost) -> None:
    node = source.links[_USED, PREVIOUS]
    while node != _USED:
        remember(target, source.keys[node - _FIRST_NODE])
        node = source.links[node, PREVIOUS]
