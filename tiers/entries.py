"""Entries: what a page map says of a child, in 16 bytes; `tiers.page_map` has the bits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tiers.allocator import COLD_BLOCK

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

ABSENT_WORD = (1 << 64) - 1
PLACE_BITS = 48
PLACE_MASK = (1 << PLACE_BITS) - 1


def pack_entry(block: int, version: int, crc: int) -> tuple[int, int]:
    """Return the two words of an entry."""
    return block | (version & 0xFFFF) << 48, version >> 16 | crc << 32


def pack_entries(blocks: Indices, version: int, crcs: Indices) -> Words:
    """Return entries, uint64 (n, 2), of one version."""
    entries = np.empty((len(blocks), 2), np.uint64)
    entries[:, 0] = blocks.astype(np.uint64) | np.uint64((version & 0xFFFF) << 48)
    entries[:, 1] = crcs.astype(np.uint64) << np.uint64(32) | np.uint64(version >> 16)
    return entries


def unpack_entry(word0: int, word1: int) -> tuple[int, int, int]:
    """Return (block, version, crc) of an entry that is not absent."""
    return word0 & PLACE_MASK, word0 >> 48 | (word1 & 0xFFFFFFFF) << 16, word1 >> 32


def blocks_of(entries: Words) -> Indices:
    """Return the blocks in entries (n, 2) that are not absent."""
    return (entries[:, 0] & np.uint64(PLACE_MASK)).astype(np.int64)


def versions_of(entries: Words) -> Words:
    """Return the versions in entries (n, 2) that are not absent."""
    return entries[:, 0] >> np.uint64(48) | (entries[:, 1] & np.uint64(0xFFFFFFFF)) << np.uint64(16)


def are_private(entries: Words, version: int) -> npt.NDArray[np.bool_]:
    """Return which entries (n, 2) name a slot of this version that may be rewritten in place.

    A cold slot is written once, whoever wrote it.
    """
    return np.asarray((versions_of(entries) == version) & (blocks_of(entries) < COLD_BLOCK))
