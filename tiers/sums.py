"""Sums: checksums of many rows in one compiled call, and map nodes named by them.

A node is named when its parent's entry holds its place, version and checksum. All nodes of a commit
are named here at once, children before parents, because a parent's checksum covers its entries.
"""

from __future__ import annotations

import struct
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from tiers import wave
from tiers.compiled import Compiler
from tiers.wave import _extend

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

compiled = Compiler("sums", Path(__file__).parent)

_16, _32, _48 = np.uint64(16), np.uint64(32), np.uint64(48)
_LOW_HALF, _LOW_QUARTER = np.uint64(0xFFFFFFFF), np.uint64(0xFFFF)


def identities_of(store_id: bytes, keys: Indices, version: int) -> Words:
    """Return what follows each node in its checksum, uint64 (n, 6); see `tiers.checksum`.

    Parameters
    ----------
    store_id : bytes, 16
    keys : int64 array (n, 3)
        Tree, level, index.
    version : int
    """
    words = np.empty((len(keys), 6), np.uint64)
    words[:, :2] = struct.unpack("<QQ", store_id)
    words[:, 2:5] = keys
    words[:, 5] = version
    return words


def name_rows(
    memory: Bytes,
    rows: Indices,
    blocks: Indices,
    identities: Words,
    parents: Indices,
    places: Indices,
) -> Indices:
    """Name nodes in the order in which they are listed; return the crc32c of each.

    Parameters
    ----------
    memory : uint8 array (n_rows, 4096)
        Every node is a row.
    rows, blocks : int64 arrays (n,)
        The nodes; a parent comes after its children.
    identities : uint64 array (n, 6)
        What follows each node in its checksum; the last word is its version.
    parents, places : int64 arrays (n,)
        Which entry of which row names each node; row -1 for those that the root names.
    """
    crcs = np.empty(len(rows), np.int64)
    words = memory.view(np.uint64).reshape(len(memory), -1, 2)
    if wave.CALLS is not None and wave.CALLS.crc32c_extend:
        _name(
            wave.CALLS.crc32c_extend,
            *(memory, words, rows, blocks, identities, parents, places, crcs),
        )
        return crcs
    for i in range(len(rows)):
        crcs[i] = google_crc32c.extend(
            google_crc32c.value(memory[rows[i]]), identities[i].tobytes()
        )
        if parents[i] >= 0:
            _enter(words[parents[i], places[i]], blocks[i], identities[i, 5], crcs[i])
    return crcs


def sum_rows(memory: Bytes) -> Indices:
    """Return crc32c of each row of a contiguous uint8 array, int64 (n,)."""
    if wave.CALLS is None or not wave.CALLS.crc32c_extend:
        return np.array([google_crc32c.value(row) for row in memory], np.int64)
    crcs = np.empty(len(memory), np.int64)
    _sum(wave.CALLS.crc32c_extend, memory, crcs)
    return crcs


@compiled
def _sum(extend: int, memory: Bytes, crcs: Indices) -> None:
    row_bytes, address = memory.shape[1], memory.ctypes.data
    for i in range(len(crcs)):
        crcs[i] = _extend(extend, 0, address + row_bytes * i, row_bytes)


@compiled
def _enter(entry: Words, block: int, version: int, crc: int) -> None:
    """Write an entry as `tiers.page_map.pack_entry` does."""
    whole = np.uint64(version)
    entry[0] = np.uint64(block) | ((whole & _LOW_QUARTER) << _48)
    entry[1] = ((whole >> _16) & _LOW_HALF) | (np.uint64(crc) << _32)


@compiled
def _name(
    extend: int,
    memory: Bytes,
    words: Words,
    rows: Indices,
    blocks: Indices,
    identities: Words,
    parents: Indices,
    places: Indices,
    crcs: Indices,
) -> None:
    row_bytes, tail_bytes = memory.shape[1], 8 * identities.shape[1]
    memory_address, tails_address = memory.ctypes.data, identities.ctypes.data
    for i in range(len(rows)):
        crc = _extend(extend, 0, memory_address + row_bytes * rows[i], row_bytes)
        crcs[i] = _extend(extend, crc, tails_address + tail_bytes * i, tail_bytes)
        if parents[i] >= 0:
            _enter(words[parents[i], places[i]], blocks[i], identities[i, 5], crcs[i])


def load() -> None:
    """Compile, or load, what the first commit would otherwise wait for."""
    nothing = np.empty(0, np.int64)
    name_rows(
        *(np.zeros((1, 4096), np.uint8), nothing, nothing),
        *(np.empty((0, 6), np.uint64), nothing, nothing),
    )
    sum_rows(np.empty((0, 1), np.uint8))
