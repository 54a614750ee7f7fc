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
