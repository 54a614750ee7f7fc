"""Books: the compiled bookkeeping of frames, so that a fault of one page costs few calls.

Each function does for a handful of frames what three to six calls of numpy would do, and those take
a microsecond each whatever they are given. Callers check; what is here trusts its arguments.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tiers.allocator import COLD_BLOCK
from tiers.compiled import Compiler

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Flags = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]

compiled = Compiler("books", Path(__file__).parent)

_ALL_ONES = np.uint64((1 << 64) - 1)
_PLACE_MASK = np.uint64((1 << 48) - 1)
_LOW_HALF = np.uint64(0xFFFFFFFF)
_16, _32, _48 = np.uint64(16), np.uint64(32), np.uint64(48)
_1, _2, _4, _8, _127 = np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(127)
_FIVES, _THREES = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333)
_FIFTEENS = np.uint64(0x0F0F0F0F0F0F0F0F)


@compiled
def ascend(pages: Indices, last: int) -> bool:
    """Return whether pages ascend strictly within 0 .. `last`."""
    before = -1
    for page in pages:
        if page <= before:
            return False
        before = page
    return before <= last


@compiled
def n_absent(frames: Indices) -> int:
    """Return how many of these are no frames."""
    count = 0
    for frame in frames:
        count += frame < 0
    return count


@compiled
def pin(pins: npt.NDArray[np.int32], frames: Indices) -> None:
    """Add a pin to each frame."""
    for frame in frames:
        pins[frame] += 1


@compiled
def unpin(pins: npt.NDArray[np.int32], frames: Indices) -> bool:
    """Take back a pin of each frame; return whether each had one."""
    had_pins = True
    for frame in frames:
        pins[frame] -= 1
        had_pins &= pins[frame] >= 0
    return had_pins


@compiled
def cleared(flags: Flags, frames: Indices, out: Indices) -> int:
    """Clear the flags of frames, list those in `out` that were set, return how many they were."""
    count = 0
    for frame in frames:
        if flags[frame]:
            flags[frame] = False
            out[count] = frame
            count += 1
    return count


@compiled
def enter(
    space: npt.NDArray[np.int32],
    page: Indices,
    touches: npt.NDArray[np.uint8],
    arrived: npt.NDArray[np.int32],
    frames: Indices,
    pages: Indices,
    number: int,
    n_rounds: int,
) -> None:
    """Note which page came into each frame, and when."""
    for i in range(len(frames)):
        frame = frames[i]
        space[frame] = number
        page[frame] = pages[i]
        touches[frame] = 0
        arrived[frame] = n_rounds


@compiled
def keys(space: npt.NDArray[np.int32], page: Indices, frames: Indices) -> Words:
    """Return a name of the page in each frame."""
    found = np.empty(len(frames), np.uint64)
    for i in range(len(frames)):
        found[i] = (np.uint64(space[frames[i]]) << _48) ^ np.uint64(page[frames[i]])
    return found


@compiled
def unpack(
    entries: Words, pages: Indices, identity: Words, blocks: Indices, crcs: Indices, names: Words
) -> int:
    """Take entries of a page map apart; return how many are absent, whose block becomes -1.

    Parameters
    ----------
    entries : uint64 array (n, 2)
    pages : int64 array (n,)
    identity : uint64 array (4,)
        What the checksums of all pages of this space have in common.
    blocks, crcs : int64 arrays (n,)
    names : uint64 array (n, 6)
        What follows each page in its checksum: `identity`, the page, its version.
    """
    count = 0
    for i in range(len(pages)):
        first, second = entries[i, 0], entries[i, 1]
        if first == _ALL_ONES and second == _ALL_ONES:
            blocks[i] = -1
            count += 1
            continue
        blocks[i] = np.int64(first & _PLACE_MASK)
        crcs[i] = np.int64(second >> _32)
        for word in range(4):
            names[i, word] = identity[word]
        names[i, 4] = np.uint64(pages[i])
        names[i, 5] = (first >> _48) | ((second & _LOW_HALF) << _16)
    return count


@compiled
def first_other(found: Indices, crcs: Indices) -> int:
    """Return the first index at which two arrays differ, -1 if they are the same."""
    for i in range(len(crcs)):
        if found[i] != crcs[i]:
            return i
    return -1


@compiled
def note_places(
    dirty: Flags,
    cold: Flags,
    private: Flags,
    block: Indices,
    frames: Indices,
    blocks: Indices,
    names: Words,
    version: int,
) -> None:
    """Note which pages are cold, and where those of the open transaction lie, of that version.

    None of them is dirty; a page whose block is -1 has no slot.
    """
    for i in range(len(frames)):
        dirty[frames[i]] = False
        cold[frames[i]] = blocks[i] >= COLD_BLOCK
        is_new = blocks[i] >= 0 and names[i, 5] == np.uint64(version)
        private[frames[i]] = is_new and blocks[i] < COLD_BLOCK
        if private[frames[i]]:
            block[frames[i]] = blocks[i]


@compiled
def neighbourhoods(
    pages: Indices, cluster_pages: int, n_clusters: int, reach: int, clusters: Indices, out: Indices
) -> int:
    """List the pages of the clusters around each page; return how many neighbourhoods there are.

    Parameters
    ----------
    pages : int64 array (n,)
        Ascending.
    cluster_pages, n_clusters : int
        Neighbouring pages in a cluster, and how many clusters there are; pages behind the last one
        are in none.
    reach : int
        So many clusters on either side.
    clusters : int64 array (m,)
        Receives the cluster in the middle of each; no more than m are listed.
    out : int64 array (m * (2 * reach + 1) * cluster_pages,)
        Receives their pages; page 0 stands for those of clusters that are none.
    """
    count = 0
    before = -1
    place = 0
    for page in pages:
        cluster = page // cluster_pages
        if cluster == before or cluster >= n_clusters:
            continue
        if count == len(clusters):
            break
        before = cluster
        clusters[count] = cluster
        count += 1
        for beside in range(cluster - reach, cluster + reach + 1):
            is_one = 0 <= beside < n_clusters
            for neighbour in range(cluster_pages):
                out[place] = beside * cluster_pages + neighbour if is_one else 0
                place += 1
    return count


@compiled
def stretches(
    frames: Indices,
    clusters: Indices,
    cluster_pages: int,
    n_clusters: int,
    reach: int,
    resident_min: int,
    ahead: int,
    out: Indices,
) -> int:
    """List the clusters that continue a stretch of whole ones; return how many.

    A cluster is whole with `resident_min` of its pages in memory. From the whole one that is
    nearest to a cluster up to that one, and `ahead` more behind it, in the direction that leads
    away from what is whole; between two whole ones what lies between.

    Parameters
    ----------
    frames : int64 array (n * (2 * reach + 1) * cluster_pages,)
        Of the pages that `neighbourhoods` listed, -1 where absent.
    clusters : int64 array (n,)
    out : int64 array (m,)
        Receives at most m distinct ones.
    """
    count = 0
    whole = np.zeros(2 * reach + 1, np.bool_)
    place = 0
    for cluster in clusters:
        for step in range(2 * reach + 1):
            beside = cluster - reach + step
            n_resident = 0
            for _ in range(cluster_pages):
                n_resident += frames[place] >= 0
                place += 1
            whole[step] = n_resident >= resident_min and 0 <= beside < n_clusters
        below, above = 1, 1
        while below <= reach and not whole[reach - below]:
            below += 1
        while above <= reach and not whole[reach + above]:
            above += 1
        if whole[reach]:
            if (below == 1) == (above == 1):
                continue
            first, stop = cluster + 1, cluster + 1 + ahead
            if above == 1:
                first, stop = cluster - ahead, cluster
        elif below <= reach and above <= reach:
            first, stop = cluster - below + 1, cluster + above
        elif below <= reach:
            first, stop = cluster - below + 1, cluster + 1 + ahead
        elif above <= reach:
            first, stop = cluster - ahead, cluster + above
        else:
            continue
        for wanted in range(max(first, 0), min(stop, n_clusters)):
            is_known = False
            for known in out[:count]:
                is_known |= known == wanted
            if not is_known and count < len(out):
                out[count] = wanted
                count += 1
    return count


@compiled
def n_ones(word: np.uint64) -> int:
    """Return how many bits of a uint64 are set."""
    pairs = word - ((word >> _1) & _FIVES)
    fours = (pairs & _THREES) + ((pairs >> _2) & _THREES)
    eights = (fours + (fours >> _4)) & _FIFTEENS
    halves = eights + (eights >> _8)
    halves += halves >> _16
    return int((halves + (halves >> _32)) & _127)


@compiled
def clear_bits(bitmap: Bytes, freed: Bytes) -> int:
    """Clear the bits of a bitmap that are set in `freed`; return how many, -1 if one was clear."""
    bits, others = bitmap.view(np.uint64), freed.view(np.uint64)
    count = 0
    for i in range(len(others)):
        if bits[i] & others[i] != others[i]:
            return -1
        count += n_ones(others[i])
    for i in range(len(others)):
        bits[i] &= ~others[i]
    return count


@compiled
def count_free(
    bitmap: Bytes,
    held: Bytes,
    held_too: Bytes,
    n_blocks: int,
    n_bits: int,
    first_reserved: int,
    stop_reserved: int,
    blocks_per_slot: int,
) -> tuple[int, int]:
    """Count the free slots of a group, and the free blocks of broken ones.

    Parameters
    ----------
    bitmap, held, held_too : uint8 arrays (4096,)
        A block is taken if any of them has its bit set.
    n_blocks : int
        Blocks of the group that there are; the others are taken.
    n_bits : int
        The same in whole slots.
    first_reserved, stop_reserved : int
        Blocks that are taken, whole slots.
    blocks_per_slot : int
        A power of two.
    """
    a, b, c = bitmap.view(np.uint64), held.view(np.uint64), held_too.view(np.uint64)
    n_slots, n_odd = 0, 0
    width = min(blocks_per_slot, 64)
    mask = _ALL_ONES >> np.uint64(64 - width)
    for first in range(0, n_bits, blocks_per_slot):
        if first_reserved <= first < stop_reserved:
            continue
        n_used = 0
        for at in range(first, first + blocks_per_slot, width):
            word = at >> 6
            bits = ((a[word] | b[word] | c[word]) >> np.uint64(at & 63)) & mask
            n_left = n_blocks - at
            if n_left < width:
                bits |= (mask << np.uint64(max(n_left, 0))) & mask if n_left > 0 else mask
            n_used += n_ones(bits)
        if n_used == 0:
            n_slots += 1
        else:
            n_odd += blocks_per_slot - n_used
    return n_slots, n_odd


def load() -> Any:
    """Compile, or load, what the first fault would otherwise wait for under the store's mutex."""
    nothing = np.empty(0, np.int64)
    numbers, flags = np.zeros(1, np.int32), np.zeros(1, np.bool_)
    words = np.empty((0, 6), np.uint64)
    ascend(nothing, 0)
    n_absent(nothing)
    pin(numbers, nothing)
    unpin(numbers, nothing)
    cleared(flags, nothing, nothing)
    enter(numbers, nothing, np.zeros(1, np.uint8), numbers, nothing, nothing, 0, 0)
    keys(numbers, nothing, nothing)
    first_other(nothing, nothing)
    neighbourhoods(nothing, 1, 0, 1, nothing, nothing)
    stretches(nothing, nothing, 1, 0, 1, 1, 0, nothing)
    note_places(flags, flags, flags, nothing, nothing, nothing, words, 0)
    bits = np.zeros(8, np.uint8)
    clear_bits(bits, bits)
    count_free(bits, bits, bits, 0, 0, 0, 0, 1)
    unpack(words[:, :2].copy(), nothing, np.zeros(4, np.uint64), nothing, nothing, words)
