"""Nodes: what the page map keeps of its trees in memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FANOUT_BITS = 8
FANOUT = 1 << FANOUT_BITS
"""Entries of a node."""

Key = tuple[int, int, int]
"""Tree, level and index of a node."""
Bitmap = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


class Node:
    """A cached node or 4 KiB object: which one it is, where it lies, and its bytes.

    `parent` is the cached node that names it, in entry `place`; None if the root does.
    """

    __slots__ = (
        *("block", "dirty", "frame", "key", "n_children", "parent", "place", "raw", "version"),
        "words",
    )

    def __init__(self, key: Key, frame: int, raw: Bitmap, block: int, version: int) -> None:
        self.key = key
        self.parent: Node | None = None
        self.place = 0
        self.frame = frame
        self.raw = raw
        self.words: Words = raw.view(np.uint64).reshape(FANOUT, 2)
        self.block = block
        self.version = version
        self.dirty = False
        self.n_children = 0


def runs_of(indices: Indices) -> list[tuple[int, int, int]]:
    """Return (parent, start, stop) for each stretch of `indices` under one level-1 node."""
    if len(indices) == 0:
        return []
    first, last = int(indices[0]) >> FANOUT_BITS, int(indices[-1]) >> FANOUT_BITS
    if first == last:
        return [(first, 0, len(indices))]
    parents = indices >> FANOUT_BITS
    starts = np.flatnonzero(np.diff(parents, prepend=parents[0] - 1))
    stops = np.append(starts[1:], len(indices))
    return [(int(parents[a]), int(a), int(b)) for a, b in zip(starts, stops, strict=True)]
